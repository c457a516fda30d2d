"""Module integers that may have to follow a cut, such as `num_heads`: proposed by value, judged by a trial."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from compress.groups.types import Count, Group
from compress.structure import INTEGERS

WIDTHS = {"dim", "embed_dim", "in_dim", "input_dim", "hidden_size", "num_features", "in_features", "out_features",
          "in_channels", "in_chs"}  # fmt: skip  # names of a layer's input width: seldom that of its heads


def proposals(model: nn.Module, group: Group) -> list[tuple[Count, ...]]:
    """Sets of integers that could follow the group, the likeliest first; the graph's own are in each.

    A candidate is an integer of a module around one of the group's tensors with the value of the group's size, or of
    the indices that the group spans on one axis.
    """
    near, far = _candidates(model, group, 1), _candidates(model, group, 2)
    if not near and not far:
        return [group.counts]
    found = near or far
    units = [count for count in found if count.step == 1]
    if units and any(part.block > 1 for part in group.slices):
        choices = [[c for c in found if c.step == 1 or c.attribute not in WIDTHS], found, far, units, []]
    else:  # an integer that nothing reads, such as a container's out_channels, is better left alone
        choices = [[], found, far, units]
    names = dict.fromkeys(count.attribute for count in units)
    if len(names) > 1:  # as many heads as a head has channels: one of the integers is meant, not both
        choices += [
            [c for c in found if c.attribute == name or (c.step > 1 and c.attribute not in WIDTHS)] for name in names
        ]
    unique = dict.fromkeys(tuple(choice) for choice in choices)
    return [(*group.counts, *choice) for choice in unique]


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
            if type(value) is int and value in steps and value > 1 and (path, name) not in known:
                found.append(Count(path, name, steps[value]))
    return found
