"""A run's folder tested again: a wrong claim fails, one that cannot be tested is skipped with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from compress import checkpoint
from compress.checkpoint import ModelInfo
from compress.cli import load
from compress.errors import RunFolderError, UsageError
from compress.verify import CHECKS, Check, verify


@pytest.fixture
def folder(pruned_run: tuple[Path, Any], tmp_path: Path) -> Path:
    """A finished run somewhere else, as it would be sent to somebody: without state/."""
    return Path(shutil.copytree(pruned_run[0], tmp_path / "sent", ignore=shutil.ignore_patterns("state")))


def checked(folder: Path, **options: Any) -> dict[str, Check]:
    def rebuild() -> tuple[nn.Module, ModelInfo]:
        return load.network(folder / "pruned.safetensors", None, {})[:2]

    found = verify(folder, options.pop("rebuild", rebuild), **options)
    assert [check.name for check in found] == list(CHECKS)
    return {check.name: check for check in found}


def states(folder: Path, state: str, **options: Any) -> set[str]:
    return {name for name, check in checked(folder, **options).items() if check.state == state}


def change(path: Path, key: str, value: Any) -> None:
    """Set the value at a dotted path of a JSON file; a function is applied to the old one."""
    content = json.loads(path.read_text())
    *parents, last = key.split(".")
    place = content
    for part in parents:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value(place[last]) if callable(value) else value
    path.write_text(json.dumps(content))


def resave(folder: Path, edit: Callable[[nn.Module], None] = lambda model: None, **fields: Any) -> None:
    """Write pruned.safetensors again, with other weights or another description."""
    model, info, _ = load.network(folder / "pruned.safetensors", None, {})
    edit(model)
    checkpoint.save(folder / "pruned.safetensors", model, info.model_copy(update=fields))


def test_everything_passes(folder: Path) -> None:
    assert states(folder, "ok") == {*CHECKS}


def test_a_read_only_folder_is_enough(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    checked(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("name", "key", "value", "failing"),
    [
        ("report.json", "recipe.seed", 7, {"recipe"}),
        ("report.json", "pruned.top1", lambda top1: top1 + 1, {"report", "top-1"}),
        ("report.json", "pruned.latency_ms.p50", lambda p50: p50 / 2, {"report"}),
        ("report.json", "speedup.value", 10.0, {"report"}),
        ("report.json", "pruned.params", lambda params: params - 1, {"costs"}),
        ("report.json", "kept.macs", 0.01, {"costs"}),
        ("report.json", "target", 0.01, {"costs", "origin"}),
        ("report.json", "method", "l1", {"origin"}),
        ("report.json", "split", {}, {"top-1"}),
        ("report.json", "pruned", [], {"report", "costs", "top-1"}),
        ("bench.json", "measurements.1.sha256", "0" * 64, {"model.onnx"}),
        ("bench.json", "measurements.0.sha256", "0" * 64, {"dense.onnx"}),
        ("bench.json", "measurements", [], {"model.onnx", "dense.onnx", "report"}),
        ("parity.json", "pruned.top1", 100.0, {"report"}),
        ("env.json", "source_sha256", "0" * 64, {"origin"}),
    ],
)
def test_a_changed_document_is_found(folder: Path, name: str, key: str, value: Any, failing: set[str]) -> None:
    change(folder / name, key, value)
    assert states(folder, "FAILED") == failing


def test_a_lie_told_everywhere_is_found(folder: Path) -> None:
    for name in ("report.json", "parity.json"):
        for key in ("pruned.top1", "pruned.metric.value"):
            change(folder / name, key, 99.9)
    assert states(folder, "FAILED") == {"top-1"}
    assert checked(folder)["top-1"].detail.endswith("99.90 % in the report")


@pytest.mark.parametrize("name", ["bench.json", "parity.json", "env.json"])
def test_a_damaged_document_is_found(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    failed = [check for check in checked(folder).values() if check.state == "FAILED"]
    assert failed and all(check.detail.startswith(f"{name} cannot be read: ") for check in failed)


def test_other_weights_are_found(folder: Path) -> None:
    resave(folder, lambda model: model.conv1.weight.data.mul_(1.5))  # type: ignore[operator,union-attr]
    assert states(folder, "FAILED") == {"ONNX == torch"}
    assert "differs from the network by" in checked(folder)["ONNX == torch"].detail


def test_missing_files(folder: Path) -> None:
    (folder / "dense.onnx").unlink()
    assert checked(folder)["dense.onnx"] == Check("dense.onnx", "skipped", "dense.onnx is not in the folder")
    (folder / "model.onnx").unlink()
    assert states(folder, "FAILED") == {"model.onnx", "origin", "ONNX == torch", "top-1"}
    (folder / "pruned.safetensors").unlink()
    assert {"network", "origin"} <= states(folder, "FAILED")


def test_a_missing_source_is_skipped(folder: Path) -> None:
    text = (folder / "recipe.yaml").read_text()
    path = json.loads((folder / "report.json").read_text())["recipe"]["model"]["path"]
    (folder / "recipe.yaml").write_text(text.replace(path, "/gone/model.pt"))
    change(folder / "report.json", "recipe.model.path", "/gone/model.pt")
    assert checked(folder)["source checkpoint"] == Check("source checkpoint", "skipped", "/gone/model.pt is not here")


def test_without_the_images_the_proof_runs_on_noise_and_says_so(folder: Path) -> None:
    resave(folder, data="/gone/images")
    found = checked(folder)
    assert (found["data"].state, found["top-1"].state) == ("skipped", "skipped")
    assert "data '/gone/images' does not exist" in found["data"].detail
    assert found["ONNX == torch"].state == "ok"
    assert "noise" in found["ONNX == torch"].detail
    assert states(folder, "ok", source="digits") >= {"data", "top-1"}
    assert states(folder, "FAILED", source="/gone/too") == {"data"}


def test_other_images_skip_the_top1(folder: Path) -> None:
    change(folder / "report.json", "data.fingerprint", "0" * 64)
    found = checked(folder)
    assert (found["data"].state, found["top-1"].state) == ("skipped", "skipped")
    assert found["top-1"].detail.endswith("other images than the run's")


def test_code_that_a_file_names_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "evil.py").write_text("from pathlib import Path\nPath('ran').touch()\ndef load():\n    return {}\n")
    resave(folder, data="evil.py:load")
    assert "if you trust it, say --data evil.py:load" in checked(folder)["data"].detail
    assert not (folder / "ran").exists()


def test_a_network_that_cannot_be_built_here_is_skipped(folder: Path) -> None:
    def rebuild() -> tuple[nn.Module, ModelInfo]:
        raise UsageError("it is built by code: say --arch")

    assert states(folder, "skipped", rebuild=rebuild) == {"network", "costs", "data", "ONNX == torch", "top-1"}
    assert checked(folder, rebuild=rebuild)["network"].detail == "it is built by code: say --arch"


def test_what_is_no_finished_run_is_refused(folder: Path) -> None:
    (folder / "report.json").unlink()
    with pytest.raises(RunFolderError, match=r"is not finished \(no report\.json\); continue it"):
        checked(folder)
    (folder / "recipe.yaml").unlink()
    with pytest.raises(RunFolderError, match=r"holds no run \(no recipe\.yaml\)"):
        checked(folder)
