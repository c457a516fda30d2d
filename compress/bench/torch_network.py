"""torch itself as a runtime: a network as it is (eager), or through torch.compile, on the CPU or a GPU."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from compress.bench.protocol import Feeds, Input, Network, one_line
from compress.errors import MeasureError

INPUT_NAME = "images"
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class TorchSession:
    """`call` is `module` itself, or what torch.compile made of it."""

    module: Any
    call: Callable[..., Any]
    input_size: tuple[int, ...]
    device: Device
    threads: int

    def signature(self, *, batch: int, shape: Sequence[int] | None = None) -> tuple[Input, ...]:
        return ((INPUT_NAME, (batch, *(shape or self.input_size)), "float32"),)

    def run(self, feeds: Feeds) -> list[Any]:
        import torch
        from torch.utils import _pytree as pytree

        given = torch.from_numpy(feeds[INPUT_NAME]).to(self.device)
        with _threads(self.threads), torch.inference_mode():
            leaves = pytree.tree_leaves(self.call(given))
        return [leaf.numpy(force=True) for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def timed(self, feeds: Feeds) -> Callable[[], float]:
        """On the CPU by the clock; on a GPU by CUDA events, from the first kernel's start to the last one's end."""
        import torch

        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = tensor.data.clone()  # compiled code reads them where they are
        given = torch.from_numpy(feeds[INPUT_NAME]).to(self.device, copy=True)
        clock = _clock if self.device == "cpu" else _events

        def once() -> float:
            with _threads(self.threads), torch.inference_mode():
                return clock(self.call, given)

        return once


def open_torch(network: Network, *, threads: int, device: Device = "cpu", compiled: bool = False) -> TorchSession:
    """A copy of the network on the device, in evaluation mode.

    Compiled with fullgraph: what torch.compile cannot take whole is an error at the first inference, and never run
    eagerly under the name of a compiled network. Shapes are fixed by the first inference.

    Raises:
        MeasureError: the device does not take the network.
    """
    import torch

    try:
        module = copy.deepcopy(network.module).to(device).eval().requires_grad_(False)
    except RuntimeError as error:
        text = f"{network.name} does not fit on {device}: {one_line(error)}"
        raise MeasureError(f"runtime torch-{device} cannot be measured here: {text}") from error
    call = module
    if compiled:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own imports warn of torch's deprecations
            import torch._inductor.compile_fx
        call = torch.compile(module, fullgraph=True, dynamic=False)
    return TorchSession(module, call, network.input_size, device, threads)


def save(network: Network, path: Path, *, shape: Sequence[int]) -> None:
    """Write the network for a process of ours that has not its code: a program of torch.export for one shape.

    Raises:
        MeasureError: torch.export cannot express it.
    """
    import torch

    module = copy.deepcopy(network.module).cpu().eval().requires_grad_(False)
    example = torch.zeros(*shape)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own serialisation; what matters is raised
            torch.export.save(torch.export.export(module, (example,)), path)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise MeasureError(f"{network.name} cannot be exported for a new process: {one_line(error)}") from error


def saved(path: Path, input_size: Sequence[int]) -> Network:
    """What `save` wrote. torch.export.load trusts its file: never give it one of a user's."""
    import torch

    module = torch.export.load(path).module()
    for name in ("eval", "train"):  # an exported graph keeps the mode it was exported in, and refuses to be asked
        vars(module).pop(name, None)
    return Network(path, module, tuple(input_size))


def inactive(device: Device, *, compiled: bool) -> str | None:
    """Why torch cannot run so here; None when it can. Found without importing torch, which takes seconds."""
    if find_spec("torch") is None:
        return "torch is not installed"
    version = importlib.metadata.version("torch")
    if device == "cuda":
        if version.endswith("+cpu"):
            return f"torch {version} is built without CUDA"
        if shutil.which("nvidia-smi") is None:
            return "there is no NVIDIA driver (no nvidia-smi)"
        if compiled and find_spec("triton") is None:
            return "torch.compile needs triton for a GPU, which is not installed"
        import torch

        return None if torch.cuda.is_available() else f"torch {version} sees no CUDA device"
    compiler = os.environ.get("CXX", "")
    if compiled and not any(shutil.which(name) for name in (compiler, "g++", "clang++", "cl") if name):
        return "torch.compile needs a C++ compiler for a CPU, and there is no g++ or clang++"
    return None


def _clock(call: Callable[..., Any], given: Any) -> float:
    begin = time.perf_counter()
    call(given)
    return (time.perf_counter() - begin) * 1e3


def _events(call: Callable[..., Any], given: Any) -> float:
    import torch

    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    start.record()
    call(given)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """torch's number of threads is one for the whole process, which may be training: it is put back."""
    import torch

    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
