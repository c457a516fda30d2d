"""Scores by what the layers behind a channel cannot make up for once it has left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.groups import Group, reading
from compress.groups.parts import layer_mean, layers
from compress.groups.reading import channels, has_windows, windows
from compress.scores.layers import Batches, Scores, evaluating, read
from compress.scores.weights import l2

RIDGE = 1e-3  # of each column's mean square: what few images cannot tell apart is no sure replacement (ours)


def obs(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
    """What a channel's readers lose when it leaves and the others take over (Kurtic et al., ZipLM, arXiv 2302.04089).

    Optimal Brain Surgeon (Hassibi and Stork, NIPS 1992) layer by layer and by channels, as in section 3 of the paper:
    with H the second moments of what a layer reads, W its weight and c a channel's columns, leaving costs
    tr(W_c ((H^-1)_cc)^-1 W_c^T), after which W and H^-1 are those of the refitted layer. The channel that costs least
    leaves first, until none is left; its score is that cost, so that channels which others can replace score low
    whatever their size. Ours: costs are shares of what a layer gives (its mean square), added up over all layers that
    read a channel; a score is never below an earlier leaver's; in grouped convolutions and layers of more than
    reading.WIDEST inputs a channel costs its own W_c x_c, which nothing takes over. A group that no layer reads falls
    back to `l2`.

    Time grows with the cube of a layer's inputs, and the moments of all layers are held at once, in float64.

    Args:
        batches: a few hundred images; labels are not looked at. One pass.
    """
    readers = {layer: _Reader(layer) for group in groups for layer, *_ in layers(model, group, "in")}
    handles = [layer.register_forward_pre_hook(reader.watch) for layer, reader in readers.items()]
    try:
        with evaluating(model), torch.no_grad():
            for given, _ in read(model, batches, "obs"):
                model(*given)
    finally:
        for handle in handles:
            handle.remove()
    lost = {group.name: _leaving(model, group, readers) for group in groups}
    unread = [group for group in groups if not lost[group.name]]
    return {group.name: layer_mean(lost[group.name], group.size) for group in groups} | dict(l2(model, unread))


@dataclass
class _Reader:
    """What one layer reads: second moments of its columns, or (too wide, grouped) their mean squares alone."""

    layer: nn.Module
    moments: Tensor | float = 0.0  # (columns, columns), or (columns,)
    count: int = 0
    is_fitted: bool = field(init=False)
    span: int = field(init=False)  # columns of one input: the kernel's places, or one for all of them

    def __post_init__(self) -> None:
        weight = self.weight
        is_grouped = getattr(self.layer, "groups", 1) > 1
        self.is_fitted = not is_grouped and self.inputs <= reading.WIDEST
        self.span = weight[0, 0].numel() if has_windows(self.layer) else 1

    @property
    def weight(self) -> Tensor:
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def inputs(self) -> int:
        is_linear = isinstance(self.layer, nn.Linear)
        return int(self.layer.in_features if is_linear else self.layer.in_channels)  # type: ignore[arg-type]

    def watch(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = (windows if has_windows(module) else channels)(module, inputs[0].detach())
        self.moments = self.moments + (rows.T @ rows if self.is_fitted else rows.square().sum(0))
        self.count += len(rows)

    def matrix(self) -> Tensor:
        """(outputs, columns): the weight as a map of the columns; places of the kernel that share one are outputs."""
        weight = self.weight.double()
        if has_windows(self.layer) or isinstance(self.layer, nn.Linear):
            return weight.flatten(1)
        if isinstance(self.layer, nn.modules.conv._ConvTransposeNd):
            return weight.flatten(1).T  # (I, O/groups, *k)
        parts = getattr(self.layer, "groups", 1)
        split = weight.reshape(parts, -1, *weight.shape[1:]).flatten(3)  # (parts, O/parts, I/parts, places)
        return split.permute(1, 3, 0, 2).reshape(-1, self.inputs)


def _leaving(model: nn.Module, group: Group, readers: Mapping[nn.Module, _Reader]) -> list[Tensor]:
    """The costs of a group's channels, each at its turn: one tensor (size,), or none where nothing reads them."""
    places: dict[nn.Module, list[Tensor]] = {}
    for layer, _, inputs in layers(model, group, "in"):
        if readers[layer].count:  # others are never called: what uses their weight reads it unseen
            places.setdefault(layer, []).append(inputs.flatten(1))
    fixed, fitted = torch.zeros(group.size, dtype=torch.float64), list[_Fit]()
    for layer, found in places.items():
        reader, own = readers[layer], torch.cat(found, 1)  # (size, inputs of a channel)
        own = (own[:, :, None] * reader.span + torch.arange(reader.span)).flatten(1).to(reader.weight.device)
        moments, matrix = torch.as_tensor(reader.moments) / reader.count, reader.matrix()
        if not bool(moments.isfinite().all()):
            return [torch.full((group.size,), torch.nan)]  # the network is broken, which `select` says
        if not reader.is_fitted:
            lost = matrix.square().sum(0) * moments
            fixed += (lost[own].sum(1) / lost.sum().clamp(min=torch.finfo(torch.float64).tiny)).cpu()
        elif fit := _fit(matrix, moments, own):
            fitted.append(fit)
    return [_eliminate(fixed, fitted)] if places else []


@dataclass
class _Fit:
    """A layer as least squares has it: weights (size, b, outputs), inverse moments (size, b, size, b), b columns each.

    Columns of other groups are taken in: they stay, and take over their share.
    """

    weights: Tensor
    inverse: Tensor


def _fit(matrix: Tensor, moments: Tensor, own: Tensor) -> _Fit | None:
    """The layer in units of its outputs' energy; None where it gives nothing."""
    energy = float(((matrix @ moments) * matrix).sum())
    if energy <= 0:
        return None
    dead = moments.diagonal() == 0  # always 0: reading nothing, whatever its weight
    matrix = matrix.masked_fill(dead, 0.0) / energy**0.5
    scaled = moments + torch.diag(torch.where(dead, 1.0, RIDGE * moments.diagonal()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled))
    size, width = own.shape
    flat = own.flatten()
    return _Fit(matrix.T[flat].view(size, width, -1), inverse[flat][:, flat].view(size, width, size, width))


def _eliminate(fixed: Tensor, fitted: Sequence[_Fit]) -> Tensor:
    """Let the channels leave one by one, the cheapest first; what each costs at its turn, never falling: (size,)."""
    found, left, last = torch.zeros_like(fixed), list(range(len(fixed))), 0.0
    while left:
        costs = fixed[left]
        for fit in fitted:
            blocks = fit.inverse.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (left, b, b)
            factors = torch.linalg.cholesky(blocks)
            costs += torch.linalg.solve_triangular(factors, fit.weights, upper=False).square().sum((1, 2)).cpu()
        first = int(costs.argmin())
        last = max(float(costs[first]), last * (1 + 1e-6))  # ties would be broken by position
        found[left[first]] = last
        for fit in fitted:
            _remove(fit, first)
        left[first] = left[-1]  # as in `_remove`
        left.pop()
    return found


def _remove(fit: _Fit, channel: int) -> None:
    """Refit the layer without a channel, in place: W -= H^-1_:c ((H^-1)_cc)^-1 W_c, and H^-1 likewise.

    The last channel then takes its place, so that what is left lies together.
    """
    column = fit.inverse[:, :, channel].clone()  # (left, b, b)
    ratio = torch.linalg.solve(column[channel], column, left=False)  # column ((H^-1)_cc)^-1
    fit.weights -= ratio @ fit.weights[channel].clone()
    fit.inverse -= torch.tensordot(ratio, column, dims=([2], [2]))
    last = len(column) - 1
    fit.weights[channel] = fit.weights[last]
    fit.inverse[channel] = fit.inverse[last]
    fit.inverse[:, :, channel] = fit.inverse[:, :, last]
    fit.weights, fit.inverse = fit.weights[:last], fit.inverse[:last, :, :last]
