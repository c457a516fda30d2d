"""compare.json and compare.html: accuracy over measured latency, with spread, the controls and the verdict."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from compress.comparison.grid import SCRATCH, TUNED, Grid, cells, labels
from compress.comparison.verdict import Point, compare, sentence
from compress.files import atomic_write
from compress.report.figures import Figure
from compress.report.listing import Listing, listing_page, over_log, points
from compress.report.words import count, figure, metric_words

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5fc7", "#8c564b")
CONTROL_SYMBOLS = {TUNED: "diamond", SCRATCH: "square"}


def write(folder: Path, content: Mapping[str, Any]) -> None:
    """Write compare.html and, last, compare.json."""
    atomic_write(folder / "compare.html", html(content))
    atomic_write(folder / "compare.json", json.dumps(content, indent=1, allow_nan=False) + "\n")


def document(
    grid: Grid, outcomes: Mapping[str, Mapping[str, Any]], failures: Mapping[str, str], latency: Mapping[str, Any]
) -> dict[str, Any]:
    """What compare.json holds: the runs, a row for each method and target, and a verdict for each network.

    Args:
        outcomes: run -> what `work.outcome` keeps. failures: run -> the reason. latency: of `latency.measure`.

    Units: accuracy in percent, spread largest less smallest, latency in ms.
    """
    runs = []
    for cell in cells(grid):
        if cell.name in outcomes:
            known = {"model": cell.model, "method": cell.row, "target": cell.target, "seed": cell.seed}
            runs.append({"run": cell.name, **known, **outcomes[cell.name], **latency["files"].get(cell.name, {})})
    verdicts = {model: _verdict(grid, [run for run in runs if run["model"] == model]) for model in grid.models}
    return {
        "grid": grid.model_dump(mode="json"),
        "verdicts": verdicts,
        "rows": rows(grid, runs),
        "runs": runs,
        "failed": dict(failures),
        "dense_latency_ms": dict(latency["dense"]),
        "conditions": dict(latency["conditions"]),
    }


def rows(grid: Grid, runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds."""
    found = []
    seen = dict.fromkeys(replace(cell, seed=0) for cell in cells(grid))
    for cell in sorted(seen, key=lambda c: (grid.models.index(c.model), c.row == SCRATCH, c.row == TUNED)):
        key = (cell.model, cell.row, cell.target)
        alike = [run for run in runs if (run["model"], run["method"], run["target"]) == key]
        if alike:
            row: dict[str, Any] = {"model": cell.model, "method": cell.row, "target": cell.target, "n": len(alike)}
            for name in ("value", "latency_ms"):
                row[name] = _spread([run[name] for run in alike if name in run])
            gains = [run["speedup"]["value"] for run in alike if "speedup" in run]
            kept = {name: statistics.mean(run["kept"][name] for run in alike) for name in alike[0]["kept"]}
            found.append({**row, "speedup": _spread(gains), "kept": kept})
    return found


def html(content: Mapping[str, Any]) -> str:
    """compare.html: for each network a plot, then one table."""
    grid = content["grid"]
    measured = next((run["measured"] for run in content["runs"]), "top1")
    name, split = metric_words(measured), next((run["split"]["name"] for run in content["runs"]), "test")
    figures = [
        _plot(content, place, f"{name} on {split} (%)") for place, model in enumerate(grid["models"])
        if any(row["model"] == model and row["latency_ms"] is not None for row in content["rows"])
    ]  # fmt: skip
    named = labels(grid["models"])
    verdicts = [f"{named[model]}: {verdict['sentence']}" for model, verdict in content["verdicts"].items()]
    where, notes = content["conditions"], []
    if where:
        notes.append(
            f"Latency: {where['runtime']}, batch {where['batch']}, {count(where['threads'], 'thread')}, all files in "
            f"turn in one process after the runs, on {where.get('cpu', 'this machine')}. Bars: smallest and largest "
            "seed; in the table the spread between them in brackets."
        )
    notes += [f"failed: {run}: {why}" for run, why in content["failed"].items()]
    header, found = table(content)
    words = header.index("target")
    return listing_page(Listing("Methods compared", "; ".join(verdicts), notes, header, found, words), figures)


def table(content: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows as text; the network is named where there are several."""
    run: Mapping[str, Any] = next(iter(content["runs"]), {"measured": "top1", "split": {"name": "test"}})
    header = (
        "network", "method", "target", "runs", f"{metric_words(run['measured'])} on {run['split']['name']} (%)",
        "params left", "MACs left", "latency (ms)", "times faster",
    )  # fmt: skip
    named = labels(content["grid"]["models"])
    first = 0 if len(named) > 1 else 1
    return header[first:], [(named[row["model"]], *_cells(row))[first:] for row in content["rows"]]


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    value, latency, gain = row["value"], row["latency_ms"], row["speedup"]
    return (
        row["method"], "" if row["target"] is None else f"{row['target']:g}", str(row["n"]),
        f"{value['mean']:.2f} ({value['high'] - value['low']:.2f})",
        figure(row["kept"]["params"]), figure(row["kept"]["macs"]),
        "" if latency is None else f"{figure(latency['mean'])} ({figure(latency['high'] - latency['low'])})",
        "" if gain is None else figure(gain["mean"]),
    )  # fmt: skip


def _plot(content: Mapping[str, Any], place: int, title: str) -> Figure:
    """Accuracy over latency: one line a method, a point a target, bars from the smallest to the largest seed."""
    model, methods = content["grid"]["models"][place], content["grid"]["methods"]
    shown = [row for row in content["rows"] if row["model"] == model and row["latency_ms"] is not None]
    traces = []
    for method in dict.fromkeys(row["method"] for row in shown):
        mine = sorted((row for row in shown if row["method"] == method), key=lambda row: row["latency_ms"]["mean"])
        is_control = method not in methods
        colour = "var(--dense)" if is_control else COLOURS[methods.index(method) % len(COLOURS)]
        x, y = [row["latency_ms"] for row in mine], [row["value"] for row in mine]
        traces.append(
            points(
                [value["mean"] for value in x],
                [value["mean"] for value in y],
                method,
                colour=colour,
                texts=[_hover(row) for row in mine],
                mode="lines+markers",
                error_x=_bars(x),
                error_y=_bars(y),
                line={"dash": "dot" if is_control else "solid"},
                marker={"symbol": CONTROL_SYMBOLS.get(method, "circle")},
            )
        )
    dense = [run["dense"] for run in content["runs"] if run["model"] == model]
    if dense and model in content["dense_latency_ms"]:
        at = [content["dense_latency_ms"][model]], [statistics.mean(dense)]
        traces.append(
            points(
                *at, "dense, as given", colour="var(--quiet)", texts=["dense"], marker={"symbol": "star", "size": 13}
            )
        )
    return over_log(
        f"model{place}", labels(content["grid"]["models"])[model], traces, x="latency, median (ms)", y=title
    )


def _hover(row: Mapping[str, Any]) -> str:
    target = "" if row["target"] is None else f"target {row['target']:g}, "
    return f"{target}{row['n']} runs, {figure(row['kept']['params'])} of the params"


def _bars(values: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [value["high"] - value["mean"] for value in values],
        "arrayminus": [value["mean"] - value["low"] for value in values],
        "thickness": 1,
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    return {"mean": statistics.mean(values), "low": min(values), "high": max(values)} if values else None


def _verdict(grid: Grid, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Who wins, every pair of methods, and each method against the same shapes from fresh weights."""
    points = [
        Point(run["method"], run["target"], run["seed"], run["value"], run["latency_ms"])
        for run in runs
        if run["target"] is not None and "latency_ms" in run
    ]
    winner, text = sentence([point for point in points if point.method != SCRATCH], grid.methods)
    pairs = [asdict(d) for d in compare(points, (*grid.methods, SCRATCH))]
    return {"winner": winner, "sentence": text, "pairs": pairs}
