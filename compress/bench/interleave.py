"""Files measured in turn, A B B A, round after round, so that whatever else the machine does hits all of them alike."""

from __future__ import annotations

import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from compress.bench import identity, machine, noise
from compress.bench.child import draw
from compress.bench.fresh import measure_fresh
from compress.bench.protocol import Input, Network, Runtime, Session, Source, one_line
from compress.bench.results import Comparison, Latency, Measurement, Speedup
from compress.bench.runtimes import RUNTIMES, available, open_on
from compress.bench.session import runtime_errors
from compress.bench.speedup import RESOLUTION, compare
from compress.errors import MeasureError

BLOCK_SECONDS = 0.004  # of timed inferences in a row: far above the clock's resolution, below a scheduler's time slice
WARM_UP = 3  # inferences before each block: the first allocates, the next ones still fill caches
LONG = 1.0  # seconds of warming up, after the first inference, that are enough
LEAST_ROUNDS = 20  # where time allows
FEWEST_ROUNDS = 5  # even past the time limit: a bootstrap over fewer says nothing
NARROW = 0.01  # half the width of a speed-up's interval, relative, at which measuring ends
CHECK_EVERY = 5  # rounds between two looks at the width


@dataclass(frozen=True)
class _Setting:
    """What is asked of every file alike."""

    batch: int
    threads: int
    runtime: Runtime
    rounds: int
    seconds: float
    seed: int


@dataclass
class _Track:
    """What is known so far of one file."""

    source: Source
    name: str
    signature: tuple[Input, ...]
    feeds: dict[str, Any]
    session: Session | None  # where the runtime stays open for longer than a block
    rounds: list[float] = field(default_factory=list)  # ms per inference, one value a round
    pairs: list[tuple[float, float]] = field(default_factory=list)  # the two that a round is the mean of
    singles: list[noise.Inference] = field(default_factory=list)
    warmup: int = 0
    spoilt: int = 0  # blocks, two a round, in which every inference was held up while several threads worked


def benchmark(
    files: Sequence[Path | str | Network], *, batch: int = 1, threads: int = 1, runtime: Runtime = "ort-cpu",
    rounds: int = LEAST_ROUNDS, seconds: float = 20.0, seed: int = 0, shape: Sequence[int] | None = None,
    on_round: Callable[[int, int], None] | None = None,
) -> Comparison:  # fmt: skip
    """Measure all files together, and each after the first against the first.

    At least `rounds` rounds are made (20: the interval of a median needs about as many), and more until every speed-up
    is known to 1 % or `seconds` have passed (20 s: two small networks need 2, a busy machine all of it). Inputs are
    noise made from each file's own signature and `seed`; `shape` (one image, without the batch) is needed only where
    the file leaves height or width open. `on_round` gets the rounds made and the rounds now expected. The torch
    runtimes take a compress.bench.Network in place of an ONNX file.

    Raises:
        LoadError: a file is missing or not ONNX.
        MeasureError: the runtime is not active for all of a file, the threads exceed the processors, or the batch does
            not fit the file.
    """
    setting = _Setting(batch, threads, runtime, rounds, seconds, seed)
    sources = [file if isinstance(file, Network) else Path(file) for file in files]
    _check(sources, setting)
    conditions = _conditions(setting)
    with machine.pinned(threads) as cpus:
        tracks = _tracks(sources, setting, shape)
        fresh = [measure_fresh(track.source, signature=track.signature, threads=threads, runtime=runtime, seed=seed)
                 for track in tracks]  # fmt: skip
        used = cpus or machine.allowed_cpus()
        before = noise.clock(used)
        speedups = _rounds(tracks, setting, on_round)
        after = noise.clock(used)
    conditions |= {"pinned_cpus": list(cpus) if cpus else None, "rounds": len(tracks[0].rounds),
                   "seconds": round(after.wall - before.wall, 2)}  # fmt: skip
    load = noise.foreign_load(before, after, used)
    conditions |= noise.describe([_told(track) for track in tracks], speedups, load=load)
    measurements = tuple(
        Measurement(file=track.name, **identity.size(identity.file_of(track.source)), load_ms=new.load_ms,
                    first_ms=new.first_ms, peak_memory_bytes=new.peak_memory_bytes, latency=_latency(track, setting))
        for track, new in zip(tracks, fresh, strict=True)
    )  # fmt: skip
    return Comparison(measurements=measurements, speedups=speedups, conditions=conditions)


def latency_share(
    file: Path, against: Path, *, batch: int = 1, threads: int = 1, runtime: Runtime = "ort-cpu", seconds: float = 20.0,
    seed: int = 0,
) -> float:  # fmt: skip
    """The latency of one file as a share of another's, as `benchmark` finds it; without new processes and conditions.

    Raises:
        LoadError, MeasureError: as `benchmark`.
    """
    setting = _Setting(batch, threads, runtime, LEAST_ROUNDS, seconds, seed)
    _check([against, file], setting)
    with machine.pinned(threads):
        (found,) = _rounds(_tracks([against, file], setting, None), setting, None)
    return 1 / found.value


def _tracks(sources: Sequence[Source], setting: _Setting, shape: Sequence[int] | None) -> list[_Track]:
    """Each source opened once, for its inputs; it stays open where the runtime does."""
    tracks = []
    for source, name in zip(sources, identity.names([identity.file_of(source) for source in sources]), strict=True):
        session = open_on(setting.runtime, source, threads=setting.threads)
        signature = session.signature(batch=setting.batch, shape=shape)
        feeds = draw(signature, setting.seed)
        stays = RUNTIMES[setting.runtime].stays_open
        tracks.append(_Track(source, name, signature, feeds, session if stays else None))
        if stays:
            _try(tracks[-1], setting, session.timed(feeds))  # compiled, and engines built, before any clock starts
    return tracks


def _check(files: Sequence[Source], setting: _Setting) -> None:
    if not files or setting.batch < 1 or setting.threads < 1 or setting.rounds < 1:
        given = f"{len(files)} files, batch {setting.batch}, threads {setting.threads}, rounds {setting.rounds}"
        raise MeasureError(f"{given}: each must be at least 1")
    cpus = len(machine.allowed_cpus())
    if setting.threads > cpus:
        raise MeasureError(f"{setting.threads} threads on {cpus} processors measure the scheduler; use at most {cpus}")


def _rounds(
    tracks: Sequence[_Track], setting: _Setting, on_round: Callable[[int, int], None] | None
) -> tuple[Speedup, ...]:
    """Make rounds until the speed-ups are narrow or the time is over."""
    start = time.monotonic()
    for done in itertools.count(1):
        with _no_collection():
            _reopen(tracks, setting, done - 1)
            _round(tracks if done % 2 else tracks[::-1], setting)
        elapsed = time.monotonic() - start
        speedups = _speedups(tracks, setting.seed) if done % CHECK_EVERY == 0 else ()
        # Looking at the width alone, never at the value, favours neither verdict.
        narrow = len(speedups) == len(tracks) - 1 and all(_is_narrow(speedup) for speedup in speedups)
        late = elapsed >= setting.seconds and done >= FEWEST_ROUNDS
        finished = late or (narrow and done >= setting.rounds)
        if on_round:
            most = max(done + 1, int(done * setting.seconds / elapsed))
            on_round(done, done if finished else max(done + 1, min(setting.rounds, most)))
        if finished:
            break
    return _speedups(tracks, setting.seed)


def _reopen(tracks: Sequence[_Track], setting: _Setting, round_index: int) -> None:
    """Open anew what has served its rounds; all are closed before the first opens."""
    serves = RUNTIMES[setting.runtime].stays_open
    if not serves or not round_index or round_index % serves:
        return
    for track in tracks:
        track.session = None
    for track in tracks:
        track.session = open_on(setting.runtime, track.source, threads=setting.threads)


def _round(order: Sequence[_Track], setting: _Setting) -> None:
    """Each file once in the given order and once in the reverse order: a steady drift cancels in the mean."""
    there = [_block(track, setting) for track in order]
    back = [_block(track, setting) for track in reversed(order)]
    for track, first, second in zip(order, there, reversed(back), strict=True):
        track.rounds.append((first + second) / 2)
        track.pairs.append((first, second))


def _block(track: _Track, setting: _Setting) -> float:
    """Typical ms of single inferences in a row, in a session opened for this block and closed after it.

    Only one session is open at a time: the worker threads of an idle one keep spinning for milliseconds and take the
    processors from the other (with 2 threads, two copies of one file then differ by half and more). A new session also
    draws anew where memory comes to lie, which would otherwise favour one of two equal files all through a comparison.
    Runtimes whose opening takes longer than many inferences stay open for some rounds; they have no threads that spin.
    """
    opened = time.perf_counter()
    session = track.session or open_on(setting.runtime, track.source, threads=setting.threads)
    once = session.timed(track.feeds)
    for _ in range(WARM_UP):
        _try(track, setting, once)
        track.warmup += 1
        if (warm := time.perf_counter()) - opened > LONG:
            break
    # The slower the load, the more inferences it has to pay for.
    stop = warm + (BLOCK_SECONDS if track.session else max(BLOCK_SECONDS, (warm - opened) / 2))
    is_single = setting.threads == 1 and not RUNTIMES[setting.runtime].is_gpu
    times = [noise.watched(once, is_single=is_single)]
    while time.perf_counter() < stop:
        times.append(noise.watched(once, is_single=is_single))
    track.singles += times
    track.spoilt += not is_single and not any(found.is_clean for found in times)
    return noise.typical(times, is_single=is_single)


def _try(track: _Track, setting: _Setting, once: Callable[[], float]) -> None:
    """One inference whose time is not wanted."""
    known: tuple[type[Exception], ...] = (*runtime_errors(), TypeError)
    try:
        once()
    except known as error:
        raise MeasureError(f"{track.name} does not run at batch {setting.batch} on noise: {one_line(error)}") from error


def _speedups(tracks: Sequence[_Track], seed: int) -> tuple[Speedup, ...]:
    first, *others = tracks
    return tuple(
        compare(first.rounds, track.rounds, names=(first.name, track.name), seed=seed,
                noise=max(_noise(first), _noise(track)))
        for track in others
    )  # fmt: skip


def _noise(track: _Track) -> float:
    """Relative; infinite where most blocks had no undisturbed inference, so that nothing is known of the file."""
    return math.inf if track.spoilt > len(track.rounds) else noise.noise(track.pairs)


def _told(track: _Track) -> noise.Told:
    held_up = sum(not found.is_clean for found in track.singles) / len(track.singles)
    return noise.Told(track.name, track.rounds, noise.noise(track.pairs), held_up)


def _is_narrow(speedup: Speedup) -> bool:
    return (speedup.high - speedup.low) / (2 * speedup.value) <= NARROW + RESOLUTION


def _latency(track: _Track, setting: _Setting) -> Latency:
    walls = [found.wall for found in track.singles]
    p50, p90, p99 = (float(value) for value in np.percentile(walls, [50, 90, 99]))
    return Latency(
        p50=p50, p90=p90, p99=p99, mean=float(np.mean(walls)), batch=setting.batch, threads=setting.threads,
        runtime=setting.runtime, n=len(track.singles), warmup=track.warmup, throughput=1e3 * setting.batch / p50,
        samples=tuple(track.rounds),
    )  # fmt: skip


def _conditions(setting: _Setting) -> dict[str, Any]:
    """The machine as it is just before measuring."""
    return machine.describe() | {
        "onnxruntime": machine.package_version("onnxruntime") or machine.package_version("onnxruntime-gpu"),
        "runtime": setting.runtime, "batch": setting.batch, "threads": setting.threads, "seed": setting.seed,
        "load_average": [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "unavailable": {name: reason for name, reason in available().items() if reason},
    }  # fmt: skip


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection inside a timing; restored at the end."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
