"""What a network is fed: the size of its images, the data set that its file names, and real images for a proof."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compress import data
from compress.bench.session import open_session
from compress.checkpoint import ModelInfo
from compress.data import Data, Split
from compress.errors import DataError, LoadError, UsageError
from compress.export import read_metadata

SplitName = Literal["train", "val", "test"]
KNOWN = ("arch", "labels", "mean", "std", "data", "task")  # of ModelInfo, as an ONNX file of ours carries them


def image_shape(model: nn.Module, info: ModelInfo, side: int | None = None) -> tuple[int, int, int]:
    """(C, H, W) of one image: `side` pixels a side if given, else what the file or the architecture says.

    Raises:
        UsageError: neither says it.
    """
    if side is None:
        if info.input_size is None:
            raise UsageError("the size of the network's images is not known: give --input-size N, in pixels a side")
        return info.input_size
    return channels_of(model, info), side, side


def channels_of(model: nn.Module, info: ModelInfo) -> int:
    """How many channels images have: those of the first convolution, else what the file says, else 3."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return first.in_channels if first is not None else info.input_size[0] if info.input_size else 3


def load_data(
    info: ModelInfo,
    source: str | None = None,
    *,
    image_size: int | None = None,
    val_share: float = 0.1,
    seed: int = 0,
    max_unreadable: float = 0.01,
    channels: int = 3,
) -> Data:
    """The data set `source`, else the one that the network's file names, with images of the network's size.

    A file may name a data set, but never code: a function is only run when the user names it. Where the data's classes
    go by names that the network knows, they are numbered as there.

    Args:
        channels: of the images, where `info` says nothing of them.

    Raises:
        DataError: none is named, or it cannot be loaded.
    """
    named = source or info.data
    if not named:
        raise DataError("the file names no data set: give --data (digits, a folder, Parquet files, hf:NAME, ...)")
    known = info.input_size
    loaded = data.load(
        named,
        image_size=image_size or (known[1:] if known else None),
        channels=known[0] if known else channels,
        val_share=val_share,
        seed=seed,
        max_unreadable=max_unreadable,
        num_classes=len(info.labels) if info.labels else None,
        may_run=source is not None,
    )
    return data.named_as(loaded, info.labels) if info.labels else loaded


def choose(loaded: Data, name: SplitName | None) -> tuple[SplitName, Split]:
    """The split asked for; without a wish the test split, or val where there is none.

    Raises:
        DataError: the data set has no such split.
    """
    chosen: SplitName = name or ("test" if loaded.test is not None else "val")
    splits: dict[SplitName, Split | None] = {"train": loaded.train, "val": loaded.val, "test": loaded.test}
    split = splits[chosen]
    if split is None or not len(split):
        present = [key for key, part in splits.items() if part is not None and len(part)]
        raise DataError(f"{loaded.name} has no {chosen} split; there are {', '.join(present)}")
    return chosen, split


def example(info: ModelInfo, split: Split, count: int) -> Tensor:
    """The first `count` images of a split as the network takes them, on the CPU: (count, C, H, W) float32."""
    mean, std = normalisation(info)
    images, _ = next(iter(data.loader(split, batch_size=min(count, len(split)), mean=mean, std=std, train=False)))
    return images.cpu()


def noise(shape: Sequence[int], count: int) -> Tensor:
    """Standard normal images (count, C, H, W) from seed 0, for want of real ones."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(0))


def normalisation(info: ModelInfo) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel; `fit.complete` fills in what a file does not say."""
    assert info.mean is not None and info.std is not None, info
    return info.mean, info.std


def onnx_info(path: Path, side: int | None = None) -> tuple[ModelInfo, int | None]:
    """What an ONNX file says about its network, and the batch it is fixed to (None: any).

    Raises:
        LoadError: the file cannot be loaded, has several inputs or no image input, or its metadata is damaged.
        UsageError: height and width are open and `side` is not given.
    """
    taken = open_session(path, threads=1).get_inputs()
    if len(taken) != 1 or len(taken[0].shape) != 4:
        shapes = "; ".join(f"{argument.name} {argument.shape}" for argument in taken)
        raise LoadError(f"{path} takes {shapes}; allowed is one input of images (N, C, H, W)")
    batch, channels, *sizes = taken[0].shape
    height, width = (size if isinstance(size, int) else side for size in sizes)
    if not isinstance(channels, int) or height is None or width is None:
        raise UsageError(f"{path} leaves its input {taken[0].shape} open: give --input-size N, in pixels a side")
    fixed = batch if isinstance(batch, int) else None
    found: dict[str, Any] = {"input_size": (channels, height, width)}
    try:
        for key, text in read_metadata(path).items():
            if key in KNOWN and text:
                found[key] = (text if key in ("arch", "data", "task") else json.loads(text)) or None
        return ModelInfo(**{key: value for key, value in found.items() if value}), fixed
    except (ValueError, ValidationError) as error:
        raise LoadError(f"the metadata of {path} is damaged: {str(error).splitlines()[0]}; export it again") from error
