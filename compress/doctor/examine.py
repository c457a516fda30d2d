"""examine(): profiles one file, or two, and looks for everything in the table of findings."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compress.bench import machine
from compress.doctor import trials
from compress.doctor.findings import FINDINGS, Evidence, Finding
from compress.doctor.layers import layers
from compress.doctor.profile import Asked, Profile, feeds, open_session, profile
from compress.errors import LoadError, MeasureError


class Operators(BaseModel, frozen=True, extra="forbid"):
    """All operators of one kind, of each file; the second is the one examined."""

    op: str
    count: tuple[int, ...]
    ms: tuple[float, ...]


class Diagnosis(BaseModel, frozen=True, extra="forbid"):
    """What was found in `file`, largest gain first, with the profiles it rests on."""

    file: str
    against: str | None
    findings: tuple[Finding, ...]
    looked_for: tuple[str, ...]
    conv_macs: tuple[int, ...]  # of the convolutions, per image
    operators: tuple[Operators, ...]
    profiles: tuple[Profile, ...]  # in the order of the files
    conditions: Mapping[str, Any]


def examine(
    path: Path, asked: Asked, *, dense: Path | None = None, on_check: Callable[[str], None] = lambda name: None
) -> Diagnosis:
    """Why `path` is not faster, with the profile of `dense` (what it was made from) beside its own.

    Raises:
        LoadError: a file is missing or not ONNX.
        MeasureError: the threads exceed the processors, or the batch does not fit the file.
    """
    if asked.threads > len(machine.allowed_cpus()):
        raise MeasureError(
            f"{asked.threads} threads, but this process may use {len(machine.allowed_cpus())} processors"
        )
    files = [path] if dense is None else [dense, path]
    for file in files:
        if not file.is_file():
            raise LoadError(f"{file} is not a file; give the path of an .onnx file")
    with machine.pinned(asked.threads) as cpus:
        on_check("profiles")
        profiles = tuple(profile(file, asked) for file in files)
        given = feeds(open_session(path, asked), asked)
        evidence = Evidence(
            path, asked, given, profiles[-1], machine.vector_block(), trials.floor_ms(asked), _providers()
        )
        found = []
        for name, look in FINDINGS.items():
            on_check(name)
            if (finding := look(evidence)) is not None:
                found.append(finding)
        macs = tuple(
            sum(layer.macs for layer in layers(file, asked, feeds(open_session(file, asked), asked))) for file in files
        )
    conditions = machine.describe() | {
        "batch": asked.batch, "threads": asked.threads, "runtime": asked.runtime, "runs": asked.runs,
        "block": evidence.block, "floor_ms": evidence.floor_ms, "pinned_cpus": list(cpus) if cpus else None,
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    return Diagnosis(
        file=path.name, against=None if dense is None else dense.name, looked_for=tuple(FINDINGS), conv_macs=macs,
        findings=tuple(sorted(found, key=lambda finding: -finding.gain_ms)), operators=_operators(profiles),
        profiles=profiles, conditions=conditions,
    )  # fmt: skip


def _operators(profiles: tuple[Profile, ...]) -> tuple[Operators, ...]:
    kinds = list(dict.fromkeys(node.op for found in profiles for node in found.nodes))
    made = [
        Operators(
            op=op, count=tuple(sum(node.op == op for node in found.nodes) for found in profiles),
            ms=tuple(sum(node.ms for node in found.nodes if node.op == op) for found in profiles),
        )
        for op in kinds
    ]  # fmt: skip
    return tuple(sorted(made, key=lambda one: -one.ms[-1]))


def _providers() -> tuple[str, ...]:
    import onnxruntime

    return tuple(onnxruntime.get_available_providers())
