"""What a file holds: its convolutions and matrix products with their work, and numbers in the denormal range."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.doctor.profile import Asked, open_session, run
from compress.onnx_file import densify

SMALLEST = float(np.finfo(np.float32).smallest_normal)  # 1.18e-38; below it numbers are denormal


@dataclass(frozen=True)
class Layer:
    """A convolution of two dimensions in the file as it is stored."""

    name: str
    inputs: int  # channels
    outputs: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, ...]
    dilations: tuple[int, int]
    groups: int
    size: tuple[int, int]  # height and width of what it reads
    out_size: tuple[int, int]
    is_first: bool  # it reads an input of the file, whose channels are given
    is_last: bool  # it gives an output of the file, whose channels are given

    @property
    def macs(self) -> int:
        """Per image."""
        return math.prod(self.kernel) * math.prod(self.out_size) * self.inputs * self.outputs // self.groups


def layers(path: Path, asked: Asked, given: Mapping[str, Any]) -> tuple[Layer, ...]:
    """The convolutions of two dimensions with constant weights, in order; shapes from a run of the file."""
    graph = _load(path).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    chosen = [n for n in graph.node if n.op_type == "Conv" and len(weights.get(n.input[1], ())) == 4]
    names = {name for node in chosen for name in (node.input[0], node.output[0])}
    shapes = _shapes(path, asked, given, names - {v.name for v in graph.input})
    shapes |= {name: np.shape(value) for name, value in given.items()}
    return tuple(_layer(node, weights[node.input[1]], shapes, graph) for node in chosen)


def denormal_weights(path: Path) -> dict[str, int]:
    """Name of a float tensor in the file -> how many of its elements are denormal; only where there are some."""
    import onnx

    found = {}
    for tensor in _load(path).graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            values = np.abs(onnx.numpy_helper.to_array(tensor))
            if count := int(((values > 0) & (values < SMALLEST)).sum()):
                found[tensor.name] = count
    return found


def denormal_activations(path: Path, asked: Asked, given: Mapping[str, Any]) -> dict[str, int]:
    """Name of a float tensor between operators -> denormal elements on this input; only where there are some."""
    import onnx

    names = [name for name, kind in _tensors(path).items() if kind == onnx.TensorProto.FLOAT]
    found = {}
    for some in range(0, len(names), 16):  # what is watched is held in memory
        watched = names[some : some + 16]
        for name, value in zip(watched, _values(path, asked, given, watched), strict=True):
            size = np.abs(value)
            if count := int(((size > 0) & (size < SMALLEST)).sum()):
                found[name] = count
    return found


def _load(path: Path) -> Any:
    import onnx

    proto = onnx.load(path)
    densify(proto.graph)
    return proto


def _tensors(path: Path) -> dict[str, int]:
    """What operators give, as far as shape inference tells its type."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    return {name: kinds[name] for node in graph.node for name in node.output if name in kinds}


def _values(path: Path, asked: Asked, given: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The tensors of these names, by a copy of the file that gives them out."""
    import onnx

    proto = onnx.load(path)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(proto, Path(folder) / "watched.onnx")
        return run(open_session(Path(folder) / "watched.onnx", asked), given)


def _shapes(path: Path, asked: Asked, given: Mapping[str, Any], names: set[str]) -> dict[str, tuple[int, ...]]:
    wanted, found = sorted(names), dict[str, tuple[int, ...]]()
    for some in range(0, len(wanted), 16):
        part = wanted[some : some + 16]
        found |= {name: np.shape(v) for name, v in zip(part, _values(path, asked, given, part), strict=True)}
    return found


def _area(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[2], shape[3]


def _layer(node: Any, weight: Sequence[int], shapes: Mapping[str, tuple[int, ...]], graph: Any) -> Layer:
    import onnx

    set_ = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    groups, size, out_size = set_.get("group", 1), _area(shapes[node.input[0]]), _area(shapes[node.output[0]])
    found = Layer(
        name=node.output[0], inputs=weight[1] * groups, outputs=weight[0], kernel=(weight[2], weight[3]),
        strides=tuple(set_.get("strides", (1, 1))), dilations=tuple(set_.get("dilations", (1, 1))),
        pads=tuple(set_.get("pads", (0, 0, 0, 0))), groups=groups, size=size, out_size=out_size,
        is_first=node.input[0] in {value.name for value in graph.input},
        is_last=node.output[0] in {value.name for value in graph.output},
    )  # fmt: skip
    where = set_.get("auto_pad", b"NOTSET").decode()
    return replace(found, pads=_same(found, is_upper=where == "SAME_UPPER")) if where.startswith("SAME") else found


def _same(layer: Layer, *, is_upper: bool) -> tuple[int, ...]:
    """The pads that `auto_pad` stands for, begins before ends; an odd one lies at the end where `is_upper`."""
    taken = [(out - 1) * stride + dilation * (kernel - 1) + 1 for out, stride, dilation, kernel
             in zip(layer.out_size, layer.strides, layer.dilations, layer.kernel, strict=True)]  # fmt: skip
    whole = [max(0, need - there) for need, there in zip(taken, layer.size, strict=True)]
    less, more = [pad // 2 for pad in whole], [pad - pad // 2 for pad in whole]
    return tuple((*less, *more) if is_upper else (*more, *less))
