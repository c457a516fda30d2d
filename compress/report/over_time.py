"""What is drawn over a run's training: metric, loss and penalty by epochs; densities and lambdas by steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from compress.report.figures import Figure, Spec, line, log_axis, plain, shade
from compress.report.words import figure, measured, metric_words, phase_words

MANY = 30  # epochs, from which on dots are small
MOST = 120  # moments of a log on the page: as many as a plot shows, and a page of a long training stays small


def over_steps(report: Mapping[str, Any]) -> tuple[Figure, ...]:
    """How dense each layer was, and how large each group's lambda, while a method moved them."""
    found = (
        _lines("density", "Density per layer", thinned(report["density_log"]), "layers"),
        _lines("lambda", "Lambda per group", thinned(report["lambda_log"]), "groups"),
    )
    return tuple(one for one in found if one is not None)


def thinned(log: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """At most MOST moments, evenly over each round with its first and last; report.json has them all."""
    rounds = [list(part) for _, part in groupby(log, key=lambda entry: entry["round"])]
    each = max(2, MOST // max(1, len(rounds)))
    return [
        part[round(place * (len(part) - 1) / (min(each, len(part)) - 1 or 1))]
        for part in rounds
        for place in range(min(each, len(part)))
    ]


def training(report: Mapping[str, Any]) -> tuple[Figure, ...]:
    """The metric, the loss and, over more than one epoch, the penalty; none where nothing was trained."""
    history = report["history"]
    if not history:
        return ()
    found = [_accuracy(report), _epochs("loss", "Loss", history, {"loss": "training", "val_loss": "validation"})]
    penalised = [epoch for epoch in history if epoch.get("penalty")]
    if len(penalised) > 1:
        found.append(_epochs("penalty", "Penalty", penalised, {"penalty": "penalty"}))
    return tuple(found)


def _lines(name: str, title: str, log: Sequence[Mapping[str, Any]], key: str) -> Figure | None:
    """One line for each layer or group over the steps of all rounds, on a logarithmic axis."""
    names = list(dict.fromkeys(inner for entry in log for inner in entry[key]))
    steps, gaps = _steps(log)
    if len(log) < 2 or not any(entry[key].get(inner) for entry in log for inner in names):
        return None
    data: list[Spec] = []
    for place, inner in enumerate(names):
        values: list[float | None] = [entry[key].get(inner) or None for entry in log]  # a logarithmic axis has no 0
        for gap in reversed(gaps):
            values.insert(gap, None)
        drawn = line(steps, values, shade(place, len(names)), name=plain(inner), mode="lines")
        drawn["hovertemplate"] = "%{fullData.name}, step %{x}: %{y:.3~g}<extra></extra>"
        drawn["line"]["width"] = 1.5
        data.append(drawn)
    layout = {
        "xaxis": {"title": {"text": "step"}, "rangemode": "tozero"},
        "yaxis": log_axis(v for d in data for v in d["y"]),
    }
    keys = (("shade", "first layer to last"),) if len(names) > 1 else ()
    return Figure(name, title, "log scale", {"data": data, "layout": layout}, keys)


def _steps(log: Sequence[Mapping[str, Any]]) -> tuple[list[int | None], list[int]]:
    """Steps counted through all rounds, and the places in `log` where a round ends and a line is to break."""
    found: list[int | None] = []
    gaps: list[int] = []
    before = place = 0
    for _, part in groupby(log, key=lambda entry: entry["round"]):
        entries = list(part)
        if place:
            gaps.append(place)
            found.append(None)
        found += [before + entry["step"] for entry in entries]
        before, place = before + entries[-1]["step"], place + len(entries)
    return found, gaps


def _accuracy(report: Mapping[str, Any]) -> Figure:
    history, found = report["history"], report["val_top1"]
    what = metric_words(measured(report["pruned"]))
    made = _epochs("accuracy", f"Validation {what}", history, {"val_top1": "validation"}, is_log=False)
    dense = found["dense"]
    layout = {**made.spec["layout"]}
    layout["shapes"] = [*layout["shapes"], {
        "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": dense, "y1": dense, "layer": "below",
        "line": {"color": "var(--dense)", "width": 1.5, "dash": "dash"},
    }]  # fmt: skip
    cuts = [
        (_epochs_until(history, n), one["cut"]) for n, one in enumerate(found["rounds"], 1) if one["cut"] is not None
    ]
    data = [*made.spec["data"]]
    keys = (*made.keys, ("dash dense", f"dense {dense:.2f}"))
    if cuts:
        drawn = line([epoch + 0.5 for epoch, _ in cuts], [value for _, value in cuts], "var(--cut)", mode="markers")
        drawn |= {"text": [f"right after a cut: {value:.2f} %" for _, value in cuts],
                  "hovertemplate": "%{text}<extra></extra>"}  # fmt: skip
        data.append({**drawn, "marker": {"color": "var(--cut)", "size": 10, "symbol": "diamond"}})
        keys += (("dot cut", "right after a cut"),)
    return Figure(made.name, made.title, "percent", {"data": data, "layout": layout}, keys)


def _epochs(
    name: str, title: str, history: Sequence[Mapping[str, Any]], series: Mapping[str, str], *, is_log: bool = True
) -> Figure:
    """Lines over the epochs of all phases that break where one phase ends, with the phases as bands."""
    styles = {"validation": "val"}
    data: list[Spec] = []
    keys: list[tuple[str, str]] = []
    for key, called in series.items():
        style = styles.get(called, "train")
        x, y, texts = _points(history, key, called, is_log=is_log)
        drawn = line(x, y, f"var(--{style})", text=texts, hovertemplate="%{text}<extra></extra>")
        if len(history) > MANY:
            drawn["marker"]["size"] = 3
        if any(value is not None for value in y):
            data.append(drawn)
            keys.append((style, called))
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "range": [0.5, len(history) + 0.5], "tickformat": "d",
                  "showgrid": False, "nticks": 10, "dtick": 1 if len(history) <= 10 else None},
        "yaxis": log_axis(value for drawn in data for value in drawn["y"]) if is_log else {"nticks": 6},
        **_bands(history),
    }  # fmt: skip
    unit = "log scale" if is_log else ""
    return Figure(name, title, unit, {"data": data, "layout": layout}, tuple(keys) if len(keys) > 1 else ())


def _points(
    history: Sequence[Mapping[str, Any]], key: str, called: str, *, is_log: bool
) -> tuple[list[int | None], list[float | None], list[str]]:
    x: list[int | None] = []
    y: list[float | None] = []
    texts = []
    before = None
    for place, epoch in enumerate(history, 1):
        value = epoch.get(key)
        is_drawn = value is not None and (value > 0 or not is_log)
        if before is not None and epoch["phase"] != before:
            x, y, texts = [*x, None], [*y, None], [*texts, ""]
        before = epoch["phase"]
        x.append(place)
        y.append(value if is_drawn else None)
        texts.append(f"{phase_words(before)}, epoch {epoch['epoch'] + 1}: {called} {figure(value)}")
    return x, y, texts


def _bands(history: Sequence[Mapping[str, Any]]) -> Spec:
    """The phases as bands with their names on top, where there is room for one."""
    shapes, names, first = [], [], 0
    for place, (phase, part) in enumerate(groupby(history, key=lambda epoch: epoch["phase"])):
        count = len(list(part))
        left, right = first + 0.5, first + count + 0.5
        if place % 2:
            shapes.append({
                "type": "rect", "yref": "paper", "x0": left, "x1": right, "y0": 0, "y1": 1, "layer": "below",
                "fillcolor": "var(--band)", "line": {"width": 0},
            })  # fmt: skip
        if count / len(history) > 0.17:  # 7 letters on a phone
            names.append({
                "text": phase_words(phase), "x": (left + right) / 2, "y": 1, "yref": "paper", "yanchor": "bottom",
                "showarrow": False, "font": {"size": 11},
            })  # fmt: skip
        first += count
    return {"shapes": shapes, "annotations": names}


def _epochs_until(history: Iterable[Mapping[str, Any]], number: int) -> int:
    """Epochs up to the end of a round: those of its phase and of all before it."""
    names = {f"round-{one}" for one in range(1, number + 1)}
    return sum(epoch["phase"] in names for epoch in history)
