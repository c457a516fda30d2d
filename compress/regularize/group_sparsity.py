"""DepGraph's group sparsity: ridge on coupled channels, the weaker the stronger (Fang et al., arXiv 2301.12900)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.regularize.channels import Channels, channels
from compress.regularize.closed import closed
from compress.regularize.options import at_least, check
from compress.regularize.strength import Strength


class GroupSparsity(Strength):
    """strength / 2 * sum_g gamma_g ||w_g||_2^2,   gamma_g = 2^(alpha (Imax - I_g) / (Imax - Imin)).

    I_g is ||w_g||_2, as in the authors' code (the paper writes its square), Imax and Imin are its extremes in g's
    group of coupled channels, and gamma is held fixed in the gradient, strength * gamma_g * w, also theirs. w_g are
    all convolution weights that make or read the channel; the authors' code adds the scales of batch norms, which
    are left out here (ours: the same channels as in HALO and the group lasso).

    Args:
        strength: 5e-4, the authors' for CIFAR.
        alpha: 4, the paper's: the weakest channel is pulled 16 times as hard as the strongest.
    """

    def __init__(self, *, strength: float = 5e-4, alpha: float = 4.0) -> None:
        super().__init__(strength)
        check(alpha=at_least(alpha))
        self.alpha = alpha
        self._channels: Channels | None = None

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Hold the weights of all groups that can be cut."""
        self._channels = channels(model, groups)

    def penalty(self) -> Tensor:
        """The sum, shape (), its gradient in closed form, gamma held fixed."""
        held, strength = self._held(), self.strength
        squares = held.squares()
        factor = self._shrink(squares.sqrt())
        value = strength / 2 * (factor * squares).sum()
        return closed(value, lambda grad: held.pull(grad * strength * factor), held.tensors)

    def scores(self) -> Mapping[str, Tensor]:
        """||w_g||_2, the importance that the penalty itself goes by."""
        held = self._held()
        return held.by_group(held.squares().sqrt())

    def detach(self) -> None:
        self._channels = None

    def _shrink(self, norms: Tensor) -> Tensor:
        """gamma of every channel, 1 where all channels of a group are equal: (channels,)."""
        found = []
        for own in torch.split(norms, [group.size for group in self._held().groups]):
            low, high = torch.aminmax(own)
            found.append(torch.exp2(self.alpha * (high - own) / (high - low).clamp(min=1e-30)))
        return torch.cat(found)

    def _held(self) -> Channels:
        assert self._channels is not None, "attach first"
        return self._channels
