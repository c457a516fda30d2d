"""OpenVINO by its own runtime, on the CPU, in float32 as the file says."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.bench.protocol import Feeds, Input, one_line, sized
from compress.errors import LoadError, MeasureError

DEVICE = "CPU"
DTYPES = {"f32": "float32", "f16": "float16", "f64": "float64", "i64": "int64", "i32": "int32", "i8": "int8",
          "u8": "uint8", "boolean": "bool"}  # fmt: skip


@dataclass(frozen=True)
class OpenVinoSession:
    """A compiled model with its one request."""

    model: Any
    request: Any

    def signature(self, *, batch: int, shape: Sequence[int] | None = None) -> tuple[Input, ...]:
        return sized([_input(port) for port in self.model.inputs], batch=batch, shape=shape)

    def run(self, feeds: Feeds) -> list[Any]:
        self.request.infer(dict(feeds))
        return [self.request.get_output_tensor(index).data.copy() for index in range(len(self.model.outputs))]

    def timed(self, feeds: Feeds) -> Callable[[], float]:
        """The inputs are set once and used where they lie; outputs stay in the request's own memory."""
        import openvino

        for name, value in feeds.items():
            self.request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

        def once() -> float:
            begin = time.perf_counter()
            self.request.infer()
            return (time.perf_counter() - begin) * 1e3

        return once


def open_openvino(path: Path, *, threads: int) -> OpenVinoSession:
    """Compile the file for the lowest latency: one stream of `threads` threads.

    OpenVINO would choose bfloat16 by itself on processors that have it, and pin its threads elsewhere than we pin ours:
    float32 is asked for, so that all runtimes compute the same, and the pinning left to us.

    Raises:
        LoadError: the file is missing, or OpenVINO does not accept it.
        MeasureError: it was compiled for another device or precision.
    """
    if not path.is_file():
        raise LoadError(f"{path} is not a file; give the path of an .onnx file")
    try:
        model = core().compile_model(core().read_model(path), DEVICE, settings(threads))
    except RuntimeError as error:
        raise LoadError(f"{path} is not an ONNX file that OpenVINO can load: {one_line(error)}") from error
    devices, precision = model.get_property("EXECUTION_DEVICES"), model.get_property("INFERENCE_PRECISION_HINT")
    if list(devices) != [DEVICE] or precision.get_type_name() != "f32":
        text = f"{path.name} was compiled for {', '.join(devices)} in {precision.get_type_name()}"
        raise MeasureError(f"runtime openvino cannot be measured here: {text}, not for {DEVICE} in f32; use ort-cpu")
    return OpenVinoSession(model, model.create_infer_request())


@cache
def core() -> Any:
    """OpenVINO's own state, one for the process: with the last one its device library would be unloaded again."""
    import openvino

    return openvino.Core()


def settings(threads: int) -> dict[str, Any]:
    """One stream of `threads` threads in float32, not pinned."""
    return {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32", "ENABLE_CPU_PINNING": False}  # fmt: skip


def inactive() -> str | None:
    """Why OpenVINO cannot run here; None when it is installed, with its CPU device, which every build has.

    It is not imported for the question: every measurement asks, and its libraries would stay in the process.
    """
    return "openvino is not installed" if find_spec("openvino") is None else None


def _input(port: Any) -> tuple[str, list[int | None], str]:
    kind, name = port.element_type.get_type_name(), port.any_name
    if kind not in DTYPES:
        raise MeasureError(f"input {name!r} is of type {kind}; inputs can be made for {', '.join(DTYPES)}")
    return name, [size.get_length() if size.is_static else None for size in port.partial_shape], DTYPES[kind]
