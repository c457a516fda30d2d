"""SET: sparse training that moves its smallest weights to random places (Mocanu et al., arXiv 1707.04780)."""

from __future__ import annotations

from compress.regularize.densities import Initial
from compress.regularize.sparse_training import First, SparseTraining, Start, Updates


class SetTraining(SparseTraining):
    """Each layer drops its smallest weights and grows as many at random (algorithm 1; zeta is `fraction`).

    Differences: the share that moves falls by a cosine and the weights start from ERK, as Evci et al. run it
    (arXiv 1911.11134); new weights start at 0 and none of those just dropped returns at once (ours).

    Args:
        density: share of the masked weights that live; masked are those of convolutions, and of linear layers where
            these hold the larger part (`channels.maskable`).
        initial: how the layers compare at the start: erk, uniform, or a mapping of layer names to densities.
        weights: which of a layer's weights live at the start: the largest (`magnitude`) or `random` ones. The largest
            is right for a pretrained network, and in a fresh one it is a random choice, too, only of larger weights,
            which make up for the inputs that each filter has lost.
        classifier: whether the last linear layer is thinned as well.
        steps: optimiser steps of the whole training; None: not known, then `fraction` stays as it is, for ever.
        interval, fraction, end: an update every `interval` steps drops `fraction` of the living weights at first, by
            a cosine to none at the share `end` of the steps (ours: RigL's values).
        seed: of the random choices, with the step.
    """

    def __init__(
        self,
        *,
        density: float = 0.05,
        initial: Initial = "erk",
        weights: First = "magnitude",
        classifier: bool = False,
        steps: int | None = None,
        interval: int = 100,
        fraction: float = 0.3,
        end: float = 0.75,
        seed: int = 0,
    ) -> None:
        updates = Updates(steps, interval, fraction, end, drop="layer", rho=1.0, across=False)
        super().__init__(Start(density, initial, weights, seed, classifier), updates)
