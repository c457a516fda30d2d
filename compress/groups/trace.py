"""From a network to its channel groups: torch-pruning's dependency graph, read once and then proved."""

from __future__ import annotations

import copy
import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import PruneError
from compress.groups.prove import prove
from compress.groups.types import Group, Slice

log = logging.getLogger(__name__)
TIME_LIMIT = 120.0  # seconds; the slowest network that torch-pruning finished at all took 32


def trace(model: nn.Module, example: Tensor, *, time_limit: float = TIME_LIMIT) -> tuple[Group, ...]:
    """Find which channels of a network must be removed together, and prove each group by a trial removal.

    Args:
        model: left untouched, in whatever mode and on whatever device it is.
        example: one input batch (N, C, H, W); N = 1 will do.
        time_limit: seconds for reading the dependency graph (main thread only; elsewhere no limit is kept).

    Returns: every group of output channels, in the order of the forward pass. A group that cannot be cut has
        the reason in `frozen`: the network's output, an unsupported layer, or a trial that went wrong.

    Raises:
        PruneError: the network does not run on `example`, tracing fails or takes too long, or nothing can be cut.
    """
    twin = _twin(model)
    like = next((t for t in twin.state_dict().values() if t.is_floating_point()), example)
    example = example.detach().to(like)  # its device and dtype
    try:
        with torch.no_grad():
            twin(example)
    except Exception as error:
        raise PruneError(
            f"the network does not run on an input of shape {tuple(example.shape)}: {_line(error)}"
        ) from error
    with _time_limit(time_limit), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            groups = tuple(_read(twin, example))
        except PruneError:
            raise
        except Exception as error:
            raise PruneError(
                f"torch-pruning cannot trace the network (splits are a usual cause): {_line(error)}"
            ) from error
    normed = {g.name for g in groups if any(_is_channel_norm(twin, part) for part in g.slices)}
    groups = prove(twin, example, groups, exempt=lambda group: group.name in normed)
    if all(group.frozen for group in groups):
        reasons = "; ".join(f"{g.name}: {g.frozen}" for g in groups[:3]) or "no convolution or linear layer found"
        raise PruneError(f"no channel of this network can be removed ({reasons})")
    return groups


def _twin(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():  # the graph is read off autograd: what needs no gradient would be invisible
        parameter.requires_grad_(True)
    return twin


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def expire(signum: int, frame: FrameType | None) -> None:
        raise PruneError(
            f"tracing took more than {seconds:g} s and was given up: the network is too large for this tracer"
        )

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- torch-pruning's graph, translated ------------------------------------------------------------------------------

# (kind of module, side of the cut) -> the tensors touched and the axis in each. First row that matches wins.
_AXES: tuple[tuple[type[nn.Module], str, tuple[tuple[str, int], ...]], ...] = (
    (nn.modules.conv._ConvTransposeNd, "out", (("weight", 1), ("bias", 0))),
    (nn.modules.conv._ConvTransposeNd, "in", (("weight", 0),)),
    (nn.modules.conv._ConvNd, "out", (("weight", 0), ("bias", 0))),
    (nn.modules.conv._ConvNd, "in", (("weight", 1),)),
    (nn.Linear, "out", (("weight", 0), ("bias", 0))),
    (nn.Linear, "in", (("weight", 1),)),
    *(
        (kind, side, (("weight", 0), ("bias", 0), ("running_mean", 0), ("running_var", 0)))
        for kind in (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.PReLU)
        for side in ("out", "in")
    ),
)


def _read(twin: nn.Module, example: Tensor) -> Iterator[Group]:
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(twin, example_inputs=example, verbose=False)
    names = {module: name for name, module in twin.named_modules()}
    seen: set[nn.Module] = set()
    for module, name in names.items():
        if (
            not isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
            or module in seen
            or module not in graph.module2node
        ):
            continue
        if _is_depthwise(module):
            continue  # its channels belong to the layer that feeds it
        pruner = graph.get_pruner_of_module(module)
        size = pruner.get_out_channels(module)
        items = graph.get_pruning_group(module, pruner.prune_out_channels, list(range(size)))
        group = _translate(name, size, items, names, graph)
        seen.update(item.dep.target.module for item in items if graph.is_out_channel_pruning_fn(item.dep.handler))
        yield group


def _translate(name: str, size: int, items: Sequence[Any], names: dict[nn.Module, str], graph: Any) -> Group:
    """One group of torch-pruning's as ours; what has no exact counterpart is frozen with the reason."""
    from torch_pruning.ops import OPTYPE

    slices: dict[Slice, None] = {}
    reason: str | None = None
    for item in items:
        module, kind = item.dep.target.module, item.dep.target.type
        if kind == OPTYPE.OUTPUT:
            reason = reason or "its channels are the network's output"
        elif kind == OPTYPE.PARAMETER:
            reason = reason or f"the parameter {graph._param_to_name.get(module, '?')} is used outside any known layer"
        elif module in names:
            side = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
            found, why = _slices(module, names[module], side, _positions(size, item.root_idxs, item.idxs))
            slices.update(dict.fromkeys(found))
            reason = reason or why
    return Group(name, size, tuple(slices), reason)


def _slices(module: nn.Module, path: str, side: str, runs: list[tuple[int, int]]) -> tuple[list[Slice], str | None]:
    """The slices of one layer, given the (block, offset) runs of the group's channels in it."""
    if not runs:
        return [], f"the channels reach {path} in an order that is no block"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not _is_depthwise(module):
        return [], f"{path} is a grouped convolution ({module.groups} groups)"
    axes = next((axes for kind, at, axes in _AXES if isinstance(module, kind) and at == side), None)
    if _is_depthwise(module):  # one filter per channel, whichever side asks
        axes = (("weight", 0), ("bias", 0))
    if axes is None:
        return [], f"{path} is a {type(module).__name__}, which is not supported here"
    held = {leaf: getattr(module, leaf, None) for leaf, _ in axes}
    return [
        Slice(f"{path}.{leaf}" if path else leaf, dim, block, offset)
        for leaf, dim in axes
        for block, offset in runs
        if isinstance(held[leaf], Tensor)
    ], None


def _positions(size: int, roots: Sequence[int], indices: Sequence[int]) -> list[tuple[int, int]]:
    """How channels map to indices, as (block, offset) runs; empty when the map is neither blocks nor shifted copies."""
    owned: list[list[int]] = [[] for _ in range(size)]
    for root, index in zip(roots, indices, strict=True):
        owned[root].append(index)
    width = len(owned[0])
    if not width or any(len(found) != width for found in owned):
        return []
    table = torch.tensor([sorted(found) for found in owned])  # (channel, copy or place in the block)
    step = torch.arange(size)[:, None]
    if bool((table == table[0, 0] + step * width + torch.arange(width)).all()):
        return [(width, int(table[0, 0]))]
    if bool((table == table[:1] + step).all()):
        return [(1, int(offset)) for offset in table[0]]
    return []


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups > 1
        and module.groups == module.in_channels == module.out_channels
    )


def _is_channel_norm(model: nn.Module, part: Slice) -> bool:
    owner = model.get_submodule(part.name.rpartition(".")[0])
    return isinstance(owner, nn.LayerNorm | nn.GroupNorm)
