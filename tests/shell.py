"""Calling the command line inside the test process, and what its answers must look like."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from compress.cli.app import app

MODEL = "models/digits_resnet20.pt"


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    """The JSON document of a command that succeeds; stdout holds nothing else."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def refusal(*arguments: object) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    result = call(*arguments)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0]), result.stderr
    return result.exit_code, lines[0].removeprefix("error: ")


def copy(folder: Path, to: Path) -> Path:
    """A run's folder as it would be sent to somebody: without state/."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("state")))
