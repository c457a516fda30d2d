"""The measured numbers with their conditions: report.json for machines, report.html and a model card for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.files import atomic_write
from compress.report.build import build as build
from compress.report.build import quantized as quantized
from compress.report.document import Report as Report


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """Write README.md, report.html and, last, report.json into the run folder.

    Raises:
        ValueError: `report` is not what `build` gives: a key is missing, unknown or of another type.
    """
    from compress.report import pages  # jinja2 only where pages are written

    whole = Report.model_validate(report).model_dump(mode="json")  # an older one has what was added since
    atomic_write(folder / "README.md", pages.card(whole))
    atomic_write(folder / "report.html", pages.html(whole))
    atomic_write(folder / "report.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")


def schema() -> str:
    """The JSON schema of report.json, as published in schema.json beside this file."""
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=1) + "\n"
