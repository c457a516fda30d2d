"""Where a latency is meant: runtime, threads and batch, as `ort-cpu:threads=1:batch=1` says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from compress.bench.results import Runtime
from compress.errors import UsageError


@dataclass(frozen=True)
class On:
    """A runtime with its number of threads and the images of one inference."""

    runtime: Runtime = "ort-cpu"
    threads: int = 1
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.runtime}:threads={self.threads}:batch={self.batch}"


def parse(text: str) -> On:
    """Read RUNTIME[:threads=N][:batch=N].

    Raises:
        UsageError: another form, an unknown runtime or key, or a number below 1.
    """
    name, *parts = text.split(":")
    runtime = next((known for known in get_args(Runtime) if known == name), None)
    if runtime is None:
        raise UsageError(f"--on {text!r}: the runtime {name!r} is unknown; there are {', '.join(get_args(Runtime))}")
    numbers = dict(part.partition("=")[::2] for part in parts)
    if any(key not in ("threads", "batch") or not value.isdecimal() or value == "0" for key, value in numbers.items()):
        raise UsageError(f"--on {text!r} is not of the form RUNTIME:threads=N:batch=N, each at least 1")
    return On(runtime, **{key: int(value) for key, value in numbers.items()})
