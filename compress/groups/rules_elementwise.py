"""Rules of operators that keep every index where it is, or reduce axes."""

from __future__ import annotations

from compress.groups.step import Result, Rule, Step
from compress.groups.values import Value, drop, freeze, place, stiffen


def pointwise(step: Step) -> Result:
    """Each element of the output is made of the elements at its place."""
    return step.over(step.tensors())


def same(step: Step) -> Result:
    """The first tensor passes through; further ones (shapes, types) do not matter."""
    value = step.tensors()[0]
    return tuple(value if shape == value.shape else None for shape in step.shapes) if len(step.shapes) > 1 else value


def filled(step: Step) -> Result:
    """A constant, whatever its size: broadcast over every axis."""
    return Value(step.shape, (), frozenset(range(len(step.shape))))


def _dims(step: Step, value: Value) -> list[int]:
    dims = step.get("dim", "dims")
    if dims is None or dims == []:
        return list(range(len(value.shape)))
    return [d % len(value.shape) for d in ([dims] if isinstance(dims, int) else dims)]


def _mixing(step: Step, value: Value, dims: list[int]) -> None:
    for bundle in value.bundles:
        if set(bundle.dims) <= set(dims):
            step.classes.mix(bundle.ids)


def total(step: Step) -> Result:
    """A sum: channels of zero add nothing."""
    value = step.tensors()[0]
    if not value.shape:
        return value
    return drop(step.classes, value, _dims(step, value), keep=bool(step.get("keepdim")))


def reduced(step: Step) -> Result:
    """A mean, maximum or norm: over channels its value depends on how many there are."""
    value = step.tensors()[0]
    if not value.shape:
        return value
    _mixing(step, value, _dims(step, value))
    found = drop(step.classes, value, _dims(step, value), keep=bool(step.get("keepdim")))
    return tuple(found if s is not None else None for s in step.shapes) if len(step.shapes) > 1 else found


def normalised(step: Step) -> Result:
    """Softmax and its like: along the axis every value depends on all others; joint ids give way there."""
    value = step.tensors()[0]
    dims = _dims(step, value)
    _mixing(step, value, dims)
    joint = {d for b in value.bundles if len(b.dims) > 1 and not set(b.dims) <= set(dims) for d in b.dims}
    return stiffen(step.classes, value, joint & set(dims), step.why)


def ordered(step: Step) -> Result:
    """Sorting, cumulating and the like: the place along the axis matters, so nothing leaves there."""
    value = step.tensors()[0]
    dims = _dims(step, value) if step.get("dims") is not None else _dims(step, value)[-1:]  # `flip` has several
    value = stiffen(step.classes, value, dims, f"its channels are put in order ({step.where})")
    found = tuple(
        Value(s, value.bundles) if s is not None and len(s) == len(value.shape) else None for s in step.shapes
    )
    return found if len(found) > 1 else (found[0] or freeze(step.classes, value, step.why))


def over_places(step: Step) -> Result:
    """Pooling and resizing: the trailing axes are places, all others pass."""
    value = step.tensors()[0]
    size = step.get("output_size", "kernel_size", "scale_factors", "scales", "padding")
    last = len(size) if isinstance(size, (list, tuple)) else 1
    last = {"1d": 1, "2d": 2, "3d": 3}.get(
        step.operator[-2:], len(value.shape) - 2 if "upsample" in step.operator else last
    )
    rank = len(value.shape)
    value = stiffen(step.classes, value, range(rank - last, rank), f"its channels are places ({step.where})")
    found = tuple(Value(s, value.bundles) for s in step.shapes if s is not None)
    return found if len(step.shapes) > 1 else found[0]


def like_second(step: Step) -> Result:
    """PReLU: the second tensor is a vector over axis 1, or a single number."""
    value, weight = step.tensors()
    at = 1 if len(value.shape) > 1 else 0
    return step.over([value, place(weight, [at], [1] * len(value.shape))], value.shape)


def picked(step: Step) -> Result:
    """gather along an axis: indices hold places of that axis, the others are matched."""
    value, index = step["self"], step["index"]
    dim = step["dim"] % len(value.shape)
    value = stiffen(step.classes, value, [dim], f"its channels are picked by number ({step.where})")
    index = stiffen(step.classes, index, [dim], step.why)
    both = (
        Value(step.shape, v.bundles, v.loose | {d for d in range(len(step.shape)) if d == dim}) for v in (value, index)
    )
    return step.over(list(both))


_REDUCED = (
    "mean amax amin max min std var norm linalg_vector_norm logsumexp prod argmax argmin std_mean var_mean any all"
)
_SAME = (
    "dropout feature_dropout alpha_dropout native_dropout contiguous to _to_copy type_as alias detach lift_fresh_copy "
    "lift_fresh identity float half double bfloat16 log_sigmoid hardswish nan_to_num _assert_tensor_metadata "
    "conj resolve_conj positive data sym_size"
)
_PLACES = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d max_pool2d_with_indices _adaptive_avg_pool2d "
    "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d upsample_linear1d "
    "upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa _upsample_nearest_exact2d "
    "reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d lp_pool2d"
)
_POINTWISE = "where masked_fill lerp addcmul addcdiv clamp maximum minimum float_power glu_jvp xlogy"
_FILLED = (
    "zeros ones full zeros_like ones_like full_like empty empty_like new_zeros new_ones new_full new_empty "
    "scalar_tensor rand rand_like randn randn_like bernoulli"
)

TABLE: dict[str, Rule] = {
    **{f"aten.{name}": reduced for name in _REDUCED.split()},
    **{f"aten.{name}": same for name in _SAME.split()},
    **{f"aten.{name}": over_places for name in _PLACES.split()},
    **{f"aten.{name}": pointwise for name in _POINTWISE.split()},
    **{f"aten.{name}": filled for name in _FILLED.split()},
    "aten.sum": total,
    "aten.softmax": normalised,
    "aten._softmax": normalised,
    "aten.log_softmax": normalised,
    "aten.cumsum": ordered,
    "aten.sort": ordered,
    "aten.topk": ordered,
    "aten.flip": ordered,
    "aten.prelu": like_second,
    "aten.gather": picked,
}
