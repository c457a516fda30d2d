"""HALO: a lasso whose shrinkage is learned per weight or per channel (Seto, Wells and Zhang, arXiv 2008.10183)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.groups import Group, Slice
from compress.groups.parts import rows, weights

GUARD = 1e-4  # below every value lambda reaches; without it 1 / lambda^3 spikes when a dead weight revives


class Halo:
    """xi * sum_j u_j / lambda_j^2 + psi * | sum_j |lambda_j| - target |   (equation 3 of the paper).

    `u_j` is |w_j| for each convolution parameter (granularity `weight`, the paper's) or sqrt(n_g) * ||w_g||_2 for each
    channel group (granularity `filter`, ours: what removing filters needs), w_g being all convolution weights that
    make or read the channel, n_g their number.

    Solver `sgd` is the paper's: lambda starts at 1 and is trained by the same optimiser as the weights, *with weight
    decay*. The decay is what moves it: lambda settles at (2 xi u / decay)^(1/4), which makes the profiled penalty
    sqrt(2 xi decay u). Without decay lambda stays at 1 and nothing is adaptive. Solver `closed-form` (ours) puts
    lambda there at every step: no second parameter vector, no 160 epochs of waiting.

    Args:
        xi: weight of the penalty; the paper's 1e-8 belongs to 160 epochs from scratch. `scale_penalty` changes it.
        psi: weight of the second term (`sgd` only). The paper's value.
        target: P of the paper, the wanted sum of |lambda|.
        lambda_weight_decay: the optimiser's decay on lambda; for `sgd`, give `parameters()` this decay.
    """

    def __init__(
        self,
        *,
        xi: float = 1e-8,
        psi: float = 1e-8,
        target: float = 0.0,
        lambda_weight_decay: float = 1e-4,
        solver: Literal["closed-form", "sgd"] = "closed-form",
        granularity: Literal["filter", "weight"] = "filter",
    ) -> None:
        if not ((xi > 0 and psi >= 0 and lambda_weight_decay > 0) or (solver == "sgd" and lambda_weight_decay == 0)):
            raise ValueError("xi and lambda_weight_decay must be positive and psi at least 0")
        self.xi, self.psi, self.target = xi, psi, target
        self.lambda_weight_decay = lambda_weight_decay
        self.solver, self.granularity = solver, granularity
        self._tensors: list[nn.Parameter] = []  # what is penalised
        self._units: list[tuple[_Unit, ...]] = []  # beside it, the groups' holds on each tensor (filter)
        self._elements = torch.ones(0)  # n_g: (channels,) (filter)
        self._groups: tuple[Group, ...] = ()
        self._model: nn.Module | None = None
        self._lambda: nn.Parameter | None = None

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Hold the convolution parameters of `model`; `groups` say which weights belong to a channel."""
        self._model, self._groups = model, tuple(groups)
        if self.granularity == "filter":
            self._tensors, self._units, count = _by_channel(model, groups)
            self._elements = count.to(self._tensors[0])
        else:
            self._tensors = _conv_parameters(model)
        if self.solver == "sgd":
            self._lambda = nn.Parameter(torch.ones_like(self.sizes()))

    def parameters(self) -> Iterable[nn.Parameter]:
        return [self._lambda] if self._lambda is not None else []

    def penalty(self) -> Tensor:
        """The two terms, shape (), differentiable in the weights and (`sgd`) in lambda, gradients in closed form."""
        own = [] if self._lambda is None else [self._lambda]
        total: Tensor = _Penalty.apply(self, *own, *self._tensors)  # type: ignore[no-untyped-call]
        return total

    def after_step(self) -> None:
        if self._lambda is not None:
            with torch.no_grad():
                self._lambda.clamp_(min=GUARD)

    def scores(self) -> Mapping[str, Tensor]:
        """Ours: magnitude over its learned shrinkage.

        `filter`: ||w_g||_2 * lambda_g^2 / sqrt(n_g); `weight`: |w_j| * lambda_j^2 summed over the filter.
        """
        with torch.no_grad():
            size = self.sizes()
            shrink = self.shrinkage(size)
            if self.granularity == "filter":
                flat = (size / self._elements * shrink.square()).float().cpu()
                parts = torch.split(flat, [group.size for group in self._groups])
                return {group.name: part for group, part in zip(self._groups, parts, strict=True)}
            return self._filter_sums(size * shrink.square())

    def _filter_sums(self, worth: Tensor) -> dict[str, Tensor]:
        """A value per penalised weight, added up over the filters that make each channel."""
        assert self._model is not None
        parts = torch.split(worth, [t.numel() for t in self._tensors])
        laid = {id(t): part.view_as(t) for t, part in zip(self._tensors, parts, strict=True)}
        found: dict[str, Tensor] = {}
        for group in self._groups:
            total = worth.new_zeros(group.size)
            for part, tensor in weights(self._model, group):
                if id(tensor) in laid:
                    total += rows(laid[id(tensor)], part, group.size).sum(1)
            found[group.name] = total.float().cpu()
        return found

    def detach(self) -> None:
        self._tensors, self._units, self._groups, self._model, self._lambda = [], [], (), None, None
        self._elements = torch.ones(0)

    def scale_penalty(self, factor: float) -> None:
        """Multiply the first term by `factor`; it grows with sqrt(xi) when lambda follows xi."""
        self.xi *= factor**2 if self.solver == "closed-form" else factor
        if self.solver == "sgd":
            self.psi *= factor

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"xi": self.xi, "psi": self.psi}
        if self._lambda is not None:
            state["lambda"] = self._lambda.detach().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.xi, self.psi = float(state["xi"]), float(state["psi"])
        if self._lambda is not None:
            with torch.no_grad():
                self._lambda.copy_(state["lambda"])

    def sizes(self) -> Tensor:
        """u: |w_j| for every parameter, or sqrt(n_g) * ||w_g||_2 for every channel, as one vector without gradient."""
        if self.granularity == "weight":
            return torch.cat([t.detach().abs().flatten() for t in self._tensors])
        squares = torch.zeros_like(self._elements)
        for tensor, units in zip(self._tensors, self._units, strict=True):
            squared = tensor.detach().square()
            for unit in units:
                unit.add_to(squares, squared)
        return (squares * self._elements).sqrt_()

    def shrinkage(self, size: Tensor) -> Tensor:
        """lambda: the trained one, or its equilibrium (2 xi u / decay)^(1/4) at u = `size`."""
        if self._lambda is not None:
            return self._lambda.detach()
        return (2 * self.xi / self.lambda_weight_decay * size).pow(0.25).clamp_(min=GUARD)


@dataclass(frozen=True)
class _Unit:
    """One group's hold on one tensor; the group's channels are `start` to `start + size - 1` of all channels."""

    part: Slice
    start: int
    size: int

    def add_to(self, sums: Tensor, values: Tensor) -> None:
        other = [dim for dim in range(values.dim()) if dim != self.part.dim]
        along = values.sum(other) if other else values
        held = along[self.part.offset : self.part.offset + self.size * self.part.block]
        sums[self.start : self.start + self.size] += held.view(self.size, self.part.block).sum(1)

    def spread(self, per_channel: Tensor, like: Tensor) -> Tensor:
        """Values per channel laid along this tensor's axis, zero outside the group: broadcastable to the tensor."""
        along = like.new_zeros(like.shape[self.part.dim])
        held = per_channel[self.start : self.start + self.size].repeat_interleave(self.part.block)
        along[self.part.offset : self.part.offset + held.numel()] = held.to(like.dtype)
        shape = [1] * like.dim()
        shape[self.part.dim] = -1
        return along.view(shape)


class _Penalty(torch.autograd.Function):
    """The penalty with its gradient written out, so that no graph over all weights is kept."""

    @staticmethod
    def forward(ctx: Any, halo: Halo, *inputs: Tensor) -> Tensor:
        size = halo.sizes()
        shrink = halo.shrinkage(size)
        ctx.halo, ctx.size, ctx.shrink = halo, size, shrink
        value = halo.xi * (size / shrink.square()).sum()
        if halo._lambda is not None:
            value = value + halo.psi * (shrink.abs().sum() - halo.target).abs()
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        halo, size, shrink = ctx.halo, ctx.size, ctx.shrink
        pull = grads[0] * halo.xi / shrink.square()  # d value / d u
        own: list[Tensor] = []
        if halo._lambda is not None:
            above = torch.sign(shrink.abs().sum() - halo.target) * torch.sign(shrink)
            own.append(grads[0] * (-2 * halo.xi * size / shrink.pow(3) + halo.psi * above))
        return None, *own, *_weight_gradients(halo, size, pull)


def _weight_gradients(halo: Halo, size: Tensor, pull: Tensor) -> list[Tensor]:
    """Chain `d value / d u` on to the weights: u = |w|, or u = sqrt(n) * ||w|| with d u / d w = n * w / u."""
    if halo.granularity == "weight":
        parts = torch.split(pull, [t.numel() for t in halo._tensors])
        return [part.view_as(t) * t.detach().sign() for t, part in zip(halo._tensors, parts, strict=True)]
    slope = torch.where(size > 0, pull * halo._elements / size.clamp(min=1e-30), 0.0)
    found: list[Tensor] = []
    for tensor, units in zip(halo._tensors, halo._units, strict=True):
        factor = units[0].spread(slope, tensor)
        for unit in units[1:]:
            factor = factor + unit.spread(slope, tensor)
        found.append(tensor.detach() * factor)
    return found


def _conv_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every learned convolution weight and bias; batch norm and the classifier have no lambda in the paper."""
    return [
        parameter
        for module in model.modules()
        if isinstance(module, nn.modules.conv._ConvNd)
        for parameter in (module.weight, module.bias)
        if isinstance(parameter, nn.Parameter) and parameter.requires_grad
    ]


def _by_channel(
    model: nn.Module, groups: Sequence[Group]
) -> tuple[list[nn.Parameter], list[tuple[_Unit, ...]], Tensor]:
    """The penalised tensors, the groups' holds on each, and n_g: (channels,), 1 for a channel without weights."""
    convolution = set(_conv_parameters(model)) or set(model.parameters())
    holds: dict[nn.Parameter, list[_Unit]] = {}
    count = torch.zeros(sum(group.size for group in groups))
    start = 0
    for group in groups:
        for part, tensor in weights(model, group, ("out", "in")):
            if isinstance(tensor, nn.Parameter) and tensor in convolution and group.frozen is None:
                holds.setdefault(tensor, []).append(_Unit(part, start, group.size))
                count[start : start + group.size] += tensor.numel() // tensor.shape[part.dim] * part.block
        start += group.size
    return list(holds), [tuple(units) for units in holds.values()], count.clamp_(min=1)
