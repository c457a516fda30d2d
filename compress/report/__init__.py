"""The measured numbers with their conditions: report.json for machines, report.html and a model card for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.files import atomic_write
from compress.report.build import build as build


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write README.md, report.html and, last, report.json into the run folder."""
    atomic_write(folder / "report.json", json.dumps(report, indent=1) + "\n")
