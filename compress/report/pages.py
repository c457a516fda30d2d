"""The two pages for people, rendered from the report alone: report.html and the model card README.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.report import figures, over_time, words
from compress.report.bundle import bundle, digest
from compress.report.curves import curves, measures
from compress.report.figures import Figure

_TASKS = {  # by metric, as the Hub calls them
    "top1": ("image-classification", "Image classification"),
    "miou": ("image-segmentation", "Image segmentation"),
}
_FOLDER = Path(__file__).parent
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])")
_NAMES = ("figure", "percent", "points", "count", "speed_words", "latency_conditions", "commands", "strength_words",
          "phase_words", "file_words", "asked", "metric_words")  # fmt: skip


def html(report: Mapping[str, Any]) -> str:
    """report.html: one file that needs no other and asks no network; everything inserted is escaped."""
    found = report.get("sensitivity")
    plots = {
        "latency": figures.latency(words.comparisons(report)),
        "widths": () if words.is_in_place(report) else figures.widths(report),
        "densities": figures.densities(report) if words.is_in_place(report) else (),
        "training": over_time.training(report),
        "over_steps": over_time.over_steps(report),
        "sensitivity": curves(found) if found else (),
    }
    values = {
        "commands": words.commands(report),
        "frozen": words.by_reason(report["frozen"]),
        "logs": {key: over_time.thinned(report[key]) for key in ("density_log", "lambda_log")},
        "sensitivity_keys": measures(found) if found else [],
    }
    return page("report.html.j2", plots, {**_values(report), **values})


def page(template: str, plots: Mapping[str, Sequence[Figure]], values: Mapping[str, Any]) -> str:
    """A page with its plots, plotly.js in it, and a policy that lets two scripts run, known by their hashes.

    Args:
        plots: by the names that the template uses.
    """
    made = environment(autoescape=True)
    script = made.get_template("draw.js.j2").render()
    specs = {figure.name: _brief(figure.spec) for found in plots.values() for figure in found}
    written = json.dumps(specs, allow_nan=False, separators=(",", ":"))
    return made.get_template(template).render(
        **values,
        plots=plots,
        specs=Markup(written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")),
        bundle=bundle(),
        script=Markup(script),
        script_digest=digest(script.encode()),
    )  # in markup and in script alike, what users named stays text


def _brief(value: Any) -> Any:
    """Numbers as exact as a plot can show them: most of a page's own bytes are digits."""
    if isinstance(value, Mapping):
        return {key: _brief(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_brief(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


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
    made.filters.update({name: getattr(words, name) for name in _NAMES}, yaml=_yaml)
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
        "comparisons": words.comparisons(report),
        "disturbances": words.disturbances(report),
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
    """The YAML in front of a model card. The licence is left out: nothing here knows it.

    The index holds the pruned network alone, since the Hub takes every result in it for the model's own.
    """
    name = re.split("[/:]", words.without_folder(report["arch"]))[-1]
    model, source = report["recipe"]["model"], report["recipe"]["data"]["source"]
    base = next((found for key in ("path", "arch") if (found := _on_the_hub(model[key]))), None)
    kind = "unstructured-pruning" if words.is_in_place(report) else "structured-pruning"
    return {
        "library_name": "onnx",
        "pipeline_tag": _TASKS.get(words.measured(report["pruned"]), _TASKS["top1"])[0],
        "tags": list(dict.fromkeys(("onnx", "pruning", kind, "compress-to-onnx", report["method"]))),
        **({"base_model": base} if base else {}),
        **({"datasets": [data]} if (data := _on_the_hub(source)) else {}),
        "metrics": [_figure_of(report["pruned"])[0]],
        "model-index": [{"name": f"{name}-{report['method']}", "results": [_result(report)]}],
    }


def _on_the_hub(place: str | None) -> str | None:
    """The repository or data set that `hf:NAME` names; None for a folder and for everything else."""
    found = re.fullmatch(r"hf:([\w.-]+(/[\w.-]+)?)", place or "")
    return found[1] if found else None


def _figure_of(network: Mapping[str, Any]) -> tuple[str, str]:
    """The metric as the Hub calls it, and in words."""
    name = words.measured(network)
    known = {"top1": ("accuracy", "Top-1 accuracy (percent)"), "miou": ("mean_iou", "Mean IoU (percent)")}
    return known.get(name, (name, f"{name} (percent)"))


def _result(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the pruned network reaches on the named split, what it costs, and its latency wherever it was measured."""
    network, split = report["pruned"], report["split"]["name"]
    data = words.without_folder(report["data"]["name"])
    latencies = [found["measurements"][1]["latency"] for found in words.comparisons(report)]
    figures = [
        (*_figure_of(network), round(words.reached(network), 2)),
        ("parameters", "Parameters", network["params"]),
        ("macs", "MACs per image", network["macs"]),
        ("file_size", "ONNX file (bytes)", network["size_bytes"]),
        *(
            ("latency", f"Median latency (ms), {words.latency_conditions(one)}", float(f"{one['p50']:.3g}"))
            for one in latencies
        ),
    ]
    return {
        "task": dict(zip(("type", "name"), _TASKS.get(words.measured(network), _TASKS["top1"]), strict=True)),
        "dataset": {"type": data.removeprefix("hf:"), "name": data, "split": split},
        "metrics": [{"type": kind, "name": name, "value": value} for kind, name, value in figures],
    }
