"""What a phase of training is told, and what it says: settings, schedule, progress, outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from compress.task import CLASSIFICATION, Task


def schedule(done: float, warmup: float) -> float:
    """The learning rate as a share of its peak, after `done` of all steps: linear warm-up, then half a cosine."""
    if done < warmup:
        return (done + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


@dataclass(frozen=True)
class Settings:
    """How one phase trains. Units and sources: compress/recipe.py, TrainPart."""

    epochs: int
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    span: tuple[float, float] = (0.0, 1.0)  # the part of the schedule that this phase goes through
    label_smoothing: float = 0.0
    clip_norm: float = 5.0
    distill: float = 0.0
    temperature: float = 4.0
    penalty_share: float | None = None  # calibrate the regularisers at the start; None: as they are
    fixed: frozenset[int] = frozenset()  # places of the regularisers that keep their strength all the same
    keep_best: bool = False  # end with the weights of the best validation epoch, not the last
    compile: bool = False
    seed: int = 0
    phase: str = "training"  # its name in error texts
    task: Task = CLASSIFICATION  # what a batch, the loss and the metric are; `top1` below is its metric


@dataclass(frozen=True)
class Progress:
    """Where a phase stands; top1 in percent on the validation split, None until the epoch's end."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    penalty: float
    images_per_second: float
    seconds_left: float
    top1: float | None = None


@dataclass
class Outcome:
    """What a phase leaves behind, beside the trained network."""

    history: list[dict[str, float]] = field(default_factory=list)  # per epoch: loss, penalty, val_top1, lr, seconds
    best_top1: float = -1.0
    best_epoch: int = -1
    last_top1: float = -1.0
    strengths: list[dict[str, float]] = field(default_factory=list)
    lambda_log: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # step, and lambda by group
