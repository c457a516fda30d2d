"""run(): the stages in order, each leaving one artefact, so that a run killed anywhere goes on where it stopped."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import checkpoint, cost, data, inputs, train
from compress.bench.machine import describe, vector_block
from compress.checkpoint import ModelInfo
from compress.data import Loader, Split
from compress.errors import UsageError
from compress.fit import complete
from compress.folder import RunFolder
from compress.groups import Group, trace
from compress.plan import Plan, apply, select
from compress.recipe import Recipe
from compress.regularize import REGULARIZERS, Regularizer
from compress.scores import SCORES, Scores
from compress.structure import underived

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """Something a person may want to see: a stage begins, an epoch advances, a remark."""

    stage: str
    text: str = ""
    progress: train.Progress | None = None


OnEvent = Callable[[Event], None]


@dataclass
class _Run:
    """What the stages share. The dense network is never changed; every later one is a copy."""

    recipe: Recipe
    folder: RunFolder
    dense: nn.Module
    info: ModelInfo
    data: data.Data
    device: Any  # accelerate.Accelerator
    emit: OnEvent

    def loader(self, split: Split, *, train: bool = False, seed: int = 0) -> Loader:
        part, batch = self.recipe.data, self.recipe.train.batch_size
        assert self.info.mean is not None and self.info.std is not None
        return data.loader(
            split,
            batch_size=batch,
            mean=self.info.mean,
            std=self.info.std,
            train=train,
            augment=part.augment,
            seed=self.recipe.seed + seed,
            device=self.device.device,
        )

    def example(self, count: int = 1) -> Tensor:
        """The first `count` validation images as the network takes them, on the CPU: (count, C, H, W)."""
        found: list[Tensor] = []
        for images, _ in self.loader(self.data.val):
            found.append(images.cpu())
            if sum(map(len, found)) >= count:
                break
        return torch.cat(found)[:count]

    def network(self, name: str) -> nn.Module:
        """The network as a stage left it in `name`, on the CPU."""
        model = copy.deepcopy(self.dense)
        checkpoint.load_into(model, checkpoint.read(self.folder.path / name))
        return model.eval()

    def save(self, name: str, model: nn.Module, *, pruned: bool = True) -> None:
        prune = self.recipe.prune
        origin = {
            "method": prune.method,
            "target": prune.keep,
            "metric": prune.metric,
            "seed": self.recipe.seed,
            "source_sha256": self.folder.read("env.json")["source_sha256"],
        }
        update = {"pruned": pruned, "origin": origin, "data": _public(self.info.data)}
        info = self.info.model_copy(update=update)
        checkpoint.save(self.folder.path / name, model, info, integers=underived(model, self.dense))


def run(
    recipe: Recipe,
    model: nn.Module,
    info: ModelInfo,
    *,
    folder: RunFolder,
    source_sha256: str = "",
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Prune `model` as `recipe` says and leave the evidence in `folder`; what is there already is not done again.

    Args:
        model: the dense network with its weights, on the CPU; not changed. When the folder holds a copy of the dense
            weights already (a resumed run), those are taken.
        info: what the checkpoint says about it. Missing: normalisation is measured on the training images.
        source_sha256: of the checkpoint file, for the metadata of what is written.

    Returns: the report, as in report.json.

    Raises:
        CompressError: every expected failure, with its exit code; the folder stays resumable.
    """
    with folder.lock(), _log_file(folder), _threads(recipe.threads):
        opened = _open(recipe, model, info, folder, source_sha256, on_event)
        for name, stage in STAGES.items():
            if folder.has(f"state/{name}.json"):
                continue
            on_event(Event(name))
            began = time.perf_counter()
            result = stage(opened)
            seconds = max(time.perf_counter() - began, sum(e["seconds"] for e in result.get("history", ())))
            folder.write(f"state/{name}.json", {**result, "seconds": seconds})
        opened.device.end_training()
        return folder.read("report.json")


def dry_run(recipe: Recipe, model: nn.Module, example: Tensor) -> tuple[Plan, tuple[Group, ...], cost.Costs]:
    """What would be cut from the network as it stands, without training: the plan, the groups and the dense costs."""
    groups = trace(model, example)
    costs = cost.measure(model, example)
    score = recipe.prune.score or (recipe.prune.method if recipe.prune.method in SCORES else "l2")
    return _select(recipe, groups, SCORES[score](model, groups), costs, recipe.prune.keep), groups, costs


def epochs(recipe: Recipe, steps_per_epoch: int) -> tuple[list[int], int]:
    """How the epochs are spent: sparse epochs of each round, recovery epochs."""
    prune, part = recipe.prune, recipe.train
    total = part.epochs or max(6, -(-1500 // steps_per_epoch))
    trains = prune.method in REGULARIZERS or prune.regularize or prune.rounds > 1
    if not trains:
        return [0], total
    sparse = min(max(prune.rounds, round(total * part.sparse_share)), total - 1)
    if sparse < prune.rounds:
        raise UsageError(
            f"train.epochs = {total} is too few: {prune.method} needs an epoch for each of {prune.rounds} rounds "
            "and one to recover; ask for more epochs"
        )
    each, rest = divmod(sparse, prune.rounds)
    return [each + (i < rest) for i in range(prune.rounds)], total - sparse


# --- stages -----------------------------------------------------------------------------------------------------------


def _prepare(run: _Run) -> dict[str, Any]:
    """Trace and price the dense network, judge it, and see that the target is within reach before any training."""
    example = run.example()
    groups = trace(run.dense, example)
    costs = cost.measure(run.dense, example)
    even = {group.name: torch.ones(group.size) for group in groups}
    _select(run.recipe, groups, even, costs, run.recipe.prune.keep)
    top1, loss = train.evaluate(_on(run, run.dense), run.loader(run.data.val), device=run.device)
    loader = run.loader(run.data.train, train=True)
    sparse, recover = epochs(run.recipe, len(loader))
    return {
        "dense": {**{metric: costs.total(metric) for metric in cost.METRICS}, "val_top1": top1, "val_loss": loss},
        "widths": {group.name: group.size for group in groups},
        "frozen": {group.name: group.frozen for group in groups if group.frozen},
        "uncounted": list(costs.unknown),
        "epochs": {"sparse": sparse, "recover": recover},
        "compile": _compile(run, loader, sum(sparse) + recover),
    }


def _sparsify(run: _Run) -> dict[str, Any]:
    """Train towards sparsity and cut, round by round, on a geometric path to the target."""
    plan = run.recipe.prune
    rounds = run.folder.read("state/prepare.json")["epochs"]["sparse"]
    model = copy.deepcopy(run.dense)
    strengths: list[dict[str, Any]] = []
    teacher = None
    for index, count in enumerate(rounds):
        name = f"round-{index + 1}"
        if not run.folder.has(f"state/{name}.json"):
            regularizers = _regularizers(plan.method, plan.regularize)
            result = _one_round(
                run, model, name, count, regularizers, strengths, teacher, plan.keep ** ((index + 1) / len(rounds))
            )
            run.folder.write(f"state/{name}.json", result)
        result = run.folder.read(f"state/{name}.json")
        strengths = result["regularizers"]
        model = run.network(f"state/{name}.safetensors")
        teacher = _teacher(run)
    found = [run.folder.read(f"state/round-{i + 1}.json") for i in range(len(rounds))]
    return {"rounds": found, "history": [line for result in found for line in result["history"]]}


def _one_round(
    run: _Run,
    model: nn.Module,
    name: str,
    count: int,
    regularizers: Sequence[Regularizer],
    strengths: Sequence[Mapping[str, Any]],
    teacher: nn.Module | None,
    keep: float,
) -> dict[str, Any]:
    """Train `count` epochs with the penalties, score, cut to `keep` of the dense cost, recalibrate, save."""
    example = run.example()
    groups = trace(model, example)
    model = _on(run, model)
    for regularizer in regularizers:
        regularizer.attach(model, groups)
    for regularizer, kept in zip(regularizers, strengths, strict=False):
        regularizer.load_state_dict(kept)
    if not strengths and run.recipe.prune.strength:
        for regularizer in regularizers:
            regularizer.scale_penalty(run.recipe.prune.strength)
    outcome = train.Outcome()
    try:
        if count:
            share = None if strengths or run.recipe.prune.strength else run.recipe.prune.penalty_share
            settings = replace(_settings(run, count, name), penalty_share=share, distill=_distill(run, teacher))
            outcome = _train(run, model, name, settings, regularizers, teacher)
        scores = _scores(run, model, groups, regularizers)
        numbers = [{k: v for k, v in r.state_dict().items() if isinstance(v, int | float)} for r in regularizers]
    finally:
        for regularizer in regularizers:
            regularizer.detach()
    model = model.cpu()
    if name == "round-1":
        run.save("state/sparse.safetensors", model, pruned=False)
    costs = cost.measure(model, example)
    whole = run.folder.read("state/prepare.json")["dense"][run.recipe.prune.metric]
    chosen = _select(run.recipe, groups, scores, costs, min(1.0, keep * whole / costs.total(run.recipe.prune.metric)))
    before = outcome.last_top1
    apply(model, groups, chosen)
    loader = run.loader(run.data.train, train=True)
    train.recalibrate(_on(run, model), loader, device=run.device)
    top1, _ = train.evaluate(model, run.loader(run.data.val), device=run.device)
    run.emit(Event(name, f"cut to {chosen.reached:.3g} of the {chosen.metric}: validation top-1 {top1:.2f}"))
    run.save(f"state/{name}.safetensors", model.cpu())
    return {
        "plan": chosen.model_dump(mode="json"),
        "history": [{"phase": name, **line} for line in outcome.history],
        "regularizers": numbers,
        "val_top1": {"trained": before, "cut": top1},
    }


def _recover(run: _Run) -> dict[str, Any]:
    """Train the cut network back, taught by the uncut one, and keep the best epoch on the validation split."""
    prepared = run.folder.read("state/prepare.json")
    last = len(prepared["epochs"]["sparse"])
    model = _on(run, run.network(f"state/round-{last}.safetensors"))
    teacher = _teacher(run)
    settings = replace(
        _settings(run, prepared["epochs"]["recover"], "recover"), keep_best=True, distill=_distill(run, teacher)
    )
    outcome = _train(run, model, "recover", settings, (), teacher)
    run.save("pruned.safetensors", model.cpu())
    return {
        "history": [{"phase": "recover", **line} for line in outcome.history],
        "val_top1": {"best": outcome.best_top1, "best_epoch": outcome.best_epoch, "last": outcome.last_top1},
    }


def _export(run: _Run) -> dict[str, Any]:
    """Both networks as ONNX, each proved equal to torch; then, once, the test split by ONNX Runtime itself."""
    from compress.export import to_onnx, top1

    split = run.data.test if run.data.test is not None else run.data.val
    example = run.example(17)
    found: dict[str, Any] = {"split": "test" if run.data.test is not None else "val", "images": len(split)}
    for name, file, model in (
        ("dense", "dense.onnx", copy.deepcopy(run.dense)),
        ("pruned", "model.onnx", run.network("pruned.safetensors")),
    ):
        path = run.folder.path / file
        proof = to_onnx(model, example, path, metadata=_metadata(run, model, example, name))
        accuracy = top1(path, _on_cpu(run.loader(split)))
        found[name] = {**proof.model_dump(mode="json"), "top1": accuracy, "size_bytes": path.stat().st_size}
    run.folder.write("parity.json", found)
    return found


def _measure(run: _Run) -> dict[str, Any]:
    """Latency of the dense and the pruned file, interleaved in one run."""
    from compress.bench import benchmark

    part = run.recipe.bench
    files = [run.folder.path / "dense.onnx", run.folder.path / "model.onnx"]
    comparison = benchmark(files, batch=part.batch, threads=part.threads, runtime=part.runtime, seed=run.recipe.seed)  # type: ignore[arg-type]
    found = comparison.model_dump(mode="json")
    run.folder.write("bench.json", found)
    return found


def _report(run: _Run) -> dict[str, Any]:
    """The measured numbers with their conditions, for machines and for people."""
    from compress import report

    pruned = run.network("pruned.safetensors")
    groups = trace(pruned, run.example())
    costs = cost.measure(pruned, run.example())
    facts = {
        "recipe": run.recipe.model_dump(mode="json"),
        "env": run.folder.read("env.json"),
        "stages": {n: run.folder.read(f"state/{n}.json") for n in STAGES if run.folder.has(f"state/{n}.json")},
        "pruned": {"params": costs.total("params"), "macs": costs.total("macs")},
        "widths": {group.name: group.size for group in groups},
        "labels": list(run.data.labels),
        "data": {"name": run.data.name, "fingerprint": run.data.fingerprint, "notes": list(run.data.notes)},
    }
    report.write(run.folder.path, report.build(run.folder.path, facts))
    return {}


STAGES: dict[str, Callable[[_Run], dict[str, Any]]] = {
    "prepare": _prepare,
    "sparse": _sparsify,
    "recover": _recover,
    "export": _export,
    "measure": _measure,
    "report": _report,
}


# --- what stages are made of ------------------------------------------------------------------------------------------


def _open(
    recipe: Recipe, model: nn.Module, info: ModelInfo, folder: RunFolder, source_sha256: str, emit: OnEvent
) -> _Run:
    """Load the data and the dense weights; save what a resume needs of both."""
    emit(Event("load"))
    part = recipe.data
    info = info.model_copy(update={"mean": part.mean or info.mean, "std": part.std or info.std})
    loaded = inputs.load_data(
        info,
        part.source or None,
        image_size=part.image_size,
        val_share=part.val_share,
        seed=recipe.seed,
        max_unreadable=part.max_unreadable,
    )
    for note in loaded.notes:
        emit(Event("load", note))
    folder_info = folder.path / "state" / "info.json"
    if folder_info.exists():
        info = ModelInfo.model_validate_json(folder_info.read_text())
        checkpoint.load_into(model, checkpoint.read(folder.path / "state" / "dense.safetensors"))
    else:
        if info.mean is None or info.std is None:
            emit(
                Event("load", "normalisation: measured on the training images; data.mean and data.std set another one")
            )
        info = complete(info, loaded)
        folder.write("env.json", {**describe(), "seed": recipe.seed, "source_sha256": source_sha256})
        checkpoint.save(folder.path / "state" / "dense.safetensors", model, info)
        folder.write("state/info.json", info.model_dump(mode="json"))
    device = train.accelerator(recipe.device, recipe.train.precision, recipe.train.trackers, folder.path / "trackers")
    return _Run(recipe, folder, model.eval(), info, loaded, device, emit)


def _select(recipe: Recipe, groups: Sequence[Group], scores: Scores, costs: cost.Costs, keep: float) -> Plan:
    prune = recipe.prune
    return select(
        groups,
        scores,
        costs,
        keep=keep,
        metric=prune.metric,
        round_to=vector_block() if prune.round_to == "auto" else prune.round_to,
        adapt=prune.round_to == "auto",
        allocation=prune.allocation,
        floor=prune.floor,
    )


def _regularizers(method: str, more: Sequence[str]) -> list[Regularizer]:
    return [REGULARIZERS[name]() for name in (method, *more) if name in REGULARIZERS]


def _scores(run: _Run, model: nn.Module, groups: Sequence[Group], regularizers: Sequence[Regularizer]) -> Scores:
    prune = run.recipe.prune
    name = prune.score or (prune.method if prune.method in SCORES else "")
    return SCORES[name](model, groups) if name else regularizers[0].scores()


def _settings(run: _Run, count: int, phase: str) -> train.Settings:
    part = run.recipe.train
    return train.Settings(
        epochs=count,
        lr=part.lr,
        momentum=part.momentum,
        weight_decay=part.weight_decay,
        warmup=part.warmup,
        label_smoothing=part.label_smoothing,
        clip_norm=part.clip_norm,
        temperature=part.temperature,
        compile=bool(run.folder.read("state/prepare.json")["compile"]),
        seed=run.recipe.seed * 1000 + (0 if phase == "recover" else int(phase.removeprefix("round-"))),
    )


def _train(
    run: _Run,
    model: nn.Module,
    name: str,
    settings: train.Settings,
    regularizers: Sequence[Regularizer],
    teacher: nn.Module | None,
) -> train.Outcome:
    """One phase of training, its state in state/NAME.pt until the phase's own artefact is there."""
    path = run.folder.path / "state" / f"{name}.pt"
    metrics = run.folder.path / "metrics.jsonl"

    def on_progress(progress: train.Progress) -> None:
        run.emit(Event(name, progress=progress))
        if progress.top1 is not None:
            line = {
                "phase": name,
                "epoch": progress.epoch,
                "loss": progress.loss,
                "penalty": progress.penalty,
                "val_top1": progress.top1,
            }
            with metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
            run.device.log(
                {f"{name}/{key}": value for key, value in line.items() if key != "phase"}, step=progress.epoch
            )

    return train.finetune(
        model,
        run.loader(run.data.train, train=True, seed=settings.seed),
        run.loader(run.data.val),
        settings,
        device=run.device,
        regularizers=regularizers,
        teacher=teacher,
        state=path,
        on_progress=on_progress,
    )


def _teacher(run: _Run) -> nn.Module:
    """The uncut network with the better validation top-1: as given, or after the sparse training."""
    given = run.folder.read("state/prepare.json")["dense"]["val_top1"]
    trained = run.folder.read("state/round-1.json")["val_top1"]["trained"]
    return _on(run, run.network("state/sparse.safetensors") if trained > given else copy.deepcopy(run.dense))


def _distill(run: _Run, teacher: nn.Module | None) -> float:
    return run.recipe.train.distill if teacher is not None else 0.0


def _compile(run: _Run, loader: Loader, count: int) -> bool:
    """Whether the phases are compiled: decided once and kept, so that a resumed run computes the same numbers."""
    if run.recipe.train.compile != "auto":
        return run.recipe.train.compile == "on"
    return train.compile_pays(_on(run, copy.deepcopy(run.dense)), loader, epochs=count, device=run.device)


def _metadata(run: _Run, model: nn.Module, example: Tensor, name: str) -> dict[str, str]:
    """metadata_props: who made the file, from what, and what the network costs."""
    costs = cost.measure(model, example[:1])
    prune, dense = run.recipe.prune, run.folder.read("state/prepare.json")["dense"]
    values: dict[str, Any] = {
        "method": prune.method if name == "pruned" else "none",
        "target": prune.keep if name == "pruned" else 1.0,
        "metric": prune.metric,
        "seed": run.recipe.seed,
        "source_sha256": run.folder.read("env.json")["source_sha256"],
        "arch": run.info.arch,
        "data": "" if Path(run.data.name).is_absolute() else run.data.name,  # a name travels, a path does not
        "labels": list(run.info.labels or ()),
        "mean": list(run.info.mean or ()),
        "std": list(run.info.std or ()),
        "dense": {"params": dense["params"], "macs": dense["macs"]},
        name: {"params": costs.total("params"), "macs": costs.total("macs")},
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _public(source: str | None) -> str | None:
    """The data set's name as an output may carry it: a path on this machine means nothing elsewhere."""
    return None if source is None or Path(source).is_absolute() else source


def _on(run: _Run, model: nn.Module) -> nn.Module:
    """The network on the run's device, in the memory format that training uses."""
    return model.to(run.device.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _on_cpu(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    return ((images.cpu(), labels.cpu()) for images, labels in loader)


@contextmanager
def _log_file(folder: RunFolder) -> Iterator[None]:
    """Everything this package logs also goes to the run's log.txt."""
    handler = logging.FileHandler(folder.path / "log.txt")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("compress")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
