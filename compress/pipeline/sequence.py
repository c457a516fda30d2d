"""run(): all stages in order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress import ranks
from compress.checkpoint import ModelInfo
from compress.folder import RunFolder
from compress.pipeline.context import Event, OnEvent, open_run
from compress.pipeline.rounds import check
from compress.pipeline.stages import LAST, TOGETHER, stages_of
from compress.recipe import Recipe
from compress.task import Task

log = logging.getLogger(__name__)


def run(
    recipe: Recipe,
    model: nn.Module,
    info: ModelInfo,
    *,
    folder: RunFolder,
    source_sha256: str = "",
    on_event: OnEvent = lambda event: None,
    task: Task | None = None,
    until: str = LAST,
    reuse: Path | None = None,
) -> dict[str, Any]:
    """Prune `model` as `recipe` says and leave the evidence in `folder`; what is there already is not done again.

    Several processes all call this, and all train; rank 0 alone touches the folder, measures and sends events.

    Args:
        model: the dense network with its weights, on the CPU; not changed. When the folder holds a copy of the dense
            weights already (a resumed run), those are taken.
        info: what the checkpoint says about it. Missing: normalisation is measured on the training images.
        task: one's own; None: the task of ours that the recipe or `info` names.
        source_sha256: of the checkpoint file, for the metadata of what is written.
        until: the stage after which to stop, a key of STAGES; a later call does the others.
        reuse: the folder of a run whose training before its first cut is to be this one's, too; where it has begun
            already it goes by what it has.

    Returns: the report, as in report.json; of a run that stops before it what its last stage found.

    Raises:
        CompressError: every expected failure, with its exit code; the folder stays resumable.
    """
    ranks.join()
    check(recipe)
    is_first = ranks.is_first()

    def emit(event: Event) -> None:
        if is_first:
            _log(event)
            on_event(event)

    with ExitStack() as held, _threads(recipe.threads):
        ranks.first(lambda: _hold(held, folder))
        opened = open_run(recipe, model, info, folder, source_sha256, emit, task, reuse)
        for name, stage in stages_of(recipe, until=until).items():
            if opened.has(f"state/{name}.json"):
                continue
            emit(Event(name))
            began = time.perf_counter()
            result = stage(opened) if name in TOGETHER else ranks.first(partial(stage, opened))
            seconds = max(time.perf_counter() - began, sum(e["seconds"] for e in result.get("history", ())))
            opened.write(f"state/{name}.json", {**result, "seconds": seconds})
        for tracker in opened.device.trackers:  # Accelerator.end_training would part the processes too
            tracker.finish()
        return opened.read("report.json" if until == LAST else f"state/{until}.json")


def _hold(held: ExitStack, folder: RunFolder) -> None:
    """The folder is this process's, and its log open, until the run ends."""
    held.enter_context(folder.lock())
    held.enter_context(_log_file(folder))


def _log(event: Event) -> None:
    """Stages, remarks and finished epochs, for log.txt."""
    at = event.progress
    if at is None:
        log.info("%s: %s", event.stage, event.text or "begins")
    elif at.top1 is not None:
        facts = (event.stage, at.epoch + 1, at.epochs, at.loss, at.penalty, at.top1)
        log.info("%s: epoch %d of %d: loss %.4f, penalty %.4f, validation %.2f %%", *facts)


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
