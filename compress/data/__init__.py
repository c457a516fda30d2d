"""Data sets become seeded train, val and test splits, and splits become normalised batches."""

from compress.data.batches import Loader, loader, statistics
from compress.data.read import MEMORY_LIMIT, load
from compress.data.split import Augment, Data, MemorySplit, Split, StreamSplit, named_as
from compress.data.unlabelled import is_unlabelled, unlabelled

__all__ = [
    "MEMORY_LIMIT",
    "Augment",
    "Data",
    "Loader",
    "MemorySplit",
    "Split",
    "StreamSplit",
    "is_unlabelled",
    "load",
    "loader",
    "named_as",
    "statistics",
    "unlabelled",
]
