"""FFR: short and straight paths of the features through the layers (Wu, Lan, Zhang and Xiang, arXiv 2106.02914)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from compress.errors import UsageError
from compress.groups import Group
from compress.groups.parts import rows, weights
from compress.regularize.closed import closed
from compress.regularize.features import ACTIVATIONS, feature_modules, first_tensor, head
from compress.regularize.flow import Flow
from compress.regularize.options import check, one_of, whole


class Ffr:
    """k1 * mean_s mean_l m(x_{l+1} - x_l) + k2 * mean_s mean_l m(x_{l+1} - 2 x_l + x_{l-1}), m(v) = mean |v|.

    The mean runs over segments s, each a maximal run of consecutive features of equal shape, and over the places l in
    it. Features are the outputs of residual blocks (and what enters a run of them), or, in a network without any, the
    outputs of its activations. In an identity block the first difference is the residual branch, so that the length
    acts on whole channels of that branch. Gradients flow to both ends. The details are ours: the paper gives the idea
    of length and curvature, not the norm.

    Args:
        k1, k2: weights of length and curvature, 1e-3 to 1 in the paper.
        norm: `l1`, mean |v|, or `l2`, mean v^2.
        curvature: `second-difference`, or `angle`: 1 - cos of consecutive first differences.
        align: `skip` starts a new segment where the shape changes; `pad` joins the two by 2x2 average pooling and
            zero channels, which plain networks need to have more than a few pairs.
        samples: images of each batch that the penalty looks at, None for all. A subset estimates the same mean.
        score: `folded`, what the weights say, or `flow`, what the channels carried in training; see `scores`.
        period: steps from one look of `flow` to the next (ours: the 5 of CKA-SR).
    """

    STRENGTHS = ("k1", "k2")

    def __init__(
        self,
        *,
        k1: float = 1e-2,
        k2: float = 1e-2,
        norm: Literal["l1", "l2"] = "l1",
        curvature: Literal["second-difference", "angle"] = "second-difference",
        align: Literal["skip", "pad"] = "skip",
        samples: int | None = 32,
        score: Literal["folded", "flow"] = "folded",
        period: int = 5,
    ) -> None:
        if min(k1, k2) < 0 or k1 + k2 == 0:
            raise ValueError(f"k1 = {k1} and k2 = {k2} must be at least 0, and one of them above it")
        check(
            norm=one_of(norm, "l1", "l2"), curvature=one_of(curvature, "second-difference", "angle"),
            align=one_of(align, "skip", "pad"), score=one_of(score, "folded", "flow"), period=whole(period, 1),
            samples=whole(1 if samples is None else samples, 1),
        )  # fmt: skip
        self.k1, self.k2 = k1, k2
        self.norm, self.curvature, self.align, self.samples = norm, curvature, align, samples
        self.score, self.period = score, period
        self._flow: Flow | None = None
        self._features: list[Tensor] = []  # of the samples
        self._whole: list[Tensor] = []  # the same of all images, as the layers behind read them, for the flow
        self._last: Tensor | None = None  # the newest output, to know when a block starts from something else
        self._handles: list[RemovableHandle] = []
        self._model: nn.Module | None = None
        self._groups: tuple[Group, ...] = ()

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Watch the features of `model`; `groups` are those that `scores` speaks of; UsageError without a feature."""
        self.detach()
        self._model, self._groups = model, tuple(groups)
        watched = feature_modules(model)
        if not watched:
            raise UsageError(
                "ffr watches residual blocks in a sequence or activation modules, and this network has neither"
            )
        self._handles = [model.register_forward_pre_hook(lambda module, inputs: self._forget())]
        self._handles += [module.register_forward_hook(self._record) for module in watched.values()]
        if self.score == "flow":
            self._flow = Flow(model, groups, samples=self.samples, period=self.period)

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def penalty(self) -> Tensor:
        """Length and curvature of the features of the last forward pass in training mode, shape ().

        0 where no two features of equal shape follow each other.

        Raises:
            UsageError: there was no such pass.
        """
        if not self._features:
            raise UsageError("ffr has seen no features: call penalty() after a forward pass in training mode")
        if self._flow is not None:
            self._flow.look(self._whole)
        segments = self.segments(self._features)
        self._forget()
        bent = sum(len(x) > 2 for x in segments)
        parts = [self._segment(x, self.k1 / len(segments), self.k2 / max(bent, 1)) for x in segments]
        return torch.stack(parts).sum() if parts else torch.zeros(())

    def segments(self, features: Sequence[Tensor]) -> list[list[Tensor]]:
        """Maximal runs, of two or more, of features of equal shape; `pad` joins two where it makes them so."""
        runs: list[list[Tensor]] = []
        for feature in features:
            if runs and self.align == "pad" and runs[-1][-1].shape != feature.shape and feature.dim() == 4:
                fitted = [_fit(x, feature) for x in runs[-1]]
                runs[-1] = fitted if fitted[-1].shape == feature.shape else runs[-1]
            if runs and runs[-1][-1].shape == feature.shape:
                runs[-1].append(feature)
            else:
                runs.append([feature])
        return [run for run in runs if len(run) > 1]

    def after_step(self) -> None:
        """Nothing to project; `flow` counts the step."""
        if self._flow is not None:
            self._flow.after_step()

    def scores(self) -> Mapping[str, Tensor]:
        """`flow`: see Flow.look. `folded`: |gamma| * ||W||_1 of each filter, relative to its layer's largest.

        Both are ours. `folded` is averaged over the group's layers, and has the batch norm in it because the penalty
        acts on features, which can shrink through its scale alone. It stands in for groups that `flow` has not seen.
        """
        folded = self._folded()
        return folded if self._flow is None else folded | {n: w.float().cpu() for n, w in self._flow.worth.items()}

    def _folded(self) -> dict[str, Tensor]:
        assert self._model is not None
        state = self._model.state_dict()
        found: dict[str, Tensor] = {}
        for group in self._groups:
            layers, behind = [], dict(group.norms)
            for part, tensor in weights(self._model, group):
                filters = rows(tensor.detach(), part, group.size).view(group.size, part.block, -1).abs().sum(2)
                norm = behind.get(part.name.rpartition(".")[0])
                if norm is not None and f"{norm}.weight" in state:
                    scale = state[f"{norm}.weight"][part.offset :][: filters.numel()]
                    filters = filters * scale.abs().view_as(filters)
                strength = filters.sum(1)
                layers.append(strength / strength.max().clamp(min=1e-30))
            mean = torch.stack(layers).mean(0) if layers else torch.ones(group.size)
            found[group.name] = mean.float().cpu()
        return found

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._flow is not None:
            self._flow.detach()
        self._flow = None
        self._forget()
        self._handles, self._groups, self._model = [], (), None

    def scale_penalty(self, factor: float) -> None:
        self.k1 *= factor
        self.k2 *= factor

    def state_dict(self) -> dict[str, Any]:
        flow = {} if self._flow is None else {"flow": self._flow.state_dict()}
        return {"k1": self.k1, "k2": self.k2, **flow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The numbers alone, without `flow`, are the strength for another network: there the score starts anew."""
        self.k1, self.k2 = float(state["k1"]), float(state["k2"])
        if self._flow is not None and "flow" in state:
            self._flow.load_state_dict(state["flow"])

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        output = first_tensor(output)
        if output is None or not (module.training and torch.is_grad_enabled()):
            return
        entered = inputs[0] if inputs else None
        starts_run = entered is not self._last and not isinstance(module, ACTIVATIONS)
        if starts_run and isinstance(entered, Tensor) and entered.shape == output.shape:
            self._note(entered)
        self._note(output)
        self._last = output

    def _note(self, feature: Tensor) -> None:
        self._features.append(head(feature, self.samples))
        if self._flow is not None:
            self._whole.append(feature)

    def _forget(self) -> None:
        self._features, self._whole, self._last = [], [], None

    def _segment(self, x: Sequence[Tensor], length: float, bend: float) -> Tensor:
        """length * mean_l m(x_{l+1} - x_l) + bend * mean_l of the curvature, over one segment of two or more."""
        if self.curvature == "second-difference":
            return _straightness(x, length, bend, is_l1=self.norm == "l1")
        total = _straightness(x, length, 0.0, is_l1=self.norm == "l1")
        angles = [
            (1 - F.cosine_similarity((c - b).flatten(1), (b - a).flatten(1))).mean()
            for a, b, c in zip(x, x[1:], x[2:], strict=False)
        ]
        return total + bend * torch.stack(angles).mean() if angles else total


def _straightness(x: Sequence[Tensor], length: float, bend: float, *, is_l1: bool) -> Tensor:
    """length * mean_l m(d_l) + bend * mean_l m(d_{l+1} - d_l), d_l = x_{l+1} - x_l, its gradient written out.

    With s_l and t_l the slopes of the two terms: d / d d_l = s_l + t_{l-1} - t_l, and d / d x_l = that of l-1 minus
    that of l. Autograd would keep and pass several times as many tensors.
    """
    first = [b - a for a, b in pairwise(v.detach() for v in x)]
    second = [b - a for a, b in pairwise(first)] if bend else []
    value = length * _mean_size(first, is_l1=is_l1)
    if second:
        value = value + bend * _mean_size(second, is_l1=is_l1)

    def slopes(grad: Tensor) -> list[Tensor]:
        own = [_slope(d, grad * length / len(first), is_l1=is_l1) for d in first]
        for at, e in enumerate(second):
            turn = _slope(e, grad * bend / len(second), is_l1=is_l1)
            own[at] -= turn
            own[at + 1] += turn
        return [-own[0], *(a - b for a, b in pairwise(own)), own[-1]]

    return closed(value, slopes, x)


def _mean_size(differences: Sequence[Tensor], *, is_l1: bool) -> Tensor:
    """mean_l m(v_l), m(v) = mean |v| or mean v^2, in float32 at least."""
    wide = torch.promote_types(differences[0].dtype, torch.float32)
    sizes = [(v.abs() if is_l1 else v.to(wide).square()).mean(dtype=wide) for v in differences]
    return torch.stack(sizes).mean()


def _slope(difference: Tensor, scale: Tensor, *, is_l1: bool) -> Tensor:
    """scale * m'(v)."""
    factor = scale / difference.numel()
    return difference.sign().mul_(factor) if is_l1 else difference * (2 * factor)


def _fit(feature: Tensor, like: Tensor) -> Tensor:
    """(N, C, H, W) towards the shape of `like`: 2x2 average pooling while too large, then zero channels."""
    while feature.shape[-1] > like.shape[-1] and feature.shape[-2] > like.shape[-2]:
        feature = F.avg_pool2d(feature, 2)
    missing = like.shape[1] - feature.shape[1]
    return F.pad(feature, (0, 0, 0, 0, 0, missing)) if missing > 0 else feature
