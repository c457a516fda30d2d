"""Which channels stay: `select` spends a target, `apply` cuts; a Plan between them is names and indices, no tensors."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pydantic import BaseModel
from torch import nn

from compress.allocation import Allocation, Key, Value, keys, powers, valued, worth
from compress.cost import Costs, Metric, Widths
from compress.errors import PruneError, TargetError, UsageError
from compress.groups import Branch, Group, cut
from compress.reach import LEAVE_FOR, block_of, check_reach, least_width, leaving, make_reachable, rounded_up, without
from compress.scores import Scores
from compress.structure import Stand, remove

EXCHANGES = 20  # steps of `_exchange`; a handful is the rule
NO_LIMITS: Mapping[str, float] = MappingProxyType({})


class Plan(BaseModel, frozen=True):
    """What to keep, and what came of the rounding."""

    kept: dict[str, tuple[int, ...]]  # group name -> the channels that remain, ascending
    metric: str
    keep: float  # the share asked for
    reached: float  # the share that the analytic cost of these widths gives
    dropped: dict[str, Stand] = {}  # modules that leave as a whole -> what stands in their place
    unaligned: dict[str, int] = {}  # groups whose width is no multiple of the block asked for -> that width


def select(
    groups: Sequence[Group],
    scores: Scores,
    costs: Costs,
    *,
    keep: float,
    metric: Metric = "params",
    whole: float | None = None,
    round_to: int = 1,
    adapt: bool = False,
    allocation: Allocation = "balanced",
    floor: float = 0.0,
    falls: Mapping[str, float] | None = None,
    limits: Mapping[str, float] = NO_LIMITS,
    branches: Sequence[Branch] = (),
) -> Plan:
    """Choose the channels to keep: the cost falls to at most `keep` of the whole, as little below as blocks allow.

    Args:
        scores: group name -> (size,), larger = keep. Compared across groups after division by the group's mean.
        keep: share of `metric` that may remain, 0 < keep <= 1.
        whole: the cost that `keep` is a share of; None: this network's own. For a network that has been cut before.
        round_to: widths become multiples of this block of channels (or stay whole).
        adapt: take a smaller power of two for a group whose block is too coarse for the target (`round_to auto`).
        allocation: how layers compete, a key of ALLOCATIONS.
        floor: no group keeps less than this share, 0 to 1, of what a cut by rule to `keep` would leave it.
            Guards a global ranking against layers of one channel.
        falls: group name -> how fast it shrinks, as `allocation.powers` says of this network (None) or of the one that
            it was before an earlier cut: several cuts then lead to the widths of one.
        limits: group name -> the least share of its channels, 0 to 1, that it keeps whatever the target, such as
            `sensitivity.limits` gives. Others keep at least one channel.
        branches: those that may leave as a whole, where `keep` is out of reach in blocks of `round_to` (`adapt`: of
            LEAVE_FOR at most) otherwise.

    Raises:
        UsageError: `keep`, `round_to` or a limit out of range, or a limit for an unknown group.
        PruneError: nothing can be cut.
        TargetError: out of reach; carries the lowest reachable share.
    """
    if not 0 < keep <= 1:
        raise UsageError(f"the share to keep is {keep}; it must be above 0 and at most 1")
    if round_to < 1:
        raise UsageError(f"round_to is {round_to}; it must be at least 1")
    free = [group for group in groups if group.frozen is None]
    if not free:
        raise PruneError("no group of channels may be cut; `compress inspect` names the reasons")
    for group in free:
        _check(group, scores)
    _check_limits(groups, limits)
    total = costs.total(metric)
    whole = total if whole is None else whole
    if total <= 0:
        raise PruneError(f"the network has no {metric} to reduce (are all its parameters fixed?)")
    unit = min(round_to, LEAVE_FOR) if adapt else round_to
    dropped = leaving(branches, groups, costs, metric=metric, target=keep * whole, round_to=unit, limits=limits)
    groups, costs = without(groups, costs, dropped)
    free = [group for group in groups if group.frozen is None]
    here = min(1.0, keep * whole / total)
    widths = Widths(groups, costs, metric)
    falls = powers(free, costs, widths, allocation) if falls is None else {g.name: falls[g.name] for g in free}
    share = {name: here**power for name, power in falls.items()}
    blocks = {group.name: block_of(group, round_to, share[group.name] if adapt else None) for group in free}
    least = {g.name: max(floor * share[g.name], limits.get(g.name, 0.0)) for g in free}
    least = {name: least_width(widths.size[name], blocks[name], wanted) for name, wanted in least.items()}
    make_reachable(widths, blocks, least, limits, target=keep * whole, adapt=adapt)
    if limits:
        check_reach(widths, least, keep=keep, whole=whole)
    order = {group.name: scores[group.name].argsort(descending=True, stable=True).tolist() for group in free}
    worths = {group.name: worth(scores[group.name], order[group.name]) for group in free}
    key = keys(widths, worths, falls, allocation)
    _descend(widths, blocks, least, key, target=keep * whole, whole=whole)
    _give_back(widths, blocks, key, target=keep * whole)
    if metric == "latency" and allocation == "balanced":
        _exchange(widths, blocks, least, valued(widths, worths, falls), target=keep * whole)
    kept = {name: tuple(sorted(ranked[: widths.kept[name]])) for name, ranked in order.items()}
    return Plan(
        kept=kept,
        metric=metric,
        keep=keep,
        reached=widths.total() / whole,
        dropped=dropped,
        unaligned={n: len(k) for n, k in kept.items() if len(k) % round_to and len(k) < widths.size[n]},
    )


def apply(model: nn.Module, groups: Sequence[Group], plan: Plan) -> None:
    """Cut the network to `plan`, in place, once.

    Raises:
        PruneError: the plan names a group that is unknown, frozen or of another size; the network is untouched then.
    """
    known = {group.name: group for group in groups}
    for name, channels in plan.kept.items():
        group = known.get(name)
        if group is None:
            raise PruneError(f"the plan names the group {name!r}, which this network does not have")
        if group.frozen and len(channels) < group.size:
            raise PruneError(f"the plan cuts {name}, which is frozen: {group.frozen}")
        if not channels or sorted(set(channels)) != list(channels) or channels[-1] >= group.size or channels[0] < 0:
            raise PruneError(f"the plan keeps channels {str(channels)[:60]} of {name}, which has {group.size}")
    missing = next((path for path in plan.dropped if path not in dict(model.named_modules())), None)
    if missing is not None:
        raise PruneError(f"the plan takes out {missing!r}, which this network does not have")
    cut(model, groups, plan.kept)
    remove(model, plan.dropped)


def _check(group: Group, scores: Scores) -> None:
    found = scores.get(group.name)
    if found is None or tuple(found.shape) != (group.size,):
        raise PruneError(f"no scores of shape ({group.size},) for the group {group.name}")
    if not bool(found.isfinite().all()):
        raise PruneError(f"the scores of {group.name} are not finite")


def _check_limits(groups: Sequence[Group], limits: Mapping[str, float]) -> None:
    names = {group.name for group in groups}
    for name, share in limits.items():
        if name not in names:
            raise UsageError(f"the limits name the group {name!r}, which this network does not have")
        if not 0 <= share <= 1:
            raise UsageError(f"the limit of {name} is {share}; it must be a share from 0 to 1")


def _descend(
    widths: Widths, blocks: Mapping[str, int], least: Mapping[str, int], key: Key, *, target: float, whole: float
) -> None:
    """Narrow `widths.kept`, block by block, the least key first, until the total is at most `target`."""
    total = widths.total()

    def below(name: str) -> int:
        return (widths.kept[name] - 1) // blocks[name] * blocks[name]

    version = dict.fromkeys(blocks, 0)
    heap = [(key(name, widths.kept[name], below(name)), name, 0) for name in blocks if below(name) >= least[name]]
    heapq.heapify(heap)
    while total > target * (1 + 1e-12):
        if not heap:
            raise TargetError(
                f"the target {target / whole:.4g} of the {widths.metric} is out of reach; the lowest reachable share "
                f"is {rounded_up(total / whole):g}: ask for that, or for a smaller --round-to",
                lowest=total / whole,
            )
        _, name, seen = heapq.heappop(heap)
        if seen != version[name]:
            continue  # its price has changed since
        total -= widths.change(name, below(name))
        widths.kept[name] = below(name)
        for other in widths.neighbours(name) & blocks.keys():
            version[other] += 1
            if below(other) >= least[other]:
                heapq.heappush(heap, (key(other, widths.kept[other], below(other)), other, version[other]))


def _give_back(widths: Widths, blocks: Mapping[str, int], key: Key, *, target: float) -> None:
    """Return blocks, the greatest key first, while the total stays at or below the target."""
    total = widths.total()
    while True:
        fitting: list[tuple[float, str, int, float]] = []
        for name, block in blocks.items():
            kept = widths.kept[name]
            wider = min(widths.size[name], (kept // block + 1) * block)
            cost = -widths.change(name, wider)
            if wider > kept and total + cost <= target:
                fitting.append((key(name, wider, kept), name, wider, cost))
        if not fitting:
            return
        _, name, wider, cost = max(fitting)
        widths.kept[name] = wider
        total += cost


def _exchange(
    widths: Widths, blocks: Mapping[str, int], least: Mapping[str, int], value: Value, *, target: float
) -> None:
    """Narrow one group by a block wherever what the others get for it is worth more, the best such step first.

    Stairs leave gaps below a target that no single block fits into; one block less elsewhere may pay for several.
    """

    def rank(name: str, wider: int, kept: int) -> float:
        cost = -widths.change(name, wider)
        return (value(name, wider) - value(name, kept)) / cost if cost > 0 else math.inf

    for _ in range(EXCHANGES):
        before, best, gained = dict(widths.kept), dict[str, int](), 1e-9
        for name, block in blocks.items():
            lower = (before[name] - 1) // block * block
            if lower < least[name]:
                continue
            widths.kept[name] = lower
            _give_back(widths, {other: blocks[other] for other in blocks if other != name}, rank, target=target)
            gain = sum(value(other, widths.kept[other]) - value(other, before[other]) for other in blocks)
            if gain > gained:
                best, gained = dict(widths.kept), gain
            widths.kept.update(before)
        if not best:
            return
        widths.kept.update(best)
