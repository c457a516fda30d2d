"""From classes of indices to groups: classes that lie alike in all tensors are the channels of one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from compress.groups.classes import Classes, Ids
from compress.groups.step import Counted, Part
from compress.groups.types import Count, Group, Read, Slice

Key = tuple[str, int | str | Part]  # a tensor and its axis, or a module and its integer, or numbers read in it


def assemble(
    classes: Classes, tensors: Mapping[str, Sequence[Ids]], counts: Sequence[Counted]
) -> tuple[tuple[Group, ...], set[str]]:
    """The groups of output channels, and the names of those behind a layer norm or the like.

    Args:
        tensors: name -> the ids of each axis, in the order in which groups are to be named and listed.
    """
    labels = classes.solve()
    keys: list[Key] = [(name, dim) for name, axes in tensors.items() for dim in range(len(axes))]
    arrays = [ids for axes in tensors.values() for ids in axes]
    seen: set[tuple[Key, bytes]] = set()
    for path, attribute, ids in counts:
        flat = labels[ids].reshape(-1, ids.shape[-1])
        again = ((path, attribute), flat[0].tobytes())
        if again not in seen and not (flat != flat[:1]).any():
            keys.append((path, attribute))
            arrays.append(ids.reshape(-1, ids.shape[-1])[0])
            seen.add(again)
    key = np.concatenate([np.full(len(ids), k) for k, ids in enumerate(arrays)])
    place = np.concatenate([np.arange(len(ids)) for ids in arrays])
    ids = np.concatenate(arrays)
    of = labels[ids]
    order = np.lexsort((place, key, of))
    made = np.zeros(classes.count, bool)
    made[classes.made()] = True
    rows = _Rows(of[order], key[order], place[order], made[ids][order])
    rows.wide = {name for name, axes in tensors.items() if len(axes) > 1}
    frozen, mixed = classes.frozen(labels), set(classes.mixed(labels).tolist())
    found: list[tuple[tuple[int, int], Group, bool]] = []
    for members in rows.alike(frozen):
        for first, group in _groups(rows, members, keys):
            label = int(rows.label[members[0]])
            found.append((first, group.freeze(frozen[label]) if label in frozen else group, label in mixed))
    found.sort(key=lambda item: item[0])
    return _named(found, keys, arrays)


class _Rows:
    """Every index of every axis as a row, sorted by class, then by axis and place."""

    def __init__(self, label: Ids, key: Ids, place: Ids, made: np.ndarray) -> None:
        self.label, self.key, self.place, self.made = label, key, place, made
        self.wide: set[str] = set()  # the tensors of two axes and more

    def alike(self, frozen: Mapping[int, str]) -> list[Ids]:
        """The first rows of classes, those of one pattern (as many places on each axis, same reason) together."""
        begin = np.flatnonzero(np.r_[True, self.label[1:] != self.label[:-1]])
        if not len(self.label):
            return []
        salt = np.random.default_rng(0).integers(0, 2**63, int(self.key.max()) + 1, dtype=np.uint64)
        pattern = np.add.reduceat(salt[self.key], begin)  # wraps around: a hash of the multiset of axes
        length = np.diff(np.r_[begin, len(self.label)])
        table: dict[tuple[int, int, str | None], list[int]] = {}
        for at in np.flatnonzero(np.logical_or.reduceat(self.made, begin)).tolist():
            first = int(begin[at])
            why = frozen.get(int(self.label[first]))
            table.setdefault((int(pattern[at]), int(length[at]), why), []).append(first)
        self.length = dict(zip(begin.tolist(), length.tolist(), strict=True))
        return [np.array(members) for members in table.values()]


def _groups(rows: _Rows, members: Ids, keys: Sequence[Key]) -> list[tuple[tuple[int, int], Group]]:
    """Cut classes of one pattern where their places do not follow regularly; each piece is a group."""
    where = members[:, None] + np.arange(rows.length[int(members[0])])
    key = rows.key[where[0]]
    where = where[np.lexsort(rows.place[where].T[::-1])]
    place = rows.place[where]
    steps = np.diff(place, axis=0)
    wide = np.array([keys[k][0] in rows.wide for k in key])
    fixed = np.array([isinstance(keys[k][1], int) for k in key])
    found: list[tuple[tuple[int, int], Group]] = []
    begin, single = 0, False
    while begin < len(place):
        block = np.concatenate([np.full(end - start, end - start) for start, end in _runs(place[begin], key)])
        broken = np.flatnonzero((steps[begin:] != block)[:, fixed].any(1))
        end = begin + (int(broken[0]) if len(broken) else len(place) - begin - 1) + 1
        at = int(np.argmax(2 * (rows.made[where[begin]] & wide) + wide))  # the layer that makes them, not its norm
        first = (int(key[at]), int(place[begin, at]))
        group = _group(place[begin:end], key, keys)
        if end - begin == 1 and single and not group.counts:  # a run of odd ones, listed as one
            group = Group("", found[-1][1].size + 1, (), "its channels lie in no regular order")
            first, _ = found.pop()
        single = end - begin == 1
        found.append((first, group))
        begin = end
    return found


def _group(place: Ids, key: Ids, keys: Sequence[Key]) -> Group:
    slices: list[Slice] = []
    counts: dict[Key, int] = {}
    reads: list[Read] = []
    for begin, end in _runs(place[0], key):
        name, axis = keys[int(key[begin])]
        if isinstance(axis, int):
            slices.append(Slice(name, axis, end - begin, int(place[0, begin])))
        elif isinstance(axis, str):
            counts[name, axis] = counts.get((name, axis), 0) + end - begin
        else:
            reads.append(Read(name, *axis, end - begin))
    follow = tuple(Count(module, str(attribute), step) for (module, attribute), step in counts.items())
    return Group("", len(place), tuple(slices), None, follow, tuple(reads))


def _runs(place: Ids, key: Ids) -> list[tuple[int, int]]:
    """Where neighbouring places of one axis begin and end."""
    cuts = np.flatnonzero((np.diff(key) != 0) | (np.diff(place) != 1)) + 1
    return list(pairwise([0, *cuts.tolist(), len(place)]))


def _named(
    found: Sequence[tuple[tuple[int, int], Group, bool]], keys: Sequence[Key], arrays: Sequence[Ids]
) -> tuple[tuple[Group, ...], set[str]]:
    """Named after the first layer that makes the channels; where it makes several groups, by its first channel too."""
    groups, mixed, taken = [], set(), set()
    for (key, place), group, mixes in found:
        path = str(keys[key][0]).rpartition(".")[0] or str(keys[key][0])
        name = path if path not in taken else f"{path}[{place}:]"
        while name in taken:
            name += "'"
        taken.add(name)
        named = replace(group, name=name, mixed=mixes)
        if named.size == 1:
            named = named.freeze("its channels leave only all together")
        groups.append(named)
        if mixes:
            mixed.add(name)
    return tuple(groups), mixed
