"""What penalties with one strength in front of them have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from compress.regularize.options import above, check


class Strength:
    """A penalty that is linear in its `strength`, has nothing of its own to train and nothing to project."""

    STRENGTHS = ("strength",)

    def __init__(self, strength: float) -> None:
        check(strength=above(strength))
        self.strength = strength

    def parameters(self) -> Iterable[nn.Parameter]:
        """None of its own."""
        return ()

    def after_step(self) -> None:
        """Nothing to project."""

    def scale_penalty(self, factor: float) -> None:
        """Multiply the strength."""
        self.strength *= factor

    def state_dict(self) -> dict[str, Any]:
        """The strength."""
        return {"strength": self.strength}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The counterpart of `state_dict`."""
        self.strength = float(state["strength"])
