"""Every operator's rule in one table, and the walk that applies them: a graph -> what leaves together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from compress.groups import rules_elementwise, rules_layers, rules_parts, rules_shape
from compress.groups.classes import Classes, Ids
from compress.groups.graph import Graph, Node, Ref
from compress.groups.step import Counted, Result, Rule, Step
from compress.groups.values import Bundle, Value, freeze

RULES: dict[str, Rule] = {**rules_elementwise.TABLE, **rules_parts.TABLE, **rules_shape.TABLE, **rules_layers.TABLE}

Counts = list[Counted]
Tensors = dict[str, list[Ids]]


def propagate(graph: Graph) -> tuple[Classes, Tensors, Counts]:
    """Carry ids through every operator.

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
    for node in graph.nodes:
        arguments = {name: _resolved(argument, values) for name, argument in node.arguments.items()}
        step = Step(node.operator, node.path, arguments, node.shapes, classes, counts)
        found = _applied(step, node)
        for at, value in enumerate(found if isinstance(found, tuple) else (found,)):
            values[node.index + at] = value
    for ref in graph.outputs:
        value = values[ref.index] if isinstance(ref, Ref) else None
        if value is not None:
            freeze(classes, value, "its channels reach the output")
    return classes, tensors, counts


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
