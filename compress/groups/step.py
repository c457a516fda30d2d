"""One operator about to be traced: its arguments with the ids of its tensors; what every rule is handed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from compress.groups.classes import Classes, Ids
from compress.groups.values import Shape, Value, align, place

Part = tuple[tuple[int, ...], int]  # numbers that an operator was given, and which of them counts the ids
# (module path, an attribute or such numbers, an id per unit along the last axis: for joint ids, the others repeat them)
Counted = tuple[str, str | Part, Ids]


@dataclass(frozen=True)
class Step:
    """The arguments of an operator by the names of its schema; tensors are Values."""

    operator: str
    path: str
    arguments: Mapping[str, Any]
    shapes: tuple[Shape | None, ...]
    classes: Classes
    counts: list[Counted]
    inputs: tuple[Value, ...] = ()  # of the module, where it takes the width of its heads from theirs

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of several spellings that the operator has, if it is given."""
        return next((self.arguments[n] for n in names if self.arguments.get(n) is not None), default)

    @property
    def shape(self) -> Shape:
        """The shape of the (first) output."""
        shape = self.shapes[0]
        assert shape is not None, self.operator
        return shape

    @property
    def where(self) -> str:
        """The operator and its module, for a reason."""
        name = self.operator.removeprefix("aten.")
        return f"{name} in {self.path}" if self.path else name

    @property
    def why(self) -> str:
        """The usual reason: something that stays lies beside the channels."""
        return f"its channels meet positions that stay ({self.where})"

    def reads(self, value: Value, dim: int, sizes: Sequence[int], at: int | None = None) -> None:
        """The operator was given the sizes of an axis' parts, or with `at` a shape; the module may hold them."""
        bundle = value.at(dim)
        if bundle is None:
            return
        ids = np.moveaxis(bundle.ids, bundle.dims.index(dim), -1)
        if at is not None:
            self.counts.append((self.path, (tuple(sizes), at), ids))
            return
        begin = 0
        for number, size in enumerate(sizes):
            self.counts.append((self.path, (tuple(sizes), number), ids[..., begin : begin + size]))
            begin += size

    def tensors(self) -> list[Value]:
        """Every tensor among the arguments, those in lists too."""
        found: list[Value] = []
        for argument in self.arguments.values():
            found += [
                v for v in (argument if isinstance(argument, (list, tuple)) else [argument]) if isinstance(v, Value)
            ]
        return found

    def over(self, values: Sequence[Value], shape: Shape | None = None) -> Value:
        """Elementwise with broadcasting: axes are matched from the last one on."""
        shape = self.shape if shape is None else shape
        placed = [place(v, range(len(shape) - len(v.shape), len(shape)), shape) for v in values]
        return align(self.classes, placed, shape, self.why)


Result = Value | tuple[Value | None, ...]
Rule = Callable[[Step], Result]
