"""fit(): train one network on a data set, from its present weights, and say how good it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from compress import data, ranks, train
from compress.checkpoint import ModelInfo


@dataclass(frozen=True)
class Fitted:
    """What came of it; top1 in percent, on the split named."""

    info: ModelInfo
    outcome: train.Outcome
    top1: float
    split: str


def fit(
    model: nn.Module,
    info: ModelInfo,
    loaded: data.Data,
    settings: train.Settings,
    *,
    batch_size: int = 128,
    augment: data.Augment | None = None,
    device: str = "auto",
    precision: str = "auto",
    state: Path | None = None,
    on_progress: Callable[[train.Progress], None] = lambda progress: None,
) -> Fitted:
    """Train `model` in place; the epoch with the best validation top-1 is kept, the test split is read once.

    Several processes all call this; each takes its share of every batch.

    Args:
        info: what is known of the network; data set, labels and normalisation are filled in.
        state: file that is written after every epoch and from which an interrupted training goes on.
    """
    accelerator = train.accelerator(device, precision)
    completed = complete(info, loaded)

    def loader(split: data.Split, *, training: bool = False) -> data.Loader:
        assert completed.mean is not None and completed.std is not None
        return data.loader(
            split,
            batch_size=ranks.share(batch_size),
            mean=completed.mean,
            std=completed.std,
            train=training,
            augment=augment or "auto",
            seed=settings.seed,
            device=accelerator.device,
            rank=ranks.rank(),
            world=ranks.world(),
        )

    outcome = train.finetune(
        model,
        loader(loaded.train, training=True),
        loader(loaded.val),
        settings,
        device=accelerator,
        state=state,
        on_progress=on_progress,
    )
    split, name = (loaded.test, "test") if loaded.test is not None else (loaded.val, "val")
    top1, _ = train.evaluate(model, loader(split), device=accelerator)
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Fitted(completed, outcome, top1, name)


def complete(info: ModelInfo, loaded: data.Data) -> ModelInfo:
    """Fill in what the checkpoint did not say: normalisation, input size, labels and the data set's name."""
    mean, std = (info.mean, info.std) if info.mean and info.std else data.statistics(loaded.train)
    images, _ = next(iter(data.loader(loaded.val, batch_size=1, mean=mean, std=std, train=False)))
    channels, height, width = images.shape[1:]
    return info.model_copy(
        update={
            "mean": tuple(mean),
            "std": tuple(std),
            "input_size": (channels, height, width),
            "labels": info.labels or loaded.labels,
            "data": loaded.name,
        }
    )
