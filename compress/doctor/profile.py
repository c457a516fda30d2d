"""What each operator of a file takes in ONNX Runtime, and what a whole inference takes, on noise."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from compress.bench.child import draw
from compress.bench.session import PROVIDERS, input_signature, kernels, one_line, runtime_errors, session_options
from compress.errors import LoadError, MeasureError, UsageError

RUNTIMES: dict[str, str] = {
    **PROVIDERS, "ort-openvino": "OpenVINOExecutionProvider", "ort-xnnpack": "XnnpackExecutionProvider",
}  # fmt: skip
WARM_UP = 5  # inferences before those that count
TRIM = 0.1  # share of the inferences left out at either end; the profiler counts whole microseconds: a mean is needed


@dataclass(frozen=True)
class Asked:
    """What the files are examined with. `runtime` is a key of RUNTIMES or the name of a provider of ONNX Runtime."""

    batch: int = 1
    threads: int = 1
    runtime: str = "ort-cpu"
    runs: int = 100
    shape: tuple[int, ...] | None = None  # of one image, for files that leave height and width open
    seed: int = 0

    @property
    def provider(self) -> str:
        if self.runtime.endswith("ExecutionProvider"):
            return self.runtime
        if self.runtime not in RUNTIMES:
            raise UsageError(f"runtime {self.runtime!r} is unknown; there are {', '.join(RUNTIMES)}, or a provider")
        return RUNTIMES[self.runtime]


class Node(BaseModel, frozen=True, extra="forbid"):
    """One operator as the runtime runs it, after its own changes to the graph."""

    name: str
    op: str
    provider: str
    ms: float  # per inference: the mean over the inferences without the fastest and slowest tenth
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]


class Profile(BaseModel, frozen=True, extra="forbid"):
    """A file under one runtime. Nodes together take longer than an inference: each carries the profiler's own time."""

    nodes: tuple[Node, ...]
    latency_ms: float  # median of whole inferences, not profiled
    providers: tuple[str, ...]  # of the session, in its order of preference
    asked: str  # the provider


def open_session(model: Path | bytes, asked: Asked, *, flush: bool = False, profile_to: Path | None = None) -> Any:
    """A session that may fall back, unlike that of compress.bench: here a fallback is what is looked for.

    Raises:
        LoadError: the file is missing, or ONNX Runtime does not accept it.
    """
    import onnxruntime

    options = session_options(asked.threads, profile_to=profile_to)
    if flush:
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
    providers = list(dict.fromkeys([asked.provider, "CPUExecutionProvider"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a provider that is not installed: said by a finding
            return onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=providers
            )
    except runtime_errors() as error:
        name = "a part of the file" if isinstance(model, bytes) else model
        raise LoadError(f"{name} is not an ONNX file that ONNX Runtime can load: {one_line(error)}") from error


def feeds(session: Any, asked: Asked) -> dict[str, Any]:
    """Noise for every input.

    Raises:
        MeasureError: the batch does not fit, or a dimension is open.
    """
    return draw(input_signature(session, batch=asked.batch, shape=asked.shape), asked.seed)


def run(session: Any, given: Mapping[str, Any]) -> list[Any]:
    """The outputs.

    Raises:
        MeasureError: the network does not run.
    """
    try:
        return list(session.run(None, dict(given)))
    except runtime_errors() as error:
        raise MeasureError(f"the file does not run on noise: {one_line(error)}") from error


def profile(model: Path | bytes, asked: Asked) -> Profile:
    """Profile the file over asked.runs inferences after WARM_UP, and time as many without the profiler."""
    plain = open_session(model, asked)
    given = feeds(plain, asked)
    latency = float(np.median(timed(plain, given, asked.runs)))
    return Profile(
        nodes=nodes(model, asked, given), latency_ms=latency, providers=tuple(plain.get_providers()),
        asked=asked.provider,
    )  # fmt: skip


def nodes(model: Path | bytes, asked: Asked, given: Mapping[str, Any]) -> tuple[Node, ...]:
    """The operators with their times, in the order in which they run."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(model, asked, profile_to=Path(folder) / "profile")
        for _ in range(WARM_UP + asked.runs):
            run(session, given)
        ran = kernels(session)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, event in ran:
        found[name].append(event)
    return tuple(_node(name, happened, asked.runs) for name, happened in found.items())


def timed(session: Any, given: Mapping[str, Any], count: int) -> list[float]:
    """Milliseconds of single inferences, after WARM_UP."""
    for _ in range(WARM_UP):
        run(session, given)
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        session.run(None, given)
        times.append((time.perf_counter() - begin) * 1e3)
    return times


def _node(name: str, events: Sequence[Mapping[str, Any]], runs: int) -> Node:
    each = max(1, len(events) // (WARM_UP + runs))  # a name may stand for several nodes of an inner graph
    times = sorted(event["dur"] / 1e3 for event in events[WARM_UP * each :])
    cut = int(len(times) * TRIM)
    about = events[-1]["args"]
    return Node(
        name=name, op=about["op_name"], provider=about.get("provider", ""),
        ms=each * float(np.mean(times[cut : len(times) - cut or None])),
        inputs=_shapes(about.get("input_type_shape", [])), outputs=_shapes(about.get("output_type_shape", [])),
    )  # fmt: skip


def _shapes(described: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for entry in described for shape in entry.values())
