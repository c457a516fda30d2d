"""A fresh process that loads one file and runs it once: fresh.py starts it, and it imports little of ours.

Writes one JSON object to standard output: load_ms, first_ms, peak_memory_bytes.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.bench.protocol import Network, Runtime
from compress.bench.runtimes import RUNTIMES


def draw(signature: Sequence[Sequence[Any]], seed: int) -> dict[str, Any]:
    """Normal noise for inputs of floating point, zeros for the others (0 is a valid index into any table)."""
    import numpy

    generator = numpy.random.default_rng(seed)
    feeds = {}
    for name, shape, dtype in signature:
        kind = numpy.dtype(dtype)
        made = generator.standard_normal(shape) if kind.kind == "f" else numpy.zeros(shape)
        feeds[name] = numpy.asarray(made, dtype=kind)
    return feeds


def peak_bytes() -> int:
    """The peak resident memory of this process so far.

    On Linux from VmHWM: ru_maxrss survives exec, so a child started by a large process would inherit that one's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def measure(runtime: Runtime, file: str, threads: int, signature: Sequence[Sequence[Any]], seed: int) -> dict[str, Any]:
    """Load and run once, opened as it is for measuring; the peak counts from after the imports."""
    adapter = RUNTIMES[runtime]
    importlib.import_module(adapter.imports)
    feeds = draw(signature, seed)
    before = peak_bytes()
    start = time.perf_counter()
    if adapter.takes is Network:
        from compress.bench.torch_network import saved

        session = adapter.open(saved(Path(file), signature[0][1][1:]), threads=threads)
    else:
        session = adapter.open(Path(file), threads=threads)
    loaded = time.perf_counter()
    session.run(feeds)
    done = time.perf_counter()
    return {
        "load_ms": (loaded - start) * 1e3,
        "first_ms": (done - loaded) * 1e3,
        "peak_memory_bytes": peak_bytes() - before,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[1]))))
