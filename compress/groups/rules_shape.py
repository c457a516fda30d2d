"""Rules of operators that move indices: reshape, permute, split, concatenate, pad, slice, expand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.groups.classes import Ids
from compress.groups.step import Result, Rule, Step
from compress.groups.values import Bundle, Shape, Value, moved, place, reshape, stiffen


def reshaped(step: Step) -> Result:
    """Any operator that reads the same elements in the same order under another shape."""
    return reshape(step.classes, step.tensors()[0], step.shape)


def permuted(step: Step) -> Result:
    """permute, transpose, movedim, t: axes change places."""
    value: Value = step["self"]
    order = _order(step, len(value.shape))
    return moved(value, {old: new for new, old in enumerate(order)}, step.shape)


def _order(step: Step, rank: int) -> list[int]:
    order = list(range(rank))
    if step.operator == "aten.permute":
        return [d % rank for d in step["dims"]]
    if step.operator in ("aten.movedim", "aten.moveaxis"):
        old, new = ([d] if isinstance(d, int) else list(d) for d in (step["source"], step["destination"]))
        rest = [d for d in order if d not in [o % rank for o in old]]
        for at, dim in sorted(zip([n % rank for n in new], [o % rank for o in old], strict=True)):
            rest.insert(at, dim)
        return rest
    if rank > 1:
        one, other = step.get("dim0", default=rank - 2), step.get("dim1", default=rank - 1)
        order[one], order[other] = order[other], order[one]
    return order


def expanded(step: Step) -> Result:
    """expand: axes of size 1, and new ones in front, take on any size."""
    value = step.tensors()[0]
    shift = len(step.shape) - len(value.shape)
    found = place(value, range(shift, len(step.shape)), step.shape)
    grown = {d for d, n in enumerate(step.shape) if found.shape[d] == 1 and n > 1}
    return Value(step.shape, found.bundles, found.loose | grown)


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
    return _taken(step, value, dim, piece, step.shape)


def parted(step: Step) -> Result:
    """split, chunk, unbind: equal parts of a channel axis lose the same indices, or the cuts would fall elsewhere."""
    value: Value = step["self"]
    dim = step.get("dim", default=0) % len(value.shape)
    sizes = [1] * len(step.shapes) if step.operator == "aten.unbind" else [s[dim] for s in step.shapes if s is not None]
    bundle = value.at(dim)
    if bundle is not None and len(bundle.dims) == 1 and len(set(sizes)) == 1 and sizes[0] > 1:
        step.classes.split(bundle.ids.reshape(len(sizes), sizes[0]))
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
        along.append(bundle.ids if bundle is not None else _standing(step, value.shape[dim]))
        others = tuple(b for b in value.bundles if dim not in b.dims)
        rest.append(Value(step.shape, others, value.loose | {dim}))
    found = step.over(rest)
    return Value(step.shape, (*found.bundles, Bundle((dim,), np.concatenate(along))), found.loose - {dim})


def _standing(step: Step, size: int) -> Ids:
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


def padded(step: Step) -> Result:
    """pad: new places in front of and behind an axis; padded channels stay."""
    value: Value = step["self"]
    amounts = list(step.get("pad", "padding"))
    for at in range(len(amounts) // 2):
        before, after = amounts[2 * at], amounts[2 * at + 1]
        dim = len(value.shape) - 1 - at
        bundle = value.at(dim)
        if bundle is None or (before, after) == (0, 0):
            continue
        if before < 0 or after < 0 or len(bundle.dims) > 1 or step.get("mode", default="constant") != "constant":
            value = stiffen(step.classes, value, [dim], step.why)
            continue
        ids = np.concatenate([_standing(step, before), bundle.ids, _standing(step, after)])
        others = tuple(b for b in value.bundles if b is not bundle)
        value = Value(value.shape, (*others, Bundle((dim,), ids)), value.loose)
    return Value(step.shape, value.bundles, value.loose)


def repeated(step: Step) -> Result:
    """repeat and tile: the ids along an axis, several times over."""
    value: Value = step["self"]
    times = list(step.get("repeats", "dims"))
    shift = len(times) - len(value.shape)
    value = place(value, range(shift, len(times)), step.shape)
    bundles = []
    for bundle in value.bundles:
        ids = np.tile(bundle.ids, [times[d] for d in bundle.dims])
        bundles.append(Bundle(bundle.dims, ids))
    grown = {d for d in range(len(times)) if value.shape[d] == 1 and times[d] > 1}
    return Value(step.shape, tuple(bundles), value.loose | grown)


def interleaved(step: Step) -> Result:
    """repeat_interleave by a number: each id several times in a row."""
    value: Value = step["self"]
    dim, times = step.get("dim"), step.get("repeats")
    if dim is None or not isinstance(times, int):
        return Value(step.shape, stiffen(step.classes, value, range(len(value.shape)), step.why).bundles)
    dim %= len(value.shape)
    grown = {dim} if value.shape[dim] == 1 else set()
    return Value(step.shape, _repeated_in_place(value, dim, times), value.loose | grown)


def rolled(step: Step) -> Result:
    """roll: places move in a circle; a channel axis that is rolled stays."""
    value: Value = step["self"]
    dims = step.get("dims", default=[]) or range(len(value.shape))
    return stiffen(step.classes, value, dims, f"its channels are moved by a fixed amount ({step.where})")


def shuffled(step: Step) -> Result:
    """pixel_shuffle (C r r, H, W) -> (C, H r, W r) and back: r * r channels in a row leave together."""
    value: Value = step["self"]
    rank = len(value.shape)
    value = stiffen(step.classes, value, [rank - 1, rank - 2], f"its channels are places ({step.where})")
    *front, rows, columns = value.shape
    if step.operator == "aten.pixel_shuffle":
        r = step["upscale_factor"]
        wide = reshape(step.classes, value, (*front[:-1], front[-1] // r**2, r, r, rows, columns))
        wide = stiffen(step.classes, wide, [len(front), len(front) + 1], step.why)
        order = [*range(len(front)), *(len(front) + d for d in (2, 0, 3, 1))]
        tall = tuple(wide.shape[d] for d in order)
        return reshape(step.classes, moved(wide, {o: n for n, o in enumerate(order)}, tall), step.shape)
    return Value(step.shape, _repeated_in_place(value, rank - 3, step["downscale_factor"] ** 2))


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


def unfolded(step: Step) -> Result:
    """im2col (N, C, H, W) -> (N, C k k, L), and Tensor.unfold (a new last axis of windows)."""
    value: Value = step["self"]
    if step.operator == "aten.unfold":
        dim = step["dimension"] % len(value.shape)
        value = stiffen(step.classes, value, [dim], f"its channels are places ({step.where})")
        return Value(step.shape, value.bundles, value.loose)
    value = stiffen(step.classes, value, [2, 3], f"its channels are places ({step.where})")
    return Value(step.shape, _repeated_in_place(value, 1, int(np.prod(step["kernel_size"]))))


def _repeated_in_place(value: Value, dim: int, times: int) -> tuple[Bundle, ...]:
    """Each id along one axis several times in a row."""
    return tuple(Bundle(b.dims, b.ids.repeat(times, b.dims.index(dim))) if dim in b.dims else b for b in value.bundles)


_PARTED = "split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk"
_RESHAPED = "reshape view _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as _reshape_alias ravel"

TABLE: dict[str, Rule] = {
    **{f"aten.{name}": reshaped for name in _RESHAPED.split()},
    **{f"aten.{name}": permuted for name in ("permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis")},
    **{f"aten.{name}": parted for name in _PARTED.split()},
    "aten.expand": expanded,
    "aten.expand_as": expanded,
    "aten.broadcast_to": expanded,
    "aten.slice": sliced,
    "aten.narrow": sliced,
    "aten.select": selected,
    "aten.cat": concatenated,
    "aten.concat": concatenated,
    "aten.concatenate": concatenated,
    "aten.stack": stacked,
    "aten.pad": padded,
    "aten.constant_pad_nd": padded,
    "aten.repeat": repeated,
    "aten.tile": repeated,
    "aten.repeat_interleave": interleaved,
    "aten.roll": rolled,
    "aten.pixel_shuffle": shuffled,
    "aten.pixel_unshuffle": shuffled,
    "aten.index": indexed,
    "aten.index_select": looked_up,
    "aten.embedding": looked_up,
    "aten.im2col": unfolded,
    "aten.unfold": unfolded,
}
