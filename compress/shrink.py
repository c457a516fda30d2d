"""shrink(): trace, score, select and apply in one call, for a network that is at hand in Python."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from compress import cost
from compress.bench.machine import vector_block
from compress.cost import Metric
from compress.errors import UsageError
from compress.groups import trace
from compress.plan import Plan, apply, select
from compress.scores import SCORES


def shrink(
    model: nn.Module,
    example: Tensor,
    *,
    keep: float,
    metric: Metric = "params",
    score: str = "l1",
    round_to: int | Literal["auto"] = 8,
) -> Plan:
    """Remove the least important channels of `model`, in place, until `keep` of the metric is left at most.

    Args:
        example: one input batch (N, C, H, W).
        keep: share of `metric` that may remain, 0 < keep <= 1.
        score: a key of SCORES.
        round_to: widths become multiples of this; `auto` takes this machine's vector unit and adapts to narrow layers.

    Raises:
        PruneError, TargetError, UsageError: as `trace` and `select`; the network is untouched then.
    """
    if score not in SCORES:
        raise UsageError(f"no score is called {score!r}; there are {', '.join(SCORES)}")
    groups = trace(model, example)
    plan = select(
        groups,
        SCORES[score](model, groups),
        cost.measure(model, example),
        keep=keep,
        metric=metric,
        round_to=vector_block() if round_to == "auto" else round_to,
        adapt=round_to == "auto",
    )
    apply(model, groups, plan)
    return plan
