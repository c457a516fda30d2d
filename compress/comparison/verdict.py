"""Which method wins: accuracies at equal latency, paired by seed and target, and an interval that excludes 0."""

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


def gaps(points: Sequence[Point], first: str, second: str) -> dict[int, dict[float, float]]:
    """Seed -> target -> by how many points `first` is better than `second` at equal latency.

    Of a seed each method's runs give a curve of accuracy over the logarithm of latency, straight between its points.
    At a target the difference is taken at both runs' latencies where the other curve reaches that far (or has a point
    within EQUAL of it), and averaged. Seeds keep the targets that all have; one that shares none with the others goes.
    [ours]
    """
    found: dict[int, dict[float, float]] = {}
    keys = {(p.target, p.seed) for p in points if p.method == first}
    keys &= {(p.target, p.seed) for p in points if p.method == second}
    for target, seed in sorted(keys):
        mine, other = (curve(points, method, seed) for method in (first, second))
        at = [p.accuracy - h for p in mine if p.target == target and (h := height(other, p.latency)) is not None]
        at += [h - p.accuracy for p in other if p.target == target and (h := height(mine, p.latency)) is not None]
        if at:
            found.setdefault(seed, {})[target] = statistics.mean(at)
    while found and not (shared := set.intersection(*(set(of) for of in found.values()))):
        del found[min(found, key=lambda seed: len(found[seed]))]
    return {seed: {target: of[target] for target in sorted(shared)} for seed, of in found.items()}


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


def interval(values: Sequence[float], variance: float, freedom: float, *, confidence: float) -> tuple[float, float]:
    """Student's interval of the mean of `values`, whose variance was estimated with so many degrees of freedom."""
    from scipy.stats import t

    mean = statistics.mean(values)
    reach = float(t.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(variance / len(values))
    return mean - reach, mean + reach


def compare(points: Sequence[Point], methods: Sequence[str]) -> list[Difference]:
    """Every pair of methods, each the other way round as well; intervals hold for all pairs together (Bonferroni).

    The runs of one seed at several targets are no independent figures: their curves share points, and often the network
    after the sparse phase. So each seed counts once, by its mean over the targets. Noise is taken to be alike in all
    methods, as in an analysis of variance with the seeds as blocks: the variance of a difference is the mean over the
    pairs of the variance over seeds, and of its degrees of freedom, pairs x (seeds - 1), the share 2 / methods is
    independent. Ends are None where the seeds tell of no noise. [ours]
    """
    pairs = list(itertools.combinations(methods, 2))
    confidence = 1 - LEVEL / max(1, len(pairs))
    found = {pair: of for pair in pairs if (of := gaps(points, *pair))}
    means = {pair: [statistics.mean(at.values()) for at in of.values()] for pair, of in found.items()}
    count = len({name for pair in found for name in pair})
    spare = sum(len(values) - 1 for values in means.values())
    squares = sum((v - statistics.mean(values)) ** 2 for values in means.values() for v in values)
    made = []
    for (first, second), values in means.items():
        ends: tuple[float | None, float | None] = (None, None)
        if squares > 0 and len(values) > 1:  # equal gaps by chance, of few images, are no proof of no noise
            ends = interval(values, squares / spare, max(1.0, spare * 2 / count), confidence=confidence)
        runs = sum(map(len, found[first, second].values()))
        made.append(Difference(first, second, statistics.mean(values), *ends, runs, confidence))
    return made + [_reversed(difference) for difference in made]


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
        return None, "no verdict: the seeds do not tell how large the noise is"
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
