"""What a search may change: the share to keep, and the limits per group that cost nothing to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from compress.checkpoint import ModelInfo
from compress.errors import TargetError, UsageError
from compress.inputs import image_shape, noise
from compress.pipeline import dry_run, dry_run_weights
from compress.reach import rounded_up
from compress.recipe import Recipe

HIGHEST = 0.95  # share above which a cut is not worth a run (ours)
LOWEST = 0.002  # share below which nothing is tried (ours)
ALLOCATIONS = ("balanced", "uniform", "global")
FLOORS = (0.25, 1.0)  # of the width that an even cut would leave: what `global` may take from a layer
DISTORTIONS = (0.05, 1.0)  # of the outputs' norm, that a group may cause alone
START = 0.5  # of those ranges, where the ladder stands: the limits that the recipe would have


class Space(BaseModel):
    """Name -> (lowest, highest) or the choices; `base` is where the ladder stands."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    keep: tuple[float, float]
    choices: dict[str, tuple[str, ...]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    base: dict[str, Any] = {}

    @property
    def has_limits(self) -> bool:
        return bool(self.base)


def space(recipe: Recipe, model: nn.Module, info: ModelInfo) -> Space:
    """Shares from the lowest that can be reached; of the limits those that the recipe leaves at their defaults.

    `allocation` says how layers compete, `floor` how narrow one may get where they do, and, where the recipe names a
    sensitivity, `max_group_distortion` what a group alone may change. None of them costs a pass over data. A knob that
    the recipe has moved from its default stays as it is.

    Raises:
        TargetError: not even the highest share can be reached.
    """
    prune, defaults = recipe.prune, type(recipe.prune)()
    choices: dict[str, tuple[str, ...]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    base: dict[str, Any] = {}
    if prune.granularity == "weight":
        return Space(keep=_shares(recipe, model, info))
    if prune.allocation == defaults.allocation and prune.floor == defaults.floor:
        choices["allocation"], base["allocation"] = ALLOCATIONS, prune.allocation
        ranges["floor"], base["floor"] = FLOORS, prune.floor
    if prune.sensitivity and prune.max_group_distortion is None and prune.max_group_drop is None:
        ranges["max_group_distortion"], base["max_group_distortion"] = DISTORTIONS, START
    return Space(keep=_shares(at(recipe, base), model, info), choices=choices, ranges=ranges, base=base)


def _shares(recipe: Recipe, model: nn.Module, info: ModelInfo) -> tuple[float, float]:
    low = lowest(recipe, model, info)
    if low > HIGHEST:
        raise TargetError(f"nothing below {low:.3g} of the {recipe.prune.metric} can be reached", lowest=low)
    return low, HIGHEST


def lowest(recipe: Recipe, model: nn.Module, info: ModelInfo) -> float:
    """The lowest share of the recipe's metric that the network can be cut to, and LOWEST at least."""
    try:
        shape = image_shape(model, info, recipe.data.image_size)
    except UsageError:  # it will be known when the images are
        return LOWEST
    asked = at(recipe, {"keep": 1e-9})
    try:
        if recipe.prune.granularity == "weight":
            dry_run_weights(asked, model)
        else:
            dry_run(asked, model, noise(shape, 1))
    except TargetError as error:
        return max(LOWEST, rounded_up(error.lowest))
    return LOWEST


def at(recipe: Recipe, params: Mapping[str, Any]) -> Recipe:
    """The recipe of a trial: an ordinary one."""
    return recipe.model_copy(update={"prune": recipe.prune.model_copy(update=dict(params))})
