"""The examples run as they are written: a smaller network, a file, and the accuracy of a network that has learned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KEEP = 0.3


def run(root: Path, out: Path, script: str, method: str, *, processes: int = 0) -> dict[str, Any]:
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(several if processes else []), str(root / "examples" / script)]
    command += ["--method", method, "--keep", str(KEEP), "--epochs", "2", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=out.parent, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 1, lines  # the first process alone speaks
    found: dict[str, Any] = json.loads(lines[0])
    return found


def check(found: dict[str, Any], out: Path) -> None:
    before, after = found["before"], found["after"]
    assert 0 < after["params"] <= KEEP * before["params"]
    assert after["top1"] > 50  # ten classes
    assert after["bytes"] == out.stat().st_size < 4 * before["params"]


@pytest.mark.parametrize("method", ["halo", "ffr", "cka-sr", "ggr", "growing-reg"])
def test_a_loop_of_one_s_own(root: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "digits.onnx"
    check(run(root, out, "own_loop.py", method), out)


@pytest.mark.parametrize(("method", "processes"), [("halo", 0), ("cka-sr", 2)])
def test_with_accelerate(root: Path, tmp_path: Path, method: str, processes: int) -> None:
    out = tmp_path / "digits.onnx"
    check(run(root, out, "with_accelerate.py", method, processes=processes), out)
