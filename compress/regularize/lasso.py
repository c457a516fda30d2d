"""Lasso: the L1 norm of all convolution weights (Tibshirani 1996; for filters, Li et al., arXiv 1608.08710)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.regularize.channels import filter_sizes, penalised
from compress.regularize.closed import closed
from compress.regularize.options import above, check


class Lasso:
    """strength * sum_j |w_j| over all convolution weights and what else `maskable` names: no bias, norm or classifier.

    Args:
        strength: 1e-5 (ours: about a tenth of the loss of guessing for ResNet-20; `scale_penalty` changes it).
    """

    STRENGTHS = ("strength",)

    def __init__(self, *, strength: float = 1e-5) -> None:
        check(strength=above(strength))
        self.strength = strength
        self._weights: list[nn.Parameter] = []
        self._groups: tuple[Group, ...] = ()
        self._model: nn.Module | None = None

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Hold the convolution weights of `model`, and the linear ones where `maskable` names them.

        Raises:
            ValueError: there is no such weight.
        """
        self._weights = penalised(model, ("weight",))
        self._model, self._groups = model, tuple(groups)

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def penalty(self) -> Tensor:
        held, strength = self._weights, self.strength
        value = strength * torch.stack([w.detach().abs().sum() for w in held]).sum()
        return closed(value, lambda grad: [w.detach().sign().mul_(grad * strength) for w in held], held)

    def after_step(self) -> None:
        """Nothing to project."""

    def scores(self) -> Mapping[str, Tensor]:
        """sum |w| of the filter, in units of its layer's mean, averaged over the group's layers."""
        assert self._model is not None
        return {group.name: filter_sizes(self._model, group) for group in self._groups}

    def detach(self) -> None:
        self._weights, self._groups, self._model = [], (), None

    def scale_penalty(self, factor: float) -> None:
        self.strength *= factor

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.strength = float(state["strength"])
