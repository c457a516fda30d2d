"""Rules of operators that move indices: reshape, permute, expand, pad, repeat, shuffle, unfold."""

from __future__ import annotations

import math

import numpy as np

from compress.groups.rules_parts import standing
from compress.groups.step import Result, Rule, Step
from compress.groups.values import Bundle, Value, moved, place, reshape, stiffen


def reshaped(step: Step) -> Result:
    """Any operator that reads the same elements in the same order under another shape."""
    value = step.tensors()[0]
    found = reshape(step.classes, value, step.shape)
    if len(value.shape) < 3:  # a vector that is laid over an image, a table of biases: by a shape held in the module
        for dim in (bundle.dims[0] for bundle in found.bundles if len(bundle.dims) == 1):
            step.reads(found, dim, step.shape, dim)
    return Value(found.shape, tuple(_with_the_input(step, b) for b in found.bundles), found.loose)


def _with_the_input(step: Step, bundle: Bundle) -> Bundle:
    """Where places in heads are counted as input width / heads, a place leaves all heads, and the input with them."""
    dims = sorted(bundle.dims)
    size = [step.shape[d] for d in dims[-2:]]
    trunk = next((b.ids for v in step.inputs for b in v.bundles if b.ids.shape == (math.prod(size),)), None)
    if trunk is None or len(dims) < 2:
        return bundle
    last = bundle.dims.index(dims[-1])
    ids = step.classes.collapse(bundle.ids, [axis for axis in range(len(dims)) if axis != last])
    step.classes.unite(trunk.reshape(size), ids)
    return Bundle((dims[-1],), ids)


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
        ids = np.concatenate([standing(step, before), bundle.ids, standing(step, after)])
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


def unfolded(step: Step) -> Result:
    """im2col (N, C, H, W) -> (N, C k k, L), and Tensor.unfold (a new last axis of windows)."""
    value: Value = step["self"]
    if step.operator == "aten.unfold":
        dim = step["dimension"] % len(value.shape)
        value = stiffen(step.classes, value, [dim], f"its channels are places ({step.where})")
        return Value(step.shape, value.bundles, value.loose)
    value = stiffen(step.classes, value, [2, 3], f"its channels are places ({step.where})")
    return Value(step.shape, _repeated_in_place(value, 1, int(np.prod(step["kernel_size"]))))


def folded(step: Step) -> Result:
    """col2im (N, C k k, L) -> (N, C, H, W): k * k channels in a row are added into one, at several places."""
    value: Value = step["self"]
    value = stiffen(step.classes, value, [2], f"its channels are places ({step.where})")
    number, channels, places = value.shape
    window = int(np.prod(step["kernel_size"]))
    wide = reshape(step.classes, value, (number, channels // window, window, places))
    wide = stiffen(step.classes, wide, [2], step.why)
    return Value(step.shape, wide.bundles)


def _repeated_in_place(value: Value, dim: int, times: int) -> tuple[Bundle, ...]:
    """Each id along one axis several times in a row."""
    return tuple(Bundle(b.dims, b.ids.repeat(times, b.dims.index(dim))) if dim in b.dims else b for b in value.bundles)


_RESHAPED = "reshape view _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as _reshape_alias ravel"

TABLE: dict[str, Rule] = {
    **{f"aten.{name}": reshaped for name in _RESHAPED.split()},
    **{f"aten.{name}": permuted for name in ("permute", "transpose", "t", "numpy_T", "mT", "movedim", "moveaxis")},
    "aten.expand": expanded,
    "aten.expand_as": expanded,
    "aten.broadcast_to": expanded,
    "aten.pad": padded,
    "aten.constant_pad_nd": padded,
    "aten.repeat": repeated,
    "aten.tile": repeated,
    "aten.repeat_interleave": interleaved,
    "aten.roll": rolled,
    "aten.pixel_shuffle": shuffled,
    "aten.pixel_unshuffle": shuffled,
    "aten.im2col": unfolded,
    "aten.col2im": folded,
    "aten.unfold": unfolded,
}
