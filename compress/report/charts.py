"""Geometry of the charts: positions in percent of the plot, so that one drawing fits a phone and a wide screen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.report.words import figure, measured, metric_words

Scale = Callable[[float], float]  # a value -> percent from the left, or from the top


@dataclass(frozen=True)
class Point:
    """A place in the plot, in percent, and what is shown when it is pointed at."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A named series. `runs` are drawn connected; a phase boundary or a missing value begins a new one."""

    name: str
    style: str  # a class of style.css
    runs: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True)
class Mark:
    """A tick or a label at `at` percent of an axis."""

    at: float
    text: str


@dataclass(frozen=True)
class Band:
    """A phase of training, from `left`, `width` percent wide."""

    left: float
    width: float
    name: str


@dataclass(frozen=True)
class Chart:
    """Lines over the epochs of all phases."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    y_marks: tuple[Mark, ...]
    x_marks: tuple[Mark, ...]
    bands: tuple[Band, ...]
    level: Mark | None = None  # a horizontal reference, e.g. the dense network
    cuts: tuple[Point, ...] = field(default=())


@dataclass(frozen=True)
class Spread:
    """The latency of one file: percentiles and the median of every round, at percent of the axis."""

    style: str
    marks: tuple[Mark, ...]  # p50, p90, p99
    rounds: tuple[float, ...]


def training(report: Mapping[str, Any]) -> tuple[Chart, ...]:
    """Accuracy, loss and, where there was one, the penalty over the epochs; none when nothing was trained."""
    history = report["history"]
    if not history:
        return ()
    penalised = [line for line in history if line.get("penalty")]
    losses = (("loss", "training", "train"), ("val_loss", "validation", "val"))
    charts = (
        _accuracy(report),
        _log_chart(history, "Loss", "log scale", losses),
        _log_chart(penalised, "Penalty", "log scale, while training to sparsity", (("penalty", "penalty", "train"),)),
    )
    return tuple(chart for chart in charts if chart is not None)


def latency(report: Mapping[str, Any]) -> tuple[tuple[Spread, ...], tuple[Mark, ...]]:
    """Spreads of the measured files, dense first, on one axis from 0 ms, and the axis."""
    found = [measured["latency"] for measured in report["measurements"]]
    top = max(value for one in found for value in (one["p99"], *one["samples"])) * 1.04
    spreads = [
        Spread(
            "dense" if index == 0 else "pruned",
            tuple(Mark(100 * one[key] / top, f"{key} {figure(one[key])} ms") for key in ("p50", "p90", "p99")),
            tuple(100 * value / top for value in one["samples"]),
        )
        for index, one in enumerate(found)
    ]
    return tuple(spreads), tuple(Mark(100 * value / top, f"{value:g}") for value in ticks(0, top, 5))


def widths(report: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, int], float, float], ...]:
    """Per group: name, widths, length in percent (as the root of the dense width), share that remains."""
    largest = max((width["dense"] for width in report["widths"].values()), default=1)
    return tuple(
        (name, width, 100 * math.sqrt(width["dense"] / largest), width["pruned"] / width["dense"])
        for name, width in report["widths"].items()
    )


def densities(report: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, int], float, float], ...]:
    """Per layer: name, its weights and non-zeros, length in percent (as the root of its weights), density."""
    layers: Mapping[str, Mapping[str, int]] = report.get("density", {})
    largest = max((layer["weights"] for layer in layers.values()), default=1)
    return tuple(
        (name, layer, 100 * math.sqrt(layer["weights"] / largest), layer["nonzero"] / layer["weights"])
        for name, layer in layers.items()
    )


def density_over_steps(report: Mapping[str, Any]) -> Chart | None:
    """One line for each weight tensor over the steps of sparse training; None for a method that moves no weights."""
    log = report.get("density_log", ())
    values = [value for entry in log for value in entry["layers"].values() if value > 0]
    if len(log) < 2 or not values:
        return None
    low, high, last = min(values) / 1.25, min(1.0, max(values) * 1.25), max(log[-1]["step"], 1)
    logarithm = _linear(math.log10(low), math.log10(high))

    def point(entry: Mapping[str, Any], name: str) -> Point:
        value = max(entry["layers"][name], low)
        text = f"{name}, step {entry['step']}: density {figure(entry['layers'][name])}"
        return Point(100 * entry["step"] / last, logarithm(math.log10(value)), text)

    return Chart(
        "Density per layer",
        "log scale, over the steps of sparse training; pointing at a dot names the layer",
        tuple(Line("", "val", (tuple(point(entry, name) for entry in log),)) for name in log[0]["layers"]),
        tuple(Mark(logarithm(math.log10(value)), f"{value:g}") for value in log_ticks(low, high)),
        tuple(Mark(100 * step / last, f"{step:g}") for step in ticks(0, last, 6)),
        (),
    )


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """About `wanted` round values (1, 2 or 5 times a power of ten apart) from low to high."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= wanted)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, thinned to at most six; round values where fewer than two powers lie inside."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = list(range(first, last + 1))
    if len(powers) < 2:
        return ticks(low, high, 4)
    return [10.0**power for power in powers[:: -(-len(powers) // 6)]]


def _accuracy(report: Mapping[str, Any]) -> Chart:
    history, found = report["history"], report["val_top1"]
    cuts = [(_epochs_until(history, index + 1), one["cut"]) for index, one in enumerate(found["rounds"])]
    cuts = [(epoch, value) for epoch, value in cuts if value is not None]
    values = [found["dense"], *(value for _, value in cuts), *_values(history, ("val_top1",))]
    low, high = min(values), max(values)
    room = max(1.0, 0.06 * (high - low))
    low, high = max(0.0, low - room), min(100.0, high + room)
    scale = _linear(low, high)
    total = len(history)
    return Chart(
        f"Validation {metric_words(measured(report['pruned']))}",
        "percent",
        (_line(history, "val_top1", "validation", "val", scale),),
        tuple(Mark(scale(value), f"{value:g}") for value in ticks(low, high, 5)),
        _epoch_marks(total),
        _bands(history),
        Mark(scale(found["dense"]), f"dense {found['dense']:.2f}"),
        tuple(Point(100 * epoch / total, scale(value), f"after a cut: {value:.2f} %") for epoch, value in cuts),
    )


def _log_chart(
    history: Sequence[Mapping[str, Any]], title: str, unit: str, series: Sequence[tuple[str, str, str]]
) -> Chart | None:
    """The series (key, name, style) that have positive values, on a logarithmic axis; None when none has."""
    values = [value for value in _values(history, [key for key, _, _ in series]) if value > 0]
    if not values:
        return None
    low, high = min(values) / 1.25, max(values) * 1.25
    logarithm = _linear(math.log10(low), math.log10(high))

    def scale(value: float) -> float:
        return logarithm(math.log10(value))

    lines = tuple(_line(history, key, name, style, scale, positive=True) for key, name, style in series)
    return Chart(
        title,
        unit,
        tuple(line for line in lines if line.runs),
        tuple(Mark(scale(value), f"{value:g}") for value in log_ticks(low, high)),
        _epoch_marks(len(history)),
        _bands(history),
    )


def _line(
    history: Sequence[Mapping[str, Any]], key: str, name: str, style: str, scale: Scale, *, positive: bool = False
) -> Line:
    runs: list[list[Point]] = [[]]
    before = None
    for index, line in enumerate(history):
        value = line.get(key)
        is_drawn = value is not None and (value > 0 or not positive)
        if line["phase"] != before or not is_drawn:
            runs.append([])
        before = line["phase"]
        if value is not None and is_drawn:
            text = f"{phase_name(line['phase'])}, epoch {line['epoch'] + 1}: {name} {figure(value)}"
            runs[-1].append(Point(100 * (index + 0.5) / len(history), scale(value), text))
    return Line(name, style, tuple(tuple(run) for run in runs if run))


def phase_name(phase: str) -> str:
    """How a phase is called on the page: round-1 -> round 1."""
    return phase.replace("-", " ")


def _bands(history: Sequence[Mapping[str, Any]]) -> tuple[Band, ...]:
    found: list[list[Any]] = []  # phase, first epoch, epochs
    for index, line in enumerate(history):
        if not found or found[-1][0] != line["phase"]:
            found.append([line["phase"], index, 0])
        found[-1][2] += 1
    total = len(history)
    return tuple(Band(100 * first / total, 100 * n / total, phase_name(name)) for name, first, n in found)


def _epochs_until(history: Sequence[Mapping[str, Any]], round_number: int) -> int:
    """Epochs up to the end of a round: those of its phase and of all before it."""
    names = {f"round-{number}" for number in range(1, round_number + 1)}
    return sum(line["phase"] in names for line in history)


def _epoch_marks(total: int) -> tuple[Mark, ...]:
    whole = sorted({int(value) for value in ticks(0, total, 6) if value >= 1 and value == int(value)} | {1})
    return tuple(Mark(100 * (epoch - 0.5) / total, str(epoch)) for epoch in whole)


def _values(history: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[float]:
    return [line[key] for line in history for key in keys if line.get(key) is not None]


def _linear(low: float, high: float) -> Scale:
    """Percent from the top: `high` is 0, `low` is 100."""
    return lambda value: 100 * (high - value) / ((high - low) or 1.0)
