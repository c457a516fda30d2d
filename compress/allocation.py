"""How layers compete for what a target leaves: which of them gives up channels next, and how fast each shrinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from compress.cost import Costs, Widths
from compress.groups import Group

Allocation = Literal["balanced", "uniform", "relative", "global"]
ALLOCATIONS: dict[Allocation, str] = {
    "balanced": "as uniform, but a layer whose channels are dear shrinks faster, in parameters, bytes and milliseconds",
    "uniform": "every layer shrinks alike, but channels that many layers share shrink less; scores rank within layers",
    "relative": "all layers compete: the lowest score, in units of the layer's mean, leaves first",
    "global": "all layers compete: the lowest such score per cost leaves first",
}
EAGER = 0.25  # the power of the time that a step saves, beside what the group keeps (ours, benchmarks/LOG.md)
DEAREST = 4.0  # by how much a channel's price may speed up, or slow down, how its layer shrinks (ours)

Value = Callable[[str, int], float]  # group, its width -> what that is worth
Key = Callable[[str, int, int], float]  # group, its width, the next smaller one -> what leaves first has the least


def powers(free: Sequence[Group], costs: Costs, widths: Widths, allocation: Allocation) -> dict[str, float]:
    """How fast a group's width falls with the target: to keep ** power of its channels.

    A cost that grows with the product of two widths falls to `keep` when the two powers add up to 1. Channels that more
    than two layers share (the trunk of a residual network) carry every later layer: they get 1/4, those inside a block
    3/4; where all groups are of one kind, each gets 1/2.

    `balanced` multiplies that by what a channel costs, in units of the geometric mean of its kind, within a factor of
    DEAREST: for what a channel takes in a late layer, an early one has several. Not so for MACs, where early channels
    are the dear ones, nor for latency, where `keys` weighs the time that each step saves. All of this is ours, measured
    on ResNet-20: benchmarks/LOG.md.
    """
    layers = {group.name: _layers(group, costs) for group in free}
    if not any(n > 2 for n in layers.values()) or all(n > 2 for n in layers.values()):
        kinds = dict.fromkeys(layers, 0.5)
    else:
        kinds = {name: 0.25 if n > 2 else 0.75 for name, n in layers.items()}
    if allocation != "balanced" or widths.metric in ("macs", "latency"):
        return kinds
    price = {group.name: max(widths.change(group.name, group.size - 1), 1.0) for group in free}
    found: dict[str, float] = {}
    for kind in set(kinds.values()):
        alike = {name: math.log(price[name]) for name, power in kinds.items() if power == kind}
        mean = sum(alike.values()) / len(alike)
        found |= {name: kind * min(max(math.exp(p - mean), 1 / DEAREST), DEAREST) for name, p in alike.items()}
    return found


def _layers(group: Group, costs: Costs) -> int:
    """How many layers write or read the group's channels; a depthwise one, (C, 1, ...), passes them on."""
    shapes = {part.name: costs.shapes[part.name] for part in group.slices}
    return sum(len(shape) > 1 and not (len(shape) > 2 and shape[1] == 1) for shape in shapes.values())


def worth(score: Tensor, order: Sequence[int]) -> list[float]:
    """Scores in falling order, in units of the group's mean; their running sum from the best one on."""
    ranked = score.double()[list(order)].clamp(min=0)
    mean = float(ranked.mean())
    return [0.0, *torch.cumsum(ranked / mean if mean > 0 else ranked, 0).tolist()]


def keys(
    widths: Widths, worths: Mapping[str, Sequence[float]], falls: Mapping[str, float], allocation: Allocation
) -> Key:
    def uniform(name: str, kept: int, lower: int) -> float:
        return -math.pow(kept / widths.size[name], 1 / falls[name])

    def relative(name: str, kept: int, lower: int) -> float:
        return (worths[name][kept] - worths[name][lower]) / (kept - lower)

    def per_cost(name: str, kept: int, lower: int) -> float:
        saved = abs(widths.change(name, lower if widths.kept[name] == kept else kept))
        return (worths[name][kept] - worths[name][lower]) / saved if saved > 0 else math.inf

    def timed(name: str, kept: int, lower: int) -> float:
        """What the group keeps of its importance, against the time that the step saves: none saved, no step."""
        saved = abs(widths.change(name, lower if widths.kept[name] == kept else kept)) / (kept - lower)
        left = worths[name][kept] / worths[name][-1] if worths[name][-1] > 0 else kept / widths.size[name]
        return -math.pow(left, 1 / falls[name]) * math.pow(saved * widths.size[name], EAGER)

    balanced = timed if widths.metric == "latency" else uniform
    return {"balanced": balanced, "uniform": uniform, "relative": relative, "global": per_cost}[allocation]


def valued(widths: Widths, worths: Mapping[str, Sequence[float]], falls: Mapping[str, float]) -> Value:
    """What a group is worth at a width: its channels times the logarithm of the share of importance kept, over `falls`.

    The logarithm keeps any one layer from paying for all others; channels that many layers share count for more.
    """

    def value(name: str, kept: int) -> float:
        whole = worths[name][-1]
        share = worths[name][kept] / whole if whole > 0 else kept / widths.size[name]
        return widths.size[name] * math.log(max(share, 1e-9)) / falls[name]

    return value
