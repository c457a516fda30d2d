"""Segmentation from the command line: a folder of images with masks, a task by name or of one's own, its metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from compress import checkpoint, data
from compress.cli.app import app
from compress.errors import DataError
from compress.task import IGNORED

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):  # its output is a dict, as torchvision's is
    def __init__(self, classes):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.out, self.aux = nn.Conv2d(16, classes, 1), nn.Conv2d(16, classes, 1)

    def forward(self, x):
        x = self.first(x)
        return {"out": self.out(self.second(x)), "aux": self.aux(x)}

def net(num_classes=3):
    return Net(num_classes)

def labelled():
    return {"train": (torch.zeros(30, 16, 16, dtype=torch.uint8), torch.arange(30) % 3)}
"""
TASK = """
from compress.task import Segmentation

class Mine(Segmentation):
    name, metric = "mine", "pixels"

    def value(self, counts):
        return float(100 * counts.diagonal().sum() / counts.sum())
"""
pytestmark = pytest.mark.usefixtures("in_the_repository")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images whose left and right half are red, green or blue, the class of each pixel; a frame does not count."""
    place = tmp_path_factory.mktemp("scenes")
    drawn = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4), ("test", 4)):
        for name in ("images", "masks"):
            (place / split / name).mkdir(parents=True)
        for index in range(count):
            mask = np.repeat(drawn.permutation(3)[:2].astype(np.uint8), 8)[None].repeat(16, 0)
            image = drawn.integers(0, 60, (16, 16, 3)) + 150 * np.eye(3, dtype=np.int64)[mask]
            mask[[0, -1]] = IGNORED
            Image.fromarray(image.astype(np.uint8)).save(place / split / "images" / f"{index}.png")
            Image.fromarray(mask).save(place / split / "masks" / f"{index}.png")
    (place / "net.py").write_text(NETWORK)
    (place / "mine.py").write_text(TASK)
    return place


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words: object) -> Any:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def trained(folder: Path, out: Path, *words: object) -> Any:
    options = (
        "--arch",
        f"{folder / 'net.py'}:net",
        "--data",
        folder,
        "--batch-size",
        8,
        "--device",
        "cpu",
        "--out",
        out,
    )
    return call("train", *options, *words, "--json")


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A network trained, then pruned without --task: the checkpoint, what train said, what prune said."""
    place = tmp_path_factory.mktemp("run")
    first = trained(folder, place / "net.safetensors", "--task", "segmentation", "--epochs", 12)
    assert first.exit_code == 0, first.stderr
    report = answer(
        "prune", place / "net.safetensors", "--arch", f"{folder / 'net.py'}:net", "--data", folder, "--target", 0.6,
        "--epochs", 3, "--round-to", 1, "--set", "train.batch_size=8", "--set", "bench.batches=[1]", "--device", "cpu",
        "--out", place / "out", "--set", "bench.seconds=1",
    )  # fmt: skip
    return place / "net.safetensors", json.loads(first.stdout), report


def test_a_network_is_trained_and_pruned_by_its_masks(run: tuple[Path, Any, Any], folder: Path) -> None:
    path, first, report = run
    assert checkpoint.read(path).info.task == "segmentation"
    assert first["top1"] is None and first["metric"]["name"] == "miou" and first["metric"]["value"] > 60
    assert report["kept"]["params"] <= 0.6 and report["parity"]["max_abs_diff"] < 1e-4
    for which in ("dense", "pruned"):
        assert report[which]["top1"] is None
    assert report["dense"]["metric"] == pytest.approx(first["metric"])
    onnx = answer("eval", report["onnx"], "--data", folder)
    assert onnx["metric"] == pytest.approx(report["pruned"]["metric"]) and onnx["images"] == 4
    whole = answer("eval", path, "--arch", f"{folder / 'net.py'}:net", "--data", folder, "--task", "segmentation")
    assert whole["metric"] == pytest.approx(first["metric"])
    assert f"mean IoU {report['dense']['metric']['value']:.2f} ->" in report["verdict"]
    pages = [(Path(report["out"]) / name).read_text() for name in ("report.html", "README.md")]
    assert all("mean IoU on test" in page and "top-1 on" not in page for page in pages)
    assert "image-segmentation" in pages[1] and "mean_iou" in pages[1]


def test_verify_measures_the_task_again(run: tuple[Path, Any, Any], folder: Path) -> None:
    found = answer("verify", run[2]["out"], "--arch", f"{folder / 'net.py'}:net", "--data", folder)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert found["ok"] and states["top-1"] == states["ONNX == torch"] == states["report"] == "ok"


def test_a_task_of_ones_own(run: tuple[Path, Any, Any], folder: Path, tmp_path: Path) -> None:
    net, mine = f"{folder / 'net.py'}:net", f"{folder / 'mine.py'}:Mine"
    made = trained(folder, tmp_path / "own.safetensors", "--task", mine, "--epochs", 1)
    assert made.exit_code == 0 and json.loads(made.stdout)["metric"]["name"] == "pixels", made.stderr
    assert checkpoint.read(tmp_path / "own.safetensors").info.task == "own"  # never the code's name
    refused = call("eval", tmp_path / "own.safetensors", "--arch", net, "--data", folder)
    assert refused.exit_code == 2 and "trained for a task that is none of ours" in refused.stderr
    found = answer("eval", run[0], "--arch", net, "--data", folder, "--task", mine)
    assert found["metric"]["name"] == "pixels" and found["metric"]["value"] > 60


def test_each_group_alone_is_judged_by_the_metric(run: tuple[Path, Any, Any], folder: Path, tmp_path: Path) -> None:
    net = f"{folder / 'net.py'}:net"
    page = tmp_path / "s.html"
    found = answer("sensitivity", run[0], "--arch", net, "--data", folder, "--widths", "0.1", "--plot", page)
    assert found["metric"] == "miou" and found["dense"]["value"] > 60 and found["split"] == "val"
    assert any(w["value"] < found["dense"]["value"] for c in found["groups"].values() for w in c["widths"])
    assert "mean IoU (%)" in page.read_text()
    pixels = answer(
        "sensitivity",
        run[0],
        "--arch",
        net,
        "--data",
        folder,
        "--widths",
        "0.1",
        "--task",
        f"{folder / 'mine.py'}:Mine",
    )
    assert pixels["metric"] == "pixels" and pixels["dense"]["loss"] == pytest.approx(found["dense"]["loss"])
    refused = call("sensitivity", run[0], "--arch", net, "--data", folder, "--task", "classification")
    assert refused.exit_code == 3 and "holds masks, a class for each pixel" in refused.stderr


def test_what_is_refused(run: tuple[Path, Any, Any], folder: Path, tmp_path: Path) -> None:
    net, out = f"{folder / 'net.py'}:net", tmp_path / "out.safetensors"
    for task, code, text in (
        ("detection", 2, "the task 'detection' is unknown; there are classification, segmentation, or one of your own"),
        (f"{folder / 'net.py'}:net", 2, "is no task: it has no name, metric, unpack"),
        (f"{folder / 'mine.py'}:Other", 3, "has no 'Other'"),
        ("classification", 3, "holds masks, a class for each pixel"),
    ):
        result = trained(folder, out, "--task", task, "--epochs", 1)
        assert text in result.stderr and result.exit_code == code and result.stderr.count("\n") == 1, result.stderr
    result = call("eval", run[0], "--arch", net, "--data", f"{folder / 'net.py'}:labelled")
    assert "holds one class per image; segmentation takes a folder" in result.stderr


def test_masks_that_are_wrong(run: tuple[Path, Any, Any], folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "bad"
    for name in ("images", "masks"):
        (place / "test" / name).mkdir(parents=True)
    image, mask = place / "test" / "images" / "a.png", place / "test" / "masks" / "a.png"
    Image.new("RGB", (16, 16)).save(image)
    Image.new("L", (16, 16), 9).save(mask)
    result = call("eval", run[0], "--arch", f"{folder / 'net.py'}:net", "--data", place)
    assert "mask 'test/masks/a.png' holds class 9; allowed are 0 to 2, and 255" in result.stderr
    assert result.exit_code == 3
    for written, text in (
        (Image.new("RGB", (16, 16)), "holds colours"),
        (Image.new("L", (8, 16)), "is 8x16, its image 16x16"),
        (None, "has no mask; add 'test/masks/a.png'"),
    ):
        mask.unlink()
        if written is not None:
            written.save(mask)
        with pytest.raises(DataError, match=text):
            data.load(str(place), image_size=None)


def test_masks_are_resized_as_their_images(tmp_path: Path) -> None:
    """An image whose grey is its class: however it is cropped and resized, far from edges they still agree."""
    drawn = np.random.default_rng(1)
    for name in ("images", "masks"):
        (tmp_path / "train" / name).mkdir(parents=True)
    for index in range(4):
        mask = drawn.integers(0, 2, (3, 5)).astype(np.uint8).repeat(16, 0).repeat(16, 1)  # 48 x 80
        mask[0, 0] = index % 2
        Image.fromarray(mask).save(tmp_path / "train" / "masks" / f"{index}.png")
        Image.fromarray(mask * 200).save(tmp_path / "train" / "images" / f"{index}.png")
    loaded = data.load(str(tmp_path), image_size=24, channels=1, val_share=0.25)
    assert isinstance(loaded.train, data.MemorySplit) and len(loaded.train) == 3 and len(loaded.val) == 1
    batches = data.loader(loaded.train, batch_size=3, mean=(0.0,), std=(200 / 255,), train=False)
    images, masks = next(iter(batches))
    assert masks.dtype == torch.int64 and masks.shape == (3, 24, 24)
    is_far = (images[:, 0] - images[:, 0].round()).abs() < 1e-3
    assert is_far.float().mean() > 0.6 and torch.equal(images[:, 0].round()[is_far], masks[is_far].float())
    with pytest.raises(DataError, match="has masks, which would have to move along"):
        data.loader(loaded.train, batch_size=3, mean=(0.0,), std=(1.0,), train=True, augment="crop")
