"""What scores share: their types, the batches they read, a value of each filter averaged over the layers of a group."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from compress.errors import UsageError
from compress.example import Example, like
from compress.groups import Group
from compress.groups.parts import layer_mean, rows, weights

Scores = Mapping[str, Tensor]  # group name -> (size,) float32 on the CPU; larger = keep
Batches = Iterable[tuple[Example, Any]]  # images (N, C, H, W) or several inputs; labels (N,) int64, masks, a task's own
Given = tuple[tuple[Tensor, ...], Any]  # what the network is called with, and the targets


class Score(Protocol):
    """One importance. `batches` is read at most once, and only by the scores that need data."""

    def __call__(self, model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
        """The importance of every channel of every group, frozen ones included."""


def by_filter(model: nn.Module, groups: Sequence[Group], value: Callable[[Tensor], Tensor]) -> Scores:
    """`value` of every layer's filters, (size, weights per filter) -> (size,), averaged over each group's layers."""
    return {
        group.name: layer_mean(
            (value(rows(tensor.detach(), part, group.size)) for part, tensor in weights(model, group, held=True)),
            group.size,
        )
        for group in groups
    }


def read(model: nn.Module, batches: Batches | None, score: str) -> Iterator[Given]:
    """The batches on the network's device and in its precision; none at all is refused."""
    if batches is None:
        raise UsageError(
            f"the score {score!r} needs data: give batches, pairs of images and labels, or take a score that reads "
            "weights alone, such as 'l2'"
        )
    own = next(t for t in model.state_dict().values() if t.is_floating_point())
    count = 0
    for inputs, targets in batches:
        count += 1
        yield like(inputs, own), tree_map_only(Tensor, lambda target: target.to(own.device), targets)
    if not count:
        raise UsageError(f"the score {score!r} needs data, and there was no batch in what it was given")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module back in its own afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
