"""The page of `compress sensitivity`: one line a group over its width, and every figure in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.charts import Chart, Line, Mark, Point, Scale, log_ticks, ticks
from compress.report.pages import environment
from compress.report.words import figure

MEASURES = {  # key -> title and unit; drawn where it was measured
    "top1": ("Top-1", "percent, over the share of the group's channels that stay"),
    "loss": ("Loss", "log scale, over the share of the group's channels that stay"),
    "distortion": ("Distortion of the outputs", "log scale, as a share of the outputs' norm"),
}


def sensitivity_page(found: Mapping[str, Any]) -> str:
    """One HTML file that needs no other and asks no network; everything inserted is escaped.

    Args:
        found: what `compress sensitivity --json` gives.
    """
    page = environment(autoescape=True).get_template("sensitivity.html.j2")
    drawn = [chart for key in MEASURES if (chart := curves(found, key)) is not None]
    return page.render(s=found, charts=drawn, keys=[key for key in MEASURES if found["dense"][key] is not None])


def curves(found: Mapping[str, Any], key: str) -> Chart | None:
    """One line a group, the one that suffers most in a colour of its own; None where `key` was not measured."""
    dense: float | None = found["dense"][key]
    values: list[float] = [width[key] for curve in found["groups"].values() for width in curve["widths"]]
    values = [value for value in values if value is not None and (key == "top1" or value > 0)]
    if dense is None or not values:
        return None
    drawn = [*values, dense] if key == "top1" or dense > 0 else values
    low, high = min(drawn), max(drawn)
    is_log = key != "top1"
    if is_log:
        low, high = math.log10(low / 1.1), math.log10(high * 1.1)
    else:
        low, high = max(0.0, low - 1), min(100.0, high + 1)

    def scale(value: float) -> float:
        at = math.log10(max(value, 1e-300)) if is_log else value
        return min(100.0, 100 * (high - at) / ((high - low) or 1.0))

    marks = log_ticks(10**low, 10**high) if is_log else ticks(low, high, 5)
    shown = [name for name, curve in found["groups"].items() if curve["widths"]]  # one channel has no curve
    worst = max(shown, key=lambda name: _suffering(found["groups"][name], key))
    ordered = sorted(shown, key=lambda name: name == worst)  # drawn last, on top
    title, unit = MEASURES[key]
    return Chart(
        title,
        unit,
        tuple(
            Line(name if name == worst else "", "cut" if name == worst else "val", (_run(found, name, key, scale),))
            for name in ordered
        ),
        tuple(Mark(scale(value), f"{value:g}") for value in marks),
        tuple(Mark(100 * share, f"{share:g}") for share in (0, 0.25, 0.5, 0.75, 1)),
        (),
        Mark(scale(dense), f"dense {figure(dense)}") if dense > 0 else None,
    )


def _run(found: Mapping[str, Any], name: str, key: str, scale: Scale) -> tuple[Point, ...]:
    """A group's line, up to the uncut network at 1 where that has a place on the axis."""
    curve = found["groups"][name]
    points = [
        Point(100 * w["kept"] / curve["size"], scale(w[key]), f"{name}, {w['kept']} of {curve['size']} channels: "
              f"{figure(w[key])}") for w in curve["widths"]
    ]  # fmt: skip
    dense = found["dense"][key]
    return (*points, Point(100, scale(dense), f"uncut: {figure(dense)}")) if dense > 0 else tuple(points)


def _suffering(curve: Mapping[str, Any], key: str) -> float:
    """The mean over the widths, turned so that more is worse."""
    values: Sequence[float] = [width[key] for width in curve["widths"]]
    mean = sum(values) / max(1, len(values))
    return -mean if key == "top1" else mean
