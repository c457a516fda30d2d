"""Training with a fixed number of living weights whose places may change: what GGR, RigL, SET and static ERK share."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress import ranks
from compress.errors import UsageError
from compress.groups import Group
from compress.regularize.channels import filter_sizes, maskable
from compress.regularize.densities import Initial, floors, layer_counts
from compress.regularize.masks import Masks
from compress.regularize.options import at_least, between, check, one_of, whole
from compress.regularize.topology import (
    Drop,
    at_random,
    drop_counts,
    largest,
    limited,
    moved_share,
    redistributed,
)

log = logging.getLogger(__name__)
GATHERED = 4  # batches whose gradients are added up before an update: one is noisy, more are stale (ours)
First = Literal["magnitude", "random"]


@dataclass(frozen=True)
class Start:
    """The first topology; `weights` says which of a layer's weights live: the largest, or random ones."""

    density: float
    initial: Initial
    weights: First
    seed: int
    classifier: bool = False

    def __post_init__(self) -> None:
        check(weights=one_of(self.weights, "magnitude", "random"))

    def masks(self, model: nn.Module, tensors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        counts = layer_counts(shapes, floors(model, tensors), density=self.density, initial=self.initial)
        if self.weights == "magnitude":
            return {name: largest(tensor.detach().abs(), counts[name]) for name, tensor in tensors.items()}
        generator = torch.Generator().manual_seed(self.seed)
        return {
            name: at_random(torch.ones_like(tensor, dtype=torch.bool), counts[name], generator)
            for name, tensor in tensors.items()
        }


@dataclass(frozen=True)
class Updates:
    """When and how the topology changes; `across` layers (GGR) or within each."""

    steps: int | None  # of the whole training
    interval: int
    fraction: float
    end: float
    drop: Drop
    rho: float
    across: bool

    def __post_init__(self) -> None:
        check(
            steps=at_least(0 if self.steps is None else self.steps), interval=whole(self.interval, 1),
            fraction=between(self.fraction), end=(self.end, 0 < self.end <= 1, "above 0 and at most 1"),
            drop=one_of(self.drop, "layer", "global"), rho=(self.rho, 0 <= self.rho <= 1, "0 to 1"),
        )  # fmt: skip

    @property
    def end_step(self) -> float | None:
        return None if self.steps is None else self.end * self.steps

    @property
    def needs_gradients(self) -> bool:
        return self.across or self.rho < 1

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0 and (self.end_step is None or step < self.end_step)

    def gathers(self, done: int) -> bool:
        """Whether the gradients of the step after `done` steps count for the next update."""
        upcoming = (done // self.interval + 1) * self.interval
        return self.needs_gradients and upcoming - done <= GATHERED and self.is_due(upcoming)


class SparseTraining:
    """A regulariser without a penalty: masks, step, gathered gradients, and how dense each layer was over time.

    GGR, RigL, SET and static ERK are this with their own options; none of them changes what it does.
    The floors of `densities.floors` hold throughout. Random choices depend on (seed, step) alone, so that a resumed
    run makes the same ones; where several processes train, the first one's masks are everybody's.
    """

    STRENGTHS = ()

    def __init__(self, start: Start, updates: Updates | None = None) -> None:
        self.start, self.updates = start, updates
        self.density_log: list[tuple[int, dict[str, float]]] = []  # (step, layer -> share of its weights alive)
        self._masks: Masks | None = None
        self._model: nn.Module | None = None
        self._groups: tuple[Group, ...] = ()
        self._step, self._total = 0, 0
        self._lowest: dict[str, int] = {}
        self._gathered: dict[str, Tensor] = {}
        self._whole: dict[str, Tensor] = {}  # the weights before they were thinned, until the first step

    @property
    def masks(self) -> Masks:
        """Which weights are alive."""
        assert self._masks is not None, "attach first"
        return self._masks

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Thin the network and keep it thin; `groups` are for `scores` alone and may be empty.

        Raises:
            ValueError: no weight that may be masked. UsageError: as densities.layer_counts.
        """
        tensors = maskable(model, classifier=self.start.classifier)
        alive = self.start.masks(model, tensors)
        ranks.from_first(alive.values())
        self.detach()
        self._model, self._groups, self._lowest = model, tuple(groups), floors(model, tensors)
        self._whole = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self._masks, self._step, self._gathered = Masks(tensors, alive), 0, {}
        self._total = self._masks.alive_count()
        self.density_log = [(0, self._masks.density())]
        updates = self.updates
        if updates is not None and updates.steps and not updates.is_due(updates.interval):
            log.warning(
                "the topology never changes: %d of %d steps pass before updates end, and one is made every %d",
                updates.end_step, updates.steps, updates.interval,
            )  # fmt: skip
        self._masks.watch(self._gather if updates is not None and updates.needs_gradients else None)

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def penalty(self) -> Tensor:
        """Nothing, shape (): the masks do the work."""
        return torch.zeros(())

    def after_step(self) -> None:
        """Count the optimiser's step, and change the topology when that is due."""
        self._step, self._whole = self._step + 1, {}
        if self.updates is not None and self.updates.is_due(self._step):
            self._update(self.updates)

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """The sum of |w| of each filter (`filter_sizes`); a filter without surviving weights scores 0, the lowest."""
        assert self._model is not None, "attach first"
        return {group.name: filter_sizes(self._model, group) for group in self._groups}

    def detach(self) -> None:
        """Let go of the optimisers; the zeros stay where they are, until someone trains them."""
        if self._masks is not None:
            self._masks.release()
        self._masks, self._model, self._groups, self._gathered, self._whole = None, None, (), {}, {}

    def scale_penalty(self, factor: float) -> None:
        """There is no penalty to scale."""

    def state_dict(self) -> dict[str, Any]:
        """No plain number lies at the top: none of this is a strength that another network could take over."""
        return {
            "masks": self.masks.state_dict(),
            "gathered": {name: gradient.clone() for name, gradient in self._gathered.items()},
            "progress": {"step": self._step, "density_log": [[step, dict(d)] for step, d in self.density_log]},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the network's own may be loaded before `attach` or after it.

        Raises:
            UsageError: the state is that of another density.
        """
        count = sum(int(mask.sum()) for mask in state["masks"].values())
        if count != self._total:
            raise UsageError(
                f"the state has {count} living weights, where density {self.start.density} asks for {self._total}; "
                "give the density that it was begun with"
            )
        for name, weight in self._whole.items():  # attaching has thinned by other masks than those of the state
            held = self.masks.tensors[name]
            if torch.equal(held, weight.where(self.masks.alive[name].to(weight.device), 0)):
                held.copy_(weight)
        self.masks.load_state_dict(state["masks"])
        self._gathered = {n: g.to(self.masks.tensors[n], copy=True) for n, g in state["gathered"].items()}
        self._step = int(state["progress"]["step"])
        self.density_log = [(int(step), dict(d)) for step, d in state["progress"]["density_log"]]

    def _gather(self, gradients: Mapping[str, Tensor]) -> None:
        assert self.updates is not None
        if self.updates.gathers(self._step):
            for name, gradient in gradients.items():
                self._gathered[name] = self._gathered[name] + gradient if name in self._gathered else gradient.clone()

    @torch.no_grad()
    def _update(self, how: Updates) -> None:
        masks = self.masks
        if how.needs_gradients and not self._gathered:
            raise UsageError("no gradient was seen: call after_step() after each step of a torch optimiser")
        weights = {name: tensor.detach() for name, tensor in masks.tensors.items()}
        gradients = {name: self._gathered.get(name, torch.zeros_like(w)) for name, w in weights.items()}
        share = moved_share(self._step, fraction=how.fraction, end=how.end_step)
        drops = drop_counts(weights, masks.alive, self._lowest, share=share, drop=how.drop)
        drops = limited(drops, masks.alive, across=how.across)
        seed = (self.start.seed * 1_000_003 + self._step) % 2**63
        changed = redistributed(
            weights, gradients, masks.alive, drops, rho=how.rho, across=how.across, seed=seed
        )  # fmt: skip
        ranks.from_first(changed.values())
        masks.set(changed)
        self._gathered = {}
        count = masks.alive_count()
        assert count == self._total, f"step {self._step}: {count} living weights, not {self._total}"
        for name, tensor in masks.tensors.items():
            stray = int(tensor.detach()[~masks.alive[name]].count_nonzero())
            assert stray == 0, f"step {self._step}: {stray} dead weights of {name} are not 0"
        self.density_log.append((self._step, masks.density()))
