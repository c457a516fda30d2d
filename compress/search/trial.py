"""One trial: an ordinary run in a folder of its own, up to the recovery; what was found is compared with the budget."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from compress import pipeline, ranks
from compress.checkpoint import ModelInfo
from compress.errors import DivergedError, TargetError
from compress.folder import RunFolder
from compress.pipeline import Event, OnEvent
from compress.recipe import Recipe
from compress.search.settings import Outcome, Search, State
from compress.search.space import at
from compress.task import Task, ours

HOPELESS = 10.0  # points beyond the budget, halfway through recovery, at which a trial is given up (ours)
LAST = "recover"  # the stage that a trial ends with; what comes later is for the winner


@dataclass(frozen=True)
class Bench:
    """What all trials share."""

    recipe: Recipe
    model: nn.Module
    info: ModelInfo
    folder: Path
    source_sha256: str
    emit: OnEvent
    task: Task | None
    wanted: Search

    @property
    def measured(self) -> str:
        """What the task measures."""
        return (self.task or ours(self.recipe.task or self.info.task)).metric

    def place(self, number: int | None) -> Path:
        """A trial's folder; None: the dense network's, trained for as long."""
        return self.folder / "trials" / ("dense" if number is None else f"{number:03d}")


class _Hopeless(Exception):
    """A trial that is given up, with the best metric so far."""

    def __init__(self, val: float) -> None:
        super().__init__(val)
        self.val = val


def reference(bench: Bench) -> float | None:
    """The metric that drops are counted from, where it is known before any trial: of the dense network, fine-tuned."""
    if bench.wanted.against == "given":
        return None
    folder = RunFolder(bench.folder)
    if not ranks.first(lambda: folder.has("state/reference.json")):
        bench.emit(Event("search", "the dense network, fine-tuned for as long"))
        recipe = at(bench.recipe, {"keep": 1.0, "metric": "params", "granularity": "filter", "redraw": False})
        found = _run(bench, recipe, None, bench.emit)
        ranks.first(lambda: folder.write("state/reference.json", {"val": found["val_top1"]["best"]}))
        ranks.first(lambda: strip(bench.place(None)))
    return float(ranks.first(lambda: folder.read("state/reference.json"))["val"])


def attempt(bench: Bench, number: int, params: dict[str, Any], against: float | None) -> Outcome:
    """Run a trial, from the start or from where it was broken off.

    Args:
        against: percent; None: what the dense network has as given.
    """
    began = time.monotonic()

    def spent() -> float:
        return time.monotonic() - began

    def base() -> float:
        return against if against is not None else _read(bench, number, "prepare")["dense"]["val_top1"]

    def ended(val: float, state: State) -> Outcome:
        reached, drop = ranks.first(lambda: [_reached(bench, number), base() - val])
        known = {"reached": reached, "val": val, "drop": drop}
        return Outcome(number=number, state=state, params=params, seconds=spent(), **known)

    try:
        found = _run(bench, at(bench.recipe, params), number, _watched(bench, number, base))
    except _Hopeless as given_up:
        return ended(given_up.val, "given up")
    except (TargetError, DivergedError) as error:
        if ranks.world() > 1:  # the others know nothing of it
            raise
        state: State = "out of reach" if isinstance(error, TargetError) else "diverged"
        return Outcome(number=number, state=state, params=params, seconds=spent(), text=str(error))
    vals = [float(epoch["val_top1"]) for epoch in found["history"]]
    hopeless = _hopeless(vals, len(vals), ranks.first(base) - bench.wanted.max_drop)
    return ended(float(found["val_top1"]["best"]), "done") if hopeless is None else ended(hopeless, "given up")


def strip(place: Path) -> None:
    """Leave of a trial that did not win what tells how it went: its weights would fill the disk."""
    shutil.rmtree(place / "state", ignore_errors=True)
    (place / "pruned.safetensors").unlink(missing_ok=True)


def _run(bench: Bench, recipe: Recipe, number: int | None, emit: OnEvent) -> dict[str, Any]:
    place = bench.place(number)

    def folder() -> str:
        if (place / "recipe.yaml").is_file():
            return str(RunFolder.open(place).path)
        shutil.rmtree(place, ignore_errors=True)  # killed before its recipe was written
        return str(RunFolder.create(place, recipe.to_yaml()).path)

    def mate() -> str:
        """Another trial that has the training towards sparsity which this one begins with; "" where there is none."""
        others = (other for other in sorted(place.parent.iterdir()) if other != place)
        return next((str(other) for other in others if pipeline.serves(other, keep=recipe.prune.keep)), "")

    opened = RunFolder(Path(ranks.first(folder)))
    given = {"folder": opened, "source_sha256": bench.source_sha256, "on_event": emit, "task": bench.task}
    given["reuse"] = Path(found) if (found := ranks.first(mate)) else None
    return pipeline.run(recipe, bench.model, bench.info, until=LAST, **given)  # type: ignore[arg-type]


def _watched(bench: Bench, number: int, base: Callable[[], float]) -> OnEvent:
    """Passes events on, and ends a trial that is far from the budget when half of its recovery is over.

    Not one that was broken off in its recovery, of which the first epochs are not known here: it is judged at its end.
    """
    is_broken = (bench.place(number) / "state" / f"{LAST}.pt").exists()
    vals: list[float] = []

    def watch(event: Event) -> None:
        bench.emit(event)
        at_epoch = event.progress
        if is_broken or ranks.world() > 1 or event.stage != LAST or at_epoch is None or at_epoch.top1 is None:
            return
        vals.append(at_epoch.top1)
        val = _hopeless(vals, at_epoch.epochs, base() - bench.wanted.max_drop)
        if val is not None:
            raise _Hopeless(val)

    return watch


def _hopeless(vals: Sequence[float], epochs: int, least: float) -> float | None:
    """The best metric so far, where it is HOPELESS points below `least` in the second half of `epochs`; else None."""
    for count in range(-(-epochs // 2), min(len(vals), epochs - 1) + 1):
        if count and max(vals[:count]) < least - HOPELESS:
            return max(vals[:count])
    return None


def _reached(bench: Bench, number: int) -> float:
    """The share of the recipe's metric that remains after the last cut."""
    return float(_read(bench, number, "sparse")["rounds"][-1]["plan"]["reached"])


def _read(bench: Bench, number: int, stage: str) -> dict[str, Any]:
    return RunFolder(bench.place(number)).read(f"state/{stage}.json")
