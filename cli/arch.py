"""--arch: a name of ours, timm:NAME, torchvision:NAME, hf:PLACE, pkg.module:function, file.py:function; or inferred.

A checkpoint's metadata may name an architecture, but never code: functions run only when the user names them.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, ModelInfo, renamed
from compress.cli import huggingface, images, user_code
from compress.cli.images import Images
from compress.cli.user_code import RESERVED, close_to, line
from compress.errors import CompressError, LoadError, UsageError
from compress.models import ARCHS, SelectChannels

Builder = Callable[..., Any]
FORMS = "timm:NAME, torchvision:NAME, hf:REPO_OR_DIR, pkg.module:function or path/to/file.py:function"
LIBRARIES = ("timm:", "torchvision:", "hf:")  # what a file may name: libraries, not code
# What the weights can tell: argument -> two values whose networks are compared to find the axis that carries it.
INFERRED = {"num_classes": (10, 11), "in_channels": (3, 4), "in_chans": (3, 4)}


@dataclass(frozen=True)
class Resolved:
    """A network that has been built but holds no weights yet, and what is known about its images."""

    name: str  # what --arch takes
    kwargs: dict[str, Any]
    model: nn.Module
    input_size: tuple[int, int, int] | None  # C, H, W
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    labels: tuple[str, ...] | None
    note: str | None  # what was inferred, to be reported


def parse_arch_args(values: Sequence[str]) -> dict[str, Any]:
    """["width=0.5", "name=x"] -> {"width": 0.5, "name": "x"}: JSON numbers, true, false, null; the rest is text.

    Raises:
        UsageError: no `=`, a key that is no identifier, or a key twice.
    """
    arguments: dict[str, Any] = {}
    for text in values:
        key, separator, value = text.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"--arch-arg {text!r} is not of the form key=value: write for example num_classes=100")
        if key in arguments:
            raise UsageError(f"--arch-arg {key} is given twice: give it once")
        arguments[key] = _scalar(value)
    return arguments


def resolve(spec: str | None, arch_args: Mapping[str, Any], checkpoint: Checkpoint | None) -> Resolved:
    """Build the network that `spec` names, or without one the network that the checkpoint's metadata or shapes tell.

    Arguments that are not given come from the metadata when it names the same architecture, else `num_classes` and the
    input channels are read off the weights where the builder takes them. The global random state is not touched.

    Raises:
        LoadError: an architecture that is unknown, ambiguous, or cannot be built.
        UsageError: an optional package is missing, or an argument that would load weights.
    """
    info = checkpoint.info if checkpoint is not None else ModelInfo()
    notes: list[str] = []
    with torch.random.fork_rng(devices=[]):
        asked = spec if spec is not None else _from_checkpoint(checkpoint, notes)
    name = huggingface.canonical(asked) if asked.startswith(huggingface.PREFIX) else asked
    known = info.arch_kwargs if name == info.arch else {}
    if name.startswith(LIBRARIES) and (reserved := sorted(RESERVED & {*arch_args})):
        raise UsageError(f"--arch-arg {reserved[0]} is not allowed: the weights come from the checkpoint; leave it out")
    if name.startswith(LIBRARIES) and (reserved := sorted(RESERVED & {*known})):
        raise LoadError(f"the file names {name} with {reserved[0]}, which would bring weights or run code: not allowed")
    given = {**known, **arch_args}
    config: dict[str, Any] = {}
    if name.startswith(huggingface.PREFIX) and "config" not in given:
        _optional("transformers")  # before anything is downloaded
        config = huggingface.configuration(asked)
        given["config"] = huggingface.portable(config)
    with user_code.importable(name):
        with torch.random.fork_rng(devices=[]):
            builder, allowed = _builder(name)
            tensors = checkpoint.tensors if checkpoint is not None and not known else {}
            found = _inferred(builder, allowed, given, tensors)
        if config and found.get("num_classes") == huggingface.class_count(config):
            found = {}
        kwargs = {**given, **found}
        with torch.random.fork_rng(devices=[]):  # its own, so that a seed decides the weights whatever ran before
            model = _built(builder, name, kwargs)
    if found:
        notes.append("from the weights: " + ", ".join(f"{k}={v}" for k, v in found.items()))
    said = huggingface.images(config, asked, classes=kwargs.get("num_classes")) if config else None
    said = said or _images(name, kwargs, model)
    size, mean, std, labels = info.input_size or said.size, info.mean or said.mean, info.std or said.std, info.labels
    return Resolved(name, kwargs, model, size, mean, std, labels or said.labels, "; ".join(notes) or None)


def _scalar(text: str) -> Any:
    def refuse(constant: str) -> None:  # NaN and Infinity are no JSON
        raise ValueError(constant)

    try:
        value = json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text), parse_constant=refuse)
    except ValueError:
        return text
    return text if isinstance(value, list | dict) else value


def _from_checkpoint(checkpoint: Checkpoint | None, notes: list[str]) -> str:
    """The architecture the file names, or the only one of ours whose tensors have the file's names and shapes."""
    if checkpoint is None:
        raise LoadError(f"no architecture is given: say --arch with one of {', '.join(ARCHS)}, or {FORMS}")
    arch = checkpoint.info.arch
    if arch in ARCHS or (arch.startswith(LIBRARIES) and (arch[:3] != "hf:" or "config" in checkpoint.info.arch_kwargs)):
        return arch
    if ":" in arch:
        raise LoadError(f"{checkpoint.path} was made by the code {arch!r}: if you trust it, say --arch {arch}")
    matches = [name for name in ARCHS if _matches(name, checkpoint.tensors)]
    if len(matches) == 1:
        notes.append(f"the weights have the names and shapes of {matches[0]}")
        return matches[0]
    said = f" (it calls itself {arch!r}: timm:{arch} or torchvision:{arch}?)" if arch else ""
    fits = f"fit several of our architectures, {', '.join(matches)}" if matches else "fit none of our architectures"
    options = "one of them" if matches else f"one of {', '.join(ARCHS)}, or {FORMS}"
    raise LoadError(f"the weights in {checkpoint.path} {fits}{said}: say --arch with {options}")


def _matches(name: str, tensors: Mapping[str, Tensor]) -> bool:
    builder = ARCHS[name]
    if not _fits(_skeleton(builder, {}), tensors, check_shapes=False):
        return False
    kwargs = _inferred(builder, ("num_classes", "in_channels"), {}, tensors)
    return _fits(_skeleton(builder, kwargs), tensors, check_shapes=True)


def _fits(model: nn.Module, tensors: Mapping[str, Tensor], *, check_shapes: bool) -> bool:
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    fixed = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, SelectChannels)}
    missing = [n for n in wanted if n not in tensors and n not in fixed and not n.endswith("num_batches_tracked")]
    if missing or any(name not in wanted for name in tensors):
        return False
    return not check_shapes or all(value.shape == wanted[name] for name, value in tensors.items())


def _skeleton(builder: Builder, kwargs: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = builder(**kwargs)
    return model


def _inferred(
    builder: Builder, allowed: Sequence[str], given: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, int]:
    """The sizes among `allowed` that are not given, read off the axis that follows them when they are varied."""
    found: dict[str, int] = {}
    for key in (key for key in INFERRED if tensors and key in allowed and key not in given):
        low, high = INFERRED[key]
        try:
            shapes, others = (_shapes(builder, {**given, key: value}) for value in (low, high))
        except Exception:  # the builder does not take these values; its defaults are used, and building reports errors
            continue
        loaded = renamed(tensors, shapes)
        axes = [(name, axis) for name, shape in shapes.items() if name in loaded
                for axis, size in enumerate(shape) if size == low and others[name][axis] == high]  # fmt: skip
        sizes = {loaded[name].shape[axis] for name, axis in axes if axis < loaded[name].dim()}
        if len(sizes) == 1:
            found[key] = sizes.pop()
    return found


def _shapes(builder: Builder, kwargs: Mapping[str, Any]) -> dict[str, torch.Size]:
    try:
        model = _skeleton(builder, kwargs)
    except Exception:  # builders that read values at construction cannot run on the meta device
        model = builder(**kwargs)
    return {name: value.shape for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _built(builder: Builder, name: str, kwargs: Mapping[str, Any]) -> nn.Module:
    try:
        model = builder(**kwargs)
    except CompressError:
        raise
    except (Exception, SystemExit) as error:
        told = {key: value for key, value in kwargs.items() if key != "config"}
        raise LoadError(f"{name} could not be built with {told}: {line(error)}; see --arch-arg") from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise LoadError(f"{name} returned a {kind}, not a torch.nn.Module: name a function that builds one")
    return model


def _builder(name: str) -> tuple[Builder, Sequence[str]]:
    """The function behind a name, and those of its arguments that the weights may tell."""
    library, _, rest = name.partition(":")
    if name in ARCHS:
        return ARCHS[name], ("num_classes", "in_channels")
    if library == "timm":
        return _timm(rest), ("num_classes", "in_chans")
    if library == "torchvision":
        return _torchvision(rest), ("num_classes",)
    if library == "hf":
        return _transformers, ("num_classes",)
    if ":" in name:
        builder = user_code.function(name)
        try:
            return builder, tuple(inspect.signature(builder).parameters)
        except ValueError:  # a function written in C
            return builder, ()
    raise LoadError(f"--arch {name!r} is unknown{close_to(name, ARCHS)}: allowed are {', '.join(ARCHS)}, {FORMS}")


def _timm(name: str) -> Builder:
    timm = _optional("timm")
    base = name.partition(".")[0]  # the part behind the dot names pretrained weights
    if not timm.is_model(base):
        raise LoadError(f"timm has no network {name!r}{close_to(base, timm.list_models())}: see timm.list_models()")
    return lambda **kwargs: timm.create_model(name, pretrained=False, **kwargs)


def _torchvision(name: str) -> Builder:
    models = _optional("torchvision").models
    kinds = {kind: models.list_models(module=kind) for kind in (models, models.segmentation, models.detection)}
    found = next((kind for kind, names in kinds.items() if name in names), None)
    if found is None:
        close = close_to(name, (known for names in kinds.values() for known in names))
        raise LoadError(f"torchvision has no network {name!r}{close}: see torchvision.models.list_models()")
    none = {"weights": None} if found is models else {"weights": None, "weights_backbone": None}
    return lambda **kwargs: models.get_model(name, **none, **kwargs)


def _transformers(*, config: str, **kwargs: Any) -> nn.Module:
    _optional("transformers")
    return huggingface.build(json.loads(config), kwargs)


def _optional(package: str) -> Any:
    extra = {"transformers": "hf"}.get(package, package)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(f'{package} is not installed: pip install "compress-to-onnx[{extra}]"') from error
    except (RuntimeError, AttributeError) as error:  # torchvision::nms does not exist, and what follows from it
        raise UsageError(f"{package} is installed but does not fit torch {torch.__version__}: {error}") from error


def _images(name: str, kwargs: Mapping[str, Any], model: nn.Module) -> Images:
    """What the architecture's library says of its images."""
    library, _, rest = name.partition(":")
    if name in ARCHS:
        return Images((kwargs.get("in_channels", 3), 32, 32))
    if library == "timm":
        return images.of_timm(model, kwargs)
    if library == "torchvision":
        return images.of_torchvision(rest, model, kwargs)
    if library == "hf":
        return huggingface.images(json.loads(kwargs["config"]), None)
    return Images()


def takes(spec: str, argument: str) -> bool:
    """Whether the builder that `spec` names can be given `argument`: what `compress train` asks about num_classes.

    Raises:
        LoadError, UsageError: as `resolve`.
    """
    with user_code.importable(spec):
        return argument in _builder(spec)[1]
