"""What a sparsity regulariser is to a training loop."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from compress.groups import Group

COUNTERS = frozenset({"step", "looks"})  # numbers of a state that are no strength
Scores = Mapping[str, Tensor]  # group name -> (size,) float32 on the CPU; larger = keep


def numbers(state: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of a regulariser's state: its strengths and counters, as JSON takes them."""
    return {name: value for name, value in state.items() if isinstance(value, int | float)}


def begun(
    names: Iterable[str], values: Iterable[Mapping[str, float]], fixed: Container[int], share: float | None
) -> list[dict[str, Any]]:
    """What each penalty begins with, and the share of the task loss it was calibrated to, unless its place is fixed."""
    return [
        {"name": name, "share": None if place in fixed else share, "values": own}
        for place, (name, found) in enumerate(zip(names, values, strict=False))
        if (own := {key: value for key, value in found.items() if key not in COUNTERS})
    ]


def is_given(regularizer: Regularizer, options: Iterable[str]) -> bool:
    """Whether the strength is not to be calibrated: `options` name it, or the method has none.

    A method's own strengths are named in its STRENGTHS; of another class, every plain number of the state is one.
    """
    own = set(regularizer.STRENGTHS if hasattr(regularizer, "STRENGTHS") else numbers(regularizer.state_dict()))
    return not own or not own.isdisjoint(options)


def given_places(regularizers: Iterable[Regularizer], options: Iterable[Iterable[str]]) -> frozenset[int]:
    """The places of those for which `is_given` holds, each beside its own of `options`."""
    pairs = zip(regularizers, options, strict=False)
    return frozenset(place for place, (regularizer, own) in enumerate(pairs) if is_given(regularizer, own))


def chosen(regularizer: Regularizer) -> dict[str, str]:
    """The options that it was made with, by name, as text; strengths, which may have been calibrated, are left out."""
    moving = {*getattr(regularizer, "STRENGTHS", ()), *numbers(regularizer.state_dict())}
    options = {name: value for name, value in vars(regularizer).items() if name[0] != "_" and name not in moving}
    plain = str | int | float | None
    return {name: repr(value) for name, value in options.items() if isinstance(value, plain) or is_dataclass(value)}


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
