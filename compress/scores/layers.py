"""What all scores share: their types, and a value of each filter averaged over the layers of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from compress.example import Example
from compress.groups import Group
from compress.groups.parts import layer_mean, rows, weights

Scores = Mapping[str, Tensor]  # group name -> (size,) float32 on the CPU; larger = keep
Batches = Iterable[tuple[Example, Any]]  # images (N, C, H, W) or several inputs; labels (N,) int64, masks, a task's own


class Score(Protocol):
    """One importance. `batches` is read at most once, and only by the scores that need data."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
        """The importance of every channel of every group, frozen ones included."""


def by_filter(model: nn.Module, groups: Sequence[Group], value: Callable[[Tensor], Tensor]) -> Scores:
    """`value` of every layer's filters, (size, weights per filter) -> (size,), averaged over each group's layers."""
    return {
        group.name: layer_mean(
            (value(rows(tensor.detach(), part, group.size)) for part, tensor in weights(model, group, held=True)),
            group.size,
        )
        for group in groups
    }
