"""Ids along the axes of the tensors between operators, and the few moves that every rule is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.groups.classes import Classes, Ids

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Bundle:
    """Ids over one axis, or jointly over several: index (h, d) of two axes may be one channel of its own."""

    dims: tuple[int, ...]
    ids: Ids  # one axis per entry of dims


@dataclass(frozen=True)
class Value:
    """A tensor: which axes carry ids. The others stay as they are, but `loose` ones take on any size."""

    shape: Shape
    bundles: tuple[Bundle, ...] = ()
    loose: frozenset[int] = frozenset()

    def at(self, dim: int) -> Bundle | None:
        """The bundle that holds this axis."""
        return next((b for b in self.bundles if dim in b.dims), None)


def fresh(classes: Classes, shape: Shape) -> Value:
    """A parameter: ids of its own along every axis."""
    ids = [classes.new(size) for size in shape]
    return Value(shape, tuple(Bundle((d,), i) for d, i in enumerate(ids) if shape[d] > 1))


def place(value: Value, dims: Sequence[int], shape: Sequence[int]) -> Value:
    """Move axis i of `value` to `dims[i]` of a larger space, in which its other axes have size 1."""
    size = [1] * len(shape)
    for at, dim in enumerate(dims):
        size[dim] = value.shape[at]
    bundles = tuple(Bundle(tuple(dims[d] for d in b.dims), b.ids) for b in value.bundles)
    return Value(tuple(size), bundles, frozenset(dims[d] for d in value.loose))


def moved(value: Value, where: Mapping[int, int], shape: Shape) -> Value:
    """The axes renumbered; those not in `where` must carry no ids."""
    bundles = tuple(Bundle(tuple(where[d] for d in b.dims), b.ids) for b in value.bundles)
    return Value(shape, bundles, frozenset(where[d] for d in value.loose if d in where))


def stiffen(classes: Classes, value: Value, dims: Iterable[int], why: str) -> Value:
    """The given axes lose no index: joint bundles give way along them, single ones are frozen."""
    stiff = {d % len(value.shape) for d in dims} if value.shape else set()
    bundles: list[Bundle] = []
    for bundle in value.bundles:
        axes = [i for i, d in enumerate(bundle.dims) if d in stiff]
        if len(axes) == len(bundle.dims):
            classes.freeze(bundle.ids, why)
        elif axes:
            rest = tuple(d for d in bundle.dims if d not in stiff)
            bundles.append(Bundle(rest, classes.collapse(bundle.ids, axes)))
        else:
            bundles.append(bundle)
    return replace(value, bundles=tuple(bundles), loose=value.loose - stiff)


def freeze(classes: Classes, value: Value, why: str) -> Value:
    """No index of this tensor may leave."""
    for bundle in value.bundles:
        classes.freeze(bundle.ids, why)
    return Value(value.shape)


def align(classes: Classes, values: Sequence[Value], shape: Shape, why: str) -> Value:
    """Lay tensors over each other, as elementwise operators do with broadcasting: what meets leaves together.

    All values have the rank of `shape`. Where ids meet an axis that stays, they stay too; joint ids give way there.
    """
    bundles: list[Bundle] = []
    waiting = [(b, v) for v in values for b in v.bundles]
    while waiting:
        cluster = [waiting.pop()]
        dims = set(cluster[0][0].dims)
        while touching := [item for item in waiting if dims & set(item[0].dims)]:
            cluster += touching
            waiting = [item for item in waiting if not dims & set(item[0].dims)]
            dims.update(d for b, _ in cluster for d in b.dims)
        stiff = {d for d in dims for v in values if v.shape[d] != 1 and d not in v.loose and v.at(d) is None}
        met = _join(classes, [b for b, _ in cluster], stiff, why)
        if met is not None:
            bundles.append(met)
    loose = {d for d in range(len(shape)) if all(v.shape[d] == 1 or d in v.loose for v in values) and shape[d] > 1}
    return Value(shape, tuple(bundles), frozenset(loose))


def _join(classes: Classes, bundles: list[Bundle], stiff: set[int], why: str) -> Bundle | None:
    common = set.intersection(*(set(b.dims) for b in bundles)) - stiff
    joint = max(bundles, key=lambda b: len(b.dims))
    last = max(joint.dims)
    if len(joint.dims) > 1 and common == {last} and any(b.dims == (last,) for b in bundles):
        for bundle in bundles:  # a vector for every head alike, such as a norm's scale: heads can leave, its places not
            if bundle.dims == (last,):
                classes.freeze(bundle.ids, why)
        bundles = [b for b in bundles if b.dims != (last,)]
        return _join(classes, bundles, stiff | {last}, why)
    if not common:
        for bundle in bundles:
            classes.freeze(bundle.ids, why)
        return None
    dims = tuple(sorted(common))
    found = [_onto(classes, bundle, dims) for bundle in bundles]
    for other in found[1:]:
        classes.unite(found[0], other)
    return Bundle(dims, found[0])


def _onto(classes: Classes, bundle: Bundle, dims: tuple[int, ...]) -> Ids:
    """The bundle's ids over `dims`, ascending; what it has besides leaves together."""
    axes = [i for i, d in enumerate(bundle.dims) if d not in dims]
    ids = classes.collapse(bundle.ids, axes) if axes else bundle.ids
    rest = [d for d in bundle.dims if d in dims]
    return ids.transpose([rest.index(d) for d in dims])


def drop(classes: Classes, value: Value, dims: Iterable[int], *, keep: bool = False) -> Value:
    """Reduce axes: ids along them alone end here, joint ones give way. With `keep` the axes stay, of size 1."""
    gone = {d % len(value.shape) for d in dims}
    bundles = []
    for bundle in value.bundles:
        axes = [i for i, d in enumerate(bundle.dims) if d in gone]
        if len(axes) < len(bundle.dims):
            rest = tuple(d for d in bundle.dims if d not in gone)
            bundles.append(Bundle(rest, classes.collapse(bundle.ids, axes) if axes else bundle.ids))
    if keep:
        shape = tuple(1 if d in gone else n for d, n in enumerate(value.shape))
        return Value(shape, tuple(bundles), value.loose - gone)
    left = [d for d in range(len(value.shape)) if d not in gone]
    where = {d: i for i, d in enumerate(left)}
    return moved(Value(value.shape, tuple(bundles), value.loose), where, tuple(value.shape[d] for d in left))


def reshape(classes: Classes, value: Value, shape: Shape) -> Value:
    """Read the same elements under another shape: axes are split, merged, or both.

    A merged axis repeats the ids of the one that carried some; a split one holds joint ids until an operator behind
    it says which of the new axes can lose indices (or `Classes.split` does).
    """
    pieces = _pieces(value.shape, shape)
    value = _one_each(classes, value, pieces)
    bundles = []
    for bundle in value.bundles:
        touched = [p for p in pieces if set(p[0]) & set(bundle.dims)]
        old, new = [d for p in touched for d in p[0]], [d for p in touched for d in p[1]]
        order = sorted(range(len(bundle.dims)), key=lambda i: bundle.dims[i])
        ids = bundle.ids.transpose(order).reshape([value.shape[d] if d in bundle.dims else 1 for d in old])
        ids = np.broadcast_to(ids, [value.shape[d] for d in old]).reshape([shape[d] for d in new])
        varying = [a for a in range(ids.ndim) if bool((ids != ids.take([0], a)).any())]
        ids = ids[tuple(slice(None) if a in varying else 0 for a in range(ids.ndim))]
        if len(varying) > 1 and any(len(p[1]) > 1 for p in touched):
            classes.split(ids)
        bundles.append(Bundle(tuple(new[a] for a in varying), ids))
    loose = {d for old, new in pieces if set(old) <= value.loose for d in new}
    return Value(shape, tuple(bundles), frozenset(loose))


def _pieces(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Least runs of axes of two shapes that hold the same number of elements; axes of size 1 are left out."""
    left, right = [d for d, n in enumerate(old) if n != 1], [d for d, n in enumerate(new) if n != 1]
    found: list[tuple[list[int], list[int]]] = []
    while left and right:
        a, b = [left.pop(0)], [right.pop(0)]
        while (p := math.prod(old[d] for d in a)) != (q := math.prod(new[d] for d in b)):
            (a if p < q else b).append((left if p < q else right).pop(0))
        found.append((a, b))
    return found


def _one_each(classes: Classes, value: Value, pieces: Sequence[tuple[list[int], list[int]]]) -> Value:
    """Where axes with ids of their own are merged, the first keeps them; an index of both could not leave."""
    for old, _ in pieces:
        held = [b for b in value.bundles if set(b.dims) & set(old)]
        if len(old) > 1 and len(held) > 1:
            first = min(held, key=lambda b: min(b.dims))
            others = {d for b in held if b is not first for d in b.dims if d in old}
            value = stiffen(classes, value, others, "its channels are merged with others into one axis")
    return value
