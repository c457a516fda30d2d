"""Which weights a sparse network loses and gains: pure functions of weights, masks and gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Drop = Literal["layer", "global"]
Masked = Mapping[str, Tensor]


def moved_share(step: int, *, fraction: float, end: float | None) -> float:
    """f = f0 / 2 (1 + cos(pi t / T_end)), 0 from T_end on; without an end f0 for ever. Evci et al., 1911.11134."""
    if end is None:
        return fraction
    return fraction / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def drop_counts(
    weights: Masked, alive: Masked, lowest: Mapping[str, int], *, share: float, drop: Drop
) -> dict[str, int]:
    """How many of its smallest weights each layer loses; none falls below `lowest`.

    `layer`: round(share * living weights) of each; `global`: of all, those that are smallest anywhere.
    """
    living = {name: int(mask.sum()) for name, mask in alive.items()}
    room = {name: max(0, living[name] - lowest[name]) for name in alive}
    if drop == "layer":
        return {name: min(round(share * living[name]), room[name]) for name in alive}
    smallest = {name: weights[name][alive[name]].abs().sort().values[: room[name]] for name in alive}
    return top_counts({name: -values for name, values in smallest.items()}, round(share * sum(living.values())))


def top_counts(values: Masked, count: int) -> dict[str, int]:
    """How many of the `count` largest of all values lie in each layer's: (any,) per layer. The budget k_l of GGR."""
    ends = torch.tensor([part.numel() for part in values.values()]).cumsum(0)
    everything = torch.cat([part.flatten() for part in values.values()])
    places = everything.topk(min(count, everything.numel()), sorted=False).indices.cpu()
    found = torch.bucketize(places, ends, right=True).bincount(minlength=len(values))
    return dict(zip(values, found.tolist(), strict=True))


def limited(drops: Mapping[str, int], alive: Masked, *, across: bool) -> dict[str, int]:
    """No more losses than there are dead places to grow at: in all layers together (`across`), or in each.

    What has just been dropped does not grow again at once, which matters above half density.
    """
    free = {name: mask.numel() - int(mask.sum()) for name, mask in alive.items()}
    if not across:
        return {name: min(count, free[name]) for name, count in drops.items()}
    wanted, here = sum(drops.values()), sum(free.values())
    return dict(drops) if wanted <= here else {name: count * here // wanted for name, count in drops.items()}


def without_smallest(weight: Tensor, alive: Tensor, count: int) -> Tensor:
    """The mask without the `count` living weights of least magnitude."""
    size = torch.where(alive, weight.abs(), math.inf).flatten()
    left = alive.flatten().clone()
    left[size.topk(count, largest=False, sorted=False).indices] = False
    return left.view_as(alive)


def largest(values: Tensor, count: int) -> Tensor:
    """Bool, true at the `count` largest values."""
    found = torch.zeros(values.numel(), dtype=torch.bool, device=values.device)
    found[values.flatten().topk(count, sorted=False).indices] = True
    return found.view(values.shape)


def at_random(allowed: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Bool, true at `count` of the allowed places, uniformly; the generator lies on the CPU."""
    places = allowed.flatten().nonzero().squeeze(1)
    found = torch.zeros(allowed.numel(), dtype=torch.bool, device=allowed.device)
    found[places[torch.randperm(len(places), generator=generator)[:count].to(places.device)]] = True
    return found.view(allowed.shape)


def grown(gradient: Tensor, candidates: Tensor, count: int, rho: float, generator: torch.Generator) -> Tensor:
    """`count` new places: round((1 - rho) * count) at the largest |gradients|, the rest at random candidates."""
    by_gradient = round((1 - rho) * count)
    chosen = largest(torch.where(candidates, gradient.abs(), -1.0), by_gradient)
    return chosen | at_random(candidates & ~chosen, count - by_gradient, generator)


def redistributed(
    weights: Masked, gradients: Masked, alive: Masked, drops: Mapping[str, int], *, rho: float, across: bool, seed: int
) -> dict[str, Tensor]:
    """The masks after dropping `drops` of each layer and growing as many again.

    `across`: the largest gradients of all dead places say how many each layer gets (GGR); otherwise each gets back
    what it lost. A full layer has no dead places, so what it might have got goes to the next gradients.
    """
    candidates = {name: ~mask for name, mask in alive.items()}
    grows = dict(drops)
    if across:
        open_to = {name: gradients[name][candidates[name]].abs() for name in alive}
        grows = top_counts(open_to, sum(drops.values()))
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, mask in alive.items():
        kept = without_smallest(weights[name], mask, drops[name])
        found[name] = kept | grown(gradients[name], candidates[name], grows[name], rho, generator)
    return found
