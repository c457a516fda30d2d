"""A page about many runs: a verdict, plots of points, and one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.report.figures import Figure, Spec, log_axis, plain


@dataclass(frozen=True)
class Listing:
    """What the page says; `rows` have as many cells as `header`, of which the first `words` hold words, not figures."""

    title: str
    verdict: str
    notes: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


def listing_page(what: Listing, figures: Sequence[Figure]) -> str:
    """One HTML file that needs no other and asks no network; everything inserted is escaped."""
    from compress.report.pages import page  # jinja2 only where pages are written

    values = {name: getattr(what, name) for name in ("title", "verdict", "notes", "header", "rows", "words")}
    return page("listing.html.j2", {"all": figures}, values)


def points(
    x: Sequence[float], y: Sequence[float], name: str, *, colour: str, texts: Sequence[str], **more: Any
) -> Spec:
    """Points of one kind, with what pointing at one says; `more` goes on top of the trace."""
    trace: Spec = {
        "type": "scatter", "mode": "markers", "x": list(x), "y": list(y), "name": plain(name), "showlegend": True,
        "marker": {"color": colour, "size": 10}, "line": {"color": colour, "width": 2},
        "text": [plain(text) for text in texts], "hovertemplate": "%{text}<br>%{y:.2f} at %{x:.3g}<extra></extra>",
    }  # fmt: skip
    for key, value in more.items():
        trace[key] = {**trace[key], **value} if isinstance(value, Mapping) and key in trace else value
    return trace


def over_log(name: str, title: str, traces: Sequence[Spec], *, x: str, y: str, line: float | None = None) -> Figure:
    """A plot over a logarithmic axis with a legend; `line` is drawn across it."""
    layout: Spec = {
        "xaxis": {"title": {"text": plain(x)}, **log_axis([value for trace in traces for value in trace["x"]])},
        "yaxis": {"title": {"text": plain(y)}, "nticks": 7},
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "margin": {"t": 60},
    }
    if line is not None:
        layout["shapes"] = [{
            "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": line, "y1": line, "layer": "below",
            "line": {"color": "var(--quiet)", "width": 1.5, "dash": "dash"},
        }]  # fmt: skip
    return Figure(name, title, "", {"data": list(traces), "layout": layout}, height=420)
