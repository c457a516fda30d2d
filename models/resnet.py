"""ResNets for CIFAR, depth 6n + 2, with parameter-free (A) or projection (B) shortcuts.

He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385), section 4.2; module names as in
akamaster/pytorch_resnet_cifar10, whose weights load unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelectChannels(nn.Conv2d):
    """Option-A shortcut: every stride-th pixel, the input channels in the middle, zero channels around them.

    A 1x1 convolution whose weight (O, I, 1, 1) is a fixed 0/1 matrix, equal bit for bit in float32 to subsampling and
    `F.pad` (in TF32 and bfloat16 it rounds what passes, as every convolution does). As a convolution it couples no
    input channel to an output channel, so the two trunks that it joins are pruned independently, and its weight is cut
    like any other. The weight is in `state_dict()` but it is fixed, not learned: `requires_grad` is False, counts of
    learned parameters leave it out, and a checkpoint that lacks it loads without complaint.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1, stride=stride, bias=False)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        first = (self.out_channels - self.in_channels) // 2
        with torch.no_grad():
            self.weight.zero_()
            self.weight[first : first + self.in_channels, :, 0, 0].fill_diagonal_(1.0)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if key != f"{prefix}weight")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, option: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 and option == "A":
            self.shortcut = SelectChannels(in_channels, out_channels, stride=stride)
        elif stride != 1:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Images (N, C, H, W) of any size -> logits (N, num_classes); three stages of n blocks, 16, 32, 64 channels."""

    def __init__(self, n: int, option: str, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, n, 1, option)
        self.layer2 = _stage(16, 32, n, 2, option)
        self.layer3 = _stage(32, 64, n, 2, option)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and not isinstance(module, SelectChannels):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)  # (N, 64, h, w) -> (N, 64)
        return self.linear(x)  # type: ignore[no-any-return]


def _stage(in_channels: int, out_channels: int, n: int, stride: int, option: str) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride, option)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1, option) for _ in range(n - 1)))


def resnet20(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20, option-A shortcuts."""
    return ResNet(3, "A", num_classes, in_channels)


def resnet32(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-32, option-A shortcuts."""
    return ResNet(5, "A", num_classes, in_channels)


def resnet44(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-44, option-A shortcuts."""
    return ResNet(7, "A", num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-56, option-A shortcuts."""
    return ResNet(9, "A", num_classes, in_channels)


def resnet110(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-110, option-A shortcuts."""
    return ResNet(18, "A", num_classes, in_channels)


def resnet20_b(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-20, option-B shortcuts."""
    return ResNet(3, "B", num_classes, in_channels)


def resnet32_b(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-32, option-B shortcuts."""
    return ResNet(5, "B", num_classes, in_channels)


def resnet44_b(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-44, option-B shortcuts."""
    return ResNet(7, "B", num_classes, in_channels)


def resnet56_b(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-56, option-B shortcuts."""
    return ResNet(9, "B", num_classes, in_channels)


def resnet110_b(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """ResNet-110, option-B shortcuts."""
    return ResNet(18, "B", num_classes, in_channels)
