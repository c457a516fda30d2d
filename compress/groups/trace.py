"""From a network to its channel groups: the graph of torch.export, one rule per operator, and a proof of each group."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import torch
from torch import nn

from compress.errors import PruneError
from compress.example import Example, arguments, fitting, shapes
from compress.groups.assemble import assemble
from compress.groups.graph import Graph, norms_behind, prepare, read
from compress.groups.prove import Bench, prove, prove_apart, prove_together
from compress.groups.rules import propagate
from compress.groups.twin import shared
from compress.groups.types import Group
from compress.structure import tensors

log = logging.getLogger(__name__)
MISFIT = "RuntimeError: shape"  # how a trial fails where a reshape takes a width from elsewhere
RESHAPES = ("aten.reshape", "aten.view", "aten.unflatten")
TIME_LIMIT = 120.0  # seconds; of 88 networks torch.export took 5.6 for the slowest


def trace(model: nn.Module, example: Example, *, time_limit: float = TIME_LIMIT) -> tuple[Group, ...]:
    """Find which channels of a network must be removed together, and prove each group by a trial removal.

    Args:
        model: left untouched, in whatever mode and on whatever device it is.
        example: one input batch (N, C, H, W), or a tuple where the forward pass takes several; N = 1 will do.
        time_limit: seconds for reading and proving (main thread only; elsewhere no limit is kept).

    Returns: every group of output channels, in the order in which their layers are registered. A group that cannot
        be cut has the reason in `frozen`: the network's output, an operator without a rule, or a trial that went wrong.

    Raises:
        PruneError: the network does not run on `example`, tracing fails or takes too long, or nothing can be cut.
    """
    prepare()
    with time_limited(time_limit):
        twin = shared(model)
        example = fitting(example, twin)
        groups = _proved(twin, example, graph_of(twin, example), time_limit)
    if all(group.frozen for group in groups):
        reasons = "; ".join(f"{g.name}: {g.frozen}" for g in groups[:3]) or "no convolution or linear layer found"
        raise PruneError(f"no channel of this network can be removed ({reasons})")
    return groups


def find(model: nn.Module, example: Example, derived: Collection[str] = ()) -> tuple[tuple[Group, ...], set[str]]:
    """The groups as the graph shows them, not yet proved, and the names of those that mix channels (layer norms).

    Args:
        derived: see `propagate`.

    Raises:
        PruneError: the network does not run on `example`, or torch.export cannot read it.
    """
    return _found(model, graph_of(model, example), derived)


def _proved(model: nn.Module, example: Example, graph: Graph, time_limit: float) -> tuple[Group, ...]:
    """The groups of the graph after their trials; where a reshape fails, also with the heads of some modules tied."""
    began = time.monotonic()
    until = began + 0.8 * time_limit
    bench = Bench.of(model, example)
    groups, mixed = _found(model, graph)
    proved = prove_together(bench, groups, mixed=mixed)
    if isinstance(proved, tuple):
        return proved
    if MISFIT in proved and (derived := _reshaping(graph, [group for group in groups if group.frozen is None])):
        tied, tied_mixed = _found(model, graph, derived)
        proved = prove_together(bench, tied, mixed=tied_mixed)
        if isinstance(proved, tuple):
            return proved
    groups = prove_apart(bench, groups, mixed=mixed, until=until)
    derived = _reshaping(graph, [group for group in groups if MISFIT in (group.frozen or "")])
    if derived and time.monotonic() - began < 0.3 * time_limit:
        tied, tied_mixed = _found(model, graph, derived)
        groups = max(groups, prove(bench, tied, mixed=tied_mixed, until=until), key=_freedom)
    return groups


def _reshaping(graph: Graph, groups: Sequence[Group]) -> set[str]:
    """Modules of these groups that reshape: they may take the width of their heads from their input's."""
    names = {part.name for group in groups for part in group.slices}
    reshaping = {node.path for node in graph.nodes if node.operator in RESHAPES and len(node.shapes[0] or ()) > 3}
    return {path for path in reshaping if any(name.startswith(path + ".") for name in names)}


def _freedom(groups: Sequence[Group]) -> int:
    """How many axes of tensors can be cut."""
    return len({(part.name, part.dim) for group in groups if group.frozen is None for part in group.slices})


def _found(model: nn.Module, graph: Graph, derived: Collection[str] = ()) -> tuple[tuple[Group, ...], set[str]]:
    """The groups as the graph shows them, and the names of those that mix channels; rigid modules keep theirs."""
    classes, found, counts = propagate(graph, derived)
    ids = {name: found[name] for name in tensors(model) if name in found}
    groups, mixed = assemble(classes, ids, counts)
    norms = norms_behind(graph)
    return tuple(_rigid(model, _with_norms(group, norms)) for group in groups), mixed


def _with_norms(group: Group, norms: Mapping[str, str]) -> Group:
    own = {part.name.rpartition(".")[0] for part in group.slices}
    return replace(group, norms=tuple(pair for pair in norms.items() if own.issuperset(pair)))


def graph_of(model: nn.Module, example: Example) -> Graph:
    """What `read` gives, or a PruneError that says why there is no graph."""
    try:
        return read(model, example)
    except PruneError:
        raise
    except Exception as error:
        _must_run(model, example)
        raise PruneError(f"torch.export cannot read the network: {line(error)}{_part(model)}") from error


# Modules whose forward derives one width from another, so that no part of them can be cut by itself.
RIGID: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: "MultiheadAttention takes its heads from the width of its input",
}


def _rigid(model: nn.Module, group: Group) -> Group:
    """Freeze a group that touches such a module; trials would come to the same, more slowly."""
    for part in group.slices:
        path = part.name.rpartition(".")[0]
        for module in (model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])):
            reason = next((why for kind, why in RIGID.items() if isinstance(module, kind)), None)
            if reason is not None:
                return group.freeze(f"{reason} ({path})")
    return group


def _part(model: nn.Module) -> str:
    """What to do with a detector, whose boxes depend on the data while its backbone is a plain network."""
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        return ""
    return "; prune its backbone by itself, in place: compress.shrink(model.backbone, images, keep=...)"


def _must_run(model: nn.Module, example: Example) -> None:
    try:
        with torch.no_grad():
            model(*arguments(example))
    except PruneError:
        raise
    except Exception as error:
        raise PruneError(
            f"the network does not run on an input of shape {shapes(example)}: {line(error)}{_part(model)}"
        ) from error


def line(error: BaseException) -> str:
    """An error on one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


@contextmanager
def time_limited(seconds: float) -> Iterator[None]:
    """Raise PruneError after `seconds`, on the main thread; on others no limit is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise PruneError(
            f"tracing took more than {seconds:g} s and was given up: the network is too large for this tracer"
        )

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)  # again and again: torch may swallow one
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
