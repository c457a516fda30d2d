"""The runs of a comparison as an Optuna study that processes and machines share: who does which, what is done."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from compress.errors import UsageError
from compress.search.record import drop_half_line, quiet

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEAT = 20.0  # seconds between two signs of life
ATTEMPTS = 4  # at opening a database that another process is making
STALE = 180.0  # seconds without one after which a worker on another machine is taken to be gone


@dataclass
class Queue:
    """Each cell is a trial: waiting, running, complete with its outcome, or failed with the reason.

    Args:
        storage: a database's URL, or the path of a journal file; machines may share either.
        name: of the study.
        is_free: whether nobody on this machine is at work in the folder of the cell so named.
    """

    storage: str
    name: str
    is_free: Callable[[str], bool]
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)  # trial -> its last beat, and when it was new

    def __post_init__(self) -> None:
        import optuna

        with quiet():
            self._study = optuna.create_study(
                study_name=self.name, storage=_opened(self.storage), direction="maximize", load_if_exists=True
            )

    def fill(self, cells: Iterable[str]) -> None:
        """Put in what is missing: all at first, later what has failed."""
        live = {_cell(trial) for trial in self._trials() if not _is_failed(trial)}
        for cell in cells:
            if cell not in live:
                self._put(cell)

    def take(self) -> tuple[int, str] | None:
        """Take the next cell that nobody has; None where there is none."""
        while any(trial.state.name == "WAITING" for trial in self._trials()):
            with quiet(), self._guarded():
                trial = self._study.ask()
            cell = trial.user_attrs.get("cell")
            others = [other for other in self._trials() if _cell(other) == cell and other.number != trial.number]
            if cell is None or any(
                other.state.name == "COMPLETE"
                or (other.state.name == "RUNNING" and (other.number < trial.number or "worker" in other.user_attrs))
                for other in others
            ):  # another was faster, or two processes have filled the queue
                self._end(trial.number, {"error": "", "twice": True})
                continue
            self.beat(trial.number, 0)
            return trial.number, str(cell)
        return None

    def beat(self, number: int, count: int) -> None:
        """Say that the worker at a trial is alive."""
        import optuna
        import psutil

        trial = optuna.trial.Trial(self._study, self._find(number)._trial_id)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": psutil.Process().create_time()}
        trial.set_user_attr("worker", {**own, "beat": count})

    def finish(self, number: int, outcome: Mapping[str, Any]) -> None:
        """Keep what a run has found. Where another worker has taken it over meanwhile, that one does."""
        self._end(number, {"outcome": dict(outcome)}, value=float(outcome["value"]))

    def fail(self, number: int, error: str) -> None:
        """Keep why a run did not come to its end."""
        self._end(number, {"error": error})

    def put_back(self, number: int) -> None:
        """Leave a cell to whoever comes next."""
        cell = _cell(self._find(number))
        if self._end(number, {"error": "interrupted"}) and cell is not None:
            self._put(cell)

    def revive(self) -> bool:
        """Put back the cells of workers that are gone. Returns: whether somebody else is still at work."""
        is_busy = False
        for trial in self._trials():
            if trial.state.name != "RUNNING":
                continue
            if self._is_gone(trial):
                self.put_back(trial.number)
            is_busy = True
        return is_busy

    def outcomes(self) -> dict[str, dict[str, Any]]:
        """Cell -> what its run has found, of those that are complete."""
        done = [trial for trial in self._trials() if trial.state.name == "COMPLETE"]
        return {str(_cell(trial)): trial.user_attrs["outcome"] for trial in reversed(done)}

    def failures(self) -> dict[str, str]:
        """Cell -> why its last run failed, of those that neither are complete nor will be tried again."""
        live = {_cell(trial) for trial in self._trials() if not _is_failed(trial)}
        return {
            str(_cell(trial)): str(trial.user_attrs["error"])
            for trial in self._trials()
            if trial.user_attrs.get("error") and _cell(trial) not in live
        }

    def _is_gone(self, trial: FrozenTrial) -> bool:
        import psutil

        worker = trial.user_attrs.get("worker", {"host": "", "pid": 0, "since": 0.0, "beat": -1})
        if worker["host"] == socket.gethostname():
            try:  # after a restart another process may have the number, even this one
                is_dead = psutil.Process(worker["pid"]).create_time() != worker.get("since")
            except psutil.NoSuchProcess:
                is_dead = True
            return is_dead and self.is_free(str(_cell(trial)))
        beat, since = self._beats.get(trial.number, (None, 0.0))
        if beat != worker["beat"]:
            self._beats[trial.number] = (worker["beat"], time.monotonic())
            return False
        return time.monotonic() - since > STALE

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """No two processes take the same trial: Optuna sees to that, but for SQLite, whose file is locked here."""
        kind, _, path = self.storage.partition(":///")
        if not kind.startswith("sqlite"):
            yield
            return
        with FileLock(f"{path}.take"):
            yield

    def _put(self, cell: str) -> None:
        with quiet():
            self._study.enqueue_trial({}, user_attrs={"cell": cell})

    def _end(self, number: int, found: Mapping[str, Any], value: float | None = None) -> bool:
        """Note how a trial ended. Returns: whether it was this process that ended it."""
        import optuna
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial = optuna.trial.Trial(self._study, self._find(number)._trial_id)
        try:
            for key, content in found.items():
                trial.set_user_attr(key, content)
            with quiet():
                self._study.tell(number, value, state=TrialState.FAIL if value is None else None)
        except (UpdateFinishedTrialError, ValueError):  # ended by another process
            return False
        return True

    def _find(self, number: int) -> FrozenTrial:
        return self._trials()[number]

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)


def _opened(storage: str) -> Any:
    """The storage. Two processes that make the tables of a database at once are in each other's way: tried again."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    for attempt in range(ATTEMPTS):
        try:
            if "://" in storage:
                return optuna.storages.RDBStorage(storage)
            return optuna.storages.JournalStorage(_journal(Path(storage).absolute()))
        except (SQLAlchemyError, ImportError, OSError) as error:
            if attempt == ATTEMPTS - 1 or not isinstance(error, SQLAlchemyError):
                text = f"--storage {storage} cannot be opened: {str(error).splitlines()[0]}"
                raise UsageError(f"{text}; give a file or a URL such as sqlite:///runs.db") from error
            time.sleep(0.2 * 2**attempt)
    raise AssertionError(storage)


def _journal(path: Path) -> Any:
    """The file, whole lines only. Absolute: its lock is a link to it, and one that leads nowhere is never given up."""
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        drop_half_line(path)
    finally:
        lock.release()
    return JournalFileBackend(str(path), lock_obj=lock)


def _cell(trial: FrozenTrial) -> str | None:
    return trial.user_attrs.get("cell")


def _is_failed(trial: FrozenTrial) -> bool:
    return trial.state.name == "FAIL"
