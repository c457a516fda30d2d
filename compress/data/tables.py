"""Tables in the Hugging Face layout: Parquet files, sets of the hub a user's DatasetDict, read through `datasets`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.data.parts import SPLIT_NAMES, Part, Source
from compress.data.split import Indices
from compress.errors import DataError

LABEL_NAMES = ("label", "labels", "fine_label", "target", "class")  # preferred, in this order


class TableImages:
    """The encoded images of one table column; the table stays memory-mapped on disk."""

    def __init__(self, table: Any, column: str) -> None:
        from datasets import Image

        self._table = table.select_columns([column]).cast_column(column, Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._table)

    def name(self, index: int) -> str:
        cell = self._table[index][self._column]
        return str(cell["path"]) if cell and cell["path"] else f"row {index}"

    def read(self, index: int) -> bytes:
        cell = self._table[index][self._column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise OSError("empty cell")
        data = cell["bytes"]
        return bytes(data) if data is not None else Path(cell["path"]).read_bytes()

    def identity(self) -> Iterator[str]:
        yield f"{len(self._table)} rows"
        for file in self._table.cache_files:
            path = Path(file["filename"])
            yield f"{path.name} {path.stat().st_size}"


def open_parquet(path: Path) -> Source:
    """A Parquet file (taken as train) or a folder of them, told apart by train, val(idation) or test in their names.

    `datasets` keeps an Arrow copy of the files in its cache, so that they can be read at random.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    splits: dict[str, list[str]] = {}
    nameless = []
    for file in files:
        words = [] if path.is_file() else re.split(r"[^a-z]+", file.relative_to(path).as_posix().lower())
        found = [SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES]
        nameless += [] if found else [file.name]
        splits.setdefault(found[0] if found else "train", []).append(str(file))
    if 0 < len(nameless) < len(files):
        raise DataError(
            f"'{nameless[0]}' in '{path}' names no split and other files do; allowed are train, val(idation) and test "
            "as words in the names of all, or of none, which are then train; rename or move it"
        )
    return read_tables(_load_dataset(str(path), "parquet", data_files=splits), str(path))


def open_hub(name: str) -> Source:
    """A set of the Hugging Face hub: NAME or NAME:CONFIG."""
    repository, _, config = name.partition(":")
    return read_tables(_load_dataset(f"hf:{name}", repository, name=config or None), f"hf:{name}")


def _load_dataset(about: str, path: str, **options: Any) -> Any:
    import datasets

    try:
        with _quiet():
            return datasets.load_dataset(path, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error  # the generation error only says that there was one
        first = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise DataError(
            f"data '{about}' cannot be read by datasets: {first}; allowed are Parquet files with an image and a label "
            "column, or hf:NAME and hf:NAME:CONFIG of the hub; check the name, the files and the network"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def read_tables(splits: Mapping[str, Any], about: str) -> Source:
    """The parts of a DatasetDict. The columns are found through its features, class names through its ClassLabel."""
    known: dict[str, Any] = {}
    notes = []
    for name, table in splits.items():
        split = SPLIT_NAMES.get(str(name))
        if split is None or split in known:
            notes.append(f"split '{name}' ({len(table):,} images) is not used")
        else:
            known[split] = table
    if not known:
        raise DataError(f"data '{about}' has the splits {sorted(splits)}; allowed are train, val(idation) and test")
    first = known.get("train", next(iter(known.values())))
    image, label = image_column(first.features, about), label_column(first.features, about)
    columns = {split: table.select_columns([label])[:][label] for split, table in known.items()}
    labels = _class_names(first.features[label], columns)
    parts = {}
    for split, table in known.items():
        targets = _targets(columns[split], labels)
        if len(targets) and (targets == -1).all():
            notes.append(f"split '{split}' ({len(targets):,} images) has no labels and is not used")
        else:
            parts[split] = Part(TableImages(table, image), targets)
    if not parts:
        raise DataError(
            f"data '{about}' has no labels: column '{label}' is -1 or empty everywhere; give a labelled split"
        )
    return Source(parts, labels, tuple(notes))


def image_column(features: Mapping[str, Any], about: str) -> str:
    """The column of images: an Image feature, else encoded bytes."""
    from datasets import Image

    for name, feature in features.items():
        if isinstance(feature, Image):
            return name
    for name, feature in features.items():
        if getattr(feature, "dtype", None) == "binary" or (
            isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
        ):
            return name
    raise DataError(
        f"data '{about}' has no image column, its columns are {', '.join(features)}; "
        "allowed are an Image feature or encoded bytes; cast the column to datasets.Image"
    )


def label_column(features: Mapping[str, Any], about: str) -> str:
    """The column of classes: ClassLabel features first, then integers and text; the usual names first among them."""
    from datasets import ClassLabel

    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    for name in LABEL_NAMES:
        if name in classes:
            return name
    if classes:
        return classes[0]
    for name in LABEL_NAMES:
        if re.match(r"u?int\d|bool|string|large_string", str(getattr(features.get(name), "dtype", ""))):
            return name
    raise DataError(
        f"data '{about}' has no label column, its columns are {', '.join(features)}; allowed are a ClassLabel feature "
        f"or integers or text called {', '.join(LABEL_NAMES)}; rename or cast the column"
    )


def _class_names(feature: Any, columns: Mapping[str, Sequence[Any]]) -> tuple[str, ...]:
    if getattr(feature, "names", None):
        return tuple(feature.names)
    seen = {value for column in columns.values() for value in column if value is not None}
    if any(isinstance(value, str) for value in seen):
        return tuple(sorted(seen))
    return tuple(str(index) for index in range(int(max(seen, default=-1)) + 1))


def _targets(values: Sequence[Any], labels: Sequence[str]) -> Indices:
    index = {label: position for position, label in enumerate(labels)}
    rows = (-1 if value is None else index[value] if isinstance(value, str) else int(value) for value in values)
    return np.fromiter(rows, np.int64, len(values))
