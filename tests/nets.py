"""Small networks that the tests cut: each shows one way in which channels hang together."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """conv -> BN -> relu -> conv -> BN, plus the input or a projection of it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs or stride > 1 else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


def residual(classes: int = 10) -> nn.Module:
    """Trunk channels shared by several layers, and a flatten of 2x2 places."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(Residual(8, 8), Residual(8, 8)),
        Residual(8, 16, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, classes),
    )  # fmt: skip


def plain(classes: int = 10) -> nn.Module:
    """A chain with biases and without any norm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, classes),
    )  # fmt: skip


class Concat(nn.Module):
    """Two branches side by side: the reader sees them at different offsets."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 3, padding=1)
        self.join, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)
        return self.head(F.relu(self.join(both)).mean((2, 3)))


def depthwise() -> nn.Module:
    """Pointwise, depthwise, pointwise, as in MobileNets."""
    first = [nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU6()]
    middle = [nn.Conv2d(12, 12, 3, 1, 1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU6()]
    last = [nn.Conv2d(12, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    return nn.Sequential(*first, *middle, *last)


def transposed() -> nn.Module:
    """Down, up again by a transposed convolution, then a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, 2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3, dilation=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


class PaddedShortcut(nn.Module):
    """Zero channels padded to the shortcut by a fixed amount: tracers see the trunk wrongly, and cutting it breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x))) + short).mean((2, 3)))


NETS = {"residual": residual, "plain": plain, "concat": Concat, "depthwise": depthwise, "transposed": transposed}


class SelfReading(nn.Module):
    """A convolution that reads the channels which it makes, as one with an identity beside it (RepVGG) does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.pointwise = (nn.Conv2d(i, 6, k, padding=k // 2) for i, k in ((3, 3), (6, 3), (6, 1)))
        self.act, self.head = nn.ReLU(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        return self.head(self.act(x + self.conv(x) + self.pointwise(x)).mean((2, 3)))


class NormsLast(nn.Module):
    """A block that registers both convolutions before both norms, all of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.conv2 = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU()
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.head(self.act(x).mean((2, 3)))


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and scales, so that no batch norm is an identity."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


class Tied(nn.Module):
    """One convolution used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.head = self.b, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))


class Wrapped(nn.Module):
    """A backbone of blocks as one member of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Sequential(residual(), nn.Linear(10, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)
