"""Which widths a recipe asks for: its knobs handed to plan.select, on a network in a run or outside of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from compress import cost
from compress.bench.machine import vector_block
from compress.errors import UsageError
from compress.groups import Branch, Group, branches, trace
from compress.pipeline import timing
from compress.pipeline.context import Run
from compress.plan import NO_LIMITS, Plan, select
from compress.recipe import Recipe
from compress.scores import DATA_DRIVEN, SCORES, Scores
from compress.sensitivities import Sensitivity, limits, read

BRANCH_IMAGES = 32  # validation images that tell what the outputs lose without a branch (ours)
MAX_GROUP_DROP = 1.0  # points that a group alone may cost where the recipe names a sensitivity and no limit (ours)


def select_as(
    recipe: Recipe,
    groups: Sequence[Group],
    scores: Scores,
    costs: cost.Costs,
    *,
    keep: float,
    whole: float,
    found: Sensitivity | None,
    may_leave: Sequence[Branch] = (),
    falls: Mapping[str, float] | None = None,
) -> Plan:
    """plan.select as the recipe says, for a share `keep` of the dense cost `whole`, under the limits of `found`."""
    prune = recipe.prune
    drop = prune.max_group_drop
    if found is None and (drop or prune.max_group_distortion):
        raise UsageError("prune.max_group_drop and max_group_distortion need prune.sensitivity, a file to go by")
    if drop is None and found is not None and found.dense.value is not None and prune.max_group_distortion is None:
        drop = MAX_GROUP_DROP
    return select(
        groups,
        scores,
        costs,
        keep=keep,
        metric=prune.metric,
        whole=whole,
        round_to=vector_block() if prune.round_to == "auto" else prune.round_to,
        adapt=prune.round_to == "auto",
        allocation=prune.allocation,
        floor=prune.floor,
        falls=falls,
        limits=limits(found, groups, max_drop=drop, max_distortion=prune.max_group_distortion) if found else NO_LIMITS,
        branches=may_leave,
    )


def branches_of(run: Run, model: nn.Module) -> tuple[Branch, ...]:
    """The branches that may leave, judged on the first validation images; none unless the recipe asks for it."""
    return branches(model, run.example(BRANCH_IMAGES)) if run.recipe.prune.drop_blocks else ()


def sensitivity_of(run: Run) -> Sensitivity | None:
    """What the recipe names, as the run's folder has kept it; None where it names nothing."""
    return Sensitivity.model_validate(run.read("sensitivity.json")) if run.recipe.prune.sensitivity else None


def dry_run(recipe: Recipe, model: nn.Module, example: Tensor) -> tuple[Plan, tuple[Group, ...], cost.Costs, str]:
    """What would be cut from the network as it stands, without training: plan, groups, dense costs, score used.

    There is no data here: where the channels would be ranked after training or by a score that needs data, the plan
    ranks them by `l2`, and branches are judged on `example`. Bytes are those of the weights.
    """
    groups = trace(model, example)
    costs = cost.measure(model, example)
    keep = recipe.prune.keep
    if timing.is_timed(recipe):
        times, dense_ms = timing.dry(recipe, model, groups, example)
        costs, keep = replace(costs, times=times), timing.share(recipe, dense_ms)
    score = recipe.prune.score or recipe.prune.method
    score = score if score in SCORES and score not in DATA_DRIVEN else "l2"
    whole = costs.total(recipe.prune.metric)
    found = read(Path(recipe.prune.sensitivity)) if recipe.prune.sensitivity else None
    scores = SCORES[score](model, groups)
    may_leave = branches(model, example) if recipe.prune.drop_blocks else ()
    plan = select_as(recipe, groups, scores, costs, keep=keep, whole=whole, found=found, may_leave=may_leave)
    return plan, groups, costs, score
