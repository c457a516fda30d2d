"""A network as a plain list of operators with shapes: the graph that torch.export reads, without its wrapping."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from compress.example import Example, arguments
from compress.structure import tensors

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Ref:
    """The result of an earlier operator, by its number."""

    index: int


@dataclass(frozen=True)
class Source:
    """A tensor that enters the graph; `name` is a key of the state, or None for an input or a constant."""

    index: int
    name: str | None
    shape: Shape
    given: bool = False  # an input of the network


@dataclass(frozen=True)
class Node:
    """One operator: `arguments` by the names of its schema, tensors among them as Ref."""

    index: int
    operator: str  # "aten.conv2d", without overload and without the underscore of in-place variants
    path: str  # the module it stands in
    arguments: Mapping[str, Any]
    shapes: tuple[Shape | None, ...]  # one per output, None for what is no tensor
    single: bool  # one output, not a tuple
    pointwise: bool


@dataclass
class Graph:
    """Sources, operators in the order they run, and what the network returns."""

    sources: list[Source] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)


def prepare() -> None:
    """Import what torch.export needs, which takes over a second the first time; no part of any network's time."""
    importlib.import_module("torch.export._trace")


def read(model: nn.Module, example: Example) -> Graph:
    """Export `model` on `example` and list its operators; nothing is computed, nothing is copied.

    Tensors are named by the first of their names in `tensors(model)`; those without a place there have no name.
    """
    with _quiet(), torch.no_grad():
        program = torch.export.export(model, arguments(example), strict=False)
    known: dict[int, str] = {}
    for name, tensor in tensors(model).items():
        known.setdefault(id(tensor), name)
    held = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    names: dict[str, str | None] = {}
    for spec in program.graph_signature.input_specs:
        meant = held.get(spec.target or "")
        learned = isinstance(meant, Tensor) and meant.is_floating_point()
        names[str(getattr(spec.arg, "name", ""))] = known.get(id(meant)) if learned else None
    given = {
        str(getattr(spec.arg, "name", ""))
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    }
    graph = Graph()
    returned = _walk(_Reader(graph, names, given), program.graph, {})
    kept = {str(getattr(spec.arg, "name", "")) for spec in program.graph_signature.output_specs if _is_result(spec)}
    graph.outputs = [ref for name, ref in returned if name in kept]
    return graph


def norms_behind(graph: Graph) -> dict[str, str]:
    """Path of a convolution or linear layer -> the path of the batch norm that takes its outputs as they are."""
    names = {source.index: source.name for source in graph.sources}

    def owner(node: Node, *given: str) -> str:
        """Whose the first tensor with a name is, of these arguments."""
        refs = [node.arguments.get(name) for name in given]
        found = [names.get(ref.index) for ref in refs if isinstance(ref, Ref)]
        return next((name for name in found if name), "").rpartition(".")[0]

    made = {n.index: owner(n, "weight") for n in graph.nodes if n.operator.startswith(("aten.conv", "aten.linear"))}
    pairs: dict[str, str] = {}
    for node in graph.nodes:
        given = node.arguments.get("input")
        if node.operator == "aten.batch_norm" and isinstance(given, Ref) and (layer := made.get(given.index)):
            pairs.setdefault(layer, owner(node, "weight", "running_mean"))
    return {layer: norm for layer, norm in pairs.items() if norm}


def _is_result(spec: Any) -> bool:
    return bool(spec.kind.name == "USER_OUTPUT")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export warns, logs and prints whole graphs about what concerns its own users."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(before)


@dataclass
class _Reader:
    graph: Graph
    names: Mapping[str, str | None]
    given: set[str]
    count: int = 0

    def next(self) -> int:
        self.count += 1
        return self.count - 1


def _walk(reader: _Reader, graph: fx.Graph, known: dict[fx.Node, Any]) -> list[tuple[str, Any]]:
    """Append the operators of one (sub)graph; returns the names and references of what it gives back."""
    for node in graph.nodes:
        if node in known:
            continue
        if node.op == "placeholder":
            known[node] = _source(reader, node)
        elif node.op == "get_attr":
            held = getattr(graph.owning_module, str(node.target), None)
            known[node] = held if isinstance(held, fx.GraphModule) else _constant(reader, held)
        elif node.op == "output":
            flat = torch.utils._pytree.tree_leaves(node.args[0])
            return [(leaf.name, known[leaf]) for leaf in flat if isinstance(leaf, fx.Node) and leaf in known]
        elif node.op == "call_function":
            known[node] = _call(reader, node, known)
    return []


def _source(reader: _Reader, node: fx.Node) -> Ref:
    index = reader.next()
    value = node.meta.get("val")
    shape = tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()
    reader.graph.sources.append(Source(index, reader.names.get(node.name), shape, node.name in reader.given))
    return Ref(index)


def _constant(reader: _Reader, held: object) -> Ref:
    index = reader.next()
    reader.graph.sources.append(Source(index, None, tuple(held.shape) if isinstance(held, Tensor) else ()))
    return Ref(index)


def _call(reader: _Reader, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    arguments: list[Any] = [_looked_up(argument, known) for argument in node.args]
    bodies = [a for a in arguments if isinstance(a, fx.GraphModule)]
    if len(bodies) == 1 and "wrap" in str(node.target):  # autocast or no_grad around a part of the network
        inputs = arguments[arguments.index(bodies[0]) + 1 :]
        places = [n for n in bodies[0].graph.nodes if n.op == "placeholder"]
        inside = dict(zip(places, inputs[len(inputs) - len(places) :], strict=True))
        return [ref for _, ref in _walk(reader, bodies[0].graph, inside)]
    if node.target is operator.getitem:
        source, item = arguments
        return source[item] if isinstance(source, (list, tuple)) else None
    index = reader.next()
    shapes, single = _shapes(node.meta.get("val"))
    name, pointwise = _operator(node.target)
    found = _bind(node, arguments, known)
    reader.graph.nodes.append(Node(index, name, _path(node), found, shapes, single, pointwise))
    if single:
        return Ref(index)
    return [Ref(index)] + [Ref(reader.next()) for _ in shapes[1:]]


def _looked_up(argument: Any, known: Mapping[fx.Node, Any]) -> Any:
    """An argument with the graph's own nodes replaced by references."""
    if isinstance(argument, fx.Node):
        return known.get(argument)
    if isinstance(argument, (list, tuple)):
        return [_looked_up(item, known) for item in argument]
    return argument


def _shapes(value: object) -> tuple[tuple[Shape | None, ...], bool]:
    def shape(found: object) -> Shape | None:
        return tuple(int(n) for n in found.shape) if isinstance(found, Tensor) else None

    if isinstance(value, (list, tuple)):
        return tuple(shape(v) for v in value), False
    return (shape(value),), True


def _operator(target: Any) -> tuple[str, bool]:
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.split('::')[1]}"
        return name if name.endswith("__") else name.rstrip("_"), torch.Tag.pointwise in target.tags
    return str(getattr(target, "__name__", target)), False


def _bind(node: fx.Node, positional: Sequence[Any], known: Mapping[fx.Node, Any]) -> dict[str, Any]:
    named = {key: _looked_up(value, known) for key, value in node.kwargs.items()}
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {**{str(i): value for i, value in enumerate(positional)}, **named}
    found = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    found.update({a.name: value for a, value in zip(schema.arguments, positional, strict=False)})
    return {**found, **named}


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return path.split("@")[0]
