"""A network made smaller in one call: trace, score, measure, select, apply."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import nn

from compress.aim import aim, dense_file, measured_share
from compress.bench.machine import vector_block
from compress.bench.on import On, parse
from compress.cost import Metric, measure
from compress.errors import UsageError
from compress.example import Example
from compress.groups import trace
from compress.plan import Plan, apply, select
from compress.prices import price
from compress.scores import SCORES, Batches, Scores


def shrink(
    model: nn.Module,
    example: Example,
    *,
    keep: float,
    metric: Metric = "params",
    score: str | Scores = "l1",
    round_to: int | Literal["auto"] = 8,
    batches: Batches | None = None,
    on: str = str(On()),
) -> Plan:
    """Remove the least important channels of `model`, in place, until `keep` of the metric is left at most.

    Args:
        example: one input batch (N, C, H, W), or a tuple where the forward pass takes several.
        keep: share of `metric` that may remain, 0 < keep <= 1. Of a latency: within 5 % of it, as measured here.
        score: a key of SCORES, or the scores themselves, such as a regulariser's: group name -> (size,).
        round_to: widths become multiples of this; `auto` takes this machine's vector unit and adapts to narrow layers.
        batches: pairs of images and labels, for the scores in DATA_DRIVEN; a few hundred images do.
        on: where a latency is measured, RUNTIME:threads=N:batch=N. Layers are timed once per machine (about a minute
            for a large network), then whole networks a few times.

    Raises:
        PruneError, TargetError, UsageError: as `trace` and `select`; the network is untouched then.
        MeasureError: the runtime of `on` is not active here.
    """
    if isinstance(score, str) and score not in SCORES:
        raise UsageError(f"no score is called {score!r}; there are {', '.join(SCORES)}")
    groups, place = trace(model, example), parse(on)
    scores = SCORES[score](model, groups, batches) if isinstance(score, str) else score
    costs = measure(model, example)
    block, adapt = vector_block() if round_to == "auto" else round_to, round_to == "auto"

    def choose(share: float) -> Plan:
        return select(groups, scores, costs, keep=share, metric=metric, round_to=block, adapt=adapt)

    if metric != "latency":
        plan = choose(keep)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file, dense_ms = dense_file(model, example, Path(folder), on=place)
            costs = replace(costs, times=price(model, groups, example, on=place, dense_ms=dense_ms))
            found, _ = aim(choose, measured_share(model, groups, example, file, on=place), keep=keep)
        plan = found.plan.model_copy(update={"keep": keep, "reached": found.measured})
    apply(model, groups, plan)
    return plan
