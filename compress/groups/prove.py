"""Trial removals: a group is cut for real on a copy before anybody may cut it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import PruneError
from compress.groups.cut import cut, zero
from compress.groups.types import Group

Reason = str
# Largest difference of a right cut, relative to the largest output: orders above rounding, far below any wrong cut.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


def prove(
    model: nn.Module, example: Tensor, groups: Sequence[Group], *, exempt: Callable[[Group], bool] = lambda group: False
) -> tuple[Group, ...]:
    """Cut half of each group's channels on copies; freeze, with its reason, each group for which that goes wrong.

    A trial passes when the network runs, the output keeps its shape and is finite, and the output equals that of
    the same network with those channels set to zero (not asked of `exempt` groups, such as those behind a layer
    norm, where the two differ by nature). All groups are tried at once; only on failure are they halved.

    Args:
        model: left untouched; it may be in any mode and on any device.
        example: one input batch (N, C, H, W).

    Returns: all groups in the given order, the failing ones frozen.
    """
    reference, example, tolerance = _reference(model, example)
    with torch.no_grad():
        wanted = [tuple(leaf.shape) for leaf in _tensors(reference(example))]
    proved: list[Group] = []
    reasons: dict[str, Reason] = {}

    def admit(candidates: Sequence[Group]) -> None:
        together = [*proved, *candidates]
        reason = _trial(reference, example, together, wanted, None if any(map(exempt, together)) else tolerance)
        if reason is None:
            proved.extend(candidates)
        elif len(candidates) == 1:
            reasons[candidates[0].name] = reason
        else:
            half = len(candidates) // 2
            admit(candidates[:half])
            admit(candidates[half:])

    free = [group for group in groups if group.frozen is None]
    for batch in ([g for g in free if not exempt(g)], [g for g in free if exempt(g)]):
        if batch:
            admit(batch)
    return tuple(g.freeze(reasons[g.name]) if g.name in reasons else g for g in groups)


def _reference(model: nn.Module, example: Tensor) -> tuple[nn.Module, Tensor, float]:
    """A copy in evaluation mode and float64, or in float32 where the network insists on that; with its tolerance."""
    for dtype, tolerance in TOLERANCES.items():
        reference = _lively(copy.deepcopy(model).eval().to(dtype))
        like = next((t for t in reference.state_dict().values() if t.is_floating_point()), example)
        given = example.detach().to(like.device, dtype)
        try:
            with torch.no_grad():
                reference(given)
        except (RuntimeError, TypeError) as error:  # it casts, or holds tensors that no state shows
            refused = error
            continue
        return reference, given, tolerance
    raise PruneError(f"the network runs neither in float64 nor in float32: {str(refused).splitlines()[0]}")


def _lively(model: nn.Module) -> nn.Module:
    """Give every vector (norm scales, biases, statistics) values around 1, so that no branch is off during the trial.

    A zero-initialised last norm of a residual branch would let any cut inside that branch pass.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return model


def _trial(
    reference: nn.Module,
    example: Tensor,
    groups: Sequence[Group],
    wanted: list[tuple[int, ...]],
    tolerance: float | None,
) -> Reason | None:
    """What goes wrong when every second channel of `groups` leaves, or None; without tolerance values may differ."""
    kept = {group.name: range(0, group.size, 2) for group in groups}
    smaller = copy.deepcopy(reference)
    try:
        cut(smaller, groups, kept)
        with torch.no_grad():
            got = list(_tensors(smaller(example)))
    except Exception as error:
        return f"a trial cut fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    if [tuple(leaf.shape) for leaf in got] != wanted:
        return f"its channels reach the output: a trial cut changes {wanted} to {[tuple(leaf.shape) for leaf in got]}"
    if not all(bool(leaf.isfinite().all()) for leaf in got):
        return "a trial cut makes the output infinite or NaN"
    if tolerance is None:
        return None
    zeroed = copy.deepcopy(reference)
    zero(zeroed, groups, kept)
    with torch.no_grad():
        expected = list(_tensors(zeroed(example)))
    scale = max((float(leaf.abs().max()) for leaf in expected), default=0.0)
    worst = max((float((a - b).abs().max()) for a, b in zip(got, expected, strict=True)), default=0.0)
    if scale == 0:
        return "the output of the trial is zero everywhere, which proves nothing"
    if worst > tolerance * scale or math.isnan(worst):
        return f"a trial cut differs from zeroing the same channels by {worst:.2g} (outputs up to {scale:.2g})"
    return None


def _tensors(output: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
