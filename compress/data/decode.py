"""Encoded bytes become uint8 arrays of one size; what cannot be read is counted and named."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from compress.data.split import Encoded, Indices, Shape
from compress.errors import DataError

# What Pillow raises for bytes that are no image, are cut off, broken or unreasonably large.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
Pixels = npt.NDArray[np.uint8]


def decode(data: bytes, channels: int) -> Image.Image:
    """Upright 8-bit image with 1 or 3 channels. Raises one of UNREADABLE."""
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    if image.mode.startswith("I;16"):  # Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixel mode {image.mode} has no fixed range")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "P":  # a palette may carry transparency, which RGB cannot take directly
        image = image.convert("RGBA")
    return image.convert("RGB" if channels == 3 else "L")


def cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def centre_box(image: Image.Image, height: int, width: int) -> Box:
    """The largest centred box of the target's aspect: short side resized, then the centre cropped, in one step."""
    scale = min(image.width / width, image.height / height)
    box_width, box_height = scale * width, scale * height
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    return left, top, left + box_width, top + box_height


def random_box(image: Image.Image, random: np.random.Generator) -> Box:
    """A box of 8 to 100 % of the area and aspect 3/4 to 4/3 (arXiv:1409.4842, section 6; torchvision's default)."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(0.08, 1.0)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        width, height = float(np.sqrt(area * aspect)), float(np.sqrt(area / aspect))
        if width <= image.width and height <= image.height:
            left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
            return left, top, left + width, top + height
    return centre_box(image, image.height, image.width)


def fit(image: Image.Image, shape: Shape, box: Box | None = None) -> Pixels:
    """The part of the image inside `box` (default: centred), resized by antialiased bilinear: (C, H, W)."""
    channels, height, width = shape
    if box is not None or image.size != (width, height):
        box = box or centre_box(image, height, width)
        box = (max(box[0], 0), max(box[1], 0), min(box[2], image.width), min(box[3], image.height))  # rounding
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


@dataclass(frozen=True)
class Decoded:
    """The readable images of a split and the names of the others."""

    images: Tensor  # (N, C, H, W) uint8
    kept: Indices  # (N,) their positions in the source
    unreadable: tuple[str, ...]


def _threads(encoded: Encoded) -> int:
    """Threads to decode on: small images spend their time in Python, where more threads only wait for each other."""
    try:
        size = len(encoded.read(0)) if len(encoded) else 0
    except UNREADABLE:
        size = 0
    # Measured on 2 cores: CIFAR-10's 1 KB images take 1.3 s per 10,000 on one thread, 1.8 s on two.
    return min(8, cpus()) if size > 16 * 1024 else 1


def decode_all(encoded: Encoded, shape: Shape, *, is_exact: bool) -> Decoded:
    """Decode everything into memory on threads where images are large (Pillow releases the interpreter lock).

    With `is_exact`, an image of another size than `shape` is an error, not a resize.
    """
    out = np.zeros((len(encoded), *shape), np.uint8)
    readable = np.zeros(len(encoded), bool)

    def fill(start: int) -> None:
        for index in range(start, min(start + 256, len(encoded))):
            try:
                image = decode(encoded.read(index), shape[0])
            except UNREADABLE:
                continue
            if is_exact and image.size != (shape[2], shape[1]):
                raise DataError(
                    f"image '{encoded.name(index)}' is {image.width}x{image.height}, the first one "
                    f"{shape[2]}x{shape[1]}; give an image size to resize them to"
                )
            out[index] = fit(image, shape)
            readable[index] = True

    with ThreadPoolExecutor(_threads(encoded)) as pool:
        list(pool.map(fill, range(0, len(encoded), 256)))
    unreadable = tuple(encoded.name(int(index)) for index in np.flatnonzero(~readable))
    images = out[readable] if unreadable else out
    return Decoded(torch.from_numpy(images), np.flatnonzero(readable).astype(np.int64), unreadable)


def check_unreadable(names: Sequence[str], total: int, *, share: float, about: str) -> str:
    """One line about unreadable images, for the notes; raises DataError with it above `share` of the images."""
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    text = f"{about}: {len(names):,} of {total:,} images unreadable: {first}"
    if len(names) > share * total:
        raise DataError(f"{text}; allowed are {share:.3g} of them; repair or remove the files, or allow a larger share")
    return text


def native_shape(encoded: Encoded, channels: int) -> Shape:
    """(C, H, W) of the first readable image among the first hundred."""
    for index in range(min(100, len(encoded))):
        try:
            image = decode(encoded.read(index), channels)
        except UNREADABLE:
            continue
        return channels, image.height, image.width
    raise DataError(
        f"none of the first {min(100, len(encoded))} images can be read, the first is '{encoded.name(0)}'; "
        "allowed are the formats Pillow opens; check the files"
    )


def fit_arrays(images: Tensor, shape: Shape) -> Tensor:
    """Bring decoded images (N, C, H, W) uint8 to `shape`: grey repeated or colour weighted, resized, centre cropped."""
    channels, height, width = shape
    if channels == 3 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    elif channels == 1 and images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R 601, as Pillow's "L"
        images = (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
    if images.shape[1] != channels:
        raise DataError(
            f"images have {images.shape[1]} channels, {channels} are asked for; allowed are 1, 3 or an equal count"
        )
    if images.shape[2:] == (height, width):
        return images.contiguous()
    scale = max(height / images.shape[2], width / images.shape[3])
    size = (max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale)))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    out = torch.empty(len(images), channels, height, width, dtype=torch.uint8)
    for start in range(0, len(images), 1024):  # the float copy of a whole set would be four times its size
        part = images[start : start + 1024].float()
        part = functional.interpolate(part, size=size, mode="bilinear", antialias=True, align_corners=False)
        part = part[:, :, top : top + height, left : left + width]
        out[start : start + 1024] = part.round().clamp(0, 255).to(torch.uint8)
    return out
