"""What is minimised: the task loss, the divergence from the teacher, the penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from compress.example import Example, arguments
from compress.regularize import Regularizer
from compress.train.settings import Settings

if TYPE_CHECKING:
    from accelerate import Accelerator


class Losses(nn.Module):
    """What is minimised, as one module: wrapped for several processes, all that it holds gets one mean gradient a step.

    The penalties are part of the forward pass, or a parameter that they alone reach would be left out of the means.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        device: Accelerator,
        regularizers: Sequence[Regularizer],
        teacher: nn.Module | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.own = nn.ParameterList(p for r in regularizers for p in r.parameters())
        self.classes = 2  # until a batch has been seen
        self.taught: Tensor | None = None  # (N, classes): the teacher's outputs for the next batch, where it was asked
        self._beside = settings, device, regularizers, teacher  # a tuple, or the teacher would be trained as a part

    def forward(self, images: Example, labels: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The sum to minimise, and in it, without gradient, the task's loss and all penalties."""
        settings, _, _, teacher = self._beside
        task, distance, penalties = self.parts(images, labels)
        weight = settings.distill if teacher is not None else 0.0
        extra = torch.stack(penalties).sum() if penalties else torch.zeros_like(task)
        return (1 - weight) * task + weight * distance + extra, task.detach(), extra.detach()

    def parts(self, images: Example, labels: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The task's loss, divergence from the teacher (Hinton et al., arXiv 1503.02531, section 2), penalties."""
        settings, device, regularizers, teacher = self._beside
        with device.autocast():
            logits = settings.task.logits(self.model(*arguments(images))).float()
            self.classes = logits.shape[1]
            penalties = [r.penalty().to(logits.device) for r in regularizers]
        task = settings.task.loss(logits, labels, label_smoothing=settings.label_smoothing)
        if teacher is None:
            return task, torch.zeros_like(task), penalties
        heat = settings.temperature
        with torch.no_grad(), device.autocast():
            taught = self.taught
            if taught is None:
                taught = settings.task.logits(teacher(*arguments(images))).float()
        soft = F.log_softmax(taught / heat, 1)
        distance = F.kl_div(F.log_softmax(logits / heat, 1), soft, reduction="batchmean", log_target=True) * heat**2
        return task, distance / logits[0, 0].numel(), penalties  # of one position, where there are many


def shared(losses: Losses, device: Accelerator) -> DistributedDataParallel:
    """The wrapper that averages gradients over the processes, for one phase: a cut network needs another.

    Parameters that a step does not reach are looked for, since on the next step the others would wait for theirs.
    """
    losses.spare = nn.Parameter(torch.zeros((), device=device.device))  # torch warns of a search that finds nothing
    where = [device.device] if device.device.type == "cuda" else None
    return DistributedDataParallel(losses, device_ids=where, find_unused_parameters=True)
