"""search(): trial after trial until the budget's edge is known, then the rest of the run for the winner."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from compress import pipeline, ranks
from compress.checkpoint import ModelInfo
from compress.errors import AccuracyError
from compress.files import atomic_path, atomic_write
from compress.folder import RunFolder
from compress.pipeline import Event, OnEvent
from compress.recipe import Recipe
from compress.report.words import metric_words
from compress.search import document
from compress.search.proposals import best, propose
from compress.search.record import Journal
from compress.search.settings import Outcome, Search, fits
from compress.search.space import Space, at, space
from compress.search.trial import Bench, attempt, reference, strip
from compress.task import Task

# the search's own; not the winner's
PROTECTED = {"recipe.yaml", "search.yaml", "search.json", "search.html", "trials", "log.txt"}
OWN_STATE = {"lock", "search.journal", "space.json", "reference.json", "winner.json"}


def search(
    recipe: Recipe,
    model: nn.Module,
    info: ModelInfo,
    *,
    wanted: Search,
    folder: RunFolder,
    source_sha256: str = "",
    on_event: OnEvent = lambda event: None,
    task: Task | None = None,
) -> dict[str, Any]:
    """Find the smallest network whose validation metric is at most `wanted.max_drop` points down; leave its run.

    Each trial is a run in trials/NNN with the recipe's `prune.keep`, and limits per group, changed: see `space`. It
    ends after recovery. The winner's run then becomes the folder's own and is finished: the test split is read once.
    Trials that end before are not done again; one that was killed goes on at its last finished epoch.

    Args: as pipeline.run; `wanted` is the budget.

    Returns: the winner's report, as in report.json, and under `search` what search.json holds.

    Raises:
        AccuracyError: nothing tried fits; names the smallest drop seen.
        CompressError: as pipeline.run; the search can be continued.
    """
    ranks.join()
    pipeline.check(recipe)
    bench = Bench(recipe, model, info, folder.path, source_sha256, on_event, task, wanted)
    with ExitStack() as held:
        ranks.first(lambda: _hold(held, folder))
        found = Space.model_validate(ranks.first(lambda: _space(bench)))
        against = reference(bench)
        done = _trials(bench, found, against)
        winner = best(done, wanted)
        if winner is None:
            raise AccuracyError(_nothing(bench, done))
        chosen = at(recipe, winner.params)
        ranks.first(lambda: _install(bench, winner, chosen))
    report = pipeline.run(chosen, model, info, folder=folder, source_sha256=source_sha256, on_event=on_event, task=task)
    return {**report, "search": ranks.first(lambda: folder.read("search.json"))}


def _hold(held: ExitStack, folder: RunFolder) -> None:
    held.enter_context(folder.lock())


def _space(bench: Bench) -> dict[str, Any]:
    """Found once: the lowest share in reach takes a trace of the network."""
    folder = RunFolder(bench.folder)
    if not folder.has("state/space.json"):
        bench.emit(Event("search", "looking for the lowest share that can be reached"))
        folder.write("state/space.json", space(bench.recipe, bench.model, bench.info).model_dump(mode="json"))
    return folder.read("state/space.json")


def _trials(bench: Bench, found: Space, against: float | None) -> list[Outcome]:
    """All trials that are worth their cost, at most as many as were asked for."""
    wanted, seed = bench.wanted, bench.recipe.seed
    journal: list[Journal] = []  # rank 0's

    def next_one() -> dict[str, Any]:
        if not journal:
            journal.append(Journal(bench.folder / "state" / "search.journal"))
        done = journal[0].done()
        document.write(bench.folder, wanted, bench.recipe, done, against=against, metric=bench.measured)
        begun = journal[0].begun()
        if begun is None and len(done) < wanted.trials:
            params = propose(done, found, wanted, seed=seed)
            begun = None if params is None else (journal[0].begin(params, found), params)
        return {"done": [outcome.model_dump(mode="json") for outcome in done], "begun": begun}

    while True:
        told = ranks.first(next_one)
        if told["begun"] is None:
            return [Outcome.model_validate(outcome) for outcome in told["done"]]
        number, params = told["begun"]
        bench.emit(Event("search", f"trial {number} (of {wanted.trials} at most): {document.summary(params)}"))
        outcome = attempt(bench, number, params, against)
        bench.emit(Event("search", document.sentence(outcome, wanted, bench.recipe.prune.metric)))
        ranks.first(lambda: _end(bench, journal[0], outcome))  # noqa: B023  called at once


def _end(bench: Bench, journal: Journal, outcome: Outcome) -> None:
    """Note the outcome; of all trials but the best one the weights go.

    As long as none fits, one keeps them for the next, which takes its training towards sparsity.
    """
    journal.end(outcome, bench.wanted)
    done = journal.done()
    sources = (other for other in reversed(done) if pipeline.serves(bench.place(other.number), keep=other.keep))
    spared = best(done, bench.wanted) or next(sources, None)
    for other in done:
        if spared is None or other.number != spared.number:
            strip(bench.place(other.number))


def _install(bench: Bench, winner: Outcome, chosen: Recipe) -> None:
    """Make the winner's run that of the search's folder; the stages after the recovery are done there."""
    folder = RunFolder(bench.folder)
    told = {"number": winner.number, "params": winner.params}
    if folder.has("state/winner.json") and folder.read("state/winner.json") == told:
        return
    last = Path("state", "info.json")  # whoever finds it takes the other files to be whole
    (bench.folder / last).unlink(missing_ok=True)
    for path in (*bench.folder.iterdir(), *(bench.folder / "state").iterdir()):
        if path.name == "state" or path.name in PROTECTED | OWN_STATE:
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    place = bench.place(winner.number)
    for path in sorted((*place.iterdir(), *(place / "state").iterdir()), key=lambda path: path == place / last):
        is_own = path.name in PROTECTED | OWN_STATE or path.suffix == ".pt"  # .pt: what a resumed phase needs
        if not is_own and path.is_file():
            with atomic_path(bench.folder / path.relative_to(place)) as temporary:
                shutil.copyfile(path, temporary)
    atomic_write(bench.folder / "recipe.yaml", chosen.to_yaml())
    folder.write("state/winner.json", told)


def _nothing(bench: Bench, done: Sequence[Outcome]) -> str:
    """Why there is no winner, and what may help."""
    wanted, metric = bench.wanted, bench.recipe.prune.metric
    name = metric_words(bench.measured)
    seen = [outcome for outcome in done if outcome.drop is not None and not fits(outcome, wanted)]
    asked = f"no network within {wanted.max_drop:g} points of the dense one's validation {name} in {len(done)} trials"
    if not seen:
        return f"{asked}: none of them could be finished ({done[0].text if done else 'nothing was tried'})"
    nearest = min(seen, key=lambda outcome: outcome.drop or 0.0)
    share = nearest.reached or nearest.keep
    return (
        f"{asked}: the smallest drop was {nearest.drop:.2f} points, at {share:.3g} of the {metric}; allow more "
        "with --max-drop, train longer with --epochs, or count from a dense network tuned for as long: --against tuned"
    )
