"""What a sparsity regulariser is to a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from compress.groups import Group

Scores = Mapping[str, Tensor]  # group name -> (size,) float32 on the CPU; larger = keep


def numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of a regulariser's state: its strengths and counters, as JSON takes them."""
    return {name: value for name, value in state.items() if isinstance(value, int | float)}


def lambdas(regularizers: Iterable[Regularizer]) -> dict[str, float]:
    """What the first regulariser with a lambda that moves says of it; nothing where none has one."""
    return next((dict(r.lambdas()) for r in regularizers if isinstance(r, Moving)), {})


class Regularizer(Protocol):
    """Attach it, add `penalty()` to the loss after each forward pass, call `after_step()` after each optimiser step."""

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Take references to the weights (and set hooks); once, before the optimiser is built."""

    def parameters(self) -> Iterable[nn.Parameter]:
        """Its own trainable tensors, for the optimiser; usually none."""

    def penalty(self) -> Tensor:
        """The term to add to the task loss, shape (), after the forward pass."""

    def after_step(self) -> None:
        """Projections and updates after the optimiser's step."""

    def scores(self) -> Scores:
        """The method's own importance of every channel, as trained so far."""

    def detach(self) -> None:
        """Let go of the network: no hook is left on it."""

    def scale_penalty(self, factor: float) -> None:
        """Make the penalty at the present weights `factor` times as large."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs: tensors and plain numbers."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`, after `attach`."""


@runtime_checkable
class Moving(Protocol):
    """A regulariser whose lambda changes while it trains, to be drawn over the steps."""

    def lambdas(self) -> Mapping[str, float]:
        """lambda as it is now, by what it belongs to; a mean where that has many."""
