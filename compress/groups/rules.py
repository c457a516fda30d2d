"""Every operator's rule in one table, and the walk that applies them: a graph -> what leaves together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch.utils._pytree import tree_leaves

from compress.groups import rules_elementwise, rules_layers, rules_parts, rules_shape
from compress.groups.classes import Classes, Ids
from compress.groups.graph import Graph, Node, Ref
from compress.groups.step import Counted, Result, Rule, Step
from compress.groups.values import Bundle, Value, freeze

RULES: dict[str, Rule] = {**rules_elementwise.TABLE, **rules_parts.TABLE, **rules_shape.TABLE, **rules_layers.TABLE}

Counts = list[Counted]
Tensors = dict[str, list[Ids]]


def propagate(graph: Graph, derived: Collection[str] = ()) -> tuple[Classes, Tensors, Counts]:
    """Carry ids through every operator.

    Args:
        derived: paths of modules that take the width of their heads from their input's: both lose the same places.

    Returns: all statements; the ids of every named tensor, axis by axis; module integers with an id per unit.
    """
    classes, counts = Classes(), []  # type: tuple[Classes, Counts]
    values: dict[int, Value | None] = {}
    tensors: Tensors = {}
    for source in graph.sources:
        if source.name is None:
            values[source.index] = Value(source.shape)
        elif source.name in tensors:  # a shared one
            values[source.index] = _value(source.shape, tensors[source.name])
        else:
            tensors[source.name] = [classes.new(size) for size in source.shape]
            values[source.index] = _value(source.shape, tensors[source.name])
    inputs: dict[str, list[Value]] = {path: [] for path in derived}
    paths: dict[int, str] = {}
    for node in graph.nodes:
        for path in derived:
            inputs[path] += _entering(node, path, values, paths)
        paths.update(dict.fromkeys(range(node.index, node.index + len(node.shapes)), node.path))
        arguments = {name: _resolved(argument, values) for name, argument in node.arguments.items()}
        entered = tuple(inputs.get(node.path, ()))
        step = Step(node.operator, node.path, arguments, node.shapes, classes, counts, entered)
        found = _applied(step, node)
        for at, value in enumerate(found if isinstance(found, tuple) else (found,)):
            values[node.index + at] = value
    for ref in graph.outputs:
        value = values[ref.index] if isinstance(ref, Ref) else None
        if value is not None:
            freeze(classes, value, "its channels reach the output")
    return classes, tensors, counts


def _entering(node: Node, module: str, values: Mapping[int, Value | None], paths: Mapping[int, str]) -> list[Value]:
    """Results of operators outside a module that this one takes into it."""
    if not _within(node.path, module):
        return []
    indices = [ref.index for ref in tree_leaves(list(node.arguments.values())) if isinstance(ref, Ref)]
    found = (values[i] for i in indices if i in paths and not _within(paths[i], module))
    return [value for value in found if value is not None]


def _within(path: str, module: str) -> bool:
    return path == module or path.startswith(module + ".")


def _value(shape: tuple[int, ...], ids: list[Ids]) -> Value:
    return Value(shape, tuple(Bundle((d,), i) for d, i in enumerate(ids) if shape[d] > 1))


def _resolved(argument: Any, values: dict[int, Value | None]) -> Any:
    if isinstance(argument, Ref):
        return values.get(argument.index)
    if isinstance(argument, (list, tuple)):
        return [_resolved(item, values) for item in argument]
    return argument


def _applied(step: Step, node: Node) -> Result:
    rule: Callable[[Step], Result] | None = RULES.get(node.operator)
    if rule is None and node.pointwise:
        rule = rules_elementwise.pointwise
    if rule is None:
        return rules_layers.unknown(step)
    try:
        return rule(step)
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError):  # a form that the rule does not know
        return rules_layers.unknown(step)
