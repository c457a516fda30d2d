"""CKA-SR: layers of a stage that say different things need fewer parameters (Ni et al., arXiv 2307.07389)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress import ranks
from compress.errors import UsageError
from compress.groups import Group, Slice
from compress.groups.parts import layers
from compress.regularize.cka import LEAST, centred, channel_grams, cka, gram, leave_one_out
from compress.regularize.features import feature_modules, first_tensor, head
from compress.regularize.options import above, check, whole

MEMORY = 10  # observations over which the score is averaged (ours): one has the spread of 16 images


@dataclass(frozen=True)
class _Seen:
    """A tensor met in the forward pass: a feature, or (with a reader) the input of a layer that reads channels."""

    values: Tensor
    head: Tensor  # its first images
    reader: nn.Module | None = None


class CkaSr:
    """beta * sum over stages, over ordered pairs (i, j) of the stage's features, i != j, of CKA(i, j), unbiased.

    Features are the outputs of residual blocks, or of the activations in a network without any; a stage is a run of
    consecutive features of equal shape (ours: the paper's code lists the layers of its networks by hand).

    Only the first `samples` images count, and only every `period`-th step. Such a step's penalty is multiplied by the
    number of steps since the last one, so that the mean over steps is the penalty above; on the steps between it is
    0 and nothing is watched. (The paper does not multiply: its beta is `period` times ours.) The first step is always
    looked at, once, then the last of each period.

    The score is redundancy, by leave-one-channel-out; see `scores`. It is watched during training, from the same
    images, and averaged over about the last ten looks, and over the processes that train together.

    Args:
        beta: 2e-5, the paper's 1e-4 for CIFAR over a period of 5 (for ImageNet 2e-6); `scale_penalty` changes it.
        samples: images of each batch, at least 4. The paper takes 8; 16 halve the spread of independent features'
            CKA, from 0.21 to 0.11.
        period: steps from one look to the next, 5 in the paper.
    """

    STRENGTHS = ("beta",)

    def __init__(self, *, beta: float = 2e-5, samples: int = 16, period: int = 5) -> None:
        check(beta=above(beta), samples=whole(samples, LEAST), period=whole(period, 1))
        self.beta, self.samples, self.period = beta, samples, period
        self._step = 0  # steps of the optimiser so far
        self._seen: list[_Seen] = []  # of the present forward pass, in order
        self._readers: dict[nn.Module, list[tuple[Group, Slice, Tensor]]] = {}  # and which inputs are whose
        self._worth: dict[str, Tensor] = {}  # group name -> (size,), the averaged score
        self._looks = 0  # that went into it
        self._groups: tuple[Group, ...] = ()
        self._handles: list[RemovableHandle] = []

    def attach(self, model: nn.Module, groups: Sequence[Group]) -> None:
        """Watch the features of `model` and the channels of `groups`; UsageError if there is no feature to watch."""
        watched = feature_modules(model)
        if not watched:
            raise UsageError("cka-sr compares residual blocks or activation modules, and this network has neither")
        self.detach()
        self._groups = tuple(groups)
        self._readers = {}
        for group in groups:
            for reader, part, places in layers(model, group, "in") if group.frozen is None else ():
                self._readers.setdefault(reader, []).append((group, part, places))
        self._handles = [model.register_forward_pre_hook(lambda module, inputs: self._seen.clear())]
        self._handles += [module.register_forward_pre_hook(self._read) for module in self._readers]
        self._handles += [module.register_forward_hook(self._record) for module in watched.values()]

    def parameters(self) -> Iterable[nn.Parameter]:
        return ()

    def penalty(self) -> Tensor:
        """Of the last forward pass in training mode, shape (); 0 on the steps between two looks.

        Raises:
            UsageError: fewer than 4 images in the first batch (later such batches are passed over), or no stage has two
                features of equal shape.
        """
        if not self._is_due():
            return torch.zeros(())
        seen, self._seen = self._seen, []
        features = [at.head for at in seen if at.reader is None]
        if not features:
            raise UsageError("cka-sr has seen no features: call penalty() after a forward pass in training mode")
        if len(features[0]) < LEAST:
            if self._looks:  # the last batch of an epoch
                return torch.zeros(())
            raise UsageError(
                f"cka-sr needs at least {LEAST} images in a batch, this one has {len(features[0])}: drop the last batch"
            )
        rows = [centred(gram(x)) for x in features]
        stages = _stages(features)
        pairs = [cka(torch.stack([rows[i] for i in stage])).triu(1).sum() for stage in stages if len(stage) > 1]
        if not pairs:
            raise UsageError("cka-sr compares features of equal shape that follow each other, and no two here do")
        with torch.no_grad():
            self._look(seen, [row.detach() for row in rows], stages)
        total = 2 * self.beta * self._stands_for() * torch.stack(pairs).sum()  # (i, j) and (j, i)
        return total.to(torch.promote_types(features[0].dtype, torch.float32))

    def after_step(self) -> None:
        """Count the step."""
        self._step += 1

    def scores(self) -> Mapping[str, Tensor]:
        """How much the CKA of a channel's layer with the other features of its stage changes when the channel leaves.

        Ours. |CKA(K - K_c, L_j) - CKA(K, L_j)|, K_c being the channel's own part of the layer's Gram matrix, averaged
        over the features j, over the layers that read the channel, and over the looks. The layer's features are taken
        where they are read; inside a block they are compared with the block outputs of that stage, and with all
        other features where a stage has but one. A group that no layer reads has ones.

        Raises:
            UsageError: no batch has been looked at yet.
        """
        if not self._looks:
            raise UsageError("cka-sr scores channels by what it saw in training, and there was no training step yet")
        return {g.name: self._worth.get(g.name, torch.ones(g.size)).detach().float().cpu() for g in self._groups}

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen, self._readers, self._groups = [], [], {}, ()
        self._worth, self._looks = {}, 0

    def scale_penalty(self, factor: float) -> None:
        self.beta *= factor

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"beta": self.beta, "step": self._step, "looks": self._looks}
        if self._worth:
            state["worth"] = {name: values.clone() for name, values in self._worth.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The numbers alone, without `worth`, are the strength for another network: there the score starts anew."""
        self.beta, self._step = float(state["beta"]), int(state["step"])
        self._worth = {name: values.clone() for name, values in state.get("worth", {}).items()}
        self._looks = int(state["looks"]) if self._worth else 0

    def _is_due(self) -> bool:
        return self._step == 0 or self._step % self.period == self.period - 1

    def _stands_for(self) -> int:
        """Steps since the last look, this one included: 1 at first, then what is left of the period, then periods."""
        return max(1, min(self._step, self.period))

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        output = first_tensor(output)
        if output is not None and module.training and self._is_due() and torch.is_grad_enabled():
            self._seen.append(_Seen(output, head(output, self.samples)))

    def _read(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and self._is_due() and torch.is_grad_enabled() and inputs and isinstance(inputs[0], Tensor):
            self._seen.append(_Seen(inputs[0], inputs[0].detach()[: self.samples], module))

    def _look(self, seen: Sequence[_Seen], rows: Sequence[Tensor], stages: Sequence[Sequence[int]]) -> None:
        """Take one observation of the score into the average."""
        found: dict[str, list[Tensor]] = {}
        done: set[tuple[int, str, Slice | None]] = set()
        features = [at.values for at in seen if at.reader is None]
        before = 0  # features met so far
        for at in seen:
            before += at.reader is None
            if at.reader is None:
                continue
            place = next((i for i, x in enumerate(features) if x is at.values), None)
            others = _others(min(before, len(features) - 1) if place is None else place, place, stages, rows)
            parts = channel_grams(at.head, -1 if isinstance(at.reader, nn.Linear) else 1)
            whole = centred(parts.sum(0))
            for group, part, places in self._readers[at.reader]:
                # several layers may read one tensor: it counts once
                key = (id(at.values), group.name, Slice("", 0, part.block, part.offset))
                if key not in done:
                    done.add(key)
                    own = parts[places.to(parts.device)].sum((1, 2))
                    found.setdefault(group.name, []).append(leave_one_out(centred(own), whole, others))
        self._looks += 1
        if not found:
            return
        means = {name: torch.stack(values).mean(0) for name, values in found.items()}
        shared = torch.split(ranks.averaged(torch.cat(list(means.values()))), [len(mean) for mean in means.values()])
        for name, new in zip(means, shared, strict=True):
            old = self._worth.get(name, torch.zeros_like(new)).to(new)
            self._worth[name] = old + (new - old) / min(self._looks, MEMORY)


def _stages(features: Sequence[Tensor]) -> list[list[int]]:
    """Maximal runs of consecutive features of equal shape, as positions."""
    return [list(run) for _, run in groupby(range(len(features)), key=lambda i: features[i].shape)]


def _others(at: int, itself: int | None, stages: Sequence[Sequence[int]], rows: Sequence[Tensor]) -> Tensor:
    """The centred Gram matrices (m, n*n) of the stage of feature `at` without `itself`; of all where none is left."""
    stage = next(stage for stage in stages if at in stage)
    chosen = [i for i in stage if i != itself] or [i for i in range(len(rows)) if i != itself]
    return torch.stack([rows[i] for i in chosen])
