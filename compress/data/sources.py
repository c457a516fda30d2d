"""Where data comes from: every accepted --data text becomes labelled parts that nobody has decoded yet."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from compress.data.masks import has_masks, pair
from compress.data.parts import SPLIT_NAMES, Part, Source
from compress.data.split import hold_out
from compress.data.tables import open_hub, open_parquet, read_tables
from compress.errors import DataError
from compress.user_file import run_file

ALLOWED = (
    "digits, a folder with train/, val/ or test/ of one folder per class, a Parquet file or folder, hf:NAME, "
    "pkg.module:function or file.py:function"
)


def open_source(source: str, image_size: int | None, *, may_run: bool = True) -> Source:
    """Find out what `source` means and read its labels; `image_size` only matters to digits."""
    path = Path(source)
    where, _, function = source.rpartition(":")
    if source == "digits":
        return open_digits(image_size)
    if source.startswith("hf:") and len(source) > 3:
        return open_hub(source[3:])
    if path.is_file() and path.suffix == ".parquet":
        return open_parquet(path)
    if path.is_dir():
        return _open_folder(path)
    if function.isidentifier() and (where.endswith(".py") or all(word.isidentifier() for word in where.split("."))):
        if not may_run:
            raise DataError(f"the file names the code {source!r} as its data set: if you trust it, say --data {source}")
        return open_function(source, where, function)
    if path.exists():
        raise DataError(f"data '{source}' is a file of an unknown kind; allowed are: {ALLOWED}")
    if len(path.parts) > 1 or path.suffix:
        raise DataError(f"data '{source}' does not exist; check the path, or give one of: {ALLOWED}")
    raise DataError(f"data '{source}' is unknown; allowed are: {ALLOWED}")


def open_digits(image_size: int | None) -> Source:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey 0..16 scaled to 0..255; a fixed fifth is the test split.

    Below 16 pixels they are padded with black up to `image_size`: resizing 8 pixels to a few more only blurs them.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # (N, 1, 8, 8)
    if image_size is not None and 8 < image_size < 16:
        before, after = (image_size - 8) // 2, (image_size - 7) // 2
        images = functional.pad(images, (before, after, before, after))
    labels = tuple(str(digit) for digit in range(10))
    targets = bunch.target.astype(np.int64)
    train, test = hold_out(targets, share=0.2, seed=0, labels=labels)  # the same test images for every seed
    parts = {
        name: Part(images[torch.from_numpy(rows)], targets[rows]) for name, rows in (("train", train), ("test", test))
    }
    return Source(parts, labels)


class FileImages:
    """Encoded images in files of their own."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self._root = root
        self._files = tuple(files)  # relative to the root

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._files[index]

    def read(self, index: int) -> bytes:
        return (self._root / self._files[index]).read_bytes()

    def identity(self) -> Iterator[str]:
        for file in self._files:
            yield f"{file} {(self._root / file).stat().st_size}"


def _open_folder(path: Path) -> Source:
    if any(itertools.chain(path.glob("*.parquet"), path.glob("*/*.parquet"))):
        return open_parquet(path)
    splits: dict[str, Path] = {}
    for entry in sorted(path.iterdir()):
        if entry.is_dir() and entry.name in SPLIT_NAMES:
            before = splits.setdefault(SPLIT_NAMES[entry.name], entry)
            if before != entry:
                raise DataError(
                    f"folder '{path}' holds {before.name}/ and {entry.name}/, which are the same split; allowed is one "
                    "folder for each; merge or remove one"
                )
    if not splits:
        raise DataError(
            f"folder '{path}' holds neither train/, val/ nor test/ nor Parquet files; allowed are those; "
            "put one folder per class into train/"
        )
    if has_masks(splits):
        return Source({}, (), pairs=pair(path, splits))
    return open_image_folder(path, splits)


def open_image_folder(root: Path, splits: Mapping[str, Path]) -> Source:
    """One folder per class in every split, classes numbered in the order of their names in train (else all splits)."""
    classes = {
        split: tuple(sorted(e.name for e in folder.iterdir() if e.is_dir() and e.name[0] != "."))
        for split, folder in splits.items()
    }
    labels = classes.get("train") or tuple(sorted(set(itertools.chain(*classes.values()))))
    endings = tuple(Image.registered_extensions())
    parts, notes = {}, []
    for split, folder in splits.items():
        unknown = sorted(set(classes[split]) - set(labels))
        if unknown:
            raise DataError(
                f"folder '{folder}' has the class '{unknown[0]}' that train/ has not; allowed are the {len(labels)} "
                "classes of train/; rename or remove it"
            )
        files, targets, others = [], [], 0
        for name in classes[split]:
            found = list(_walk(folder / name))
            images = sorted(str(file.relative_to(root)) for file in found if file.suffix.lower() in endings)
            others += len(found) - len(images)
            files += images
            targets += [labels.index(name)] * len(images)
        parts[split] = Part(FileImages(root, files), np.array(targets, np.int64))
        if others:
            notes.append(f"{split}: {others:,} files with other endings than an image's are not used")
    return Source(parts, labels, tuple(notes))


def _walk(folder: Path) -> Iterator[Path]:
    for where, _, files in os.walk(folder, followlinks=True):
        yield from (Path(where, file) for file in files if not file.startswith("."))


def open_function(source: str, where: str, function: str) -> Source:
    """What a user's function returns: a DatasetDict, or {"train": (images, labels), ...} with an optional "labels"."""
    made = _import_function(source, where, function)
    try:
        splits = made()
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"'{source}' failed: {type(error).__name__}: {error}; correct the function") from error
    if not isinstance(splits, Mapping):
        raise DataError(f"'{source}' returned {type(splits).__name__}; allowed are a DatasetDict or a dict of splits")
    if splits and all(hasattr(table, "features") for table in splits.values()):
        return read_tables(splits, source)
    parts = {}
    for name, value in splits.items():
        if name != "labels":
            if name not in SPLIT_NAMES or not isinstance(value, tuple | list) or len(value) != 2:
                raise DataError(
                    f"'{source}' returned '{name}': {type(value).__name__}; allowed are train, val and test, "
                    "each a pair (images, labels), and labels; change the function"
                )
            parts[SPLIT_NAMES[name]] = Part(*_arrays(source, name, *value))
    if not parts:
        raise DataError(f"'{source}' returned no split; allowed are train, val and test; change the function")
    count = 1 + max(int(part.targets.max(initial=-1)) for part in parts.values())
    labels = tuple(str(label) for label in splits.get("labels", range(count)))
    return Source(parts, labels)


def _arrays(source: str, name: str, images: Any, labels: Any) -> tuple[Tensor, Any]:
    images, targets = torch.as_tensor(images), np.asarray(labels)
    if images.dtype != torch.uint8 or images.ndim not in (3, 4):
        raise DataError(
            f"'{source}' returned {name} images of {images.dtype} and {images.ndim} axes; allowed are uint8 arrays "
            "(N, C, H, W), (N, H, W, C) or (N, H, W); convert them, 0..255"
        )
    if targets.dtype.kind not in "iu" or targets.shape != (len(images),):
        raise DataError(
            f"'{source}' returned {name} labels of {targets.dtype} {targets.shape} for {len(images):,} images; "
            "allowed is one integer per image; convert them"
        )
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
    return images, targets.astype(np.int64)


def _import_function(source: str, where: str, function: str) -> Any:
    file = Path(where)
    is_file = file.suffix == ".py"
    if is_file and not file.is_file():
        raise DataError(f"data '{source}' does not exist: no file '{where}'; check the path")
    with _on_path(file.resolve().parent if is_file else Path.cwd()):
        try:
            module = run_file(file) if is_file else importlib.import_module(where)
        except (Exception, SystemExit) as error:
            text = f"{error}" if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise DataError(
                f"data '{source}' cannot be imported: {text}; allowed are: {ALLOWED}; install it or run beside it"
            ) from error
    found = getattr(module, function, None)
    if not callable(found):
        raise DataError(
            f"'{where}' has no function '{function}'; allowed is a function that returns the splits; check the name"
        )
    return found


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The folder first on sys.path, as it is for a script, so that the user's own modules are found."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))
