"""compress train: one of the architectures on a data set, from scratch or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options, view


def train(
    arch: Annotated[
        str,
        typer.Option("--arch", help="resnet20 ..., timm:NAME, torchvision:NAME, pkg.module:function, file.py:function"),
    ],
    data: Annotated[str, typer.Option("--data", help="digits, a folder, Parquet files, hf:NAME, pkg.module:function")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint to write: .pt or .safetensors")],
    init: Annotated[
        Path | None, typer.Option("--init", help="Start from these weights instead of from scratch")
    ] = None,
    arch_arg: options.ArchArg = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 60,
    lr: Annotated[float, typer.Option("--lr", help="Peak rate of SGD, for batch 128")] = 0.1,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2)] = 128,
    label_smoothing: Annotated[float, typer.Option("--label-smoothing", min=0, max=0.99)] = 0.0,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=4, help="Pixels a side; default: the network's")
    ] = None,
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
    import torch

    from compress import checkpoint, ranks
    from compress.checkpoint import ModelInfo
    from compress.cli import arch as architectures
    from compress.cli import load
    from compress.data import load as load_data
    from compress.errors import UsageError
    from compress.fit import fit
    from compress.pipeline import Event
    from compress.train import Settings

    if out.suffix not in (".pt", ".safetensors"):
        raise UsageError(f"--out {out} must end in .pt or .safetensors")
    if ranks.first(out.exists) and not force:
        raise UsageError(f"{out} exists already; choose another --out or give --force")
    arch_args = architectures.parse_arch_args(arch_arg or [])
    loaded = load_data(data, image_size=image_size, seed=seed)
    if init is not None:
        model, info, _ = load.network(init, arch, arch_args)
    else:
        torch.manual_seed(seed)
        defaults = {"num_classes": len(loaded.labels)} if architectures.takes(arch, "num_classes") else {}
        built = architectures.resolve(arch, {**defaults, **arch_args}, None)
        model = built.model
        info = ModelInfo(arch=built.name, arch_kwargs=built.kwargs, mean=built.mean, std=built.std)
    settings = Settings(epochs=epochs, lr=lr, label_smoothing=label_smoothing, keep_best=True, seed=seed)
    state = out.with_suffix(".state")
    if ranks.is_first():
        if not resume:
            state.unlink(missing_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
    with view.Live() as live:
        fitted = fit(
            model, info, loaded, settings, batch_size=batch_size, device=device, state=state,
            on_progress=lambda progress: live.show(Event("train", progress=progress)),
        )  # fmt: skip
    save = checkpoint.save_pt if out.suffix == ".pt" else checkpoint.save
    origin = {"top1": fitted.top1, "split": fitted.split, "epochs": epochs, "seed": seed, "lr": lr}
    if ranks.is_first():
        save(out, model, fitted.info.model_copy(update={"origin": {**fitted.info.origin, **origin}}))
        state.unlink(missing_ok=True)
    view.note(
        f"{out}: top-1 {fitted.top1:.2f} % on {fitted.split}, "
        f"best validation epoch {fitted.outcome.best_epoch + 1} of {epochs}"
    )
    if as_json:
        view.document(
            {"out": str(out), "top1": fitted.top1, "split": fitted.split, "val_top1": fitted.outcome.best_top1}
        )
