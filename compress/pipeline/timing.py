"""The metric `latency`: the dense network timed, its layers priced, the widths corrected by whole networks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compress.aim import Try, aim, dense_file, measured_share
from compress.bench.on import On
from compress.cost import Costs, Times
from compress.errors import UsageError
from compress.example import Example
from compress.groups import Group, trace
from compress.pipeline.context import Event, Run
from compress.plan import Plan
from compress.prices import price
from compress.recipe import Recipe


def is_timed(recipe: Recipe) -> bool:
    return recipe.prune.metric == "latency"


def where(recipe: Recipe) -> On:
    """The runtime, threads and batch that latencies of the run are measured with."""
    return On(recipe.bench.runtime, recipe.bench.threads, recipe.bench.batch)


def share(recipe: Recipe, dense_ms: float | None) -> float:
    """What remains of the metric: as the recipe says, or its milliseconds as a share of the dense latency.

    Raises:
        UsageError: the dense network is as fast already.
    """
    wanted = recipe.prune.target_ms
    if wanted is None or dense_ms is None:
        return recipe.prune.keep
    if wanted >= dense_ms:
        raise UsageError(
            f"--target-ms {wanted:g}: the dense network takes {dense_ms:.3g} ms on {where(recipe)}; ask for less"
        )
    return wanted / dense_ms


def priced(run: Run, costs: Costs, dense_ms: float, groups: Sequence[Group] | None = None) -> Costs:
    """The costs with the milliseconds of every layer, timed on this machine or in its cache.

    Args:
        groups: of the dense network; None: they are traced.
    """
    if not is_timed(run.recipe):
        return costs
    on, told = where(run.recipe), [0]

    def say(done: int, whole: int) -> None:
        if 4 * done // whole > told[0]:  # at every quarter: a large network takes a minute
            told[0] = 4 * done // whole
            run.emit(Event("latency", f"{done:,} of {whole:,} layers and widths timed on {on}"))

    groups = groups or trace(run.dense, run.example())
    times = price(run.dense, groups, run.example(), on=on, dense_ms=dense_ms, on_progress=say)
    return replace(costs, times=times)


def aimed(
    run: Run, model: nn.Module, groups: Sequence[Group], choose: Callable[[float], Plan], keep: float
) -> tuple[Plan, tuple[Try, ...]]:
    """The plan whose whole network takes `keep` of the dense latency, within the tolerance of aim.py."""
    measure = measured_share(
        model, groups, run.example(2), run.folder.path / "dense.onnx", on=where(run.recipe), seed=run.recipe.seed
    )

    def noted(plan: Plan) -> float:
        found = measure(plan)
        run.emit(Event("latency", f"a network cut to it takes {found:.4g} of the dense latency, {keep:.4g} is wanted"))
        return found

    closest, tries = aim(choose, noted, keep=keep)
    return closest.plan.model_copy(update={"keep": keep, "reached": closest.measured}), tries


def facts(tries: Sequence[Try]) -> list[dict[str, Any]]:
    """What each try asked for and gave, as shares of the dense latency."""
    return [{"asked": one.asked, "measured": one.measured} for one in tries]


def dry(recipe: Recipe, model: nn.Module, groups: Sequence[Group], example: Example) -> tuple[Times, float]:
    """The layers' times and the dense latency of a network outside a run."""
    with tempfile.TemporaryDirectory() as folder:
        _, dense_ms = dense_file(model, example, Path(folder), on=where(recipe), seed=recipe.seed)
    return price(model, groups, example, on=where(recipe), dense_ms=dense_ms), dense_ms
