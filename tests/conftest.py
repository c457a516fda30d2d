"""What every test shares: one thread, the operators that optional packages need, and the shared data."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; children would be deaf too
    signal.signal(signal.SIGINT, signal.default_int_handler)
_LIBRARY = _declare_operators()  # the declarations last as long as this object
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: the suite itself runs in several
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a fixture draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """What a test draws depends on neither the tests nor the fixtures before it."""
    torch.manual_seed(0)


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


@pytest.fixture(scope="session")
def pruned_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of a tiny `compress prune --json` and the command's result; copy the folder before changing it."""
    from typer.testing import CliRunner

    from compress.cli.app import app

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tiny = ["--method", "halo", "--target", "0.3", "--epochs", "2", "--set", "data.image_size=8", "--device", "cpu"]
    tiny += ["--set", "bench.batches=[1,4]", "--set", "bench.seconds=1"]
    result = CliRunner().invoke(
        app, ["prune", str(ROOT / "models" / "digits_resnet20.pt"), *tiny, "--out", str(folder), "--json"]
    )
    logging.captureWarnings(False)
    return folder, result


@pytest.fixture
def in_the_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run where the bundled checkpoint is; the logging they set up is undone."""
    monkeypatch.chdir(root)
    handlers, level = logging.root.handlers, logging.root.level
    yield
    logging.captureWarnings(False)
    logging.root.handlers, logging.root.level = handlers, level
