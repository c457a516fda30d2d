"""The architectures of this project: one literal table from a name to the function that builds the network."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .mobilenet import mobilenet_v2
from .resnet import (
    SelectChannels,
    resnet20,
    resnet20_b,
    resnet32,
    resnet32_b,
    resnet44,
    resnet44_b,
    resnet56,
    resnet56_b,
    resnet110,
    resnet110_b,
)
from .vgg import vgg16_bn, vgg19_bn

# Every builder takes (num_classes: int = 10, in_channels: int = 3) and is made for images of 32x32.
ARCHS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet20_b": resnet20_b,
    "resnet32_b": resnet32_b,
    "resnet44_b": resnet44_b,
    "resnet56_b": resnet56_b,
    "resnet110_b": resnet110_b,
    "vgg16_bn": vgg16_bn,
    "vgg19_bn": vgg19_bn,
    "mobilenet_v2": mobilenet_v2,
}

__all__ = ["ARCHS", "SelectChannels"]
