"""What a search is asked for, and what one of its trials found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import UsageError
from compress.files import atomic_write
from compress.recipe import Recipe, make

_FROZEN = ConfigDict(frozen=True, extra="forbid")
NAME = "search.yaml"
TRIALS = 12  # enough to halve the share five times, to close in on the edge, and to try other limits there (ours)

State = Literal["done", "given up", "out of reach", "diverged"]


class Search(BaseModel):
    """The budget, and how much may be spent on finding what fits it."""

    model_config = _FROZEN
    max_drop: float = Field(ge=0, le=100, description="points of the task's metric on the validation split")
    trials: int = Field(TRIALS, ge=1, le=1000, description="trial runs at most")
    against: Literal["given", "tuned"] = Field(
        "given", description="what the drop is from: the dense network as given, or fine-tuned for as long"
    )


class Outcome(BaseModel):
    """One trial. `val` is the metric in percent on the validation split, at the best epoch after the cut."""

    model_config = _FROZEN
    number: int
    state: State
    params: dict[str, Any] = Field(description="what was proposed: keep, and limits per group where they are searched")
    reached: float | None = Field(None, description="share of the recipe's metric that remained, 0 to 1")
    val: float | None = None
    drop: float | None = Field(None, description="points below the reference; negative: above it")
    seconds: float = 0.0
    text: str = Field("", description="why it was not finished")

    @property
    def keep(self) -> float:
        return float(self.params["keep"])


def fits(outcome: Outcome, wanted: Search) -> bool:
    """Whether a trial was finished within the budget; differences of rounding do not count."""
    return outcome.state == "done" and outcome.drop is not None and outcome.drop <= wanted.max_drop + 1e-9


def write(folder: Path, wanted: Search, recipe: Recipe) -> None:
    """Keep what was asked, and the recipe that every trial changes, in the search's folder."""
    values = {"search": wanted.model_dump(mode="json"), "recipe": recipe.model_dump(mode="json")}
    atomic_write(folder / NAME, yaml.safe_dump(values, sort_keys=False))


def read(folder: Path) -> tuple[Search, Recipe] | None:
    """What `write` kept; None where the folder is no search's.

    Raises:
        UsageError: a damaged file.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(path.read_text())
        return Search.model_validate(values["search"]), make(values["recipe"])
    except (yaml.YAMLError, ValidationError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({str(error).splitlines()[0]}); begin again in another --out") from error


def wanted_from(values: dict[str, Any]) -> Search:
    """The search that options ask for.

    Raises:
        UsageError: a value out of range.
    """
    try:
        return Search.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        text = first["msg"][0].lower() + first["msg"][1:]
        raise UsageError(f"{option} {first['input']}: {text}") from error
