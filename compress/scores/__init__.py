"""How much each channel matters: one function per importance, and the table that names them.

Every score is `(model, groups) -> {group name: (size,) float32 on the CPU}`, larger = keep, and reads weights only.
A layer's values are divided by their mean before layers of one group are averaged, so that no layer drowns another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.groups.parts import rows, scales, weights

Scores = Mapping[str, Tensor]
Score = Callable[[nn.Module, Sequence[Group]], Scores]


def l1(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """Sum of absolute filter weights (Li et al., Pruning Filters, arXiv 1608.08710, section 3)."""
    return _filter_norms(model, groups, 1)


def l2(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """Euclidean norm of the filter (He et al., Soft Filter Pruning, arXiv 1808.06866, equation 2 with p = 2)."""
    return _filter_norms(model, groups, 2)


def bn_scale(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """Absolute scale of the batch norm behind the channel (Liu et al., Network Slimming, arXiv 1708.06519, section 3).

    A group without any norm falls back to `l1`.
    """
    return {
        group.name: average(
            [scale.abs() for _, scale in scales(model, group)]
            or [rows(tensor, part, group.size).abs().sum(1) for part, tensor in weights(model, group)],
            group.size,
        )
        for group in groups
    }


def random(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """Uniform noise from seed 0: the control that every score must beat."""
    generator = torch.Generator().manual_seed(0)
    return {group.name: torch.rand(group.size, generator=generator) for group in groups}


def average(found: Iterable[Tensor], size: int) -> Tensor:
    """The mean over a group's layers of values (size,) in units of each layer's mean; ones where there is no layer."""
    total, count = torch.zeros(size, dtype=torch.float64), 0
    for values in found:
        values = values.detach().double().cpu()
        mean = values.mean()
        total += values / mean if mean > 0 else values
        count += 1
    return (total / count if count else torch.ones(size)).float()


def _filter_norms(model: nn.Module, groups: Sequence[Group], power: int) -> Scores:
    return {
        group.name: average(
            (rows(t.detach(), part, group.size).norm(power, dim=1) for part, t in weights(model, group)), group.size
        )
        for group in groups
    }


SCORES: dict[str, Score] = {
    "l1": l1,
    "l2": l2,
    "bn-scale": bn_scale,
    "random": random,
}
