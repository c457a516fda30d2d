"""Figures as text: the verdict in one line, numbers with their units, what a difference is worth."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

RUNTIMES = {
    "ort-cpu": "ONNX Runtime CPU", "ort-cuda": "ONNX Runtime CUDA", "ort-tensorrt": "ONNX Runtime TensorRT",
    "openvino": "OpenVINO", "torch-cpu": "torch on CPU", "torch-compile-cpu": "torch compiled for CPU",
    "torch-cuda": "torch on CUDA", "torch-compile-cuda": "torch compiled for CUDA",
}  # fmt: skip
METRICS = {"params": "parameters", "macs": "MACs", "size": "bytes"}
MEASURED = {"top1": "top-1", "miou": "mean IoU"}  # the metrics of our tasks
_KEYS = {"params": "params", "macs": "macs", "size": "size_bytes"}
Z95 = 1.959964  # standard normal quantile at 0.975


def verdict(report: Mapping[str, Any]) -> str:
    """What came of the run: size, speed with its interval and conditions, accuracy on the named split."""
    dense, pruned, split = report["dense"], report["pruned"], report["split"]["name"]
    speed = f"{speed_words(report['speedup'])} on {latency_conditions(pruned['latency_ms'])}"
    before, after = (reached(network) for network in (dense, pruned))
    accuracy = f"{metric_words(measured(pruned))} {before:.2f} -> {after:.2f} on {split}"
    if is_in_place(report):
        return f"{zeros_in_place(report)}; {accuracy}; {speed}"
    metric = report["metric"] if report["metric"] in METRICS else "params"
    key = _KEYS[metric]
    size = f"{pruned[key]:,} of {dense[key]:,} {METRICS[metric]} remain ({percent(report['kept'][metric])})"
    return f"{size}; {speed}; {accuracy}"


def measured(network: Mapping[str, Any]) -> str:
    """The name of the metric that a network was judged by; reports from before there were several have top-1."""
    return str((network.get("metric") or {"name": "top1"})["name"])


def reached(network: Mapping[str, Any]) -> float:
    """The metric's value, in percent."""
    return float((network.get("metric") or {"value": network["top1"]})["value"])


def metric_words(name: str) -> str:
    """`top-1`, `mean IoU`; the metric of a task of one's own is called what that task calls it."""
    return MEASURED.get(name, name)


def is_in_place(report: Mapping[str, Any]) -> bool:
    """Whether single weights are 0 and all shapes as before, rather than channels gone."""
    return report.get("granularity") == "weight"


def zeros_in_place(report: Mapping[str, Any]) -> str:
    """The file's size before and after, and how many parameters are not 0."""
    dense, pruned, kept = report["dense"], report["pruned"], report["kept"]
    unit, (before, after) = scaled(dense["size_bytes"], pruned["size_bytes"], ("bytes", "kB", "MB", "GB"))
    return (
        f"zeros in place: the ONNX file shrinks from {before} to {after} {unit} ({percent(kept['size'])}), "
        f"{pruned['params']:,} of {dense['params']:,} parameters are not 0 ({percent(kept['params'])})"
    )


def speed_words(speedup: Mapping[str, Any]) -> str:
    """Faster or slower by how much, with the interval; no factor where the noise is larger than the effect."""
    value, low, high = speedup["value"], speedup["low"], speedup["high"]
    if speedup["verdict"] == "faster":
        return f"{value:.2f}x faster ({low:.2f} to {high:.2f})"
    if speedup["verdict"] == "slower":
        return f"{1 / value:.2f}x slower ({1 / high:.2f} to {1 / low:.2f})"
    return f"speed not distinguishable ({low:.2f}x to {high:.2f}x)"


def latency_conditions(latency: Mapping[str, Any]) -> str:
    """Where a latency holds: runtime, batch and threads."""
    runtime = RUNTIMES.get(latency["runtime"], latency["runtime"])
    return f"{runtime}, batch {latency['batch']}, {count(latency['threads'], 'thread')}"


def figure(value: float | None) -> str:
    """Three significant digits with thousands separators: 0.0453, 12.3, 270,000; 8.37e-05 when that is shorter."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0 or abs(value) >= 1e-4:
        rounded = float(f"{value:.3g}")
        decimals = max(0, 2 - math.floor(math.log10(abs(rounded)))) if rounded else 0
        return f"{rounded:,.{decimals}f}"
    return f"{value:.2e}"


def percent(share: float) -> str:
    """A share of 0 to 1 as percent with two significant digits, three from 10 % on: 4.7 %, 56.6 %, 100 %."""
    value = 100 * share
    decimals = 0 if value >= 99.95 or value == 0 else max(1, 1 - math.floor(math.log10(value)))
    return f"{value:.{decimals}f} %"


def points(before: float, after: float) -> str:
    """A difference of two percentages, signed: +0.28, -5.85 (rounded figures subtract to what is shown)."""
    difference = round(round(after, 2) - round(before, 2), 2)
    return f"{difference + 0.0:+.2f}"


def scaled(before: float, after: float, units: tuple[str, ...]) -> tuple[str, tuple[str, str]]:
    """One unit (steps of 1,000) for two figures in one row, chosen by their geometric mean, and the figures in it."""
    step = min(len(units) - 1, math.floor(math.log(max(1, before * after), 1000) / 2))
    return units[step], (figure(before / 1000**step), figure(after / 1000**step))


def phase_words(phase: str) -> str:
    """How a phase is called on the page: round-1 -> round 1."""
    return phase.replace("-", " ")


def file_words(file: str) -> str:
    """The two files of a run as what they are; another one by its name."""
    known = {"dense.onnx": "dense", "model.onnx": "pruned"}
    known |= {"dense.safetensors": "dense", "pruned.safetensors": "pruned"}
    return known.get(Path(file).name, str(without_folder(file)))


def asked(report: Mapping[str, Any]) -> str:
    """What was to remain; of a latency also what does, since that is aimed at, and not met exactly."""
    metric, wanted_ms = report["metric"], report["recipe"]["prune"].get("target_ms")
    found = f"{100 * report['target']:.3g} % of the {METRICS.get(metric, metric)}"
    if metric != "latency":
        return found
    before, after = (report[name]["latency_ms"]["p50"] for name in ("dense", "pruned"))
    milliseconds = f" ({wanted_ms:g} ms)" if wanted_ms else ""
    return f"{found}{milliseconds}; {percent(after / before)} is left"


def by_reason(frozen: Mapping[str, str]) -> dict[str, list[str]]:
    """Why groups could not be cut -> which: large networks have few reasons and many groups."""
    found: dict[str, list[str]] = {}
    for name, reason in frozen.items():
        found.setdefault(reason, []).append(name)
    return found


def comparisons(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every measurement of the same files: the headline's, then other batches and runtimes."""
    headline = {key: report[key] for key in ("measurements", "speedups", "conditions")}
    return [headline, *report.get("further", ())]


def disturbances(report: Mapping[str, Any]) -> list[str]:
    """What disturbed the measurements, each said once with its runtime and batch."""
    return [
        f"{latency_conditions(found['measurements'][0]['latency'])}: {warning}"
        for found in comparisons(report)
        for warning in found["conditions"].get("warnings", ())
    ]


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def stage_times(seconds: Mapping[str, float]) -> str:
    """The stages with their seconds, and the sum."""
    parts = ", ".join(f"{name} {figure(value)} s" for name, value in seconds.items())
    return f"{parts}; together {figure(sum(seconds.values()))} s"


def wilson(top1: float, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy (percent) that was counted on `images` images (Wilson 1927)."""
    share, square = top1 / 100, Z95**2 / images
    centre = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / images + square / (4 * images))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def limits(report: Mapping[str, Any]) -> list[str]:
    """What these figures do not say, as sentences."""
    images, split, pruned = report["split"]["images"], report["split"]["name"], report["pruned"]
    name, value, what = measured(pruned), reached(pruned), "accuracy"
    if name == "top1":
        low, high = wilson(value, images)
        found = [
            f"Accuracy was counted on {count(images, 'image')} ({split}): one image is {figure(100 / images)} points, "
            f"and the 95 % interval (Wilson) of {value:.2f} % is {low:.1f} to {high:.1f} %."
        ]
    else:
        what = metric_words(name)
        found = [f"The {what} was measured on {count(images, 'image')} ({split}); no interval is given for it."]
    if split == "val":
        found.append(f"There is no test split: the same images also chose the weights, so this {what} is too good.")
    if report["speedup"]["verdict"] == "not distinguishable":
        found.append("The speed-up's interval contains 1: on this machine no difference in speed could be measured.")
    if is_in_place(report):
        found.append(
            "What shrinks is the file. Loaded, the network has its old shapes, and ONNX Runtime multiplies by zeros as "
            "by any other number: MACs and memory stay, and no speed is claimed beyond what was measured here."
        )
    named = "these runtimes and batches" if report.get("further") else latency_conditions(pruned["latency_ms"])
    found.append(
        f"Latency holds for {named} on the machine named here; other hardware, runtimes and batch sizes have to be "
        "measured."
    )
    if report["uncounted"]:
        found.append(f"The MACs leave out {', '.join(report['uncounted'])}, for which there is no count.")
    found.append(
        "The proof compares the ONNX files with torch on validation images; it says nothing about the dense network's "
        "own faults, which the pruned one inherits, nor about images unlike those it was trained on."
    )
    return found


def strength_words(strength: Mapping[str, Any]) -> str:
    """`halo: xi 4.54e-07, psi 1e-08; calibrated to 10.0 % of the task loss`."""
    values = ", ".join(f"{name} {value:.3g}" for name, value in strength["values"].items())
    share = strength["share"]
    return f"{strength['name']}: {values}" + (
        "" if share is None else f"; calibrated to {percent(share)} of the task loss"
    )


def without_folder(value: Any) -> Any:
    """Pages are sent round: of an absolute path only the last part is shown, at any depth of lists and mappings."""
    if isinstance(value, Mapping):
        return {key: without_folder(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_folder(part) for part in value]
    if isinstance(value, str) and value.startswith("hf:"):
        return f"hf:{without_folder(value[3:])}"
    if isinstance(value, str):
        for path in (PurePosixPath(value), PureWindowsPath(value)):
            if path.is_absolute():
                return path.name or value
    return value


def commands(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What each does, and the command lines that repeat the run from its folder; the checkpoint by its file name."""
    model, latency = report["recipe"]["model"], report["pruned"]["latency_ms"]
    prune = ["compress", "prune", Path(str(without_folder(model["path"]))).name]
    if model["arch"]:
        prune += ["--arch", str(without_folder(model["arch"]))]
    for key, value in model["arch_args"].items():
        prune += ["--arch-arg", f"{key}={value}"]
    bench = ["compress", "bench", "dense.onnx", "model.onnx", "--runtime", latency["runtime"]]
    batches = dict.fromkeys(str(one["measurements"][0]["latency"]["batch"]) for one in comparisons(report))
    bench += ["--batch", ",".join(batches), "--threads", str(latency["threads"])]
    return [
        ("the whole run again", shlex.join([*prune, "--recipe", "recipe.yaml"])),
        ("the proof again", "compress verify ."),
        ("the measurement again", shlex.join(bench)),
    ]
