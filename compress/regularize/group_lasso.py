"""Group lasso over coupled channels (Yuan and Lin 2006; for filters, Wen et al., arXiv 1608.03665, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.regularize.channels import Channels, channels
from compress.regularize.closed import closed
from compress.regularize.strength import Strength


class GroupLasso(Strength):
    """strength * sum_g sqrt(n_g) ||w_g||_2, w_g being all convolution weights that make or read channel g.

    That is HALO by channel with lambda held at 1. Wen et al. leave out the factor sqrt(n_g) of Yuan and Lin, and take
    the filters of single layers; coupled channels leave together, so that they are one group here.

    Args:
        strength: 1e-5 (ours: about a tenth of the loss of guessing for ResNet-20; `scale_penalty` changes it).
    """

    def __init__(self, *, strength: float = 1e-5) -> None:
        super().__init__(strength)
        self._channels: Channels | None = None

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Hold the weights of all groups that can be cut."""
        self._channels = channels(model, groups)

    def penalty(self) -> Tensor:
        """The sum, shape (), its gradient in closed form."""
        held, strength = self._held(), self.strength
        norms = held.squares().sqrt_()

        def slopes(grad: Tensor) -> list[Tensor]:
            each = grad * strength * held.elements.sqrt() / norms.clamp(min=1e-30)
            return held.pull(torch.where(norms > 0, each, 0.0))

        return closed(strength * (held.elements.sqrt() * norms).sum(), slopes, held.tensors)

    def scores(self) -> Mapping[str, Tensor]:
        """||w_g||_2 / sqrt(n_g) (ours: what the penalty shrinks, per weight)."""
        held = self._held()
        return held.by_group((held.squares() / held.elements).sqrt())

    def detach(self) -> None:
        self._channels = None

    def _held(self) -> Channels:
        assert self._channels is not None, "attach first"
        return self._channels
