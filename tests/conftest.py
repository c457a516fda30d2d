"""What every test shares: two threads, the operators that optional packages need, and the shared data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _declare_operators() -> torch.library.Library | None:
    """Declare what torchvision declares itself where its compiled part fits torch; timm imports it too."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return None
    for compiled in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(compiled))
        except OSError:  # built for another torch
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for schema in _OPERATORS:
        library.define(schema)
    return library


_LIBRARY = _declare_operators()  # the declarations last as long as this object
torch.set_num_threads(2)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with CIFAR-10 and pretrained ResNets beside the repository."""
    if not (SHARED / "checkpoints").is_dir():
        pytest.skip(f"no checkpoints and data in {SHARED}")
    return SHARED
