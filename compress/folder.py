"""The run folder: one run at a time, never overwritten, every file in it whole or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compress.errors import RunFolderError
from compress.files import atomic_write


class RunFolder:
    """Names and writes what a run leaves: results at the top, what only a resume needs in `state/`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, recipe: str, *, force: bool = False) -> RunFolder:
        """Make the folder and save the recipe in it.

        Raises:
            RunFolderError: it exists and is not empty (unless `force`, which deletes an earlier *run*, never else), or
                cannot be made.
        """
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            if not force or not (path / "recipe.yaml").is_file():
                what = "continue it with `compress resume`, or choose" if (path / "recipe.yaml").is_file() else "choose"
                raise RunFolderError(f"{path} exists already; {what} another --out (--force deletes an earlier run)")
            with cls(path).lock():
                pass  # nobody is working in it
            shutil.rmtree(path)
        try:
            (path / "state").mkdir(parents=True)
        except OSError as error:
            raise RunFolderError(f"the run folder {path} cannot be made: {error.strerror}") from error
        atomic_write(path / "recipe.yaml", recipe)
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run's folder, to go on with it.

        Raises:
            RunFolderError: there is no run in `path`.
        """
        found = cls.existing(path)
        (path / "state").mkdir(exist_ok=True)
        return found

    @classmethod
    def existing(cls, path: Path) -> RunFolder:
        """The folder of a run, for reading: nothing is made in it.

        Raises:
            RunFolderError: there is no run in `path`.
        """
        if not (path / "recipe.yaml").is_file():
            raise RunFolderError(f"{path} holds no run (no recipe.yaml); give the folder that `compress prune` made")
        return cls(path)

    @classmethod
    def finished(cls, path: Path) -> RunFolder:
        """The folder of a run that came to its end, for reading.

        Raises:
            RunFolderError: there is no run in `path`, or it has no report yet.
        """
        found = cls.existing(path)
        if not (path / "report.json").is_file():
            raise RunFolderError(f"the run in {path} is not finished (no report.json); continue it: `compress resume`")
        return found

    def discard(self) -> None:
        """Delete the folder of a run that has done nothing yet."""
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process; released also when the process is killed.

        Raises:
            RunFolderError: another process holds it.
        """
        lock = FileLock(self.path / "state" / "lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            text = f"another process is working in {self.path}; wait for it or choose another --out"
            raise RunFolderError(text) from error
        try:
            yield
        finally:
            lock.release()

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / name).read_text())
        return content

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        atomic_write(self.path / name, json.dumps(content, indent=1) + "\n")
