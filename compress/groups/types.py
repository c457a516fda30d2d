"""The values that describe coupled channels."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Slice:
    """Where the channels of a group lie in one tensor.

    Channel `c` owns the indices `offset + c * block` to `offset + (c + 1) * block - 1` along `dim`.
    """

    name: str  # a key of structure.tensors(model)
    dim: int  # the axis
    block: int = 1  # indices one channel spans: head_dim, or H*W after a flatten
    offset: int = 0  # where channel 0 starts: 0, D, 2D in a fused qkv; a concatenation's shift


@dataclass(frozen=True)
class Count:
    """An integer of a module that falls with the channels: `num_heads`, `groups`, the width of a split."""

    module: str  # the module's path
    attribute: str
    step: int = 1  # by how much it falls with each channel that leaves


@dataclass(frozen=True)
class Read:
    """Numbers that an operator in a module was given, one of which counts the channels; the module may hold them."""

    module: str
    numbers: tuple[int, ...]  # the sizes of a split's parts, or a shape
    at: int  # which of them falls
    step: int = 1


@dataclass(frozen=True)
class Group:
    """Channels that must be kept or removed together, in every tensor that `slices` names."""

    name: str  # the layer whose output channels these are
    size: int
    slices: tuple[Slice, ...]
    frozen: str | None = None  # why it cannot be cut, or None
    counts: tuple[Count, ...] = ()
    reads: tuple[Read, ...] = ()  # what may become counts; empty once the group is proved
    mixed: bool = False  # what is left takes other values when one leaves, as in a layer norm
    norms: tuple[tuple[str, str], ...] = ()  # layers that make the channels, each with the batch norm right behind it

    def freeze(self, reason: str) -> Group:
        """The same group, marked as not to be cut; the first reason given stays."""
        return self if self.frozen else replace(self, frozen=reason)
