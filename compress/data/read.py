"""The way from a --data text to a data set: open, check the labels, decode or stream, hold out, fingerprint."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from compress.data.decode import check_unreadable, decode_all, fit_arrays, native_shape
from compress.data.masks import Pairs, class_count, read_pairs, remarks, shape_of
from compress.data.parts import Part, Source
from compress.data.sources import open_source
from compress.data.split import Augment, Data, MemorySplit, Shape, Split, StreamSplit, hold_out
from compress.errors import DataError

# Bytes of decoded pixels. CIFAR-10 (0.18 GB) and Imagenette at 160 pixels (1.0 GB) fit beside a training run on an
# 8 GB machine, ImageNet at 224 (193 GB) does not. A constant, so that a run does not change with the machine.
MEMORY_LIMIT = 2 * 2**30


def load(
    source: str,
    *,
    image_size: int | tuple[int, int] | None,
    num_classes: int | None = None,
    channels: int = 3,
    val_share: float = 0.1,
    seed: int = 0,
    max_unreadable: float = 0.01,
    memory_limit: int = MEMORY_LIMIT,
    may_run: bool = True,
) -> Data:
    """Read a data set and divide it into train, val and test.

    `image_size`: pixels a side, or height and width, None = as they are. `num_classes`: outputs of the network, to
    check the labels against. `val_share`: of train, per class, where the source has no validation split of its own
    (10 %, the 5,000 of 50,000 that He et al., arXiv:1512.03385, hold out of CIFAR-10). `max_unreadable`: share of a
    split. Above `memory_limit` bytes of decoded pixels the images are decoded again in every epoch.
    `may_run`: whether `source` may name a function; where a file names the data set it may not.
    Raises DataError.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    _check_arguments(size=size, channels=channels, val_share=val_share, max_unreadable=max_unreadable)
    opened = open_source(source, size[0] if size else None, may_run=may_run)
    if opened.pairs:
        first = next(iter(opened.pairs.values()))
        shape = (channels, *size) if size else shape_of(first, channels)
        masked, labels = _read_pairs(opened.pairs, source, shape, is_exact=size is None, num_classes=num_classes)
        train, val, test, lines = _divide(masked, ("with masks",), source, share=val_share, seed=seed)
        return Data(source, labels, train, val, test, _fingerprint(masked), (*remarks(opened.pairs), *lines))
    _check_labels(opened, source, num_classes)
    shape = _shape(opened, size, channels)
    is_exact = size is None
    is_streamed = _is_streamed(opened, shape, source, memory_limit=memory_limit, is_exact=is_exact)
    notes = [*opened.notes, *_remarks(opened.labels, num_classes=num_classes, is_streamed=is_streamed)]
    augment: Augment = "flip-crop" if may_flip(opened.labels) else "crop"
    splits: dict[str, Split] = {}
    for name, part in opened.parts.items():
        about = f"{name} of '{source}'"
        if is_streamed:
            splits[name] = _stream(part, about, shape=shape, augment=augment, max_unreadable=max_unreadable)
        else:
            images, targets, lines = _decode(part, about, shape=shape, max_unreadable=max_unreadable, is_exact=is_exact)
            splits[name] = MemorySplit(about, images, targets, augment)
            notes += lines
    fingerprint = _fingerprint(splits)
    _check_classes(splits, opened.labels, source)
    train, val, test, lines = _divide(splits, opened.labels, source, share=val_share, seed=seed)
    return Data(source, opened.labels, train, val, test, fingerprint, (*notes, *lines))


def _read_pairs(
    pairs: Mapping[str, Pairs], source: str, shape: Shape, *, is_exact: bool, num_classes: int | None
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Splits of images with masks, and the classes, which are called by their numbers."""
    if shape[0] not in (1, 3):
        raise DataError(_CHANNELS.format(channels=shape[0], about=f"'{source}'"))
    size = (shape[0] + 1) * shape[1] * shape[2] * sum(len(part) for part in pairs.values())
    if size > MEMORY_LIMIT:
        raise DataError(
            f"data '{source}' needs {size / 2**30:.3g} GiB decoded, {MEMORY_LIMIT / 2**30:.3g} are allowed, and images "
            "with masks are not streamed; give a smaller image size"
        )
    found = {
        name: read_pairs(part, f"{name} of '{source}'", shape=shape, is_exact=is_exact, num_classes=num_classes)
        for name, part in pairs.items()
    }
    count = class_count([split.targets for split in found.values()])
    if count < 2:
        raise DataError(f"the masks of '{source}' hold {count} classes; at least 2 are needed; add another class")
    return dict(found), tuple(str(index) for index in range(count))


def may_flip(labels: Sequence[str]) -> bool:
    """Whether a mirrored image still shows its class: not for letters and digits, and unknown for bare numbers."""
    return not all(len(label) == 1 or label.isdigit() for label in labels)


def _check_arguments(*, size: tuple[int, int] | None, channels: int, val_share: float, max_unreadable: float) -> None:
    if size is not None and min(size) < 1:
        raise DataError(f"image size is {min(size)}; allowed is 1 pixel and more, or none for the images' own")
    if channels < 1:
        raise DataError(f"channels is {channels}; allowed are 1 for grey, 3 for colour, or what the arrays hold")
    if not 0 < val_share < 1:
        raise DataError(f"validation share is {val_share}; allowed is a share of train between 0 and 1, both excluded")
    if not 0 <= max_unreadable <= 1:
        raise DataError(f"share of unreadable images is {max_unreadable}; allowed is 0 to 1")


def _check_labels(opened: Source, source: str, num_classes: int | None) -> None:
    for name, part in opened.parts.items():
        if not len(part.targets):
            raise DataError(f"{name} of '{source}' holds no image; allowed are splits with images; fill or remove it")
    count = len(opened.labels) if num_classes is None else min(num_classes, len(opened.labels))
    for name, part in opened.parts.items():
        wrong = np.flatnonzero((part.targets < 0) | (part.targets >= count))
        if len(wrong):
            raise DataError(
                f"label {part.targets[wrong[0]]} of image {wrong[0]} in {name} of '{source}' is out of range; allowed "
                f"are 0 to {count - 1}; correct the labels or take a network with more outputs"
            )
    if len(opened.labels) < 2:
        raise DataError(
            f"data '{source}' has a single class, '{''.join(opened.labels)}'; at least 2 are needed; add another class"
        )


def _check_classes(splits: Mapping[str, Split], labels: Sequence[str], source: str) -> None:
    if "train" in splits:
        counts = torch.bincount(splits["train"].targets, minlength=len(labels))
        empty = [labels[index] for index in torch.nonzero(counts == 0).flatten().tolist()]
        if empty:
            raise DataError(
                f"class '{empty[0]}' has no readable image in train of '{source}' ({len(empty)} of {len(labels)} "
                "classes are empty); every class needs some; add images or remove the class"
            )


def _shape(opened: Source, size: tuple[int, int] | None, channels: int) -> Shape:
    if size is not None:
        return channels, *size
    images = next(iter(opened.parts.values())).images
    if isinstance(images, Tensor):
        return channels, images.shape[2], images.shape[3]
    return native_shape(images, channels)


def _is_streamed(opened: Source, shape: Shape, source: str, *, memory_limit: int, is_exact: bool) -> bool:
    """Whether the images stay encoded. Arrays are in memory already."""
    if any(isinstance(part.images, Tensor) for part in opened.parts.values()):
        return False
    pixels = math.prod(shape) * sum(len(part.targets) for part in opened.parts.values())
    if pixels > memory_limit and is_exact:
        raise DataError(
            f"data '{source}' needs {pixels / 2**30:.3g} GiB decoded, {memory_limit / 2**30:.3g} are allowed in "
            "memory, and streaming needs an image size; give one"
        )
    return pixels > memory_limit


def _remarks(labels: Sequence[str], *, num_classes: int | None, is_streamed: bool) -> Iterator[str]:
    if num_classes is not None and len(labels) < num_classes:
        yield f"the data has {len(labels)} classes, the network {num_classes} outputs"
    if not may_flip(labels):
        yield "augmentation: shifts without flips, as the classes are glyphs or have no names"
    if is_streamed:
        yield "streamed: too large to decode into memory; unreadable images are skipped and named while training"


def _stream(part: Part, about: str, *, shape: Shape, augment: Augment, max_unreadable: float) -> StreamSplit:
    assert not isinstance(part.images, Tensor), about
    if shape[0] not in (1, 3):
        raise DataError(_CHANNELS.format(channels=shape[0], about=about))
    indices = np.arange(len(part.targets), dtype=np.int64)
    return StreamSplit(about, part.images, indices, torch.from_numpy(part.targets), augment, shape, max_unreadable)


_CHANNELS = "{channels} channels are asked of {about}; allowed are 1 for grey and 3 for colour; use arrays for others"


def _decode(
    part: Part, about: str, *, shape: Shape, max_unreadable: float, is_exact: bool
) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, C, H, W) uint8, targets (N,) and what to note."""
    targets = torch.from_numpy(part.targets)
    if isinstance(part.images, Tensor):
        return fit_arrays(part.images, shape), targets, []
    if shape[0] not in (1, 3):
        raise DataError(_CHANNELS.format(channels=shape[0], about=about))
    decoded = decode_all(part.images, shape, is_exact=is_exact)
    notes = []
    if decoded.unreadable:
        notes.append(check_unreadable(decoded.unreadable, len(targets), share=max_unreadable, about=about))
    return decoded.images, targets[torch.from_numpy(decoded.kept)], notes


def _fingerprint(splits: Mapping[str, Split]) -> str:
    """sha256 over what is in the splits; of streamed images over their names and sizes."""
    digest = hashlib.sha256()
    for name, split in sorted(splits.items()):
        digest.update(f"{name} {len(split)} {split.shape}\n".encode())
        digest.update(split.targets.numpy().data)
        if isinstance(split, MemorySplit):
            digest.update(split.images.numpy().data)
        else:
            for line in split.images.identity():
                digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _divide(
    splits: Mapping[str, Split], labels: Sequence[str], source: str, *, share: float, seed: int
) -> tuple[Split, Split, Split | None, list[str]]:
    """Train, val and test out of what was given: selection is on val, never on a given final split."""
    train, val, test = splits.get("train"), splits.get("val"), splits.get("test")
    if train is None:
        final = test if test is not None else val
        assert final is not None, source
        empty = final.subset(np.empty(0, np.int64), f"train of '{source}'")
        return empty, val if val is not None else final, final, ["no train split: for evaluation only"]
    if val is not None and test is not None:
        return train, val, test, []
    notes = []
    if test is None and val is not None:
        test = val
        notes.append("test: the given val split, used once at the end; selection uses images held out of train")
    elif test is None:
        notes.append("test: none given")
    strata = np.zeros(len(train), np.int64) if train.has_masks else train.targets.numpy()
    rest, held = hold_out(strata, share=share, seed=seed, labels=labels)
    how = "" if train.has_masks else " per class"
    notes.append(f"val: {100 * share:.3g} % of train held out{how} ({len(held):,} images), seed {seed}")
    return train.subset(rest, train.name), train.subset(held, f"val of '{source}'"), test, notes
