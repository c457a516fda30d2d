"""Training on with the zeros that a cut of weights has left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.groups import Group
from compress.regularize.channels import filter_sizes, maskable
from compress.regularize.masks import Masks


class KeepZeros:
    """Every weight that is 0 when attached stays 0: of convolutions, and whatever else `maskable` names."""

    def __init__(self) -> None:
        self._masks: Masks | None = None
        self._model: nn.Module | None = None
        self._groups: tuple[Group, ...] = ()

    @property
    def masks(self) -> Masks:
        assert self._masks is not None, "attach first"
        return self._masks

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Take the present zeros as the mask; `groups` are for `scores` alone and may be empty.

        Raises:
            ValueError: the network has neither convolution nor linear weights.
        """
        self._model, self._groups = model, tuple(groups)
        self._masks = Masks(maskable(model))
        self._masks.watch()

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def penalty(self) -> Tensor:
        """Nothing, shape (): the masks do the work."""
        return torch.zeros(())

    def after_step(self) -> None:
        """Nothing is left to do: the gradients were masked before the step."""

    def scores(self) -> Mapping[str, Tensor]:
        """The sum of |w| of each filter (`filter_sizes`); a filter without surviving weights scores 0, the lowest."""
        assert self._model is not None, "attach first"
        return {group.name: filter_sizes(self._model, group) for group in self._groups}

    def detach(self) -> None:
        """Take the hook off; the zeros stay where they are, until someone trains them."""
        if self._masks is not None:
            self._masks.release()
        self._masks, self._model, self._groups = None, None, ()

    def scale_penalty(self, factor: float) -> None:
        """There is no penalty to scale."""

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.masks.load_state_dict(state["masks"])
