"""The sparse rounds: train towards sparsity, score, cut, recalibrate; once, or step by step to the target."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import nn

from compress import ranks, sparse, train
from compress.errors import PruneError, UsageError
from compress.folding import fold
from compress.groups import Group, trace
from compress.pipeline import timing, zeros
from compress.pipeline.context import Event, Run
from compress.pipeline.widths import branches_of, select_as, sensitivity_of
from compress.plan import Plan, apply
from compress.reach import without
from compress.recipe import Recipe
from compress.regularize import COUNTERS, REGULARIZERS, SPARSE_TRAINING, Regularizer, begun, given_places, numbers
from compress.regularize.make import make
from compress.report.words import metric_words, strength_words
from compress.scores import DATA_DRIVEN, LOSS_DRIVEN, SCORES, Scores
from compress.structure import redraw
from compress.task import loss_of

SCORE_BATCHES = 8  # training batches that a data-driven score sees: about a thousand images, in seconds (ours)
FOLD_BATCHES = 8  # training batches that the fold sees, likewise
SIZE_MARGIN = 0.005  # by how much a file's size is undercut: the bytes of its graph change a little with the widths


def sparsify(run: Run) -> dict[str, Any]:
    """All rounds, on a geometric path to the target; a finished round is not done again."""
    counts = run.prepared["epochs"]["sparse"]
    if run.augment() == "none":
        run.emit(Event("sparse", "the images are not augmented"))
    target = run.keep * (1 - SIZE_MARGIN if run.recipe.prune.metric == "size" and run.keep < 1 else 1)
    found: list[dict[str, Any]] = []
    for index, count in enumerate(counts):
        name = f"round-{index + 1}"
        if not run.has(f"state/{name}.json"):
            model = run.network(f"state/round-{index}.safetensors") if index else copy.deepcopy(run.dense)
            before = found[-1]["regularizers"] if found else None
            keep = target ** ((index + 1) / len(counts))
            is_last = index + 1 == len(counts)
            run.write(f"state/{name}.json", _round(run, model, _Round(name, count, keep, before, is_last)))
        found.append(run.read(f"state/{name}.json"))
    return {"rounds": found, "history": [line for result in found for line in result["history"]]}


@dataclass(frozen=True)
class _Round:
    name: str
    epochs: int
    keep: float  # share of the dense cost that remains after it
    before: Sequence[Mapping[str, float]] | None  # the regularisers' strengths in the round before
    is_last: bool


def _round(run: Run, model: nn.Module, what: _Round) -> dict[str, Any]:
    """Train with the penalties, score, cut, recalibrate, save."""
    groups = trace(model, run.example())
    steps = what.epochs * len(run.loader(run.data.train, train=True))
    given = {"steps": steps, "density": what.keep, **zeros.defaults(run.recipe, model, what.keep)}
    made = make_regularizers(run.recipe, given)
    regularizers = [*made, *zeros.held(run.recipe, is_cut=what.before is not None)]
    model = run.on_device(model)
    outcome, strong = train.Outcome(), list[dict[str, Any]]()
    try:
        fixed = _attach(run, model, groups, regularizers, what.before)
        if what.epochs:
            settings = replace(
                run.settings(what.name, what.epochs), penalty_share=run.recipe.prune.penalty_share, fixed=fixed
            )
            outcome = run.train(model, settings, regularizers, teacher(run) if what.before is not None else None)
            strong = begun(regularizer_names(run.recipe), outcome.strengths, fixed, run.recipe.prune.penalty_share)
            for strength in strong:
                run.emit(Event(what.name, strength_words(strength)))
        scores = _worth(run, model, groups, regularizers)
        strengths = [numbers(regularizer.state_dict()) for regularizer in made]
        log = zeros.density_log(made)
    finally:
        for regularizer in regularizers:
            regularizer.detach()
    model = model.cpu()
    if what.before is None:
        run.save("state/sparse.safetensors", model, pruned=False)
    cut = _cut(run, model, groups, scores, what)
    batches = run.loader(run.data.train, train=True)
    train.recalibrate(run.on_device(model), batches, device=run.device, task=run.task)
    top1, _ = run.evaluate(model)
    reached = f"{cut['reached']:.3g} of the {run.recipe.prune.metric}"
    run.emit(Event(what.name, f"cut to {reached}: validation {metric_words(run.task.metric)} {top1:.2f} %"))
    run.save(f"state/{what.name}.safetensors", model.cpu(), pruned=not zeros.is_fine(run.recipe))
    return {
        "plan": cut,
        "density_log": log,
        "lambda_log": outcome.lambda_log,
        "strengths": strong,
        "history": [{"phase": what.name, **line} for line in outcome.history],
        "regularizers": strengths,
        "val_top1": {"trained": outcome.last_top1 if what.epochs else None, "cut": top1},
    }


def _worth(run: Run, model: nn.Module, groups: Sequence[Group], regularizers: Sequence[Regularizer]) -> Scores:
    """The importance of every channel by group, or (granularity `weight`) of every weight by tensor."""
    if zeros.is_fine(run.recipe):
        return zeros.worth(run, model, regularizers)
    return _scores(run, model, groups, regularizers)


def _cut(run: Run, model: nn.Module, groups: Sequence[Group], scores: Scores, what: _Round) -> dict[str, Any]:
    """Remove channels, or set weights to zero, in place; what was done, as JSON."""
    if zeros.is_fine(run.recipe):
        return sparse.thin(model, keep=what.keep, worth=scores).model_dump(mode="json")
    whole = run.prepared["dense"][run.recipe.prune.metric]
    costs = run.costs(model)

    def choose() -> dict[str, Any]:
        given = {"found": sensitivity_of(run), "may_leave": branches_of(run, model), "whole": whole}
        given["falls"] = None if what.before is None else run.prepared["falls"]
        prices = timing.priced(run, costs, whole)

        def at(share: float) -> Plan:
            return select_as(run.recipe, groups, scores, prices, keep=share, **given)

        if timing.is_timed(run.recipe) and what.is_last:
            plan, tries = timing.aimed(run, model, groups, at, what.keep)
            return {**plan.model_dump(mode="json"), "tries": timing.facts(tries)}
        return at(what.keep).model_dump(mode="json")

    chosen = ranks.first(choose)
    plan = Plan.model_validate(chosen)
    before = copy.deepcopy(model)
    apply(model, groups, plan)
    if run.recipe.prune.redraw:
        redraw(model, run.recipe.seed)
    elif run.recipe.prune.fold:
        images = (batch for batch, _ in islice(run.loader(run.data.train, train=True), FOLD_BATCHES))
        left, _ = without(groups, costs, plan.dropped)
        fold(run.on_device(model), run.on_device(before), left, plan.kept, images)
        model.cpu()
    return chosen


def teacher(run: Run) -> nn.Module:
    """The uncut network with the better validation top-1: as given, or after the first sparse training."""
    trained = run.read("state/round-1.json")["val_top1"]["trained"]
    is_better = trained is not None and trained > run.prepared["dense"]["val_top1"]
    return run.on_device(run.network("state/sparse.safetensors") if is_better else copy.deepcopy(run.dense))


def check(recipe: Recipe) -> None:
    """What regularisers refuse of a recipe; nothing else is needed to see it.

    Raises:
        UsageError: wrong options, or several cuts with one that trains at the target's density from its first step.
    """
    make_regularizers(recipe, {})
    if recipe.prune.rounds not in (1, "auto") and (names := sparse_trainers(recipe)):
        raise UsageError(
            f"prune.rounds = {recipe.prune.rounds} with {names[0]}, which trains at the target's density from its "
            "first step; use one round"
        )


def make_regularizers(recipe: Recipe, defaults: Mapping[str, Any]) -> list[Regularizer]:
    """The method's regulariser and the further ones, with the options given for each, on top of `defaults`.

    Raises:
        UsageError: options for a regulariser that takes no part, that it does not have, or that it refuses.
    """
    names = regularizer_names(recipe)
    for name in recipe.prune.options:
        if name not in names:
            raise UsageError(
                f"prune.options names {name!r}, which takes no part; there are {', '.join(names) or 'none'}"
            )
    return make({name: recipe.prune.options.get(name, {}) for name in names}, defaults)


def regularizer_names(recipe: Recipe) -> list[str]:
    """The regularisers that take part, the method's first."""
    return [name for name in (recipe.prune.method, *recipe.prune.regularize) if name in REGULARIZERS]


def sparse_trainers(recipe: Recipe) -> list[str]:
    """Those of them that train at the target's density from their first step."""
    return [name for name in regularizer_names(recipe) if name in SPARSE_TRAINING]


def _attach(
    run: Run,
    model: nn.Module,
    groups: Sequence[Group],
    regularizers: Sequence[Regularizer],
    before: Sequence[Mapping[str, float]] | None,
) -> frozenset[int]:
    """Attach and set the strengths: the round before's, the user's, or left to be calibrated.

    Returns: the places of those whose strength is not to be calibrated.
    """
    prune = run.recipe.prune
    for regularizer in regularizers:
        try:
            regularizer.attach(model, groups)
        except ValueError as error:
            raise PruneError(f"{type(regularizer).__name__} cannot watch this network: {error}") from error
    for regularizer, kept in zip(regularizers, before or (), strict=False):
        strengths = {name: value for name, value in kept.items() if name not in COUNTERS}  # what is counted begins anew
        regularizer.load_state_dict({**regularizer.state_dict(), **strengths})
    if before is None and prune.strength is not None:
        for regularizer in regularizers:
            regularizer.scale_penalty(prune.strength)
    if before is not None or prune.strength is not None:
        return frozenset(range(len(regularizers)))
    return given_places(regularizers, (prune.options.get(name, {}) for name in regularizer_names(run.recipe)))


def _scores(run: Run, model: nn.Module, groups: Sequence[Group], regularizers: Sequence[Regularizer]) -> Scores:
    prune = run.recipe.prune
    name = prune.score or (prune.method if prune.method in SCORES else "")
    if not name:
        return regularizers[0].scores()

    def score() -> Scores:
        # a loader of its own: its order depends on the seed alone, so that a resumed run scores the same images
        loader = run.loader(run.data.train, train=True) if name in DATA_DRIVEN else ()
        batches = map(run.task.unpack, islice(loader, SCORE_BATCHES))
        if name == "random":
            return SCORES[name](model, groups, seed=run.recipe.seed)  # type: ignore[call-arg]
        if name in LOSS_DRIVEN:
            return SCORES[name](model, groups, batches, loss=loss_of(run.task))  # type: ignore[call-arg]
        return SCORES[name](model, groups, batches)

    told = ranks.first(lambda: {group: values.tolist() for group, values in score().items()})
    return {group: torch.tensor(values) for group, values in told.items()}
