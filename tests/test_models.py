"""Architectures: published sizes, the fixed shortcut, real weights and their accuracy."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.checkpoint import load_into, read
from compress.models import ARCHS, SelectChannels

# Parameters that are learned, 10 classes. ResNets: table 6 of arXiv 1512.03385 rounds them to 0.27 ... 1.7 M.
# MobileNetV2: the 3,504,872 of the ImageNet network, with another classifier.
LEARNED = {
    "resnet20": 269_722, "resnet32": 464_154, "resnet44": 658_586, "resnet56": 853_018, "resnet110": 1_727_962,
    "resnet20_b": 272_474, "vgg16_bn": 14_724_042, "vgg19_bn": 20_035_018,
    "mobilenet_v2": 3_504_872 - 1281 * 1000 + 1281 * 10,
}  # fmt: skip


class Padded(nn.Module):
    """The option-A shortcut as it is usually written."""

    def __init__(self, each_side: int) -> None:
        super().__init__()
        self.each_side = each_side

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.each_side, self.each_side))


@pytest.mark.parametrize("name", LEARNED)
def test_learned_parameters(name: str) -> None:
    with torch.device("meta"):
        model = ARCHS[name]()
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == LEARNED[name]


@pytest.mark.parametrize("name", ARCHS)
def test_shapes_and_arguments(name: str) -> None:
    model = ARCHS[name](num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
        assert model(torch.randn(1, 1, 16, 16)).shape == (1, 7)


@pytest.mark.parametrize("name", ["resnet20", "resnet20_b", "mobilenet_v2"])
def test_digits_size(name: str) -> None:
    model = ARCHS[name](in_channels=1).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.parametrize("size", [7, 8])
def test_select_channels_is_subsampling_and_padding(size: int) -> None:
    x = torch.randn(3, 16, size, size)
    assert torch.equal(SelectChannels(16, 32, stride=2)(x), Padded(8)(x))


def test_select_channels_is_fixed_and_saved() -> None:
    model = ARCHS["resnet20"]()
    weight = model.get_parameter("layer2.0.shortcut.weight")
    assert not weight.requires_grad
    assert weight.sum() == 16
    assert weight.shape == model.state_dict()["layer2.0.shortcut.weight"].shape == (32, 16, 1, 1)
    assert torch.equal(copy.deepcopy(model).get_parameter("layer2.0.shortcut.weight"), weight)


def test_select_channels_loads_without_its_weight() -> None:
    model = ARCHS["resnet20"]()
    dense = {name: value for name, value in model.state_dict().items() if "shortcut" not in name}
    assert model.load_state_dict(dense).missing_keys == []
    cut = model.state_dict()
    cut["layer2.0.shortcut.weight"] = torch.zeros_like(cut["layer2.0.shortcut.weight"])
    model.load_state_dict(cut)
    assert model.get_parameter("layer2.0.shortcut.weight").sum() == 0


def test_building_option_a_draws_nothing_for_the_shortcuts() -> None:
    torch.manual_seed(0)
    SelectChannels(16, 32, stride=2)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(after, torch.get_rng_state())


def test_real_weights_equal_the_padded_form(shared: Path) -> None:
    model = ARCHS["resnet20"]().eval()
    load_into(model, read(shared / "checkpoints/resnet20-12fca82f.th"))
    padded = copy.deepcopy(model)
    padded.layer2[0].shortcut, padded.layer3[0].shortcut = Padded(8), Padded(16)  # type: ignore[index,union-attr]
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model(x), padded(x))


@pytest.mark.parametrize("file", ["resnet20-12fca82f", "resnet32-d509ac18", "resnet44-014dd654", "resnet56-4bfd9763"])
def test_real_weights_load(shared: Path, file: str) -> None:
    load_into(ARCHS[file.partition("-")[0]](), read(shared / f"checkpoints/{file}.th"))


def test_real_weights_are_accurate(shared: Path) -> None:
    """81.0 on all 10,000 re-encoded test images, as the data's description says; a wrong shortcut ends near 10."""
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    rows = parquet.read_table(shared / "data/cifar10/test-00000-of-00001.parquet").slice(0, 500).to_pylist()
    pixels = numpy.stack([numpy.asarray(image.open(io.BytesIO(row["img"]["bytes"])).convert("RGB")) for row in rows])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    model = ARCHS["resnet20"]().eval()
    load_into(model, read(shared / "checkpoints/resnet20-12fca82f.th"))
    with torch.no_grad():
        top1 = 100 * (model(x).argmax(1) == torch.tensor([row["label"] for row in rows])).float().mean().item()
    assert top1 > 76, json.dumps({"top1": top1})
