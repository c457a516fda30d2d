"""How good a network is, and the statistics of its batch norms measured anew."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from compress import ranks
from compress.data import Loader
from compress.example import arguments
from compress.task import CLASSIFICATION, Task

if TYPE_CHECKING:
    from accelerate import Accelerator


class Autocast(Protocol):
    """What of an Accelerator matters here: the precision to compute in."""

    def autocast(self) -> AbstractContextManager[Any]: ...


def evaluate(
    model: nn.Module, loader: Iterable[Any], *, device: Accelerator, task: Task = CLASSIFICATION
) -> tuple[float, float]:
    """The task's metric in percent (top-1) and its mean loss over every image of `loader`, in the run's precision.

    Of several processes each goes through its loader's images, and all get the figures of all images, each counted
    once. No batch norm differs between them: `model` must be the same everywhere.
    """
    was_training = model.training
    model.eval()
    counts, loss, total = torch.zeros((), dtype=torch.float64), 0.0, 0
    with torch.no_grad(), device.autocast():
        for batch in loader:
            images, targets = task.unpack(batch)
            # not the call: evaluation is never worth compiling
            logits = task.logits(model.forward(*arguments(images))).float()
            counts = counts + task.count(logits, targets).cpu()
            size = task.size(targets)
            loss += float(task.loss(logits, targets)) * size
            total += size
    model.train(was_training)
    counts = ranks.summed(counts)
    loss, total = ranks.summed(torch.tensor([loss, total], dtype=torch.float64)).tolist()
    return task.value(counts), loss / total


def predict(model: nn.Module, loader: Loader, *, device: Accelerator, task: Task = CLASSIFICATION) -> Tensor:
    """The task's logits for every image of a still `loader`, (images, classes, ...) float32 on the device.

    Of several processes each goes through its share, and all get all rows.
    """
    loader = loader.in_order()
    with torch.no_grad(), device.autocast():
        images = (task.unpack(batch)[0] for batch in loader)
        own = torch.cat([task.logits(model(*arguments(given))).float() for given in images])
    rows = torch.zeros(loader.count, *own.shape[1:], device=own.device)
    rows[ranks.rank() :: ranks.world()] = own
    return ranks.summed(rows)


def recalibrate(
    model: nn.Module, loader: Iterable[Any], *, device: Autocast, batches: int = 40, task: Task = CLASSIFICATION
) -> None:
    """Measure the statistics of every batch norm anew over `batches` batches, plain averages, weights untouched.

    After a cut the old ones belong to another network, and judging it by them would be unfair. Of several processes
    each measures over its own batches, and all get the averages.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    was_training = model.training
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    with torch.no_grad(), device.autocast():
        given = (arguments(task.unpack(batch)[0]) for batch in islice(loader, batches))
        for place, inputs in enumerate(given):
            if place and len(inputs[0]) == 1:
                continue  # a rest of one image: a norm behind a global pooling cannot take it
            model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(ranks.averaged(statistic))
    model.train(was_training)
