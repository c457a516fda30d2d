"""The parts of a group that carry weights: its filters, the columns that read them, and the norms behind them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from compress.groups.types import Group, Slice
from compress.structure import owner

Side = Literal["out", "in"]  # the filters that make the channels, or the weights that read them
Norm = nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm


def weights(
    model: nn.Module, group: Group, sides: tuple[Side, ...] = ("out",), *, held: bool = False
) -> Iterator[tuple[Slice, Tensor]]:
    """The learned weights (two axes or more) of a group on the given sides.

    held: where none of them is learned, those that training holds fixed (no gradient), as in a network that is only
    run; a matrix of zeros and ones alone selects channels and is none of these.
    """
    found = []
    for part in group.slices:
        module, leaf = owner(model, part.name)
        tensor = getattr(module, leaf)
        if tensor.dim() > 1 and side(module, part) in sides:
            found.append((part, tensor))
    learned = [(part, tensor) for part, tensor in found if tensor.requires_grad]
    if learned or not held:
        yield from learned
        return
    for part, tensor in found:
        if isinstance(tensor, nn.Parameter) and not bool(((tensor == 0) | (tensor == 1)).all()):
            yield part, tensor


def layers(model: nn.Module, group: Group, side: Side) -> Iterator[tuple[nn.Module, Slice, Tensor]]:
    """The convolutions and linear layers that make ("out") or read ("in") a group's channels, and which are whose.

    The outputs, or inputs, are positions (size, parts, block): a convolution that keeps its groups while each of them
    loses as many channels has one slice for all, so that a channel is one input in each part.
    """
    for part, tensor in weights(model, group, (side,), held=True):
        module, leaf = owner(model, part.name)
        if leaf != "weight" or not isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            continue  # a table of positions, say, to which the channels are added
        own = part.offset + torch.arange(group.size * part.block).view(group.size, 1, part.block)
        shifts = torch.zeros(1, dtype=torch.int64)
        if side == "in" and isinstance(module, nn.modules.conv._ConvNd) and part.dim == 1:
            shifts = torch.arange(module.groups) * tensor.shape[1]
        yield module, part, own + shifts.view(1, -1, 1)


def side(module: nn.Module, part: Slice) -> Side:
    """Whether a weight's slice makes the channels ("out") or reads them ("in"); a transposed layer has them swapped."""
    out_axis = 1 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 0
    return "out" if part.dim == out_axis else "in"


def rows(tensor: Tensor, part: Slice, size: int) -> Tensor:
    """All elements of one tensor that belong to each channel: -> (size, elements per channel)."""
    held = tensor.movedim(part.dim, 0)[part.offset : part.offset + size * part.block]
    return held.reshape(size, -1)


def layer_mean(found: Iterable[Tensor], size: int) -> Tensor:
    """Values (size,) of a group's layers, each in units of its mean, averaged: float32 on the CPU, ones for none."""
    total, count = torch.zeros(size, dtype=torch.float64), 0
    for values in found:
        values = values.detach().double().cpu()
        mean = values.mean()
        total += values / mean if mean > 0 else values
        count += 1
    return (total / count if count else torch.ones(size)).float()


def scales(model: nn.Module, group: Group) -> Iterator[tuple[str, Tensor]]:
    """The scale vectors (size,) of the norms that the group's channels pass, with the path of their layer."""
    for part in group.slices:
        module, leaf = owner(model, part.name)
        if leaf == "weight" and isinstance(module, Norm) and part.block == 1:
            tensor = getattr(module, leaf)
            yield part.name.rpartition(".")[0], tensor[part.offset : part.offset + group.size]
