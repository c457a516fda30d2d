"""What a data set is once it is read: labelled splits, in memory or streamed, and how one is held out of another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from compress.errors import DataError

Augment = Literal["none", "crop", "flip-crop"]
Shape = tuple[int, int, int]  # (C, H, W)
Indices = npt.NDArray[np.int64]


class Encoded(Protocol):
    """Images as a source stores them: named, not yet decoded, read one at a time from any process or thread."""

    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def read(self, index: int) -> bytes: ...
    def identity(self) -> Iterator[str]: ...  # file names and sizes, for the fingerprint


@dataclass(frozen=True, eq=False)
class MemorySplit:
    """Decoded images of one size."""

    name: str  # "train of digits", for messages
    images: Tensor  # (N, C, H, W) uint8
    targets: Tensor  # (N,) int64; or masks, (N, H, W) uint8
    augment: Augment  # what "auto" stands for

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def has_masks(self) -> bool:
        """Whether there is a class for each pixel, not one per image."""
        return self.targets.ndim > 1

    @property
    def shape(self) -> Shape:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Indices, name: str) -> MemorySplit:
        """The images at `indices`, in that order, as a split of its own."""
        index = torch.from_numpy(indices)
        return replace(self, name=name, images=self.images[index], targets=self.targets[index])


@dataclass(frozen=True, eq=False)
class StreamSplit:
    """Images that are decoded and resized to `shape` each time they are asked for."""

    name: str
    images: Encoded
    indices: Indices  # (N,) where the split's images lie in `images`
    targets: Tensor  # (N,) int64
    augment: Augment
    shape: Shape
    max_unreadable: float  # largest share of unreadable images that a pass over the split survives
    has_masks: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.targets)

    def subset(self, indices: Indices, name: str) -> StreamSplit:
        """The images at `indices`, in that order, as a split of its own."""
        return replace(self, name=name, indices=self.indices[indices], targets=self.targets[torch.from_numpy(indices)])


Split = MemorySplit | StreamSplit


@dataclass(frozen=True, eq=False)
class Data:
    """A data set: its splits, its class names and what had to be decided while reading it."""

    name: str  # the text it was asked for with
    labels: tuple[str, ...]
    train: Split  # holds no image when the source is for evaluation only
    val: Split
    test: Split | None
    fingerprint: str  # sha256 over decoded images and labels, or over names, sizes and labels where streamed
    notes: tuple[str, ...]


def named_as(data: Data, labels: Sequence[str]) -> Data:
    """The classes numbered as in `labels`, where all their names are found there; else the data as they are."""
    known = {label: index for index, label in enumerate(labels)}
    is_known = len(known) == len(labels) and known.keys() >= {*data.labels}
    if data.labels == tuple(labels) or data.val.has_masks or not is_known:
        return data
    number = torch.tensor([known[label] for label in data.labels])
    train, val = (replace(split, targets=number[split.targets]) for split in (data.train, data.val))
    test = None if data.test is None else replace(data.test, targets=number[data.test.targets])
    return replace(data, labels=tuple(labels), train=train, val=val, test=test)


def hold_out(targets: Indices, *, share: float, seed: int, labels: Sequence[str]) -> tuple[Indices, Indices]:
    """Split positions into (rest, held out), class by class: round(share * n) of every class, at least 1 on each side.

    Both are in ascending order. Raises DataError for a class with a single image.
    """
    random = np.random.default_rng(seed)
    held: list[Indices] = []
    for label in np.unique(targets):
        members = np.flatnonzero(targets == label)
        if len(members) < 2:
            raise DataError(
                f"class '{labels[label]}' has {len(members)} training image, a held-out validation split needs "
                "at least 2 per class; add images, leave the class out or give a validation split of your own"
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(random.permutation(members)[:count])
    out = np.sort(np.concatenate(held)).astype(np.int64)
    rest = np.setdiff1d(np.arange(len(targets)), out).astype(np.int64)
    return rest, out
