"""What all scores share: their types, and the mean over the layers of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.groups.parts import rows, weights

Scores = Mapping[str, Tensor]  # group name -> (size,) float32 on the CPU; larger = keep
Batches = Iterable[tuple[Tensor, Tensor]]  # images (N, C, H, W), labels (N,) int64


class Score(Protocol):
    """One importance. `batches` is read at most once, and only by the scores that need data."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
        """The importance of every channel of every group, frozen ones included."""


def average(found: Iterable[Tensor], size: int) -> Tensor:
    """The mean over a group's layers of values (size,) in units of each layer's mean; ones where there is no layer."""
    total, count = torch.zeros(size, dtype=torch.float64), 0
    for values in found:
        values = values.detach().double().cpu()
        mean = values.mean()
        total += values / mean if mean > 0 else values
        count += 1
    return (total / count if count else torch.ones(size)).float()


def by_filter(model: nn.Module, groups: Sequence[Group], value: Callable[[Tensor], Tensor]) -> Scores:
    """`value` of every layer's filters, (size, weights per filter) -> (size,), averaged over each group's layers."""
    return {
        group.name: average(
            (value(rows(tensor.detach(), part, group.size)) for part, tensor in weights(model, group)), group.size
        )
        for group in groups
    }
