"""Sensitivity: what a network loses when one group of channels is cut to several widths, all others left whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compress.curves import Curve as Curve
from compress.curves import Outcome as Outcome
from compress.curves import Sensitivity as Sensitivity
from compress.curves import Width as Width
from compress.errors import PruneError, UsageError
from compress.groups import Group, cut, trace
from compress.scores import DATA_DRIVEN, SCORES
from compress.structure import forget
from compress.train import recalibrate

WIDTHS = (0.25, 0.5, 0.75)  # shares of a group's channels: three points show where a curve bends (ours)

Batches = Iterable[tuple[Tensor, Tensor | None]]  # images (N, C, H, W) and labels (N,), or None for want of labels


def sensitivity(
    model: nn.Module,
    batches: Batches,
    *,
    calibration: Batches | None = None,
    score: str = "l2",
    widths: Sequence[float] = WIDTHS,
    groups: Sequence[Group] | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Cut each group alone to each width, measure the batch norms anew, and judge; `model` is left as it was.

    Takes about one pass over both sets of images for each group and width, in the network's own precision.

    Args:
        batches: pairs of images (N, C, H, W) and labels (N,), or None instead of labels; held in memory.
        calibration: images for the batch norms and for scores that need data; None: those of `batches`.
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
    judged = _held(model, batches)
    calibrated = _held(model, calibration) if calibration is not None else judged
    if groups is None:
        groups = trace(model, judged[0][0][:1])
    free = [group for group in groups if group.frozen is None]
    orders = _orders(model, groups, score, calibrated)
    cuts = [(group, width) for group in free for width in sorted(widths)]
    whole = _trial(model, calibrated)
    dense = _outputs(whole, judged)
    found: dict[str, dict[int, Width]] = {group.name: {} for group in free}
    for done, (group, width) in enumerate(cuts):
        on_progress(done, len(cuts))
        kept = max(1, round(width * group.size))
        if kept < group.size and kept not in found[group.name]:
            small = _trial(model, calibrated, (group,), {group.name: sorted(orders[group.name][:kept])})
            outcome = _judge(_outputs(small, judged), judged, dense, group.name)
            found[group.name][kept] = Width(keep=width, kept=kept, **outcome.model_dump())
    on_progress(len(cuts), len(cuts))
    return Sensitivity(
        score=score,
        images=sum(len(images) for images, _ in judged),
        calibration_images=sum(len(images) for images, _ in calibrated),
        dense=_judge(dense, judged, dense, "the network"),
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
        max_drop: points of top-1. max_distortion: of the outputs, as a share. At least one; both hold where given.

    Raises:
        UsageError: neither is given, top-1 was not measured, or another network was.
    """
    if max_drop is None and max_distortion is None:
        raise UsageError("no limit is given: name the largest drop in points of top-1, or the largest distortion")
    if max_drop is not None and found.dense.top1 is None:
        raise UsageError("the sensitivity was measured without labels: limit the distortion, not the drop of top-1")
    sizes = {group.name: group.size for group in groups if group.frozen is None}
    odd = next((name for name in sizes if name not in found.groups or found.groups[name].size < sizes[name]), None)
    if odd is not None:
        raise UsageError(f"the sensitivity is of another network: it has no group {odd!r} of {sizes[odd]} channels")
    least = {}
    for name, size in sizes.items():
        curve, shares = found.groups[name], []
        if max_drop is not None:
            shares.append(_least(curve, max_drop, [(found.dense.top1 or 0.0) - (w.top1 or 0.0) for w in curve.widths]))
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


def _held(model: nn.Module, batches: Batches) -> list[tuple[Tensor, Tensor | None]]:
    """The batches in memory, on the network's device and in its precision."""
    like = next((t for t in model.state_dict().values() if t.is_floating_point()), torch.zeros(()))
    held = [(x.to(like), None if y is None else y.to(like.device)) for x, y in batches]
    if not held:
        raise UsageError("sensitivity needs images, and there was no batch in what it was given")
    if len({y is None for _, y in held}) > 1:
        raise UsageError("some batches have labels and others none; give them to all or to none")
    return held


def _orders(
    model: nn.Module, groups: Sequence[Group], score: str, batches: Sequence[tuple[Tensor, Tensor | None]]
) -> dict[str, list[int]]:
    """Each group's channels, the most important first."""
    pairs = [(images, labels) for images, labels in batches if labels is not None]
    if score in DATA_DRIVEN and not pairs:
        raise UsageError(f"the score {score!r} needs labels: give them, or take one that reads weights, such as 'l2'")
    found = SCORES[score](model, groups, pairs or None)
    return {name: values.argsort(descending=True, stable=True).tolist() for name, values in found.items()}


def _trial(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor | None]],
    groups: Sequence[Group] = (),
    kept: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """A cut copy with batch norms of its own, measured anew; the other weights are the model's own memory."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        forget(module)
    cut(twin, groups, kept or {})
    recalibrate(twin, ((images, images) for images, _ in batches), device=_AsItIs(), batches=len(batches))
    return twin


class _AsItIs:
    """No autocast: the network computes in its own precision."""

    def autocast(self) -> nullcontext[None]:
        return nullcontext()


def _outputs(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Everything the network answers, one row an image: (images, values) float64 on the CPU."""
    rows = []
    with torch.no_grad():
        for images, _ in batches:
            leaves = [t for t in torch.utils._pytree.tree_leaves(model(images)) if isinstance(t, Tensor)]
            rows.append(torch.cat([t.reshape(len(images), -1).double().cpu() for t in leaves], 1))
    return torch.cat(rows)


def _judge(outputs: Tensor, batches: Sequence[tuple[Tensor, Tensor | None]], dense: Tensor, name: str) -> Outcome:
    size, change = float(dense.norm()), float((outputs - dense).norm())
    if not (size > 0 and math.isfinite(size) and math.isfinite(change)):
        raise PruneError(f"{name}: the outputs are all 0 or not finite, and say nothing; give other images")
    labels = [y for _, y in batches if y is not None]
    if not labels:
        return Outcome(distortion=change / size)
    target = torch.cat(labels).cpu()
    top1 = 100 * int((outputs.argmax(1) == target).sum()) / len(target)
    return Outcome(top1=top1, loss=float(F.cross_entropy(outputs, target)), distortion=change / size)
