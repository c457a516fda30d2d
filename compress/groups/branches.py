"""Residual branches that can leave a network as a whole: found on its graph, not by names, and proved by removal."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import PruneError
from compress.example import fitting
from compress.groups.graph import Graph, Node, Ref, prepare
from compress.groups.prove import outputs
from compress.groups.trace import TIME_LIMIT, graph_of, time_limited
from compress.groups.twin import lively, shared
from compress.structure import Stand, remove


@dataclass(frozen=True)
class Branch:
    """What is added to a skip path, and what the network loses without it."""

    name: str
    gone: Mapping[str, Stand]  # its modules -> what stands there once it has left, for `structure.remove`
    distortion: float  # |outputs without it - outputs| / |outputs|, Euclidean


def branches(model: nn.Module, example: Tensor, *, time_limit: float = TIME_LIMIT) -> tuple[Branch, ...]:
    """Find the residual branches that may leave, each proved: without it the network gives what it gives with zeros.

    An addition joins a skip path and a branch. The branch starts at one tensor, nothing else reads what is in it, all
    its layers belong to modules that lie in it whole, and the skip path comes from the same tensor through fewer
    layers, one at most. Of nested branches the innermost are offered. [ours] What a branch is worth is what the outputs
    lose without it, as in the lesion study of Veit et al. (arXiv 1605.06431, section 4), here without labels.

    Args:
        model: left untouched. example: inputs (N, C, H, W) to measure the distortion on; real ones tell more.

    Raises:
        PruneError: torch.export cannot read the network, or the time is up.
    """
    prepare()
    with time_limited(time_limit):
        twin = shared(model)
        (example,) = fitting(example, twin)
        found = _innermost(twin, graph_of(twin, example[:1]))
        proved = [(paths, stand) for paths in found if (stand := _proved(twin, example[:1], paths)) is not None]
        names = _names(twin, [paths for paths, _ in proved])
        whole = outputs(twin, example)
        gone = [_gone(paths, stand) for paths, stand in proved]
        return tuple(Branch(n, g, _distortion(twin, example, g, whole)) for n, g in zip(names, gone, strict=True))


# --- on the graph ---------------------------------------------------------------------------------------------------


@dataclass
class _Lines:
    """Who reads whom; sets of operators are bits of an integer."""

    reads: dict[int, tuple[int, ...]] = field(default_factory=dict)  # operator -> operators, inputs and tensors
    readers: dict[int, int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)  # all that an operator depends on, itself included
    live: int = 0  # what depends on the network's input
    heavy: int = 0  # what is made of matrices and filters alone
    outputs: int = 0


def _lines(graph: Graph) -> _Lines:
    lines = _Lines()
    for source in graph.sources:
        bit = 1 << source.index
        lines.before[source.index] = bit
        lines.live |= bit if source.given else 0
        lines.heavy |= bit if source.name is not None and _is_matrix(source.shape) else 0
    owner = {node.index + at: node.index for node in graph.nodes for at in range(len(node.shapes))}
    owner |= {source.index: source.index for source in graph.sources}
    for node in graph.nodes:
        reads = tuple(dict.fromkeys(owner[ref.index] for ref in _refs(node.arguments) if ref.index in owner))
        bit = 1 << node.index
        lines.reads[node.index] = reads
        lines.before[node.index] = bit
        for read_one in reads:
            lines.before[node.index] |= lines.before[read_one]
            lines.readers[read_one] = lines.readers.get(read_one, 0) | bit
        lines.live |= bit if any(lines.live >> i & 1 for i in reads) else 0
        lines.heavy |= bit if not lines.live & bit and any(lines.heavy >> i & 1 for i in reads) else 0
    for ref in graph.outputs:
        lines.outputs |= 1 << owner[ref.index] if isinstance(ref, Ref) else 0
    return lines


def _is_matrix(shape: Sequence[int]) -> bool:
    return math.prod(shape) != max(shape, default=1)


def _refs(argument: Any) -> Iterator[Ref]:
    if isinstance(argument, Ref):
        yield argument
    elif isinstance(argument, Mapping):
        for value in argument.values():
            yield from _refs(value)
    elif isinstance(argument, (list, tuple)):
        for value in argument:
            yield from _refs(value)


def _innermost(model: nn.Module, graph: Graph) -> list[list[str]]:
    """The modules of every branch in the order they run, smaller branches before those that overlap them."""
    lines = _lines(graph)
    found: list[tuple[int, int, list[str]]] = []
    for node in graph.nodes:
        if node.operator != "aten.add":
            continue
        pair = [node.arguments.get("self"), node.arguments.get("other")]
        for skip, end in (pair, pair[::-1]):
            inside = _branch(graph, lines, node, skip, end)
            if inside and (paths := _modules(model, graph, lines, inside)):
                found.append((inside.bit_count(), inside, paths))
    chosen: list[tuple[int, list[str]]] = []
    for _, inside, paths in sorted(found, key=lambda f: f[0]):
        if not any(inside & taken for taken, _ in chosen):
            chosen.append((inside, paths))
    return [paths for inside, paths in sorted(chosen, key=lambda c: c[0].bit_length())]


def _branch(graph: Graph, lines: _Lines, node: Node, skip: object, end: object) -> int:
    """The operators that only `end` needs, where they are a branch beside `skip`; else 0."""
    if not isinstance(skip, Ref) or not isinstance(end, Ref) or end.index not in lines.reads:
        return 0
    shapes = {n.index: n.shapes[0] for n in graph.nodes} | {s.index: s.shape for s in graph.sources}
    if skip.index not in lines.before or shapes[skip.index] != node.shapes[0]:
        return 0
    inside = lines.before[end.index] & ~lines.before[skip.index]
    inside &= sum(1 << n.index for n in graph.nodes)
    members = [n.index for n in graph.nodes if inside >> n.index & 1]
    leaks = inside & lines.outputs or any(lines.readers.get(i, 0) & ~inside & ~(1 << node.index) for i in members)
    starts = {i for member in members for i in lines.reads[member] if lines.live >> i & 1 and not inside >> i & 1}
    if leaks or len(starts) != 1:
        return 0
    start = starts.pop()
    beside, within = (_fewest_layers(lines, start, to) for to in (skip.index, end.index))
    return inside if beside < min(within, 2) else 0


def _fewest_layers(lines: _Lines, start: int, end: int) -> float:
    """Layers with matrices or filters on the way with the fewest of them; infinite where there is no way."""
    least: dict[int, float] = {start: 0}
    for index in (i for i in lines.reads if start < i <= end):
        reads = lines.reads[index]
        if lines.live >> index & 1:
            before = min((least.get(i, math.inf) for i in reads), default=math.inf)
            least[index] = before + any(lines.heavy >> i & 1 for i in reads)
    return least.get(end, math.inf)


# --- from operators to modules --------------------------------------------------------------------------------------


def _modules(model: nn.Module, graph: Graph, lines: _Lines, inside: int) -> list[str]:
    """The largest modules with weights that lie in a branch whole, in the order they run; none where some layer of the
    branch is in no such module, or its weights are used elsewhere too.
    """
    all_of: dict[str, int] = {}
    for node in graph.nodes:
        for prefix in _prefixes(node.path):
            all_of[prefix] = all_of.get(prefix, 0) | 1 << node.index
    last: dict[str, int] = {}
    for node in (n for n in graph.nodes if inside >> n.index & 1):
        for prefix in _prefixes(node.path):
            if not all_of[prefix] & ~inside and any(True for _ in model.get_submodule(prefix).parameters()):
                last[prefix] = node.index
                break
    paths = sorted(last, key=last.__getitem__)
    own = {id(t): any(_is_in(n, p) for p in paths) for n, t in model.named_parameters(remove_duplicate=False)}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        if own[id(tensor)] and not any(_is_in(name, path) for path in paths):
            return []  # shared with a module that stays
    for source in graph.sources:
        is_read = lines.readers.get(source.index, 0) & inside
        if is_read and source.name and _is_matrix(source.shape) and not any(_is_in(source.name, p) for p in paths):
            return []
    return paths


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def _is_in(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")


def _names(model: nn.Module, found: Sequence[Sequence[str]]) -> list[str]:
    """What a branch's modules lie in; its largest module where several branches lie there."""

    def around(paths: Sequence[str]) -> str:
        shared_by = [_prefixes(path)[: None if len(paths) == 1 else -1] for path in paths]
        return next((p for p in reversed(shared_by[0]) if all(p in others for others in shared_by)), "")

    def largest(paths: Sequence[str]) -> str:
        return max(paths, key=lambda path: sum(p.numel() for p in model.get_submodule(path).parameters()))

    wide = [around(paths) for paths in found]
    return [n if n and wide.count(n) == 1 else largest(paths) for n, paths in zip(wide, found, strict=True)]


# --- by trial -------------------------------------------------------------------------------------------------------


def _gone(paths: Sequence[str], stand: Stand) -> dict[str, Stand]:
    return {path: stand if path == paths[-1] else "pass" for path in paths}


def _proved(model: nn.Module, example: Tensor, paths: Sequence[str]) -> Stand | None:
    """What has to stand at a branch's end so that its removal equals, bit by bit, all its parameters set to zero."""
    awake = lively(model)
    wanted = outputs(_zeroed(awake, paths), example)
    if not all(bool(t.isfinite().all()) for t in wanted) or _equal(wanted, outputs(awake, example)):
        return None  # it does nothing, so that a trial would prove nothing
    for stand in ("zero", "zeros"):  # scalars leave an exported graph by themselves, but nothing can be added in place
        network = shared(awake)
        remove(network, _gone(paths, stand))
        try:
            found = outputs(network, example)
            if _equal(found, wanted) and _trains(network, example):
                return stand
        except PruneError:  # the time is up
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError):
            continue
    return None


def _zeroed(model: nn.Module, paths: Sequence[str]) -> nn.Module:
    network = shared(model)
    for path in paths:
        for parameter in network.get_submodule(path).parameters():
            parameter.data = torch.zeros_like(parameter)
    return network


def _trains(network: nn.Module, example: Tensor) -> bool:
    """Whether it runs in training mode too, where stochastic depth asks for shapes."""
    with torch.no_grad(), torch.random.fork_rng():
        copy.deepcopy(network).train()(torch.cat([example, example]))
    return True


def _distortion(model: nn.Module, example: Tensor, gone: Mapping[str, Stand], whole: Sequence[Tensor]) -> float:
    network = shared(model)
    remove(network, gone)
    pairs = list(zip(outputs(network, example), whole, strict=True))
    scale = math.sqrt(sum(float(b.double().square().sum()) for _, b in pairs))
    return math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs)) / (scale or 1.0)


def _equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
