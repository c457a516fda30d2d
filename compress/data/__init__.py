"""Data sets become seeded train, val and test splits, and splits become normalised batches."""

from compress.data.batches import Loader, loader, statistics
from compress.data.read import MEMORY_LIMIT, load
from compress.data.split import Augment, Data, MemorySplit, Split, StreamSplit

__all__ = [
    "MEMORY_LIMIT",
    "Augment",
    "Data",
    "Loader",
    "MemorySplit",
    "Split",
    "StreamSplit",
    "load",
    "loader",
    "statistics",
]
