"""ONNX Runtime: sessions opened the same way everywhere, and only on a provider that takes the whole graph."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from compress.bench.protocol import Feeds, Input, Runtime, sized
from compress.bench.protocol import one_line as one_line
from compress.errors import LoadError, MeasureError

PROVIDERS: dict[str, str] = {
    "ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider", "ort-tensorrt": "TensorrtExecutionProvider",
}  # fmt: skip
DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(bool)": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class OrtSession:
    """`onnx_session` as a runtime of ours; `device` is where inputs and outputs lie while it is timed."""

    onnx_session: Any
    device: str | None  # None: host memory, without binding

    def signature(self, *, batch: int, shape: Sequence[int] | None = None) -> tuple[Input, ...]:
        return input_signature(self.onnx_session, batch=batch, shape=shape)

    def run(self, feeds: Feeds) -> list[Any]:
        return list(self.onnx_session.run(None, dict(feeds)))

    def timed(self, feeds: Feeds) -> Callable[[], float]:
        """On a GPU by I/O binding: inputs are copied there once, outputs stay there."""
        run = self.onnx_session.run if self.device is None else _bound(self.onnx_session, feeds, self.device)
        given = (None, dict(feeds)) if self.device is None else ()

        def once() -> float:
            begin = time.perf_counter()
            run(*given)
            return (time.perf_counter() - begin) * 1e3

        return once


def open_ort(path: Path, *, threads: int, runtime: Runtime) -> OrtSession:
    """As open_session, for measuring."""
    return OrtSession(open_session(path, threads=threads, runtime=runtime), None if runtime == "ort-cpu" else "cuda")


def open_session(path: Path, *, threads: int, runtime: Runtime = "ort-cpu") -> Any:
    """An onnxruntime.InferenceSession for the file, with `threads` threads inside an operator and one between them.

    Raises:
        LoadError: the file is missing, or ONNX Runtime does not accept it.
        MeasureError: the provider did not start, or left a part of the graph to another one.
    """
    if not path.is_file():
        raise LoadError(f"{path} is not a file; give the path of an .onnx file")
    try:
        session = _open(str(path), threads, PROVIDERS[runtime])
    except runtime_errors() as error:
        if "fallback to CPU EP" in str(error):
            text = f"{PROVIDERS[runtime]} does not take all of {path.name} and the rest would run on the CPU"
            raise MeasureError(f"runtime {runtime} cannot be measured here: {text}; use ort-cpu") from error
        raise LoadError(f"{path} is not an ONNX file that ONNX Runtime can load: {one_line(error)}") from error
    if session.get_providers()[0] != PROVIDERS[runtime]:
        raise MeasureError(f"runtime {runtime} cannot be measured here: it did not start for {path}; use ort-cpu")
    return session


def input_signature(session: Any, *, batch: int, shape: Sequence[int] | None = None) -> tuple[Input, ...]:
    """What to feed the session: its own inputs, an open first dimension set to `batch`, other ones taken from `shape`.

    `shape` is the shape of one image without the batch, for files whose height and width are dynamic.

    Raises:
        MeasureError: the file fixes another batch, leaves a dimension open that `shape` does not give, or takes
            something else than plain tensors of numbers.
    """
    found = []
    for argument in session.get_inputs():
        if argument.type not in DTYPES:
            known = ", ".join(DTYPES)
            raise MeasureError(f"input {argument.name!r} is a {argument.type}; inputs can be made for {known}")
        found.append((argument.name, argument.shape, DTYPES[argument.type]))
    return sized(found, batch=batch, shape=shape)


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its errors share no base class but Exception, so each is named."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError)


def inactive(runtime: Runtime) -> str | None:
    """Why the provider cannot run here, found by running it on a one-node network; None when it can."""
    import onnxruntime

    provider = PROVIDERS[runtime]
    built = onnxruntime.get_available_providers()
    if provider not in built:
        version = onnxruntime.__version__
        return f"{provider} is not in the installed onnxruntime {version} (which has {', '.join(built)})"
    if runtime == "ort-cpu":
        return None
    try:
        active = _open(_one_node(), 1, provider).get_providers()
    except runtime_errors() as error:
        return f"{provider} does not start (are its CUDA libraries there?): {one_line(error)}"
    return None if active[0] == provider else f"{provider} is installed but does not start (are its libraries there?)"


def session_options(threads: int, *, profile_to: Path | None = None) -> Any:
    """The options of every session: `threads` in an operator, one between them; `profile_to`: how a file begins."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what matters is raised; the runtime's own lines would go to the terminal
    if profile_to is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    return options


def kernels(session: Any) -> list[tuple[str, dict[str, Any]]]:
    """What the profiler of a session has noted, and its end: the name of each kernel that ran, and the event."""
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    return [(event["name"].removesuffix("_kernel_time"), event) for event in ran]


def small_model(
    nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()
) -> bytes:
    """A file of the given parts (of onnx.helper), at an opset and a format that every runtime reads."""
    from onnx import helper

    graph = helper.make_graph(nodes, "network", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def _open(model: str | bytes, threads: int, provider: str) -> Any:
    import onnxruntime

    options = session_options(threads)
    # session.set_denormal_as_zero stays at the runtime's default (off): that is what a deployed file meets, and hiding
    # the cost of denormal weights here would hide a defect of the export.
    if provider != "CPUExecutionProvider":
        # Without this a node that the provider lacks, or all of them, would quietly run on the CPU.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        with redirect_stdout(StringIO()):
            getattr(onnxruntime, "preload_dlls", lambda: None)()  # CUDA's libraries out of torch's wheels
    return onnxruntime.InferenceSession(model, options, providers=[provider], enable_fallback=0)


def _bound(session: Any, feeds: Feeds, device: str) -> Callable[[], None]:
    """A run with inputs and outputs bound to memory of `device`; it ends when the device has finished."""
    import onnxruntime

    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value, device, 0))
    for output in session.get_outputs():
        binding.bind_output(output.name, device)
    binding.synchronize_inputs()

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    return small_model([helper.make_node("Relu", ["x"], ["y"])], [x], [y])
