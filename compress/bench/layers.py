"""How long single layers take in a runtime: many convolutions and matrix products of any width, timed together.

On a CPU hundreds of layers go into one file, side by side, and the runtime's profiler times each kernel where it runs:
without the reordering of memory around it, which a chain of such layers does not have, and without a call's overhead. A
GPU's kernels end after their call has returned, so there each layer is a file of its own, timed as the whole is.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from compress.bench import machine
from compress.bench.open_vino import DEVICE, core, settings
from compress.bench.protocol import Runtime
from compress.bench.runtimes import RUNTIMES, check, open_on
from compress.bench.session import kernels, session_options, small_model
from compress.errors import MeasureError

Kind = Literal["conv", "transposed", "matmul"]
_OPERATORS: dict[Kind, str] = {"conv": "Conv", "transposed": "ConvTranspose", "matmul": "MatMul"}

CHUNK = 1 << 25  # elements of weights and inputs in one file: 128 MB, held a few times over
WARM_UP = 2  # inferences that allocate
ROUNDS = 9  # timed inferences, of which the fastest counts: whatever else the machine does only adds to a time


@dataclass(frozen=True)
class Layer:
    """One layer as a runtime meets it. `places`: (H, W) of its input, (L,), or (rows,) of a matrix product."""

    kind: Kind
    in_channels: int
    out_channels: int
    places: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    batch: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.kind == "matmul":
            return self.in_channels, self.out_channels
        if self.kind == "transposed":
            return self.in_channels, self.out_channels // self.groups, *self.kernel
        return self.out_channels, self.in_channels // self.groups, *self.kernel

    @property
    def input_shape(self) -> tuple[int, ...]:
        if self.kind == "matmul":
            return self.batch, *self.places, self.in_channels
        return self.batch, self.in_channels, *self.places

    @property
    def elements(self) -> int:
        """Of its weights or of its input, whichever has more."""
        return max(math.prod(self.weight_shape), math.prod(self.input_shape))

    @property
    def attributes(self) -> dict[str, Any]:
        """Those of the ONNX operator."""
        if self.kind == "matmul":
            return {}
        strides = {"strides": self.stride, "pads": self.padding * 2, "dilations": self.dilation}
        return {"kernel_shape": self.kernel, "group": self.groups, **strides}


def time_layers(
    layers: Sequence[Layer],
    *,
    threads: int = 1,
    runtime: Runtime = "ort-cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Milliseconds of each layer, the least of ROUNDS.

    Args:
        on_progress: gets the number of layers timed and of all layers.

    Raises:
        MeasureError: the runtime is not active here, or does not run ONNX files.
    """
    check(runtime)
    if RUNTIMES[runtime].takes is not Path:
        raise MeasureError(f"layers cannot be timed on {runtime}: it runs no ONNX files; name another runtime")
    found: list[float] = []
    with machine.pinned(threads):
        for chunk in _chunks(layers):
            found += _timer(runtime)(chunk, threads)
            if on_progress:
                on_progress(len(found), len(layers))
    return found


def _chunks(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    chunk, held = list[Layer](), 0
    for layer in layers:
        if chunk and held + layer.elements > CHUNK:
            yield chunk
            chunk, held = [], 0
        chunk.append(layer)
        held += layer.elements
    if chunk:
        yield chunk


def _timer(runtime: Runtime) -> Callable[[Sequence[Layer], int], list[float]]:
    """How a runtime's layers are timed."""
    profilers = {"ort-cpu": _by_onnxruntime, "openvino": _by_openvino}
    return profilers.get(runtime, partial(_one_by_one, runtime))


def _one_by_one(runtime: Runtime, layers: Sequence[Layer], threads: int) -> list[float]:
    found = []
    for layer in layers:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "layer.onnx"
            model, feeds = side_by_side([layer])
            file.write_bytes(model)
            once = open_on(runtime, file, threads=threads).timed(feeds)
            found.append(min([once() for _ in range(WARM_UP + ROUNDS)][WARM_UP:]))
    return found


def _by_openvino(layers: Sequence[Layer], threads: int) -> list[float]:
    model, feeds = side_by_side(layers)
    made = core().compile_model(core().read_model(model), DEVICE, {**settings(threads), "PERF_COUNT": True})
    request = made.create_infer_request()
    spent: dict[int, list[float]] = defaultdict(list)
    for _ in range(WARM_UP + ROUNDS):
        request.infer(feeds)
        for part in request.get_profiling_info():
            if named := re.match(r"layer(\d+)_$", part.node_name):
                spent[int(named.group(1))].append(part.real_time.total_seconds() * 1e3)
    return [min(spent[index][WARM_UP:]) for index in range(len(layers))]


def _by_onnxruntime(layers: Sequence[Layer], threads: int) -> list[float]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads, profile_to=Path(folder) / "profile")
        model, feeds = side_by_side(layers)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP + ROUNDS):
            session.run(None, feeds)
        ran = kernels(session)
    spent: dict[int, list[float]] = defaultdict(list)
    for name, event in ran:
        # A layer's kernel goes by its name or by that of its output; what is put around it has names of its own.
        if named := re.match(r"layer(\d+)_\w*$", name):
            spent[int(named.group(1))].append(event["dur"] / 1e3)
    # A kernel may be split in two: their sum, inference by inference.
    each = (np.asarray(spent[index]).reshape(WARM_UP + ROUNDS, -1).sum(1) for index in range(len(layers)))
    return [float(times[WARM_UP:].min()) for times in each]


def side_by_side(layers: Sequence[Layer]) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """An ONNX file of independent layers, each on an input of its shape and reduced to one number, and the inputs."""
    from onnx import TensorProto, helper, numpy_helper

    noise = np.random.default_rng(0).standard_normal(max(layer.elements for layer in layers), dtype=np.float32)

    def drawn(shape: Sequence[int]) -> NDArray[Any]:
        return noise[: int(np.prod(shape))].reshape(shape)

    nodes, weights, feeds = [], [], dict[str, NDArray[Any]]()
    for index, layer in enumerate(layers):
        image = "x" + "x".join(map(str, layer.input_shape))
        feeds[image] = drawn(layer.input_shape)
        name = f"layer{index}_"
        weights.append(numpy_helper.from_array(drawn(layer.weight_shape), f"w{index}"))
        nodes.append(helper.make_node(_OPERATORS[layer.kind], [image, f"w{index}"], [name], name, **layer.attributes))
        nodes.append(helper.make_node("Relu", [name], [f"{name}relu"], f"relu{index}"))
        nodes.append(helper.make_node("ReduceMax", [f"{name}relu"], [f"y{index}"], f"max{index}", keepdims=0))
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in feeds.items()]
    found = [helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, []) for index in range(len(layers))]
    return small_model(nodes, given, found, weights), feeds
