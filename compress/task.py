"""What a network is for: what a batch, its loss and its metric are; classification, segmentation, or a user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import UsageError

IGNORED = 255  # the class of pixels that count nowhere, as in PASCAL VOC and Cityscapes


class Task(Protocol):
    """What training and evaluation ask of a task. One has no state: every method is a function of its arguments."""

    name: str
    metric: str  # its name in reports; the value is in percent, 0 to 100, larger is better

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        """A batch of the loader as what the network is called with, a tensor or a tuple of them, and the targets."""

    def logits(self, output: Any) -> Tensor:
        """The part of the network's output that is compared with the targets, (N, classes, ...).

        Of an ONNX file it is given the first output, a tensor.
        """

    def loss(self, logits: Tensor, targets: Any, *, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss, (), in float32; `logits` are float32 too."""

    def count(self, logits: Tensor, targets: Any) -> Tensor:
        """Sums over a batch from which `value` makes the metric: float64, of one shape, added up over all batches."""

    def value(self, counts: Tensor) -> float:
        """The metric of the added counts."""

    def size(self, targets: Any) -> int:
        """How many examples a batch holds, for the mean of the losses."""


class Classification:
    """One class per image: cross-entropy and top-1. Targets are (N,) int64."""

    name, metric = "classification", "top1"

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels = batch
        return images, labels

    def logits(self, output: Any) -> Tensor:
        """The tensor, or the first of a tuple: some networks add those of auxiliary classifiers while they train."""
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)

    def count(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(2,): right ones and all."""
        right = int((logits.argmax(1) == targets).sum())
        return torch.tensor([right, len(targets)], dtype=torch.float64)

    def value(self, counts: Tensor) -> float:
        right, total = counts.tolist()
        return float(100 * right / total)

    def size(self, targets: Tensor) -> int:
        return len(targets)


class Segmentation:
    """One class per pixel: cross-entropy and the mean of intersection over union (PASCAL VOC, Everingham et al. 2010).

    Targets are (N, H, W) int64; pixels of class IGNORED count nowhere. The mean is over the classes that occur among
    the targets or the predictions, from sums over the whole split.
    """

    name, metric = "segmentation", "miou"

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, masks = batch
        return images, masks

    def logits(self, output: Any) -> Tensor:
        """The tensor, or what torchvision's networks call `out`, (N, classes, H, W)."""
        found: Tensor = output["out"] if isinstance(output, dict) else output
        return found

    def loss(self, logits: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """The mean over the pixels that count; 0 where there are none, which torch alone would make NaN."""
        total = F.cross_entropy(logits, targets, ignore_index=IGNORED, label_smoothing=label_smoothing, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def count(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(classes, classes): pixels by true class (rows) and predicted class."""
        classes, counts = logits.shape[1], targets != IGNORED
        true, found = targets[counts], logits.argmax(1)[counts]
        if len(true) and not 0 <= int(true.min()) <= int(true.max()) < classes:
            raise UsageError(f"a mask holds class {int(true.max())}; allowed are 0 to {classes - 1}, and {IGNORED}")
        return torch.bincount(true * classes + found, minlength=classes**2).view(classes, classes).double()

    def value(self, counts: Tensor) -> float:
        both = counts.diagonal()
        either = counts.sum(0) + counts.sum(1) - both
        return float(100 * (both[either > 0] / either[either > 0]).mean())

    def size(self, targets: Tensor) -> int:
        return len(targets)


TASKS: dict[str, Callable[[], Task]] = {"classification": Classification, "segmentation": Segmentation}
CLASSIFICATION = Classification()
OWN = "own"  # what a file says of a task that is none of ours: never what code to run
FORMS = f"{', '.join(TASKS)}, or one of your own: pkg.module:Task or file.py:Task"


def ours(name: str) -> Task:
    """The task of ours that is called so; "" is classification.

    Raises:
        UsageError: another name, or OWN, of which a file does not tell more.
    """
    if name == OWN:
        raise UsageError("the network was trained for a task that is none of ours: name it with --task, or --task "
                         + " or --task ".join(TASKS))  # fmt: skip
    if name and name not in TASKS:
        raise UsageError(f"the task {name!r} is unknown; there are {FORMS}")
    return TASKS[name or "classification"]()


def loss_of(task: Task) -> Callable[[Any, Any], Tensor]:
    """The task's mean loss, (), as a function of the network's whole output and the targets; in float32."""
    return lambda output, targets: task.loss(task.logits(output).float(), targets)


def reported(task: Task, value: float) -> dict[str, Any]:
    """A metric as JSON has it; `top1` stays beside it, None where the task measures something else."""
    return {"top1": value if task.metric == "top1" else None, "metric": {"name": task.metric, "value": value}}


def recorded(task: Task) -> str:
    """What a file may say of the task: its name if it is one of ours, else OWN."""
    return next((name for name, build in TASKS.items() if type(task) is build), OWN)


def check(made: object, name: str) -> Task:
    """A user's own task, seen to have all that is asked of one.

    Raises:
        UsageError: something is missing.
    """
    wanted = ("name", "metric", "unpack", "logits", "loss", "count", "value", "size")
    missing = [part for part in wanted if not hasattr(made, part)]
    if missing:
        raise UsageError(f"{name} is no task: it has no {', '.join(missing)}; see compress/task.py")
    return made  # type: ignore[return-value]
