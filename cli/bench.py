"""compress bench: latency, memory and size of ONNX files, side by side, on one runtime or several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from compress.bench import Comparison, Measurement, Network, Runtime
    from compress.bench.protocol import Source

BATCHES = (1, 8, 32)
WEIGHTS = (".safetensors", ".pt", ".pth", ".th")  # what the torch runtimes measure, as networks
IN_A_RUN = ("dense.onnx", "model.onnx", "state/dense.safetensors", "pruned.safetensors")


def bench(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="A.onnx [B.onnx ...]",
            help="Each is compared with the first; checkpoints for the torch runtimes; or one run folder",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option("--batch", metavar="N[,N...]", help="Images at a time; default: 1,8,32, or what the file fixes"),
    ] = None,
    threads: Annotated[str, typer.Option("--threads", metavar="N[,N...]", help="1, 1,all ...")] = "1",
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="NAME[,NAME...]", help="--runtimes lists them")
    ] = "ort-cpu",
    runtimes: Annotated[
        bool, typer.Option("--runtimes", help="List the runtimes, those lacking with a reason")
    ] = False,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Most to spend on one batch size")] = 20.0,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    input_size: options.InputSize = None,
    seed: options.Seed = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure files in turn, round after round, and say how much faster each is than the first."""
    view.set_up(quiet=quiet, verbose=verbose)
    if runtimes:
        return _list(as_json=as_json)
    asked = _Asked(seconds, seed or 0, input_size, arch, tuple(arch_arg or ()))
    counts, sizes = _threads(threads), _numbers("--batch", batch) if batch is not None else None
    chosen = _sources(files or (), _runtimes(runtime), asked)
    found: list[Comparison] = []
    for (name, sources), count in itertools.product(chosen.items(), counts):
        made = [_measure(sources, (name, count, size), asked) for size in sizes or _allowed(sources)]
        _show(made)
        found += made
    for lacking, reason in found[-1].conditions["unavailable"].items():
        view.note(f"not available here: {lacking}: {reason}")
    if as_json:
        view.document({"comparisons": [made.model_dump(mode="json") for made in found]})
    return None


@dataclass(frozen=True)
class _Asked:
    """What is the same for every measurement of one call."""

    seconds: float
    seed: int
    input_size: int | None
    arch: str | None
    arch_arg: tuple[str, ...]


def _list(*, as_json: bool) -> None:
    """The runtimes, and what those that this machine lacks need."""
    from compress.bench import RUNTIMES, available

    found = available()
    rows = [(name, found[name] or "yes", row.remedy if found[name] else "") for name, row in RUNTIMES.items()]
    view.table("runtimes", ("runtime", "active here", "what to do"), rows)
    if as_json:
        view.document({"runtimes": found})


def _measure(sources: Sequence[Source], at: tuple[Runtime, int, int], asked: _Asked) -> Comparison:
    """One Comparison at a runtime, a number of threads and a batch size; what disturbed it is said."""
    from compress.bench import benchmark

    runtime, threads, batch = at
    where = f"{runtime}, batch {batch}, {view.count(threads, 'thread')}"
    view.note(f"measuring {view.count(len(sources), 'file')} at {where}, up to {asked.seconds:g} s")
    first, shape = sources[0], None
    if asked.input_size is not None and isinstance(first, Path):
        shape = _shape(first, asked.input_size)
    made = benchmark(
        sources, batch=batch, threads=threads, runtime=runtime, seconds=asked.seconds, seed=asked.seed, shape=shape
    )
    for warning in made.conditions["warnings"]:
        view.note(f"{where}: {warning}")
    return made


def _sources(files: Sequence[Path], runtimes: Sequence[Runtime], asked: _Asked) -> Mapping[Runtime, list[Source]]:
    """What each runtime measures: the ONNX files, or the checkpoints as networks.

    Raises:
        UsageError: there is nothing for a runtime, or no runtime for a file.
        MeasureError: this machine lacks a runtime; said before anything is measured.
    """
    from compress.bench.runtimes import RUNTIMES, check

    for runtime in runtimes:
        check(runtime)
    paths, is_run = _paths(files)
    weights = [path for path in paths if path.suffix in WEIGHTS]
    onnx: list[Source] = [path for path in paths if path not in weights]
    of_torch = [runtime for runtime in runtimes if RUNTIMES[runtime].takes is not Path]
    others = [runtime for runtime in runtimes if runtime not in of_torch]
    _fits(((others, onnx, "ONNX files"), (of_torch, weights, f"checkpoints ({', '.join(WEIGHTS)})")), is_run=is_run)
    networks: list[Source] = [_network(path, asked) for path in weights] if of_torch else []
    return {runtime: networks if runtime in of_torch else onnx for runtime in runtimes}


def _fits(pairs: Sequence[tuple[Sequence[Runtime], Sequence[Source], str]], *, is_run: bool) -> None:
    """Each runtime has something to measure, and nothing given is left out quietly."""
    from compress.errors import UsageError

    for runtimes, there, what in pairs:
        if runtimes and not there:
            raise UsageError(f"--runtime {runtimes[0]} takes {what}, and none is given; name one or another runtime")
    for runtimes, there, what in pairs:
        if there and not runtimes and not is_run:
            other = "torch-cpu" if what.startswith("checkpoints") else "ort-cpu"
            raise UsageError(f"{there[0]} is for runtimes that take {what}; add one, for example --runtime {other}")


def _paths(files: Sequence[Path]) -> tuple[list[Path], bool]:
    """The files given, or those of a run folder and True."""
    from compress.errors import UsageError

    if not files:
        raise UsageError("there is nothing to measure: name ONNX files, checkpoints for torch, or one run folder")
    if len(files) == 1 and (files[0] / "bench.json").is_file():
        return [files[0] / name for name in IN_A_RUN], True
    return list(files), False


def _network(path: Path, asked: _Asked) -> Network:
    from compress.bench import Network
    from compress.cli import arch, load
    from compress.inputs import image_shape

    network, info, _ = load.network(path, asked.arch, arch.parse_arch_args(asked.arch_arg))
    return Network(path, network, image_shape(network, info, asked.input_size))


def _allowed(sources: Sequence[Source]) -> Sequence[int]:
    """The batch sizes to measure when none is asked for: the usual ones, or the one that an ONNX file fixes."""
    from compress.bench.session import open_session

    for path in sources:
        if isinstance(path, Path):
            firsts = [given.shape[0] for given in open_session(path, threads=1).get_inputs() if given.shape]
            if firsts and all(isinstance(first, int) for first in firsts):
                return firsts[:1]
    return BATCHES


def _threads(text: str) -> list[int]:
    """`1,all` as numbers; all are those that this process may use."""
    from compress.bench.machine import allowed_cpus

    every = str(len(allowed_cpus()))
    return _numbers(
        "--threads", ",".join(every if part.strip() == "all" else part for part in text.split(",")), "1,all"
    )


def _numbers(option: str, text: str, like: str = "1,8") -> list[int]:
    from compress.errors import UsageError

    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(
            f"{option} {text!r} is not of the form N or N,N,..., each at least 1; write for example {like}"
        )
    return list(dict.fromkeys(int(part) for part in parts))


def _runtimes(text: str) -> list[Runtime]:
    from compress.bench import RUNTIMES
    from compress.errors import UsageError

    known: dict[str, Runtime] = {name: name for name in RUNTIMES}
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"--runtime {name} is unknown; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def _shape(path: Path, side: int) -> tuple[int, int, int] | None:
    """(C, H, W) for files that leave height and width open; the number of channels stands in the file."""
    from compress.inputs import onnx_info

    return onnx_info(path, side)[0].input_size


def _show(made: Sequence[Comparison]) -> None:
    """One table of latencies for all batch sizes, one of what hardly depends on them, at the first of them."""
    first = made[0].measurements[0].latency
    rows = []
    for found in made:
        gains = ["", *(view.speedup(gain.model_dump()) for gain in found.speedups)]
        rows += [_latency_row(m, gain) for m, gain in zip(found.measurements, gains, strict=True)]
    view.table(
        f"latency in ms, {first.runtime}, {view.count(first.threads, 'thread')}",
        ("file", "batch", "p50", "p90", "p99", "images/s", "against the first"),
        rows,
    )
    view.table(
        f"size; time to load and run once, and the peak of memory, in new processes at batch {first.batch}",
        ("file", "size (kB)", "gzip (kB)", "load (ms)", "first (ms)", "peak (MB)"),
        [_footprint_row(m) for m in made[0].measurements],
    )


def _latency_row(made: Measurement, gain: str) -> Sequence[str]:
    at = made.latency
    return made.file, str(at.batch), *(view.figure(value) for value in (at.p50, at.p90, at.p99, at.throughput)), gain


def _footprint_row(made: Measurement) -> Sequence[str]:
    sizes = (made.size_bytes / 1e3, made.size_gzip_bytes / 1e3)
    return made.file, *map(view.figure, (*sizes, made.load_ms, made.first_ms, made.peak_memory_bytes / 1e6))
