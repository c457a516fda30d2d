"""Load time, first inference and peak memory of a file, in processes that have done nothing else before."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compress
from compress.bench import torch_network
from compress.bench.protocol import Input, Network, Runtime, Source
from compress.bench.runtimes import RUNTIMES
from compress.errors import MeasureError

TIME_LIMIT = 600  # seconds a process may take; torch.compile needs minutes for large networks


@dataclass(frozen=True)
class Fresh:
    """Medians over the runtime's number of processes."""

    load_ms: float
    first_ms: float
    peak_memory_bytes: int


def measure_fresh(
    source: Source, *, signature: Sequence[Input], threads: int, runtime: Runtime = "ort-cpu", seed: int = 0
) -> Fresh:
    """Load and run the source once in each of several new processes.

    A network is loaded as torch.export saves it. What runtimes keep between processes (compiled kernels, engines) is
    kept out: each process begins with an empty cache.

    Raises:
        MeasureError: a process fails, takes too long, or falls back to another provider.
    """
    asked: dict[str, Any] = {"runtime": runtime, "threads": threads, "signature": signature, "seed": seed}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(source, Network):
            file = Path(folder) / "network.pt2"
            torch_network.save(source, file, shape=signature[0][1])
        else:
            file = source.resolve()
        for index in range(RUNTIMES[runtime].processes):
            runs.append(_run(source.name, asked | {"file": str(file)}, Path(folder) / f"cache-{index}"))
    return Fresh(
        load_ms=statistics.median(run["load_ms"] for run in runs),
        first_ms=statistics.median(run["first_ms"] for run in runs),
        peak_memory_bytes=int(statistics.median(run["peak_memory_bytes"] for run in runs)),
    )


def _run(name: str, asked: dict[str, Any], cache: Path) -> dict[str, Any]:
    # -P keeps the working folder out of sys.path, where foreign file names could hide modules of the same name.
    command = [sys.executable, "-P", "-m", "compress.bench.child", json.dumps(asked)]
    paths = [str(Path(str(compress.__file__)).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=TIME_LIMIT, check=True, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise MeasureError(f"{name} did not load and run once within {TIME_LIMIT} s in a new process") from error
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or [f"it ended with status {error.returncode}"])[-1]
        raise MeasureError(f"{name} failed in a new process (out of memory?): {last[:200]}") from error
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return answer
