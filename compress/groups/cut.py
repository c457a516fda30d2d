"""The cut itself: remove channels from the tensors of a network, set them to zero, or put them in another order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.groups.types import Group, Slice
from compress.structure import integers, resize, set_integer, tensors

Kept = Mapping[str, Sequence[int]]  # group name -> the channels that remain, ascending; a group not named keeps all


def cut(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Remove every channel that `kept` does not name, in place; the network's widths shrink, its counts along.

    Each tensor is read once and written once, whatever number of groups meet in it.
    """
    groups = list(groups)
    held = tensors(model)
    smaller: dict[str, Tensor] = {}
    for name, gone in removed_elements(groups, kept).items():
        smaller[name] = without(held[name].detach(), gone).contiguous()
    for group, channels in _removed(groups, kept):
        for count in group.counts:
            module = model.get_submodule(count.module)
            before = integers(module)[count.attribute]
            set_integer(module, count.attribute, before - count.step * len(channels))
    resize(model, smaller)


def zero(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Set every element that `cut` would remove to zero; all shapes stay as they are.

    A removed channel then gives 0 and is read with weight 0, so that the output must equal the cut network's:
    the law that every proof rests on. A running variance of 0 is harmless: eps keeps the quotient finite.
    """
    held = tensors(model)
    with torch.no_grad():
        for name, gone in removed_elements(groups, kept).items():
            for dim, indices in gone.items():
                held[name].index_fill_(dim, indices.to(held[name].device), 0)


def unshare(model: nn.Module, groups: Iterable[Group]) -> None:
    """Give a network copies of its own of the tensors that `groups` name, before they are written in place."""
    held = tensors(model)
    names = {part.name for group in groups for part in group.slices}
    resize(model, {name: held[name].detach().clone() for name in names})


def permute(model: nn.Module, groups: Iterable[Group], orders: Mapping[str, Tensor]) -> None:
    """Put the channels of each group that `orders` names into another order, in every tensor, in place.

    The output must not change: a law that holds for layer norms too, where zeroing is no removal. [ours]
    """
    held = tensors(model)
    with torch.no_grad():
        for group in groups:
            for part in group.slices if group.name in orders else ():
                tensor = held[part.name]
                places = elements(part, torch.arange(group.size)).to(tensor.device)
                moved = elements(part, orders[group.name]).to(tensor.device)
                tensor.index_copy_(part.dim, places, tensor.index_select(part.dim, moved))


def without(tensor: Tensor, gone: Mapping[int, Tensor]) -> Tensor:
    """The tensor less the indices that leave along each axis."""
    for dim, indices in gone.items():
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        stays[indices] = False
        tensor = tensor.index_select(dim, stays.nonzero().flatten().to(tensor.device))
    return tensor


def removed_elements(groups: Iterable[Group], kept: Kept) -> dict[str, dict[int, Tensor]]:
    """Tensor name -> axis -> the indices that leave, as int64 on the CPU."""
    gone: dict[str, dict[int, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for group, channels in _removed(groups, kept):
        for part in group.slices:
            gone[part.name][part.dim].append(elements(part, channels))
    return {name: {dim: torch.cat(found) for dim, found in dims.items()} for name, dims in gone.items()}


def elements(part: Slice, channels: Tensor) -> Tensor:
    """The indices along `part.dim` that the given channels own: (n,) -> (n * block,)."""
    return (part.offset + channels[:, None] * part.block + torch.arange(part.block)).flatten()


def _removed(groups: Iterable[Group], kept: Kept) -> Iterator[tuple[Group, Tensor]]:
    for group in groups:
        if group.name not in kept:
            continue
        leaves = torch.ones(group.size, dtype=torch.bool)
        leaves[list(kept[group.name])] = False
        if bool(leaves.any()):
            yield group, leaves.nonzero().flatten()
