"""fit(): train one network on a data set, from its present weights, and say how good it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from compress import data, ranks, train
from compress.checkpoint import ModelInfo
from compress.errors import PruneError
from compress.groups import Group, trace
from compress.regularize import SPARSE_TRAINING, Regularizer, begun, given_places
from compress.regularize.make import make
from compress.regularize.masks import Masks
from compress.task import recorded

Options = Mapping[str, Mapping[str, Any]]  # a regulariser's name -> what its constructor is given
Log = Sequence[tuple[int, Mapping[str, float]]]  # (step, name -> density)
NONE: Options = MappingProxyType({})


@dataclass(frozen=True)
class Fitted:
    """What came of it; top1, or what the task measures instead, in percent, on the split named."""

    info: ModelInfo
    outcome: train.Outcome
    top1: float
    split: str
    density: Mapping[str, float] = field(default_factory=dict)  # of what a mask thinned: name -> share that is not 0
    density_log: Log = ()  # the same at the start and after every change of the topology
    strengths: Sequence[Mapping[str, Any]] = ()  # what the penalties began with: regularize.begun


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
    regularize: Options = NONE,
    state: Path | None = None,
    on_progress: Callable[[train.Progress], None] = lambda progress: None,
) -> Fitted:
    """Train `model` in place; the epoch with the best validation top-1 is kept, the test split is read once.

    Several processes all call this; each takes its share of every batch.

    Args:
        info: what is known of the network; data set, labels and normalisation are filled in.
        regularize: what takes part in the training; `steps` is filled in. Penalties are calibrated to
            `settings.penalty_share`, save those whose strength is given.
        state: file that is written after every epoch and from which an interrupted training goes on.
    """
    task = settings.task
    train.check_data(task, loaded)
    accelerator = train.accelerator(device, precision)
    completed = complete(info, loaded).model_copy(update={"task": recorded(task)})

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

    training, val = loader(loaded.train, training=True), loader(loaded.val)
    example = next(iter(val))[0][:1].cpu()
    train.check_output(model, example, task, loaded.labels)
    groups = () if regularize.keys() <= SPARSE_TRAINING else trace(model, example)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    regularizers = make(regularize, {"steps": settings.epochs * len(training)})
    try:
        fixed = _attach(model, groups, regularize, regularizers)
        outcome = train.finetune(
            model, training, val, replace(settings, fixed=settings.fixed | fixed),
            device=accelerator, regularizers=regularizers, state=state, on_progress=on_progress,
        )  # fmt: skip
        density, log = _densities(regularizers)
        strong = begun(regularize, outcome.strengths, fixed, settings.penalty_share)
    finally:
        for regularizer in regularizers:
            regularizer.detach()
    split, name = (loaded.test, "test") if loaded.test is not None else (loaded.val, "val")
    top1, _ = train.evaluate(model, loader(split), device=accelerator, task=task)
    model.to("cpu", memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return Fitted(completed, outcome, top1, name, density, log, strong)


def _attach(
    model: nn.Module, groups: Sequence[Group], regularize: Options, regularizers: Sequence[Regularizer]
) -> frozenset[int]:
    """Attach all. Returns: the places of those whose strength is given, or that have none.

    Raises:
        PruneError: one finds nothing to work on.
    """
    for name, regularizer in zip(regularize, regularizers, strict=True):
        try:
            regularizer.attach(model, groups)
        except ValueError as error:
            raise PruneError(f"{name} cannot watch this network: {error}") from error
    return given_places(regularizers, regularize.values())


def _densities(regularizers: Sequence[Regularizer]) -> tuple[dict[str, float], Log]:
    """Share of each masked tensor that is not 0 in the network as kept, and the densities over time.

    The kept epoch may have had another topology than the last; it has no more weights, and its zeros are its own.
    """
    density: dict[str, float] = {}
    log: Log = ()
    for regularizer in regularizers:
        masks = getattr(regularizer, "masks", None)
        if isinstance(masks, Masks):
            counts = {name: int(tensor.count_nonzero()) for name, tensor in masks.tensors.items()}
            assert sum(counts.values()) <= masks.alive_count(), f"{counts}: more than {masks.alive_count()} in all"
            density |= {name: count / masks.tensors[name].numel() for name, count in counts.items()}
            log = getattr(regularizer, "density_log", log)
    return density, log


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
            "labels": loaded.labels if len(info.labels or loaded.labels) == len(loaded.labels) else info.labels,
            "data": loaded.name,
        }
    )
