"""Lasso: the L1 norm of all convolution weights (Tibshirani 1996; for filters, Li et al., arXiv 1608.08710)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.regularize.channels import filter_sizes, penalised
from compress.regularize.closed import closed
from compress.regularize.strength import Strength


class Lasso(Strength):
    """strength * sum_j |w_j| over all convolution weights and what else `maskable` names: no bias, norm or classifier.

    Args:
        strength: 1e-5 (ours: about a tenth of the loss of guessing for ResNet-20; `scale_penalty` changes it).
    """

    def __init__(self, *, strength: float = 1e-5) -> None:
        super().__init__(strength)
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

    def penalty(self) -> Tensor:
        """The sum, shape (), its gradient in closed form."""
        held, strength = self._weights, self.strength
        value = strength * torch.stack([w.detach().abs().sum() for w in held]).sum()
        return closed(value, lambda grad: [w.detach().sign().mul_(grad * strength) for w in held], held)

    def scores(self) -> Mapping[str, Tensor]:
        """sum |w| of the filter, in units of its layer's mean, averaged over the group's layers."""
        assert self._model is not None
        return {group.name: filter_sizes(self._model, group) for group in self._groups}

    def detach(self) -> None:
        self._weights, self._groups, self._model = [], (), None
