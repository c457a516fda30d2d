"""compress prune and compress resume: the whole run."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoint import ModelInfo
    from compress.folder import RunFolder
    from compress.recipe import Recipe

Text = Optional[str]  # noqa: UP045  typer reads annotations at run time
Number = Optional[float]  # noqa: UP045


def prune(
    model: options.Model,
    method: Annotated[Text, typer.Option("--method", help="halo, ffr, l2, ...: see `compress methods`")] = None,
    target: Annotated[
        Number, typer.Option("--target", help="Share of the metric to keep, above 0 and at most 1")
    ] = None,
    metric: Annotated[
        Text, typer.Option("--metric", help="params, macs or size: what the target is a share of")
    ] = None,
    score: Annotated[Text, typer.Option("--score", help="Another importance than the method's own")] = None,
    regularize: Annotated[
        list[str] | None, typer.Option("--regularize", help="A further regulariser; may repeat")
    ] = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    data: options.Data = None,
    epochs: Annotated[Optional[int], typer.Option("--epochs", help="All training together")] = None,  # noqa: UP045
    round_to: Annotated[Text, typer.Option("--round-to", metavar="N|auto", help="Channel block of the widths")] = None,
    recipe: Annotated[Optional[Path], typer.Option("--recipe", help="YAML file; options go on top")] = None,  # noqa: UP045
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any knob, e.g. train.lr=0.01")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/DATE-MODEL-METHOD-HASH")] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be cut; train and write nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one")] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete an earlier run in --out")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Checkpoint in, smaller ONNX file out: train, cut, recover, export, prove, measure."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress.cli import arch as architectures
    from compress.recipe import make, read

    if resume and out is not None and (out / "recipe.yaml").is_file():
        _finish(out, as_json=as_json)
        return
    values = read(recipe) if recipe is not None else {}
    arch_args = architectures.parse_arch_args(arch_arg or [])
    given: dict[str, dict[str, Any]] = {
        "model": {"path": str(model.absolute()), "arch": arch, "arch_args": arch_args or None},
        "data": {"source": _absolute(data)},
        "prune": {
            "method": method, "keep": target, "metric": metric, "score": score, "regularize": regularize or None,
            "round_to": int(round_to) if round_to is not None and round_to.isdigit() else round_to,
        },
        "train": {"epochs": epochs},
        "": {"seed": seed, "device": device, "threads": threads},
    }  # fmt: skip
    for section, keys in given.items():
        place = values.setdefault(section, {}) if section else values
        place.update({key: value for key, value in keys.items() if value is not None})
    checked = make(values, set_ or [])
    _check_methods(checked.prune.method, checked.prune.regularize, checked.prune.score)

    from compress.cli import load
    from compress.folder import RunFolder

    network, info, source = load.network(model, arch, arch_args)
    if dry_run:
        _show_plan(checked, network, info, as_json=as_json)
        return
    text = checked.to_yaml()
    folder = RunFolder.create(out or _default_folder(model, checked.prune.method, text), text, force=force)
    _run(checked, network, info, folder, source.sha256, as_json=as_json)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of an interrupted run")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Continue an interrupted run at its last finished epoch."""
    view.set_up(quiet=quiet, verbose=verbose)
    _finish(folder, as_json=as_json)


def _finish(path: Path, *, as_json: bool) -> None:
    from compress.cli import load
    from compress.folder import RunFolder
    from compress.recipe import make, read

    folder = RunFolder.open(path)
    recipe = make(read(path / "recipe.yaml"))
    if folder.has("state/dense.safetensors"):  # the run's own copy: the source may be gone by now
        network, info, _ = load.network(path / "state" / "dense.safetensors", None, {})
        sha256 = ""
    else:
        network, info, source = load.network(Path(recipe.model.path), recipe.model.arch or None, recipe.model.arch_args)
        sha256 = source.sha256
    _run(recipe, network, info, folder, sha256, as_json=as_json)


def _run(recipe: Recipe, network: nn.Module, info: ModelInfo, folder: RunFolder, sha256: str, *, as_json: bool) -> None:
    from compress import pipeline

    try:
        with view.Live() as live:
            report = pipeline.run(recipe, network, info, folder=folder, source_sha256=sha256, on_event=live.show)
    except KeyboardInterrupt:
        view.hint(f"stopped; continue with: compress resume {folder.path}")
        raise
    view.result(report)
    if as_json:
        view.document(report)


def _check_methods(method: str, regularize: tuple[str, ...], score: str) -> None:
    from compress.errors import UsageError
    from compress.regularize import REGULARIZERS
    from compress.scores import SCORES

    for option, name, allowed in (
        ("--method", method, [*REGULARIZERS, *SCORES]),
        *(("--regularize", name, list(REGULARIZERS)) for name in regularize),
        ("--score", score or "l2", list(SCORES)),
    ):
        if name not in allowed:
            raise UsageError(f"{option} {name} is unknown; there are {', '.join(allowed)}: see `compress methods`")


def _absolute(source: str | None) -> str | None:
    """A path that exists becomes absolute, so that a resume works from anywhere; names stay as they are."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def _default_folder(model: Path, method: str, recipe: str) -> Path:
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:6]
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model.stem}-{method}-{digest}"


def _show_plan(recipe: Recipe, network: nn.Module, info: ModelInfo, *, as_json: bool) -> None:
    import torch

    from compress import pipeline

    size = info.input_size or (3, recipe.data.image_size or 32, recipe.data.image_size or 32)
    plan, groups, costs = pipeline.dry_run(recipe, network, torch.randn(1, *size))
    rows = [(g.name, str(g.size), str(len(plan.kept.get(g.name, range(g.size)))), g.frozen or "") for g in groups]
    view.table("widths as the weights stand now, before any training", ("group", "dense", "kept", "frozen"), rows)
    view.note(f"{plan.metric}: {plan.reached:.4f} of {view.figure(costs.total(plan.metric))} would remain")  # type: ignore[arg-type]
    if as_json:
        view.document({"plan": plan.model_dump(mode="json"), "frozen": {g.name: g.frozen for g in groups if g.frozen}})
