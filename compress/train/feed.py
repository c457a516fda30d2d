"""Feed: any sized iterable of batches, such as a DataLoader, as the training loop takes its images."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Feed:
    """Batches of one's own, their tensors moved to the device.

    The loop seeds torch before every epoch, so that a DataLoader shuffles alike in a resumed run. One process alone.
    """

    is_still = False  # nothing is known of two epochs: a teacher is asked every time

    def __init__(self, batches: Collection[Any], device: torch.device | str = "cpu") -> None:
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Tell a sampler that shuffles by the epoch's number."""
        sampler: Any = getattr(self._batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)

    def positions(self) -> tuple[Tensor, ...]:
        """Which images lie in which batch: not known."""
        return ()

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield tree_map(lambda leaf: leaf.to(self._device) if isinstance(leaf, Tensor) else leaf, batch)
