"""Sparsity regularisers that drop into any training loop, and the table that names them."""

from __future__ import annotations

from collections.abc import Callable

from compress.regularize.ffr import Ffr as Ffr
from compress.regularize.halo import Halo as Halo
from compress.regularize.protocol import Regularizer as Regularizer

REGULARIZERS: dict[str, Callable[[], Regularizer]] = {
    "halo": Halo,
    "ffr": Ffr,
}
