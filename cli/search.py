"""The part of compress prune that has an accuracy budget as its target: --max-drop."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import view

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoint import ModelInfo
    from compress.folder import RunFolder
    from compress.recipe import Recipe
    from compress.search import Search

MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-drop",
        metavar="POINTS",
        help="Instead of --target: the smallest network that loses no more on validation",
    ),
]
Trials = Annotated[int | None, typer.Option("--trials", min=1, help="Runs at most that --max-drop may take")]
Against = Annotated[
    str | None,
    typer.Option("--against", help="What --max-drop counts from: the dense network as given, or tuned for as long"),
]


def wanted(
    max_drop: float | None, trials: int | None, against: str | None, *, target: float | None, begun: Path | None
) -> Search | None:
    """The search that the options ask for, or that the run begun is; None: an ordinary run.

    Raises:
        UsageError: options that contradict each other, or the search as it was begun; only --trials may change.
    """
    from compress.errors import UsageError
    from compress.search import read
    from compress.search.settings import wanted_from

    before = read(begun) if begun is not None else None
    if max_drop is None and before is None:
        if trials is not None or against is not None:
            raise UsageError("--trials and --against belong to --max-drop: name the points that may be lost")
        return None
    if target is not None:
        raise UsageError("--target and --max-drop exclude each other: the search looks for the share")
    if before is None and begun is not None:
        raise UsageError(f"{begun} was begun without --max-drop; choose another --out")
    given = {"max_drop": max_drop, "trials": trials, "against": against}
    known = before[0].model_dump() if before is not None else {}
    made = wanted_from({**known, **{key: value for key, value in given.items() if value is not None}})
    for key in ("max_drop", "against"):
        if known and known[key] != getattr(made, key):
            option = "--" + key.replace("_", "-")
            raise UsageError(
                f"{begun} was begun with {option} {known[key]}, not {getattr(made, key)}; choose another --out"
            )
    return made


def keep(folder: RunFolder, asked: Search, recipe: Recipe) -> Recipe:
    """Note in its folder what a search is for. Returns: the recipe that all trials change."""
    from compress import ranks
    from compress.recipe import make
    from compress.search import read, write

    def settle() -> dict[str, Any]:
        before = read(folder.path)
        base = recipe if before is None else before[1]
        write(folder.path, asked, base)
        return base.model_dump(mode="json")

    return make(ranks.first(settle))


def is_untouched(folder: RunFolder) -> bool:
    """Whether nothing has been done in a run's folder that a resume could use."""
    return not folder.has("search.json") and not any(folder.path.rglob("state/prepare.json"))


def result(found: dict[str, Any]) -> None:
    """The trials and what came of them."""
    from compress.report.words import figure, metric_words
    from compress.search.document import kind, summary, verdict

    rows = [
        (
            str(trial["number"]),
            summary(trial["params"]),
            "" if trial["reached"] is None else figure(trial["reached"]),
            "" if trial["drop"] is None else f"{0 - trial['drop']:+.2f}",
            "won" if trial["number"] == found["winner"] else kind(trial),
        )
        for trial in found["trials"]
    ]
    header = ("trial", "tried", f"{found['metric']} left", f"val {metric_words(found['val_metric'])}, points", "")
    view.table("trials", header, rows)
    view.note(verdict(found))


def show_plan(asked: Search, recipe: Recipe, network: nn.Module, info: ModelInfo, *, as_json: bool) -> None:
    """--dry-run: the shares that would be tried first, what is searched beside them, and what is in reach."""
    from compress.search import ladder, space

    found = space(recipe, network, info)
    shares = ladder(found)
    metric = recipe.prune.metric
    view.table(
        f"at most {asked.trials} trials; the first ones, for as long as they fit",
        ("trial", f"share of the {metric}"),
        [(str(number), view.figure(share)) for number, share in enumerate(shares)],
    )
    view.note(f"lowest share of the {metric} in reach: {found.keep[0]:.4f}")
    searched = [*found.choices, *found.ranges]
    view.note(f"searched beside the share, near the edge: {', '.join(searched) or 'nothing'}")
    if as_json:
        view.document(
            {"search": asked.model_dump(mode="json"), "space": found.model_dump(mode="json"), "ladder": shares}
        )
