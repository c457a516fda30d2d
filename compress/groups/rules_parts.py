"""Rules of operators that take tensors apart along an axis or put them together: slice, split, select, index, cat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.groups.classes import Ids
from compress.groups.step import Result, Rule, Step
from compress.groups.values import Bundle, Shape, Value, moved, stiffen


def _taken(step: Step, value: Value, dim: int, indices: slice | Sequence[int] | Ids, shape: Shape) -> Value:
    """Some indices along one axis, in the given order."""
    bundles = []
    for bundle in value.bundles:
        if dim in bundle.dims:
            at = bundle.dims.index(dim)
            ids = bundle.ids[(slice(None),) * at + (indices,)]
            if ids.shape[at] == 1:
                ids, dims = np.asarray(ids.take(0, at)), tuple(d for d in bundle.dims if d != dim)
                if not dims:
                    step.classes.freeze(ids, f"a single channel is picked ({step.where})")
                    continue
                bundle = Bundle(dims, ids)
            else:
                bundle = Bundle(bundle.dims, ids)
        bundles.append(bundle)
    return Value(shape, tuple(bundles), value.loose)


def sliced(step: Step) -> Result:
    """slice and narrow along one axis."""
    value: Value = step["self"]
    dim = step.get("dim", default=0) % len(value.shape)
    if step.operator == "aten.narrow":
        piece = slice(step["start"], step["start"] + step["length"]) if isinstance(step["start"], int) else None
    else:
        piece = slice(step.get("start"), step.get("end"), step.get("step", default=1))
    if piece is None:
        return Value(step.shape, stiffen(step.classes, value, [dim], step.why).bundles)
    begin, end, stride = piece.indices(value.shape[dim])
    if stride == 1 and (begin == 0) != (end == value.shape[dim]):  # x[:, :n] or x[:, n:]
        cut = end if begin == 0 else begin
        step.reads(value, dim, (cut, value.shape[dim] - cut))
    return _taken(step, value, dim, piece, step.shape)


def parted(step: Step) -> Result:
    """split, chunk, unbind: equal parts of a channel axis lose the same indices, or the cuts would fall elsewhere."""
    value: Value = step["self"]
    dim = step.get("dim", default=0) % len(value.shape)
    sizes = [1] * len(step.shapes) if step.operator == "aten.unbind" else [s[dim] for s in step.shapes if s is not None]
    bundle = value.at(dim)
    if bundle is not None and len(bundle.dims) == 1 and len(set(sizes)) == 1 and sizes[0] > 1:
        step.classes.split(bundle.ids.reshape(len(sizes), sizes[0]))
    if step.operator != "aten.unbind":
        step.reads(value, dim, sizes)
    parts, begin = [], 0
    for size in sizes:
        shape = tuple(size if d == dim else n for d, n in enumerate(value.shape))
        parts.append(_taken(step, value, dim, slice(begin, begin + size), shape))
        begin += size
    if step.operator != "aten.unbind":
        return tuple(parts)
    return tuple(_without(part, dim) for part in parts)


def _without(value: Value, dim: int) -> Value:
    where = {d: d - (d > dim) for d in range(len(value.shape)) if d != dim}
    return moved(value, where, tuple(n for d, n in enumerate(value.shape) if d != dim))


def selected(step: Step) -> Result:
    """One index of an axis."""
    value: Value = step["self"]
    dim = step.get("dim", default=0) % len(value.shape)
    index = step["index"] if isinstance(step["index"], int) else 0
    index %= value.shape[dim]
    bundle = value.at(dim)
    if bundle is not None and bundle.dims == (dim,):
        step.classes.freeze(bundle.ids, f"a single channel is picked ({step.where})")
        value = Value(value.shape, tuple(b for b in value.bundles if b is not bundle), value.loose)
    shape = tuple(1 if d == dim else n for d, n in enumerate(value.shape))
    return _without(_taken(step, value, dim, slice(index, index + 1), shape), dim)


def concatenated(step: Step) -> Result:
    """cat: ids one behind the other; the other axes are matched as by an elementwise operator."""
    values = [v for v in step["tensors"] if v.shape != (0,)]
    dim = step.get("dim", default=0) % len(step.shape)
    held = [v.at(dim) for v in values]
    if all(b is None for b in held):
        return step.over([Value(step.shape, v.bundles, v.loose | {dim}) for v in values])
    joint = {b.dims for b in held if b is not None}
    if len(joint) == 1 and len(next(iter(joint))) > 1 and all(b is not None for b in held):
        dims = next(iter(joint))
        ids = np.concatenate([b.ids for b in held if b is not None], dims.index(dim))
        return Value(step.shape, (Bundle(dims, ids),))
    along, rest = [], []
    for value in values:
        bundle = value.at(dim)
        if bundle is not None and len(bundle.dims) > 1:
            value = stiffen(step.classes, value, set(bundle.dims) - {dim}, step.why)
            bundle = value.at(dim)
        along.append(bundle.ids if bundle is not None else standing(step, value.shape[dim]))
        others = tuple(b for b in value.bundles if dim not in b.dims)
        rest.append(Value(step.shape, others, value.loose | {dim}))
    found = step.over(rest)
    return Value(step.shape, (*found.bundles, Bundle((dim,), np.concatenate(along))), found.loose - {dim})


def standing(step: Step, size: int) -> Ids:
    """Channels that no layer makes, such as padding: they stay."""
    ids = step.classes.new(size)
    step.classes.freeze(ids, f"it is joined to channels that stay ({step.where})")
    return ids


def stacked(step: Step) -> Result:
    """stack: a new axis; what is stacked must keep equal shapes."""
    values: list[Value] = step["tensors"]
    dim = step.get("dim", default=0) % len(step.shape)
    shape = tuple(n for d, n in enumerate(step.shape) if d != dim)
    found = step.over(values, shape)
    return moved(found, {d: d + (d >= dim) for d in range(len(shape))}, step.shape)


def indexed(step: Step) -> Result:
    """x[:, i] with tensors as indices: the axes they name are places, the others pass."""
    value: Value = step["self"]
    indices = list(step["indices"]) + [None] * (len(value.shape) - len(step["indices"]))
    named = [d for d, index in enumerate(indices) if index is not None]
    value = stiffen(step.classes, value, named, f"its channels are picked by number ({step.where})")
    width = len(step.shape) - (len(value.shape) - len(named))
    front = named[0] if named == list(range(named[0], named[0] + len(named))) else 0
    where, at = {}, 0
    for dim in range(len(value.shape)):
        if dim in named:
            continue
        where[dim] = at if at < front else at + width
        at += 1
    return moved(value, where, step.shape)


def looked_up(step: Step) -> Result:
    """index_select and embedding: rows by number."""
    if step.operator == "aten.embedding":
        value = stiffen(step.classes, step["weight"], [0], f"rows are picked by number ({step.where})")
        return moved(value, {1: len(step.shape) - 1}, step.shape)
    value = stiffen(step.classes, step["self"], [step["dim"]], f"its channels are picked by number ({step.where})")
    return Value(step.shape, value.bundles, value.loose)


_PARTED = "split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk"

TABLE: dict[str, Rule] = {
    **{f"aten.{name}": parted for name in _PARTED.split()},
    "aten.slice": sliced,
    "aten.narrow": sliced,
    "aten.select": selected,
    "aten.cat": concatenated,
    "aten.concat": concatenated,
    "aten.concatenate": concatenated,
    "aten.stack": stacked,
    "aten.index": indexed,
    "aten.index_select": looked_up,
    "aten.embedding": looked_up,
}
