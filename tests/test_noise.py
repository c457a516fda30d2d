"""What disturbs a measurement is found where it was planted, and not where it was not."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from compress.bench import noise
from compress.bench.machine import allowed_cpus, pinned
from compress.bench.noise import Inference, Told
from compress.bench.speedup import compare

TRIALS = 300


def normal(seed: int, count: int = 20) -> list[float]:
    return list(1 + 0.01 * np.random.default_rng(seed).standard_normal(count))


def test_a_trend_is_found_and_chance_is_not() -> None:
    found = [noise.drift(normal(seed)) for seed in range(TRIALS)]
    assert sum(change != 0 for change in found) <= 0.03 * TRIALS
    rising = [value * (1 + 0.1 * index / 19) for index, value in enumerate(normal(0))]
    # Medians of the first and the last six of twenty: 7 of 19 steps of the rise lie between their middles twice.
    assert noise.drift(rising) == pytest.approx(0.1 * 14 / 19, abs=0.02)
    assert noise.drift(rising[::-1]) == pytest.approx(-0.1 * 14 / 19, abs=0.02)
    assert noise.drift([1.0, 2.0, 3.0]) == 0.0


def test_two_states_are_found_and_one_is_not() -> None:
    assert sum(noise.two_states(normal(seed)) is not None for seed in range(TRIALS)) <= 0.01 * TRIALS
    generator = np.random.default_rng(0)
    flat = [noise.two_states(list(1 + 0.2 * generator.random(20))) for _ in range(TRIALS)]
    assert sum(states is not None for states in flat) <= 0.1 * TRIALS
    found = 0
    for seed in range(TRIALS):
        states = noise.two_states([*normal(seed, 14), *(1.2 * value for value in normal(seed + TRIALS, 6))])
        found += states is not None and states == (pytest.approx(1, abs=0.02), pytest.approx(1.2, abs=0.02))
    assert found == TRIALS
    assert noise.two_states([*normal(0, 19), 1.5]) is None, "an outlier is no state"


def test_the_noise_is_how_far_one_file_lies_from_itself() -> None:
    assert noise.noise([(1.0, 1.1), (2.0, 2.0), (1.2, 1.0)]) == pytest.approx(0.1)
    slow, fast = [1.05, 1.06, 1.04] * 5, [1.0] * 15
    assert compare(slow, fast, names=("a", "b"), noise=0.01).verdict == "faster"
    hidden = compare(slow, fast, names=("a", "b"), noise=0.2)
    assert hidden.verdict == "not distinguishable" and hidden.low == 1.0 < hidden.high
    assert compare(fast, slow, names=("a", "b"), noise=0.2).high == 1.0


def test_what_was_held_up_does_not_count() -> None:
    clean, late, ran = Inference(1.0, 1.0, True), Inference(9.0, 9.0, False), Inference(9.0, 1.5, False)
    assert noise.typical([late, clean, late], is_single=False) == 1.0
    assert noise.typical([late, Inference(7.0, 7.0, False)], is_single=False) == 7.0
    assert noise.typical([ran, ran, late], is_single=True) == 1.5


@pytest.fixture
def neighbour() -> Iterator[int]:
    """A processor that another process keeps busy."""
    cpu = allowed_cpus()[0]
    code = f"import os; os.sched_setaffinity(0, [{cpu}]); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield cpu
        process.kill()


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="pins and counts as Linux does")
def test_a_busy_neighbour_is_seen_and_its_share_left_out(neighbour: int) -> None:
    def work() -> float:
        """20 ms of a processor's time, longer than its time slice."""
        begin, until = time.perf_counter(), time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return (time.perf_counter() - begin) * 1e3

    import os

    with pinned(len(allowed_cpus())):
        os.sched_setaffinity(0, [neighbour])
        before = noise.clock([neighbour])
        found = [noise.watched(work, is_single=True) for _ in range(25)]
        load = noise.foreign_load(before, noise.clock([neighbour]), [neighbour])
    assert load > 0.2
    assert sum(not one.is_clean for one in found) > 12
    assert max(one.wall for one in found) > 24
    assert noise.typical(found, is_single=True) == pytest.approx(20, rel=0.05)


def test_every_disturbance_is_said_once() -> None:
    quiet = Told("a.onnx", normal(0), 0.01, 0.0)
    sure = compare(normal(0), normal(1), names=("a.onnx", "b.onnx"))
    assert noise.describe([quiet], [sure], load=0.02)["warnings"] == []
    rounds = [1 + 0.02 * index for index in range(20)]
    unsure = compare([1.0, 2.0, 3.0] * 6, [1.0] * 18, names=("a.onnx", "b.onnx"))
    told = noise.describe(
        [Told("a.onnx", rounds, 0.02, 0.5), Told("b.onnx", [1.0, 1.3] * 10, 0.01, 0.0)], [unsure], load=0.4
    )
    assert (told["foreign_load"], told["held_up"], told["noise"]) == (0.4, 0.5, 0.02)
    assert told["drift"] == pytest.approx(1.33 / 1.05 - 1, abs=0.02)
    texts = ("other processes used 40%", "50% of the inferences", "a.onnx got 27% slower", "b.onnx ran in two states",
             "the speed-up of b.onnx is known to 50% only")  # fmt: skip
    assert [warning.startswith(text) for warning, text in zip(told["warnings"], texts, strict=True)] == [True] * 5
