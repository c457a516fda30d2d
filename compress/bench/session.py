"""ONNX Runtime sessions: opened the same way everywhere, and only on a provider that is really active."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from compress.bench.results import Runtime
from compress.errors import LoadError, MeasureError

PROVIDERS: dict[Runtime, str] = {"ort-cpu": "CPUExecutionProvider", "ort-cuda": "CUDAExecutionProvider"}
DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(int64)": "int64",
    "tensor(int32)": "int32", "tensor(int8)": "int8", "tensor(uint8)": "uint8", "tensor(bool)": "bool",
}  # fmt: skip

Input = tuple[str, tuple[int, ...], str]  # name, shape, numpy dtype


def available() -> dict[str, str | None]:
    """Each runtime with None if it is active on this machine, else the reason why not."""
    return {runtime: _inactive(runtime) for runtime in PROVIDERS}


def open_session(path: Path, *, threads: int, runtime: Runtime = "ort-cpu") -> Any:
    """An onnxruntime.InferenceSession for the file, with `threads` threads inside an operator and one between them.

    Raises:
        LoadError: the file is missing, or ONNX Runtime does not accept it.
        MeasureError: the runtime asked for is unknown, or not active in the session.
    """
    if runtime not in PROVIDERS:
        raise MeasureError(f"runtime {runtime!r} is not known; use one of {', '.join(get_args(Runtime))}")
    if not path.is_file():
        raise LoadError(f"{path} is not a file; give the path of an .onnx file")
    if runtime != "ort-cpu" and (reason := _inactive(runtime)):
        raise MeasureError(f"runtime {runtime} cannot be measured here: {reason}; use ort-cpu")
    try:
        session = _open(str(path), threads, runtime)
    except runtime_errors() as error:
        raise LoadError(f"{path} is not an ONNX file that ONNX Runtime can load: {one_line(error)}") from error
    if PROVIDERS[runtime] not in session.get_providers():
        raise MeasureError(f"runtime {runtime} cannot be measured here: it did not start for {path}; use ort-cpu")
    return session


def input_signature(session: Any, *, batch: int, shape: Sequence[int] | None = None) -> tuple[Input, ...]:
    """What to feed the session: its own inputs, an open first dimension set to `batch`, other ones taken from `shape`.

    `shape` is the shape of one image without the batch, for files whose height and width are dynamic.

    Raises:
        MeasureError: the file fixes another batch, leaves a dimension open that `shape` does not give, or takes
            something else than plain tensors of numbers.
    """
    return tuple(_input(argument, batch, shape) for argument in session.get_inputs())


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its errors share no base class but Exception, so each is named."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*own, RuntimeError, ValueError)


def _input(argument: Any, batch: int, shape: Sequence[int] | None) -> Input:
    name, given = argument.name, list(argument.shape)
    if argument.type not in DTYPES:
        raise MeasureError(f"input {name!r} is a {argument.type}; inputs can be made for {', '.join(DTYPES)}")
    if not given:
        return name, (), DTYPES[argument.type]
    if isinstance(given[0], int) and given[0] != batch:
        raise MeasureError(f"input {name!r} takes batch {given[0]} only, not {batch}; measure with batch {given[0]}")
    sizes = [batch, *given[1:]]
    for dim, size in enumerate(sizes):
        if not isinstance(size, int):
            if shape is None or len(shape) != len(sizes) - 1:
                raise MeasureError(f"input {name!r} of shape {given} leaves dimension {dim} open; give its shape")
            sizes[dim] = shape[dim - 1]
    return name, tuple(sizes), DTYPES[argument.type]


def _open(model: str | bytes, threads: int, runtime: Runtime) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # what matters is raised; the runtime's own lines would go to the terminal
    # session.set_denormal_as_zero stays at the runtime's default (off): that is what a deployed file meets, and hiding
    # the cost of denormal weights here would hide a defect of the export.
    providers = list(dict.fromkeys([PROVIDERS[runtime], "CPUExecutionProvider"]))
    return onnxruntime.InferenceSession(model, options, providers=providers)


def _inactive(runtime: Runtime) -> str | None:
    """Why the runtime cannot run here, found by running it on a one-node network; None when it can."""
    import onnxruntime

    provider = PROVIDERS[runtime]
    built = onnxruntime.get_available_providers()
    if provider not in built:
        version = onnxruntime.__version__
        return f"{provider} is not in the installed onnxruntime {version} (which has {', '.join(built)})"
    if runtime == "ort-cpu":
        return None
    try:
        active = _open(_one_node(), 1, runtime).get_providers()
    except runtime_errors() as error:
        return f"{provider} does not start: {one_line(error)}"
    return None if provider in active else f"{provider} is installed but does not start (are its CUDA libraries there?)"


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def one_line(error: BaseException) -> str:
    """The text of a foreign error, fit for one of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
