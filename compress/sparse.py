"""Granularity `weight`: which single weights stay, by one threshold over all layers; the others become 0 in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from compress.errors import PruneError, TargetError, UsageError
from compress.regularize.channels import maskable

FLOOR = 0.005  # least share of a layer's weights that stay (ours): a threshold over all may leave a layer nothing
Worth = Mapping[str, Tensor]  # weight tensor by name -> importance of each element, its shape; larger = keep


class Thinned(BaseModel, frozen=True):
    """What came of a cut of single weights."""

    keep: float  # the share of all parameters asked for
    reached: float  # the share that remains
    params: int  # that remain
    density: dict[str, float]  # weight tensor -> share of its elements that are not 0


@dataclass(frozen=True)
class Budget:
    """How many parameters a network has, and how many of them single-weight pruning can spare."""

    params: int  # learned ones, each once
    fixed: int  # of norms, biases, the classifier and the like: they count as they are, 0 or not
    floor: int  # weights that stay for the guard

    @property
    def lowest(self) -> float:
        """The least share of all parameters that can be reached."""
        return (self.fixed + self.floor) / self.params

    def weights(self, keep: float) -> int:
        """How many maskable weights may stay, so that `keep` of all parameters is met and never exceeded.

        Raises:
            UsageError: `keep` out of range. TargetError: out of reach; carries the lowest reachable share.
        """
        if not 0 < keep <= 1:
            raise UsageError(f"the share to keep is {keep}; it must be above 0 and at most 1")
        left = math.floor(keep * self.params * (1 + 1e-12)) - self.fixed
        if left < self.floor:
            raise TargetError(
                f"the target {keep:.4g} of the params is out of reach: what is no weight of a convolution or a hidden "
                f"linear layer stays, and {FLOOR:g} of every layer; the lowest reachable share is "
                f"{math.ceil(self.lowest * 1e4) / 1e4:g}",
                lowest=self.lowest,
            )
        return left


def budget(model: nn.Module) -> Budget:
    """Count a network's parameters. PruneError: it has no weight that could be set to zero."""
    weights = _maskable(model)
    params = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(tensor.numel() for tensor in weights.values())
    return Budget(params, params - held, sum(_floor(tensor) for tensor in weights.values()))


def remaining(model: nn.Module) -> int:
    """The learned parameters of `model` less the zeros among the weights that may be set to zero."""
    return budget(model).params - sum(int((tensor == 0).sum()) for tensor in _maskable(model).values())


def density(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Weight tensor -> its elements, and how many of them are not 0; of those that may be set to zero."""
    return {name: (t.numel(), int(t.detach().count_nonzero())) for name, t in _maskable(model).items()}


def thin(model: nn.Module, *, keep: float, worth: Worth | str = "l1", seed: int = 0) -> Thinned:
    """Set the least important weights to zero, in place, until `keep` of the parameters remain.

    Weights are those of convolutions, and of hidden linear layers where these hold the larger part. Norms, biases and
    the classifier stay and count. All layers compete under one threshold, but each keeps at least FLOOR of its weights,
    one at least. The target is met and missed by less than one weight, unless more are 0 already.

    Args:
        keep: share of all learned parameters that may remain, 0 < keep <= 1.
        worth: a key of WORTHS, or the importance of every weight; -inf where a weight has to leave.
        seed: of the score `random`.

    Raises:
        UsageError: `keep` out of range, unknown score. PruneError: nothing to cut, or scores of another shape or NaN.
        TargetError: out of reach; carries the lowest reachable share. The network is untouched after any of them.
    """
    found = budget(model)
    weights = _maskable(model)
    count = found.weights(keep)
    given = weigh(model, worth, seed=seed) if isinstance(worth, str) else worth
    masks = choose({name: _checked(name, tensor, given) for name, tensor in weights.items()}, count)
    with torch.no_grad():
        for name, tensor in weights.items():
            tensor.masked_fill_(~masks[name].to(tensor.device), 0)
    shares = {name: alive / total for name, (total, alive) in density(model).items()}
    left = remaining(model)
    return Thinned(keep=keep, reached=left / found.params, params=left, density=shares)


def choose(worth: Worth, count: int) -> dict[str, Tensor]:
    """The `count` places of largest worth, after every tensor's floor, as masks; ties go to the first place.

    Places of worth -inf are never chosen, so that fewer than `count` may be.
    """
    flat = {name: values.detach().to("cpu", torch.float64, copy=True).flatten() for name, values in worth.items()}
    for values in flat.values():
        order = values.argsort(descending=True, stable=True)[: _floor(values)]
        values[order[values[order] > -math.inf]] = math.inf
    pooled = torch.cat(list(flat.values()))
    chosen = pooled.argsort(descending=True, stable=True)[:count]
    mask = torch.zeros(len(pooled), dtype=torch.bool)
    mask[chosen[pooled[chosen] > -math.inf]] = True
    parts = torch.split(mask, [len(values) for values in flat.values()])
    return {name: part.view(worth[name].shape) for name, part in zip(flat, parts, strict=True)}


def weigh(model: nn.Module, score: str, *, seed: int = 0) -> dict[str, Tensor]:
    """The importance of every maskable weight by a score of WORTHS; UsageError for another name."""
    if score not in WORTHS:
        raise UsageError(f"{score!r} does not rank single weights; at granularity weight there are {', '.join(WORTHS)}")
    generator = torch.Generator().manual_seed(seed)
    return {name: WORTHS[score](tensor.detach().cpu(), generator) for name, tensor in _maskable(model).items()}


def magnitude(weight: Tensor, generator: torch.Generator) -> Tensor:
    """|w| (Han et al., arXiv 1506.02626, section 3)."""
    return weight.abs()


def lamp(weight: Tensor, generator: torch.Generator) -> Tensor:
    """w^2 over the sum of the squares of all as large or larger ones of its layer (LAMP, arXiv 2010.07611, equation 1).

    The largest weight of a layer has 1, so that no layer is emptied. Ties are broken by position, as in the paper.
    """
    squares = weight.double().square().flatten()
    order = squares.argsort(stable=True)
    sums = squares[order].flip(0).cumsum(0).flip(0)
    shares = torch.empty_like(squares)
    shares[order] = squares[order] / sums.clamp(min=torch.finfo(torch.float64).tiny)
    return shares.view(weight.shape)


def chance(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise: the control that every score must beat."""
    return torch.rand(weight.shape, generator=generator)


WORTHS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "l1": magnitude,
    "l2": magnitude,  # of a single weight the two norms are one
    "lamp": lamp,
    "random": chance,
}


def _floor(tensor: Tensor) -> int:
    return max(1, math.ceil(FLOOR * tensor.numel()))


def _maskable(model: nn.Module) -> dict[str, nn.Parameter]:
    try:
        return maskable(model)
    except ValueError as error:
        raise PruneError(f"nothing can be set to zero: {error}") from error


def _checked(name: str, tensor: Tensor, worth: Worth) -> Tensor:
    found = worth.get(name)
    if found is None or found.shape != tensor.shape:
        raise PruneError(f"no importance of shape {tuple(tensor.shape)} for the weights of {name}")
    if bool(found.isnan().any()):
        raise PruneError(f"the importance of the weights of {name} is NaN")
    return found
