"""Sparsity regularisers that drop into any training loop, and the table that names them."""

from __future__ import annotations

from collections.abc import Callable

from compress.regularize.bn_slimming import BnSlimming as BnSlimming
from compress.regularize.cka_sr import CkaSr as CkaSr
from compress.regularize.ffr import Ffr as Ffr
from compress.regularize.ggr import Ggr as Ggr
from compress.regularize.group_lasso import GroupLasso as GroupLasso
from compress.regularize.group_sparsity import GroupSparsity as GroupSparsity
from compress.regularize.growing_reg import GrowingReg as GrowingReg
from compress.regularize.halo import Halo as Halo
from compress.regularize.keep_zeros import KeepZeros as KeepZeros
from compress.regularize.lasso import Lasso as Lasso
from compress.regularize.protocol import COUNTERS as COUNTERS
from compress.regularize.protocol import Regularizer as Regularizer
from compress.regularize.protocol import begun as begun
from compress.regularize.protocol import chosen as chosen
from compress.regularize.protocol import given_places as given_places
from compress.regularize.protocol import is_given as is_given
from compress.regularize.protocol import lambdas as lambdas
from compress.regularize.protocol import numbers as numbers
from compress.regularize.rigl import Rigl as Rigl
from compress.regularize.set_training import SetTraining as SetTraining
from compress.regularize.static_erk import StaticErk as StaticErk

REGULARIZERS: dict[str, Callable[[], Regularizer]] = {
    "halo": Halo,
    "ffr": Ffr,
    "cka-sr": CkaSr,
    "lasso": Lasso,
    "group-lasso": GroupLasso,
    "group-sparsity": GroupSparsity,
    "bn-slimming": BnSlimming,
    "growing-reg": GrowingReg,
    "ggr": Ggr,
    "rigl": Rigl,
    "set": SetTraining,
    "static-erk": StaticErk,
}
SPARSE_TRAINING = frozenset({"ggr", "rigl", "set", "static-erk"})  # masks at work: their penalty is nothing
