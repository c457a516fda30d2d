"""The latencies of a comparison: all files in one process at the end, in turn with the dense one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.bench import Speedup, benchmark
from compress.files import atomic_write, sha256

TOGETHER = 8  # files measured in turn beside the dense one: a round of more takes so long that the machine changes
SECONDS = 2.5  # of measuring, for each file of a batch
NAME = "latency.json"


def measure(
    folder: Path,
    runs: Mapping[str, Sequence[str]],
    *,
    bench: Mapping[str, Any],
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure every run's model.onnx beside the dense file of its network.

    Runs disturb each other's own measurements while they train side by side; this is for afterwards. A file's latency
    is the dense one's (the median over the batches) divided by its paired speed-up, so that a machine that changes from
    one batch to the next does not favour either. What was measured before and has not changed is not measured again.

    Args:
        runs: network -> the names of its runs, in `folder`/runs; those without files are left out.
        bench: runtime, batch and threads, as in a recipe.

    Returns: `files`: run -> latency_ms, speedup (value, low, high); `dense`: network -> latency_ms; `conditions`.
    """
    here = {network: [run for run in names if _file(folder, run).is_file()] for network, names in runs.items()}
    here = {network: names for network, names in here.items() if names}
    wanted = {run: sha256(_file(folder, run)) for names in here.values() for run in names}
    before = _before(folder)
    if before is not None and before["sha256"] == wanted and before["bench"] == dict(bench):
        return before
    total = sum(len(names) for names in here.values())
    files: dict[str, Any] = {}
    dense: dict[str, float] = {}
    conditions: dict[str, Any] = {}
    for network, names in here.items():
        medians: list[float] = []
        found: list[tuple[str, Speedup]] = []
        for start in range(0, len(names), TOGETHER):
            on_progress(len(files) + len(found), total)
            part = names[start : start + TOGETHER]
            paths = [_file(folder, part[0], "dense.onnx"), *(_file(folder, run) for run in part)]
            made = benchmark(paths, **bench, seconds=SECONDS * len(paths), seed=seed)
            medians.append(made.measurements[0].latency.p50)
            found += list(zip(part, made.speedups, strict=True))
            conditions = dict(made.conditions)
        dense[network] = statistics.median(medians)
        for run, gain in found:
            speedup = {"value": gain.value, "low": gain.low, "high": gain.high, "verdict": gain.verdict}
            files[run] = {"latency_ms": dense[network] / gain.value, "speedup": speedup}
    on_progress(total, total)
    result = {"files": files, "dense": dense, "conditions": conditions, "sha256": wanted, "bench": dict(bench)}
    atomic_write(folder / NAME, json.dumps(result, indent=1) + "\n")
    return result


def _file(folder: Path, run: str, name: str = "model.onnx") -> Path:
    return folder / "runs" / run / name


def _before(folder: Path) -> dict[str, Any] | None:
    path = folder / NAME
    return json.loads(path.read_text()) if path.is_file() else None
