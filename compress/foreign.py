"""What a file of weights holds, whoever wrote it: bytes -> tensors and plain values. Nothing is ever unpickled."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from compress.errors import LoadError

# Where training scripts put the state dict inside a larger dict; the first one present is taken.
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "ema")
# What DistributedDataParallel, torch.compile and Lightning put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
SAVE = 'torch.save(model.state_dict(), "weights.pt")'
# What torch's restricted unpickler is known to end in when the bytes are damaged.
_BROKEN = (
    pickle.UnpicklingError, EOFError, RuntimeError, AssertionError, LookupError, ValueError, TypeError, AttributeError,
    ArithmeticError, MemoryError, OSError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def decode(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file with the names they have in it, on the CPU, and the plain values stored beside them.

    Args:
        data: the file's content: safetensors, or a state dict (or a dict holding one) saved by torch, zip or older.
        path: for the error texts only.

    Raises:
        LoadError: anything else.
    """
    _refuse_other_formats(data, path)
    if is_safetensors(data):
        return _safetensors(data, path)
    return _state_dict(_torch(data, path), path)


def strip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the prefixes that wrappers add: `_orig_mod.` anywhere, others where all names have them."""
    names = {name: name.replace("_orig_mod.", "") for name in tensors}
    if "n_averaged" in names and len(names) > 1:  # torch.optim.swa_utils.AveragedModel's counter
        del names["n_averaged"]
    while prefix := next((p for p in PREFIXES if all(n.startswith(p) for n in names.values())), None):
        names = {name: short.removeprefix(prefix) for name, short in names.items()}
    return {short: tensors[name] for name, short in names.items()}


def is_safetensors(data: bytes) -> bool:
    """Whether the content begins like safetensors: the header's length (8 bytes), then JSON."""
    return data[8:9] == b"{"


def _refuse_other_formats(data: bytes, path: Path) -> None:
    if not data:
        raise LoadError(f"{path} is empty: copy or download it again")
    if data.startswith(b"version https://git-lfs"):
        raise LoadError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    if path.suffix == ".onnx":
        raise LoadError(f"{path} is an ONNX file, which cannot be trained: give the checkpoint it was made from")
    if not data.startswith(b"PK"):
        return
    try:
        names = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, ValueError, struct.error) as error:
        raise _damaged(data, path) from error
    if any(name.endswith(("/constants.pkl", "/archive_format")) for name in names):
        kind = "TorchScript" if any(name.endswith("/constants.pkl") for name in names) else "torch.export"
        raise LoadError(f"{path} is a {kind} program, not weights: save the state dict of the network with {SAVE}")


def _safetensors(data: bytes, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        tensors = safetensors.torch.load(data)
        size = struct.unpack("<Q", data[:8])[0]
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError, struct.error) as error:
        raise _damaged(data, path) from error
    if not tensors:
        raise LoadError(f"{path} holds no tensor: give a file with the weights of a network")
    return tensors, metadata


def _torch(data: bytes, path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _BROKEN as error:
        offending = re.search(r"GLOBAL (\S+) (?:was not|whose module)", str(error))
        if offending is None:
            raise _damaged(data, path) from error
        raise LoadError(
            f"{path} is a pickle that refers to {offending[1]}, and pickles are never executed: "
            f"in the program that made the file, save the weights alone with {SAVE}"
        ) from error


def _state_dict(content: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(content, Mapping):
        raise LoadError(f"{path} holds a {type(content).__name__}, not a state dict: save it with {SAVE}")
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    if wrapper is not None:
        tensors, beside = _state_dict(content[wrapper], path)
        return tensors, {**beside, **{key: value for key, value in content.items() if key != wrapper}}
    if not any(isinstance(value, Tensor) for value in content.values()):
        raise LoadError(
            f"{path} holds no state dict: it has the keys {_first(content)}; allowed are a state dict, "
            f"or a dict holding one under {', '.join(WRAPPERS)}"
        )
    strange = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise LoadError(f"{path} mixes tensors with other values ({_first(strange)}): save weights only, with {SAVE}")
    return {str(name): value.detach() for name, value in content.items()}, {}


def _damaged(data: bytes, path: Path) -> LoadError:
    return LoadError(
        f"{path} ({len(data)} bytes) is truncated, damaged or no PyTorch checkpoint: copy or download it again"
    )


def _first(names: Any, n: int = 3) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:n]) + (f", ... ({len(shown)} in all)" if len(shown) > n else "") or "none"
