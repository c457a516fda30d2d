"""compress sensitivity: what a network loses when each group of channels is cut alone, at several widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compress.checkpoint import ModelInfo
    from compress.data import Split
    from compress.task import Task

BATCH = 128  # images at a time
NOISE = "These are random images: no group's figure says more than how strongly the outputs react to noise."


@dataclass(frozen=True)
class Images:
    """What a network is judged on, and what its batch norms are measured on."""

    judged: list[tuple[Tensor, Tensor | None]]
    calibration: list[tuple[Tensor, Tensor | None]]
    data: str
    split: str | None = None  # None: no labels
    remark: str = ""
    task: Task | None = None  # what those with labels are judged by


def sensitivity(
    model: options.Model,
    data: Annotated[
        str | None, typer.Option("--data", help="As for prune, or a folder of images without labels")
    ] = None,
    widths: Annotated[
        str, typer.Option("--widths", metavar="SHARE,...", help="Of each group's channels, above 0 and below 1")
    ] = "0.25,0.5,0.75",
    score: Annotated[str, typer.Option("--score", help="Which channels stay: see `compress methods`")] = "l2",
    images: Annotated[int, typer.Option("--images", min=1, help="To judge on, and as many to calibrate on")] = 512,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="For prune.sensitivity")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.html", help="Curves and figures")] = None,
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
    """Cut each group of channels alone to several widths; measure metric (top-1), loss and how far the outputs move."""
    view.set_up(quiet=quiet, verbose=verbose)
    import json

    from compress import train
    from compress.cli import arch as architectures
    from compress.cli import load, user_code
    from compress.errors import UsageError
    from compress.files import atomic_write
    from compress.inputs import image_shape
    from compress.sensitivities import sensitivity as measure
    from compress.task import CLASSIFICATION

    shares = _shares(widths)
    for path in (out, plot):
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.parent}; make it first")
    network, info, source = load.network(model, arch, architectures.parse_arch_args(arch_arg or []))
    info = info.model_copy(update={"input_size": image_shape(network, info, input_size)})
    with view.working("loading the images"):
        taken = _without_labels(info, data, images, seed or 0) or _labelled(
            network, info, data, images, seed or 0, user_code.task(task, info.task)
        )
    network = network.to(train.accelerator(device or "auto", "fp32").device)
    with view.counting("tracing, then cutting group by group") as show:
        found = measure(
            network,
            taken.judged,
            calibration=taken.calibration,
            task=taken.task or CLASSIFICATION,
            score=score,
            widths=shares,
            on_progress=show,
        )
    named = {"model": str(model), "sha256": source.sha256, "arch": info.arch, "data": taken.data}
    document = {**named, "split": taken.split, "remark": taken.remark, **found.model_dump(mode="json")}
    _show(document, shares)
    if out is not None:
        atomic_write(out, json.dumps(document, indent=1) + "\n")
        view.note(f"for select: {out}; e.g. compress prune {model} --set prune.sensitivity={out}")
    if plot is not None:
        from compress.report.curves import sensitivity_page

        atomic_write(plot, sensitivity_page(document))
        view.note(f"plot: {plot}")
    if as_json:
        view.document(document)


def _shares(text: str) -> list[float]:
    from compress.errors import UsageError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--widths {text}: give shares with commas between them, such as 0.25,0.5,0.75") from error


def _without_labels(info: ModelInfo, source: str | None, count: int, seed: int) -> Images | None:
    """A folder without labels, or noise for want of any data; None where the data should have labels."""
    import torch

    from compress import data
    from compress.inputs import noise

    assert info.input_size is not None
    if source is None and info.data is None:
        view.note(f"no --data, and the file names none. {NOISE}")
        held: list[tuple[Tensor, Tensor | None]] = [
            (x, None) for x in torch.split(noise(info.input_size, count), BATCH)
        ]
        return Images(held, held, "random images", remark=NOISE)
    if source is None or not data.is_unlabelled(source):
        return None
    split = data.unlabelled(source, info.input_size, count=count)
    view.note(f"{source} holds images without labels: the distortion of the outputs is measured")
    if info.mean is None or info.std is None:
        mean, std = data.statistics(split)
        info = info.model_copy(update={"mean": mean, "std": std})
        view.note("normalisation: the file says none; measured on these images")
    held = [(x, None) for x, _ in _batches(info, split, count, seed)]
    return Images(held, held, source)


def _labelled(network: nn.Module, info: ModelInfo, source: str | None, count: int, seed: int, task: Task) -> Images:
    """Images and what they should give: judged on val, calibrated on train."""
    from compress.fit import complete
    from compress.inputs import example, load_data
    from compress.train import check_data, check_output

    loaded = load_data(info, source, seed=seed)
    check_data(task, loaded)
    check_output(network, example(info, loaded.val, 1), task, loaded.labels)
    info = complete(info, loaded)
    val = _batches(info, loaded.val, count, seed)
    calibration = _batches(info, loaded.train, count, seed) if len(loaded.train) else val
    return Images(val, calibration, loaded.name, "val", task=task)


def _batches(info: ModelInfo, split: Split, count: int, seed: int) -> list[tuple[Tensor, Tensor | None]]:
    """At most `count` images of a split, drawn by the seed, in memory."""
    import numpy as np

    from compress import data
    from compress.inputs import normalisation

    rows = np.sort(np.random.default_rng(seed).permutation(len(split))[:count]).astype(np.int64)
    mean, std = normalisation(info)
    return list(data.loader(split.subset(rows, split.name), batch_size=BATCH, mean=mean, std=std, train=False))


def _show(found: Mapping[str, Any], shares: list[float]) -> None:
    from compress.report.words import metric_words

    dense = found["dense"]
    is_labelled = found["metric"] is not None
    name_of = metric_words(found["metric"] or "")
    what = f"change of {name_of} in points, loss" if is_labelled else "distortion of the outputs"
    on = f"{found['images']:,} images of {found['data']}"
    if is_labelled:
        on = f"{on} ({found['split']}); uncut: {name_of} {dense['value']:.2f} %, loss {view.figure(dense['loss'])}"
    rows = []
    for name, curve in found["groups"].items():
        cells = {
            width["keep"]: f"{width['value'] - dense['value']:+.2f}, {view.figure(width['loss'])}"
            if is_labelled
            else view.figure(width["distortion"])
            for width in curve["widths"]
        }
        rows.append((name, str(curve["size"]), *(cells.get(share, "") for share in sorted(shares))))
    header = ("group", "channels", *(f"{share:g} kept" for share in sorted(shares)))
    view.table(f"{what}, when one group is cut", header, rows)
    view.note(f"judged on {on}; batch norms measured anew on {found['calibration_images']:,} images, uncut ones too")
