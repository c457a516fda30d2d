"""What disturbed a measurement: other processes, drift, two states of the machine; in figures and in words."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.bench.results import Speedup

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

BUSY = 0.1  # share of the processors' time that others may take before it is said
DRIFT = 0.03  # relative change from first rounds to last; heat and clocks move latencies by 1 to 2 % at any time
CERTAIN = 2.58  # standard deviations of Mann and Kendall's S: 1 % of measurements without a trend exceed it
APART = (
    5.0  # Ashman's D of the halves of the best split: 2 in 1,000 normal samples of 20 exceed it, 6 in 100 uniform ones
)
SMALLER = 0.2  # share of the rounds that the rarer of two states has at least: less are outliers
FEWEST = 10  # rounds that a statement on their distribution needs
WIDE = 0.03  # half the width of an interval, relative


@dataclass(frozen=True)
class Clock:
    """Seconds at one moment: by the wall, used by this process, and used by everybody on some processors."""

    wall: float
    own: float
    all: float


@dataclass(frozen=True)
class Inference:
    """ms of one inference by the wall clock, and without the time in which it was held up."""

    wall: float
    own: float
    is_clean: bool  # no thread of ours had to leave a processor meanwhile


def watched(once: Callable[[], float], *, is_single: bool) -> Inference:
    """One inference, and whether it was held up: the operating system counts how often threads of ours had to wait.

    A network of 10 ms is held up more often than one of 1 ms, so that a busy machine would change their ratio, by
    factors. Where one thread does all the work (`is_single`) the time that it ran stands in for a disturbed one.
    """
    switches, ran = _switches(), time.process_time()
    wall = once()
    if _switches() == switches:
        return Inference(wall, wall, True)
    ran = (time.process_time() - ran) * 1e3
    return Inference(wall, min(wall, ran) if is_single else wall, False)


def typical(inferences: Sequence[Inference], *, is_single: bool) -> float:
    """The median ms of those that were not held up; without one, of the time they ran, else the shortest [ours]."""
    if clean := [found.own for found in inferences if found.is_clean]:
        return float(np.median(clean))
    own = [found.own for found in inferences]
    return float(np.median(own)) if is_single else min(own)


def _switches() -> int:
    """How often threads of this process had to leave a processor; 0 where the operating system does not say it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def clock(cpus: Sequence[int]) -> Clock:
    """Read the clocks; two of them make a load. Time that a hypervisor takes away counts as used."""
    import psutil

    times = psutil.cpu_times(percpu=True)
    idle = ("idle", "iowait", "guest", "guest_nice")  # guest time is in user time already
    busy = [sum(value for name, value in cpu._asdict().items() if name not in idle) for cpu in times]
    return Clock(time.monotonic(), time.process_time(), sum(busy[cpu] for cpu in cpus if cpu < len(busy)))


def foreign_load(before: Clock, after: Clock, cpus: Sequence[int]) -> float:
    """The share of the processors' time between two moments, 0 to 1, that other processes used."""
    wall = max(after.wall - before.wall, 1e-9) * max(len(cpus), 1)
    return min(max((after.all - before.all - (after.own - before.own)) / wall, 0.0), 1.0)


def drift(rounds: Sequence[float]) -> float:
    """The relative change of the median from the first third to the last, where the trend is beyond chance, else 0.

    Beyond chance by the test of Mann (1945) and Kendall: S counts the pairs that rise less those that fall.
    """
    count = len(rounds)
    if count < FEWEST:
        return 0.0
    values = np.asarray(rounds)
    rises = np.sign(values[None, :] - values[:, None])
    statistic = float(np.triu(rises, 1).sum())
    deviation = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    if abs(statistic) < CERTAIN * deviation:
        return 0.0
    third = count // 3
    return float(np.median(values[-third:]) / np.median(values[:third]) - 1)


def two_states(rounds: Sequence[float]) -> tuple[float, float] | None:
    """The means of two clusters that the rounds fall into, ms, or None where there is one.

    The split of the sorted values with the least variance within (Otsu 1979) is taken for two states when both are
    common and Ashman's D (1994) = sqrt(2) * difference / sqrt(sum of variances) is beyond what one hill gives [ours].
    """
    values = np.sort(np.asarray(rounds, dtype=np.float64))
    fewest = max(2, math.ceil(SMALLER * len(values)))
    if len(values) < FEWEST:
        return None
    splits = [(values[:at], values[at:]) for at in range(fewest, len(values) - fewest + 1)]
    low, high = min(splits, key=lambda split: sum(part.var() * len(part) for part in split))
    gap, spread = float(high.mean() - low.mean()), math.sqrt(float(low.var() + high.var()))
    is_apart = math.sqrt(2) * gap > APART * spread and gap > DRIFT * float(low.mean())
    return (float(low.mean()), float(high.mean())) if is_apart else None


def noise(pairs: Sequence[tuple[float, float]]) -> float:
    """How far two measurements of one file within a round lie apart: the median of their relative difference."""
    return float(np.median([max(first / second, second / first) - 1 for first, second in pairs]))


@dataclass(frozen=True)
class Told:
    """What the rounds of one file say of the measuring; `held_up` is a share of its inferences."""

    name: str
    rounds: Sequence[float]
    noise: float
    held_up: float


def warnings(files: Sequence[Told], speedups: Sequence[Speedup], *, load: float, change: float) -> list[str]:
    """What a reader of the figures has to know; empty after a quiet measurement."""
    found = []
    if load > BUSY:
        found.append(f"other processes used {load:.0%} of the processors measured on: each latency may be too high")
    if (most := max(file.held_up for file in files)) > BUSY:
        text = "the latencies show it, the speed-up leaves it out"
        found.append(f"{most:.0%} of the inferences were held up by other processes: {text}")
    if change:
        found.append(f"{files[0].name} got {abs(change):.0%} {'slower' if change > 0 else 'faster'} while measured")
    for file in files:
        if states := two_states(file.rounds):
            text = "its median is one of them"
            found.append(f"{file.name} ran in two states, at {states[0]:.3g} and {states[1]:.3g} ms: {text}")
    for speedup in speedups:
        width = (speedup.high - speedup.low) / (2 * speedup.value)
        if width > WIDE:
            text = "measure longer, or on a quiet machine"
            found.append(f"the speed-up of {speedup.file} is known to {width:.0%} only: {text}")
    return found


def describe(files: Sequence[Told], speedups: Sequence[Speedup], *, load: float) -> dict[str, Any]:
    """The figures and the words, as JSON values for the conditions of a Comparison; the first file is the reference.

    `foreign_load` is a share of the processors' time, `held_up` one of the inferences, `drift` and `noise` are relative
    to the reference's latency.
    """
    change = drift(files[0].rounds)
    change = change if abs(change) > DRIFT else 0.0
    return {
        "foreign_load": round(load, 4),
        "held_up": round(max(file.held_up for file in files), 4),
        "drift": round(change, 4),
        "noise": round(files[0].noise, 5),
        "warnings": warnings(files, speedups, load=load, change=change),
    }
