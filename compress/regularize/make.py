"""Regularisers by their names and options, as a recipe or a command line gives them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from compress.errors import UsageError
from compress.regularize import REGULARIZERS, SPARSE_TRAINING, Regularizer


def make(given: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[Regularizer]:
    """The regularisers of the table that `given` names, with its options on top of those of `defaults` they have.

    Raises:
        UsageError: an option that one does not have, a value that it refuses, or two that mask the same weights.
    """
    masking = [name for name in given if name in SPARSE_TRAINING]
    if len(masking) > 1:
        raise UsageError(f"{' and '.join(masking)} would mask the same weights; choose one of them")
    return [_made(name, options, defaults) for name, options in given.items()]


def _made(name: str, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> Regularizer:
    known = list(inspect.signature(REGULARIZERS[name]).parameters)
    wrong = sorted(options.keys() - set(known))
    if wrong:
        raise UsageError(f"{name} has no option {wrong[0]!r}; there are {', '.join(known)}")
    given = {key: value for key, value in defaults.items() if key in known} | dict(options)
    try:
        return REGULARIZERS[name](**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} with {given}: {error}") from error
