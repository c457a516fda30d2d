"""What becomes of an exported ONNX file before it is proved: flushed, stripped, sparse where asked, with metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.bench.machine import package_version

TOOL = "compress-to-onnx"
TINY = 2.0**-100  # a weight above it times an activation above 2**-26 (float32 resolves 2**-24 of 1) stays normal
READERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Weights:
    """How many elements the matrices and filters of a file have, and how many of them are not 0."""

    total: int
    nonzero: int
    sparse_tensors: int  # stored by their non-zeros alone


def finish(target: Path, *, exporter: str, flushed: int, given: Mapping[str, str], sparse: bool = False) -> None:
    """In place: flush what folding batch norm made tiny, drop the exporter's notes (they hold paths), add metadata.

    `sparse` stores a weight by its non-zeros wherever that takes fewer bytes; see `sparsify`.
    """
    import onnx

    proto = onnx.load(target)
    for tensor in _weights(proto.graph):
        values = onnx.numpy_helper.to_array(tensor)
        tiny = (np.abs(values) < TINY) & (values != 0)
        if tiny.any():
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.where(tiny, np.float32(0), values), tensor.name))
            flushed += int(tiny.sum())
    skip_zeros(proto.graph)
    _strip(proto.graph)
    for function in proto.functions:
        _strip(function)
    if sparse:
        sparsify(proto.graph)
    own = {"tool": TOOL, "tool_version": package_version(TOOL) or "unknown", "exporter": exporter}
    del proto.metadata_props[:]
    onnx.helper.set_model_props(proto, {**given, **own, "flushed": str(flushed)})
    target.write_bytes(proto.SerializeToString())


def skip_zeros(graph: Any) -> int:
    """Take out additions of nothing but zeros, with what made those zeros, in place; how many.

    They are what a residual branch that left may leave behind: the exporter keeps zeros whose shape holds the batch.
    """
    import onnx

    if any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):  # they may read anything
        return 0
    zeros = {t.name for t in graph.initializer if not onnx.numpy_helper.to_array(t).any()}
    shapes, outputs = _shapes(graph), {value.name for value in graph.output}
    same: dict[str, str] = {}  # the sum -> what zeros were added to
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Expand" and node.input[0] in zeros:
            zeros.add(node.output[0])
        elif node.op_type == "Add" and zeros & set(node.input) and node.output[0] not in outputs:
            other = node.input[0] if node.input[1] in zeros else node.input[1]
            if node.output[0] in shapes and shapes.get(other) == shapes[node.output[0]]:
                same[node.output[0]] = other
    if same:
        _drop_unread(graph, outputs)
    return len(same)


def sparsify(graph: Any) -> int:
    """Turn the weights that shrink by it into sparse initialisers (values, and where they lie); how many did.

    An index counts along the flattened tensor (COO, linearised, ascending). Indices are written as protobuf's variable
    length integers, one to four bytes, where the usual raw form takes eight (ours): the file shrinks from a density
    of about 60 % on, not 33 %. ONNX Runtime unpacks them when it loads the file and then sees constant weights as ever:
    packed, fused and run like dense ones. `onnx.checker` accepts the file; its `full_check` does not, because ONNX's
    shape inference knows no sparse weight of a Conv.
    """
    made = [(tensor, small) for tensor in _weights(graph) if (small := _smaller(tensor)) is not None]
    names = {tensor.name for tensor, _ in made}
    for tensor, small in made:
        graph.initializer.remove(tensor)
        graph.sparse_initializer.append(small)
    for listed in (graph.value_info, graph.input):  # an initialiser may be described there, as a dense tensor
        kept = [value for value in listed if value.name not in names]
        del listed[:]
        listed.extend(kept)
    return len(made)


def densify(graph: Any) -> int:
    """Turn sparse initialisers back into dense ones, for tools that know no others, in place; how many there were."""
    import onnx

    made = [onnx.numpy_helper.from_array(values, name) for name, values in _stored_sparse(graph).items()]
    del graph.sparse_initializer[:]
    graph.initializer.extend(made)
    return len(made)


def read_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """Every float weight of two axes or more that a convolution or matrix product reads, by name, dense."""
    import onnx

    return _matrices(onnx.load(path).graph)


def count_weights(path: Path) -> Weights:
    """The elements and the non-zeros of `read_weights`."""
    import onnx

    graph = onnx.load(path).graph
    found = _matrices(graph).values()
    stored = len(graph.sparse_initializer)
    return Weights(sum(v.size for v in found), sum(int(np.count_nonzero(v)) for v in found), stored)


def _shapes(graph: Any) -> dict[str, tuple[str | int, ...]]:
    """Name -> the axes, a number or a name each; without those of which something is unknown."""
    found = {
        value.name: tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    return {name: shape for name, shape in found.items() if shape and all(shape)}


def _drop_unread(graph: Any, outputs: set[str]) -> None:
    """Remove nodes and initialisers that no output needs."""
    needed, kept = set(outputs), []
    for node in reversed(graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            kept.append(node)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    for listed, left in ((graph.node, kept[::-1]), (graph.initializer, tensors)):
        copies = [type(item).FromString(item.SerializeToString()) for item in left]
        del listed[:]
        listed.extend(copies)


def _matrices(graph: Any) -> dict[str, NDArray[np.float32]]:
    import onnx

    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in _weights(graph)}
    return {name: values for name, values in {**found, **_stored_sparse(graph)}.items() if values.ndim > 1}


def _stored_sparse(graph: Any) -> dict[str, NDArray[np.float32]]:
    """The weights that are stored by their non-zeros, by name, dense."""
    import onnx

    found = {}
    for stored in graph.sparse_initializer:
        flat = np.zeros(int(np.prod(stored.dims)), np.float32)
        flat[onnx.numpy_helper.to_array(stored.indices)] = onnx.numpy_helper.to_array(stored.values)
        found[stored.values.name] = flat.reshape(stored.dims)
    return found


def _weights(graph: Any) -> list[Any]:
    """The float initialisers that layers with weights read, biases among them."""
    import onnx

    names = {name for node in graph.node if node.op_type in READERS for name in node.input}
    return [t for t in graph.initializer if t.name in names and t.data_type == onnx.TensorProto.FLOAT]


def _smaller(tensor: Any) -> Any | None:
    """The sparse form of an initialiser; None where it takes no fewer bytes."""
    import onnx

    values = onnx.numpy_helper.to_array(tensor)
    places = np.flatnonzero(values)
    if values.ndim < 2 or not len(places):  # ONNX Runtime wants a value at least
        return None
    small = onnx.SparseTensorProto(dims=values.shape)
    small.values.CopyFrom(onnx.numpy_helper.from_array(values.ravel()[places], tensor.name))
    small.indices.data_type = onnx.TensorProto.INT64
    small.indices.dims.append(len(places))
    small.indices.int64_data.extend(places.tolist())
    return small if small.ByteSize() < tensor.ByteSize() else None


def _strip(graph: Any) -> None:
    """Remove notes and documentation from a graph or function, its nodes and the graphs inside them."""
    parts = [graph, *graph.node, *graph.value_info]
    if hasattr(graph, "initializer"):  # a function has none, and its inputs and outputs are plain names
        parts += [*graph.input, *graph.output, *graph.initializer]
    for part in parts:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            _strip(inner)
