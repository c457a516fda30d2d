"""Is one file faster than another: the median of paired ratios with a bootstrap confidence interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.bench.results import Speedup, Verdict

CONFIDENCE = 0.95
RESAMPLES = 2000  # the ends of a 95 % interval then rest on 50 resamples each
RESOLUTION = 0.005  # no claim is made about smaller differences: where memory comes to lie moves a latency by as much


def compare(
    slow: Sequence[float], fast: Sequence[float], *, names: tuple[str, str], seed: int = 0, noise: float = 0.0
) -> Speedup:
    """How many times faster the second of `names` is than the first, from latencies paired by round.

    The value is the median over rounds of slow / fast: a ratio within a round is untouched by a machine that slows down
    between rounds. The interval is the percentile bootstrap over rounds (Efron 1979), widened by RESOLUTION at
    both ends, and to 1 where the effect is smaller than `noise`: how far two measurements of one and the same file lie
    apart, relative (noise.py). The verdict is "not distinguishable" when it contains 1.
    """
    ratios = np.asarray(slow, dtype=np.float64) / np.asarray(fast, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(medians, [tail, 100 - tail])
    low, high = low / (1 + RESOLUTION), high * (1 + RESOLUTION)
    value = float(np.median(ratios))
    if max(value, 1 / value) - 1 < noise:
        low, high = min(low, 1.0), max(high, 1.0)
    verdict: Verdict = "faster" if low > 1 else "slower" if high < 1 else "not distinguishable"
    against, file = names
    return Speedup(file=file, against=against, value=value, low=float(low), high=float(high),
                   confidence=CONFIDENCE, verdict=verdict)  # fmt: skip
