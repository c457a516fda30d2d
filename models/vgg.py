"""VGG-16 and VGG-19 with batch norm for 32x32 images: one linear layer behind a global average pool.

Simonyan and Zisserman (arXiv 1409.1556), in the CIFAR form of Network Slimming (arXiv 1708.06519) and with its module
names: four poolings, so any image of 16x16 or more works.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512, 512)


class VGG(nn.Module):
    """Images (N, C, H, W), H and W >= 16 -> logits (N, num_classes); `depths` convolutions for each of the widths."""

    def __init__(self, depths: tuple[int, ...], num_classes: int, in_channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, depth in zip(WIDTHS, depths, strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(depth):
                layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                in_channels = width
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.feature(x), 1).flatten(1)  # (N, 512, h, w) -> (N, 512)
        return self.classifier(x)  # type: ignore[no-any-return]


def vgg16_bn(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-16: 13 convolutions."""
    return VGG((2, 2, 3, 3, 3), num_classes, in_channels)


def vgg19_bn(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """VGG-19: 16 convolutions."""
    return VGG((2, 2, 4, 4, 4), num_classes, in_channels)
