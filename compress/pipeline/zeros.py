"""Granularity `weight` in a run: what is refused, what becomes 0 instead of being cut, and what is counted after."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress import sparse
from compress.errors import PruneError, UsageError
from compress.onnx_file import count_weights
from compress.pipeline.context import Run
from compress.recipe import Recipe
from compress.regularize import Regularizer
from compress.regularize.channels import maskable
from compress.regularize.keep_zeros import KeepZeros
from compress.scores import SCORES


def is_fine(recipe: Recipe) -> bool:
    """Whether single weights become 0, rather than channels being cut."""
    return recipe.prune.granularity == "weight"


def check(recipe: Recipe, model: nn.Module) -> None:
    """What granularity `weight` cannot do, refused before any training; what regularisers refuse: `rounds.check`.

    Raises:
        UsageError: a metric that zeros do not change exactly, or a score that ranks no single weight.
        PruneError: no weight to set to zero. TargetError: out of reach.
    """
    prune = recipe.prune
    if prune.metric != "params":
        raise UsageError(
            f"--metric {prune.metric} with --granularity weight: zeros in place change neither the multiply-adds nor, "
            "by a known amount, the bytes; use --metric params"
        )
    if prune.redraw:
        raise UsageError("prune.redraw with --granularity weight would fill the zeros again; use --granularity filter")
    if prune.sensitivity or prune.max_group_drop or prune.max_group_distortion:
        raise UsageError("prune.sensitivity limits widths, which --granularity weight leaves alone; leave it out")
    if prune.drop_blocks:
        raise UsageError("--drop-blocks with --granularity weight: zeros leave no block; use --granularity filter")
    if name := _score(recipe):
        sparse.weigh(model, name)
    sparse.budget(model).weights(prune.keep)


def defaults(recipe: Recipe, model: nn.Module, keep: float) -> dict[str, Any]:
    """What regularisers that have such an option are given, unless the recipe says otherwise.

    `density` is the share of the maskable weights that stays, so that all parameters together meet `keep`.
    """
    if not is_fine(recipe):
        return {}
    found = sparse.budget(model)
    return {"granularity": "weight", "density": found.weights(keep) / (found.params - found.fixed)}


def held(recipe: Recipe, *, is_cut: bool) -> list[Regularizer]:
    """What keeps the zeros of an earlier cut through a phase of training."""
    return [KeepZeros()] if is_fine(recipe) and is_cut else []


def worth(run: Run, model: nn.Module, regularizers: Sequence[Regularizer]) -> dict[str, Tensor]:
    """The importance of every weight: the score asked for, else what the method itself offers, else its magnitude.

    A weight that a method has masked already (dynamic sparse training, zeros held from an earlier round) must leave.
    """
    name = _score(run.recipe)
    offers = getattr(regularizers[0], "weight_scores", None) if regularizers and not name else None
    offered: Mapping[str, Tensor] = offers() if offers is not None else {}
    found = {**sparse.weigh(model, name or "l1", seed=run.recipe.seed), **offered}
    for masks in (r.masks for r in regularizers if hasattr(r, "masks")):
        for key, alive in masks.alive.items():
            if key in found:  # not a classifier that the method has thinned as well
                found[key] = torch.where(alive.cpu(), found[key].detach().cpu(), -torch.inf)
    return {key: found[key] for key in maskable(model)}


def density_log(regularizers: Sequence[Regularizer]) -> list[Any]:
    """[step, {weight tensor: density}] in order, of a method that moves weights from layer to layer; else nothing."""
    logs = (getattr(regularizer, "density_log", None) for regularizer in regularizers)
    return next((list(log) for log in logs if log), [])


def of_layers(model: nn.Module) -> dict[str, dict[str, int]]:
    """Layer -> its weights, and how many of them are not 0."""
    found = sparse.density(model).items()
    return {name.removesuffix(".weight"): {"weights": total, "nonzero": alive} for name, (total, alive) in found}


def count_file(model: nn.Module, path: Path) -> dict[str, int]:
    """The weights and non-zeros that an ONNX file of `model` holds.

    Raises:
        PruneError: the file has more of them than the network: the export has filled zeros in.
    """
    found = count_weights(path)
    matrices = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.dim() > 1]
    total, nonzero = sum(p.numel() for p in matrices), sum(int(p.detach().count_nonzero()) for p in matrices)
    if found.total == total and found.nonzero > nonzero:
        raise PruneError(f"{path.name} has {found.nonzero} weights that are not 0, the network {nonzero}")
    return {"weights": found.total, "nonzero": found.nonzero, "sparse_tensors": found.sparse_tensors}


def dry_run_weights(recipe: Recipe, model: nn.Module) -> tuple[sparse.Thinned, str]:
    """What would become 0 in the network as it stands, and the score used; nothing is changed."""
    check(recipe, model)
    score = _score(recipe) or "l1"
    return sparse.thin(copy.deepcopy(model), keep=recipe.prune.keep, worth=score, seed=recipe.seed), score


def _score(recipe: Recipe) -> str:
    """The score that the recipe names; "" where the method has its own."""
    prune = recipe.prune
    return prune.score or (prune.method if prune.method in SCORES else "")
