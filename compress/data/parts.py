"""What a source hands over before anything is decoded: named parts of images with their labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from compress.data.masks import Pairs
from compress.data.split import Encoded, Indices

# The names that splits go by in the wild, and ours.
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """One split as the source gives it."""

    images: Encoded | Tensor  # encoded, or (N, C, H, W) uint8
    targets: Indices  # (N,) class indices


@dataclass(frozen=True, eq=False)
class Source:
    """All parts of a source, by "train", "val" and "test", and its class names."""

    parts: Mapping[str, Part]
    labels: tuple[str, ...]
    notes: tuple[str, ...] = ()
    pairs: Mapping[str, Pairs] = field(default_factory=dict)  # instead of parts and labels: images with masks
