"""What a layer reads, as the rows of a matrix: at each of its output places it is one linear map of such a row."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROWS = 8192  # places drawn from one batch: eight of them give 28 and more for every column (ours)
WIDEST = 4096  # inputs of a layer that can be refitted: more take too long and too much memory (ours)
COLUMNS = 2304  # of the widest rows with the kernel's places apart, 3 x 3 over 256 inputs: seconds for a layer (ours)


def has_windows(layer: nn.Module) -> bool:
    """Whether `windows` can lay out what the layer reads, and `channels` cannot do as well.

    A plain convolution, neither grouped nor transposed, of more than one place and at most COLUMNS columns. One with a
    forward pass of its own, which may pad as it likes, is none.
    """
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) or type(layer).forward not in _PLAIN:
        return False
    return layer.groups == 1 and math.prod(layer.kernel_size) > 1 and layer.weight[0].numel() <= COLUMNS


_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def windows(layer: nn.Module, values: Tensor, *, rows: int = ROWS) -> Tensor:
    """The inputs at every place of the kernel, output place by output place: (rows, I * kernel places) float64.

    The columns are in the order of `layer.weight.flatten(1)`, (O, columns): their product is what the layer gives, less
    its bias. Where there are more than `rows` places in the batch some are drawn, the same ones for inputs of equal
    size, whatever the channels.

    Args:
        layer: one that `has_windows`. values: its input, (N, I, *places).
    """
    assert isinstance(layer, nn.modules.conv._ConvNd)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    values = F.pad(values, layer._reversed_padding_repeated_twice, mode=mode)
    for axis, (size, step, gap) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2):
        values = values.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    axes = len(layer.kernel_size)
    places = values.movedim(1, 1 + axes)  # (N, C, *places, *kernel) -> (N, *places, C, *kernel), no copy yet
    shape = places.shape[: 1 + axes]
    drawn = torch.unravel_index(_drawn(shape.numel(), rows).to(values.device), shape)
    return places[drawn].flatten(1).double()


def channels(layer: nn.Module, values: Tensor, *, rows: int = ROWS) -> Tensor:
    """The inputs alone, input place by input place: (rows, I) float64. values: (N, I, *places), linear (N, *, I)."""
    flat = values if isinstance(layer, nn.Linear) else values.movedim(1, -1)
    flat = flat.reshape(-1, flat.shape[-1])
    return flat[_drawn(len(flat), rows).to(flat.device)].double()


def _drawn(count: int, rows: int) -> Tensor:
    """Positions of `rows` of `count` places, from seed 0; all of them where there are no more."""
    if count <= rows:
        return torch.arange(count)
    return torch.randint(count, (rows,), generator=torch.Generator().manual_seed(0))
