"""A fresh process that loads one ONNX file and runs it once: a script that fresh.py starts, importing nothing of ours.

Writes one JSON object to standard output: provider, load_ms, first_ms, peak_memory_bytes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


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


def measure(file: str, provider: str, threads: int, signature: Sequence[Sequence[Any]], seed: int) -> dict[str, Any]:
    """Load and run once, with the options of session.py; the peak counts from after the imports."""
    import onnxruntime

    feeds = draw(signature, seed)
    before = peak_bytes()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    providers = list(dict.fromkeys([provider, "CPUExecutionProvider"]))
    start = time.perf_counter()
    session = onnxruntime.InferenceSession(file, options, providers=providers)
    loaded = time.perf_counter()
    session.run(None, feeds)
    done = time.perf_counter()
    return {
        "provider": session.get_providers()[0],
        "load_ms": (loaded - start) * 1e3,
        "first_ms": (done - loaded) * 1e3,
        "peak_memory_bytes": peak_bytes() - before,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[1]))))
