"""What timm and torchvision say of the images of a network: of the weights that they give out under its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Images:
    """What a library says of a network's images, each None where it says nothing."""

    size: tuple[int, int, int] | None = None  # C, H, W
    mean: tuple[float, ...] | None = None  # for images in 0..1
    std: tuple[float, ...] | None = None
    labels: tuple[str, ...] | None = None


def of_timm(model: nn.Module, arguments: Mapping[str, Any]) -> Images:
    """By the network's pretrained_cfg; its classes have names where they are those of an ImageNet."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    config: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    if "input_size" not in config:
        return Images()
    channels = arguments.get("in_chans", config["input_size"][0])
    is_known = channels == len(config["mean"])
    subset = infer_imagenet_subset(model)
    names = config.get("label_names") or (ImageNetInfo(subset).label_descriptions() if subset else ())
    return Images(
        (channels, *config["input_size"][1:]),
        tuple(config["mean"]) if is_known else None,
        tuple(config["std"]) if is_known else None,
        tuple(names) if names and len(names) == getattr(model, "num_classes", None) else None,
    )


def of_torchvision(name: str, model: nn.Module, arguments: Mapping[str, Any]) -> Images:
    """By the transforms and categories of the default weights; a size that the network is bound to comes first."""
    from torchvision import models

    given = models.get_model_weights(name)
    if not len(given):
        return Images()
    weights = given.DEFAULT
    transforms = weights.transforms()
    if not hasattr(transforms, "mean"):  # detectors normalise images themselves and take any size
        return Images(None, (0.0,) * 3, (1.0,) * 3)
    side = getattr(model, "image_size", None) or (getattr(transforms, "crop_size", None) or transforms.resize_size)[0]
    names = tuple(weights.meta["categories"])
    is_other = arguments.get("num_classes", len(names)) != len(names)
    return Images((3, side, side), tuple(transforms.mean), tuple(transforms.std), None if is_other else names)
