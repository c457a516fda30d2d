"""Network Slimming: L1 on the scales of all batch norms (Liu et al., arXiv 1708.06519, equation 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.groups import Group
from compress.groups.parts import layer_mean, scales
from compress.regularize.channels import filter_sizes
from compress.regularize.closed import closed
from compress.regularize.strength import Strength


class BnSlimming(Strength):
    """strength * sum |gamma| over the scales of every batch norm, with the subgradient sign(gamma).

    Args:
        strength: 1e-4, the paper's for CIFAR.
    """

    def __init__(self, *, strength: float = 1e-4) -> None:
        super().__init__(strength)
        self._scales: list[nn.Parameter] = []
        self._groups: tuple[Group, ...] = ()
        self._model: nn.Module | None = None

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Hold the scales of `model`; UsageError if it has no batch norm with a learned scale."""
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine]
        self._scales = [norm.weight for norm in norms if norm.weight.requires_grad]
        if not self._scales:
            raise UsageError(
                "bn-slimming shrinks the scales of batch norms, and this network has none; take group-lasso"
            )
        self._model, self._groups = model, tuple(groups)

    def penalty(self) -> Tensor:
        """The sum, shape (), with its subgradient."""
        held, strength = self._scales, self.strength
        value = strength * torch.cat([gamma.detach() for gamma in held]).abs().sum()
        return closed(value, lambda grad: [gamma.detach().sign().mul_(grad * strength) for gamma in held], held)

    def scores(self) -> Mapping[str, Tensor]:
        """|gamma| in units of its layer's mean, averaged over the norms the channel passes; filters' L1 without any."""
        assert self._model is not None
        found: dict[str, Tensor] = {}
        for group in self._groups:
            passed = [gamma.abs() for _, gamma in scales(self._model, group)]
            found[group.name] = layer_mean(passed, group.size) if passed else filter_sizes(self._model, group)
        return found

    def detach(self) -> None:
        self._scales, self._groups, self._model = [], (), None
