"""compress inspect: what a network consists of, what can be cut from it, and how far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from torch import nn

    from compress.cost import Costs
    from compress.groups import Group

SMALL = 0.001  # of the metric: layers below it that also do no multiply-adds are summed up in one row


def inspect(
    model: Annotated[
        Optional[Path],  # noqa: UP045  typer reads annotations at run time
        typer.Argument(metavar="[MODEL]", help="Checkpoint or a transformers folder; without, --arch as it is built"),
    ] = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    input_size: options.InputSize = None,
    metric: Annotated[str, typer.Option("--metric", help="params, macs or size: what the shares are of")] = "params",
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show layers, channel groups, what is frozen and why, and the lowest targets within reach."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress import cost
    from compress.cli import arch as architectures
    from compress.cli import load
    from compress.errors import LoadError, UsageError
    from compress.inputs import image_shape
    from compress.structure import removed

    if metric not in cost.METRICS:
        raise UsageError(f"--metric {metric} is unknown; there are {', '.join(cost.METRICS)}")
    if model is not None and model.suffix == ".onnx":
        raise LoadError(f"{model} is an ONNX file: inspect the checkpoint it was made from, or use eval and bench")
    began = time.perf_counter()
    network, info, source = load.any_network(model, arch, architectures.parse_arch_args(arch_arg or []))
    seconds = time.perf_counter() - began
    shape = image_shape(network, info, input_size)
    weights = source.path if source is not None else "weights as they are drawn"
    about = f"images of {' x '.join(map(str, shape))}{', pruned' * info.pruned}"
    view.note(f"{weights}: {info.arch}, {about}" + (info.task and f", for {info.task}"))
    gone = list(removed(network))
    if gone:
        view.note(f"left as a whole: {', '.join(gone)}")
    found = _examine(network, shape, metric)
    view.note(f"loaded in {view.figure(seconds)} s, traced in {view.figure(found['seconds']['trace'])} s")
    if as_json:
        file = {"model": str(model or source.path), "sha256": source.sha256} if source else {"model": None}
        names = {**file, "arch": info.arch, "arch_kwargs": info.arch_kwargs, "task": info.task}
        found["seconds"]["load"] = seconds
        view.document({**names, "input_size": list(shape), "pruned": info.pruned, "gone": gone, **found})


def _examine(network: nn.Module, shape: tuple[int, int, int], metric: str) -> dict[str, Any]:
    """Price and trace the network, showing each finding at once: tracing may fail where the layers are still of use."""
    from compress import cost
    from compress.bench.machine import vector_block
    from compress.groups import trace
    from compress.inputs import noise

    example, block = noise(shape, 1), vector_block()
    costs = cost.measure(network, example)
    layers = _layers(network, costs)
    _show_layers(layers, metric)
    began = time.perf_counter()
    with view.working("tracing and proving the channel groups"):
        groups = trace(network, example)
    seconds = time.perf_counter() - began
    reach = _reach(groups, costs, block)
    _show_groups(groups, costs)
    _show_reach(reach, block)
    return {
        **{name: row["total"] for name, row in reach.items()},
        "layers": layers,
        "groups": [_group(group) for group in groups],
        "frozen": {group.name: group.frozen for group in groups if group.frozen},
        "uncounted": list(costs.unknown),
        "lowest": {name: row["lowest"] for name, row in reach.items()},
        "lowest_in_blocks": {name: row["lowest_in_blocks"] for name, row in reach.items()},
        "block": block,
        "seconds": {"trace": seconds},
    }


def _layers(network: nn.Module, costs: Costs) -> list[dict[str, Any]]:
    """Every layer that holds tensors, in the order of registration, with its own params, MACs and bytes."""
    from compress import cost

    found = {metric: cost.by_layer(costs, metric) for metric in cost.METRICS}
    return [
        {"name": name, "kind": type(module).__name__, **{metric: int(found[metric].get(name, 0)) for metric in found}}
        for name, module in network.named_modules()
        if any(name in layers for layers in found.values())
    ]


def _group(group: Group) -> dict[str, Any]:
    return {"name": group.name, "size": group.size, "slices": len(group.slices), "frozen": group.frozen}


def _reach(groups: Sequence[Group], costs: Costs, block: int) -> dict[str, dict[str, float]]:
    """Per metric the total, and the lowest share that is left with any widths and with multiples of `block`."""
    from compress import cost
    from compress.reach import lowest

    return {
        metric: {
            "total": costs.total(metric),
            "lowest": lowest(groups, costs, metric),
            "lowest_in_blocks": lowest(groups, costs, metric, round_to=block),
        }
        for metric in cost.METRICS
    }


def _show_layers(layers: Sequence[dict[str, Any]], metric: str) -> None:
    total = max(1, sum(layer[metric] for layer in layers))
    large = [layer for layer in layers if layer["macs"] or layer[metric] >= SMALL * total]
    rest = [layer for layer in layers if layer not in large]
    summed = {key: sum(layer[key] for layer in rest) for key in ("params", "macs", metric)}
    shown = [*large, *([{"name": f"({len(rest)} more)", "kind": "", **summed}] if rest else [])]
    view.table(
        "layers",
        ("layer", "kind", "params", "MACs (M)", f"{metric} (%)"),
        [
            (
                layer["name"] or "(the network)",
                layer["kind"],
                f"{layer['params']:,}",
                view.figure(layer["macs"] / 1e6),
                view.figure(100 * layer[metric] / total),
            )
            for layer in shown
        ],
    )


def _show_groups(groups: Sequence[Group], costs: Costs) -> None:
    view.table(
        "channel groups: what is kept or removed together",
        ("group", "channels", "slices", "frozen, because"),
        [(group.name, str(group.size), str(len(group.slices)), group.frozen or "") for group in groups],
    )
    if costs.unknown:
        view.note(f"MACs not counted of: {', '.join(costs.unknown)}")


def _show_reach(reach: dict[str, dict[str, float]], block: int) -> None:
    names = {"params": "params", "macs": "MACs (M)", "size": "weights (kB)"}
    units = {"params": 1, "macs": 1e6, "size": 1e3}
    rows = []
    for metric, row in reach.items():
        total = row["total"] / units[metric]
        text = f"{total:,.0f}" if metric == "params" else view.figure(total)
        rows.append((names[metric], text, view.share(row["lowest"]), view.share(row["lowest_in_blocks"])))
    view.table("lowest --target within reach", ("metric", "now", "any widths", f"multiples of {block}"), rows)
