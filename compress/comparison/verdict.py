"""Which method wins: accuracies at equal latency, paired by seed and target, and an interval that excludes nothing."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EQUAL = 1.05  # ratio of two latencies that still count as equal where there is no curve between points (ours)
LEVEL = 0.05  # chance of a wrong winner among methods that are all the same


@dataclass(frozen=True)
class Point:
    """One run: its accuracy in percent at its latency in ms."""

    method: str
    target: float
    seed: int
    accuracy: float
    latency: float


@dataclass(frozen=True)
class Difference:
    """By how many points `first` is better than `second` at equal latency, on average over the targets."""

    first: str
    second: str
    mean: float
    low: float | None  # of the interval; None: one seed
    high: float | None
    pairs: int
    confidence: float


def differences(points: Sequence[Point], first: str, second: str, *, confidence: float) -> Difference | None:
    """Compare two methods; None where no two of their runs can be.

    Of a seed each method's runs give a curve of accuracy over the logarithm of latency, straight between its points.
    At a target the difference is taken at both runs' latencies where the other curve reaches that far (or has a point
    within EQUAL of it), and averaged. The interval is Student's, with the spread over the seeds within a target: what
    differs from one target to the next is no noise. [ours]
    """
    found: dict[float, list[float]] = {}
    keys = {(p.target, p.seed) for p in points if p.method == first}
    keys &= {(p.target, p.seed) for p in points if p.method == second}
    for target, seed in sorted(keys):
        mine, other = (curve(points, method, seed) for method in (first, second))
        gaps = [p.accuracy - at for p in mine if p.target == target and (at := height(other, p.latency)) is not None]
        gaps += [at - p.accuracy for p in other if p.target == target and (at := height(mine, p.latency)) is not None]
        if gaps:
            found.setdefault(target, []).append(statistics.mean(gaps))
    if not found:
        return None
    mean, low, high = interval(list(found.values()), confidence=confidence)
    return Difference(first, second, mean, low, high, sum(map(len, found.values())), confidence)


def curve(points: Sequence[Point], method: str, seed: int) -> list[Point]:
    """One method's runs with one seed, the fastest first."""
    return sorted((p for p in points if p.method == method and p.seed == seed), key=lambda p: p.latency)


def height(along: Sequence[Point], latency: float) -> float | None:
    """The accuracy of a curve at a latency; None beyond its ends."""
    for left, right in itertools.pairwise(along):
        if left.latency <= latency <= right.latency and left.latency < right.latency:
            share = math.log(latency / left.latency) / math.log(right.latency / left.latency)
            return left.accuracy + share * (right.accuracy - left.accuracy)
    nearest = min(along, key=lambda p: abs(math.log(p.latency / latency)))
    return nearest.accuracy if abs(math.log(nearest.latency / latency)) <= math.log(EQUAL) else None


def interval(strata: Sequence[Sequence[float]], *, confidence: float) -> tuple[float, float | None, float | None]:
    """Mean over strata of their means, with Student's interval from the pooled variance within them.

    None for the ends where no stratum has two values.
    """
    means = [statistics.mean(values) for values in strata]
    mean = statistics.mean(means)
    freedom = sum(len(values) - 1 for values in strata)
    if freedom == 0:
        return mean, None, None
    from scipy.stats import t

    squares = sum((v - m) ** 2 for values, m in zip(strata, means, strict=True) for v in values)
    error = math.sqrt(squares / freedom * sum(1 / len(values) for values in strata)) / len(strata)
    reach = float(t.ppf(0.5 + confidence / 2, freedom)) * error
    return mean, mean - reach, mean + reach


def compare(points: Sequence[Point], methods: Sequence[str]) -> list[Difference]:
    """Every pair of methods, each the other way round as well; intervals hold for all pairs together (Bonferroni)."""
    pairs = list(itertools.combinations(methods, 2))
    confidence = 1 - LEVEL / max(1, len(pairs))
    made = [differences(points, first, second, confidence=confidence) for first, second in pairs]
    found = [difference for difference in made if difference is not None]
    return found + [_reversed(difference) for difference in found]


def sentence(points: Sequence[Point], methods: Sequence[str]) -> tuple[str | None, str]:
    """The winner, or None; and the verdict in words.

    A method wins when against every other its mean difference is above 0 and the interval excludes 0.
    """
    seeds = {p.seed for p in points}
    if len(seeds) < 2:
        return None, f"{'one seed' if seeds else 'no run'}: no verdict"
    if len(methods) < 2:
        return None, "one method: nothing to compare it with"
    against: Mapping[str, list[Difference]] = {
        name: [d for d in compare(points, methods) if d.first == name] for name in methods
    }
    full = {name: ds for name, ds in against.items() if len(ds) == len(methods) - 1}
    if not full:
        return None, "no verdict: the methods share no latency at which they could be compared"
    leader = max(full, key=lambda name: min(d.mean for d in full[name]))
    closest = min(full[leader], key=lambda d: d.low if d.low is not None else d.mean)
    if closest.low is None or closest.high is None:
        return None, "no verdict: no two seeds of a target can be compared"
    gap = (
        f"{closest.mean:+.2f} points against {closest.second} at equal latency ({100 * closest.confidence:.3g} % "
        f"interval {closest.low:+.2f} to {closest.high:+.2f}, {closest.pairs} pairs of runs)"
    )
    if closest.low > 0:
        return leader, f"{leader} wins: {gap}" + (", its closest rival" if len(methods) > 2 else "")
    return None, f"no method wins: {leader} leads with {gap}, which includes 0"


def _reversed(d: Difference) -> Difference:
    low, high = (None if end is None else -end for end in (d.high, d.low))
    return Difference(d.second, d.first, -d.mean, low, high, d.pairs, d.confidence)
