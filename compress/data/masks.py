"""Folders for segmentation: SPLIT/images/* and SPLIT/masks/*, a mask of class indices for each image, by its stem."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from compress.data.decode import UNREADABLE, Pixels, centre_box, cpus, decode, fit
from compress.data.split import MemorySplit, Shape
from compress.errors import DataError

IMAGES, MASKS = "images", "masks"
IGNORED = 255  # the class of pixels that count nowhere, as in compress.task
AS_GREY = ("1", "L", "P", "I;16", "I")  # Pillow's modes of one channel; of a palette (P) the index is the class


@dataclass(frozen=True)
class Pairs:
    """Files of one split, relative to the root."""

    root: Path
    images: tuple[str, ...]
    masks: tuple[str, ...]  # of the image at the same place

    def __len__(self) -> int:
        return len(self.images)


def has_masks(splits: Mapping[str, Path]) -> bool:
    """Whether a split holds just images/ and masks/, which is no pair of classes."""
    return any({e.name for e in folder.iterdir() if e.is_dir()} == {IMAGES, MASKS} for folder in splits.values())


def pair(root: Path, splits: Mapping[str, Path]) -> dict[str, Pairs]:
    """Every split's images with their masks, in the order of their names.

    Raises:
        DataError: no images/ or no image, two images or masks of one stem, an image without a mask.
    """
    found = {}
    for split, folder in splits.items():
        images, masks = (_by_stem(root, folder / name) for name in (IMAGES, MASKS))
        alone = sorted(set(images) - set(masks))
        if alone:
            wanted = (folder / MASKS / f"{alone[0]}.png").relative_to(root)
            raise DataError(f"image '{images[alone[0]]}' of '{root}' has no mask; add '{wanted}' or remove the image")
        if not images:
            raise DataError(f"'{folder / IMAGES}' holds no image; allowed are splits with images; fill or remove it")
        found[split] = Pairs(root, tuple(images[s] for s in sorted(images)), tuple(masks[s] for s in sorted(images)))
    return found


def _by_stem(root: Path, folder: Path) -> dict[str, str]:
    """Stem -> file relative to the root."""
    if not folder.is_dir():
        raise DataError(f"'{folder}' does not exist; a split for segmentation holds {IMAGES}/ and {MASKS}/")
    endings, found = frozenset(Image.registered_extensions()), dict[str, str]()
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() in endings and not file.name.startswith("."):
            if file.stem in found:
                raise DataError(f"'{file}' has the stem of another file there; give each a stem of its own")
            found[file.stem] = str(file.relative_to(root))
    return found


def shape_of(pairs: Pairs, channels: int) -> Shape:
    """(C, H, W) of the first image."""
    image = _open(pairs, pairs.images[0], channels)
    return channels, image.height, image.width


def read_pairs(pairs: Pairs, about: str, *, shape: Shape, is_exact: bool, num_classes: int | None) -> MemorySplit:
    """Decode a split; a mask is resized and cropped as its image is, by the nearest pixel.

    Args:
        is_exact: images of another size than `shape` are an error, not resized.
        num_classes: outputs of the network, to check the masks against; None: not known.

    Raises:
        DataError: a file that cannot be read, sizes that differ, a mask of colours or of a class out of range.
    """
    images = torch.empty(len(pairs), *shape, dtype=torch.uint8)
    masks = torch.empty(len(pairs), *shape[1:], dtype=torch.uint8)

    def fill(index: int) -> None:
        image = _open(pairs, pairs.images[index], shape[0])
        mask = _mask(pairs, pairs.masks[index], num_classes)
        if image.size != mask.size:
            raise DataError(f"mask '{pairs.masks[index]}' is {mask.width}x{mask.height}, its image {image.width}x"
                            f"{image.height}; give masks of their images' size")  # fmt: skip
        if is_exact and image.size != (shape[2], shape[1]):
            raise DataError(f"image '{pairs.images[index]}' is {image.width}x{image.height}, the first one {shape[2]}x"
                            f"{shape[1]}; give an image size to resize them to")  # fmt: skip
        images[index] = torch.from_numpy(fit(image, shape).copy())
        masks[index] = torch.from_numpy(_fit_mask(mask, shape).copy())

    with ThreadPoolExecutor(cpus()) as pool:
        list(pool.map(fill, range(len(pairs))))
    return MemorySplit(about, images, masks, "none")


def class_count(masks: Sequence[Tensor]) -> int:
    """One more than the largest class, IGNORED left out; 0 where nothing else is there."""
    return 1 + max((int(part[part != IGNORED].max()) for part in masks if (part != IGNORED).any()), default=-1)


def remarks(pairs: Mapping[str, Pairs]) -> Iterator[str]:
    """What to know of all splits of masks."""
    total = sum(len(part) for part in pairs.values())
    yield f"{total:,} images with masks; they are not augmented, as the masks would have to move along"


def _open(pairs: Pairs, file: str, channels: int) -> Image.Image:
    try:
        return decode((pairs.root / file).read_bytes(), channels)
    except UNREADABLE as error:
        raise DataError(
            f"image '{file}' cannot be read: {_line(error)}; repair it, or remove it and its mask"
        ) from error


def _mask(pairs: Pairs, file: str, num_classes: int | None) -> Image.Image:
    """One class a pixel as 8-bit grey."""
    try:
        found: Image.Image = Image.open(io.BytesIO((pairs.root / file).read_bytes()))
        found.load()
    except UNREADABLE as error:
        raise DataError(
            f"mask '{file}' cannot be read: {_line(error)}; repair it, or remove it and its image"
        ) from error
    if found.mode not in AS_GREY:
        raise DataError(f"mask '{file}' holds colours ({found.mode}); allowed is one class index a pixel: a grey or "
                        "palette PNG; convert it")  # fmt: skip
    values = np.asarray(found)
    limit = min(IGNORED, num_classes or IGNORED)
    wrong = values[((values >= limit) | (values < 0)) & (values != IGNORED)]
    if len(wrong):
        raise DataError(f"mask '{file}' holds class {int(wrong.max())}; allowed are 0 to {limit - 1}, and {IGNORED} "
                        "where pixels do not count; correct it or take a network with more outputs")  # fmt: skip
    return Image.fromarray(values.astype(np.uint8))


def _fit_mask(mask: Image.Image, shape: Shape) -> Pixels:
    """As decode.fit does it, by the nearest pixel: (H, W)."""
    _, height, width = shape
    if mask.size != (width, height):
        left, top, right, bottom = centre_box(mask, height, width)
        box = (max(left, 0), max(top, 0), min(right, mask.width), min(bottom, mask.height))  # rounding
        mask = mask.resize((width, height), Image.Resampling.NEAREST, box=box)
    return np.asarray(mask)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
