"""compress export: a checkpoint as an ONNX file that has been proved equal to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from torch import Tensor

    from compress.checkpoint import Checkpoint, ModelInfo
    from compress.cost import Costs
    from compress.export import Proof

PROVED = 17  # images, the largest batch of the proof


def export(
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", help="ONNX file to write")],
    data: options.Data = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    input_size: options.InputSize = None,
    opset: Annotated[int | None, typer.Option("--opset", min=11, help="Default: the exporter's own")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a checkpoint as ONNX and prove it equal to torch; a file that is not equal does not stay."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress import cost
    from compress.cli import arch as architectures
    from compress.cli import load
    from compress.errors import UsageError
    from compress.export import to_onnx
    from compress.inputs import image_shape

    if out.suffix != ".onnx":
        raise UsageError(f"--out {out} must end in .onnx")
    if out.exists() and not force:
        raise UsageError(f"{out} exists already; choose another --out or give --force")
    network, info, source = load.network(model, arch, architectures.parse_arch_args(arch_arg or []))
    info = info.model_copy(update={"input_size": image_shape(network, info, input_size)})
    info, images, about = _images(info, data)
    costs = cost.measure(network, images[:1])
    with view.working("exporting and proving"):
        proof = to_onnx(network, images, out, metadata=_metadata(info, source, costs), opset=opset)
    _show(out, about, proof)
    if as_json:
        view.document({
            "onnx": str(out), "size_bytes": out.stat().st_size, "params": int(costs.total("params")),
            "macs": int(costs.total("macs")), "inputs": about, "proof": proof.model_dump(mode="json"),
        })  # fmt: skip


def _show(out: Path, about: str, proof: Proof) -> None:
    view.note(
        f"{out}: proved equal to torch on {about}: max difference {proof.max_abs_diff:.1g} at outputs of "
        f"{proof.output_scale:.3g}, batches {', '.join(map(str, proof.batches))}"
    )
    view.note(
        f"{view.figure(out.stat().st_size / 1e3)} kB, {proof.exporter} exporter, opset {proof.opset}, "
        f"{proof.flushed:,} tiny weights set to zero"
    )


def _images(info: ModelInfo, source: str | None) -> tuple[ModelInfo, Tensor, str]:
    """What the proof runs on: real images when a data set can be had, else noise; and what to call it."""
    from compress.errors import DataError
    from compress.fit import complete
    from compress.inputs import example, load_data, noise

    assert info.input_size is not None
    if source is None and not info.data:
        return info, noise(info.input_size, PROVED), "noise (no --data is given and the file names none)"
    try:
        loaded = load_data(info, source)
    except DataError as error:
        if source is not None:
            raise
        view.note(f"no real images: {error}")
        return info, noise(info.input_size, PROVED), "noise (the data set that the file names cannot be loaded)"
    info = complete(info, loaded)
    return info, example(info, loaded.val, PROVED), f"images of {loaded.name}"


def _metadata(info: ModelInfo, source: Checkpoint, costs: Costs) -> dict[str, str]:
    """metadata_props: as `compress prune` writes them, as far as they are known here."""
    known = ("method", "target", "metric", "seed")
    origin: dict[str, Any] = {key: value for key, value in info.origin.items() if key in known}
    name = info.data if info.data and not Path(info.data).is_absolute() else ""  # a path is no use elsewhere
    values: dict[str, Any] = {
        **origin,
        "source_sha256": source.sha256,
        "arch": info.arch,
        "data": name,
        "task": info.task,
        "labels": list(info.labels or ()),
        "mean": list(info.mean or ()),
        "std": list(info.std or ()),
        "pruned" if info.pruned else "dense": {"params": costs.total("params"), "macs": costs.total("macs")},
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
