"""GReg-1: a ridge that grows on the filters chosen to leave (Wang, Qin, Zhang and Fu, arXiv 2012.09243)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress import ranks
from compress.groups import Group
from compress.regularize.channels import Channels, channels, filter_sizes
from compress.regularize.closed import closed
from compress.regularize.options import above, at_least, between, check, whole


class GrowingReg:
    """lambda / 2 * sum over the chosen channels of ||w_g||_2^2, lambda growing by `growth` every `interval` steps.

    The channels are chosen once, when attached: in each group those with the least L1 norm of their filters. lambda
    starts at `growth` and stops at `ceiling`. Ours: the ridge takes all weights that make or read a channel, since
    all of them leave with it, where the paper takes the filter; and nothing follows at the ceiling but a constant
    lambda, the length of training being the loop's business.

    Args:
        growth: delta lambda, 1e-4 in the paper; `scale_penalty` changes it.
        interval: steps between two increments, 10 for CIFAR in the paper (5 for ImageNet).
        ceiling: tau, 1 in the paper.
        share: share of each group's channels that are chosen (ours: 0.5; the paper sets one per layer).
    """

    STRENGTHS = ("growth",)

    def __init__(self, *, growth: float = 1e-4, interval: int = 10, ceiling: float = 1.0, share: float = 0.5) -> None:
        check(
            growth=above(growth), interval=whole(interval, 1), ceiling=at_least(ceiling, growth), share=between(share)
        )
        self.growth, self.interval, self.ceiling, self.share = growth, interval, ceiling, share
        self._step = 0
        self._channels: Channels | None = None
        self._chosen: dict[str, list[int]] = {}
        self._mask = torch.zeros(0)  # 1 for a chosen channel: (channels,)

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Hold the convolution weights of all groups that can be cut, and choose the channels to push out."""
        self._channels = channels(model, groups)
        held = self._channels.groups
        # rank 0's, as the ranks' networks may not be equal yet
        self._choose(ranks.first(lambda: {group.name: self._weakest(model, group) for group in held}))

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def level(self) -> float:
        """lambda of this step."""
        return min(self.ceiling, self.growth * (1 + self._step // self.interval))

    def lambdas(self) -> dict[str, float]:
        return {"the chosen channels": self.level()}

    def penalty(self) -> Tensor:
        """The ridge of this step, shape (), its gradient in closed form."""
        held, level = self._held(), self.level()
        value = level / 2 * (self._mask * held.squares()).sum()
        return closed(value, lambda grad: held.pull(grad * level * self._mask), held.tensors)

    def after_step(self) -> None:
        """One step nearer to the next increment."""
        self._step += 1

    def scores(self) -> Mapping[str, Tensor]:
        """||w_g||_2 / sqrt(n_g) (ours: the paper removes the chosen ones, which have the least after enough steps)."""
        held = self._held()
        return held.by_group((held.squares() / held.elements).sqrt())

    def detach(self) -> None:
        self._channels, self._chosen, self._mask = None, {}, torch.zeros(0)

    def scale_penalty(self, factor: float) -> None:
        """Scale the growth; the ceiling moves only where it would hold the present level back."""
        level = self.level() * factor
        self.growth *= factor
        self.ceiling = max(self.ceiling, level)

    def state_dict(self) -> dict[str, Any]:
        return {
            "growth": self.growth,
            "ceiling": self.ceiling,
            "step": self._step,
            "chosen": {name: list(picked) for name, picked in self._chosen.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The numbers alone, without `chosen`, are the strength for another network: there lambda starts anew."""
        self.growth, self.ceiling = float(state["growth"]), float(state["ceiling"])
        self._step = int(state["step"]) if "chosen" in state else 0
        if "chosen" in state:
            self._choose(state["chosen"])

    def _weakest(self, model: nn.Module, group: Group) -> list[int]:
        return filter_sizes(model, group).argsort(stable=True)[: int(group.size * self.share)].tolist()

    def _choose(self, chosen: Mapping[str, Sequence[int]]) -> None:
        held = self._held()
        self._chosen = {name: list(picked) for name, picked in chosen.items()}
        mask = torch.zeros_like(held.elements)
        start = 0
        for group in held.groups:
            mask[[start + channel for channel in self._chosen.get(group.name, ())]] = 1
            start += group.size
        self._mask = mask

    def _held(self) -> Channels:
        assert self._channels is not None, "attach first"
        return self._channels
