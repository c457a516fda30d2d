"""Blocks that random networks are strung together from; each reads its constructor's widths off its own tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.couplings import Fused


class Plain(nn.Module):
    """A convolution to another width, batch norm, relu."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)

    def sizes(self) -> tuple[int, ...]:
        return self.conv.weight.shape[1], self.conv.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Branch(nn.Module):
    """A residual branch with a width of its own."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner), nn.Conv2d(inner, width, 1)

    def sizes(self) -> tuple[int, ...]:
        return self.a.weight.shape[1], self.a.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.norm(self.a(x)))))


class Joined(nn.Module):
    """Two convolutions side by side."""

    def __init__(self, width: int, left: int, right: int) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(width, left, 1), nn.Conv2d(width, right, 3, padding=1)

    def sizes(self) -> tuple[int, ...]:
        return self.left.weight.shape[1], self.left.weight.shape[0], self.right.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(torch.cat([self.left(x), self.right(x)], 1))


class Halved(nn.Module):
    """One half of the channels goes through a convolution, the other around it and scales it."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(width // 2, width // 2, 3, padding=1), nn.Conv2d(width // 2, out, 1)

    def sizes(self) -> tuple[int, ...]:
        return 2 * self.conv.weight.shape[0], self.last.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.last(F.relu(self.conv(a)) * b)


class Grouped(nn.Module):
    """A convolution in groups, and a depthwise one."""

    def __init__(self, width: int, out: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1, groups=groups)
        self.depth = nn.Conv2d(out, out, 3, padding=1, groups=out)

    def sizes(self) -> tuple[int, ...]:
        return self.conv.weight.shape[1] * self.conv.groups, self.conv.weight.shape[0], self.conv.groups

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(F.relu(self.conv(x)))


class Shuffled(nn.Module):
    """Channels change places by reshape and transpose, then become places and channels again."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(width, 4 * inner, 1), nn.Conv2d(inner, out, 1)

    def sizes(self) -> tuple[int, ...]:
        return self.conv.weight.shape[1], self.last.weight.shape[1], self.last.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.last(F.avg_pool2d(F.pixel_shuffle(F.relu(self.conv(y)), 2), 2))


class Normed(nn.Module):
    """A group norm, which mixes the channels of each of its two parts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)

    def sizes(self) -> tuple[int, ...]:
        return (self.norm.weight.shape[0],)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))


class Attended(nn.Module):
    """Places as tokens: attention by heads of 3 inside a sum, with a layer norm before it or none."""

    def __init__(self, width: int, heads: int, is_normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if is_normed else nn.Identity()
        self.mix = Fused(width, heads)
        self.mix.head_dim, self.mix.qkv, self.mix.proj = 3, nn.Linear(width, 9 * heads), nn.Linear(3 * heads, width)

    def sizes(self) -> tuple[int, ...]:
        return self.mix.proj.weight.shape[0], self.mix.proj.weight.shape[1] // 3, isinstance(self.norm, nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # (N, C, H, W) -> (N, T, C)
        return (tokens + self.mix(self.norm(tokens))).transpose(1, 2).reshape(x.shape)


class Head(nn.Module):
    """A flatten of 2 x 2 places, and the classifier."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(4 * width, 5)

    def sizes(self) -> tuple[int, ...]:
        return (self.last.weight.shape[1] // 4,)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.adaptive_avg_pool2d(x, 2).flatten(1))


KINDS = ("plain", "residual", "concat", "split", "grouped", "reshape", "attention", "group norm", "layer norm")


def build(kinds: list[str], width: int) -> nn.Sequential:
    """A stem of `width` channels, one block for each kind, a classifier."""
    blocks: list[nn.Module] = [Plain(3, width)]
    for kind in kinds:
        made: dict[str, tuple[nn.Module, int]] = {
            "plain": (Plain(width, 8), 8),
            "residual": (Branch(width, 6), width),
            "concat": (Joined(width, 4, 8), 12),
            "split": (Halved(width, 8), 8),
            "grouped": (Grouped(width, 8, 2), 8),
            "reshape": (Shuffled(width, 5, 8), 8),
            "attention": (Attended(width, 3, False), width),
            "group norm": (Normed(width), width),
            "layer norm": (Attended(width, 3, True), width),
        }
        block, width = made[kind]
        blocks.append(block)
    return nn.Sequential(*blocks, Head(width))


def rebuild(model: nn.Sequential) -> nn.Sequential:
    """The same blocks, built anew at the widths that the tensors of `model` have."""
    return nn.Sequential(*(type(block)(*block.sizes()) for block in model))


def single(kind: str) -> nn.Sequential:
    """A network with one such block, as --arch tests.random_nets:single names it."""
    return build([kind], 8)
