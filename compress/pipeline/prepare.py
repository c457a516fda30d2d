"""The first stage: what can be known, and refused, before any training."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress import cost, ranks, train
from compress.aim import dense_latency
from compress.allocation import powers
from compress.data import Loader
from compress.errors import UsageError
from compress.groups import Group, trace
from compress.pipeline import timing, zeros
from compress.pipeline.context import Run
from compress.pipeline.export import write_onnx
from compress.pipeline.reuse import adopt
from compress.pipeline.rounds import sparse_trainers
from compress.pipeline.widths import branches_of, select_as, sensitivity_of
from compress.recipe import Recipe
from compress.regularize import REGULARIZERS
from compress.sensitivities import read
from compress.task import Classification


def epochs(recipe: Recipe, steps_per_epoch: int, keep: float) -> tuple[list[int], int]:
    """How the epochs are spent: before each cut, and after the last one.

    Before the first cut regularisers train towards sparsity; scores alone have nothing to train there.

    Raises:
        UsageError: fewer epochs than the cuts need.
    """
    prune, part = recipe.prune, recipe.train
    total = part.epochs or max(6, -(-1500 // steps_per_epoch))
    trains = bool(prune.method in REGULARIZERS or prune.regularize)
    least = trains + (1 if prune.rounds == "auto" else prune.rounds)
    if total < least:
        raise UsageError(
            f"train.epochs = {total} is too few: {prune.method} needs {least}, one before each cut that training "
            "precedes and one after the last; ask for more epochs"
        )
    sparse = max(1, min(round(total * part.sparse_share), total - least + 1)) if trains else 0
    after = total - sparse
    rounds = _rounds(recipe, keep, after) if prune.rounds == "auto" else prune.rounds
    between = _between(after, rounds)
    return [sparse, *[between] * (rounds - 1)], after - between * (rounds - 1)


def _rounds(recipe: Recipe, keep: float, count: int) -> int:
    """A cut for each halving, while half of the `count` epochs after the first are left for the end. [ours]

    One where the weights are drawn anew, or where training holds the target's density from its first step.
    """
    if recipe.prune.redraw or sparse_trainers(recipe):
        return 1
    halvings = max(1, round(-math.log2(keep)))
    return next(n for n in range(halvings, 0, -1) if 2 * (n - 1) * _between(count, n) <= count)


def _between(count: int, rounds: int) -> int:
    """Epochs between two cuts, of `count` after the first; with two cuts, a fifth. [ours, benchmarks/LOG.md]"""
    return max(1, count // (rounds + 3))


def prepare(run: Run) -> dict[str, Any]:
    """Trace and price the dense network, judge it, and see that the target is within reach before any training."""
    if (source := run.reuse) is not None:
        ranks.first(lambda: adopt(run, source))
    example = run.example()
    train.check_output(run.dense, example, run.task, run.data.labels)
    _check_score(run)
    if zeros.is_fine(run.recipe):
        zeros.check(run.recipe, run.dense)
    groups = trace(run.dense, example)
    costs = cost.measure(run.dense, example)
    beside = _beside_weights(run, costs) if run.recipe.prune.metric == "size" else 0.0
    costs = replace(costs, fixed={**costs.fixed, "size": beside})
    dense_ms = _dense_latency(run)
    keep = timing.share(run.recipe, dense_ms)
    if run.recipe.prune.sensitivity:
        run.write("sensitivity.json", read(Path(run.recipe.prune.sensitivity)).model_dump(mode="json"))
    falls: dict[str, float] = {}
    if not zeros.is_fine(run.recipe):
        prices = timing.priced(run, costs, dense_ms or 0.0, groups)
        _check_reach(run, groups, prices, keep)
        falls = _falls(run.recipe, groups, prices)
    accuracy, loss = run.evaluate(copy.deepcopy(run.dense))  # the dense network stays where it is
    loader = run.loader(run.data.train, train=True)
    sparse, recover = epochs(run.recipe, len(loader), keep)
    counted = {metric: costs.total(metric) for metric in cost.METRICS} | ({"latency": dense_ms} if dense_ms else {})
    return {
        "dense": {**counted, "val_top1": accuracy, "val_loss": loss},
        "keep": keep,
        "beside_weights": beside,
        "falls": falls,
        "widths": {group.name: group.size for group in groups},
        "layers": {group.name: _writers(group) for group in groups},
        "frozen": {group.name: group.frozen for group in groups if group.frozen},
        "uncounted": list(costs.unknown),
        "epochs": {"sparse": sparse, "recover": recover},
        "compile": _is_compiled(run, loader, max(1, min(*sparse, recover))),
    }


def _check_score(run: Run) -> None:
    """`obd-c` draws labels from the outputs, one per image."""
    prune = run.recipe.prune
    if "obd-c" in (prune.score, prune.method) and not isinstance(run.task, Classification):
        raise UsageError(f"the score obd-c is for classification, not for {run.task.name}; take hessian instead")


def _check_reach(run: Run, groups: Sequence[Group], costs: cost.Costs, keep: float) -> None:
    """See that widths for the target exist, whichever channels will be the important ones."""
    even, whole = {group.name: torch.ones(group.size) for group in groups}, costs.total(run.recipe.prune.metric)
    found, may_leave = sensitivity_of(run), branches_of(run, run.dense)
    select_as(run.recipe, groups, even, costs, keep=keep, whole=whole, found=found, may_leave=may_leave)


def _falls(recipe: Recipe, groups: Sequence[Group], costs: cost.Costs) -> dict[str, float]:
    """How fast each group shrinks with the target: later cuts go by the dense network's prices, too."""
    free, metric = [group for group in groups if group.frozen is None], recipe.prune.metric
    return powers(free, costs, cost.Widths(groups, costs, metric), recipe.prune.allocation)


def _beside_weights(run: Run, costs: cost.Costs) -> float:
    """Bytes of the dense ONNX file that are no weights: the graph, names, metadata."""
    path = run.folder.path / "dense.onnx"
    write_onnx(run, copy.deepcopy(run.dense), path, "dense")
    return float(path.stat().st_size - costs.total("size"))


def _dense_latency(run: Run) -> float | None:
    """Milliseconds of the dense network where they are what the target is about."""
    if not timing.is_timed(run.recipe):
        return None
    path = run.folder.path / "dense.onnx"
    write_onnx(run, copy.deepcopy(run.dense), path, "dense")
    return dense_latency(path, on=timing.where(run.recipe), seed=run.recipe.seed)


def _writers(group: Group) -> list[str]:
    """The layers whose outputs a group's channels are, depthwise ones and norms included."""
    return sorted({part.name.rpartition(".")[0] for part in group.slices if part.dim == 0})


def _is_compiled(run: Run, loader: Loader, count: int) -> bool:
    """Whether the phases are compiled: decided once and kept, so that a resumed run computes the same numbers."""
    if run.recipe.train.compile != "auto":
        return run.recipe.train.compile == "on"
    return train.compile_pays(
        run.on_device(copy.deepcopy(run.dense)), loader, epochs=count, device=run.device, task=run.task
    )
