"""Pages with interactive plots: one HTML file that needs no other and asks no network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
td, th { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #8884 }
td:first-child, th:first-child { text-align: left }
.plot { background: #fff; margin: 1rem 0 }
"""


def page(
    title: str,
    paragraphs: Sequence[str],
    figures: Sequence[Any],
    *,
    header: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
) -> str:
    """A heading, paragraphs, plotly figures and one table; all text is escaped."""
    drawn = [
        figure.to_html(full_html=False, include_plotlyjs=index == 0, config={"responsive": True, "displaylogo": False})
        for index, figure in enumerate(figures)
    ]
    text = "".join(f"<p>{html.escape(paragraph)}</p>\n" for paragraph in paragraphs)
    body = "".join(f'<div class="plot">{part}</div>\n' for part in drawn)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f"{text}{body}{_table(header, rows)}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not header:
        return ""

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(header, "th") + "".join(line(row, "td") for row in rows) + "</table>\n"
