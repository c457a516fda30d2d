"""What is drawn of a run: plotly figures as plain JSON values, without a template and without colours.

A colour is the name of one in style.css, `var(--name)`, or `shade(0..1)`, from the first layer's to the last one's; the
page puts in what holds for light or dark, and what all figures have in common (draw.js.j2).
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.words import figure, file_words, latency_conditions, speed_words

LONGEST = 20  # characters of a name beside an axis: on a phone the rest is for the bars
STYLES = ("dense", "pruned", "train", "cut")  # of the files of one measurement, in their order
DIGITS = [[round(place * step, 1) for place in range(round(1 / step), round(10 / step))] for step in (0.1, 0.2, 0.5, 1)]
DIGITS += [[1, 2, 5], [1]]  # first digits of ticks on a logarithmic axis
Spec = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """One plot: `spec` has plotly's data and layout, `keys` pairs of a class of style.css and what it stands for."""

    name: str
    title: str
    unit: str
    spec: Spec
    keys: tuple[tuple[str, str], ...] = ()
    height: int = 260  # px


def latency(comparisons: Sequence[Mapping[str, Any]]) -> tuple[Figure, ...]:
    """For each runtime and batch a box a file of the rounds' medians, and the p90 and p99 of single inferences."""
    return tuple(_spread(place, found) for place, found in enumerate(comparisons))


def widths(report: Mapping[str, Any]) -> tuple[Figure, ...]:
    """A bar for each group of channels: what it was, and in it what is left."""
    notes = dict.fromkeys(report["frozen"], ", frozen")
    rows = [_Bar(name, n["dense"], n["pruned"], notes.get(name, "")) for name, n in report["widths"].items()]
    return (_bars("widths", "Channels", rows),) if rows else ()


def densities(report: Mapping[str, Any]) -> tuple[Figure, ...]:
    """A bar for each layer: its weights, and in it those that are not 0."""
    rows = [_Bar(name, n["weights"], n["nonzero"], "") for name, n in report["density"].items()]
    return (_bars("densities", "Weights", rows),) if rows else ()


def plain(text: str) -> str:
    """A user's word as plotly shows it: plotly reads tags in what it writes."""
    return html.escape(text, quote=False)


def line(x: Sequence[Any], y: Sequence[Any], colour: str, **more: Any) -> Spec:
    """Points joined by lines; a None parts them."""
    return {
        "type": "scatter", "mode": "lines+markers", "x": list(x), "y": list(y),
        "line": {"color": colour, "width": 2}, "marker": {"color": colour, "size": 6}, **more,
    }  # fmt: skip


def shade(place: int, count: int) -> str:
    """The colour of the layer at `place` of `count`."""
    return f"shade({place / max(1, count - 1):.3f})"


def log_axis(values: Iterable[float | None]) -> Spec:
    """A logarithmic axis around the values above 0: at most seven round ticks, none closer than a twelfth of it."""
    drawn = [value for value in values if value is not None and value > 0] or [1.0]
    low, high = math.log10(min(drawn)), math.log10(max(drawn))
    room = max(0.04, 0.06 * (high - low))
    low, high = low - room, high + room
    powers = range(math.floor(low), math.ceil(high) + 1)
    rows = [[value for power in powers for d in digits if low <= math.log10(value := float(f"{d}e{power}")) <= high]
            for digits in DIGITS]  # fmt: skip
    few = next((row for row in rows if len(row) <= 7), rows[-1][:: len(rows[-1]) // 7 + 1])
    apart: list[float] = []
    for value in few:
        if not apart or math.log10(value / apart[-1]) > (high - low) / 12:
            apart.append(value)
    return {"type": "log", "range": [low, high], "tickvals": apart, "ticktext": [f"{value:g}" for value in apart]}


@dataclass(frozen=True)
class _Bar:
    name: str
    before: int
    after: int
    note: str


def _bars(name: str, title: str, rows: Sequence[_Bar]) -> Figure:
    """Lengths are square roots, so that small layers show beside large ones."""
    places = list(range(len(rows)))
    texts = [
        "\u2009"
        + (f"{row.before:,}" if row.before == row.after else f"{row.before:,} \u2192 <b>{row.after:,}</b>")
        + row.note
        for row in rows
    ]
    pointed = [f"{plain(row.name)}: {row.before:,} \u2192 {row.after:,}{row.note}" for row in rows]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": places,
        "hovertext": pointed,
        "hovertemplate": "%{hovertext}<extra></extra>",
    }
    longest = math.sqrt(max(row.before for row in rows))
    data = [
        {**bar, "x": [math.sqrt(row.before) for row in rows], "marker": {"color": "var(--pale)"}, "text": texts,
         "textposition": "outside", "cliponaxis": False},
        {**bar, "x": [math.sqrt(row.after) for row in rows],
         "marker": {"color": ["var(--dense)" if "frozen" in row.note else "var(--pruned)" for row in rows]}},
    ]  # fmt: skip
    layout = {
        "barmode": "overlay", "bargap": 0.36, "margin": {"t": 4, "b": 4, "r": 0},
        "xaxis": {"visible": False, "range": [0, longest * 1.36]},
        "yaxis": {"autorange": "reversed", "tickvals": places, "ticktext": [_short(row.name) for row in rows],
                  "showgrid": False, "tickfont": {"size": 11}},
    }  # fmt: skip
    return Figure(name, title, "", {"data": data, "layout": layout}, (), 12 + 21 * len(rows))


def _spread(place: int, found: Mapping[str, Any]) -> Figure:
    measurements, names = found["measurements"], [file_words(one["file"]) for one in found["measurements"]]
    data: list[Spec] = []
    for name, style, one in zip(names, _styles(len(names)), measurements, strict=True):
        taken, colour = one["latency"], f"var(--{style})"
        data.append({
            "type": "box", "orientation": "h", "x": taken["samples"], "y": [name] * len(taken["samples"]), "name": name,
            "boxpoints": "all", "jitter": 0.5, "pointpos": 0, "line": {"color": colour, "width": 1.5}, "width": 0.55,
            "fillcolor": "rgba(0,0,0,0)", "marker": {"color": colour, "size": 4, "opacity": 0.45},
            "hovertemplate": "%{x:.3~g} ms, the median of a round<extra></extra>", "hoveron": "points",
        })  # fmt: skip
        data.append({
            "type": "scatter", "mode": "markers", "x": [taken["p90"], taken["p99"]], "y": [name] * 2,
            "marker": {"symbol": "line-ns", "size": 13, "line": {"color": colour, "width": 2}},
            "text": [f"{key} of single inferences: {figure(taken[key])} ms" for key in ("p90", "p99")],
            "hovertemplate": "%{text}<extra></extra>",
        })  # fmt: skip
    top = max(value for one in measurements for value in (one["latency"]["p99"], *one["latency"]["samples"]))
    layout = {
        "margin": {"t": 4, "b": 34},
        "xaxis": {"range": [0, top * 1.05], "title": {"text": "ms a batch"}, "nticks": 6},
        "yaxis": {"type": "category", "categoryarray": names, "categoryorder": "array", "autorange": "reversed",
                  "showgrid": False},
    }  # fmt: skip
    said = "; ".join(speed_words(speedup) for speedup in found["speedups"])
    where = latency_conditions(measurements[0]["latency"])
    return Figure(f"latency-{place}", where, said, {"data": data, "layout": layout}, (), 60 + 46 * len(names))


def _styles(count: int) -> list[str]:
    return [STYLES[place % len(STYLES)] for place in range(count)]


def _short(name: str) -> str:
    return plain(name if len(name) <= LONGEST else f"\u2026{name[1 - LONGEST :]}")
