"""From what the command line names to a network with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from compress import checkpoint, ranks
from compress.checkpoint import Checkpoint, ModelInfo
from compress.cli import arch, huggingface, view
from compress.errors import UsageError


def located(path: Path, spec: str | None) -> tuple[Path, str | None]:
    """The file of weights that MODEL means, and --arch: a folder that transformers wrote and hf:PLACE tell both.

    Raises:
        LoadError: a folder or repository without weights.
    """
    place = str(path)
    if path.is_dir() and (path / "config.json").is_file():
        place = huggingface.PREFIX + place
    elif not place.startswith(huggingface.PREFIX) or path.exists():
        return path, spec
    return ranks.first(lambda: huggingface.weights(place)), spec or place


def network(path: Path, spec: str | None, arch_args: Mapping[str, Any]) -> tuple[nn.Module, ModelInfo, Checkpoint]:
    """Read the file, build what it or `--arch` names, fill in the weights; what was inferred is shown.

    Raises:
        LoadError, UsageError: as `located`, checkpoint.read, arch.resolve and checkpoint.load_into.
    """
    path, spec = located(path, spec)
    read = checkpoint.decode(ranks.first(lambda: checkpoint.contents(path)), path)  # of several processes one reads
    built = arch.resolve(spec, arch_args, read)
    if built.note:
        view.note(built.note)
    checkpoint.load_into(built.model, replace(read, tensors=huggingface.translated(built.model, read.tensors)))
    found: dict[str, Any] = {"arch": built.name, "arch_kwargs": built.kwargs}
    for field in ("input_size", "mean", "std", "labels"):
        if getattr(read.info, field) is None:
            found[field] = getattr(built, field)
    return built.model.eval(), read.info.model_copy(update=found), read


def any_network(
    path: Path | None, spec: str | None, arch_args: Mapping[str, Any]
) -> tuple[nn.Module, ModelInfo, Checkpoint | None]:
    """As `network`; without a file, what `--arch` names with weights as they are drawn, or those that hf: brings.

    Raises:
        LoadError, UsageError: as `network`; there is neither a file nor an architecture.
    """
    if path is not None or (spec is not None and spec.startswith(huggingface.PREFIX)):
        return network(Path(str(spec)) if path is None else path, spec, arch_args)
    if spec is None:
        raise UsageError("there is no network: name a checkpoint, or an architecture with --arch")
    built = arch.resolve(spec, arch_args, None)
    images = {field: getattr(built, field) for field in ("input_size", "mean", "std", "labels")}
    return built.model.eval(), ModelInfo(arch=built.name, arch_kwargs=built.kwargs, **images), None
