"""How many weights each layer of a sparse network may have, for a density of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from compress.errors import UsageError
from compress.structure import owner

Initial = Literal["erk", "uniform"] | Mapping[str, float]
FLOOR = 0.005  # of a layer's weights stay alive, come what may (ours); see `floors`


def layer_counts(
    shapes: Mapping[str, Sequence[int]], lowest: Mapping[str, int], *, density: float, initial: Initial
) -> dict[str, int]:
    """Living weights per layer, round(density * all weights) in sum.

    `erk` and `uniform` say how the layers compare; a mapping does so by hand (layers it does not name have `density`).
    All are scaled by one factor until the sum is right, where no layer goes below `lowest` or above its size: so a
    distribution that cannot be met is repaired, and the rest goes to the others in proportion.

    Raises:
        UsageError: a density outside (0, 1], a layer that is not there, or a sum below that of `lowest`.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    _check(density, "the density")
    if initial == "erk":
        wanted = erk(shapes)
    elif initial == "uniform":
        wanted = dict.fromkeys(shapes, 1.0)
    elif isinstance(initial, str):
        raise UsageError(f"initial = {initial!r} is unknown; allowed are erk, uniform and a mapping layer: density")
    else:
        wanted = _given(initial, shapes, density)
    total = round(density * sum(sizes.values()))
    if total < sum(lowest.values()):
        least = sum(lowest.values()) / sum(sizes.values())
        raise UsageError(
            f"density {density} leaves {total} weights; one for each filter and {FLOOR:.1%} of each layer are "
            f"{sum(lowest.values())}: allowed is {math.ceil(least * 1e4) / 1e4} or more"
        )
    return _fill({name: share * sizes[name] for name, share in wanted.items()}, lowest, sizes, total)


def erk(shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Erdos-Renyi-Kernel: density of a layer up to one common factor, (in + out + height + width) / (their product).

    Evci et al., arXiv 1911.11134, section 3; with it small layers stay dense and large ones become sparse.
    """
    return {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}


def floors(model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """The least number of weights of each layer: as many as it has outputs, and `FLOOR` of its weights (ours)."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        layer, _ = owner(model, name)
        outputs = int(getattr(layer, "out_channels", tensor.shape[0]))
        found[name] = max(outputs, math.ceil(FLOOR * tensor.numel()))
    return found


def _given(densities: Mapping[str, float], shapes: Mapping[str, Sequence[int]], rest: float) -> dict[str, float]:
    unknown = [name for name in densities if name not in shapes]
    if unknown:
        raise UsageError(f"initial names {unknown[0]!r}; the layers that may be thinned are {', '.join(shapes)}")
    for name, density in densities.items():
        _check(density, f"initial: {name}")
    return {name: float(densities.get(name, rest)) for name in shapes}


def _check(density: float, what: str) -> None:
    if not 0 < density <= 1:
        raise UsageError(f"{what} is {density}; allowed is a share of the weights, above 0 and at most 1")


def _fill(
    wanted: Mapping[str, float], lowest: Mapping[str, int], highest: Mapping[str, int], total: int
) -> dict[str, int]:
    """Whole numbers, `total` in sum, nearest to c * wanted within their bounds; c by bisection.

    What rounding down leaves over goes to the largest fractions, earlier layers first.
    """

    def at(factor: float) -> dict[str, float]:
        return {name: min(max(factor * value, lowest[name]), highest[name]) for name, value in wanted.items()}

    low, high = 0.0, max(highest[name] / value for name, value in wanted.items())
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle).values()) < total else (low, middle)
    exact = at(high)
    counts = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(wanted, key=lambda name: counts[name] - exact[name])[: total - sum(counts.values())]:
        counts[name] += 1
    assert sum(counts.values()) == total, (counts, total)
    return counts
