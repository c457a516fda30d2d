"""How far widths can go: what rounding, floors and limits leave at least, and which branches leave first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from compress.cost import Costs, Metric, Widths
from compress.errors import TargetError
from compress.groups import Branch, Group
from compress.structure import Stand

# Channels a block, where the machine's own unit may be wider: for 16 so many branches left ResNet-20 at 0.02 of the
# parameters that it lost ten points (ours, benchmarks/LOG.md).
LEAVE_FOR = 8


def without(groups: Iterable[Group], costs: Costs, gone: Iterable[str]) -> tuple[tuple[Group, ...], Costs]:
    """Groups and costs of the network without the modules `gone`: their tensors, and groups that lie in them alone."""
    starts = tuple(f"{path}." for path in gone)
    if not starts:
        return tuple(groups), costs
    left = (replace(g, slices=tuple(part for part in g.slices if not part.name.startswith(starts))) for g in groups)
    prices = {
        metric: {name: price for name, price in found.items() if not name.startswith(starts)}
        for metric, found in costs.prices.items()
    }
    times = {name: time for name, time in costs.times.items() if not name.startswith(starts)}
    return tuple(group for group in left if group.slices), replace(costs, prices=prices, times=times)


def leaving(
    branches: Sequence[Branch],
    groups: Sequence[Group],
    costs: Costs,
    *,
    metric: Metric,
    target: float,
    round_to: int,
    limits: Mapping[str, float],
) -> dict[str, Stand]:
    """The modules that leave: branch after branch, the least distortion first, until the target can be reached.

    It can be reached when one block of `round_to` channels in every group that is left, or what its limit asks for,
    costs no more than `target`. [ours]
    """
    gone: dict[str, Stand] = {}
    for branch in sorted(branches, key=lambda b: (b.distortion, b.name)):
        left, prices = without(groups, costs, gone)
        widths = Widths(left, prices, metric)
        free = {group.name: block_of(group, round_to, None) for group in left if group.frozen is None}
        least = {name: least_width(widths.size[name], block, limits.get(name, 0.0)) for name, block in free.items()}
        if lowest_total(widths, least) <= target * (1 + 1e-12):
            break
        gone |= branch.gone
    return gone


def lowest(groups: Sequence[Group], costs: Costs, metric: Metric, *, round_to: int = 1) -> float:
    """The least share of `metric`, 0 to 1, that `select` reaches in blocks of `round_to` channels (auto: 1)."""
    widths = Widths(groups, costs, metric)
    free = [group for group in groups if group.frozen is None]
    return lowest_total(widths, {g.name: min(g.size, block_of(g, round_to, None)) for g in free}) / widths.total()


def rounded_up(share: float) -> float:
    """A share to ask for: three significant digits, never below what was found."""
    step = 10.0 ** (math.floor(math.log10(share)) - 2)
    return math.ceil(round(share / step, 6)) * step


def block_of(group: Group, round_to: int, share: float | None) -> int:
    """The rounding of one group; with a share to keep, no coarser than that width. Wide channels are units already."""
    if any(part.block > 1 and part.dim == 0 for part in group.slices):
        return 1
    if share is None:
        return round_to
    block = round_to
    while block > 1 and block > group.size * share:
        block //= 2
    return block


def least_width(size: int, block: int, share: float) -> int:
    wanted = max(1, math.ceil(size * share - 1e-9))
    return min(size, math.ceil(wanted / block) * block)


def make_reachable(
    widths: Widths,
    blocks: dict[str, int],
    least: dict[str, int],
    limits: Mapping[str, float],
    *,
    target: float,
    adapt: bool,
) -> None:
    """Give up the floor, then (`adapt`) halve the widest blocks, until the target can be reached or nothing is left."""

    def bare(name: str) -> int:
        return least_width(widths.size[name], blocks[name], limits.get(name, 0.0))

    if lowest_total(widths, least) > target:
        least.update({name: bare(name) for name in blocks})
    while adapt and max(blocks.values()) > 1 and lowest_total(widths, least) > target:
        widest = max(blocks.values())
        for name, block in blocks.items():
            if block == widest:
                blocks[name] = block // 2
                least[name] = bare(name)


def check_reach(widths: Widths, least: Mapping[str, int], *, keep: float, whole: float) -> None:
    lowest = lowest_total(widths, least) / whole
    if lowest > keep * (1 + 1e-12):
        raise TargetError(
            f"the target {keep:.4g} of the {widths.metric} is out of reach under the limits of the groups; the lowest "
            f"reachable share is {rounded_up(lowest):g}: ask for that, or allow the groups to lose more",
            lowest=lowest,
        )


def lowest_total(widths: Widths, least: Mapping[str, int]) -> float:
    before = dict(widths.kept)
    widths.kept.update(least)
    total = widths.total()
    widths.kept.update(before)
    return total
