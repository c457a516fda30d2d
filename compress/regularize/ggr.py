"""GGR: sparse training whose layers gain and lose weights by global gradients (Parger et al., arXiv 2210.14012)."""

from __future__ import annotations

from compress.regularize.densities import Initial
from compress.regularize.sparse_training import First, SparseTraining, Start, Updates
from compress.regularize.topology import Drop


class Ggr(SparseTraining):
    """Drop the smallest weights; the global top gradients of dead ones say how many each layer gets back.

    Every `interval` steps: each layer drops its share, N weights in all; k_l, what layer l gets back, is how many of
    the N largest |gradients| of all dead weights lie in it; round((1 - rho) * k_l) of them grow at its largest
    gradients and the rest at random. Gradients are summed over the four batches before; new weights are 0; what has
    just been dropped does not grow at once; each layer keeps as many weights as it has outputs and 0.5 % of its own
    (all ours).

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
        drop: the smallest weights of each `layer`, or smallest of all (`global`).
        rho: share of the new weights that grow at random (ours: 0.5).
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
        drop: Drop = "layer",
        rho: float = 0.5,
        seed: int = 0,
    ) -> None:
        updates = Updates(steps, interval, fraction, end, drop=drop, rho=rho, across=True)
        super().__init__(Start(density, initial, weights, seed, classifier), updates)
