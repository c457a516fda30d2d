"""From what the command line names to a network with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compress import checkpoint, ranks
from compress.checkpoint import Checkpoint, ModelInfo
from compress.cli import arch, view


def network(path: Path, spec: str | None, arch_args: Mapping[str, Any]) -> tuple[nn.Module, ModelInfo, Checkpoint]:
    """Read the file, build what it or `--arch` names, fill in the weights; what was inferred is shown.

    Raises:
        LoadError, UsageError: as checkpoint.read, arch.resolve and checkpoint.load_into.
    """
    read = checkpoint.decode(ranks.first(lambda: checkpoint.contents(path)), path)  # of several processes one reads
    built = arch.resolve(spec, arch_args, read)
    if built.note:
        view.note(built.note)
    checkpoint.load_into(built.model, read)
    found: dict[str, Any] = {"arch": built.name, "arch_kwargs": built.kwargs}
    for field in ("input_size", "mean", "std"):
        if getattr(read.info, field) is None:
            found[field] = getattr(built, field)
    return built.model.eval(), read.info.model_copy(update=found), read
