"""compress doctor: why an ONNX file is not faster, and what would help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from compress.doctor import Diagnosis


def doctor(
    first: Annotated[Path, typer.Argument(metavar="A.onnx", help="The file, or the dense one where B is given")],
    second: Annotated[Path | None, typer.Argument(metavar="[B.onnx]", help="The pruned file, to be examined")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of the runtime")] = 1,
    runtime: Annotated[str, typer.Option("--runtime", help="ort-cpu, ort-cuda, ..., or a provider's name")] = "ort-cpu",
    runs: Annotated[int, typer.Option("--runs", min=10, help="Inferences that a profile is the mean of")] = 100,
    input_size: options.InputSize = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Profile the operators and look for what slows them down; each finding with its gain and its remedy."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress.doctor import Asked, examine

    shape = None
    if input_size is not None:
        from compress.inputs import onnx_info

        shape = onnx_info(second or first, input_size)[0].input_size
    asked = Asked(batch=batch, threads=threads, runtime=runtime, runs=runs, shape=shape)
    with view.working(f"examining {second or first} on {asked.provider}"):
        found = examine(second or first, asked, dense=first if second is not None else None)
    _show(found)
    if as_json:
        view.document(found.model_dump(mode="json"))


def _show(found: Diagnosis) -> None:
    files = [name for name in (found.against, found.file) if name is not None]
    rows = [
        (one.op, *(f"{view.figure(ms)} ({n})" if n else "" for n, ms in zip(one.count, one.ms, strict=True)))
        for one in found.operators
    ]
    view.table("ms by operator, profiled (how many)", ("operator", *files), rows)
    for name, made, macs in zip(files, found.profiles, found.conv_macs, strict=True):
        work = f", {view.figure(macs / 1e6)} M MACs in float convolutions" if macs else ""
        view.note(f"{name}: {view.figure(made.latency_ms)} ms an inference{work}")
    if len(files) == 2:
        first, second = found.profiles
        fewer = f" for {found.conv_macs[1] / found.conv_macs[0]:.3g} of the MACs" if all(found.conv_macs) else ""
        view.note(f"{files[1]} takes {second.latency_ms / first.latency_ms:.3g} of the time of {files[0]}{fewer}")
    if not found.findings:
        view.note(f"nothing found in {found.file}; looked for: {', '.join(found.looked_for)}")
        return
    sums = [(one.kind, view.figure(one.gain_ms), f"{100 * one.share:.0f} %", one.basis) for one in found.findings]
    view.table(f"findings in {found.file}: what each may gain", ("finding", "ms", "share", "basis"), sums)
    for one in found.findings:
        view.note(f"{one.kind}: {one.text}\n  remedy: {one.remedy}")
