"""compress eval: how good a checkpoint or an ONNX file is on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from compress.checkpoint import ModelInfo
    from compress.data import Data, Loader, Split

BATCH = 256  # images at a time; the result does not depend on it


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL|FILE.onnx", help="Checkpoint or ONNX file")],
    data: options.Data = None,
    split: Annotated[str | None, typer.Option("--split", help="test, val or train; default: test, else val")] = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    input_size: options.InputSize = None,
    seed: options.Seed = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure top-1 and cross-entropy on a split, in float32; ONNX files by ONNX Runtime."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress.errors import UsageError

    if split not in (None, "test", "val", "train"):
        raise UsageError(f"--split {split} is unknown; there are test, val and train")
    measure = _onnx if model.suffix == ".onnx" else _checkpoint
    found = measure(model, {
        "data": data, "split": split, "arch": arch, "arch_arg": arch_arg or [], "side": input_size, "seed": seed or 0,
        "device": device or "auto",
    })  # fmt: skip
    view.note(
        f"{model}: top-1 {found['top1']:.2f} %, loss {found['loss']:.4f} on {found['split']} of {found['data']} "
        f"({found['images']:,} images, by {found['by']})"
    )
    if as_json:
        view.document({"model": str(model), **found})


def _checkpoint(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    from compress import data, train
    from compress.cli import arch as architectures
    from compress.cli import load
    from compress.inputs import image_shape, normalisation

    network, info, _ = load.network(path, asked["arch"], architectures.parse_arch_args(asked["arch_arg"]))
    if asked["side"] or info.input_size is None:
        info = info.model_copy(update={"input_size": image_shape(network, info, asked["side"])})
    info, loaded, name, split = _split(info, asked)
    device = train.accelerator(asked["device"], "fp32")
    mean, std = normalisation(info)
    batches = data.loader(split, batch_size=BATCH, mean=mean, std=std, train=False, device=device.device)
    with view.working(f"running {len(split):,} images through torch"):
        top1, loss = train.evaluate(network.to(device.device), batches, device=device)
    return {"top1": top1, "loss": loss, "split": name, "images": len(split), "data": loaded.name, "by": "torch"}


def _onnx(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    from compress import data
    from compress.errors import UsageError
    from compress.inputs import normalisation, onnx_info

    if asked["arch"] or asked["arch_arg"]:
        raise UsageError(f"--arch is for checkpoints; {path} holds its network: leave it out")
    info, fixed = onnx_info(path, asked["side"])
    info, loaded, name, split = _split(info, asked)
    mean, std = normalisation(info)
    batches = data.loader(split, batch_size=fixed or BATCH, mean=mean, std=std, train=False)
    with view.working(f"running {len(split):,} images through ONNX Runtime"):
        top1, loss = _score(path, batches, fixed)
    return {"top1": top1, "loss": loss, "split": name, "images": len(split), "data": loaded.name, "by": "ONNX Runtime"}


def _score(path: Path, batches: Loader, fixed: int | None) -> tuple[float, float]:
    """Top-1 in percent and mean cross-entropy; a last batch that a fixed file would refuse is filled up."""
    import torch

    from compress.export import predict

    labels: list[torch.Tensor] = []

    def images() -> Any:
        for x, y in batches:
            labels.append(y)
            yield x if fixed in (None, len(x)) else x[torch.arange(fixed or 0) % len(x)]

    outputs = [torch.from_numpy(output) for output in predict(path, images())]
    logits = torch.cat([output[: len(y)].float() for output, y in zip(outputs, labels, strict=True)])
    target = torch.cat(labels)
    loss = torch.nn.functional.cross_entropy(logits, target)
    return 100 * int((logits.argmax(1) == target).sum()) / len(target), float(loss)


def _split(info: ModelInfo, asked: dict[str, Any]) -> tuple[ModelInfo, Data, str, Split]:
    """The data set, the split, and what is known of the network with the normalisation filled in."""
    from compress.fit import complete
    from compress.inputs import choose, load_data

    with view.working("loading the data"):
        loaded = load_data(info, asked["data"], seed=asked["seed"])
    name, split = choose(loaded, asked["split"])
    if info.mean is None or info.std is None:
        view.note("normalisation: the file says none; measured on the training images of the data")
    if info.labels and loaded.labels != info.labels:
        view.note("the classes of the data are not named as those of the network: their order may differ")
    if name == "val":
        view.note(*[note for note in loaded.notes if note.startswith("val:")][:1] or ["val: as the data set gives it"])
    return complete(info, loaded), loaded, name, split
