"""The two pages for people, rendered from the report alone: report.html and the model card README.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.report import charts, words

_TASKS = {  # by metric, as the Hub calls them
    "top1": ("image-classification", "Image classification"),
    "miou": ("image-segmentation", "Image segmentation"),
}
_FOLDER = Path(__file__).parent
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])")
_NAMES = ("figure", "percent", "points", "count", "speed_words", "latency_conditions", "command", "wilson",
          "strength_words")  # fmt: skip


def html(report: Mapping[str, Any]) -> str:
    """report.html: one file that needs no other and asks no network; everything inserted is escaped."""
    page = environment(autoescape=True).get_template("report.html.j2")
    spreads, axis = charts.latency(report)
    drawn: dict[str, Any] = {
        "training": charts.training(report),
        "bars": charts.widths(report),
        "spreads": spreads,
        "axis": axis,
    }
    drawn |= {"densities": charts.densities(report), "density_chart": charts.density_over_steps(report)}
    return page.render(**_values(report), **drawn)


def card(report: Mapping[str, Any]) -> str:
    """README.md: a model card in the Hugging Face form, YAML in front; everything inserted is escaped."""
    page = environment(autoescape=False).get_template("card.md.j2")
    front = yaml.safe_dump(_front(report), sort_keys=False, allow_unicode=True, width=120)
    return page.render(**_values(report), front=Markup(front))  # its writer has quoted it


def environment(*, autoescape: bool) -> Environment:
    """Templates of this folder. Without HTML escaping every value is escaped for Markdown instead."""
    made = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=None if autoescape else _markdown,
    )
    made.filters.update({name: getattr(words, name) for name in _NAMES}, yaml=_yaml, phase=charts.phase_name)
    return made


def _markdown(value: Any) -> Any:
    """Text that Markdown shows as it is, on one line; Markup stays."""
    if isinstance(value, Markup):
        return value
    text = re.sub(r"\s+", " ", str(value)).replace("&", "&amp;").replace("<", "&lt;")
    return _MARKDOWN.sub(r"\\\1", text)


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _values(report: Mapping[str, Any]) -> dict[str, Any]:
    """What both templates see: the report, paths cut down to names, and its main table."""
    shown = {key: words.without_folder(report[key]) for key in ("recipe", "data", "conditions", "environment")}
    return {
        "r": {**report, **shown},
        "rows": _rows(report),
        "macs_unit": _macs(report)[0],
        "size_unit": _size(report)[0],
        "title": _title(report),
        "metric": _metric(report),
        "limits": words.limits(report),
        "seconds": words.stage_times(report["seconds"]),
    }


def _title(report: Mapping[str, Any]) -> str:
    data = words.without_folder(report["data"]["name"])
    return f"{words.without_folder(report['arch'])} on {data}, pruned with {report['method']}"


def _rows(report: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The table dense -> pruned: what with its unit, dense, pruned, change."""
    dense, pruned, kept = report["dense"], report["pruned"], report["kept"]
    macs_unit, macs = _macs(report)
    size_unit, size = _size(report)
    reached = words.reached(dense), words.reached(pruned)
    before, after = dense["latency_ms"], pruned["latency_ms"]
    gains = {"p50": words.speed_words(report["speedup"])}
    times = [
        (f"latency {key} (ms)", words.figure(before[key]), words.figure(after[key]), gains.get(key, ""))
        for key in ("p50", "p90", "p99")
    ]
    return [
        ("parameters that are not 0" if words.is_in_place(report) else "parameters",
         f"{dense['params']:,}", f"{pruned['params']:,}", f"{words.percent(kept['params'])} remain"),
        (f"MACs per image{f' ({macs_unit})' if macs_unit else ''}", *macs, f"{words.percent(kept['macs'])} remain"),
        (f"ONNX file ({size_unit})", *size, f"{words.percent(kept['size'])} remain"),
        (f"{_metric(report)} on {report['split']['name']} (%)", f"{reached[0]:.2f}", f"{reached[1]:.2f}",
         f"{words.points(*reached)} points"),
        *times,
        ("throughput (images/s)", words.figure(dense["throughput"]), words.figure(pruned["throughput"]), ""),
    ]  # fmt: skip


def _metric(report: Mapping[str, Any]) -> str:
    return words.metric_words(words.measured(report["pruned"]))


def _macs(report: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    return words.scaled(report["dense"]["macs"], report["pruned"]["macs"], ("", "thousand", "million", "billion"))


def _size(report: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    return words.scaled(report["dense"]["size_bytes"], report["pruned"]["size_bytes"], ("bytes", "kB", "MB", "GB"))


def _front(report: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML in front of a model card. The licence is left out: nothing here knows it."""
    source = report["recipe"]["data"]["source"]
    name = words.without_folder(report["arch"])
    kind = "unstructured-pruning" if words.is_in_place(report) else "structured-pruning"
    return {
        "library_name": "onnx",
        "pipeline_tag": _TASKS.get(words.measured(report["pruned"]), _TASKS["top1"])[0],
        "tags": list(dict.fromkeys(("onnx", "pruning", kind, "compress-to-onnx", report["method"]))),
        **({"datasets": [source.removeprefix("hf:")]} if source.startswith("hf:") else {}),
        "metrics": [_figure_of(report["pruned"])[0]],
        "model-index": [
            {"name": f"{name}-{report['method']}", "results": [_result(report, report["pruned"])]},
            {"name": f"{name}-dense", "results": [_result(report, report["dense"])]},
        ],
    }


def _figure_of(network: Mapping[str, Any]) -> tuple[str, str]:
    """The metric as the Hub calls it, and in words."""
    name = words.measured(network)
    known = {"top1": ("accuracy", "Top-1 accuracy (percent)"), "miou": ("mean_iou", "Mean IoU (percent)")}
    return known.get(name, (name, f"{name} (percent)"))


def _result(report: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    data, split, latency = words.without_folder(report["data"]["name"]), report["split"]["name"], network["latency_ms"]
    where = words.latency_conditions(latency)
    figures = [
        (*_figure_of(network), round(words.reached(network), 2)),
        ("parameters", "Parameters", network["params"]),
        ("macs", "MACs per image", network["macs"]),
        ("file_size", "ONNX file (bytes)", network["size_bytes"]),
        ("latency", f"Median latency (ms), {where}", float(f"{latency['p50']:.3g}")),
    ]
    return {
        "task": dict(zip(("type", "name"), _TASKS.get(words.measured(network), _TASKS["top1"]), strict=True)),
        "dataset": {"type": data.removeprefix("hf:"), "name": data, "split": split},
        "metrics": [{"type": kind, "name": name, "value": value} for kind, name, value in figures],
    }
