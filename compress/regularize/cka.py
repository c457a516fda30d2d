"""Unbiased linear CKA between features in float64 (Kornblith et al., arXiv 1905.00414; Song et al. 2012 for HSIC_1).

HSIC_1(K, L) = [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2 / (n-2) 1'KL1] / (n (n-3)), K and L with zero diagonals, is the
inner product of the U-centred K and L over n (n-3) (Szekely and Rizzo 2014): centred once, a Gram matrix serves every
pair, and the factor cancels in CKA = HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST = 4  # images; the estimator divides by n - 3
TINY = torch.finfo(torch.float64).tiny


def gram(features: Tensor) -> Tensor:
    """X X^T of flattened features (n, ...): (n, n) float64, differentiable."""
    found: Tensor = _Gram.apply(features)  # type: ignore[no-untyped-call]
    return found


def channel_grams(features: Tensor, axis: int) -> Tensor:
    """The Gram matrix of every channel alone; they add up to `gram`: (n, ...) -> (C, n, n) float64, no gradient.

    axis: that of the channels. Products of float32 and narrower features are summed in float32 (ours: they serve the
    score, whose differences are far above that rounding, and were most of the method's time in float64).
    """
    wide = torch.promote_types(features.dtype, torch.float32)
    rows = features.detach().movedim(axis, 0).to(wide, memory_format=torch.contiguous_format)
    rows = rows.flatten(2) if rows.dim() > 2 else rows.unsqueeze(2)  # (C, n, positions)
    with torch.autocast(rows.device.type, enabled=False):
        return (rows @ rows.transpose(1, 2)).double()


def centred(grams: Tensor) -> Tensor:
    """U-centred Gram matrices, flat: (..., n, n) -> (..., n*n)."""
    n = grams.shape[-1]
    off = 1 - torch.eye(n, dtype=grams.dtype, device=grams.device)
    grams = grams * off
    sums = grams.sum(-1, keepdim=True)
    total = sums.sum(-2, keepdim=True)
    return ((grams - (sums + sums.transpose(-1, -2)) / (n - 2) + total / ((n - 1) * (n - 2))) * off).flatten(-2)


def cka(rows: Tensor) -> Tensor:
    """CKA of each pair of centred Gram matrices, (m, n*n) -> (m, m); 0 for a feature that is the same in all images."""
    inner = rows @ rows.T
    scale = inner.diagonal().clamp(min=TINY).rsqrt()
    return inner * scale[:, None] * scale


def leave_one_out(parts: Tensor, whole: Tensor, others: Tensor) -> Tensor:
    """How much CKA(whole, other) changes without each part, absolute, averaged over the others.

    parts: the centred Gram matrix of each channel, (C, n*n). whole: theirs together and of the rest, (n*n,).
    others: (m, n*n). Returns (C,).
    """
    targets = others / _length(others)
    rest = whole - parts
    before = whole @ targets.T / _length(whole)
    after = rest @ targets.T / _length(rest)
    change: Tensor = (after - before).abs().mean(1)
    return change * parts.any(1)  # exactly 0 for a channel that never varies


def _length(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return length.clamp(min=TINY)


class _Gram(torch.autograd.Function):
    """Keeps the features as they are, not their float64 copy."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        rows = features.flatten(1).double()
        return rows @ rows.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        slope: Tensor = (grads[0] + grads[0].T) @ features.flatten(1).double()
        return slope.view(features.shape).to(features.dtype)
