"""Scores that read the weights alone; `batches` is there for the common signature and not touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.groups.parts import layer_mean, rows, scales, weights
from compress.scores.layers import Batches, Scores, by_filter


def l1(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
    """Sum of absolute filter weights (Li et al., Pruning Filters, arXiv 1608.08710, section 3)."""
    return by_filter(model, groups, lambda filters: filters.norm(1, dim=1))


def l2(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
    """Euclidean norm of the filter (He et al., Soft Filter Pruning, arXiv 1808.06866, equation 2 with p = 2)."""
    return by_filter(model, groups, lambda filters: filters.norm(2, dim=1))


def bn_scale(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
    """Absolute scale of the batch norm behind the channel (Liu et al., Network Slimming, arXiv 1708.06519, section 3).

    A group without any norm falls back to `l1`.
    """
    return {
        group.name: layer_mean(
            [scale.abs() for _, scale in scales(model, group)]
            or [rows(tensor, part, group.size).abs().sum(1) for part, tensor in weights(model, group, held=True)],
            group.size,
        )
        for group in groups
    }


def fpgm(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
    """Sum of distances to the layer's other filters (He et al., Geometric Median, arXiv 1811.00250, section 3.3).

    The filter nearest to all others is the one they can replace, whatever its norm: a dead filter may well stay.
    Distances are between the weights themselves; torch-pruning 1.6.1 takes them between |w|^p, for which w and -w
    are the same filter.
    """
    return by_filter(model, groups, _distances)


def lamp(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
    """Squared norm over the sum of all as large ones of the layer (Lee et al., LAMP, arXiv 2010.07611, equation 1).

    The paper ranks single weights; this is the same per filter. Ours: filters of equal norm count in each other's sum,
    where the paper breaks the tie by position. Within a layer the order is that of `l2`; the values decide only how
    layers compete.
    """
    return by_filter(model, groups, _shares)


def random(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None, *, seed: int = 0) -> Scores:
    """Uniform noise from `seed`: the control that every score must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.size, generator=generator) for group in groups}


def _distances(filters: Tensor) -> Tensor:
    """(size, n) -> (size,); float64, because the products of the fast formula cancel between near filters."""
    wide = filters.double()
    return torch.cdist(wide, wide, compute_mode="use_mm_for_euclid_dist").sum(1)


def _shares(filters: Tensor) -> Tensor:
    """(size, n) -> (size,): 0 for a dead filter, 1 for the largest."""
    squares = filters.double().square().sum(1)
    sums = torch.where(squares >= squares[:, None], squares, 0).sum(1)
    return squares / sums.clamp(min=torch.finfo(torch.float64).tiny)
