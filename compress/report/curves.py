"""What each group of channels costs when it is cut alone, drawn; and the page of `compress sensitivity`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.report.figures import Figure, Spec, line, log_axis, plain, shade
from compress.report.words import figure, metric_words, without_folder

MEASURES = {  # key -> title and unit; drawn where it was measured
    "value": ("Metric", "percent"),  # the title says which
    "loss": ("Loss", "log scale"),
    "distortion": ("Distortion of the outputs", "log scale, as a share of the outputs' norm"),
}


def sensitivity_page(found: Mapping[str, Any]) -> str:
    """One HTML file that needs no other and asks no network; everything inserted is escaped.

    Args:
        found: what `compress sensitivity --json` gives.
    """
    from compress.report.pages import page  # which draws these curves too

    return page("sensitivity.html.j2", {"curves": curves(found)}, {"s": without_folder(found), "keys": measures(found)})


def measures(found: Mapping[str, Any]) -> list[str]:
    """The keys of MEASURES that were measured."""
    return [key for key in MEASURES if found["dense"][key] is not None]


def curves(found: Mapping[str, Any]) -> tuple[Figure, ...]:
    """A figure for each measure: one line a group, the one that suffers most in a colour of its own, on top."""
    drawn = (_curves(found, key) for key in measures(found))
    return tuple(one for one in drawn if one is not None)


def _curves(found: Mapping[str, Any], key: str) -> Figure | None:
    shown = [name for name, curve in found["groups"].items() if curve["widths"]]  # one channel has no curve
    is_log = key != "value"
    if not any(width[key] > 0 or not is_log for name in shown for width in found["groups"][name]["widths"]):
        return None
    dense: float = found["dense"][key]
    worst = max(shown, key=lambda name: _suffering(found["groups"][name], key))
    data = [_run(found, name, key, shade(place, len(shown))) for place, name in enumerate(shown) if name != worst]
    data.append(_run(found, worst, key, "var(--cut)"))
    layout: Spec = {
        "xaxis": {"title": {"text": "share of the channels that stay"}, "range": [0, 1.02], "nticks": 6},
        "yaxis": log_axis([*(value for run in data for value in run["y"]), dense]) if is_log else {"nticks": 6},
    }
    keys: tuple[tuple[str, str], ...] = (("cut", worst), ("shade", "the others, first layer to last"))
    if dense > 0:
        layout["shapes"] = [{
            "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": dense, "y1": dense, "layer": "below",
            "line": {"color": "var(--dense)", "width": 1.5, "dash": "dash"},
        }]  # fmt: skip
        keys += (("dash dense", f"uncut {figure(dense)}"),)
    title, unit = MEASURES[key]
    if key == "value":
        title = metric_words(found["metric"])
    return Figure(f"sensitivity-{key}", title, unit, {"data": data, "layout": layout}, keys)


def _run(found: Mapping[str, Any], name: str, key: str, colour: str) -> Spec:
    """A group's line, up to the uncut network at 1 where that has a place on the axis."""
    curve, dense = found["groups"][name], found["dense"][key]
    x = [width["kept"] / curve["size"] for width in curve["widths"]]
    y = [width[key] if key == "value" or width[key] > 0 else None for width in curve["widths"]]
    texts = [f"{plain(name)}, {w['kept']} of {curve['size']} channels: {figure(w[key])}" for w in curve["widths"]]
    if dense > 0:
        x, y, texts = [*x, 1.0], [*y, dense], [*texts, f"uncut: {figure(dense)}"]
    return line(x, y, colour, name=plain(name), text=texts, hovertemplate="%{text}<extra></extra>")


def _suffering(curve: Mapping[str, Any], key: str) -> float:
    """The mean over the widths, turned so that more is worse."""
    values: Sequence[float] = [width[key] for width in curve["widths"]]
    mean = sum(values) / max(1, len(values))
    return -mean if key == "value" else mean
