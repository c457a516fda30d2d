"""Small members of hard families, pruned and checked as the sweep does it: benchmarks/zoo.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

pytest.importorskip("timm")
MEMBERS = {  # network -> edge of the image; beside each what makes it hard
    "timm:test_nfnet": 64,  # standardised weights
    "timm:test_convnext": 64,  # global response norm
    "timm:test_mambaout": 64,  # unequal parts, held as a tuple
    "timm:test_byobnet": 64,
    "timm:test_coatnet": 160,  # relative positions
    "timm:fasternet_t0": 64,  # part of the channels is convolved
    "timm:inception_next_atto": 64,
    "timm:poolformerv2_s12": 64,  # a scale in a held shape
    "timm:mobilevit_xxs": 64,  # patches
    "timm:test_vit": 160,
    "timm:skresnet18": 64,  # split input, paths selected by attention
    "timm:resnest14d": 64,
    "timm:cs3darknet_focus_s": 64,  # space to depth
    "torchvision:shufflenet_v2_x0_5": 64,
}


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_pruned_and_proved(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    found = importlib.import_module("zoo").attempt(name, MEMBERS[name], 1, onnx=False)
    assert found["verdict"] == "proved without ONNX", found.get("reason")
    assert 0.65 < found["kept"] <= 0.7
