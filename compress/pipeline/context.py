"""What the stages of a run share: the recipe, the folder, the dense network, the data and the device."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress import checkpoint, cost, data, inputs, ranks
from compress.bench.machine import allowed_cpus, describe
from compress.bench.runtimes import RUNTIMES, inactive
from compress.checkpoint import ModelInfo
from compress.data import Augment, Data, Loader, MemorySplit, Split
from compress.errors import DataError, MeasureError
from compress.files import atomic_write
from compress.fit import complete
from compress.folder import RunFolder
from compress.recipe import Recipe
from compress.regularize import Regularizer
from compress.structure import underived
from compress.task import Task, ours, recorded
from compress.train import Outcome, Progress, Settings, accelerator, check_data, evaluate, finetune

log = logging.getLogger(__name__)
# Epochs below which images in memory are not augmented: there is nothing to overfit yet, and what is learned of shifted
# images is paid for in accuracy: 0.2 to 0.9 points on CIFAR-10 in five epochs: benchmarks/LOG.md.
FEW = 10


def augmentation(epochs: int) -> Literal["auto", "none"]:
    """How images in memory are augmented in a run of so many epochs, unless its recipe says otherwise."""
    return "none" if epochs < FEW else "auto"


@dataclass(frozen=True)
class Event:
    """Something a person may want to see: a stage begins, an epoch advances, a remark."""

    stage: str
    text: str = ""
    progress: Progress | None = None


OnEvent = Callable[[Event], None]


@dataclass
class Run:
    """The dense network is never changed; every later one is a copy.

    Every process of a run has one, but the folder is rank 0's: what lies in it goes to the others by `has`, `read`,
    `network`, and from them nothing comes back.
    """

    recipe: Recipe
    folder: RunFolder  # to be touched inside ranks.first only
    dense: nn.Module
    info: ModelInfo
    data: Data
    device: Any  # accelerate.Accelerator
    emit: OnEvent
    task: Task
    reuse: Path | None = None  # a run whose training before the first cut is this one's, too

    @property
    def keep(self) -> float:
        """The share of the metric that is to remain, 0 to 1; milliseconds become one once the dense ones are known."""
        return float(self.prepared.get("keep", self.recipe.prune.keep))

    @property
    def prepared(self) -> dict[str, Any]:
        """What the first stage found out about the dense network."""
        return self.read("state/prepare.json")

    def has(self, name: str) -> bool:
        return ranks.first(lambda: self.folder.has(name))

    def read(self, name: str) -> dict[str, Any]:
        return ranks.first(lambda: self.folder.read(name))

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Keep rank 0's content."""
        ranks.first(lambda: self.folder.write(name, content))

    def loader(self, split: Split, *, train: bool = False, seed: int = 0) -> Loader:
        """This process's share of the batches; all of them inside ranks.first."""
        mean, std = inputs.normalisation(self.info)
        return data.loader(
            split,
            batch_size=ranks.share(self.recipe.train.batch_size),
            mean=mean,
            std=std,
            train=train,
            augment=self.augment(),
            seed=self.recipe.seed + seed,
            device=self.device.device,
            rank=ranks.rank(),
            world=ranks.world(),
        )

    def augment(self) -> Augment | Literal["auto"]:
        """The recipe's augmentation; `auto` is none at all in a run that sees each image fewer than FEW times."""
        chosen = self.recipe.data.augment
        if chosen != "auto" or not isinstance(self.data.train, MemorySplit) or not self.has("state/prepare.json"):
            return chosen
        counts = self.prepared["epochs"]
        return augmentation(sum(counts["sparse"]) + counts["recover"])

    def example(self, count: int = 1) -> Tensor:
        """The first `count` validation images as the network takes them, on the CPU: (count, C, H, W)."""
        return inputs.example(self.info, self.data.val, count)

    def costs(self, model: nn.Module) -> cost.Costs:
        """The network's costs; bytes include what the dense ONNX file holds beside the weights, once that is known."""
        found = cost.measure(model, self.example())
        beside = self.prepared["beside_weights"] if self.has("state/prepare.json") else 0.0
        return replace(found, fixed={**found.fixed, "size": beside})

    def network(self, name: str) -> nn.Module:
        """The network as a stage left it in `name`, on the CPU."""
        model = copy.deepcopy(self.dense)
        _load(model, self.folder.path / name)
        return model.eval()

    def save(self, name: str, model: nn.Module, *, pruned: bool = True) -> None:
        prune = self.recipe.prune
        origin = {
            "method": prune.method,
            "target": self.keep,
            "metric": prune.metric,
            "seed": self.recipe.seed,
            "source_sha256": self.read("env.json")["source_sha256"],
        }
        info = self.info.model_copy(update={"pruned": pruned, "origin": origin, "data": self.public_data})
        integers = underived(model, self.dense)
        ranks.first(lambda: checkpoint.save(self.folder.path / name, model, info, integers=integers))

    @property
    def public_data(self) -> str | None:
        """The data set's name as an output may carry it: a path on this machine means nothing elsewhere."""
        source = self.info.data
        return None if source is None or Path(source).is_absolute() else source

    def on_device(self, model: nn.Module) -> nn.Module:
        """The network on the run's device, in the memory format that training uses."""
        return model.to(self.device.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def settings(self, phase: str, count: int) -> Settings:
        """How `count` epochs of a phase train, as the recipe says."""
        part = self.recipe.train
        return Settings(
            epochs=count,
            lr=part.lr,
            momentum=part.momentum,
            weight_decay=part.weight_decay,
            warmup=part.warmup,
            span=span(self.prepared["epochs"], phase),
            label_smoothing=part.label_smoothing,
            clip_norm=part.clip_norm,
            temperature=part.temperature,
            compile=bool(self.prepared["compile"]),
            seed=self.recipe.seed * 1000 + (0 if phase == "recover" else int(phase.removeprefix("round-"))),
            phase=phase,
            task=self.task,
        )

    def evaluate(self, model: nn.Module) -> tuple[float, float]:
        """The task's metric in percent and the mean loss on the validation split."""
        return evaluate(self.on_device(model), self.loader(self.data.val), device=self.device, task=self.task)

    def train(
        self,
        model: nn.Module,
        settings: Settings,
        regularizers: Sequence[Regularizer] = (),
        teacher: nn.Module | None = None,
    ) -> Outcome:
        """One phase of training; its state lies in state/PHASE.pt, its epochs in metrics.jsonl."""

        def on_progress(progress: Progress) -> None:
            if progress.top1 is not None and ranks.is_first():
                self._note_epoch(settings.phase, progress)
            self.emit(Event(settings.phase, progress=progress))

        outcome = finetune(
            model,
            self.loader(self.data.train, train=True, seed=settings.seed),
            self.loader(self.data.val),
            replace(settings, distill=self.recipe.train.distill if teacher is not None else 0.0),
            device=self.device,
            regularizers=regularizers,
            teacher=teacher,
            state=self.folder.path / "state" / f"{settings.phase}.pt",
            on_progress=on_progress,
        )
        ranks.first(lambda: self._settle_metrics(settings.phase, outcome))
        return outcome

    def _note_epoch(self, phase: str, progress: Progress) -> None:
        found = {name: getattr(progress, name) for name in ("epoch", "loss", "penalty")} | {"val_top1": progress.top1}
        with (self.folder.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"phase": phase, **found}) + "\n")
        self.device.log({f"{phase}/{key}": value for key, value in found.items()}, step=progress.epoch)

    def _settle_metrics(self, phase: str, outcome: Outcome) -> None:
        """Every epoch of a finished phase once: a kill may have lost the line of one, or let it be written twice."""
        path = self.folder.path / "metrics.jsonl"
        lines = _whole(path.read_text().splitlines()) if path.exists() else []
        lines = [line for line in lines if line["phase"] != phase]
        lines += [{"phase": phase, **epoch} for epoch in outcome.history]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines))


def open_run(
    recipe: Recipe,
    model: nn.Module,
    info: ModelInfo,
    folder: RunFolder,
    source_sha256: str,
    emit: OnEvent,
    task: Task | None = None,
    reuse: Path | None = None,
) -> Run:
    """Check what can be checked at once, load the data and the dense weights, save what a resume needs of both."""
    emit(Event("load"))
    part = recipe.data
    task = task or ours(recipe.task or info.task)
    device = accelerator(recipe.device, recipe.train.precision, recipe.train.trackers, folder.path / "trackers")
    ranks.first(lambda: _check_bench(recipe))
    ranks.share(recipe.train.batch_size)
    known = {"mean": part.mean or info.mean, "std": part.std or info.std, "task": recorded(task)}
    info = info.model_copy(update=known)
    loaded = inputs.load_data(
        info,
        part.source or None,
        image_size=part.image_size,
        val_share=part.val_share,
        seed=recipe.seed,
        max_unreadable=part.max_unreadable,
        channels=inputs.channels_of(model, info),
    )
    check_data(task, loaded)
    _check_same(loaded)
    _check_unchanged(folder, loaded)
    for note in loaded.notes:
        emit(Event("load", note))
    if info.labels and info.labels != loaded.labels:
        emit(Event("load", "the classes of the data are not named as those of the network: taken in their order"))

    def settle() -> dict[str, Any]:
        if folder.has("state/info.json"):
            return folder.read("state/info.json")
        if info.mean is None or info.std is None:
            text = "normalisation measured on the training images; set data.mean and data.std if you know it"
            emit(Event("load", text))
        completed = complete(info, loaded)
        folder.write("env.json", {**describe(), "seed": recipe.seed, "source_sha256": source_sha256})
        checkpoint.save(folder.path / "state" / "dense.safetensors", model, completed)
        kept = completed.model_dump(mode="json")
        folder.write("state/data.json", {"fingerprint": loaded.fingerprint})
        folder.write("state/info.json", kept)
        return kept

    settled = ModelInfo.model_validate(ranks.first(settle))
    _load(model, folder.path / "state" / "dense.safetensors")
    return Run(recipe, folder, model.eval(), settled, loaded, device, emit, task, reuse)


def _load(model: nn.Module, path: Path) -> None:
    """Fill the network with the weights in a file of rank 0's."""
    checkpoint.load_into(model, checkpoint.decode(ranks.first(lambda: checkpoint.contents(path)), path))


def _check_same(loaded: Data) -> None:
    """Shares of different data are no shares."""
    is_other = loaded.fingerprint != ranks.first(lambda: loaded.fingerprint)
    if ranks.summed(torch.tensor(float(is_other))) > 0:
        raise DataError(f"the processes find different images in {loaded.name}; give every machine the same data")


def _check_unchanged(folder: RunFolder, loaded: Data) -> None:
    """A run goes on with the images that it was begun with, or it would be no run of either."""

    def begun() -> str:
        return str(folder.read("state/data.json")["fingerprint"]) if folder.has("state/data.json") else ""

    if (before := ranks.first(begun)) and before != loaded.fingerprint:
        raise DataError(f"{loaded.name} holds other images than when the run was begun; bring them back, or begin anew")


def _whole(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The lines of a journal but for one that a kill or a full disk broke off."""
    found = []
    for line in lines:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def _check_bench(recipe: Recipe) -> None:
    """What the last stage needs must be here before the first one begins."""
    part = recipe.bench
    missing = inactive(part.runtime)
    if missing:
        remedy = RUNTIMES[part.runtime].remedy
        raise MeasureError(f"bench.runtime = {part.runtime} is not available here: {missing}; {remedy}")
    if part.threads > len(allowed_cpus()):
        raise MeasureError(f"bench.threads = {part.threads}, but this process may use {len(allowed_cpus())} processors")


def span(spent: Mapping[str, Any], phase: str) -> tuple[float, float]:
    """The part of a schedule that a phase goes through: the first its own, the later ones share one from cut to end.

    Args:
        spent: epochs of each round under `sparse` and of the recovery under `recover`.
    """
    _, *between = spent["sparse"]
    ends = list(accumulate([*between, spent["recover"]], initial=0))
    place = len(between) if phase == "recover" else int(phase.removeprefix("round-")) - 2
    return (ends[place] / ends[-1], ends[place + 1] / ends[-1]) if place >= 0 else (0.0, 1.0)
