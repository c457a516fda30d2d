"""quantize(): an ONNX file at lower precision, proved, judged and measured beside the float32 file it comes from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from torch import Tensor

from compress.bench import benchmark
from compress.bench.results import Measurement, Runtime, Speedup
from compress.bench.session import one_line, open_session, runtime_errors
from compress.data import Data, loader
from compress.errors import AccuracyError, LoadError, ParityError
from compress.export import BATCHES, LEAST_SCALE, metric
from compress.files import atomic_path, atomic_write, sha256
from compress.precision import FP16_MOST, Calibration, To, convert, largest
from compress.task import Task, reported

IMAGES = 256  # of the train split, for the ranges: README, "Quantise"
COMPARED = 512  # images of the validation split at most, whose outputs are compared
CALIBRATION_BATCH = 16  # whose activations, of every layer, are held at a time
BATCH = 256
RECORD = "quantize.json"
Array = NDArray[Any]


@dataclass(frozen=True)
class Setting:
    """What the file becomes, and how it is measured; `max_drop`: points of the metric that it may lose."""

    to: To
    calibration: Calibration = "minmax"
    max_drop: float | None = None
    batch: int = 1
    threads: int = 1
    runtime: Runtime = "ort-cpu"
    seconds: float = 20.0
    seed: int = 0


@dataclass(frozen=True)
class Images:
    """Normalised images (N, C, H, W): ranges come from `train`, agreement from `val`, the metric from `judged`."""

    train: Sequence[Tensor]
    val: Sequence[Tensor]
    judged: Callable[[], Iterable[Any]]  # a pass over labelled batches
    split: str  # what the labelled ones are called
    count: int  # how many there are


class Fidelity(BaseModel, frozen=True, extra="forbid"):
    """How near the outputs are to those of the float32 file, on validation images, none of which gave the ranges."""

    images: int
    batches: tuple[int, ...]  # sizes it was run at
    top1_agreement: float | None  # percent of the images with the same largest output; None without classes
    snr_db: float | None  # power of the float32 outputs over that of the difference; None: bit by bit the same
    max_abs_diff: float
    output_scale: float  # rms of the float32 outputs


class Quantized(BaseModel, frozen=True, extra="forbid"):
    """One entry of quantize.json. Metrics in percent on `split`, by ONNX Runtime on the files themselves."""

    verdict: str
    file: str
    sha256: str
    source: str
    source_sha256: str
    to: To
    how: Mapping[str, Any]  # types of weights and activations, calibration
    fidelity: Fidelity
    split: str
    images: int
    before: Mapping[str, Any]  # top1 and metric, as everywhere
    after: Mapping[str, Any]
    measurements: tuple[Measurement, ...]  # float32 first, both in one run
    speedup: Speedup
    conditions: Mapping[str, Any]
    seconds: float


def quantize(source: Path, out: Path, setting: Setting, *, images: Images, task: Task) -> Quantized:
    """Convert, prove, judge, measure; `out` is written only once the file is proved and within its budget.

    Proof and metric are by ONNX Runtime on the CPU, which rounds as int8 files say, but computes float16 ones in
    float32: of those it sees the rounding of weights and inputs, and that no value between operators would overflow.

    Raises:
        ParityError: outputs are not finite, of another shape, or more noise than signal.
        AccuracyError: the metric falls by more than setting.max_drop.
        CompressError: the converters cannot express the network.
    """
    began = time.perf_counter()
    with atomic_path(out) as temporary:
        if setting.to == "fp16":
            _check_range(source, images.val, out.name)
        how = convert(source, temporary, setting.to, calibration=setting.calibration, images=images.train)
        fidelity = compare(source, temporary, images.val, name=out.name)
        before, after = (metric(path, images.judged(), task) for path in (source, temporary))
        if setting.max_drop is not None and before - after > setting.max_drop:
            fell = f"{task.metric} on {images.split} falls from {before:.2f} to {after:.2f} %"
            raise AccuracyError(f"{fell}; allowed are {setting.max_drop:g} points; no file was written")
    found = benchmark(
        [source, out], batch=setting.batch, threads=setting.threads, runtime=setting.runtime, seconds=setting.seconds,
        seed=setting.seed,
    )  # fmt: skip
    one, other = found.measurements
    facts: dict[str, Any] = {
        "file": out.name, "sha256": other.sha256, "source": source.name, "source_sha256": one.sha256,
        "to": setting.to, "how": how, "fidelity": fidelity, "split": images.split, "images": images.count,
        "before": reported(task, before), "after": reported(task, after), "measurements": found.measurements,
        "speedup": found.speedups[0], "conditions": found.conditions, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    return Quantized(verdict=_verdict(facts), **facts)


def images_of(
    loaded: Data, normalisation: tuple[Sequence[float], Sequence[float]], *, count: int = IMAGES,
    fixed: int | None = None, seed: int = 0,
) -> Images:  # fmt: skip
    """The images of a data set for `quantize`: `count` random ones of train as they are, val, and test (or val again).

    `fixed`: the only batch that the file takes; a split's last images that do not fill one are left out.
    """
    mean, std = normalisation
    shared: dict[str, Any] = {"mean": mean, "std": std, "drop_last": fixed is not None}
    name, split = ("test", loaded.test) if loaded.test is not None and len(loaded.test) else ("val", loaded.val)
    size = fixed or min(count, CALIBRATION_BATCH)
    drawn = loader(loaded.train, batch_size=size, train=True, augment="none", seed=seed, workers=0, **shared)
    compared = loader(loaded.val, batch_size=fixed or 64, train=False, workers=0, **shared)
    judged = loader(split, batch_size=fixed or BATCH, train=False, **shared)
    left_out = len(split) % fixed if fixed else 0
    return Images(
        train=_first(drawn, count, is_cut=not fixed), val=_first(compared, COMPARED), judged=lambda: judged,
        split=name, count=len(split) - left_out,
    )  # fmt: skip


def compare(source: Path, made: Path, batches: Sequence[Tensor], *, name: str = "") -> Fidelity:
    """The outputs of two files on the same images, at every batch size of the exporter's proof and on all batches.

    Raises:
        ParityError: as `quantize`.
    """
    name, first = name or made.name, batches[0]
    sessions = [open_session(path, threads=torch.get_num_threads()) for path in (source, made)]
    fixed = sessions[0].get_inputs()[0].shape[0]
    sizes = (fixed,) if isinstance(fixed, int) else BATCHES
    for count in sizes:
        _pair(sessions, first[torch.arange(count) % len(first)], name)
    sums, worst, agreed = np.zeros(3), 0.0, list[Array]()  # squares of the outputs, of the difference, elements
    for batch in batches:
        wanted, got = _pair(sessions, batch, name)
        for one, other in zip(wanted, got, strict=True):
            sums += np.square(one).sum(), np.square(one - other).sum(), one.size
            worst = max(worst, float(np.abs(one - other).max()))
        if wanted[0].ndim > 1 and wanted[0].shape[1] > 1:
            agreed.append((wanted[0].argmax(1) == got[0].argmax(1)).ravel())
    signal, noise, elements = sums.tolist()
    scale = math.sqrt(signal / elements)
    if scale < LEAST_SCALE or noise > signal:
        text = f"outputs of rms {scale:.3g} with noise of rms {math.sqrt(noise / elements):.3g}"
        raise ParityError(f"{name} gives {text}: not the same network any more; keep the float32 file")
    return Fidelity(
        images=sum(len(batch) for batch in batches), batches=sizes, max_abs_diff=worst, output_scale=scale,
        top1_agreement=100.0 * float(np.concatenate(agreed).mean()) if agreed else None,
        snr_db=10 * math.log10(signal / noise) if noise else None,
    )  # fmt: skip


def record(folder: Path, made: Quantized) -> Path:
    """Add an entry to the folder's quantize.json, under the file's name, in place of an earlier one; where that is."""
    path = folder / RECORD
    entries = {name: entry.model_dump(mode="json") for name, entry in recorded(folder).items()}
    entries[made.file] = made.model_dump(mode="json")
    atomic_write(path, json.dumps({"files": entries}, indent=1, allow_nan=False) + "\n")
    return path


def recorded(folder: Path) -> dict[str, Quantized]:
    """The entries of the folder's quantize.json, none where there is no such file.

    Raises:
        LoadError: the file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text())["files"]
        return {name: Quantized.model_validate(entry) for name, entry in entries.items()}
    except (ValueError, LookupError, TypeError, AttributeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise LoadError(f"{path} is damaged ({first}); delete it, and quantise again") from error


def check(folder: Path) -> str:
    """That a run's files of lower precision are those that were measured, and its report says the same; in words.

    Raises:
        ParityError: one is another file, or report.json claims another.
        LoadError: quantize.json is damaged.
    """
    entries = recorded(folder)
    claimed = (json.loads((folder / "report.json").read_text()).get("quantized") or {}) if entries else {}
    found = []
    for name, made in entries.items():
        path = folder / name
        digest = sha256(path) if path.is_file() else ""
        if digest and digest != made.sha256:
            raise ParityError(f"sha256 of {name} is {digest[:12]}..., the measured file's {made.sha256[:12]}...")
        if claimed.get("file") == name and claimed["sha256"] != made.sha256:
            raise ParityError(f"report.json claims another {name} than {RECORD}: one of them is of another run")
        found.append(f"{name} " + (f"sha256 {digest[:12]}..., as measured" if digest else "is not in the folder"))
    return "; ".join(found) or "no file of lower precision is claimed"


def _first(batches: Iterable[tuple[Tensor, Any]], count: int, *, is_cut: bool = False) -> tuple[Tensor, ...]:
    """The images of the first batches that hold `count` of them; the last one cut to the number where `is_cut`."""
    found, left = list[Tensor](), count
    for images, _ in batches:
        if left <= 0:
            break
        found.append((images[:left] if is_cut else images).cpu().contiguous())
        left -= len(images)
    return tuple(found)


def _check_range(source: Path, batches: Sequence[Tensor], name: str) -> None:
    if (most := largest(source, batches)) > FP16_MOST:
        raise ParityError(f"{name} would overflow: values reach {most:.3g}, float16 ends at {FP16_MOST:g}; take int8")


def _pair(sessions: Sequence[Any], batch: Tensor, name: str) -> list[list[Array]]:
    """Both files' outputs in float64, seen to be of the same shapes and finite."""
    feeds = {sessions[0].get_inputs()[0].name: batch.contiguous().numpy()}
    try:
        wanted, got = ([np.asarray(y, np.float64) for y in session.run(None, feeds)] for session in sessions)
    except runtime_errors() as error:
        raise ParityError(f"{name} does not run on {len(batch)} images: {one_line(error)}") from error
    if (shapes := [y.shape for y in got]) != (before := [y.shape for y in wanted]):
        raise ParityError(f"{name} gives outputs of shape {shapes}, the float32 file {before}")
    if not all(np.isfinite(y).all() for y in got):
        raise ParityError(f"{name} gives NaN or Inf: values outside the range of the lower precision")
    return [wanted, got]


def _verdict(facts: Mapping[str, Any]) -> str:
    """What it brought in one line: bytes, the metric, and whether it is faster, or slower, here."""
    (one, other), gain = facts["measurements"], facts["speedup"]
    what, before, after = (facts[key]["metric"] for key in ("before", "before", "after"))
    speed = {
        "faster": f"{gain.value:.2f}x faster ({gain.low:.2f} to {gain.high:.2f})",
        "slower": f"slower here, {1 / gain.value:.2f} times the latency ({1 / gain.high:.2f} to {1 / gain.low:.2f})",
    }.get(gain.verdict, f"no faster here, speed not distinguishable ({gain.low:.2f}x to {gain.high:.2f}x)")
    where = f"{one.latency.runtime}, batch {one.latency.batch}, threads {one.latency.threads}"
    sizes = f"{one.size_bytes / 1e3:,.1f} -> {other.size_bytes / 1e3:,.1f} kB"
    name = "top-1" if what["name"] == "top1" else what["name"]
    reached = f"{name} {before['value']:.2f} -> {after['value']:.2f} on {facts['split']}"
    note = "; float16 is for GPUs, this CPU computes it in float32"
    is_cpu = facts["to"] == "fp16" and one.latency.runtime.endswith("cpu")
    return f"{facts['to']}: {sizes}; {reached}; {speed} by {where}{note * is_cpu}"
