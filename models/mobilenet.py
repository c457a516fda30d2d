"""MobileNetV2 for 32x32 images: the stem and the second stage keep the resolution.

Sandler et al. (arXiv 1801.04381), table 2. Module names differ from torchvision's on purpose: its ImageNet weights have
the same shapes but belong to other strides, and must not pass for this network's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# expansion, out_channels, blocks, stride of the first block. Stage 2 has stride 2 in the paper, and so has the stem.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter depthwise by 3x3, project by 1x1; with a shortcut where the shapes allow one."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand = _conv_bn(in_channels, width, 1) if expansion != 1 else nn.Identity()
        self.depthwise = _conv_bn(width, width, 3, stride=stride, conv_groups=width)
        self.project = nn.Sequential(nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """Images (N, C, H, W) of any size -> logits (N, num_classes)."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.stem = _conv_bn(in_channels, 32, 3)
        blocks: list[nn.Module] = []
        width = 32
        for expansion, out_channels, n, stride in STAGES:
            for i in range(n):
                blocks.append(InvertedResidual(width, out_channels, stride if i == 0 else 1, expansion))
                width = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv_bn(width, 1280, 1)
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, 1280, h, w) -> (N, 1280)
        return self.classifier(self.dropout(x))  # type: ignore[no-any-return]


def _conv_bn(in_channels: int, out_channels: int, size: int, *, stride: int = 1, conv_groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=conv_groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU6())


def mobilenet_v2(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2:
    """MobileNetV2, width 1.0."""
    return MobileNetV2(num_classes, in_channels)
