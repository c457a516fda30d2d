"""compress train: one of the architectures on a data set, from scratch or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoint import ModelInfo
    from compress.fit import Fitted

Text = Optional[str]  # noqa: UP045  typer reads annotations at run time
Number = Optional[float]  # noqa: UP045


def train(
    arch: Annotated[
        str,
        typer.Option(
            "--arch", help="resnet20 ..., timm:NAME, torchvision:NAME, hf:REPO_OR_DIR, pkg.module:f, file.py:f"
        ),
    ],
    data: Annotated[str, typer.Option("--data", help="digits, a folder, Parquet files, hf:NAME, pkg.module:function")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint to write: .pt or .safetensors")],
    init: Annotated[
        Path | None, typer.Option("--init", help="Start from these weights instead of from scratch")
    ] = None,
    arch_arg: options.ArchArg = None,
    task: options.Task = None,
    method: Annotated[
        Text, typer.Option("--method", help="A regulariser, e.g. ggr for sparse training: see `compress methods`")
    ] = None,
    density: Annotated[
        Number, typer.Option("--density", help="Share of the convolution weights that live, for ggr, rigl, set, ...")
    ] = None,
    regularize: Annotated[
        list[str] | None, typer.Option("--regularize", help="A further regulariser; may repeat")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A regulariser's option: ggr.interval=50")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 60,
    lr: Annotated[float, typer.Option("--lr", help="Peak rate of SGD, for batch 128")] = 0.1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2)] = 128,
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", min=0, max=0.99)] = 0.0,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=4, help="Pixels a side; default: the images' own")
    ] = None,
    val_share: Annotated[
        float, typer.Option("--val-share", help="Share of train held out where there is no val split, between 0 and 1")
    ] = 0.1,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, auto")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from OUT.state, left by an interrupted training")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a network on a data set and save it with everything that later commands need to know."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress import checkpoint, ranks
    from compress.cli import arch as architectures
    from compress.cli import user_code
    from compress.data import load as load_data
    from compress.errors import UsageError
    from compress.fit import fit
    from compress.inputs import channels_of
    from compress.pipeline import Event
    from compress.recipe import PrunePart
    from compress.report.words import metric_words, strength_words
    from compress.task import reported
    from compress.train import Settings

    if out.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"--out {out} must end in .pt or .safetensors")
    if ranks.first(out.exists) and not force:
        raise UsageError(f"{out} exists already; choose another --out or give --force")
    if not 0 < val_share < 1:
        raise UsageError(f"--val-share {val_share:g} is out of range; it must be above 0 and below 1")
    given = _regularizers([*([method] if method else []), *(regularize or [])], density, set_ or [])
    arch_args = architectures.parse_arch_args(arch_arg or [])
    wanted = user_code.task(task) if task else None  # before the data, which takes longer
    model, info = _network(arch, arch_args, init, seed)  # whose images have as many channels, whatever the classes
    loaded = load_data(data, image_size=image_size, channels=channels_of(model, info), val_share=val_share, seed=seed)
    if init is None:
        model, info = _network(arch, arch_args, None, seed, classes=len(loaded.labels))
    wanted = wanted or user_code.task(None, info.task)
    settings = Settings(
        task=wanted, epochs=epochs, lr=lr, label_smoothing=label_smoothing, keep_best=True, seed=seed,
        penalty_share=PrunePart().penalty_share,
    )  # fmt: skip
    state = out.with_suffix(".state")
    if ranks.is_first():
        if not resume and state.exists():
            view.hint(f"{state}, left by an interrupted training, is not used: --resume would go on from it")
            state.unlink()
        out.parent.mkdir(parents=True, exist_ok=True)
    with view.Live(wanted.metric) as live:
        fitted = fit(
            model, info, loaded, settings, batch_size=batch_size, device=device, regularize=given, state=state,
            on_progress=lambda progress: live.show(Event("train", progress=progress)),
        )  # fmt: skip
    save = checkpoint.save_pt if out.suffix == ".pt" else checkpoint.save
    origin: dict[str, Any] = {
        wanted.metric: fitted.top1, "split": fitted.split, "epochs": epochs, "seed": seed, "lr": lr,
    }  # fmt: skip
    if given:
        origin["regularize"] = {name: dict(own) for name, own in given.items()}
    if ranks.is_first():
        save(out, model, fitted.info.model_copy(update={"origin": {**fitted.info.origin, **origin}}))
        state.unlink(missing_ok=True)
    for strength in fitted.strengths:
        view.note(strength_words(strength))
    sparse = _sparsity(model, fitted)
    view.note(
        f"{out}: {metric_words(wanted.metric)} {fitted.top1:.2f} % on {fitted.split}, "
        f"best validation epoch {fitted.outcome.best_epoch + 1} of {epochs}" + _words(sparse)
    )
    if as_json:
        best = {"split": fitted.split, "val_top1": fitted.outcome.best_top1}
        found = best | sparse | ({"strengths": list(fitted.strengths)} if fitted.strengths else {})
        view.document({"out": str(out), "task": wanted.name, **reported(wanted, fitted.top1), **found})


def _network(
    arch: str, arch_args: dict[str, Any], init: Path | None, seed: int, classes: int = 2
) -> tuple[nn.Module, ModelInfo]:
    """The network to train: from the checkpoint `init`, else with weights drawn by the seed, for so many classes."""
    import torch

    from compress.checkpoint import ModelInfo
    from compress.cli import arch as architectures
    from compress.cli import load

    if init is not None:
        model, info, _ = load.network(init, arch, arch_args)
        return model, info
    torch.manual_seed(seed)
    own = {"num_classes": classes} if architectures.takes(arch, "num_classes") else {}
    built = architectures.resolve(arch, {**own, **arch_args}, None)
    return built.model, ModelInfo(arch=built.name, arch_kwargs=built.kwargs, mean=built.mean, std=built.std)


def _regularizers(names: list[str], density: float | None, overrides: list[str]) -> dict[str, dict[str, Any]]:
    """The regularisers named, each with what --density and --set give it."""
    from compress.errors import UsageError
    from compress.recipe import override
    from compress.regularize import REGULARIZERS, SPARSE_TRAINING

    for name in names:
        if name not in REGULARIZERS:
            raise UsageError(f"{name} is no regulariser; there are {', '.join(REGULARIZERS)}: see `compress methods`")
        if names.count(name) > 1:
            raise UsageError(f"{name} takes part already; name each regulariser once")
    thinning = [name for name in names if name in SPARSE_TRAINING]
    if density is not None and not thinning:
        raise UsageError(f"--density {density} needs a --method that holds it: {', '.join(sorted(SPARSE_TRAINING))}")
    found: dict[str, Any] = {name: {} for name in names}
    for text in overrides:
        override(found, text, like="regulariser.option=value, e.g. ggr.interval=50")
    strangers = [name for name in found if name not in names]
    if strangers:
        raise UsageError(f"--set names {strangers[0]!r}, which takes no part; there are {', '.join(names) or 'none'}")
    if density is not None:
        found[thinning[0]]["density"] = density
    return found


def _sparsity(model: nn.Module, fitted: Fitted) -> dict[str, Any]:
    """What is left of the weights that were thinned: in all, per layer, and how often their places changed."""
    if not fitted.density:
        return {}
    weights = {name: tensor for name, tensor in model.named_parameters() if name in fitted.density}
    nonzero = sum(int(tensor.count_nonzero()) for tensor in weights.values())
    of = sum(tensor.numel() for tensor in weights.values())
    return {
        "nonzero": nonzero,
        "of": of,
        "density": nonzero / of,
        "layers": dict(fitted.density),
        "density_log": [[step, dict(layers)] for step, layers in fitted.density_log],
    }


def _words(sparse: dict[str, Any]) -> str:
    if not sparse:
        return ""
    changes = len(sparse["density_log"]) - 1
    return (
        f"; density {sparse['density']:.4g}: {sparse['nonzero']:,} of {sparse['of']:,} weights, "
        f"whose places changed {changes} times"
    )
