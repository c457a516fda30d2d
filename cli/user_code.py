"""The user's own code: functions named on the command line, imported from the current folder or a file."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from compress.errors import LoadError
from compress.task import Task, check, ours
from compress.user_file import run_file

# Arguments of the libraries that bring weights of their own, fetch and open files, or run code.
RESERVED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "weights",
            "weights_backbone", "trust_remote_code"}  # fmt: skip


@contextmanager
def importable(name: str) -> Iterator[None]:
    """Have the current folder (and a named file's own folder) on sys.path while the user's code is imported and run."""
    place = name.rpartition(":")[0]
    before = list(sys.path)
    if place not in ("", "timm", "torchvision", "hf"):
        sys.path.insert(0, str(Path.cwd()))
    if place.endswith(".py"):
        sys.path.insert(0, str(Path(place).resolve().parent))
    try:
        yield
    finally:
        sys.path[:] = before


def task(asked: str | None, said: str = "") -> Task:
    """What --task names, or without it what a file says: the latter is a name of ours and never code that is run.

    Raises:
        LoadError: a task of one's own cannot be imported or made.
        UsageError: the name is unknown, or what is made is no task.
    """
    if not asked or ":" not in asked:
        return ours(asked or said)
    with importable(asked):
        build = function(asked, "--task")
        try:
            made = build()
        except (Exception, SystemExit) as error:
            raise LoadError(f"--task {asked} cannot be made: {line(error)}") from error
    return check(made, f"--task {asked}")


def function(name: str, option: str = "--arch") -> Callable[..., Any]:
    """The function that `pkg.module:function` or `path/to/file.py:function` names; call it inside `importable`.

    Raises:
        LoadError: it cannot be imported, is absent, or is nothing that can be called; it names the `option`.
    """
    place, _, attribute = name.rpartition(":")
    try:
        module = run_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise LoadError(f"{option} {name}: {place} cannot be imported: {line(error)}") from error
    try:
        builder = getattr(module, attribute)
    except AttributeError as error:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise LoadError(f"{option} {name}: {place} has no {attribute!r}{close_to(attribute, public)}") from error
    if isinstance(builder, nn.Module) or not callable(builder):
        kind = type(builder).__name__
        what = "network" if option == "--arch" else "task"
        raise LoadError(f"{option} {name}: {attribute} is a {kind}: name a function that builds the {what}")
    return builder  # type: ignore[no-any-return]


def line(error: BaseException) -> str:
    """An exception of any code as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def close_to(name: str, options: Iterable[str]) -> str:
    """ " (did you mean X?)" for a misspelled name, or nothing."""
    close = " or ".join(difflib.get_close_matches(name, list(options), n=3))
    return close and f" (did you mean {close}?)"
