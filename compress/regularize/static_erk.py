"""Static ERK: training on a sparse topology chosen once (the baseline of Evci et al., arXiv 1911.11134)."""

from __future__ import annotations

from compress.regularize.densities import Initial
from compress.regularize.sparse_training import First, SparseTraining, Start


class StaticErk(SparseTraining):
    """The weights that live at the start live to the end; by default each layer as dense as Erdos-Renyi-Kernel says.

    Args:
        density: share of the masked weights that live; masked are those of convolutions, and of linear layers where
            these hold the larger part (`channels.maskable`).
        initial: how the layers compare at the start: erk, uniform, or a mapping of layer names to densities.
        weights: which of a layer's weights live at the start: the largest (`magnitude`) or `random` ones. The largest
            is right for a pretrained network, and in a fresh one it is a random choice, too, only of larger weights,
            which make up for the inputs that each filter has lost.
        classifier: whether the last linear layer is thinned as well.
        seed: of the random choice.
    """

    def __init__(
        self,
        *,
        density: float = 0.05,
        initial: Initial = "erk",
        weights: First = "magnitude",
        classifier: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(Start(density, initial, weights, seed, classifier))
