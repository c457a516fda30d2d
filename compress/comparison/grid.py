"""What a comparison consists of: every method at every target with every seed, and the two controls."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from compress.errors import UsageError
from compress.files import atomic_write
from compress.regularize import REGULARIZERS
from compress.scores import SCORES

NAME = "compare.yaml"
TUNED = "dense, fine-tuned"
SCRATCH = "pruned, from scratch"
CONTROLS = (TUNED, SCRATCH)
# Methods that are compared with another score than the one they have here: CKA-SR's paper trains and ranks by the
# weights afterwards, the score of `--method cka-sr` is ours.
SCORED = {"cka-sr": "l2"}


class Grid(BaseModel):
    """Kept as compare.yaml; whoever works on the comparison must be asked for the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    models: tuple[str, ...] = Field(min_length=1, description="checkpoints, absolute")
    methods: tuple[str, ...] = Field(min_length=1)
    targets: tuple[float, ...] = Field(min_length=1, description="shares that remain")
    seeds: int = Field(1, ge=1, le=100)
    metric: str = "params"
    options: tuple[str, ...] = Field((), description="further arguments of `compress prune`, the same for every run")

    @property
    def digest(self) -> str:
        """Tells this comparison from others in one storage."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json")).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Cell:
    """One run. The dense control has no target."""

    model: str
    row: str
    target: float | None
    seed: int
    label: str  # of the network

    @property
    def name(self) -> str:
        """Of its folder, and of the cell in the queue."""
        share = () if self.target is None else (f"{self.target:g}",)
        return "-".join((plain(self.label), plain(self.row), *share, str(self.seed)))


def cells(grid: Grid) -> Iterator[Cell]:
    """All runs, one seed of every row before the next, so that an unfinished comparison is an even one."""
    named = labels(grid.models)
    for seed in range(grid.seeds):
        for model, label in named.items():
            for target in grid.targets:
                for method in (*grid.methods, SCRATCH):
                    yield Cell(model, method, target, seed, label)
            yield Cell(model, TUNED, None, seed, label)


def labels(models: Sequence[str]) -> dict[str, str]:
    """Checkpoint -> what it is called: its file's name, with a mark where that does not tell it from the others."""
    plain_ones = [plain(Path(model).stem) for model in models]
    found = {}
    for model, name in zip(models, plain_ones, strict=True):
        is_clear = plain_ones.count(name) == 1 and any(letter.isalnum() for letter in name)
        mark = hashlib.sha256(model.encode()).hexdigest()[:6]
        found[model] = Path(model).stem if is_clear else f"{Path(model).stem}-{mark}"
    return found


def arguments(grid: Grid, cell: Cell, out: Path) -> list[str]:
    """The run as arguments of the command line."""
    given = ["prune", cell.model, *method_options(cell.row), "--seed", str(cell.seed), *grid.options]
    if cell.target is not None:
        given += ["--target", f"{cell.target:g}", "--metric", grid.metric]
    return [*given, "--out", str(out), "--resume"]


def method_options(row: str) -> list[str]:
    """What a row of the comparison adds to `compress prune`.

    `halo+l2` is HALO with the score l2; `ffr+halo` HALO with FFR beside it: what comes last is the method, or the score
    where something trains before it.

    Raises:
        UsageError: a name that is unknown.
    """
    if row == TUNED:
        return ["--method", "l2", "--target", "1"]
    if row == SCRATCH:  # a network from fresh weights takes the full rate
        return ["--method", "l2", "--set", "prune.redraw=true", "--set", "train.lr=0.1"]
    *first, last = row.split("+")
    for name in (*first, last):
        if name not in REGULARIZERS and (name not in SCORES or name in first):
            allowed = ", ".join([*REGULARIZERS, *SCORES])
            raise UsageError(f"--methods {row}: {name!r} is unknown; there are {allowed}, and METHOD+SCORE of them")
    if not first:
        return ["--method", last, *(["--score", SCORED[last]] if last in SCORED else [])]
    score = ["--score", last] if last in SCORES else []
    *beside, method = first if score else row.split("+")
    return ["--method", method, *score, *(part for name in beside for part in ("--regularize", name))]


def settle(folder: Path, grid: Grid) -> None:
    """Keep the grid in the comparison's folder, or see that it is the one that is kept there.

    Raises:
        UsageError: another comparison was begun there.
    """
    before = read(folder)
    if before is None:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / NAME, yaml.safe_dump(grid.model_dump(mode="json"), sort_keys=False))
        return
    for key, value in grid.model_dump().items():
        if value != getattr(before, key):
            text = f"{folder} was begun with {key} = {getattr(before, key)!r}, not {value!r}"
            raise UsageError(f"{text}; choose another --out, or give --out alone to go on")


def read(folder: Path) -> Grid | None:
    """The grid that a folder was begun with; None where there is none.

    Raises:
        UsageError: a damaged file.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        return Grid.model_validate(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, ValidationError) as error:
        raise UsageError(f"{path} is damaged ({str(error).splitlines()[0]}); begin again in another --out") from error


def plain(text: str) -> str:
    """The text as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", text)
