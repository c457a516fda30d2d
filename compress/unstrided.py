"""Gradients of strided 1 x 1 convolutions of few inputs, which oneDNN computes wrongly on the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

from torch import Tensor, nn

BLOCK = 16  # inputs that fill a vector of AVX-512, 8 with AVX2: from so many on the gradient is right


@contextmanager
def unstrided(model: nn.Module) -> Iterator[None]:
    """Inside, those layers get every stride-th place alone and go over them without a stride, which is the same.

    For channels-last images and fewer inputs than a vector holds, oneDNN's weight gradient of a strided 1 x 1
    convolution writes beyond its workspace (uxlfoundation/oneDNN issue 6035, seen with torch 2.13 and AVX2): wrong
    gradients without a word, a crash, or a hang. Shortcuts of residual networks become that narrow when they are cut.
    """
    strides = {layer: layer.stride for layer in model.modules() if is_affected(layer)}

    def thin(layer: nn.Conv2d, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        images, *rest = inputs
        down, right = strides[layer]
        layer.stride = (1, 1)
        return (images[..., ::down, ::right], *rest)

    def restore(layer: nn.Conv2d, inputs: tuple[Any, ...], output: Tensor) -> None:
        layer.stride = strides[layer]

    # after the hooks that others have set, which see the whole input; called even where the layer fails
    handles = [layer.register_forward_pre_hook(thin) for layer in strides]
    handles += [layer.register_forward_hook(restore, always_call=True) for layer in strides]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_affected(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether this is a convolution on the CPU whose weights learn from a wrong gradient."""
    if not isinstance(layer, nn.Conv2d) or layer.weight.device.type != "cpu" or not layer.weight.requires_grad:
        return False
    is_strided = math.prod(layer.kernel_size) == 1 and math.prod(layer.stride) > 1
    return is_strided and layer.padding in ((0, 0), "valid") and layer.weight.shape[1] < BLOCK
