"""The examples run as they are written: a smaller network, a file, and the accuracy of a network that has learned."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

KEEP = 0.3


def arguments(root: Path, out: Path, script: str, method: str) -> list[str]:
    asked = ["--method", method, "--keep", str(KEEP), "--epochs", "2", "--out", str(out)]
    return [str(root / "examples" / script), *asked]


def launch(root: Path, given: list[str], processes: int) -> str:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(several if processes else []), *given]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def check(printed: str, out: Path) -> None:
    lines = printed.strip().splitlines()
    assert len(lines) == 1, lines  # the first process alone speaks
    found = json.loads(lines[0])
    before, after = found["before"], found["after"]
    assert 0 < after["params"] <= KEEP * before["params"]
    assert after["top1"] > 50  # ten classes
    assert after["bytes"] == out.stat().st_size < 4 * before["params"]


@pytest.mark.parametrize("method", ["halo", "ffr", "cka-sr", "ggr", "growing-reg"])
def test_a_loop_of_one_s_own(
    root: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "digits.onnx"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", arguments(root, out, "own_loop.py", method))
    runpy.run_path(sys.argv[0], run_name="__main__")
    check(capsys.readouterr().out, out)


@pytest.mark.parametrize(("method", "processes"), [("halo", 0), ("cka-sr", 2)])
def test_with_accelerate(
    root: Path, tmp_path: Path, method: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "digits.onnx"
    check(launch(root, arguments(root, out, "with_accelerate.py", method), processes), out)
