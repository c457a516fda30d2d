"""What a measurement says: frozen values that carry their own conditions and go to JSON unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from compress.bench.protocol import Runtime as Runtime

Verdict = Literal["faster", "slower", "not distinguishable"]


class Latency(BaseModel, frozen=True, extra="forbid"):
    """Milliseconds per inference of one batch, the inputs being where the runtime computes.

    On a GPU that is its own memory: no copy to or from the host is counted, and an inference ends when the GPU is done.
    p50, p90, p99 and mean are over the `n` single inferences timed after `warmup` untimed ones. `samples` holds one
    value per round; the same round of two files of one Comparison was measured within moments.
    """

    p50: float
    p90: float
    p99: float
    mean: float
    batch: int
    threads: int
    runtime: Runtime
    n: int
    warmup: int
    throughput: float  # images/s at the median
    samples: tuple[float, ...]


class Measurement(BaseModel, frozen=True, extra="forbid"):
    """One file. Load time, first inference and memory are medians over fresh processes.

    `peak_memory_bytes` is what loading and one inference add to the peak resident memory of a process that has only
    imported the runtime (host memory, also for a GPU); zero when below what the operating system counts.
    """

    file: str  # as much of the path as tells the files of one Comparison apart
    sha256: str
    size_bytes: int
    size_gzip_bytes: int
    load_ms: float
    first_ms: float
    peak_memory_bytes: int
    latency: Latency


class Speedup(BaseModel, frozen=True, extra="forbid"):
    """How many times faster `file` is than `against`: the median over rounds of the ratio of their latencies."""

    file: str
    against: str
    value: float
    low: float
    high: float
    confidence: float
    verdict: Verdict


class Comparison(BaseModel, frozen=True, extra="forbid"):
    """All files of one call, in the order given, and each file after the first against the first."""

    measurements: tuple[Measurement, ...]
    speedups: tuple[Speedup, ...]  # one fewer than measurements
    conditions: Mapping[str, Any]  # JSON values only
