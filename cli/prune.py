"""compress prune and compress resume: the whole run, or a search for one."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from compress.cli import options, search, view

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from compress.checkpoint import ModelInfo
    from compress.folder import RunFolder
    from compress.recipe import Recipe
    from compress.search import Search

Text = Optional[str]  # noqa: UP045  typer reads annotations at run time
Number = Optional[float]  # noqa: UP045


def prune(
    model: options.Model,
    method: Annotated[Text, typer.Option("--method", help="halo, ffr, l2, ...: see `compress methods`")] = None,
    target: Annotated[
        Number, typer.Option("--target", help="Share of the metric to keep, above 0 and at most 1")
    ] = None,
    metric: Annotated[
        Text, typer.Option("--metric", help="params, macs, size or latency: what the target is a share of")
    ] = None,
    target_ms: Annotated[
        Number, typer.Option("--target-ms", help="Latency to reach, in milliseconds, in place of --target")
    ] = None,
    on: Annotated[
        Text, typer.Option("--on", metavar="RUNTIME:threads=N:batch=N", help="Where latency is measured")
    ] = None,
    max_drop: search.MaxDrop = None,
    trials: search.Trials = None,
    against: search.Against = None,
    granularity: Annotated[
        Text, typer.Option("--granularity", help="filter: channels leave; weight: single weights become 0 in place")
    ] = None,
    score: Annotated[Text, typer.Option("--score", help="Another importance than the method's own")] = None,
    regularize: Annotated[
        list[str] | None, typer.Option("--regularize", help="A further regulariser; may repeat")
    ] = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    task: options.Task = None,
    data: options.Data = None,
    epochs: Annotated[Optional[int], typer.Option("--epochs", help="All training together")] = None,  # noqa: UP045
    round_to: Annotated[Text, typer.Option("--round-to", metavar="N|auto", help="Channel block of the widths")] = None,
    drop_blocks: Annotated[
        bool, typer.Option("--drop-blocks", help="Residual branches may leave whole where rounding asks for it")
    ] = False,
    quantize: Annotated[Text, typer.Option("--quantize", help="int8 or fp16: a second file, measured beside")] = None,
    recipe: Annotated[Optional[Path], typer.Option("--recipe", help="YAML file; options go on top")] = None,  # noqa: UP045
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any knob, e.g. train.lr=0.01")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Run folder; default: runs/DATE-MODEL-METHOD-HASH")] = None,
    seed: options.Seed = None,
    device: options.Device = None,
    threads: options.Threads = None,
    reuse: Annotated[
        Path | None,
        typer.Option("--reuse", metavar="DIR", help="Take the sparse training of a run with, say, another target"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be cut; train and write nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, if there is one")] = False,
    force: Annotated[bool, typer.Option("--force", help="Delete an earlier run in --out")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Checkpoint in, smaller ONNX file out: train, cut, recover, export, prove, measure."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress import ranks
    from compress.bench.on import parse as parse_on
    from compress.cli import load
    from compress.cli.arch import parse_arch_args
    from compress.errors import UsageError
    from compress.folder import RunFolder

    if target_ms is not None:
        if target is not None or metric not in (None, "latency"):
            raise UsageError("--target-ms is a latency in place of --target and --metric; give one of the two")
        metric = "latency"
    if resume and out is None:
        raise UsageError("--resume needs the --out of the run to continue (or use: compress resume DIR)")
    model, arch = load.located(model, arch)
    given: dict[str, dict[str, Any]] = {
        "model": {
            "path": str(model.absolute()), "arch": absolute_code(arch), "arch_args": parse_arch_args(arch_arg or []),
        },
        "data": {"source": absolute(data)},
        "prune": {
            "method": method, "keep": target, "metric": metric, "score": score, "regularize": regularize,
            "granularity": granularity, "drop_blocks": drop_blocks or None, "target_ms": target_ms,
            "round_to": int(round_to) if round_to is not None and round_to.isdigit() else round_to,
        },
        "train": {"epochs": epochs},
        "quantize": {"to": quantize},
        "bench": asdict(parse_on(on)) if on else {},
        "": {"task": absolute_code(task), "seed": seed, "device": device, "threads": threads},
    }  # fmt: skip
    is_begun = resume and ranks.first(lambda: out is not None and (out / "recipe.yaml").is_file())
    begun = out if is_begun else None
    if begun is not None and dry_run:
        raise UsageError(f"--dry-run shows what a new run would cut; {begun} is begun: leave out --resume")
    asked = search.wanted(max_drop, trials, against, target=target or target_ms, begun=begun)
    if reuse is not None and asked is not None:
        raise UsageError("--reuse is for one run; the trials of a search share their sparse training already")
    checked = _recipe(recipe, given, set_ or [], begun)
    if begun is not None:
        _finish(begun, asked, as_json=as_json)
        return
    from compress import pipeline  # with torch: wrong usage is told without it

    pipeline.check(checked)
    if reuse is not None:
        ranks.first(lambda: RunFolder.existing(reuse).path)
    network, info, source = load.network(model, checked.model.arch or None, checked.model.arch_args)
    if dry_run and asked is not None:
        search.show_plan(asked, checked, network, info, as_json=as_json)
        return
    if dry_run:
        _show_plan(checked, network, info, as_json=as_json)
        return
    text = checked.to_yaml()

    def create() -> str:
        return str(RunFolder.create(out or _default_folder(model, checked.prune.method, text), text, force=force).path)

    folder = RunFolder(Path(ranks.first(create)))
    _run(checked, network, info, folder, source.sha256, asked, as_json=as_json, reuse=reuse)


def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of an interrupted run")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Continue an interrupted run at its last finished epoch."""
    view.set_up(quiet=quiet, verbose=verbose)
    _finish(folder, search.wanted(None, None, None, target=None, begun=folder), as_json=as_json)


def _recipe(file: Path | None, given: dict[str, dict[str, Any]], overrides: list[str], begun: Path | None) -> Recipe:
    """The recipe file (or that of the run begun), the options on top of it, --set on top of both; checked."""
    from compress import ranks
    from compress.recipe import make, read

    def merge() -> dict[str, Any]:
        values = read(begun / "recipe.yaml") if begun is not None else {}
        for section, keys in (read(file) if file is not None else {}).items():
            values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
        for section, keys in given.items():
            place = values.setdefault(section, {}) if section else values
            place.update({key: value for key, value in keys.items() if value not in (None, {}, [])})
        if given["prune"]["keep"] is not None and given["prune"]["target_ms"] is None:
            values["prune"].pop("target_ms", None)  # a share asked for stands above a recipe's milliseconds
        checked = make(values, overrides)
        _check_methods(checked.prune.method, checked.prune.regularize, checked.prune.score)
        if begun is not None:
            _check_same(checked, begun)
        return checked.model_dump(mode="json")

    return make(ranks.first(merge))


def _check_same(wanted: Recipe, folder: Path) -> None:
    """--resume goes on with the run as it was begun; other options would be ignored, so they are refused."""
    from compress.errors import UsageError
    from compress.recipe import make, read

    begun = make(read(folder / "recipe.yaml")).model_dump()
    for section, values in wanted.model_dump().items():
        parts = values if isinstance(values, dict) else {"": values}
        for key, value in parts.items():
            before = begun[section][key] if key else begun[section]
            if value != before:
                name = f"{section}.{key}".rstrip(".")
                raise UsageError(f"{folder} was begun with {name} = {before!r}, not {value!r}; choose another --out")


def _finish(path: Path, asked: Search | None, *, as_json: bool) -> None:
    from compress import ranks
    from compress.cli import load
    from compress.folder import RunFolder
    from compress.recipe import make, read

    def begun() -> dict[str, Any]:
        folder = RunFolder.open(path)
        recipe = make(read(path / "recipe.yaml"))
        is_copied = folder.has("state/info.json")  # written last: then the run has its own copy of the dense network
        source = str(path / "state" / "dense.safetensors") if is_copied else recipe.model.path
        sha256 = folder.read("env.json")["source_sha256"] if is_copied else None
        return {"recipe": recipe.model_dump(mode="json"), "source": source, "sha256": sha256}

    found = ranks.first(begun)
    recipe = make(found["recipe"])
    network, info, read_file = load.network(Path(found["source"]), recipe.model.arch or None, recipe.model.arch_args)
    _run(recipe, network, info, RunFolder(path), found["sha256"] or read_file.sha256, asked, as_json=as_json)


def _run(
    recipe: Recipe, network: nn.Module, info: ModelInfo, folder: RunFolder, sha256: str, asked: Search | None,
    *, as_json: bool, reuse: Path | None = None,
) -> None:  # fmt: skip
    from compress import pipeline, ranks
    from compress.cli import user_code
    from compress.errors import RunFolderError

    run: Callable[..., dict[str, Any]] = partial(pipeline.run, reuse=reuse)
    if asked is not None:
        from compress.search import search as searched

        recipe, run = search.keep(folder, asked, recipe), partial(searched, wanted=asked)
    try:
        task = user_code.task(recipe.task, info.task)
        with view.Live(task.metric) as live:
            report = run(recipe, network, info, folder=folder, source_sha256=sha256, on_event=live.show, task=task)
    except KeyboardInterrupt:
        view.hint(f"stopped; continue with: compress resume {folder.path}")
        raise
    except RunFolderError:
        raise  # somebody else is working in it
    except Exception as error:
        if ranks.is_broken(error):  # another process was interrupted first, or is gone
            view.hint(f"stopped; continue with: compress resume {folder.path}")
        if ranks.is_first() and search.is_untouched(folder):
            folder.discard()  # nothing has been done that a resume could use
        raise
    if asked is not None:
        search.result(report["search"])
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
    twice = next((name for name in regularize if (method, *regularize).count(name) > 1), None)
    if twice:
        raise UsageError(f"--regularize {twice}: {twice} takes part already; name each regulariser once")


def absolute(source: str | None) -> str | None:
    """A path that exists becomes absolute, so that a resume works from anywhere; names stay as they are."""
    return str(Path(source).absolute()) if source and Path(source).exists() else source


def absolute_code(arch: str | None) -> str | None:
    """The file in file.py:function and the folder in hf:DIR become absolute; other names stay as they are."""
    if arch and arch.startswith("hf:") and Path(arch[3:]).is_dir():
        return f"hf:{Path(arch[3:]).absolute()}"
    file, separator, function = (arch or "").rpartition(":")
    return f"{Path(file).absolute()}:{function}" if separator and Path(file).is_file() else arch


def _default_folder(model: Path, method: str, recipe: str) -> Path:
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:6]
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{model.stem}-{method}-{digest}"


def _show_plan(recipe: Recipe, network: nn.Module, info: ModelInfo, *, as_json: bool) -> None:
    from compress import inputs, pipeline

    if recipe.prune.granularity == "weight":
        found, score = pipeline.dry_run_weights(recipe, network)
        shares = [(name, view.figure(density)) for name, density in found.density.items()]
        view.table(f"density as the weights stand now, ranked by {score}", ("weights", "density"), shares)
        view.note(f"params: {found.reached:.4f} would remain, {found.params:,} of them")
        if as_json:
            view.document({"plan": found.model_dump(mode="json"), "score": score, "frozen": {}})
        return
    from compress.reach import without

    shape = inputs.image_shape(network, info, recipe.data.image_size)
    plan, groups, costs, score = pipeline.dry_run(recipe, network, inputs.noise(shape, 1))
    gone = {group.name for group in groups} - {group.name for group in without(groups, costs, plan.dropped)[0]}
    rows = [
        (g.name, str(g.size), "0" if g.name in gone else str(len(plan.kept.get(g.name, range(g.size)))), g.frozen or "")
        for g in groups
    ]
    view.table(f"widths as the weights stand now, ranked by {score}", ("group", "dense", "kept", "frozen"), rows)
    if plan.dropped:
        view.note(f"whole branches leave: {', '.join(plan.dropped)}")
    view.note(f"{plan.metric}: {plan.reached:.4f} of {view.figure(costs.total(recipe.prune.metric))} would remain")
    if as_json:
        frozen = {group.name: group.frozen for group in groups if group.frozen}
        view.document({"plan": plan.model_dump(mode="json"), "score": score, "frozen": frozen})
