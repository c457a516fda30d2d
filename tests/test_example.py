"""Networks of several inputs and outputs: traced, cut and proved like any other; detectors by their backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from compress import cost
from compress.errors import CompressError, PruneError, UsageError
from compress.example import arguments, like, tile
from compress.export import prove, to_onnx
from compress.groups import cut, trace, zero
from compress.shrinking import shrink
from tests.nets import lively

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(3, 3, 8, 8, generator=GENERATOR)
POINTS = torch.randn(3, 5, generator=GENERATOR)


class Parts(nn.Module):
    """Two maps of classes, full size, as torchvision's segmentation networks give them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, padding=1)
        self.norm, self.head, self.aux = nn.BatchNorm2d(16), nn.Conv2d(16, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        early = F.relu(self.stem(x))
        late = F.relu(self.norm(self.middle(early)))
        size = x.shape[-2:]
        return {"out": F.interpolate(self.head(late), size), "aux": F.interpolate(self.aux(early), size)}


class Nested(nn.Module):
    """A list with a tuple and a dict in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> list[Any]:
        y = F.relu(self.middle(F.relu(self.stem(x))))
        return [(self.head(y.mean((2, 3))), y.mean((1, 2, 3))), {"norm": y.flatten(1).norm(dim=1)}]


class Two(nn.Module):
    """Images and a vector beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.beside = nn.Conv2d(3, 8, 3), nn.Linear(5, 8)
        self.middle, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        y = F.relu(self.stem(images)).mean((2, 3)) + F.relu(self.beside(points))
        return self.head(F.relu(self.middle(y)))


NETS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dict": (Parts, IMAGES), "nested": (Nested, IMAGES), "two inputs": (Two, (IMAGES, POINTS)),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETS)
def test_the_cut_equals_zeroing(kind: str) -> None:
    build, example = NETS[kind]
    model = lively(build()).double()
    given = like(example, torch.zeros((), dtype=torch.float64))
    groups = trace(model, given)
    free = [group for group in groups if group.frozen is None]
    assert len(free) == 2 and sum(group.size for group in free) == 24
    kept = {group.name: range(1, group.size, 2) for group in free}
    zeroed = copy.deepcopy(model)
    zero(zeroed, free, kept)
    cut(model, free, kept)
    with torch.no_grad():
        wanted, found = tree_leaves(zeroed(*given)), tree_leaves(model(*given))
    pairs = list(zip(wanted, found, strict=True))
    means = {"nested": (1,)}.get(kind, ())  # the mean over the channels counts those that are 0: the cut changes it
    assert all((a - b).abs().max() < 1e-10 for place, (a, b) in enumerate(pairs) if place not in means)


@pytest.mark.parametrize("kind", NETS)
def test_what_is_cut_is_proved(kind: str, tmp_path: Path) -> None:
    build, example = NETS[kind]
    model = lively(build())
    whole = cost.measure(model, example).total("params")
    shrink(model, example, keep=0.6, round_to=1)
    assert cost.measure(model, example).total("params") <= 0.6 * whole
    proof = to_onnx(model, example, tmp_path / "a.onnx")
    assert proof.relative < 1e-5 and proof == prove(model, tmp_path / "a.onnx", example)
    with pytest.raises(CompressError):
        prove(model, tmp_path / "a.onnx", IMAGES if kind == "two inputs" else (IMAGES, POINTS))


def test_macs_are_counted_per_image() -> None:
    one = cost.measure(Two(), (IMAGES[:1], POINTS[:1])).total("macs")
    assert cost.measure(Two(), (IMAGES, POINTS)).total("macs") == one == 36 * 8 * 27 + 5 * 8 + 8 * 16 + 16 * 4


def test_examples_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the example holds nothing; give one tensor, or a tuple of tensors"):
        arguments(())
    with pytest.raises(UsageError, match="the example holds str"):
        arguments((IMAGES, "a"))  # type: ignore[arg-type]
    with pytest.raises(CompressError, match=r"\(3, 3, 8, 8\) and \(2, 5\) hold no batch"):
        to_onnx(Two(), (IMAGES, POINTS[:2]), tmp_path / "a.onnx")
    with pytest.raises(PruneError, match=r"an input of shape \(3, 3, 8, 8\) and \(3, 4\): "):
        trace(Two(), (IMAGES, POINTS[:, :4]))


def test_numbers_that_are_no_floats_stay_as_they_are() -> None:
    places = torch.tensor([3, 1])
    assert torch.equal(tile((IMAGES[:2], places), 3)[1], torch.tensor([3, 1, 3]))
    assert [t.dtype for t in like((IMAGES, places), IMAGES.double())] == [torch.float64, torch.int64]


# torchvision ---------------------------------------------------------------------------------------------------------


def test_a_segmentation_network_of_torchvision() -> None:
    models = pytest.importorskip("torchvision").models
    model = models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    images = torch.randn(1, 3, 64, 64, generator=GENERATOR)
    plan = shrink(model, images, keep=0.6)
    assert plan.reached <= 0.6 and model(images)["out"].shape == (1, 5, 64, 64)


def test_a_detector_is_cut_by_its_backbone() -> None:
    models = pytest.importorskip("torchvision").models
    model = models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3).eval()
    images = torch.rand(1, 3, 320, 320, generator=GENERATOR)
    shapes = {name: feature.shape for name, feature in model.backbone(images).items()}
    assert shrink(model.backbone, images, keep=0.6).reached <= 0.6
    assert {name: feature.shape for name, feature in model.backbone(images).items()} == shapes
    box = {"boxes": torch.tensor([[10.0, 10.0, 200.0, 200.0]]), "labels": torch.tensor([1])}
    losses = model.train()([images[0], images[0]], [box, box])  # the whole detector, as it is trained
    assert losses.keys() == {"bbox_regression", "classification"} and all(bool(v.isfinite()) for v in losses.values())


class Detector(nn.Module):
    """As many outputs as there are bright places: no fixed graph."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))

    def forward(self, images: Tensor) -> list[Tensor]:
        found = [feature[feature > feature.mean()] for feature in self.backbone(images)]
        return [places for places in found if places.sum() > 0]


def test_a_whole_detector_is_refused_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PruneError) as error:
        trace(Detector(), IMAGES)
    assert str(error.value).startswith("torch.export cannot read the network: ") and "\n" not in str(error.value)
    advice = "; prune its backbone by itself, in place: compress.shrink(model.backbone, images, keep=...)"
    assert str(error.value).endswith(advice)
    assert capfd.readouterr() == ("", "")
