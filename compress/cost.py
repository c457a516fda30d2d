"""What a network costs, tensor by tensor, and what it would cost at other widths; no forward pass per question.

Every cost here is a sum over tensors. For parameters, MACs and bytes a tensor costs (price of one element) * (number of
elements): a width enters the number of elements of each tensor that a group's slices name, so that the cost at any
widths is a polynomial in them, evaluated in microseconds. For latency a tensor costs what was measured of its layer at
such a shape (prices.py). MACs: one multiply-add, per image.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import PruneError, UsageError
from compress.example import Example, arguments, fitting, shapes
from compress.groups import Group
from compress.structure import tensors

Metric = Literal["params", "macs", "size", "latency"]
# what can be counted; `latency` (milliseconds) has to be measured: compress.price
METRICS: dict[Metric, str] = {
    "params": "learned parameters",
    "macs": "multiply-adds per image",
    "size": "bytes: of the weights here, of the whole ONNX file in a run",
}


# a weight's name -> its shape -> the milliseconds of its layer
Times = Mapping[str, Callable[[tuple[int, ...]], float]]


@dataclass(frozen=True)
class Costs:
    """The shape of every tensor and what it costs by metric: the price of one of its elements, or its layer's time."""

    shapes: Mapping[str, tuple[int, ...]]
    prices: Mapping[Metric, Mapping[str, float]]
    fixed: Mapping[Metric, float]  # what belongs to no tensor: products of two activations
    unknown: tuple[str, ...]  # operators with multiply-adds that are not counted
    times: Times = field(default_factory=dict)  # empty unless layers were measured: compress.price

    def total(self, metric: Metric) -> float:
        """The cost of the network as it stands: a count, MACs per image, bytes, or milliseconds."""
        return self.fixed.get(metric, 0.0) + sum(
            self.at(metric, name, self.shapes[name]) for name in self.names(metric)
        )

    def names(self, metric: Metric) -> Collection[str]:
        """The tensors that cost something.

        Raises:
            UsageError: the metric is `latency` and nothing has been measured.
        """
        if metric != "latency":
            return self.prices[metric]
        if not self.times:
            raise UsageError("the metric latency needs measured layers; give measure(...) the times of compress.price")
        return self.times.keys() & self.shapes.keys()

    def at(self, metric: Metric, name: str, shape: tuple[int, ...]) -> float:
        """What a tensor would cost at another shape."""
        return self.times[name](shape) if metric == "latency" else self.prices[metric][name] * math.prod(shape)


def measure(model: nn.Module, example: Example) -> Costs:
    """Price every tensor of a network by one forward pass in evaluation mode.

    Args:
        model: left as it was. On the CPU or a GPU.
        example: (N, C, H, W), or a tuple of several inputs; MACs are divided by N.

    Raises:
        PruneError: the network does not run on `example`.
    """
    state = _once(model)
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    folded = _folded(model)
    counter = _MacCounter(matrices(model), len(arguments(example)[0]))
    watch(model, example, counter)
    return Costs(
        shapes={name: tuple(t.shape) for name, t in state.items()},
        prices={
            "params": {name: 1.0 for name in state if name in learned},
            "size": {
                name: float(t.element_size())
                for name, t in state.items()
                if t.is_floating_point() and name not in folded
            },
            "macs": dict(counter.prices),
        },
        fixed={"params": 0.0, "size": 0.0, "macs": counter.fixed},
        unknown=tuple(sorted(counter.unknown)),
    )


def watch(model: nn.Module, example: Example, watcher: TorchDispatchMode) -> None:
    """One forward pass in evaluation mode, every operator of which `watcher` sees.

    Raises:
        PruneError: the network does not run on `example`.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), watcher:
            model(*fitting(example, model))
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise PruneError(f"the network does not run on shape {shapes(example)}: {error}") from error
    finally:
        model.train(was_training)


def matrices(model: nn.Module) -> dict[int, str]:
    """Where each weight of two dimensions or more lies in memory -> its name, the first where several share it."""
    return {tensor.data_ptr(): name for name, tensor in _once(model).items() if tensor.dim() > 1}


def _once(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor under the first of its names: tied weights cost once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors(model).items():
        if id(tensor) not in seen:
            found[name] = tensor
            seen.add(id(tensor))
    return found


def _folded(model: nn.Module) -> set[str]:
    """What an exported file does not hold of batch norms: all but one vector, folded into the layer before."""
    norms = (name for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return {f"{name}.{leaf}" for name in norms for leaf in ("weight", "running_mean", "running_var")}


def by_layer(costs: Costs, metric: Metric) -> dict[str, float]:
    """The cost of every layer (the owner of the tensors) by its path."""
    layers: dict[str, float] = defaultdict(float)
    for name in costs.names(metric):
        layers[name.rpartition(".")[0]] += costs.at(metric, name, costs.shapes[name])
    return dict(layers)


class Widths:
    """The cost of a network as a function of how many channels each group keeps."""

    def __init__(self, groups: Sequence[Group], costs: Costs, metric: Metric) -> None:
        dims: dict[str, list[list[tuple[str, int]]]] = {}  # tensor -> axis -> (group, indices per channel)
        priced = costs.names(metric)
        for group in groups:
            for part in group.slices:
                if part.name in priced:
                    axes = dims.setdefault(part.name, [[] for _ in costs.shapes[part.name]])
                    axes[part.dim].append((group.name, part.block))
        self.metric = metric
        self.size = {group.name: group.size for group in groups}
        self.kept = dict(self.size)
        self._costs = costs
        self._dims = dims
        self._tensors: dict[str, list[str]] = defaultdict(list)
        for name, axes in dims.items():
            for group_name in {found for axis in axes for found, _ in axis}:
                self._tensors[group_name].append(name)
        self._rest = costs.total(metric) - sum(self._cost(name) for name in dims)

    def total(self) -> float:
        """The whole network's cost at the widths in `kept`."""
        return self._rest + sum(self._cost(name) for name in self._dims)

    def change(self, group: str, kept: int) -> float:
        """By how much the total falls when `group` keeps `kept` channels and all others stay as they are."""
        before = sum(self._cost(name) for name in self._tensors[group])
        old, self.kept[group] = self.kept[group], kept
        after = sum(self._cost(name) for name in self._tensors[group])
        self.kept[group] = old
        return before - after

    def neighbours(self, group: str) -> set[str]:
        """The groups whose prices change when this one's width does."""
        return {found for name in self._tensors[group] for axis in self._dims[name] for found, _ in axis}

    def _cost(self, name: str) -> float:
        shape = tuple(
            full - sum(block * (self.size[group] - self.kept[group]) for group, block in axis)
            for full, axis in zip(self._costs.shapes[name], self._dims[name], strict=True)
        )
        return self._costs.at(self.metric, name, shape)


# --- multiply-adds, operator by operator ----------------------------------------------------------------------------


def _conv(args: Sequence[Any], out: Tensor) -> tuple[Tensor | None, float]:
    """Convolution: each weight is used once per output place, or once per input place when transposed."""
    places = args[0].shape[2:] if args[6] else out.shape[2:]
    return args[1], float(out.shape[0] * math.prod(places))


def _addmm(args: Sequence[Any], out: Tensor) -> tuple[Tensor | None, float]:
    return args[2], float(args[1].shape[0])  # (rows, I) @ (I, O): each weight once per row


def _mm(args: Sequence[Any], out: Tensor) -> tuple[Tensor | None, float]:
    return args[1], float(args[0].shape[0])


def _bmm(args: Sequence[Any], out: Tensor) -> tuple[Tensor | None, float]:
    return args[1], float(args[0].shape[1])


aten = torch.ops.aten
_MACS: dict[Any, Callable[[Sequence[Any], Tensor], tuple[Tensor | None, float]]] = {
    aten.convolution.default: _conv,
    aten.addmm.default: _addmm,
    aten.mm.default: _mm,
    aten.bmm.default: _bmm,
}
_UNCOUNTED = ("einsum", "lstm", "gru", "rnn", "cdist", "grid_sampler", "attention", "baddbmm", "matmul")


class _MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, for each weight, how many multiply-adds one of its elements takes part in per image."""

    def __init__(self, names: Mapping[int, str], images: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.prices: dict[str, float] = defaultdict(float)
        self.fixed = 0.0
        self.unknown: set[str] = set()
        self._names = names
        self._images = images

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        rule = _MACS.get(func)
        if rule is not None:
            weight, uses = rule(args, out)
            assert weight is not None
            name = self._names.get(weight.data_ptr())
            if name is None:  # a weight made on the way, or a second activation: no tensor to price
                self.fixed += uses * weight.numel() / self._images
            else:
                self.prices[name] += uses / self._images
        elif any(word in str(func) for word in _UNCOUNTED):
            self.unknown.add(str(func))
        return out
