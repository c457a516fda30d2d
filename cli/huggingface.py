"""hf:REPO_OR_DIR: image classifiers of transformers, from a folder that save_pretrained wrote, or from the Hub.

Only JSON and weights are read, and transformers builds the network; code that comes with a repository is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.checkpoint import renamed
from compress.cli.images import Images
from compress.cli.user_code import RESERVED, close_to, line
from compress.errors import LoadError, UsageError

PREFIX = "hf:"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the second only as far as it can be read without unpickling
LABELS = ("id2label", "label2id")  # kept by the file of weights itself, not in its copy of the configuration


class Logits(nn.Module):
    """A classifier of transformers as a network whose forward(images) gives the logits.

    Its tensors are called `model.` and then what transformers calls them, for good: checkpoint.renamed puts the prefix
    before the names of a file that transformers wrote, so that both kinds of file are read.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model  # a transformers.PreTrainedModel

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes)."""
        return self.model(pixel_values=images, return_dict=True).logits  # type: ignore[no-any-return]


def canonical(spec: str) -> str:
    """The name that outputs carry: of a folder its last part, since a path means nothing on another machine."""
    place = spec.removeprefix(PREFIX)
    return PREFIX + Path(place).resolve().name if Path(place).is_dir() else spec


def configuration(spec: str) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        LoadError: it is absent, damaged, or the Hub does not answer.
    """
    found = _json(spec, "config.json")
    if not isinstance(found.get("model_type"), str):
        raise LoadError(f"{spec}: config.json names no model_type: give a folder or repository made by transformers")
    return found


def weights(spec: str) -> Path:
    """The file of weights of a folder or a repository.

    Raises:
        LoadError: there is none, it is in several parts, or the Hub does not answer.
    """
    for name in WEIGHTS:
        if (path := _file(spec, name)) is not None:
            return path
    if _file(spec, WEIGHTS[0] + ".index.json") is not None:
        raise LoadError(f"{spec} holds its weights in several parts: save it as one with max_shard_size='100GB'")
    raise LoadError(f"{spec} holds no weights: there is neither of {', '.join(WEIGHTS)}")


def build(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> nn.Module:
    """The network of a configuration, weights not loaded; `arguments` are num_classes and values of the configuration.

    Raises:
        LoadError: transformers has no image classifier of this kind, or an argument is none of its configuration.
        UsageError: what that network needs is not installed, or does not fit.
    """
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS

    kind = config["model_type"]
    if kind not in KINDS:
        raise LoadError(f"transformers has no image classifier {kind!r}{close_to(kind, KINDS)}")
    inner = sorted(RESERVED & {*(config.get("model_args") or ())})  # for timm, in the wrapper of transformers
    if inner:
        raise LoadError(f"the configuration of {kind} gives {inner[0]}, which would bring weights or run code")
    made = CONFIG_MAPPING[kind].from_dict({key: value for key, value in config.items() if key != "auto_map"})
    for key, value in arguments.items():
        name = "num_labels" if key == "num_classes" else key
        if not hasattr(made, name):
            raise LoadError(f"--arch-arg {key} is no value of the configuration of {kind}{close_to(key, vars(made))}")
        if getattr(made, name) != value:
            setattr(made, name, value)
    try:
        return Logits(AutoModelForImageClassification.from_config(made, trust_remote_code=False))
    except ImportError as error:  # transformers imports a network's file, and what that needs, at its first use
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise UsageError(f"transformers cannot bring its {kind} here: {line(root)[:200]}") from error


def translated(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under the names of `model`, which transformers knows for files of earlier versions of itself.

    What does not fit keeps its name or its shape, for checkpoint.load_into to refuse; what is missing stays missing.
    """
    if not isinstance(model, Logits) or renamed(tensors, model.state_dict()).keys() == model.state_dict().keys():
        return tensors
    own: Any = model.model
    with _quiet():
        network, found = type(own).from_pretrained(
            None, config=own.config, state_dict=dict(tensors), output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    names = {name: value for name, value in network.state_dict().items() if name not in found["missing_keys"]}
    names |= {name: tensors[name] for name in found["unexpected_keys"] if name in tensors}
    names |= {name: torch.empty(shape) for name, shape, _ in found["mismatched_keys"]}
    return names


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and tables of transformers."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()


def portable(config: Mapping[str, Any]) -> str:
    """The configuration as an argument of the architecture that a checkpoint carries: JSON without the labels."""
    kept = {key: value for key, value in config.items() if key not in LABELS}
    return json.dumps({**kept, "num_labels": class_count(config)}, sort_keys=True)


def images(config: Mapping[str, Any], spec: str | None, *, classes: int | None = None) -> Images:
    """Input size, normalisation and labels: the image processor's file first, then the configuration.

    Args:
        spec: where preprocessor_config.json is looked for; None: nowhere, the configuration is all there is.
        classes: of the network, where they are not the configuration's; it then has no names for them.
    """
    processor = _json(spec, "preprocessor_config.json", needed=False) if spec is not None else {}
    side = _side(processor) or _pair(config.get("image_size"))
    mean, std = _normalisation(processor)
    channels = int(config.get("num_channels", len(mean) if mean else 3))
    if mean is not None and len(mean) != channels:
        mean = std = None
    names: Mapping[str, Any] = config.get("id2label") or {}
    labels = tuple(str(names[key]) for key in sorted(names, key=int)) or None
    is_named = labels is not None and any(label != f"LABEL_{place}" for place, label in enumerate(labels))
    is_other = classes not in (None, class_count(config))
    return Images((channels, *side) if side else None, mean, std, labels if is_named and not is_other else None)


def class_count(config: Mapping[str, Any]) -> int:
    """Outputs of the configuration's network."""
    return len(config.get("id2label") or ()) or int(config.get("num_labels", 2))  # transformers' own default


def _side(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width after the processor's resizing and cropping."""
    is_cropped = processor.get("do_center_crop") and processor.get("crop_size") is not None
    return _pair(processor.get("crop_size") if is_cropped else processor.get("size"))


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = [size.get("height", edge), size.get("width", edge)]
    if isinstance(size, int):
        size = [size, size]
    is_pair = isinstance(size, list | tuple) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
    return (size[0], size[1]) if is_pair else None


def _normalisation(processor: Mapping[str, Any]) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std for images in 0..1: (255 f u - offset - mean) / std, where the processor multiplies bytes by f."""
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    if not isinstance(mean, list) or not isinstance(std, list):
        return None, None
    factor = float(processor.get("rescale_factor", 1 / 255)) if processor.get("do_rescale", True) else 1.0
    scale, offset = 255 * factor, 1.0 if processor.get("rescale_offset") else 0.0
    if abs(scale - 1) < 1e-6 and not offset:  # as nearly always: the figures as they stand there
        return tuple(map(float, mean)), tuple(map(float, std))
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)


def _json(spec: str, name: str, *, needed: bool = True) -> dict[str, Any]:
    path = _file(spec, name, needed=needed)
    if path is None:
        if needed:
            raise LoadError(f"{spec} holds no {name}: give a folder that save_pretrained wrote, or a repository's name")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{spec}: {name} cannot be read: {line(error)}") from error
    return found if isinstance(found, dict) else {}


def _file(spec: str, name: str, *, needed: bool = True) -> Path | None:
    """A file of the folder or the repository, downloaded into the Hub's own cache; None where there is no such file.

    One that is not `needed` is also taken to be absent where the Hub does not answer and its cache has none.
    """
    place = spec.removeprefix(PREFIX)
    if Path(place).is_dir():
        path = Path(place) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(place, name))
    except LocalEntryNotFoundError as error:
        if not needed:
            return None
        text = f"there is no folder {place}, and the Hub does not answer: check the network, or give a folder"
        raise LoadError(f"{spec}: {text}") from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise LoadError(f"{spec} is neither a folder nor a repository that can be read: {line(error)[:200]}") from error
