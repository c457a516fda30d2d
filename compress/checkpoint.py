"""Checkpoints: weights with the description of their network, read from anybody's file, saved as safetensors."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors.torch
import torch
from pydantic import BaseModel, JsonValue, ValidationError
from torch import Tensor, nn

from compress import foreign, structure
from compress.errors import LoadError
from compress.files import atomic_write

FORMAT = 2  # of the header; 1 where no module is gone. A file with a larger number was written by a newer version
NONE: Mapping[str, Mapping[str, int]] = MappingProxyType({})


class ModelInfo(BaseModel, frozen=True, extra="forbid"):
    """What a file says about its network beside the weights; everything is optional."""

    arch: str = ""  # what --arch takes; "" is unknown
    arch_kwargs: dict[str, str | int | float | bool | None] = {}
    input_size: tuple[int, int, int] | None = None  # C, H, W
    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None  # of the input channels, for images in 0..1
    std: tuple[float, ...] | None = None
    data: str | None = None  # the --data it was trained on
    task: str = ""  # the name of a task of ours, or task.OWN; "" is unknown
    pruned: bool = False  # the shapes are not the ones `arch` builds
    origin: dict[str, JsonValue] = {}  # method, target, seed, sha256 of the source, ...


class _Header(ModelInfo, frozen=True, extra="ignore"):
    compress: int
    integers: dict[str, dict[str, int]] = {}
    gone: dict[str, structure.Stand] = {}
    aliases: dict[str, str] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, read and checked: every tensor is dense, finite and on the CPU."""

    tensors: Mapping[str, Tensor]
    info: ModelInfo
    sha256: str
    path: Path
    size_bytes: int
    integers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # see `save`
    gone: Mapping[str, structure.Stand] = field(default_factory=dict)  # whole modules that left


def read(path: Path) -> Checkpoint:
    """Read weights from our own files, a state dict saved by torch (also inside a dict), or safetensors.

    Nothing is unpickled and nothing the file names is imported. Of a foreign file only `arch` is taken over, as a hint.

    Raises:
        LoadError: no such file, a folder, empty, truncated, a pickled network, TorchScript, no state dict, NaN or Inf.
    """
    return decode(contents(path), path)


def contents(path: Path) -> bytes:
    """The bytes of a file of weights.

    Raises:
        LoadError: there is no such file, or it cannot be read.
    """
    if path.is_dir():
        raise LoadError(f"{path} is a folder: give the checkpoint file in it")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise LoadError(f"{path} does not exist: check the path of the checkpoint") from error
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}") from error


def decode(data: bytes, path: Path) -> Checkpoint:
    """What `read` gives, from the bytes of the file; `path` is only its name."""
    tensors, beside = foreign.decode(data, path)
    info, integers = ModelInfo(), NONE
    gone: Mapping[str, structure.Stand] = MappingProxyType({})
    if foreign.is_safetensors(data):
        beside = _json(beside.get("compress"), path)
    if "compress" in beside:
        header = _header(beside, path)
        info = ModelInfo(**{name: getattr(header, name) for name in ModelInfo.model_fields})
        integers, gone = MappingProxyType(header.integers), MappingProxyType(header.gone)
        tensors.update({name: tensors[kept] for name, kept in header.aliases.items() if kept in tensors})
    else:
        tensors = foreign.strip(tensors)
        info = ModelInfo(arch=beside["arch"]) if isinstance(beside.get("arch"), str) else info
    _refuse_unusable(tensors, path)
    return Checkpoint(tensors, info, hashlib.sha256(data).hexdigest(), path, len(data), integers, gone)


def load(path: Path | str, model: nn.Module) -> ModelInfo:
    """Fill `model`, a network of the file's architecture, with its weights; returns what the file says beside them.

    Raises:
        LoadError: as `read` and `load_into`.
    """
    found = read(Path(path))
    load_into(model, found)
    return found.info


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill `model`, built by the caller, with the weights; a pruned network also takes its shapes from them.

    Tensors are copied. A pruned network restores bit-equal, in the dtypes of the file and without tracing; others are
    converted to the model's dtypes. After an error the model's weights are undefined.

    Raises:
        LoadError: missing or unexpected names, or other shapes than the model's.
    """
    structure.remove(model, checkpoint.gone)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    expected = structure.tensors(model) if checkpoint.info.pruned else state  # a cut saves the buffers it has cut, too
    tensors = renamed(checkpoint.tensors, expected)
    common = [name for name in tensors if name in expected]
    other = [name for name in common if tensors[name].shape != expected[name].shape]
    if checkpoint.info.pruned:
        missing = [name for name in state if name not in tensors]
        unexpected = [name for name in tensors if name not in expected]
    else:
        fitting = {name: value for name, value in tensors.items() if name not in other}
        outcome = model.load_state_dict(fitting, strict=False)
        missing = [name for name in outcome.missing_keys if name not in other]
        unexpected = outcome.unexpected_keys
    if missing or unexpected:
        raise LoadError(
            f"{checkpoint.path} does not fit the network: {_some(missing)} missing, {_some(unexpected)} unexpected; "
            "name the architecture it was saved from with --arch"
        )
    if checkpoint.info.pruned:
        structure.resize(model, {name: tensors[name].to(expected[name].device, copy=True) for name in common})
        _set_integers(model, checkpoint)
    elif other:
        differences = [f"{n} is {tuple(tensors[n].shape)}, not {tuple(expected[n].shape)}" for n in other]
        raise LoadError(
            f"{checkpoint.path} has {len(other)} tensors of other shapes than the network: "
            f"{'; '.join(differences[:3])}; give the matching --arch and --arch-arg"
        )


def renamed(tensors: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """The tensors under the names `expected` has: a prefix that reading stripped is put back where it belongs."""
    wanted = set(expected)
    for prefix in ("", *foreign.PREFIXES):
        if any(prefix + name in wanted for name in tensors):
            return {prefix + name: value for name, value in tensors.items()}
    return dict(tensors)


def save(path: Path, model: nn.Module, info: ModelInfo, *, integers: Mapping[str, Mapping[str, int]] = NONE) -> None:
    """Save a network as safetensors with its description in the header, whole or not at all.

    Args:
        path: in a folder that exists.
        model: unwrapped: not inside DistributedDataParallel or torch.compile.
        info: with `pruned` set when the shapes are not the ones that `info.arch` builds.
        integers: module path -> {attribute: value}, for what a pruned network's tensors cannot tell, such as the groups
            of a grouped convolution or the heads of an attention; `structure.underived` finds them.

    Raises:
        LoadError: the model's state holds something that is no tensor.
        OSError: the folder cannot be written.
    """
    tensors, aliases = _tensors(model)
    header = _describe(model, info, integers) | {"aliases": aliases}
    metadata = {"compress": json.dumps(header, sort_keys=True)}  # one key: safetensors writes several in random order
    atomic_write(path, safetensors.torch.save(tensors, metadata))


def save_pt(path: Path, model: nn.Module, info: ModelInfo, *, integers: Mapping[str, Mapping[str, int]] = NONE) -> None:
    """Save the same as a dict for `torch.load(path, weights_only=True)`, the weights under `state_dict`; see `save`."""
    tensors, aliases = _tensors(model)
    state = tensors | {name: tensors[kept] for name, kept in aliases.items()}
    content = io.BytesIO()  # a file's name would end up inside the file
    torch.save(_describe(model, info, integers) | {"state_dict": state}, content)
    atomic_write(path, content.getvalue())


def _describe(model: nn.Module, info: ModelInfo, integers: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    gone = structure.removed(model)
    shape = {"integers": {k: dict(v) for k, v in integers.items()}, **({"gone": gone} if gone else {})}
    return {"compress": FORMAT if gone else 1, **info.model_dump(mode="json"), **shape}


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copies in the standard memory format on the CPU, and for tied tensors name -> the name they are saved under."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise LoadError(f"{name} of the network is a {type(value).__name__}, not a tensor, and cannot be saved")
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases


def _header(beside: Mapping[str, Any], path: Path) -> _Header:
    if not isinstance(beside["compress"], int) or beside["compress"] > FORMAT:
        raise LoadError(
            f"{path} has format {beside['compress']!r}, and this version reads up to {FORMAT}: upgrade compress-to-onnx"
        )
    try:
        return _Header.model_validate(dict(beside))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise LoadError(f"{path} has a damaged header: {where}: {first['msg']}; save it again") from error


def _json(text: str | None, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(text) if text is not None else {}
    except ValueError as error:
        raise LoadError(f"{path} has a damaged header: it is no JSON; save it again") from error
    return content if isinstance(content, dict) else {}


def _refuse_unusable(tensors: Mapping[str, Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise LoadError(f"{path} has a sparse, quantised or empty tensor, {name}: save the dense float weights")
    bad = [name for name, value in tensors.items() if not _is_finite(value)]
    if bad:
        raise LoadError(
            f"{path} has NaN or Inf in {len(bad)} of {len(tensors)} tensors, first {bad[0]}: use an earlier checkpoint"
        )


def _is_finite(value: Tensor) -> bool:
    if value.is_floating_point() and value.element_size() == 1:  # float8 has no isfinite
        value = value.float()
    return bool(torch.isfinite(value).all())


def _set_integers(model: nn.Module, checkpoint: Checkpoint) -> None:
    modules = dict(model.named_modules())
    for path, attributes in checkpoint.integers.items():
        for name, value in attributes.items():
            if path not in modules or name not in structure.integers(modules[path]) or type(value) is not int:
                raise LoadError(f"{checkpoint.path} sets {path}.{name}, which the network does not have: check --arch")
            structure.set_integer(modules[path], name, value)


def _some(names: list[str]) -> str:
    if not names:
        return "0 names"
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} name{'s' if len(names) > 1 else ''} ({', '.join(names[:3])}{more})"
