"""A worker: takes run after run that nobody else has, until all are done; a run that fails does not cost the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.comparison.queue import BEAT, Queue
from compress.errors import CompressError
from compress.report.words import measured, reached

if TYPE_CHECKING:
    from collections.abc import Iterator

POLL = 2.0  # seconds between two looks at what others are doing


@dataclass(frozen=True)
class Progress:
    """A run begins (no outcome, no error) or has ended."""

    cell: str
    outcome: Mapping[str, Any] | None = None
    error: str = ""


OnProgress = Callable[[Progress], None]


def work(
    queue: Queue, run: Callable[[str], Mapping[str, Any]], *, jobs: int = 1,
    on_progress: OnProgress = lambda progress: None, on_stop: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Do all cells of the queue that others do not, `jobs` at a time, and wait for those that others do.

    Args:
        run: does the run of the cell so named, from the start or from where it was broken off. Gives its report;
            raises CompressError where it fails, KeyboardInterrupt where it was interrupted.
        on_stop: has the runs at work end soon; called where this one is to stop.

    Raises:
        KeyboardInterrupt: after every run of this worker has stopped; they can be continued.
    """
    stop = threading.Event()

    def each() -> None:
        while not stop.is_set():
            taken = queue.take()
            if taken is None:
                if not queue.revive():
                    return
                stop.wait(POLL)
                continue
            number, cell = taken
            on_progress(Progress(cell))
            try:
                with _alive(queue, number):
                    found = outcome(run(cell))
            except KeyboardInterrupt:
                queue.put_back(number)
                stop.set()
                raise
            except CompressError as error:
                queue.fail(number, str(error))
                on_progress(Progress(cell, error=str(error)))
            else:
                queue.finish(number, found)
                on_progress(Progress(cell, found))

    with ThreadPoolExecutor(jobs) as pool:
        working = [pool.submit(each) for _ in range(jobs)]
        try:
            for future in working:
                future.result()
        except BaseException:
            stop.set()
            on_stop()
            raise


def outcome(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison keeps of a run's report. `value`: the task's metric in percent on `split`."""
    return {
        "value": reached(report["pruned"]),
        "measured": measured(report["pruned"]),
        "dense": reached(report["dense"]),
        "split": report["split"],
        "val": report["val_top1"]["recovered"]["best"],
        "kept": report["kept"],
        "params": report["pruned"]["params"],
        "macs": report["pruned"]["macs"],
        "size_bytes": report["pruned"]["size_bytes"],
        "data": report["data"]["fingerprint"],
        "seconds": sum(report["seconds"].values()),
    }


@contextmanager
def _alive(queue: Queue, number: int) -> Iterator[None]:
    """Signs of life, for as long as a run takes."""
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(BEAT):
            count += 1
            queue.beat(number, count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
