"""Module integers that may have to follow a cut, such as `num_heads`: proposed by value, judged by a trial."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from compress.groups.types import Count, Group, Read
from compress.structure import INTEGERS

WIDTHS = {"dim", "embed_dim", "in_dim", "input_dim", "hidden_size", "num_features", "in_features", "out_features",
          "in_channels", "in_chs"}  # fmt: skip  # names of a layer's input width: seldom that of its heads

# Words in the names of integers that count places or layers: those never follow channels.
PLACES = ("block", "depth", "grid", "halo", "kernel", "patch", "resolution", "shift", "stride", "win_", "window")


def proposals(model: nn.Module, group: Group) -> list[tuple[Count, ...]]:
    """Sets of integers that could follow the group, the likeliest first; the graph's own are in each.

    A candidate is what a module holds of the numbers that its operators were given, or an integer of a module around
    one of the group's tensors with the value of the group's size, or of the indices that the group spans on one axis.
    """
    read = _held(model, group.reads)
    known = {(count.module, count.attribute) for count in read}
    near, far = (
        [count for count in _candidates(model, group, levels) if (count.module, count.attribute) not in known]
        for levels in (1, 2)
    )
    found = near or far
    units = [count for count in found if count.step == 1]
    if units and any(part.block > 1 for part in group.slices):
        choices = [[c for c in found if c.step == 1 or c.attribute not in WIDTHS], found, far, units, []]
    else:  # an integer that nothing reads, such as a container's out_channels, is better left alone
        choices = [[], found, far, units]
    names = dict.fromkeys(count.attribute for count in units)  # two of one value, as many heads as places in each
    if 1 < len(names) < 4:
        choices += [[c for c in found if c.attribute == n or (c.step > 1 and c.attribute not in WIDTHS)] for n in names]
    unique = dict.fromkeys(tuple(choice) for choice in choices)
    return [(*group.counts, *first, *choice) for first in ([read, []] if read else [[]]) for choice in unique]


def _held(model: nn.Module, reads: Sequence[Read]) -> list[Count]:
    """What modules hold of the numbers that their operators were given.

    A tuple of just these numbers falls at one place. Otherwise an integer may be the size of the part, and another
    that of all parts, from which the module takes one by difference.
    """
    found: dict[tuple[str, str], int] = {}
    total: dict[tuple[str, str], int] = defaultdict(int)
    for read in reads:
        inside = [f"{read.module}.{name}".strip(".") for name, _ in model.get_submodule(read.module).named_children()]
        exact = [(p, n) for p in (*_upwards(read.module), *inside) for n, value in vars(model.get_submodule(p)).items()
                 if type(value) in (tuple, list) and tuple(value) == read.numbers]  # fmt: skip
        found |= {(path, f"{name}[{read.at}]"): read.step for path, name in exact}
        for path in _upwards(read.module) if not exact else ():
            for name, value in vars(model.get_submodule(path)).items():
                if type(value) is not int or _of_places(name):
                    continue
                if value == read.numbers[read.at] > 1:
                    found[path, name] = read.step
                elif value == sum(read.numbers):
                    total[path, name] += read.step
    return [Count(path, name, step) for (path, name), step in {**total, **found}.items()]


def _upwards(path: str) -> tuple[str, ...]:
    """A module and the one around it."""
    return tuple(dict.fromkeys((path, path.rpartition(".")[0])))


def _candidates(model: nn.Module, group: Group, levels: int) -> list[Count]:
    """Integers of the modules that own the group's tensors, and of `levels` modules around each."""
    spans: dict[tuple[str, int], int] = defaultdict(int)
    for part in group.slices:
        spans[part.name, part.dim] += part.block
    steps = {group.size * step: step for step in {1, *spans.values(), *(part.block for part in group.slices)}}
    paths = {part.name.rpartition(".")[0] for part in group.slices}
    for _ in range(levels):
        paths |= {path.rpartition(".")[0] for path in paths}
    known = {(count.module, count.attribute) for count in group.counts}
    found = []
    for path in sorted(paths):
        module = model.get_submodule(path)
        if isinstance(module, tuple(INTEGERS)):
            continue
        for name, value in vars(module).items():
            follows = type(value) is int and value in steps and value > 1 and not _of_places(name)
            if follows and (path, name) not in known:
                found.append(Count(path, name, steps[value]))
    return found


def _of_places(name: str) -> bool:
    return any(word in name for word in PLACES)
