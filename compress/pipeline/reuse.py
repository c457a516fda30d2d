"""Training towards sparsity that another run has done already: it serves every target, score and rounding."""

from __future__ import annotations

import shutil
from pathlib import Path

from compress.errors import UsageError
from compress.files import atomic_path
from compress.folder import RunFolder
from compress.pipeline.context import Event, Run
from compress.pipeline.rounds import sparse_trainers
from compress.recipe import Recipe, make, read

TRAINED = "state/round-1.pt"  # the state at the end of it, as the run left it
CUT = "state/round-1.json"  # once this is there, that training was over
SHAPING = {"method", "regularize", "granularity", "rounds", "penalty_share", "options", "strength"}  # of `prune`
LATER = {"distill", "temperature", "compile", "trackers"}  # of `train`: begin with the first cut, or change nothing
TARGET = {"keep", "metric", "target_ms"}


def serves(folder: Path, *, keep: float) -> bool:
    """Whether the run in `folder` is past its training towards sparsity, which is the same for a target of `keep`."""
    if not all((folder / name).is_file() for name in ("recipe.yaml", TRAINED, CUT)):
        return False
    recipe = make(read(folder / "recipe.yaml"))
    return keep == recipe.prune.keep or not sparse_trainers(recipe)


def difference(recipe: Recipe, other: Recipe) -> str:
    """The first knob of which two recipes' training before the first cut is not the same; "" where it is.

    The checkpoint and the images are not compared, only how they are taken.
    """
    own, others = _shaping(recipe), _shaping(other)
    return next((f"{name} = {others[name]!r}, not {own[name]!r}" for name in own if own[name] != others[name]), "")


def adopt(run: Run, source: Path) -> None:
    """Take over what the run in `source` has trained before its first cut, as if it had been trained here.

    Raises:
        UsageError: no run there, one that has not come so far or keeps no state of it, or another training than the
            one that this run begins with.
    """
    other = RunFolder.existing(source)
    if not (other.has(TRAINED) and other.has(CUT)):
        raise UsageError(
            f"the run in {source} has no training towards sparsity to give: it has not come so far, or its method "
            "trains nothing before the cut; leave out --reuse"
        )
    found = difference(run.recipe, make(read(source / "recipe.yaml")))
    if not found and other.read("env.json")["source_sha256"] != run.read("env.json")["source_sha256"]:
        found = "another checkpoint"
    if not found and other.read("state/data.json") != run.read("state/data.json"):
        found = "other images"
    if found:
        raise UsageError(f"the run in {source} was trained towards sparsity with {found}; leave out --reuse")
    with atomic_path(run.folder.path / TRAINED) as temporary:
        shutil.copyfile(source / TRAINED, temporary)
    run.emit(Event("prepare", f"the training towards sparsity is that of {source}"))


def _shaping(recipe: Recipe) -> dict[str, object]:
    """Knob -> value, of those that the training before the first cut goes by."""
    parts = {
        "prune": recipe.prune.model_dump(include=SHAPING | (TARGET if sparse_trainers(recipe) else set())),
        "train": recipe.train.model_dump(exclude=LATER),
        "data": recipe.data.model_dump(exclude={"source"}),
    }
    found = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {**found, "seed": recipe.seed, "task": recipe.task}
