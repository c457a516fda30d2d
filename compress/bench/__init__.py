"""Latency, memory and size of ONNX files, measured side by side; torch is imported for its own runtimes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.bench.interleave import benchmark as benchmark
    from compress.bench.interleave import latency_share as latency_share
    from compress.bench.protocol import Network as Network
    from compress.bench.protocol import Runtime as Runtime
    from compress.bench.results import Comparison as Comparison
    from compress.bench.results import Latency as Latency
    from compress.bench.results import Measurement as Measurement
    from compress.bench.results import Speedup as Speedup
    from compress.bench.runtimes import RUNTIMES as RUNTIMES
    from compress.bench.runtimes import available as available
    from compress.bench.runtimes import open_on as open_on

# public name -> file; imported on first use, so that a fresh process that measures memory holds little of ours
_PLACES = {
    "Comparison": "results",
    "Latency": "results",
    "Measurement": "results",
    "Network": "protocol",
    "RUNTIMES": "runtimes",
    "Runtime": "protocol",
    "Speedup": "results",
    "available": "runtimes",
    "benchmark": "interleave",
    "latency_share": "interleave",
    "open_on": "runtimes",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module 'compress.bench' has no attribute {name!r}")
    return getattr(import_module(f"compress.bench.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_PLACES)
