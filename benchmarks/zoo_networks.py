"""The networks of the sweep: how each is built with random weights, and how their list is made.

    python benchmarks/zoo_networks.py > benchmarks/zoo_models.txt

From timm the smallest and a middle-sized member of every family (the module that registers it), from torchvision every
builder of classification, segmentation and detection (its backbone), from transformers image classifiers as their
configurations describe them; each with fewer than LARGEST parameters. A line is `family model size`. Of timm 1.0.31's
98 families three have no such member: deepseek_vit, gemma4_vit and vgg.
"""

from __future__ import annotations

import collections
import importlib
from collections.abc import Iterator
from typing import Any

LARGEST = 100_000_000
EDGE = 512  # pixels: members for larger images are taken only where a family has no others
EDGES = {"inception_v3": 299, "ssd300_vgg16": 300}  # of torchvision's, where 224 pixels are too few
# Image classifiers of transformers: name -> what differs from the default configuration.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "Beit": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "Bit": {"layer_type": "bottleneck"},
    "ConvNext": {},
    "ConvNextV2": {},
    "Cvt": {},
    "DeiT": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "Dinov2": {"hidden_size": 192, "num_attention_heads": 3, "image_size": 224, "patch_size": 16},
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "FocalNet": {},
    "Levit": {},
    "MobileNetV1": {},
    "MobileNetV2": {},
    "MobileViT": {},
    "PoolFormer": {},
    "Pvt": {},
    "RegNet": {},
    "ResNet": {},
    "Segformer": {},
    "Swin": {},
    "ViT": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
}
_DECLARED: list[Any] = []  # torchvision's operators, declared as long as this list lives


def main() -> None:
    for line in (*_timm(), *_torchvision(), *(f"transformers transformers:{name} 224" for name in TRANSFORMERS)):
        print(line, flush=True)


def build(name: str) -> Any:
    """The network that `name` (timm:NAME, torchvision:NAME, transformers:NAME) says, with random weights."""
    declare()
    source, _, rest = name.partition(":")
    if source == "timm":
        return importlib.import_module("timm").create_model(rest)
    if source == "transformers":
        package = importlib.import_module("transformers")
        config = getattr(package, f"{rest}Config")(num_labels=10, **TRANSFORMERS[rest])
        return getattr(package, f"{rest}ForImageClassification")(config)
    models = importlib.import_module("torchvision").models
    if rest in models.list_models(models.detection):
        return models.get_model(rest, weights=None, weights_backbone=None).backbone
    more = {"weights_backbone": None} if rest in models.list_models(models.segmentation) else {}
    more |= {"init_weights": True} if rest in ("googlenet", "inception_v3") else {}  # silences a warning
    return models.get_model(rest, weights=None, **more)


def declare() -> None:
    """Declare torchvision's operators where its compiled part does not fit this torch; timm imports it too."""
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


def _size(name: str) -> int:
    """Parameters, counted without memory for them where the builder computes nothing."""
    import torch

    try:
        with torch.device("meta"):
            network = build(name)
    except (NotImplementedError, RuntimeError):
        network = build(name)
    return sum(p.numel() for p in network.parameters())


def _timm() -> Iterator[str]:
    """The smallest and the median of every family's members below LARGEST, by parameters, then by image size."""
    declare()
    registry = importlib.import_module("timm.models._registry")
    families: dict[str, list[tuple[int, int, str]]] = collections.defaultdict(list)
    for name in registry.list_models():
        edge = max(registry.get_pretrained_cfg(name).input_size[1:])
        if (size := _size(f"timm:{name}")) < LARGEST:
            families[registry._model_to_module[name]].append((size, edge, name))
    ordered = {
        family: sorted(member for member in members if member[1] <= EDGE) or sorted(members)
        for family, members in sorted(families.items())
    }
    for family, members in ordered.items():
        yield f"{family} timm:{members[0][2]} {members[0][1]}"
    for family, members in ordered.items():
        if len(members) > 1:
            _, edge, name = members[len(members) // 2]
            yield f"{family} timm:{name} {edge}"


def _torchvision() -> Iterator[str]:
    declare()
    models = importlib.import_module("torchvision").models
    for kind in (models, models.segmentation, models.detection):
        for name in models.list_models(kind):
            if _size(f"torchvision:{name}") < LARGEST:
                family = kind.__name__.removeprefix("torchvision.").replace("models.", "").replace("models", "classify")
                yield f"{family} torchvision:{name} {EDGES.get(name, 224)}"


if __name__ == "__main__":
    main()
