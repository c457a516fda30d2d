"""Widths for a latency: chosen by the measured price of layers, then corrected by the latency of the whole network."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from compress.bench import benchmark
from compress.bench.on import On
from compress.errors import TargetError
from compress.example import Example
from compress.export import draft
from compress.groups import Group
from compress.plan import Plan, apply
from compress.reach import rounded_up

log = logging.getLogger(__name__)

TOLERANCE = 0.05  # of what was asked: further away is not reached
CLOSE = 0.02  # near enough to stop: about what two measurements of one file differ by on a quiet machine
TRIES = 8  # measurements of whole networks; on a quiet machine one or two do
SECONDS = 3.0  # of measuring a whole network


@dataclass(frozen=True)
class Try:
    """One plan and what came of it, as shares of the dense network's latency."""

    asked: float  # by price
    plan: Plan = field(repr=False)
    measured: float


def aim(
    choose: Callable[[float], Plan], measure: Callable[[Plan], float], *, keep: float
) -> tuple[Try, tuple[Try, ...]]:
    """Correct the share asked for by price until the share measured is `keep`.

    Prices leave out what layers do to each other; the error is a factor that changes little with the widths. So each
    further try asks for as much less, or more, as the last one missed by, inside what earlier tries have bracketed.

    Args:
        choose: a share of the dense latency, by price -> the widths for it.
        measure: widths -> the measured share of the dense latency.
        keep: the share wanted, above 0 and at most 1.

    Returns: the try that came closest (where widths are too coarse for TOLERANCE, the closest below), and all of them.

    Raises:
        TargetError: no plan within TOLERANCE of `keep` or below it was found; carries the lowest share measured.
    """
    tries = list[Try]()
    low, high = 0.0, math.inf  # asked by price: too little and too much
    asked = keep
    for _ in range(TRIES):
        try:
            plan = choose(min(asked, 1.0))
        except TargetError:
            if not tries:
                raise
            break
        known = next((old.measured for old in tries if old.plan.kept == plan.kept), None)
        found = measure(plan) if known is None else known
        tries.append(Try(asked, plan, found))
        log.info("latency %.4g asked by price, %.4g measured, %.4g wanted", asked, found, keep)
        if abs(found / keep - 1) <= CLOSE or (asked >= 1 and found <= keep):
            break
        low, high = (max(low, asked), high) if found < keep else (low, min(high, asked))
        corrected = asked * keep / found
        asked = corrected if low < corrected < high else math.sqrt(low * high)
        if known is not None and high / max(low, 1e-9) < 1 + CLOSE / 4:
            break  # between the two lies no other plan
    best = min(tries, key=lambda one: (one.measured > keep * (1 + TOLERANCE), abs(math.log(one.measured / keep))))
    if best.measured > keep * (1 + TOLERANCE):
        lowest = min(one.measured for one in tries)
        raise TargetError(
            f"the target {keep:.4g} of the latency is out of reach: the fastest network that was measured takes "
            f"{lowest:.4g}; ask for {rounded_up(lowest):g}, or for a smaller --round-to",
            lowest=lowest,
        )
    return best, tuple(tries)


def dense_latency(file: Path, *, on: On, seed: int = 0) -> float:
    """Milliseconds of the dense file, the median over rounds: without the inferences that another process held up."""
    found = benchmark([file], batch=on.batch, threads=on.threads, runtime=on.runtime, seconds=SECONDS, seed=seed)
    return statistics.median(found.measurements[0].latency.samples)


def dense_file(model: nn.Module, example: Example, folder: Path, *, on: On, seed: int = 0) -> tuple[Path, float]:
    """The network as an unproved file in `folder`, and the milliseconds it takes."""
    file = folder / "dense.onnx"
    draft(model, example, file)
    return file, dense_latency(file, on=on, seed=seed)


def measured_share(
    model: nn.Module, groups: Sequence[Group], example: Example, dense: Path, *, on: On, seed: int = 0
) -> Callable[[Plan], float]:
    """A function from a plan to the latency of the network cut to it, as a share of the dense file's.

    The network is copied, cut and written to a temporary file whose outputs are not compared: widths decide how long it
    takes, weights do not. Both files are measured in turn.
    """

    def share(plan: Plan) -> float:
        cut = copy.deepcopy(model)
        apply(cut, groups, plan)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "cut.onnx"
            draft(cut, example, file)
            found = benchmark(
                [dense, file], batch=on.batch, threads=on.threads, runtime=on.runtime, seconds=SECONDS, seed=seed
            )
        return 1 / found.speedups[0].value

    return share
