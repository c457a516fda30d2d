"""The cut itself: remove channels from the tensors of a network, or set them to zero where they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.groups.types import Group, Slice
from compress.structure import resize

Kept = Mapping[str, Sequence[int]]  # group name -> the channels that remain, ascending; a group not named keeps all


def cut(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Remove every channel that `kept` does not name, in place; the network's widths shrink.

    Each tensor is read once and written once, whatever number of groups meet in it.
    """
    state = model.state_dict(keep_vars=True)
    smaller: dict[str, Tensor] = {}
    for name, gone in removed_elements(groups, kept).items():
        tensor = state[name].detach()
        for dim, indices in gone.items():
            keep = torch.ones(tensor.shape[dim], dtype=torch.bool)
            keep[indices] = False
            tensor = tensor.index_select(dim, keep.nonzero().flatten().to(tensor.device))
        smaller[name] = tensor.contiguous()
    resize(model, smaller)


def zero(model: nn.Module, groups: Iterable[Group], kept: Kept) -> None:
    """Set every element that `cut` would remove to zero, in place; all shapes stay as they are.

    A removed channel then gives 0 and is read with weight 0, so that the output must equal the cut network's:
    the law that every proof rests on. A running variance of 0 is harmless: eps keeps the quotient finite.
    """
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, gone in removed_elements(groups, kept).items():
            for dim, indices in gone.items():
                state[name].index_fill_(dim, indices.to(state[name].device), 0)


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
        remains = set(kept[group.name])
        if len(remains) < group.size:
            yield group, torch.tensor([c for c in range(group.size) if c not in remains])
