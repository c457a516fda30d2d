"""What every layer of a network costs in time at any widths: measured in the runtime, kept per machine.

A table holds the milliseconds of one layer over a grid of widths, dense where runtimes have stairs: at the multiples of
the machine's vector unit and just above the one before. What a network takes beyond its layers (activations, norms,
attention, the call itself) is measured on the whole dense file and spread over the layers' outputs.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.bench import machine
from compress.bench.layers import Layer, time_layers
from compress.bench.on import On
from compress.cost import Times, matrices, watch
from compress.example import Example, arguments
from compress.files import atomic_write
from compress.groups import Group
from compress.structure import tensors

STEPS = 8  # multiples of the vector unit in a table, per axis; more only where a layer has no more than that
FORMAT = 1  # of the files that tables are kept in


@dataclass(frozen=True)
class Use:
    """One call of a layer: which tensor is its weight, and the layer as a runtime meets it."""

    weight: str
    layer: Layer
    is_turned: bool = False  # the weight is stored (out, in) but the runtime's matrix is (in, out)

    def widths(self, shape: Sequence[int]) -> tuple[int, int]:
        """(in, out) channels of the layer when its weight has this shape; of a grouped layer, (in per group, out)."""
        if self.layer.kind == "conv":
            return shape[1], shape[0]
        if self.layer.kind == "transposed":
            return shape[0] // self.layer.groups, shape[1] * self.layer.groups
        return (shape[1], shape[0]) if self.is_turned else (shape[0], shape[1])


@dataclass(frozen=True)
class Table:
    """Milliseconds over a grid of widths; between its points, and below the first, on straight lines."""

    ins: tuple[int, ...]
    outs: tuple[int, ...]
    ms: tuple[tuple[float, ...], ...]  # by `ins`, then by `outs`

    def __call__(self, in_channels: int, out_channels: int) -> float:
        low, high, share = _between(self.ins, in_channels)
        left, right, part = _between(self.outs, out_channels)
        first = self.ms[low][left] * (1 - part) + self.ms[low][right] * part
        last = self.ms[high][left] * (1 - part) + self.ms[high][right] * part
        return first * (1 - share) + last * share


def _between(grid: Sequence[int], width: int) -> tuple[int, int, float]:
    """The places of the grid's points around `width`, and how far it is from the first to the second, 0 to 1."""
    place = bisect_right(grid, width)
    if place in (0, len(grid)):
        at = min(place, len(grid) - 1)
        return at, at, 0.0
    low, high = grid[place - 1], grid[place]
    return place - 1, place, (width - low) / (high - low)


def grid(size: int, unit: int) -> tuple[int, ...]:
    """The widths at which an axis of `size` channels is timed, ascending, `size` the last.

    Multiples of `unit` (the vector unit's channels), all or STEPS of them spread evenly, each with the width a quarter
    unit above the multiple before: where the stairs of a runtime's blocks begin. Below one unit its quarters. Widths
    that are no multiple of a quarter are priced as their neighbours, though a runtime may take a slower way for them.
    """
    count = size // unit
    chosen = sorted({round(count * (step + 1) / STEPS) * unit for step in range(STEPS)} - {0})
    points = {quarter * unit // 4 for quarter in (1, 2, 3)} | {m - unit + unit // 4 for m in chosen} | {*chosen, size}
    return tuple(sorted(point for point in points if 0 < point <= size))


def uses(model: nn.Module, example: Example, *, batch: int) -> tuple[Use, ...]:
    """Every convolution and matrix product with a weight, as one forward pass in evaluation mode meets them."""
    recorder = _Recorder(model, len(arguments(example)[0]), batch)
    watch(model, example, recorder)
    return tuple(recorder.found)


def price(
    model: nn.Module,
    groups: Sequence[Group],
    example: Example,
    *,
    on: On,
    dense_ms: float,
    on_progress: Callable[[int, int], None] | None = None,
) -> Times:
    """Time every layer at the widths that the groups can take; what is in the cache is not timed again.

    Args:
        model: the dense network, left as it was.
        on: runtime, threads and batch.
        dense_ms: the latency of the whole dense network there.
        on_progress: gets the number of layers timed so far and of all to be timed.

    Returns: for each weight's name a function from the weight's shape to milliseconds. At the dense shapes they add up
        to `dense_ms`.
    """
    called = uses(model, example, batch=on.batch)
    shapes = {name: tuple(t.shape) for name, t in tensors(model).items()}
    free = {(part.name, part.dim) for group in groups if group.frozen is None for part in group.slices}
    plans = {use: _plan(use, shapes[use.weight], free) for use in called}
    wanted = dict.fromkeys(layer for points in plans.values() for row in points.layers for layer in row)
    known = _timed(list(wanted), on, on_progress)
    tables = {
        use: Table(points.ins, points.outs, tuple(tuple(known[layer] for layer in row) for row in points.layers))
        for use, points in plans.items()
    }
    return _times(called, tables, shapes, dense_ms)


@dataclass(frozen=True)
class _Points:
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    layers: tuple[tuple[Layer, ...], ...]


def _plan(use: Use, shape: tuple[int, ...], free: set[tuple[str, int]]) -> _Points:
    """Which layers to time for one use: an axis that no group can cut has one width."""
    unit, layer = machine.vector_block(), use.layer
    inner, outer = use.widths(shape)
    if layer.groups > 1:  # whole groups leave; where each gets narrower instead, time falls in proportion
        each = layer.out_channels // layer.groups
        counts = tuple(dict.fromkeys(max(1, width // each) for width in grid(outer, max(unit, each))))
        rows = tuple(
            replace(layer, groups=n, in_channels=layer.in_channels // layer.groups * n, out_channels=n * each)
            for n in counts
        )
        return _Points((inner,), tuple(n * each for n in counts), (rows,))
    first = {"conv": 1, "transposed": 0, "matmul": 1 if use.is_turned else 0}[layer.kind]
    ins = grid(inner, unit) if (use.weight, first) in free else (inner,)
    outs = grid(outer, unit) if (use.weight, 1 - first) in free else (outer,)
    layers = tuple(tuple(replace(layer, in_channels=i, out_channels=o) for o in outs) for i in ins)
    return _Points(ins, outs, layers)


def _times(
    called: Sequence[Use], tables: Mapping[Use, Table], shapes: Mapping[str, tuple[int, ...]], dense_ms: float
) -> Times:
    """Tables -> one function per weight; the rest of the dense latency in proportion to the layers' outputs."""
    of_weight: dict[str, list[Use]] = defaultdict(list)
    for use in called:
        of_weight[use.weight].append(use)
    alone = sum(tables[use](*use.widths(shapes[use.weight])) for use in called)
    outputs = sum(math.prod(use.layer.places) * use.layer.out_channels for use in called)
    # Layers alone may take longer than in the network, where one writes what the next finds in the cache.
    scale = min(1.0, dense_ms / alone)
    each = (dense_ms - alone * scale) / outputs

    def of(name: str, mine: Sequence[Use]) -> Callable[[tuple[int, ...]], float]:
        whole = shapes[name]

        @cache
        def milliseconds(shape: tuple[int, ...]) -> float:
            total = 0.0
            for use in mine:
                inner, outer = use.widths(shape)
                narrower = inner / use.widths(whole)[0] if use.layer.groups > 1 else 1.0
                beside = each * math.prod(use.layer.places) * outer
                total += scale * narrower * tables[use](inner, outer) + beside
            return total

        return milliseconds

    return {name: of(name, mine) for name, mine in of_weight.items()}


# --- the cache --------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """COMPRESS_CACHE, or compress/ in XDG_CACHE_HOME, or ~/.cache/compress."""
    own, shared = os.environ.get("COMPRESS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "compress"


def _timed(layers: Sequence[Layer], on: On, on_progress: Callable[[int, int], None] | None) -> dict[Layer, float]:
    """The milliseconds of each layer: from the machine's file, else measured and added to it."""
    file = cache_folder() / f"layers-{on.runtime}-threads{on.threads}-{_machine()}.json"
    kept: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    missing = [layer for layer in layers if _key(layer) not in kept]
    if missing:
        times = time_layers(missing, threads=on.threads, runtime=on.runtime, on_progress=on_progress)
        kept |= {_key(layer): ms for layer, ms in zip(missing, times, strict=True)}
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, json.dumps(kept))
    return {layer: kept[_key(layer)] for layer in layers}


def _key(layer: Layer) -> str:
    return json.dumps(list(asdict(layer).values()), separators=(",", ":"))


def _machine() -> str:
    """What times depend on: the processor and the versions of the runtimes."""
    described = machine.describe()
    versions = [machine.package_version(name) for name in ("onnxruntime", "onnxruntime-gpu", "openvino")]
    facts = [FORMAT, described["cpu"], described["cores"], described["gpus"], versions]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


# --- reading a network ------------------------------------------------------------------------------------------------

aten = torch.ops.aten


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every convolution and matrix product whose weight is one of the network's tensors."""

    def __init__(self, model: nn.Module, images: int, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[Use] = []
        self._names = matrices(model)
        self._shapes = {name: tuple(t.shape) for name, t in tensors(model).items()}
        self._images, self._batch = images, batch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.convolution.default and args[1].data_ptr() in self._names:
            self.found.append(self._convolution(args))
        elif func in (aten.addmm.default, aten.mm.default):
            given, weight = args[-2:]
            if weight.data_ptr() in self._names:
                self.found.append(self._product(given, weight))
        return func(*args, **(kwargs or {}))

    def _convolution(self, args: Sequence[Any]) -> Use:
        given, weight, _, stride, padding, dilation, transposed, _, groups = args
        rest = (tuple(given.shape[2:]), tuple(weight.shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
        outer = weight.shape[1] * groups if transposed else weight.shape[0]
        kind: Any = "transposed" if transposed else "conv"
        return Use(self._names[weight.data_ptr()], Layer(kind, given.shape[1], outer, *rest, groups, self._batch))

    def _product(self, given: Tensor, weight: Tensor) -> Use:
        name, (inner, outer) = self._names[weight.data_ptr()], weight.shape
        layer = Layer("matmul", inner, outer, (given.shape[0] // self._images,), batch=self._batch)
        return Use(name, layer, is_turned=weight.stride(0) == 1 and self._shapes[name] == (outer, inner))
