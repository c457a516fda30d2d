"""RUNTIMES: every runtime that latency can be measured on, one row each, and whether this machine has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from compress.bench.open_vino import inactive as openvino_inactive
from compress.bench.open_vino import open_openvino
from compress.bench.protocol import Network, Runtime, Session, Source
from compress.bench.session import inactive as ort_inactive
from compress.bench.session import open_ort
from compress.bench.torch_network import inactive as torch_inactive
from compress.bench.torch_network import open_torch
from compress.errors import MeasureError

GPU_BUILD = "install onnxruntime-gpu in place of onnxruntime, or use ort-cpu"
OPENVINO = 'pip install "compress-to-onnx[openvino]", or use ort-cpu'
CUDA_BUILD = "install a CUDA build of torch, or use torch-cpu"
COMPILER = "install a C++ compiler, or use torch-cpu"
EXPORT = "torch.export.pt2_archive._package"  # torch with what reads an exported program, seconds of imports


@dataclass(frozen=True)
class Adapter:
    """How one runtime is asked for what: `open(source, threads=N)`, `inactive()`, and what its measuring needs."""

    open: Callable[..., Session]
    inactive: Callable[[], str | None]  # why it cannot run on this machine; None when it can
    remedy: str  # what to do where it cannot
    imports: str  # the module that a fresh process imports before the clock starts
    takes: type[Path] | type[Network] = Path  # an ONNX file, or a network
    is_gpu: bool = False
    stays_open: float = 0  # rounds that one opening serves, more where it takes longer; 0: one block of inferences
    processes: int = 3  # fresh ones for load and first inference: a median of three ignores a cold disk; 1 where slow


RUNTIMES: dict[Runtime, Adapter] = {
    "ort-cpu": Adapter(partial(open_ort, runtime="ort-cpu"), partial(ort_inactive, "ort-cpu"), "", "onnxruntime"),
    "ort-cuda": Adapter(
        partial(open_ort, runtime="ort-cuda"), partial(ort_inactive, "ort-cuda"), GPU_BUILD, "onnxruntime",
        is_gpu=True, stays_open=math.inf,
    ),
    "ort-tensorrt": Adapter(
        partial(open_ort, runtime="ort-tensorrt"), partial(ort_inactive, "ort-tensorrt"), GPU_BUILD, "onnxruntime",
        is_gpu=True, stays_open=math.inf, processes=1,
    ),
    "openvino": Adapter(open_openvino, openvino_inactive, OPENVINO, "openvino", stays_open=4),
    "torch-cpu": Adapter(
        open_torch, partial(torch_inactive, "cpu", compiled=False), "", EXPORT, Network, processes=1,
    ),
    "torch-compile-cpu": Adapter(
        partial(open_torch, compiled=True), partial(torch_inactive, "cpu", compiled=True), COMPILER, EXPORT,
        Network, stays_open=math.inf, processes=1,
    ),
    "torch-cuda": Adapter(
        partial(open_torch, device="cuda"), partial(torch_inactive, "cuda", compiled=False), CUDA_BUILD,
        EXPORT, Network, is_gpu=True, stays_open=math.inf, processes=1,
    ),
    "torch-compile-cuda": Adapter(
        partial(open_torch, device="cuda", compiled=True), partial(torch_inactive, "cuda", compiled=True), CUDA_BUILD,
        EXPORT, Network, is_gpu=True, stays_open=math.inf, processes=1,
    ),
}  # fmt: skip


def open_on(runtime: Runtime, source: Source, *, threads: int = 1) -> Session:
    """Load a file or network on a runtime that is really active.

    Raises:
        LoadError: the file is missing, or the runtime does not accept it.
        MeasureError: the runtime is unknown, takes something else, or is not active, for all of the file.
    """
    check(runtime)
    adapter = RUNTIMES[runtime]
    if not isinstance(source, adapter.takes):
        wanted = "an ONNX file" if adapter.takes is Path else "a network (compress.bench.Network)"
        raise MeasureError(f"runtime {runtime} takes {wanted}, not {source.name}; name another runtime")
    return adapter.open(source, threads=threads)


def check(runtime: Runtime) -> None:
    """See that a runtime is one of the table and active here.

    Raises:
        MeasureError: it is not, with the reason and what to do.
    """
    if runtime not in RUNTIMES:
        raise MeasureError(f"runtime {runtime!r} is not known; use one of {', '.join(RUNTIMES)}")
    if reason := inactive(runtime):
        raise MeasureError(f"runtime {runtime} cannot be measured here: {reason}; {RUNTIMES[runtime].remedy}")


@cache
def inactive(runtime: Runtime) -> str | None:
    """Why a known runtime cannot run on this machine; None when it can. Asked once per process."""
    return RUNTIMES[runtime].inactive()


def available() -> dict[str, str | None]:
    """Each runtime with None if it is active on this machine, else the reason why not."""
    return {runtime: inactive(runtime) for runtime in RUNTIMES}
