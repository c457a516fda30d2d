"""compress bench: latency, memory and size of ONNX files, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from compress.bench import Comparison, Measurement, Runtime


def bench(
    files: Annotated[list[Path], typer.Argument(metavar="A.onnx [B.onnx ...]", help="Each is compared with the first")],
    batch: Annotated[str, typer.Option("--batch", metavar="N[,N...]", help="Images at a time, one or several")] = "1",
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime")] = 1,
    runtime: Annotated[str, typer.Option("--runtime", help="ort-cpu or ort-cuda")] = "ort-cpu",
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Most to spend on one batch size")] = 20.0,
    input_size: options.InputSize = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure ONNX files in turn, round after round, and say how much faster each is than the first."""
    view.set_up(quiet=quiet, verbose=verbose)
    batches, chosen = _numbers(batch), _runtime(runtime)
    from compress.bench import benchmark

    shape = _shape(files[0], input_size) if input_size is not None else None
    found: list[Comparison] = []
    for size in batches:
        view.note(f"measuring {len(files)} file{'s' * (len(files) > 1)} at batch {size}, up to {seconds:g} s")
        made = benchmark(
            files, batch=size, threads=threads, runtime=chosen, seconds=seconds, seed=seed or 0, shape=shape
        )
        found.append(made)
        _show(made)
    for name, reason in found[-1].conditions["unavailable"].items():
        view.note(f"not available here: {name}: {reason}")
    if as_json:
        view.document({"comparisons": [made.model_dump(mode="json") for made in found]})


def _numbers(text: str) -> list[int]:
    from compress.errors import UsageError

    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--batch {text!r} is not of the form N or N,N,..., each at least 1; write for example 1,8")
    return list(dict.fromkeys(int(part) for part in parts))


def _runtime(name: str) -> Runtime:
    from compress.bench import RUNTIMES
    from compress.errors import UsageError

    for known in RUNTIMES:
        if name == known:
            return known
    raise UsageError(f"--runtime {name} is unknown; there are {', '.join(RUNTIMES)}")


def _shape(path: Path, side: int) -> tuple[int, int, int] | None:
    """(C, H, W) for files that leave height and width open; the number of channels stands in the file."""
    from compress.inputs import onnx_info

    return onnx_info(path, side)[0].input_size


def _show(made: Comparison) -> None:
    conditions = made.conditions
    gains = ["", *(view.speedup(gain.model_dump()) for gain in made.speedups)]
    first = made.measurements[0]
    where = f"{first.latency.runtime}, batch {conditions['batch']}, {view.count(conditions['threads'], 'thread')}"
    view.table(
        f"latency in ms, {where}, {conditions['rounds']} rounds",
        ("file", "p50", "p90", "p99", "images/s", "against the first"),
        [_latency_row(m, gain) for m, gain in zip(made.measurements, gains, strict=True)],
    )
    view.table(
        "size; time to load and run once, and the peak of memory, in new processes",
        ("file", "size (kB)", "gzip (kB)", "load (ms)", "first (ms)", "peak (MB)"),
        [_footprint_row(m) for m in made.measurements],
    )


def _latency_row(made: Measurement, gain: str) -> Sequence[str]:
    at = made.latency
    return made.file, *(view.figure(value) for value in (at.p50, at.p90, at.p99, at.throughput)), gain


def _footprint_row(made: Measurement) -> Sequence[str]:
    sizes = (made.size_bytes / 1e3, made.size_gzip_bytes / 1e3)
    return made.file, *map(view.figure, (*sizes, made.load_ms, made.first_ms, made.peak_memory_bytes / 1e6))
