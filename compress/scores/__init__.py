"""How much each channel matters: one function per importance, and the table that names them.

Every score is `(model, groups, batches=None) -> {group name: (size,) float32 on the CPU}`, larger = keep. Those in
DATA_DRIVEN raise UsageError without batches; the others read weights only. A layer's values are divided by their mean
before layers of one group are averaged, so that no layer drowns another.
"""

from __future__ import annotations

from compress.scores.layers import Batches as Batches
from compress.scores.layers import Score as Score
from compress.scores.layers import Scores as Scores
from compress.scores.reconstruction import obs
from compress.scores.samples import activation, hessian, obd_c, taylor
from compress.scores.weights import bn_scale, fpgm, l1, l2, lamp, random

SCORES: dict[str, Score] = {
    "l1": l1,
    "l2": l2,
    "bn-scale": bn_scale,
    "fpgm": fpgm,
    "lamp": lamp,
    "taylor": taylor,
    "hessian": hessian,
    "obd-c": obd_c,
    "activation": activation,
    "obs": obs,
    "random": random,
}
DATA_DRIVEN = frozenset({"taylor", "hessian", "obd-c", "activation", "obs"})  # the names in SCORES that need batches
LOSS_DRIVEN = frozenset({"taylor", "hessian"})  # those of them that take the `loss` to differentiate: a task's
