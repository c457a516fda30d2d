"""compress quantize: an ONNX file in int8 or float16, judged and measured beside the float32 one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_args

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from compress.checkpoint import ModelInfo
    from compress.data import Data
    from compress.quantize import Quantized, Setting
    from compress.task import Task


class _Asked(NamedTuple):
    """The file, where its copy goes, and of a run the images that it was made with."""

    source: Path
    out: Path
    data: str | None  # what the recipe names
    options: dict[str, Any]  # of load_data


def quantize(
    source: Annotated[Path, typer.Argument(metavar="RUN|FILE.onnx", help="Folder of a finished run, or an ONNX file")],
    to: Annotated[str, typer.Option("--to", help="int8 (static, for CPUs) or fp16 (for GPUs)")] = "int8",
    data: options.Data = None,
    calibration: Annotated[
        str, typer.Option("--calibration", help="minmax, entropy or percentile: how int8 finds its ranges")
    ] = "minmax",
    images: Annotated[int, typer.Option("--images", min=1, help="Of the train split, for the ranges")] = 256,
    max_drop: Annotated[
        float | None, typer.Option("--max-drop", min=0, metavar="POINTS", help="Exit code 7 where it loses more")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Images at a time, for the latency; default: 1, or what the file takes"),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime")] = 1,
    runtime: Annotated[str, typer.Option("--runtime", help="What the latency is measured on: see `bench`")] = "ort-cpu",
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Most to spend on the latency")] = 20.0,
    task: options.Task = None,
    input_size: options.InputSize = None,
    out: Annotated[Path | None, typer.Option("--out", help="Default: FILE.int8.onnx, beside the file")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
    seed: options.Seed = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a file of lower precision, prove it near the float32 one, and say what it costs and brings here."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress.cli import user_code
    from compress.errors import UsageError
    from compress.inputs import normalisation, onnx_info
    from compress.precision import Calibration, To
    from compress.quantize import Setting, images_of, record
    from compress.quantize import quantize as make

    setting = Setting(
        _one_of("--to", to, get_args(To)), _one_of("--calibration", calibration, get_args(Calibration)), max_drop,
        batch=batch or 1, threads=threads, runtime=_runtime(runtime), seconds=seconds, seed=seed or 0,
    )  # fmt: skip
    asked = _asked(source, out, setting, force=force)
    info, fixed = onnx_info(asked.source, input_size)
    if fixed is not None:
        if batch not in (None, fixed):
            raise UsageError(f"--batch {batch}: {asked.source} takes batch {fixed} only; leave it out")
        setting = replace(setting, batch=fixed)
    judge = user_code.task(task, info.task)
    info, loaded = _data(info, asked, data, judge)
    given = images_of(loaded, normalisation(info), count=images, fixed=fixed, seed=setting.seed)
    with view.working(f"to {to}: converting, comparing, running {given.count:,} images twice, measuring"):
        made = make(asked.source, asked.out, setting, images=given, task=judge)
    place = record(asked.out.parent, made)
    if source.is_dir() and asked.out.parent.samefile(source):
        _report(source, made)
    _show(made)
    view.note(f"{asked.out}, figures and conditions in {place}")
    if as_json:
        view.document({"onnx": str(asked.out), "record": str(place), **made.model_dump(mode="json")})


def _report(folder: Path, made: Quantized) -> None:
    """The run's pages with this file, unless they tell of another one."""
    from compress import report
    from compress.folder import RunFolder

    before = RunFolder.finished(folder).read("report.json")
    if (before.get("quantized") or {"file": made.file})["file"] == made.file:
        found = report.quantized(made.model_dump(mode="json"))
        report.write(folder, {**before, "quantized": found, "unquantized": ""})


def _asked(place: Path, out: Path | None, setting: Setting, *, force: bool) -> _Asked:
    from compress import recipe
    from compress.errors import UsageError
    from compress.folder import RunFolder

    source, named = place, None
    given: dict[str, Any] = {"seed": setting.seed}
    if place.is_dir():
        source = RunFolder.finished(place).path / "model.onnx"
        made = recipe.make(recipe.read(place / "recipe.yaml"))
        named = made.data.source or None
        part = {"image_size": made.data.image_size, "val_share": made.data.val_share}
        given = {"seed": made.seed, "max_unreadable": made.data.max_unreadable, **part}
    out = out or source.with_name(f"{source.stem}.{setting.to}.onnx")
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out} must end in .onnx")
    if out.exists() and (not force or out.samefile(source)):
        raise UsageError(f"{out} exists already; choose another --out or give --force")
    return _Asked(source, out, named, given)


def _data(info: ModelInfo, asked: _Asked, data: str | None, task: Task) -> tuple[ModelInfo, Data]:
    """The data set, and what is known of the network with the normalisation filled in.

    A data set that the recipe names is treated like one that the file names: code is not run unless --data says so.
    """
    from compress.fit import complete
    from compress.inputs import load_data
    from compress.train import check_data

    with view.working("loading the data"):
        loaded = load_data(info.model_copy(update={"data": asked.data or info.data}), data, **asked.options)
    check_data(task, loaded)
    if info.mean is None or info.std is None:
        view.note("normalisation: the file says none; measured on the training images of the data")
    return complete(info, loaded), loaded


def _runtime(name: str) -> Any:
    """One of those that take ONNX files, seen to be active before any work is done."""
    from compress.bench import RUNTIMES
    from compress.errors import MeasureError

    adapter = RUNTIMES[_one_of("--runtime", name, [key for key, one in RUNTIMES.items() if one.takes is Path])]
    if reason := adapter.inactive():
        raise MeasureError(f"--runtime {name} cannot be measured here: {reason}; {adapter.remedy}")
    return name


def _one_of(option: str, given: str, allowed: Sequence[Any]) -> Any:
    from compress.errors import UsageError

    if given not in allowed:
        raise UsageError(f"{option} {given} is unknown; there are {', '.join(allowed)}")
    return given


def _show(made: Quantized) -> None:
    from compress.report.words import figure, metric_words, speed_words

    (one, other), near = made.measurements, made.fidelity
    before, after = made.before["metric"]["value"], made.after["metric"]["value"]
    rows = [
        ("ONNX file (kB)", figure(one.size_bytes / 1e3), figure(other.size_bytes / 1e3),
         figure(other.size_bytes / one.size_bytes)),
        (f"{metric_words(made.before['metric']['name'])} on {made.split} (%)", f"{before:.2f}", f"{after:.2f}",
         f"{after - before:+.2f} points"),
        ("latency p50 (ms)", figure(one.latency.p50), figure(other.latency.p50),
         speed_words(made.speedup.model_dump())),
    ]  # fmt: skip
    view.table(f"{made.source} -> {made.to}", ("", "float32", made.to, "share / change"), rows)
    told = [f"{key.replace('_', ' ')} {value}" for key, value in made.how.items()]
    noise = "outputs bit by bit the same" if near.snr_db is None else f"signal over noise {near.snr_db:.1f} dB"
    same = "" if near.top1_agreement is None else f", same top-1 on {near.top1_agreement:.2f} %"
    view.note(f"{', '.join(told)}; on {near.images:,} validation images {noise}{same}")
    view.note(made.verdict)
    for warning in made.conditions.get("warnings", ()):
        view.note(warning)
