"""Small networks that show one coupling of channels each, beyond what chains, sums and concatenations have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """An image as tokens, one block that `mix` makes of them, added to them, and a classifier; no norm at all."""

    def __init__(self, mix: nn.Module, width: int = 24) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Conv2d(3, width, 4, 4), mix, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # (N, C, H, W) -> (N, T, C)
        return self.head((tokens + self.mix(tokens)).mean(1))


class Fused(nn.Module):
    """Attention with one layer for queries, keys and values; `fast` uses the fused operator."""

    def __init__(self, width: int = 24, heads: int = 4, fast: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fast = heads, width // heads, fast
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fast:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(n, t, -1))


class Separate(nn.Module):
    """Attention with a layer each, chunks of a joint one for keys and values, and a table of biases per head."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads, self.all_head_size = heads, width
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(31, heads))
        self.register_buffer("index", torch.arange(16)[:, None] - torch.arange(16) + 15)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        k, v = self.kv(x).chunk(2, -1)
        q, k, v = (
            y.view(n, t, self.heads, self.all_head_size // self.heads).transpose(1, 2) for y in (self.q(x), k, v)
        )
        bias = self.table[self.index.view(-1)].view(t, t, -1).permute(2, 0, 1)
        y = (torch.einsum("nhqd,nhkd->nhqk", q, k) + bias).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(n, t, self.all_head_size))


class Gated(nn.Module):
    """SwiGLU: one half gates the other; a layer scale behind."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.up, self.down, self.scale = (
            nn.Linear(width, 32),
            nn.Linear(16, width),
            nn.Parameter(torch.full((width,), 1e-6)),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b) * self.scale


class Images(nn.Module):
    """stem -> `middle` -> classifier on the mean over places."""

    def __init__(self, middle: nn.Module, width: int = 12, out: int = 12) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, width, 3, padding=1), middle, nn.Linear(out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(F.relu(self.stem(x))).mean((2, 3)))


class Excite(nn.Module):
    """Squeeze and excite: channels scaled by what their means say."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class Shuffle(nn.Module):
    """A channel shuffle in 2 parts between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = (y := self.a(x)).shape
        return self.b(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Standardised(nn.Module):
    """A convolution whose filters are standardised on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain, self.last = nn.Conv2d(12, 12, 3), nn.Parameter(torch.rand(12) + 0.5), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = F.batch_norm(w.reshape(1, len(w), -1), None, None, weight=self.gain, training=True).reshape_as(w)
        return self.last(F.relu(F.conv2d(x, w, self.conv.bias)))


class Response(nn.Module):
    """Global response normalisation (ConvNeXt V2), channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.weight, self.bias = nn.Parameter(torch.rand(1, 1, 1, 20)), nn.Parameter(torch.rand(1, 1, 1, 20))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(x.permute(0, 2, 3, 1)))
        spread = y.norm(p=2, dim=(1, 2), keepdim=True)
        y = y + self.weight * (y * spread / (spread.mean(-1, keepdim=True) + 1e-6)) + self.bias
        return self.down(y).permute(0, 3, 1, 2)


class Depth(nn.Module):
    """Space to depth by reshape and permute, and back by a pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.Conv2d(48, 48, 1), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)
        return self.last(F.pixel_shuffle(F.relu(self.mix(y)), 2))


class Parts(nn.Module):
    """A split in parts of one width, each with a convolution of its own (Res2Net)."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.a, self.b, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two, three = torch.split(x, self.width, 1)
        two = self.a(two)
        return self.last(torch.cat([one, two, self.b(two + three)], 1))


class Held(nn.Module):
    """Unequal parts whose sizes the module holds as a tuple; the first one gates the others (MambaOut)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = (12, 8, 4)
        self.up, self.conv, self.last = nn.Conv2d(12, 24, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate, one, two = torch.split(self.up(x), self.sizes, 1)
        return self.last(F.silu(gate) * torch.cat([one, self.conv(two)], 1))


class Difference(nn.Module):
    """A part, and what is left of the whole (SHViT)."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.part = 12, 5
        self.conv, self.last = nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(12, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = torch.split(x, [self.part, self.dim - self.part], 1)
        return self.last(torch.cat([self.conv(one), two], 1))


class First(nn.Module):
    """The first channels take a sum, as many as came in (ReXNet); all are scaled by a vector in a given shape."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.shape = 12, (15, 1, 1)
        self.up, self.scale, self.last = nn.Conv2d(12, 15, 1), nn.Parameter(torch.rand(15)), nn.Conv2d(15, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y = torch.cat([y[:, : self.width] + x, y[:, self.width :]], 1)
        return self.last(y * self.scale.view(self.shape))


class Folded(nn.Module):
    """Overlapping windows of values, weighted and added where they came from (VOLO's outlook attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.weight, self.last = nn.Conv2d(12, 10, 1), nn.Conv2d(12, 9, 1), nn.Conv2d(10, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        windows = F.unfold(self.value(x), 3, padding=1).view(n, -1, 9, h * w)
        y = windows * self.weight(x).view(n, 1, 9, h * w)
        return self.last(F.fold(y.flatten(1, 2), (h, w), 3, padding=1))


class Table(nn.Module):
    """A table of biases per head, looked up and read in a shape that the module holds (CoAtNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.biases = 3, 8, nn.Module()  # its forward is never called
        self.biases.shape, self.biases.table = (16, 16, 3), nn.Parameter(torch.randn(31, 3))
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)
        self.register_buffer("index", torch.arange(16)[:, None] - torch.arange(16) + 15)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.biases.table[self.index.view(-1)].view(self.biases.shape).permute(2, 0, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(n, t, -1))


def grouped(groups: int) -> nn.Module:
    """Grouped, transposed and depthwise convolutions in a row."""
    return nn.Sequential(nn.Conv2d(12, 12, 3, groups=groups), nn.ReLU(), nn.ConvTranspose2d(12, 12, 2, groups=12),
                         nn.Conv2d(12, 24, 1, groups=12), nn.Conv2d(24, 12, 1))  # fmt: skip


class Nested(nn.Module):
    """Outputs in a dict with a tuple; the features are an output, so that they stay."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.features, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        y = self.features(F.relu(self.stem(x)))
        return {"out": self.head(y.mean((2, 3))), "features": (y, x)}


def normed(width: int = 24, hidden: int = 32, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> nn.Module:
    """Layer norms on a trunk; any width can be built."""
    mlp = nn.Sequential(norm(width), nn.Linear(width, hidden), nn.GELU(), norm(hidden), nn.Linear(hidden, width))
    return Tokens(mlp, width)


COUPLINGS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {  # network, free groups and their sizes
    "fused": (lambda: Tokens(Fused()), {"embed": 24, "mix.qkv": 4}),
    "plain attention": (lambda: Tokens(Fused(fast=False)), {"embed": 24, "mix.qkv": 4}),
    "separate": (lambda: Tokens(Separate()), {"embed": 24, "mix.q": 3}),
    "gated": (lambda: Tokens(Gated()), {"embed": 24, "mix.up": 16}),
    "excite": (lambda: Images(Excite()), {"stem": 12, "middle.down": 4}),
    "shuffle": (lambda: Images(Shuffle()), {"stem": 12, "middle.a": 6, "middle.b": 12}),
    "standardised": (lambda: Images(Standardised()), {"stem": 12, "middle.conv": 12, "middle.last": 12}),
    "response": (lambda: Images(Response()), {"stem": 12, "middle.up": 20, "middle.down": 12}),
    "depth": (lambda: Images(Depth()), {"stem": 12, "middle.mix": 12, "middle.last": 12}),
    "parts": (lambda: Images(Parts()), {"stem": 4, "middle.b": 4, "middle.last": 12}),
    "held": (
        lambda: Images(Held()),
        {"stem": 12, "middle.up": 8, "middle.up[8:]": 4, "middle.up[20:]": 4, "middle.last": 12},
    ),
    "difference": (lambda: Images(Difference()), {"stem": 5, "stem[5:]": 7, "middle.conv": 5, "middle.last": 12}),
    "first": (lambda: Images(First()), {"stem": 12, "middle.up": 3, "middle.last": 12}),
    "folded": (lambda: Images(Folded()), {"stem": 12, "middle.value": 10, "middle.last": 12}),
    "table": (lambda: Tokens(Table()), {"embed": 24, "mix.qkv": 3}),
    "whole groups": (lambda: Images(grouped(4)), {"stem": 4, "middle.4": 12}),
    "within groups": (lambda: Images(grouped(2)), {"stem": 6, "middle.0": 6, "middle.4": 12}),
    "nested": (Nested, {"stem": 8}),
}
