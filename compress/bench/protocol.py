"""What a runtime is to whoever measures: its name, what it opens, and what an opened file can be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from compress.errors import MeasureError

Runtime = Literal[
    "ort-cpu", "ort-cuda", "ort-tensorrt", "openvino", "torch-cpu", "torch-compile-cpu", "torch-cuda",
    "torch-compile-cuda",
]  # fmt: skip
Input = tuple[str, tuple[int, ...], str]  # name, shape, numpy dtype
Feeds = Mapping[str, Any]  # name of an input -> numpy array


@dataclass(frozen=True)
class Network:
    """What the torch runtimes take: a network that was loaded already, since a file of weights is not one."""

    path: Path  # the file of its weights: gives the name, the digest and the sizes
    module: Any  # torch.nn.Module of one tensor, on the CPU; it is copied, never changed
    input_size: tuple[int, ...]  # of one image: C, H, W

    @property
    def name(self) -> str:
        return self.path.name


Source = Path | Network  # an ONNX file, or a network for the torch runtimes


class Session(Protocol):
    """A file or network that one runtime has loaded."""

    def signature(self, *, batch: int, shape: Sequence[int] | None = None) -> tuple[Input, ...]:
        """What to feed: open first dimensions set to `batch`, others taken from `shape` (one image)."""

    def run(self, feeds: Feeds) -> list[Any]:
        """The outputs as arrays in host memory."""

    def timed(self, feeds: Feeds) -> Callable[[], float]:
        """A function that makes one inference, waits for its end, and gives its ms. GPU: inputs lie there already.

        Where the runtime allows it each call draws anew where inputs and weights come to lie.
        """


def sized(
    inputs: Sequence[tuple[str, Sequence[Any], str]], *, batch: int, shape: Sequence[int] | None
) -> tuple[Input, ...]:
    """Every dimension of every input known.

    The batch is the first dimension of all inputs or, where some leave that open, of those alone, and every dimension
    that goes by the same name.

    Args:
        inputs: name, shape and dtype; a shape has an int where the file fixes a dimension, else its name or None.
        shape: of one image, for other open dimensions.

    Raises:
        MeasureError: the file fixes another batch, or leaves a dimension open that `shape` does not give.
    """
    is_open = any(given and not isinstance(given[0], int) for _, given, _ in inputs)
    named = {given[0] for _, given, _ in inputs if given and isinstance(given[0], str)}
    found = []
    for name, given, dtype in inputs:
        if given and not is_open and given[0] != batch:
            only = given[0]
            raise MeasureError(f"input {name!r} takes batch {only} only, not {batch}; measure with batch {only}")
        sizes = [batch if size in named else size for size in given]
        if given and not isinstance(given[0], int):
            sizes[0] = batch
        for dim, size in enumerate(sizes):
            if not isinstance(size, int):
                if shape is None or len(shape) != len(sizes) - 1:
                    raise MeasureError(
                        f"input {name!r} of shape {list(given)} leaves dimension {dim} open; give its shape"
                    )
                sizes[dim] = shape[dim - 1]
        found.append((name, tuple(sizes), dtype))
    return tuple(found)


def one_line(error: BaseException) -> str:
    """The text of a foreign error, fit for one of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
