"""Trials on the whole file: the same network one way and another, in turns, and what an operator costs by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.bench.results import Speedup
from compress.bench.session import small_model
from compress.bench.speedup import compare
from compress.doctor.profile import Asked, open_session, timed

ROUNDS = 20  # the interval of a median needs about as many
EACH = 10  # inferences a round
CHAIN = 64  # operators that do nothing, in a row


def flushing(path: Path, asked: Asked, given: Mapping[str, Any]) -> Speedup | None:
    """How much faster the file is with denormal numbers flushed to zero; None where the processor cannot.

    The session's option reaches its worker threads alone once another session of the process has run (ONNX Runtime sets
    the calling thread once a process), so that torch sets the calling thread, whose mode a new thread inherits.
    """
    import torch

    if not torch.set_flush_denormal(False):
        return None
    as_is, flushed = open_session(path, asked), open_session(path, asked, flush=True)
    with ExitStack() as after:
        after.callback(torch.set_flush_denormal, False)

        def with_flush() -> float:
            torch.set_flush_denormal(True)
            try:
                return float(np.median(timed(flushed, given, EACH)))
            finally:
                torch.set_flush_denormal(False)

        return _in_turns(lambda: float(np.median(timed(as_is, given, EACH))), with_flush)


def one_thread(path: Path, asked: Asked, given: Mapping[str, Any]) -> Speedup:
    """How much faster the file is with one thread. Sessions are opened anew: idle workers of another one spin."""

    def once(threads: int) -> float:
        return float(np.median(timed(open_session(path, replace(asked, threads=threads)), given, EACH)))

    return _in_turns(lambda: once(asked.threads), lambda: once(1))


def floor_ms(asked: Asked) -> float:
    """What an operator takes that does nothing: a chain of CHAIN negations of one number, over its length."""
    from onnx import TensorProto, helper

    nodes = [helper.make_node("Neg", [f"x{index}"], [f"x{index + 1}"]) for index in range(CHAIN)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x0", f"x{CHAIN}")]
    session = open_session(small_model(nodes, values[:1], values[1:]), replace(asked, runtime="ort-cpu", threads=1))
    return float(np.median(timed(session, {"x0": np.ones(1, np.float32)}, 200))) / CHAIN


def _in_turns(first: Callable[[], float], second: Callable[[], float]) -> Speedup:
    slow, fast = list[float](), list[float]()
    for index in range(ROUNDS):
        for measure, times in ((first, slow), (second, fast))[:: 1 if index % 2 else -1]:
            times.append(measure())
    return compare(slow, fast, names=("as it is", "changed"))
