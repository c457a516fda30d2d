"""A folder of images without labels: enough to measure statistics and outputs on, not accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from compress.data.decode import check_unreadable, decode_all
from compress.data.parts import SPLIT_NAMES
from compress.data.sources import FileImages
from compress.data.split import MemorySplit, Shape
from compress.errors import DataError


def is_unlabelled(source: str) -> bool:
    """Whether `source` is a folder of images in no layout that names classes: no splits in it and no Parquet."""
    path = Path(source)
    if not path.is_dir() or any(entry.is_dir() and entry.name in SPLIT_NAMES for entry in path.iterdir()):
        return False
    return not any(path.glob("*.parquet")) and not any(path.glob("*/*.parquet"))


def unlabelled(source: str, shape: Shape, *, count: int) -> MemorySplit:
    """At most `count` images below the folder, spread evenly over their sorted names; all targets are 0.

    Raises:
        DataError: there is no image, or more than 1 % of them cannot be read.
    """
    root, endings = Path(source), frozenset(Image.registered_extensions())
    names = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not names:
        raise DataError(f"folder '{source}' holds no image file; put images into it, or name another --data")
    rows = np.unique(np.linspace(0, len(names) - 1, min(count, len(names))).astype(np.int64))
    decoded = decode_all(FileImages(root, [names[row] for row in rows]), shape, is_exact=False)
    about = f"images of '{source}'"
    if decoded.unreadable:
        check_unreadable(decoded.unreadable, len(rows), share=0.01, about=about)
    return MemorySplit(about, decoded.images, torch.zeros(len(decoded.images), dtype=torch.int64), "none")
