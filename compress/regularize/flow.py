"""Flow: how much of the step from one feature to the next each channel carries, watched while the network trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from compress import ranks
from compress.groups import Group
from compress.groups.parts import layers

MEMORY = 10  # looks over which the score is averaged (ours), as for CKA-SR
ELEMENTS = 2**24  # of a product that is held at once: 64 MB
Norm = nn.modules.batchnorm._BatchNorm


class Flow:
    """The averaged score of every group that was seen; see `look` for what it is.

    Args:
        samples: images of a batch that are looked at, None for all.
        period: steps from one look to the next; the first step is always looked at.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], *, samples: int | None, period: int) -> None:
        self.worth: dict[str, Tensor] = {}  # group name -> (size,)
        self._samples, self._period = samples, period
        self._step, self._looks = 0, 0
        self._seen: list[tuple[nn.Module, Tensor]] = []  # readers with what they read, of the present forward pass
        self._readers: dict[nn.Module, list[tuple[Group, Tensor]]] = {}  # and which inputs are whose
        self._norms: dict[nn.Module, Norm] = {}
        behind = dict(pair for group in groups for pair in group.norms)
        for group in (group for group in groups if group.frozen is None):
            for reader, part, places in layers(model, group, "in"):
                path = part.name.rpartition(".")[0]
                if isinstance(reader, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
                    self._readers.setdefault(reader, []).append((group, places))
                    norm = model.get_submodule(behind[path]) if path in behind else None
                    if isinstance(norm, Norm):
                        self._norms[reader] = norm
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(lambda *_: self._seen.clear())]
        self._handles += [reader.register_forward_pre_hook(self._read) for reader in self._readers]

    @torch.no_grad()
    def look(self, features: Sequence[Tensor]) -> None:
        """Take one observation of the last forward pass into the average; nothing on the steps between two looks.

        Channels that are a feature's own (the trunk of a residual network) have mean |x_{l+1} - x_l| over the pairs of
        consecutive features of equal shape in which it takes part. Channels inside a block have the mean, over images,
        places and outputs, of |what the layer that reads them makes of this channel alone|, its batch norm folded in:
        in a block of two layers that is the channel's part of the residual branch, hence of x_{l+1} - x_l. Where a
        block is deeper it is the part of the next layer's output (ours).
        """
        seen, self._seen = self._seen, []
        if not self._is_due():
            return
        place = {id(feature): index for index, feature in enumerate(features)}
        steps = _steps([feature[: self._samples] for feature in features])
        own: dict[str, dict[int, Tensor]] = {}  # group -> pair -> |difference| of its channels
        through: dict[str, list[Tensor]] = {}
        for reader, values in seen:
            for group, places in self._readers[reader]:
                index = place.get(id(values))
                pairs = {at: steps[at] for at in (index - 1, index) if at in steps} if index is not None else {}
                if pairs and places.shape[2] == 1:
                    found_at = {at: step[places.to(step.device)].mean((1, 2)) for at, step in pairs.items()}
                    own.setdefault(group.name, {}).update(found_at)
                else:
                    norm, read = self._norms.get(reader), values[: self._samples]
                    found = contribution(read, reader, places=places, norm=norm)
                    through.setdefault(group.name, []).append(found)
        self._looks += 1
        names = sorted(own.keys() | through.keys())
        if not names:
            return
        means = [torch.stack(list(own[n].values()) if n in own else through[n]).mean(0) for n in names]
        shared = torch.split(ranks.averaged(torch.cat(means)), [len(mean) for mean in means])
        for name, new in zip(names, shared, strict=True):
            old = self.worth.get(name, torch.zeros_like(new)).to(new)
            self.worth[name] = old + (new - old) / min(self._looks, MEMORY)

    def after_step(self) -> None:
        """Count the step."""
        self._step += 1

    def detach(self) -> None:
        """Take the hooks off; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._seen = [], []

    def state_dict(self) -> dict[str, Any]:
        worth = {name: values.clone() for name, values in self.worth.items()}
        return {"step": self._step, "looks": self._looks, "worth": worth}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._looks = int(state["step"]), int(state["looks"])
        self.worth = {name: values.clone() for name, values in state["worth"].items()}

    def _is_due(self) -> bool:
        return self._step == 0 or self._step % self._period == self._period - 1

    def _read(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training and self._is_due() and torch.is_grad_enabled() and inputs and isinstance(inputs[0], Tensor):
            self._seen.append((module, inputs[0]))


def contribution(values: Tensor, reader: nn.Module, *, places: Tensor, norm: Norm | None = None) -> Tensor:
    """Mean over images, places and outputs of |what `reader` makes of each channel alone|: (size,).

    Args:
        values: what the layer reads, (N, C, ...) for a convolution, (..., C) for a linear layer.
        places: (size, parts, block), which of the layer's inputs are each channel's; see `groups.parts.layers`.
        norm: the batch norm behind the layer, taken with its running variance.
    """
    weight = reader.weight
    assert isinstance(weight, Tensor), reader
    with torch.autocast(values.device.type, enabled=False):
        weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        if norm is not None and norm.running_var is not None:
            gain = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight.detach())
            weight = weight * gain.abs().view(-1, *[1] * (weight.dim() - 1))
        values = values.detach().to(weight.dtype)
        if isinstance(reader, nn.Linear):
            return _by_matrix(values.flatten(0, -2), weight, places.flatten(1))
        assert isinstance(reader, nn.modules.conv._ConvNd)
        found = _by_filters(values, weight, reader, places.flatten())
        return found.view(places.shape).sum(2).mean(1)  # what each part makes is other outputs of the layer


def _by_matrix(values: Tensor, weight: Tensor, places: Tensor) -> Tensor:
    """(n, C) and (O, C) -> (size,); a channel may span several columns."""
    return torch.stack([(values[:, own] @ weight[:, own].T).abs().mean() for own in places.to(values.device)])


def _by_filters(values: Tensor, weight: Tensor, reader: nn.modules.conv._ConvNd, chosen: Tensor) -> Tensor:
    """(N, C, ...) and (O, C / groups, ...) -> one value per chosen input channel, some channels at a time."""
    channels, outputs = values.shape[1], weight.shape[0] // reader.groups
    per_channel = weight.reshape(reader.groups, outputs, *weight.shape[1:]).transpose(1, 2)
    per_channel = per_channel.flatten(0, 1)  # (groups, C / groups, O / groups, ...) -> (C, O / groups, ...)
    run = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[values.dim()]
    assert len(per_channel) == channels, (per_channel.shape, values.shape)
    found: list[Tensor] = []
    at_once = max(1, ELEMENTS // max(1, values[:, :1].numel() * outputs))
    for some in torch.split(chosen.to(values.device), at_once):
        kernels = per_channel[some].flatten(0, 1)[:, None]  # (channels * O / groups, 1, ...)
        padding: Any = reader.padding
        made = run(values[:, some], kernels, None, reader.stride, padding, reader.dilation, len(some))
        made = made.reshape(len(made), len(some), outputs, *made.shape[2:])  # (N, channels, O / groups, ...)
        found.append(made.abs().transpose(0, 1).flatten(1).mean(1))
    return torch.cat(found)


def _steps(features: Sequence[Tensor]) -> dict[int, Tensor]:
    """l -> mean |x_{l+1} - x_l| per channel, (C,), for consecutive features of equal shape."""
    found: dict[int, Tensor] = {}
    for index, (before, after) in enumerate(pairwise(features)):
        if before.shape == after.shape and before.dim() > 1:
            step = (after - before).to(torch.promote_types(after.dtype, torch.float32)).abs()
            found[index] = step.transpose(0, 1).flatten(1).mean(1)
    return found
