"""HALO: a lasso whose shrinkage is learned per weight or per channel (Seto, Wells and Zhang, arXiv 2008.10183)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.groups.parts import rows, weights
from compress.regularize.channels import Channels, channels, filter_sizes, penalised
from compress.regularize.closed import closed
from compress.regularize.options import above, at_least, check, one_of

log = logging.getLogger(__name__)
PATIENCE = 100  # steps after which a lambda that has not moved is spoken of; a warm-up may be slow to begin
GUARD = 1e-4  # below every value lambda reaches; without it 1 / lambda^3 spikes when a dead weight revives


class Halo:
    """xi * sum_j u_j / lambda_j^2 + psi * | sum_j |lambda_j| - target |   (equation 3 of the paper).

    `u_j` is |w_j| for each convolution parameter and whatever else `maskable` names (granularity `weight`, the paper's)
    or sqrt(n_g) * ||w_g||_2 for each channel group (granularity `filter`, ours: what removing filters needs), w_g being
    all weights of convolutions and hidden linear layers that make or read the channel, n_g their number.

    Solver `sgd` is the paper's: lambda starts at 1 and is trained by the same optimiser as the weights, *with weight
    decay*. The decay is what moves it: lambda settles at (2 xi u / decay)^(1/4), which makes the profiled penalty
    sqrt(2 xi decay u). Without decay lambda stays at 1 and nothing is adaptive. Solver `closed-form` (ours) puts
    lambda there at every step: no second parameter vector, no 160 epochs of waiting.

    Args:
        xi: weight of the penalty; the paper's 1e-8 belongs to 160 epochs from scratch. `scale_penalty` changes it.
        psi: weight of the second term (`sgd` only). The paper's value.
        target: P of the paper, the wanted sum of |lambda|.
        lambda_weight_decay: the optimiser's decay on lambda; for `sgd`, give `parameters()` this decay.
        solver: `closed-form` or `sgd`.
        granularity: `filter` or `weight`.
    """

    STRENGTHS = ("xi",)

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
        decay = at_least(lambda_weight_decay) if solver == "sgd" else above(lambda_weight_decay)
        check(
            solver=one_of(solver, "closed-form", "sgd"), granularity=one_of(granularity, "filter", "weight"),
            xi=above(xi), psi=at_least(psi), target=at_least(target), lambda_weight_decay=decay,
        )  # fmt: skip
        self.xi, self.psi, self.target = xi, psi, target
        self.lambda_weight_decay = lambda_weight_decay
        self.solver, self.granularity = solver, granularity
        self._tensors: tuple[nn.Parameter, ...] = ()  # what is penalised
        self._channels: Channels | None = None  # whose they are (filter)
        self._groups: tuple[Group, ...] = ()
        self._model: nn.Module | None = None
        self._lambda: list[nn.Parameter] = []  # one for all channels, (channels,), or one beside each tensor, like it
        self._steps = 0  # since it was attached

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Hold the penalised parameters of `model`; `groups` say which weights belong to a channel."""
        self._model, self._groups = model, tuple(groups)
        if self.granularity == "filter":
            self._channels = channels(model, groups)
            self._tensors = self._channels.tensors
        else:
            self._tensors = tuple(penalised(model))
        if self.solver == "sgd":
            shaped = self._tensors if self._channels is None else (self._channels.elements,)
            self._lambda, self._steps = [nn.Parameter(torch.ones_like(t.detach())) for t in shaped], 0

    def parameters(self) -> Iterable[nn.Parameter]:
        """lambda where it is trained (`sgd`), for the optimiser; none else."""
        return list(self._lambda)

    def penalty(self) -> Tensor:
        """The two terms, shape (), differentiable in the weights and (`sgd`) in lambda, gradients in closed form.

        Solver `closed-form` holds lambda fixed in the gradient, as `sgd` does between two steps: that is twice the
        slope that the value has as a function of the weights alone.
        """
        if self._channels is not None:
            return self._by_channel(self._channels)
        return self._by_weight_and_lambda() if self._lambda else self._by_weight()

    def after_step(self) -> None:
        """Keep a trained lambda above zero, and say so where nothing trains it."""
        if not self._lambda:
            return
        with torch.no_grad():
            for own in self._lambda:
                own.clamp_(min=GUARD)
        self._steps += 1
        if self._steps == PATIENCE and all(bool((own == 1).all()) for own in self._lambda):
            log.warning(
                "lambda is still 1 everywhere after %d steps, and nothing is adaptive: give halo.parameters() to the "
                "optimiser, with weight_decay=%g", PATIENCE, self.lambda_weight_decay,
            )  # fmt: skip

    def scores(self) -> Mapping[str, Tensor]:
        """Ours: magnitude over its learned shrinkage.

        `filter`: ||w_g||_2 * lambda_g^2 / sqrt(n_g); `weight`: |w_j| * lambda_j^2 summed over the filter.
        """
        with torch.no_grad():
            size = self.sizes()
            shrink = self.shrinkage(size)
            if self._channels is not None:
                return self._channels.by_group(size / self._channels.elements * shrink.square())
            return self._filter_sums(size * shrink.square())

    def lambdas(self) -> dict[str, float]:
        """The mean lambda over the channels of each free group (`filter`) or the weights of each tensor (`weight`)."""
        with torch.no_grad():
            found = self.shrinkage(self.sizes())
            if self._channels is not None:
                own = self._channels.by_group(found)
                return {group.name: float(own[group.name].mean()) for group in self._channels.groups}
            assert self._model is not None, "attach first"
            names = {id(tensor): name for name, tensor in self._model.named_parameters()}
            parts = torch.split(found, [t.numel() for t in self._tensors])
            return {names[id(t)]: float(part.mean()) for t, part in zip(self._tensors, parts, strict=True)}

    def weight_scores(self) -> dict[str, Tensor]:
        """|w_j| * lambda_j^2 of each penalised tensor by its name; nothing at granularity `filter`."""
        if self._model is None or self._channels is not None:
            return {}
        with torch.no_grad():
            size = self.sizes()
            worth = size * self.shrinkage(size).square()
        names = {id(tensor): name for name, tensor in self._model.named_parameters()}
        parts = torch.split(worth, [t.numel() for t in self._tensors])
        return {names[id(t)]: part.view_as(t) for t, part in zip(self._tensors, parts, strict=True)}

    def _filter_sums(self, worth: Tensor) -> dict[str, Tensor]:
        """A value per penalised weight, added up over the filters that make each channel."""
        assert self._model is not None
        parts = torch.split(worth, [t.numel() for t in self._tensors])
        laid = {id(t): part.view_as(t) for t, part in zip(self._tensors, parts, strict=True)}
        found: dict[str, Tensor] = {}
        for group in self._groups:
            own = [(part, laid[id(tensor)]) for part, tensor in weights(self._model, group) if id(tensor) in laid]
            if not own:  # made by layers that are not penalised: by size, as every other method would
                found[group.name] = filter_sizes(self._model, group).float().cpu()
                continue
            found[group.name] = torch.stack([rows(t, part, group.size).sum(1) for part, t in own]).sum(0).float().cpu()
        return found

    def detach(self) -> None:
        self._tensors, self._channels, self._groups, self._model = (), None, (), None
        self._lambda = []

    def scale_penalty(self, factor: float) -> None:
        """Multiply the first term by `factor`; it grows with sqrt(xi) when lambda follows xi."""
        self.xi *= factor**2 if self.solver == "closed-form" else factor
        if self.solver == "sgd":
            self.psi *= factor

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"xi": self.xi, "psi": self.psi}
        if self._lambda:
            state["lambda"] = torch.cat([own.detach().flatten() for own in self._lambda])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.xi, self.psi = float(state["xi"]), float(state["psi"])
        if self._lambda and "lambda" in state:
            with torch.no_grad():
                kept = torch.split(state["lambda"], [own.numel() for own in self._lambda])
                for own, values in zip(self._lambda, kept, strict=True):
                    own.copy_(values.view(own.shape))

    def sizes(self) -> Tensor:
        """u: |w_j| for every parameter, or sqrt(n_g) * ||w_g||_2 for every channel, as one vector without gradient."""
        if self._channels is None:
            return torch.cat([t.detach().abs().flatten() for t in self._tensors])
        return (self._channels.squares() * self._channels.elements).sqrt_()

    def shrinkage(self, size: Tensor) -> Tensor:
        """lambda in the order of `sizes`: the trained one, or its equilibrium (2 xi u / decay)^(1/4) at u = `size`."""
        if self._lambda:
            return torch.cat([own.detach().flatten() for own in self._lambda])
        return (2 * self.xi / self.lambda_weight_decay * size).pow(0.25).clamp_(min=GUARD)

    def _by_channel(self, held: Channels) -> Tensor:
        size = self.sizes()
        shrink = self.shrinkage(size)
        value = self.xi * (size / shrink.square()).sum()
        total = shrink.abs().sum() - self.target

        def slopes(grad: Tensor) -> list[Tensor]:
            slope = held.elements / size.clamp(min=1e-30)  # u = sqrt(n) ||w||: d u / d w = n w / u
            pull = held.pull(torch.where(size > 0, grad * self.xi / shrink.square() * slope, 0.0))
            if not self._lambda:
                return pull
            own = self.psi * torch.sign(total) * torch.sign(shrink) - 2 * self.xi * size / shrink.pow(3)
            return [own.mul_(grad), *pull]

        if not self._lambda:
            return closed(value, slopes, held.tensors)
        return closed(value + self.psi * total.abs(), slopes, (*self._lambda, *held.tensors))

    # By weight, there are as many sizes and lambdas as weights. What follows goes through them tensor by tensor, so
    # that no vector of them all is made, and in the tensors' own memory format: mixing two takes several times as long.

    def _by_weight(self) -> Tensor:
        factor = 2 * self.xi / self.lambda_weight_decay

        def squares(weight: Tensor) -> Tensor:  # lambda^2 at its equilibrium
            return weight.abs().mul_(factor).sqrt_().clamp_(min=GUARD**2)

        def slopes(grad: Tensor) -> list[Tensor]:
            return [w.sign().mul_(grad * self.xi).div_(squares(w)) for w in held]

        held = [tensor.detach() for tensor in self._tensors]
        value = self.xi * torch.stack([w.abs().div_(squares(w)).sum() for w in held]).sum()
        return closed(value, slopes, self._tensors)

    def _by_weight_and_lambda(self) -> Tensor:
        held = [(t.detach(), own.detach()) for t, own in zip(self._tensors, self._lambda, strict=True)]
        value = self.xi * torch.stack([w.abs().div_(own).div_(own).sum() for w, own in held]).sum()
        total = torch.stack([own.abs().sum() for _, own in held]).sum() - self.target
        above = self.psi * torch.sign(total)

        def slopes(grad: Tensor) -> list[Tensor]:
            steep, pulls = list[Tensor](), list[Tensor]()
            for w, own in held:
                pull = w.sign().mul_(grad * self.xi).div_(own).div_(own)
                # w * pull = xi |w| / lambda^2
                steep.append(own.sign().mul_(above * grad).sub_((w * pull).div_(own), alpha=2))
                pulls.append(pull)
            return [*steep, *pulls]

        return closed(value + self.psi * total.abs(), slopes, (*self._lambda, *self._tensors))
