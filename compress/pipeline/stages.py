"""The stages before and after the sparse rounds: prepare, recover, export, measure, quantize, report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import cost, report, sparse, train
from compress.aim import dense_latency
from compress.bench import benchmark
from compress.bench.machine import vector_block
from compress.data import Loader
from compress.errors import MeasureError, TargetError, UsageError
from compress.export import Proof, metric, to_onnx
from compress.groups import Group, trace
from compress.pipeline import timing, zeros
from compress.pipeline.context import Event, Run
from compress.pipeline.lower import quantize
from compress.pipeline.rounds import make_regularizers, sparsify, teacher
from compress.pipeline.widths import branches_of, select_as, sensitivity_of
from compress.recipe import Recipe
from compress.regularize import REGULARIZERS
from compress.sensitivities import read
from compress.structure import removed
from compress.task import Classification, reported

FURTHER_SECONDS = 3.0  # for each further batch size: 20 rounds of two small networks


def epochs(recipe: Recipe, steps_per_epoch: int) -> tuple[list[int], int]:
    """How the epochs are spent: sparse epochs of each round, recovery epochs.

    Raises:
        UsageError: fewer epochs than rounds and recovery need.
    """
    prune, part = recipe.prune, recipe.train
    total = part.epochs or max(6, -(-1500 // steps_per_epoch))
    trains = prune.method in REGULARIZERS or prune.regularize or prune.rounds > 1
    if not trains:
        return [0], total
    sparse = min(max(prune.rounds, round(total * part.sparse_share)), total - 1)
    if sparse < prune.rounds:
        raise UsageError(
            f"train.epochs = {total} is too few: {prune.method} needs an epoch for each of {prune.rounds} rounds "
            "and one to recover; ask for more epochs"
        )
    each, rest = divmod(sparse, prune.rounds)
    return [each + (i < rest) for i in range(prune.rounds)], total - sparse


def prepare(run: Run) -> dict[str, Any]:
    """Trace and price the dense network, judge it, and see that the target is within reach before any training."""
    example = run.example()
    train.check_output(run.dense, example, run.task, run.data.labels)
    _check_score(run)
    if zeros.is_fine(run.recipe):
        zeros.check(run.recipe, run.dense)
    make_regularizers(run.recipe, {})
    groups = trace(run.dense, example)
    costs = cost.measure(run.dense, example)
    beside = _beside_weights(run, costs) if run.recipe.prune.metric == "size" else 0.0
    costs = replace(costs, fixed={**costs.fixed, "size": beside})
    dense_ms = _dense_latency(run)
    keep = timing.share(run.recipe, dense_ms)
    if run.recipe.prune.sensitivity:
        run.write("sensitivity.json", read(Path(run.recipe.prune.sensitivity)).model_dump(mode="json"))
    if not zeros.is_fine(run.recipe):
        even = {group.name: torch.ones(group.size) for group in groups}
        prices = timing.priced(run, costs, dense_ms or 0.0)
        whole = prices.total(run.recipe.prune.metric)
        found, may_leave = sensitivity_of(run), branches_of(run, run.dense)
        select_as(run.recipe, groups, even, prices, keep=keep, whole=whole, found=found, may_leave=may_leave)
    accuracy, loss = run.evaluate(run.dense)
    loader = run.loader(run.data.train, train=True)
    sparse, recover = epochs(run.recipe, len(loader))
    counted = {metric: costs.total(metric) for metric in cost.METRICS} | ({"latency": dense_ms} if dense_ms else {})
    return {
        "dense": {**counted, "val_top1": accuracy, "val_loss": loss},
        "keep": keep,
        "beside_weights": beside,
        "widths": {group.name: group.size for group in groups},
        "layers": {group.name: _writers(group) for group in groups},
        "frozen": {group.name: group.frozen for group in groups if group.frozen},
        "uncounted": list(costs.unknown),
        "epochs": {"sparse": sparse, "recover": recover},
        "compile": _is_compiled(run, loader, max(1, min(*sparse, recover))),
    }


def recover(run: Run) -> dict[str, Any]:
    """Train the cut network back, taught by the uncut one, and keep the best epoch on the validation split."""
    counts = run.prepared["epochs"]
    model = run.on_device(run.network(f"state/round-{len(counts['sparse'])}.safetensors"))
    settings = replace(run.settings("recover", counts["recover"]), keep_best=True)
    held = zeros.held(run.recipe, is_cut=True)
    for regularizer in held:
        regularizer.attach(model, ())
    try:
        outcome = run.train(model, settings, held, teacher=teacher(run))
    finally:
        for regularizer in held:
            regularizer.detach()
    run.save("pruned.safetensors", model.cpu(), pruned=not zeros.is_fine(run.recipe))
    return {
        "history": [{"phase": "recover", **line} for line in outcome.history],
        "val_top1": {"best": outcome.best_top1, "best_epoch": outcome.best_epoch, "last": outcome.last_top1},
    }


def export(run: Run) -> dict[str, Any]:
    """Both networks as ONNX, each proved equal to torch; then, once, the test split by ONNX Runtime itself."""
    split = run.data.test if run.data.test is not None else run.data.val
    found: dict[str, Any] = {"split": "test" if run.data.test is not None else "val", "images": len(split)}
    for name, file, model in (
        ("dense", "dense.onnx", copy.deepcopy(run.dense)),
        ("pruned", "model.onnx", run.network("pruned.safetensors")),
    ):
        path = run.folder.path / file
        proof = _to_onnx(run, model, path, name)
        value = metric(path, _on_cpu(run.loader(split)), run.task)
        found[name] = {
            **proof.model_dump(mode="json"),
            **reported(run.task, value),
            "size_bytes": path.stat().st_size,
        }
        if zeros.is_fine(run.recipe) and name == "pruned":
            found[name]["weights"] = zeros.count_file(model, path)
    share = found["pruned"]["size_bytes"] / found["dense"]["size_bytes"]
    if run.recipe.prune.metric == "size" and share > run.keep:
        raise TargetError(
            f"the file is {share:.4f} of the dense one, above the target {run.keep:g}; ask for less",
            lowest=share,
        )
    run.write("parity.json", found)
    return found


def measure(run: Run) -> dict[str, Any]:
    """Latency of the dense and the pruned file, interleaved in one run; under `further` that at other batch sizes.

    Memory may not suffice for those: what could not be measured is a warning, not the end of a run.
    """
    part, seed = run.recipe.bench, run.recipe.seed
    files = [run.folder.path / "dense.onnx", run.folder.path / "model.onnx"]
    first = benchmark(files, batch=part.batch, threads=part.threads, runtime=part.runtime, seed=seed)
    found = {**first.model_dump(mode="json"), "further": list[dict[str, Any]]()}
    for batch in dict.fromkeys(batch for batch in part.batches if batch != part.batch):
        try:
            more = benchmark(
                files, batch=batch, threads=part.threads, runtime=part.runtime, seconds=FURTHER_SECONDS, seed=seed
            )
            found["further"].append(more.model_dump(mode="json"))
        except MeasureError as error:
            found["conditions"]["warnings"].append(f"batch {batch} was not measured: {error}")
    for warning in found["conditions"]["warnings"]:
        run.emit(Event("measure", warning))
    run.write("bench.json", found)
    return found


def write_report(run: Run) -> dict[str, Any]:
    """The measured numbers with their conditions, for machines and for people."""
    pruned = run.network("pruned.safetensors")
    stages = {name: run.read(f"state/{name}.json") for name in STAGES if run.has(f"state/{name}.json")}
    widths = _widths(stages["prepare"], [found["plan"] for found in stages["sparse"]["rounds"]])
    asked = run.recipe.prune.round_to
    block = vector_block() if asked == "auto" else asked
    dense = stages["prepare"]["widths"]
    facts = {
        "recipe": run.recipe.model_dump(mode="json"),
        "keep": run.keep,
        "env": run.read("env.json"),
        "info": run.info.model_dump(mode="json"),
        "stages": stages,
        "pruned": _figures(pruned, run.example(), is_fine=zeros.is_fine(run.recipe)),
        "sensitivity": run.read("sensitivity.json") if run.has("sensitivity.json") else None,
        "density": zeros.of_layers(pruned) if zeros.is_fine(run.recipe) else {},
        "widths": widths,
        "dropped": list(removed(pruned)),
        "block": block,
        "unaligned": {name: width for name, width in widths.items() if width % block and width != dense[name]},
        "labels": list(run.data.labels),
        "data": {"name": run.data.name, "fingerprint": run.data.fingerprint, "notes": list(run.data.notes)},
    }
    report.write(run.folder.path, report.build(run.folder.path, facts))
    return {}


TOGETHER = frozenset({"sparse", "recover"})  # the stages in which all processes work; rank 0 does the others alone
# name -> stage; each writes state/NAME.json, and a stage whose file is there is not run again
STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "prepare": prepare,
    "sparse": sparsify,
    "recover": recover,
    "export": export,
    "measure": measure,
    "quantize": quantize,
    "report": write_report,
}


LAST = list(STAGES)[-1]


def stages_of(recipe: Recipe, *, until: str = LAST) -> dict[str, Callable[[Run], dict[str, Any]]]:
    """The stages that the recipe asks for, in order, up to the one called `until`."""
    first = list(STAGES)[: list(STAGES).index(until) + 1]
    return {name: STAGES[name] for name in first if name != "quantize" or recipe.quantize.to != "none"}


def _check_score(run: Run) -> None:
    """`obd-c` draws labels from the outputs, one per image."""
    prune = run.recipe.prune
    if "obd-c" in (prune.score, prune.method) and not isinstance(run.task, Classification):
        raise UsageError(f"the score obd-c is for classification, not for {run.task.name}; take hessian instead")


def _beside_weights(run: Run, costs: cost.Costs) -> float:
    """Bytes of the dense ONNX file that are no weights: the graph, names, metadata."""
    path = run.folder.path / "dense.onnx"
    _to_onnx(run, copy.deepcopy(run.dense), path, "dense")
    return float(path.stat().st_size - costs.total("size"))


def _dense_latency(run: Run) -> float | None:
    """Milliseconds of the dense network where they are what the target is about."""
    if not timing.is_timed(run.recipe):
        return None
    path = run.folder.path / "dense.onnx"
    _to_onnx(run, copy.deepcopy(run.dense), path, "dense")
    return dense_latency(path, on=timing.where(run.recipe), seed=run.recipe.seed)


def _to_onnx(run: Run, model: nn.Module, path: Path, name: str) -> Proof:
    example = run.example(17)
    is_sparse = zeros.is_fine(run.recipe) and name == "pruned"
    return to_onnx(model, example, path, metadata=_metadata(run, model, example, name), sparse=is_sparse)


def _writers(group: Group) -> list[str]:
    """The layers whose outputs a group's channels are, depthwise ones and norms included."""
    return sorted({part.name.rpartition(".")[0] for part in group.slices if part.dim == 0})


def _widths(prepared: dict[str, Any], plans: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What every group of the dense network is left with; 0 where all its layers are gone.

    A later round names a group by its first layer that is left.
    """
    widths, layers = dict(prepared["widths"]), prepared.get("layers", {})
    gone: tuple[str, ...] = ()
    for plan in plans:
        for name, kept in plan.get("kept", {}).items():
            known = name if name in widths else next((g for g, found in layers.items() if name in found), name)
            widths[known] = len(kept)
        gone += tuple(f"{path}." for path in plan.get("dropped", {}))
    return {
        name: 0 if gone and all(f"{layer}.".startswith(gone) for layer in layers[name]) else width
        for name, width in widths.items()
    }


def _metadata(run: Run, model: nn.Module, example: Tensor, name: str) -> dict[str, str]:
    """metadata_props: who made the file, from what, and what the network costs."""
    prune = run.recipe.prune
    values: dict[str, Any] = {
        "method": prune.method if name == "pruned" else "none",
        "target": run.keep if name == "pruned" else 1.0,
        "metric": prune.metric,
        "seed": run.recipe.seed,
        "source_sha256": run.read("env.json")["source_sha256"],
        "arch": run.info.arch,
        "data": run.public_data or "",
        "task": run.info.task,
        "labels": list(run.info.labels or ()),
        "mean": list(run.info.mean or ()),
        "std": list(run.info.std or ()),
        "dense": _figures(run.dense, example[:1]),
        name: _figures(model, example[:1], is_fine=zeros.is_fine(run.recipe) and name == "pruned"),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _figures(model: nn.Module, example: Tensor, *, is_fine: bool = False) -> dict[str, float]:
    """Parameters, without the zeros among single weights where `is_fine`, and MACs: a runtime multiplies by zeros."""
    costs = cost.measure(model, example)
    return {"params": sparse.remaining(model) if is_fine else costs.total("params"), "macs": costs.total("macs")}


def _is_compiled(run: Run, loader: Loader, count: int) -> bool:
    """Whether the phases are compiled: decided once and kept, so that a resumed run computes the same numbers."""
    if run.recipe.train.compile != "auto":
        return run.recipe.train.compile == "on"
    return train.compile_pays(
        run.on_device(copy.deepcopy(run.dense)), loader, epochs=count, device=run.device, task=run.task
    )


def _on_cpu(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    return ((images.cpu(), labels.cpu()) for images, labels in loader)
