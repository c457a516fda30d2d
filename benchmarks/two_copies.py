"""Two copies of one ONNX file measured against each other: the speed-up must be 1, and said to be.

    python benchmarks/two_copies.py MODEL.onnx [--runtimes ort-cpu openvino] [--trials 20] [--neighbours 0]
        [--threads 1] [--batch 1] [--seconds 5] [--out FILE.jsonl]

With `--neighbours N` as many other processes keep processors busy meanwhile. A trial passes when the speed-up is within
2 % of 1 and its interval holds 1. Each trial is one line of JSON, in benchmarks/results if not told otherwise; the last
lines on the terminal are the counts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.bench import RUNTIMES, benchmark

NEAR = 0.02  # the farthest from 1 that a speed-up of equal files may be
RESULTS = Path(__file__).parent / "results"


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that compute without end, stopped afterwards."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def trial(files: list[Path], given: argparse.Namespace, runtime: Any, seed: int) -> dict[str, Any]:
    found = benchmark(
        files, runtime=runtime, threads=given.threads, batch=given.batch, seconds=given.seconds, seed=seed
    )
    gain, conditions = found.speedups[0], found.conditions
    return {
        "runtime": runtime, "seed": seed, "neighbours": given.neighbours, "threads": given.threads,
        "batch": given.batch, "value": gain.value, "low": gain.low, "high": gain.high, "verdict": gain.verdict,
        "p50": [measured.latency.p50 for measured in found.measurements],
        **{key: conditions[key] for key in
           ("rounds", "seconds", "foreign_load", "held_up", "drift", "noise", "warnings", "load_average", "cpu",
            "cores", "packages", "date")},
    }  # fmt: skip


def summary(lines: list[dict[str, Any]]) -> str:
    near = sum(abs(line["value"] - 1) <= NEAR for line in lines)
    honest = sum(line["verdict"] == "not distinguishable" for line in lines)
    worst = max(abs(line["value"] - 1) for line in lines)
    widths = sorted(line["high"] - line["low"] for line in lines)
    load = sum(line["foreign_load"] for line in lines) / len(lines)
    return (
        f"{lines[0]['runtime']}: within {NEAR:.0%} in {near} of {len(lines)}, interval holds 1 in {honest}; farthest "
        f"{worst:.2%}, median width of the interval {widths[len(widths) // 2]:.3f}, load by others {load:.0%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--runtimes", nargs="+", default=["ort-cpu", "openvino"], choices=list(RUNTIMES))
    for name, value in (("trials", 20), ("neighbours", 0), ("threads", 1), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    out = given.out or RESULTS / f"two_copies-{given.model.stem}-neighbours{given.neighbours}-t{given.threads}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, neighbours(given.neighbours), out.open("a") as file:
        files = [Path(shutil.copy(given.model, Path(folder) / f"{name}.onnx")) for name in ("one", "other")]
        for runtime in given.runtimes:
            lines = []
            for seed in range(given.trials):
                lines.append(trial(files, given, runtime, seed))
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
            print(summary(lines))


if __name__ == "__main__":
    main()
