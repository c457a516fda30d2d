"""Load time, first inference and peak memory of a file, in processes that have done nothing else before."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.bench import child
from compress.bench.results import Runtime
from compress.bench.session import PROVIDERS, Input
from compress.errors import MeasureError

PROCESSES = 3  # the median of three ignores the one that read the file from a cold disk
TIME_LIMIT = 300  # seconds a process may take


@dataclass(frozen=True)
class Fresh:
    """Medians over PROCESSES processes."""

    load_ms: float
    first_ms: float
    peak_memory_bytes: int


def measure_fresh(
    path: Path, *, signature: Sequence[Input], threads: int, runtime: Runtime = "ort-cpu", seed: int = 0
) -> Fresh:
    """Load and run the file once in each of several new processes.

    Raises:
        MeasureError: a process fails, takes too long, or falls back to another provider.
    """
    asked: dict[str, Any] = {"file": str(path.resolve()), "provider": PROVIDERS[runtime], "threads": threads}
    asked |= {"signature": signature, "seed": seed}
    runs = [_run(path, asked) for _ in range(PROCESSES)]
    for run in runs:
        if run["provider"] != PROVIDERS[runtime]:
            raise MeasureError(f"runtime {runtime} cannot be measured: a new process fell back to {run['provider']}")
    return Fresh(
        load_ms=statistics.median(run["load_ms"] for run in runs),
        first_ms=statistics.median(run["first_ms"] for run in runs),
        peak_memory_bytes=int(statistics.median(run["peak_memory_bytes"] for run in runs)),
    )


def _run(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    # -P keeps the script's folder out of sys.path, where our file names could hide modules of the same name.
    command = [sys.executable, "-P", str(child.__file__), json.dumps(asked)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=True)
    except subprocess.TimeoutExpired as error:
        raise MeasureError(f"{path} did not load and run once within {TIME_LIMIT} s in a new process") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"it ended with status {error.returncode}"])[-1]
        raise MeasureError(f"{path} failed in a new process (out of memory?): {last[:200]}") from error
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer
