"""Sparsity regularisers that drop into any training loop, and the table that names them."""

from __future__ import annotations

from collections.abc import Callable

from compress.regularize.bn_slimming import BnSlimming as BnSlimming
from compress.regularize.cka_sr import CkaSr as CkaSr
from compress.regularize.ffr import Ffr as Ffr
from compress.regularize.group_lasso import GroupLasso as GroupLasso
from compress.regularize.group_sparsity import GroupSparsity as GroupSparsity
from compress.regularize.growing_reg import GrowingReg as GrowingReg
from compress.regularize.halo import Halo as Halo
from compress.regularize.lasso import Lasso as Lasso
from compress.regularize.protocol import Regularizer as Regularizer

REGULARIZERS: dict[str, Callable[[], Regularizer]] = {
    "halo": Halo,
    "ffr": Ffr,
    "cka-sr": CkaSr,
    "lasso": Lasso,
    "group-lasso": GroupLasso,
    "group-sparsity": GroupSparsity,
    "bn-slimming": BnSlimming,
    "growing-reg": GrowingReg,
}
