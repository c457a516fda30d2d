"""Latency, memory and size of ONNX files, measured side by side; nothing in this room imports torch."""

from compress.bench.interleave import benchmark
from compress.bench.results import Comparison, Latency, Measurement, Speedup
from compress.bench.session import available

__all__ = ["Comparison", "Latency", "Measurement", "Speedup", "available", "benchmark"]
