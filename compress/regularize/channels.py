"""Every channel's weights, wherever they lie: their norm, and values per channel spread back on to the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.groups import Group, Slice
from compress.groups.parts import layer_mean, rows, weights


@dataclass(frozen=True)
class Hold:
    """One group's hold on one tensor; the group's channels are `start` to `start + size - 1` of all channels."""

    part: Slice
    start: int
    size: int

    def add_to(self, sums: Tensor, values: Tensor) -> None:
        other = [dim for dim in range(values.dim()) if dim != self.part.dim]
        along = values.sum(other) if other else values
        held = along[self.part.offset : self.part.offset + self.size * self.part.block]
        sums[self.start : self.start + self.size] += held.view(self.size, self.part.block).sum(1)

    def spread(self, per_channel: Tensor, like: Tensor) -> Tensor:
        """Values per channel laid along this tensor's axis, zero outside the group: broadcastable to the tensor."""
        along = like.new_zeros(like.shape[self.part.dim])
        held = per_channel[self.start : self.start + self.size].repeat_interleave(self.part.block)
        along[self.part.offset : self.part.offset + held.numel()] = held.to(like.dtype)
        shape = [1] * like.dim()
        shape[self.part.dim] = -1
        return along.view(shape)

    def crosses(self, other: Hold) -> bool:
        """Whether both are one group's, along two axes of the tensor: then some elements are a channel's by either."""
        return self.start == other.start and self.part.dim < other.part.dim

    def shared(self, other: Hold, tensor: Tensor) -> Tensor:
        """The elements that are a channel's by this hold and by the crossing `other`: a view (..., size)."""
        own, its = self.part, other.part
        laid = tensor.movedim((own.dim, its.dim), (0, 1))
        laid = laid[own.offset : own.offset + self.size * own.block, its.offset : its.offset + self.size * its.block]
        split = laid.view(self.size, own.block, self.size, its.block, *laid.shape[2:])
        return split.diagonal(dim1=0, dim2=2)


@dataclass(frozen=True)
class Channels:
    """The channels that may leave, all in a row, (channels,), and the weights that make or read each, once each."""

    groups: tuple[Group, ...]  # those of the channels: free, and with weights
    others: tuple[Group, ...]
    tensors: tuple[nn.Parameter, ...]
    holds: tuple[tuple[Hold, ...], ...]  # beside each tensor, the groups' holds on it
    elements: Tensor  # n_g: how many weights a channel has

    def squares(self) -> Tensor:
        """||w_g||_2^2 of each channel, without gradient: (channels,)."""
        squares = torch.zeros_like(self.elements)
        for tensor, holds in zip(self.tensors, self.holds, strict=True):
            squared = tensor.detach().square()
            for hold in holds:
                hold.add_to(squares, squared)
            for one, other in _crossing(holds):
                squares[one.start : one.start + one.size] -= one.shared(other, squared).flatten(0, -2).sum(0)
        return squares

    def pull(self, factor: Tensor) -> list[Tensor]:
        """factor_g * w for every weight, summed over the groups that hold it: (channels,) -> the tensors' shapes."""
        found: list[Tensor] = []
        for tensor, holds in zip(self.tensors, self.holds, strict=True):
            total = holds[0].spread(factor, tensor)
            for hold in holds[1:]:
                total = total + hold.spread(factor, tensor)
            for one, other in _crossing(holds):
                one.shared(other, total).sub_(factor[one.start : one.start + one.size])
            found.append(tensor.detach() * total)
        return found

    def by_group(self, values: Tensor) -> dict[str, Tensor]:
        """(channels,) -> group name: (size,) float32 on the CPU; zeros for the other groups."""
        parts = torch.split(values.detach().float().cpu(), [group.size for group in self.groups])
        found = {group.name: part for group, part in zip(self.groups, parts, strict=True)}
        return found | {group.name: torch.zeros(group.size) for group in self.others}


def _crossing(holds: Sequence[Hold]) -> Iterator[tuple[Hold, Hold]]:
    return ((one, other) for one in holds for other in holds if one.crosses(other))


def channels(model: nn.Module, groups: Sequence[Group]) -> Channels:
    """Hold the weights of all groups that can be cut: of convolutions, and of linear layers that make such channels.

    The classifier is none of these, as in the papers: its outputs are frozen.

    Raises:
        ValueError: there is no such weight.
    """
    free = [group for group in groups if group.frozen is None]
    made = {tensor for group in free for _, tensor in weights(model, group)}
    eligible = made | set(conv_parameters(model))
    own: list[Group] = []
    holds: dict[nn.Parameter, list[Hold]] = {}
    start = 0
    for group in free:
        found = [
            (part, tensor)
            for part, tensor in weights(model, group, ("out", "in"))
            if isinstance(tensor, nn.Parameter) and tensor in eligible
        ]
        for part, tensor in found:
            holds.setdefault(tensor, []).append(Hold(part, start, group.size))
        if found:
            own.append(group)
            start += group.size
    if not holds:
        raise ValueError("no learned weight belongs to a channel that may be cut")
    tensors = tuple(holds)
    elements = tensors[0].new_zeros(start)
    for tensor, held in holds.items():
        for hold in held:
            elements[hold.start : hold.start + hold.size] += (
                tensor.numel() // tensor.shape[hold.part.dim] * hold.part.block
            )
        for one, other in _crossing(held):
            elements[one.start : one.start + one.size] -= one.shared(other, tensor).numel() // one.size
    others = tuple(group for group in groups if group not in own)
    return Channels(tuple(own), others, tensors, tuple(map(tuple, holds.values())), elements)


def conv_parameters(model: nn.Module, leaves: Sequence[str] = ("weight", "bias")) -> list[nn.Parameter]:
    """Every learned convolution weight and bias once, without norms and linear layers."""
    found = [
        getattr(module, leaf)
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for leaf in leaves
    ]
    learned = [parameter for parameter in found if isinstance(parameter, nn.Parameter) and parameter.requires_grad]
    return list({id(parameter): parameter for parameter in learned}.values())


def maskable(model: nn.Module, *, classifier: bool = False) -> dict[str, nn.Parameter]:
    """The weights that a mask may thin: of convolutions, and of linear layers where these hold the larger part.

    So it is the convolutions alone in a ResNet, and both in a vision transformer, whose one convolution cuts patches.
    The classifier, taken to be the linear layer registered last, is left dense unless `classifier` says otherwise,
    or there is nothing else. Names are those of `named_parameters`.

    Raises:
        ValueError: there is no such weight.
    """
    learned = {id(p): (name, p) for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
    found = [id(p) for p in conv_parameters(model, ("weight",)) if id(p) in learned]
    linear = [id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) in learned]
    hidden = linear if classifier or (len(linear) == 1 and not found) else linear[:-1]
    if sum(learned[key][1].numel() for key in hidden) > sum(learned[key][1].numel() for key in found):
        found = found + hidden
    elif classifier:
        found = found + linear[-1:]
    if not found:
        raise ValueError("no learned weight of a convolution or linear layer")
    return dict(learned[key] for key in found)


def penalised(model: nn.Module, leaves: Sequence[str] = ("weight", "bias")) -> list[nn.Parameter]:
    """What a penalty on single weights holds: the convolutions' `leaves`, and the weights that `maskable` names."""
    return list(dict.fromkeys([*conv_parameters(model, leaves), *maskable(model).values()]))


def filter_sizes(model: nn.Module, group: Group) -> Tensor:
    """sum |w| of each of the group's filters, in units of its layer's mean, averaged over the layers: (size,)."""
    found = [rows(tensor.detach(), part, group.size).abs().sum(1) for part, tensor in weights(model, group)]
    return layer_mean(found, group.size)
