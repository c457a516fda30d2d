"""compress eval: how good a checkpoint or an ONNX file is on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from compress.checkpoint import ModelInfo
    from compress.data import Data, Loader, Split
    from compress.task import Task

BATCH = 256  # images at a time; the result does not depend on it


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL|FILE.onnx", help="Checkpoint or ONNX file")],
    data: options.Data = None,
    split: Annotated[str | None, typer.Option("--split", help="test, val or train; default: test, else val")] = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    task: options.Task = None,
    input_size: options.InputSize = None,
    seed: options.Seed = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure the task's metric (top-1) and loss on a split, in float32; ONNX files by ONNX Runtime."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress.errors import UsageError
    from compress.report.words import metric_words

    if split not in (None, "test", "val", "train"):
        raise UsageError(f"--split {split} is unknown; there are test, val and train")
    measure = _onnx if model.suffix == ".onnx" else _checkpoint
    found = measure(model, {
        "data": data, "split": split, "arch": arch, "arch_arg": arch_arg or [], "side": input_size, "seed": seed or 0,
        "device": device or "auto", "task": task,
    })  # fmt: skip
    reached = f"{metric_words(found['metric']['name'])} {found['metric']['value']:.2f} %"
    view.note(
        f"{model}: {reached}, loss {found['loss']:.4f} on {found['split']} of {found['data']} "
        f"({found['images']:,} images, by {found['by']})"
    )
    if as_json:
        view.document({"model": str(model), **found})


def _checkpoint(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    from compress import data, train
    from compress.cli import arch as architectures
    from compress.cli import load, user_code
    from compress.inputs import example, image_shape, normalisation
    from compress.task import reported

    network, info, _ = load.network(path, asked["arch"], architectures.parse_arch_args(asked["arch_arg"]))
    if asked["side"] or info.input_size is None:
        info = info.model_copy(update={"input_size": image_shape(network, info, asked["side"])})
    task = user_code.task(asked["task"], info.task)
    info, loaded, name, split = _split(info, asked, task)
    train.check_output(network, example(info, split, 1), task, loaded.labels)
    device = train.accelerator(asked["device"], "fp32")
    mean, std = normalisation(info)
    batches = data.loader(split, batch_size=BATCH, mean=mean, std=std, train=False, device=device.device)
    with view.working(f"running {len(split):,} images through torch"):
        value, loss = train.evaluate(network.to(device.device), batches, device=device, task=task)
    found = {"loss": loss, "split": name, "images": len(split), "data": loaded.name, "by": "torch"}
    return {**reported(task, value), "task": task.name, **found}


def _onnx(path: Path, asked: dict[str, Any]) -> dict[str, Any]:
    from compress import data
    from compress.cli import user_code
    from compress.errors import UsageError
    from compress.inputs import normalisation, onnx_info
    from compress.task import reported

    if asked["arch"] or asked["arch_arg"]:
        raise UsageError(f"--arch is for checkpoints; {path} holds its network: leave it out")
    info, fixed = onnx_info(path, asked["side"])
    task = user_code.task(asked["task"], info.task)
    info, loaded, name, split = _split(info, asked, task)
    mean, std = normalisation(info)
    batches = data.loader(split, batch_size=fixed or BATCH, mean=mean, std=std, train=False)
    with view.working(f"running {len(split):,} images through ONNX Runtime"):
        value, loss = _score(path, batches, fixed, task)
    found = {"loss": loss, "split": name, "images": len(split), "data": loaded.name, "by": "ONNX Runtime"}
    return {**reported(task, value), "task": task.name, **found}


def _score(path: Path, batches: Loader, fixed: int | None, task: Task) -> tuple[float, float]:
    """The task's metric in percent and its mean loss; a last batch that a fixed file would refuse is filled up."""
    import torch

    from compress.export import predict

    asked: list[Any] = []  # the targets of the batches that are on their way

    def images() -> Any:
        for batch in batches:
            x, targets = task.unpack(batch)
            asked.append(targets)
            yield x if fixed in (None, len(x)) else x[torch.arange(fixed or 0) % len(x)]

    counts, loss, total = torch.zeros((), dtype=torch.float64), 0.0, 0
    for output in predict(path, images()):
        targets = asked.pop()
        size = task.size(targets)
        logits = task.logits(torch.from_numpy(output)[:size]).float()
        counts = counts + task.count(logits, targets)
        loss, total = loss + float(task.loss(logits, targets)) * size, total + size
    return task.value(counts), loss / total


def _split(info: ModelInfo, asked: dict[str, Any], task: Task) -> tuple[ModelInfo, Data, str, Split]:
    """The data set, the split, and what is known of the network with the normalisation filled in."""
    from compress.fit import complete
    from compress.inputs import choose, load_data
    from compress.train import check_data

    with view.working("loading the data"):
        loaded = load_data(info, asked["data"], seed=asked["seed"])
    check_data(task, loaded)
    name, split = choose(loaded, asked["split"])
    if info.mean is None or info.std is None:
        view.note("normalisation: the file says none; measured on the training images of the data")
    if info.labels and loaded.labels != info.labels:
        view.note("the classes of the data are not named as those of the network: their order may differ")
    if name == "val":
        view.note(*[note for note in loaded.notes if note.startswith("val:")][:1] or ["val: as the data set gives it"])
    return complete(info, loaded), loaded, name, split
