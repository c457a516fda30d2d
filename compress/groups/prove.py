"""Trial removals: groups are cut for real on a copy before anybody may cut them."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import PruneError
from compress.example import Example, arguments, like
from compress.groups.counts import proposals
from compress.groups.cut import cut, permute, unshare, zero
from compress.groups.twin import lively, shared
from compress.groups.types import Group

Reason = str
# Largest difference of a right cut, relative to the largest output: orders above rounding, far below any wrong cut.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Bench:
    """What trials run on: a copy that shares its weights with the model, and the input."""

    network: nn.Module
    example: Example
    tolerance: float

    @classmethod
    def of(cls, model: nn.Module, example: Example) -> Bench:
        """A bench for `model`, which is left untouched and may be in any mode and on any device.

        Args:
            example: one input batch (N, C, H, W), or a tuple of several inputs.
        """
        network = lively(model)
        own = next((t for t in network.state_dict().values() if t.is_floating_point()), arguments(example)[0])
        dtype = own.dtype if own.dtype in TOLERANCES else torch.float32
        if dtype != own.dtype:
            network = copy.deepcopy(network).to(dtype)
        return cls(network, like(example, own.to(dtype)), TOLERANCES[dtype])


def prove(
    bench: Bench, groups: Sequence[Group], *, mixed: Collection[str] = (), until: float = math.inf
) -> tuple[Group, ...]:
    """Cut a part of each group's channels on copies; freeze, with its reason, each group for which that goes wrong.

    A trial passes when the network runs, the output keeps its shape and is finite, and the output equals that of
    the same network with those channels set to zero. Groups named in `mixed` (behind a layer norm) change what is
    left when they are cut; for those the output must stay when their channels change places. All groups are tried at
    once; only on failure family by family (the same layer of every block), and then by halves.

    Args:
        until: by `time.monotonic`: later no trial begins but that of all; what is not proved by then is frozen.

    Returns: all groups in the given order, with the module integers that follow them; the failing ones frozen.
    """
    proved = prove_together(bench, groups, mixed=mixed)
    return proved if isinstance(proved, tuple) else prove_apart(bench, groups, mixed=mixed, until=until)


def prove_together(bench: Bench, groups: Sequence[Group], *, mixed: Collection[str] = ()) -> tuple[Group, ...] | Reason:
    """`prove` by the trial of all groups alone: what it returns where that passes, else why it does not."""
    trials = _Trials(bench, mixed)
    free = [group for group in groups if group.frozen is None]
    likeliest = [replace(group, counts=proposals(bench.network, group)[0]) for group in free]
    reason = trials.fit(likeliest) if free else None
    return _results(trials, groups) if reason is None else reason


def prove_apart(
    bench: Bench, groups: Sequence[Group], *, mixed: Collection[str] = (), until: float = math.inf
) -> tuple[Group, ...]:
    """`prove` where the trial of all groups has failed: family by family, those that mix channels last."""
    trials = _Trials(bench, mixed, until)
    families: dict[str, list[Group]] = {}
    for group in groups:
        if group.frozen is None:
            families.setdefault(re.sub(r"\d+", "#", group.name), []).append(group)
    for family in sorted(families.values(), key=lambda f: f[0].name in mixed):
        _admit(trials, family)
    return _results(trials, groups)


def _results(trials: _Trials, groups: Sequence[Group]) -> tuple[Group, ...]:
    found = (
        trials.proved.get(g.name) or (g.freeze(trials.reasons[g.name]) if g.name in trials.reasons else g)
        for g in groups
    )
    return tuple(replace(group, reads=()) for group in found)


def _admit(trials: _Trials, family: Sequence[Group]) -> None:
    """Prove a family together, or else member by member and by halves; where two fail alike, all the rest does too."""
    reason = _any_version(trials, family)
    if reason is None:
        return
    if len(family) == 1:
        trials.reasons[family[0].name] = reason
        return
    failed: list[Reason] = []
    rest = list(family)
    while rest and len(failed) < 2:
        member = rest.pop(0)
        found = _any_version(trials, [member])
        if found is None:
            break
        trials.reasons[member.name] = found
        failed.append(re.sub(r"\d+", "#", found))
        if rest and _any_version(trials, rest) is None:
            return
    if len(failed) == 2 and failed[0] == failed[1]:
        trials.reasons.update({group.name: f"{reason} (as in {family[0].name})" for group in rest})
        return
    for half in (rest[: len(rest) // 2], rest[len(rest) // 2 :]):
        if half:
            _admit(trials, half)


def _any_version(trials: _Trials, candidates: Sequence[Group]) -> Reason | None:
    """Try the integers that could follow, set by set: None once a trial passes, or else why the first one failed."""
    versions = [proposals(trials.bench.network, group) for group in candidates]
    first: Reason | None = None
    for turn in range(max(map(len, versions))):
        tried = [replace(g, counts=v[min(turn, len(v) - 1)]) for g, v in zip(candidates, versions, strict=True)]
        reason = trials.fit(tried)
        if reason is None:
            return None
        first = first or reason
    return first


@dataclass
class _Trials:
    """What has been proved so far; every trial cuts that too."""

    bench: Bench
    mixed: Collection[str]
    until: float = math.inf
    proved: dict[str, Group] = field(default_factory=dict)
    reasons: dict[str, Reason] = field(default_factory=dict)

    def fit(self, candidates: Sequence[Group]) -> Reason | None:
        """Try `candidates` beside what is proved; they are proved, or the reason is returned."""
        if time.monotonic() > self.until:
            return "it could not be proved within the time limit"
        reason = _trial(self.bench, [*self.proved.values(), *candidates], self.mixed)
        if reason is None:
            self.proved.update({group.name: group for group in candidates})
        return reason


def _in_double(bench: Bench) -> Bench | None:
    """The same in float64, for a difference that float32 cannot judge; None where the network insists on float32."""
    if bench.tolerance == TOLERANCES[torch.float64]:
        return None
    given = like(bench.example, arguments(bench.example)[0].new_empty(0, dtype=torch.float64))
    double = Bench(copy.deepcopy(bench.network).double(), given, TOLERANCES[torch.float64])
    try:
        with torch.no_grad():
            double.network(*given)
    except (RuntimeError, TypeError):  # it casts, or holds tensors that no state shows
        return None
    return double


def _trial(bench: Bench, groups: Sequence[Group], mixed: Collection[str]) -> Reason | None:
    """What goes wrong when some channels of `groups` leave, or None."""
    kept = {group.name: _some(group.size, seed) for seed, group in enumerate(groups)}
    local = [group for group in groups if group.name not in mixed]
    try:
        found = _smaller(bench, groups, kept)
        wanted = _same_shape(bench, groups, kept, mixed)
        if len(local) < len(groups) and local:
            compared = _smaller(bench, local, kept)
        else:
            compared = found if local else outputs(bench.network, bench.example)
    except PruneError:  # the time is up
        raise
    except Exception as error:
        return f"a trial cut fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    shapes = [tuple(leaf.shape) for leaf in wanted]
    for leaves in (found, compared):
        if [tuple(leaf.shape) for leaf in leaves] != shapes:
            return f"its channels reach the output: a trial cut changes {shapes} to {[tuple(t.shape) for t in leaves]}"
        if not all(bool(leaf.isfinite().all()) for leaf in leaves):
            return "a trial cut makes the output infinite or NaN"
    scale = max((float(leaf.abs().max()) for leaf in wanted), default=0.0)
    worst = max((float((a - b).abs().max()) for a, b in zip(compared, wanted, strict=True)), default=0.0)
    if scale == 0:
        return "the output of the trial is zero everywhere, which proves nothing"
    if worst <= bench.tolerance * scale:
        return None
    if worst <= 100 * bench.tolerance * scale and (double := _in_double(bench)) is not None:
        return _trial(double, groups, mixed)
    return f"a trial cut differs from zeroing the same channels by {worst:.2g} (outputs up to {scale:.2g})"


def _some(size: int, seed: int) -> list[int]:
    """A sixth to a half of the channels, other ones for each group: wrong ties show, and a trial is quick."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    number = int(torch.randint(max(1, size // 6), max(1, size // 2) + 1, (1,), generator=generator))
    return sorted(order[:number].tolist())


def _smaller(bench: Bench, groups: Sequence[Group], kept: dict[str, list[int]]) -> list[Tensor]:
    """The outputs of the network that is cut."""
    network = shared(bench.network)
    cut(network, groups, kept)
    return outputs(network, bench.example)


def _same_shape(
    bench: Bench, groups: Sequence[Group], kept: dict[str, list[int]], mixed: Collection[str]
) -> list[Tensor]:
    """The outputs with channels of local groups zeroed, and those of mixed groups in another order."""
    network = shared(bench.network)
    unshare(network, groups)
    zero(network, [group for group in groups if group.name not in mixed], kept)
    generator = torch.Generator().manual_seed(0)
    permute(network, groups, {g.name: torch.randperm(g.size, generator=generator) for g in groups if g.name in mixed})
    return outputs(network, bench.example)


def outputs(network: nn.Module, example: Example) -> list[Tensor]:
    with torch.no_grad():
        return list(_tensors(network(*arguments(example))))


def _tensors(output: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
