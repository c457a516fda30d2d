"""Folding: the layers behind a cut take over, by least squares, what the removed channels told them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress import ranks
from compress.groups import Group, reading
from compress.groups.cut import removed_elements, without
from compress.groups.parts import side
from compress.groups.types import Slice
from compress.structure import owner

RIDGE = 1e-3  # of the mean square of what is read: keeps the solution near the cut one where there are few images


class _Reached(Exception):
    """The layer in question has been reached: the rest of the forward pass is of no interest."""


def fold(
    model: nn.Module,
    dense: nn.Module,
    groups: Sequence[Group],
    kept: Mapping[str, Sequence[int]],
    images: Iterable[Tensor],
) -> tuple[str, ...]:
    """Refit every weight that read a removed channel, so that its layer gives what it gave before the cut.

    Layer by layer, in the order of the forward pass: with x what the layer reads in the dense network and y what it
    reads in this one, A minimises sum |x - A y|^2 over places of `images` (+ a ridge towards the cut), and W becomes
    the dense W A. So the errors of earlier layers are made up for as well, as in the reconstruction of Luo et al.
    (ThiNet, arXiv 1707.06342, equation 7), here with one matrix over channels for all places of a kernel: every place
    by itself is closer right after the cut, and behind after five epochs (benchmarks/LOG.md). Layers of more than
    reading.WIDEST inputs stay as they were cut.

    Args:
        model: cut to `kept`, in place changed; its batch norms count by batch here, their statistics being another
            network's. dense: as it was before the cut, left untouched.
        groups, kept: what was cut.
        images: a few hundred normalised ones, in batches (N, C, H, W) on the networks' device; read once. Where
            several processes work together each gives its own, and all end with the same weights.

    Returns: the names of the weights that were refitted.
    """
    gone = removed_elements(groups, kept)
    given = [batch.detach() for batch in images]
    found: list[str] = []
    with _by_batch(model), _by_batch(dense, norms=False), torch.no_grad():
        for path in _in_order(model, {name.rpartition(".")[0] for name in gone}, given[0]):
            name = f"{path}.weight" if path else "weight"
            axis = _reading_axis(model, name, gone.get(name, {}))
            if axis is not None:
                _refit(model, dense, name, axis=axis, gone=gone[name], batches=given)
                found.append(name)
    return tuple(found)


def _reading_axis(model: nn.Module, name: str, gone: Mapping[int, Tensor]) -> int | None:
    """The axis of a weight along which inputs were removed, where this layer can be refitted."""
    module, leaf = owner(model, name)
    tensor = getattr(module, leaf)
    plain = isinstance(module, nn.Linear) or (isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1)
    if not plain or not isinstance(tensor, nn.Parameter) or not tensor.requires_grad:
        return None
    axis = next((dim for dim in gone if side(module, Slice(name, dim)) == "in"), None)
    return axis if axis is None or tensor.shape[axis] + len(gone[axis]) <= reading.WIDEST else None


def _refit(
    model: nn.Module, dense: nn.Module, name: str, *, axis: int, gone: Mapping[int, Tensor], batches: Sequence[Tensor]
) -> None:
    """W <- W_dense A for one layer, A from the normal equations in float64; what is never seen stays as it was cut."""
    (layer, leaf), (whole, _) = owner(model, name), owner(dense, name)
    own: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    for batch in batches:
        y, x = (reading.channels(of, _read(network, of, batch)) for network, of in ((model, layer), (dense, whole)))
        own, cross = own + y.T @ y, cross + y.T @ x  # (kept, kept), (kept, inputs)
    assert isinstance(own, Tensor) and isinstance(cross, Tensor)
    own, cross = ranks.summed(own), ranks.summed(cross)
    ridge = RIDGE * own.diagonal().mean().clamp(min=1e-300)  # less would overflow where a layer reads zeros alone
    same = torch.eye(cross.shape[1], dtype=own.dtype, device=own.device)
    start = without(same, {0: gone[axis]})  # (kept, inputs): the cut itself, which takes nothing over
    solved = torch.linalg.solve(own + ridge * same[: len(own), : len(own)], cross + ridge * start)
    weight = without(getattr(whole, leaf).detach(), {dim: leaving for dim, leaving in gone.items() if dim != axis})
    getattr(layer, leaf).copy_(torch.tensordot(weight.double(), solved, dims=([axis], [1])).movedim(-1, axis))


def _read(network: nn.Module, layer: nn.Module, batch: Tensor) -> Tensor:
    """What a layer reads of a batch."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        network(batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _in_order(model: nn.Module, paths: set[str], batch: Tensor) -> list[str]:
    """The modules at `paths` in the order in which the forward pass reaches them, each once."""
    reached: dict[str, None] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda *_, path=path: reached.setdefault(path))
        for path in paths
    ]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(reached)


@contextmanager
def _by_batch(model: nn.Module, *, norms: bool = True) -> Iterator[None]:
    """Evaluation mode inside, but (`norms`) batch norms normalise by the batch and leave their statistics alone."""
    modes = [(module, module.training) for module in model.modules()]
    tracked = [m for m in model.modules() if norms and isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm, copy.deepcopy(dict(norm.named_buffers()))) for norm in tracked]
    model.eval()
    for norm in tracked:
        norm.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, buffers in before:
            norm.load_state_dict(buffers, strict=False)
