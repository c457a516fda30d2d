"""Sensitivity: what a network loses when one group of channels is cut to several widths, all others left whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from operator import methodcaller
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compress.curves import Curve as Curve
from compress.curves import Outcome as Outcome
from compress.curves import Sensitivity as Sensitivity
from compress.curves import Width as Width
from compress.errors import PruneError, UsageError
from compress.example import fitting
from compress.groups import Group, cut, trace
from compress.scores import LOSS_DRIVEN, SCORES
from compress.structure import forget
from compress.task import CLASSIFICATION, Task, loss_of
from compress.train import recalibrate

WIDTHS = (0.25, 0.5, 0.75)  # shares of a group's channels: three points show where a curve bends (ours)

Batches = Iterable[tuple[Any, Any]]  # as a loader gives them, for `Task.unpack`; or inputs and None, for want of labels
Held = Sequence[tuple[tuple[Tensor, ...], Any]]  # what the network is called with, and the targets or None


def sensitivity(
    model: nn.Module,
    batches: Batches,
    *,
    calibration: Batches | None = None,
    task: Task = CLASSIFICATION,
    score: str = "l2",
    widths: Sequence[float] = WIDTHS,
    groups: Sequence[Group] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Cut each group alone to each width, measure the batch norms anew, and judge; `model` is left as it was.

    Takes about one pass over both sets of images for each group and width, in the network's own precision.

    Args:
        batches: pairs of images (N, C, H, W) and labels (N,), or what `task` unpacks; or of inputs and None. Held in
            memory, and so are the dense network's outputs.
        calibration: images for the batch norms and for scores that need data; None: those of `batches`.
        task: what the metric and the loss are.
        score: a key of SCORES; the channels it ranks highest are kept.
        widths: shares of a group's channels, above 0 and below 1.
        groups: None: those that `trace` finds.
        on_progress: called with the cuts done and their number.

    Raises:
        UsageError: an unknown score or width, no images, or labels are missing where they are needed.
        PruneError: as `trace`; or outputs that are not finite, or all 0.
    """
    if score not in SCORES:
        raise UsageError(f"no score is called {score!r}; there are {', '.join(SCORES)}")
    if not widths or not all(0 < width < 1 for width in widths):
        raise UsageError(f"the widths are {list(widths)}; allowed are shares above 0 and below 1")
    judged = _held(model, batches, task)
    calibrated = _held(model, calibration, task) if calibration is not None else judged
    if groups is None:
        groups = trace(model, tuple(given[:1] for given in judged[0][0]))
    free = [group for group in groups if group.frozen is None]
    orders = _orders(model, groups, score, calibrated, task)
    cuts = [(group, width) for group in free for width in sorted(widths)]
    whole = _trial(model, calibrated)
    with torch.no_grad():
        dense = [_row(whole(*given)).cpu() for given, _ in judged]
    found: dict[str, dict[int, Width]] = {group.name: {} for group in free}
    for done, (group, width) in enumerate(cuts):
        on_progress(done, len(cuts))
        kept = max(1, round(width * group.size))
        if kept < group.size and kept not in found[group.name]:
            small = _trial(model, calibrated, (group,), {group.name: sorted(orders[group.name][:kept])})
            outcome = _judge(small, judged, dense, task, group.name)
            found[group.name][kept] = Width(keep=width, kept=kept, **outcome.model_dump())
    on_progress(len(cuts), len(cuts))
    return Sensitivity(
        score=score,
        metric=task.metric if judged[0][1] is not None else None,
        images=sum(len(given[0]) for given, _ in judged),
        calibration_images=sum(len(given[0]) for given, _ in calibrated),
        dense=_judge(whole, judged, dense, task, "the network"),
        groups={g.name: Curve(size=g.size, widths=tuple(found[g.name].values())) for g in free},
        frozen={group.name: group.frozen for group in groups if group.frozen},
    )


def limits(
    found: Sensitivity,
    groups: Sequence[Group],
    *,
    max_drop: float | None = None,
    max_distortion: float | None = None,
) -> dict[str, float]:
    """The least share of each group to keep, for `select`, so that its own cut costs no more than allowed. [ours]

    Between two measured widths the loss is taken to be linear; below the narrowest one nothing is known, so that a
    group keeps at least that. The shares are of the channels in `groups`, which may have been cut since.

    Args:
        max_drop: points of the metric. max_distortion: of the outputs, as a share. At least one; both hold where given.

    Raises:
        UsageError: neither is given, the metric was not measured, or another network was.
    """
    if max_drop is None and max_distortion is None:
        raise UsageError("no limit is given: name the largest drop in points of the metric, or the largest distortion")
    if max_drop is not None and found.dense.value is None:
        raise UsageError("the sensitivity was measured without labels: limit the distortion, not the drop")
    sizes = {group.name: group.size for group in groups if group.frozen is None}
    odd = next((name for name in sizes if name not in found.groups or found.groups[name].size < sizes[name]), None)
    if odd is not None:
        raise UsageError(f"the sensitivity is of another network: it has no group {odd!r} of {sizes[odd]} channels")
    least = {}
    for name, size in sizes.items():
        curve, shares = found.groups[name], []
        if max_drop is not None:
            shares.append(
                _least(curve, max_drop, [(found.dense.value or 0.0) - (w.value or 0.0) for w in curve.widths])
            )
        if max_distortion is not None:
            shares.append(_least(curve, max_distortion, [w.distortion for w in curve.widths]))
        least[name] = min(1.0, max(shares) * curve.size / size)
    return least


def read(path: Path) -> Sensitivity:
    """What `compress sensitivity` wrote.

    Raises:
        UsageError: no such file, or another one.
    """
    try:
        return Sensitivity.model_validate_json(path.read_text())
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        reason = "another format" if isinstance(error, ValueError) else error.strerror or str(error)
        raise UsageError(f"{path} is no sensitivity file ({reason}): write one with compress sensitivity") from error


def _least(curve: Curve, allowed: float, harms: Sequence[float]) -> float:
    """The narrowest share at which the harm, linear between the widths and 0 at the whole, is still allowed."""
    wider, before = 1.0, 0.0
    for width, now in zip(reversed(curve.widths), reversed(harms), strict=True):
        share = width.kept / curve.size
        if now > allowed:
            return wider - (wider - share) * max(0.0, allowed - before) / (now - before)
        wider, before = share, now
    return wider


def _held(model: nn.Module, batches: Batches, task: Task) -> Held:
    """The batches in memory, on the network's device; inputs in its precision."""
    held: list[tuple[tuple[Tensor, ...], Any]] = []
    for batch in batches:
        given, targets = task.unpack(batch) if batch[1] is not None else batch
        given = fitting(given, model)
        held.append((given, torch.utils._pytree.tree_map_only(Tensor, methodcaller("to", given[0].device), targets)))
    if not held:
        raise UsageError("sensitivity needs images, and there was no batch in what it was given")
    if len({targets is None for _, targets in held}) > 1:
        raise UsageError("some batches have labels and others none; give them to all or to none")
    return held


def _orders(model: nn.Module, groups: Sequence[Group], score: str, held: Held, task: Task) -> dict[str, list[int]]:
    """Each group's channels, the most important first."""
    if score in LOSS_DRIVEN and held[0][1] is None:
        raise UsageError(f"the score {score!r} needs labels: give them, or take one that reads weights, such as 'l2'")
    options = {"loss": loss_of(task)} if score in LOSS_DRIVEN else {}
    found = SCORES[score](model, groups, held, **options)
    return {name: values.argsort(descending=True, stable=True).tolist() for name, values in found.items()}


def _trial(
    model: nn.Module,
    held: Held,
    groups: Sequence[Group] = (),
    kept: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """A cut copy with batch norms of its own, measured anew; the other weights are the model's own memory."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        forget(module)
    cut(twin, groups, kept or {})
    recalibrate(twin, ((given, None) for given, _ in held), device=_AsItIs(), batches=len(held))
    return twin


class _AsItIs:
    """No autocast: the network computes in its own precision."""

    def autocast(self) -> nullcontext[None]:
        return nullcontext()


def _row(output: Any) -> Tensor:
    """Everything the network answers, flat."""
    leaves = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
    return torch.cat([t.reshape(-1) for t in leaves])


@torch.no_grad()
def _judge(model: nn.Module, held: Held, dense: Sequence[Tensor], task: Task, name: str) -> Outcome:
    """How the network answers, beside the `dense` one's answers to the same batches."""
    size = change = loss = 0.0
    counts, total = torch.zeros((), dtype=torch.float64), 0
    for (given, targets), before in zip(held, dense, strict=True):
        output = model(*given)
        size += float(before.double().square().sum())
        change += float((_row(output).cpu().double() - before.double()).square().sum())
        if targets is not None:
            logits = task.logits(output)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            counts, count = counts + task.count(logits, targets).cpu(), task.size(targets)
            loss, total = loss + float(task.loss(logits, targets)) * count, total + count
    if not (size > 0 and math.isfinite(size) and math.isfinite(change)):
        raise PruneError(f"{name}: the outputs are all 0 or not finite, and say nothing; give other images")
    judged = {"value": task.value(counts), "loss": loss / total} if total else {}
    return Outcome(distortion=math.sqrt(change / size), **judged)
