"""search.json and search.html: every trial of a search, and the one that won."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.files import atomic_write
from compress.recipe import Recipe
from compress.report.listing import Listing, listing_page, over_log, points
from compress.report.words import figure, metric_words
from compress.search.proposals import best
from compress.search.settings import Outcome, Search, fits

LOOK = {  # kind -> colour of style.css, plotly's symbol
    "fits": ("var(--good)", "circle"),
    "does not fit": ("var(--cut)", "x"),
    "given up": ("var(--dense)", "triangle-down"),
}


def write(
    folder: Path, wanted: Search, recipe: Recipe, done: Sequence[Outcome], *, against: float | None, metric: str
) -> None:
    """Write search.html and, last, search.json into the search's folder.

    Args:
        against: what drops are counted from, percent; None: each trial's own measurement of the dense network.
        metric: what the task measures.
    """
    content = document(wanted, recipe, done, against=against, metric=metric)
    if done:
        atomic_write(folder / "search.html", html(content))
    atomic_write(folder / "search.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


def document(
    wanted: Search, recipe: Recipe, done: Sequence[Outcome], *, against: float | None, metric: str
) -> dict[str, Any]:
    """What search.json holds: the budget, the trials in their order, the winner's number or None."""
    winner = best(done, wanted)
    known = next((o.val + o.drop for o in done if o.val is not None and o.drop is not None), None)
    return {
        "max_drop": wanted.max_drop,
        "against": wanted.against,
        "reference": against if against is not None else known,
        "val_metric": metric,
        "metric": recipe.prune.metric,
        "method": recipe.prune.method,
        "seed": recipe.seed,
        "most_trials": wanted.trials,
        "winner": None if winner is None else winner.number,
        "trials": [{**outcome.model_dump(mode="json"), "fits": fits(outcome, wanted)} for outcome in done],
        "seconds": sum(outcome.seconds for outcome in done),
    }


def sentence(outcome: Outcome, wanted: Search, metric: str) -> str:
    """`0.242 of the params remained, 0.35 points down: fits`."""
    share = f"{figure(outcome.reached or outcome.keep)} of the {metric}"
    if outcome.drop is None:
        return f"{share}: {outcome.state}: {outcome.text}"
    moved = f"{abs(outcome.drop):.2f} points {'down' if outcome.drop >= 0 else 'up'}"
    end = "given up" if outcome.state == "given up" else "fits" if fits(outcome, wanted) else "does not fit"
    return f"{share} remained, validation {outcome.val or 0:.2f} %, {moved}: {end}"


def html(content: Mapping[str, Any]) -> str:
    """search.html: the drop over the share that remained, one point a trial."""
    name = metric_words(content["val_metric"])
    traces = []
    for what, (colour, symbol) in LOOK.items():
        shown = [trial for trial in content["trials"] if trial["drop"] is not None and kind(trial) == what]
        texts = [f"trial {trial['number']}: {summary(trial['params'])}" for trial in shown]
        x, y = [trial["reached"] for trial in shown], [-trial["drop"] for trial in shown]
        traces.append(points(x, y, what, colour=colour, texts=texts, marker={"symbol": symbol}))
    drawn = over_log(
        "trials",
        "Trials",
        traces,
        x=f"share of the {content['metric']} that remained",
        y=f"validation {name} against the dense network, points",
        line=-content["max_drop"],
    )
    rows = [
        (
            str(trial["number"]),
            summary(trial["params"]),
            "" if trial["reached"] is None else figure(trial["reached"]),
            "" if trial["val"] is None else f"{trial['val']:.2f}",
            "" if trial["drop"] is None else f"{0 - trial['drop']:+.2f}",
            "won" if trial["number"] == content["winner"] else kind(trial),
            f"{trial['seconds']:.0f}",
        )
        for trial in content["trials"]
    ]
    header = ("trial", "tried", f"{content['metric']} left", f"validation {name} (%)", "points", "", "seconds")
    notes = ["Above the dashed line a network is within the budget. Pointing at a point names what was tried."]
    what_for = Listing("Search within an accuracy budget", verdict(content), notes, header, rows, words=2)
    return listing_page(what_for, [drawn])


def verdict(content: Mapping[str, Any]) -> str:
    """The search in one sentence."""
    dense = "as given" if content["against"] == "given" else "fine-tuned for as long"
    count = len(content["trials"])
    points = f"{content['max_drop']:g} point{'s' if content['max_drop'] != 1 else ''}"
    asked = f"within {points} of the dense network {dense}"
    if content["reference"] is not None:
        asked += f" ({content['reference']:.2f} % on validation)"
    won = next((trial for trial in content["trials"] if trial["number"] == content["winner"]), None)
    if won is None:
        return f"None of {count} trials is {asked}."
    moved = f"{0 - won['drop']:+.2f} points"
    return f"The smallest of {count} trials {asked} keeps {figure(won['reached'])} of the {content['metric']}: {moved}."


def summary(params: Mapping[str, Any]) -> str:
    """`keep 0.25, allocation global, floor 0.4`."""
    return ", ".join(f"{key} {value if isinstance(value, str) else figure(value)}" for key, value in params.items())


def kind(trial: Mapping[str, Any]) -> str:
    """What became of a trial, in a word or two."""
    if trial["state"] != "done":
        return str(trial["state"])
    return "fits" if trial["fits"] else "does not fit"
