"""Rules of operators with weights, products of tensors, and norms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from compress.groups.classes import Classes, Ids
from compress.groups.step import Result, Rule, Step
from compress.groups.values import Bundle, Value, align, drop, freeze, moved, place, stiffen

# --- products -------------------------------------------------------------------------------------------------------


def contract(step: Step, values: Sequence[Value], labels: Sequence[Sequence[str]], out: Sequence[str]) -> Value:
    """A product summed over the labels that `out` lacks, as in einsum: axes with the same label meet.

    Joint ids over a kept and a summed axis, as the heads and places of a query, give way along the summed one.
    """
    every = [*out, *sorted({n for found in labels for n in found} - set(out))]
    at = {name: i for i, name in enumerate(every)}
    size: dict[str, int] = {}
    for value, found in zip(values, labels, strict=True):
        for name, n in zip(found, value.shape, strict=True):
            size[name] = max(size.get(name, 1), n)
    space = tuple(size[name] for name in every)
    placed = [place(_ascending(v, [at[n] for n in found]), sorted(at[n] for n in found), space)
              for v, found in zip(values, labels, strict=True)]  # fmt: skip
    met = align(step.classes, placed, space, step.why)
    return drop(step.classes, met, range(len(out), len(every)))


def _ascending(value: Value, positions: Sequence[int]) -> Value:
    """The axes in the order of their positions."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    return moved(value, {old: new for new, old in enumerate(order)}, tuple(value.shape[d] for d in order))


def linear(step: Step) -> Result:
    """(..., I) x (O, I) + (O)."""
    value, weight = step.get("input", "self"), step["weight"]
    front = [f"b{i}" for i in range(len(value.shape) - 1)]
    _make(step, weight, 0)
    found = contract(step, [value, weight], [[*front, "i"], ["o", "i"]], [*front, "o"])
    return _plus(step, found, step.get("bias"), len(found.shape) - 1)


def _make(step: Step, weight: Value, dim: int) -> None:
    bundle = weight.at(dim)
    if bundle is not None and len(bundle.dims) == 1:
        step.classes.make(bundle.ids)


def _plus(step: Step, value: Value, bias: Value | None, dim: int) -> Value:
    if bias is None:
        return value
    return align(step.classes, [value, place(bias, [dim], value.shape)], value.shape, step.why)


def matmul(step: Step) -> Result:
    """(..., N, K) x (..., K, M); vectors as torch.matmul takes them."""
    one, other = step["self"], step.get("other", "mat2", "vec")
    left = [f"b{i}" for i in range(len(one.shape) - 2, 0, -1)] + ["n", "k"][2 - min(2, len(one.shape)) :]
    right = [f"b{i}" for i in range(len(other.shape) - 2, 0, -1)] + (["k", "m"] if len(other.shape) > 1 else ["k"])
    batch = [f"b{i}" for i in range(max(len(one.shape), len(other.shape)) - 2, 0, -1)]
    out = batch + ["n"] * ("n" in left) + ["m"] * ("m" in right)
    return contract(step, [one, other], [left, right], out)


def added_product(step: Step) -> Result:
    """addmm and baddbmm: a matrix product plus a tensor."""
    one, other = step.get("mat1", "batch1"), step.get("mat2", "batch2")
    front = ["b"] * (len(one.shape) - 2)
    product = contract(step, [one, other], [[*front, "n", "k"], [*front, "k", "m"]], [*front, "n", "m"])
    return step.over([product, step["self"]])


def einsum(step: Step) -> Result:
    """By its equation; an ellipsis is written out."""
    values: list[Value] = step["tensors"]
    left, _, right = step["equation"].replace(" ", "").partition("->")
    terms = left.split(",")
    dots = max((len(v.shape) - len(t) + 3 for v, t in zip(values, terms, strict=True) if "..." in t), default=0)

    def labels(term: str, rank: int) -> list[str]:
        before, _, after = term.partition("...")
        wide = rank - len(before) - len(after) if "..." in term else 0
        return [*before, *(f"dot{i}" for i in range(dots - wide, dots)), *after]

    found = [labels(t, len(v.shape)) for v, t in zip(values, terms, strict=True)]
    if any(len(set(names)) < len(names) for names in found) or "->" not in step["equation"]:
        return unknown(step)
    return contract(step, values, found, labels(right, len(step.shape)))


def attention(step: Step) -> Result:
    """softmax(q k^T) v over the last two axes; heads, the axes before, leave as wholes."""
    query, key, value = step["query"], step["key"], step["value"]
    front = [f"b{i}" for i in range(len(query.shape) - 2)]
    if step.get("enable_gqa", default=False):
        dim = len(query.shape) - 3
        why = f"its heads share keys and values ({step.where})"
        query, key, value = (stiffen(step.classes, v, [dim], why) for v in (query, key, value))
        size = query.shape[dim]
        key, value = (Value((*v.shape[:dim], size, *v.shape[dim + 1 :]), v.bundles) for v in (key, value))
    if step.get("scale") is None:  # it is taken from the width then
        for bundle in (*query.bundles, *key.bundles):
            if bundle.dims == (len(query.shape) - 1,):
                step.classes.mix(bundle.ids)
    weights = contract(step, [query, key], [[*front, "l", "e"], [*front, "s", "e"]], [*front, "l", "s"])
    mask = step.get("attn_mask")
    if mask is not None:
        weights = step.over([weights, mask], weights.shape)
    found = contract(step, [weights, value], [[*front, "l", "s"], [*front, "s", "v"]], [*front, "l", "v"])
    return found if len(step.shapes) == 1 else (found, *(None for _ in step.shapes[1:]))


# --- convolutions ---------------------------------------------------------------------------------------------------


def convolution(step: Step, *, transposed: bool = False) -> Result:
    """(N, I, places) x (O, I/g, kernel) + (O); a transposed one has (I, O/g, kernel)."""
    value, weight = step["input"], step["weight"]
    transposed = transposed or bool(step.get("transposed", default=False))
    places = len(weight.shape) - 2
    if len(value.shape) != places + 2:
        return unknown(step)
    why = f"its channels are places ({step.where})"
    value = stiffen(step.classes, value, range(2, places + 2), why)
    weight = stiffen(step.classes, weight, range(2, places + 2), why)
    value = Value(value.shape[:2], value.bundles, value.loose - set(range(2, places + 2)))
    weight = Value(weight.shape[:2], weight.bundles)
    groups = step.get("groups", default=1)
    if groups > 1:
        found = _grouped(step, value, weight, groups, transposed)
    else:
        _make(step, weight, 1 if transposed else 0)
        found = contract(step, [value, weight], [["n", "i"], ["i", "o"] if transposed else ["o", "i"]], ["n", "o"])
    found = _plus(step, found, step.get("bias"), 1)
    return Value(step.shape, found.bundles)


def _grouped(step: Step, value: Value, weight: Value, groups: int, transposed: bool) -> Value:
    """Each of `groups` parts of the input makes a part of the output. Depthwise: each channel its own part."""
    outputs = step.shape[1]
    shape = (value.shape[0], outputs)
    why = f"its channels meet positions that stay ({step.where})"
    left, right = value.at(1), weight.at(0)
    if left is None or right is None or left.dims != (1,) or right.dims != (0,):
        freeze(step.classes, weight, why)
        freeze(step.classes, value, why)
        return Value(shape)
    inputs, rows = left.ids, right.ids
    if transposed:
        step.classes.unite(inputs, rows)
        if weight.shape[1] > 1 or inputs.size > groups:
            why = f"a transposed convolution in {groups} groups is not supported ({step.where})"
            freeze(step.classes, weight, why)
            return Value(shape)
        return Value(shape, (Bundle((1,), rows),))
    parts, filters = inputs.reshape(groups, -1), rows.reshape(groups, -1)
    if parts.shape[1] == 1:
        step.classes.unite(parts, filters)
    else:
        step.classes.make(rows)
        columns = weight.at(1)
        assert columns is not None
        units = step.classes.new(groups)
        step.counts.append((step.path, "groups", units))
        step.classes.decide_later(partial(_decide, step.classes, parts, filters, columns.ids, units, [False]))
    return Value(shape, (Bundle((1,), rows),))


def _decide(
    classes: Classes, parts: Ids, filters: Ids, columns: Ids, units: Ids, done: list[bool], labels: Ids
) -> bool:
    """Whole groups leave, or as many channels from each: whichever has more units to choose from."""
    if done[0]:
        return False
    done[0] = True
    if len(parts) >= min(parts.shape[1], filters.shape[1]):
        classes.unite(parts, units[:, None])
        classes.unite(filters, units[:, None])
        classes.freeze(columns, "whole groups of the convolution leave")
    else:
        classes.collapse(parts, [0])
        classes.collapse(filters, [0])
        classes.unite(parts[0], columns)
        classes.freeze(units, "the convolution keeps its groups")
    return True


# --- norms ----------------------------------------------------------------------------------------------------------


def batch_norm(step: Step) -> Result:
    """One scale, shift, mean and variance per index of axis 1; statistics of the batch itself mix the other axes."""
    value = step["input"]
    vectors = [step.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    if step.get("training", "use_input_stats", default=False):
        for bundle in value.bundles:
            if 1 not in bundle.dims:
                step.classes.mix(bundle.ids)
    placed = [place(v, [1], value.shape) for v in vectors if v is not None]
    found = align(step.classes, [value, *placed], value.shape, step.why)
    return found if len(step.shapes) == 1 else (found, *(None for _ in step.shapes[1:]))


def layer_norm(step: Step) -> Result:
    """Over the last axes; ids that lie joint over these and others (heads) give way there."""
    value = step["input"]
    width = len(step["normalized_shape"])
    dims = set(range(len(value.shape) - width, len(value.shape)))
    joint = {d for b in value.bundles if not set(b.dims) <= dims for d in b.dims}
    value = stiffen(step.classes, value, joint & dims, step.why)
    for bundle in value.bundles:
        if set(bundle.dims) <= dims:
            step.classes.mix(bundle.ids)
    vectors = [step.get(name) for name in ("weight", "bias")]
    found = step.over([value, *(v for v in vectors if v is not None)], value.shape)
    return found if len(step.shapes) == 1 else (found, *(None for _ in step.shapes[1:]))


def group_norm(step: Step) -> Result:
    """Over parts of axis 1: as many channels leave from each part, so that the number of parts stays."""
    value, groups = step["input"], step["num_groups"]
    bundle = value.at(1)
    if bundle is not None and bundle.dims == (1,):
        if groups < value.shape[1]:
            step.classes.mix(bundle.ids)
        if 1 < groups < value.shape[1]:
            step.classes.collapse(bundle.ids.reshape(groups, -1), [0])
        elif groups == value.shape[1]:
            units = step.classes.new(groups)
            step.counts.append((step.path, "num_groups", units))
            step.classes.unite(units, bundle.ids)
    vectors = [step.get(name) for name in ("weight", "bias")]
    placed = [place(v, [1], value.shape) for v in vectors if v is not None]
    return align(step.classes, [value, *placed], value.shape, step.why)


def unknown(step: Step) -> Result:
    """No rule: what the operator touches stays."""
    for value in step.tensors():
        freeze(
            step.classes, value, f"{step.operator.removeprefix('aten.')} has no rule (in {step.path or 'the network'})"
        )
    found = tuple(Value(shape) if shape is not None else None for shape in step.shapes)
    return found if len(found) != 1 else (found[0] or Value(()))


TABLE: dict[str, Rule] = {
    **{f"aten.{name}": convolution for name in ("conv1d", "conv2d", "conv3d", "convolution", "_convolution")},
    **{f"aten.conv_transpose{n}": partial(convolution, transposed=True) for n in ("1d", "2d", "3d")},
    **{f"aten.{name}": matmul for name in ("matmul", "bmm", "mm", "mv", "dot")},
    "aten.linear": linear,
    "aten.addmm": added_product,
    "aten.baddbmm": added_product,
    "aten.einsum": einsum,
    "aten.scaled_dot_product_attention": attention,
    "aten.batch_norm": batch_norm,
    "aten.instance_norm": batch_norm,
    "aten.layer_norm": layer_norm,
    "aten.rms_norm": layer_norm,
    "aten.group_norm": group_norm,
}
