"""One convolution alone, at its own width or another: what it takes between two neighbours of aligned width."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from compress.bench.session import small_model
from compress.doctor.layers import Layer
from compress.doctor.profile import Asked, feeds, nodes, open_session

NEIGHBOURS = ("before", "after")
TURNS = 7  # of three, a busy machine left none undisturbed in every second diagnosis


def milliseconds(layer: Layer, asked: Asked, *, block: int) -> float:
    """The layer and what the runtime inserts around it to change layouts, in milliseconds per inference.

    A pointwise convolution before it (unless it reads the file's input) and one after it, from and to `block`
    channels, stand for the network around it; their own time does not count.
    """
    model = _sandwich(layer, block)
    session = open_session(model, asked)
    found = nodes(model, asked, feeds(session, asked))
    return sum(node.ms for node in found if not node.name.startswith(NEIGHBOURS))


def side_by_side(layer: Layer, other: Layer, asked: Asked, *, block: int) -> tuple[float, float]:
    """What each takes, in turns: the quickest of TURNS profiles, since whatever else the machine does only adds."""
    times = [[milliseconds(one, asked, block=block) for one in (layer, other)] for _ in range(TURNS)]
    return min(first for first, _ in times), min(second for _, second in times)


def widened(layer: Layer, block: int) -> Layer:
    """The layer with its open channels rounded up to the block; those of the file's own inputs and outputs stay.

    Channels in groups follow no width: such a layer stays as it is, unless it is depthwise.
    """
    if layer.groups > 1 and not layer.groups == layer.inputs == layer.outputs:
        return layer
    inputs = layer.inputs if layer.is_first else -(-layer.inputs // block) * block
    outputs = layer.outputs if layer.is_last else -(-layer.outputs // block) * block
    if layer.groups > 1:
        return replace(layer, inputs=inputs, outputs=inputs, groups=inputs)
    return replace(layer, inputs=inputs, outputs=outputs)


def _sandwich(layer: Layer, block: int) -> bytes:
    from onnx import TensorProto, helper

    generator = np.random.default_rng(0)
    height, width = layer.size
    tensors: list[Any] = []

    def conv(source: str, name: str, shape: tuple[int, ...], **attributes: Any) -> Any:
        from onnx import numpy_helper

        scale = (2 / max(1, int(np.prod(shape[1:])))) ** 0.5
        weight = (generator.standard_normal(shape) * scale).astype(np.float32)
        tensors.extend((numpy_helper.from_array(weight, f"{name}.weight"),
                        numpy_helper.from_array(np.zeros(shape[0], np.float32), f"{name}.bias")))  # fmt: skip
        return helper.make_node("Conv", [source, f"{name}.weight", f"{name}.bias"], [name], name=name, **attributes)

    made = []
    channels, source = layer.inputs, "images"
    if not layer.is_first:
        made.append(conv("images", "before", (layer.inputs, block, 1, 1)))
        channels, source = block, "before"
    asked = {"kernel_shape": layer.kernel, "strides": layer.strides, "pads": layer.pads, "dilations": layer.dilations}
    shape = (layer.outputs, layer.inputs // layer.groups, *layer.kernel)
    made += [conv(source, "layer", shape, group=layer.groups, **asked), helper.make_node("Relu", ["layer"], ["relu"])]
    if not layer.is_last:
        made.append(conv("relu", "after", (block, layer.outputs, 1, 1)))
    last = "relu" if layer.is_last else "after"
    taken = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", channels, height, width])
    given = helper.make_tensor_value_info(last, TensorProto.FLOAT, None)
    return small_model(made, [taken], [given], tensors)
