"""torch-pruning's dependency graph as groups: a second opinion on what `trace` finds, for tests and comparisons."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.groups.types import Group, Slice


def consult(model: nn.Module, example: Tensor) -> tuple[Group, ...]:
    """The groups that torch-pruning finds, not proved; it raises errors of many kinds where it cannot read a network.

    Args:
        model: left untouched.
        example: one input batch (N, C, H, W).
    """
    twin = copy.deepcopy(model).eval()
    for parameter in twin.parameters():  # the graph is read off autograd: what needs no gradient would be invisible
        parameter.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(_read(twin, example))


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
