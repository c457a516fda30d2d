"""Scores that look at data: gradients of the loss, or what the channels carry.

The network runs in evaluation mode, with the statistics of its batch norms held: normalised by its own batch, a layer
does not feel the length of its filters, and the first-order change of the loss, sum_s g_s w_s, would be 0 for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from compress.groups import Group, Slice
from compress.groups.parts import layer_mean, layers, rows, weights
from compress.scores.layers import Batches, Given, Scores, evaluating, read
from compress.unstrided import unstrided

Loss = Callable[[Any, Any], Tensor]  # the network's output, the targets -> (), the mean over the images
IMAGES = 256  # single images that `hessian` and `obd_c` go through (ours): seconds for a CIFAR network on two cores


def taylor(
    model: nn.Module, groups: Sequence[Group], batches: Batches | None = None, *, loss: Loss = F.cross_entropy
) -> Scores:
    """Squared first-order change of the loss, (sum_s g_s w_s)^2 (Molchanov et al., arXiv 1906.10771, equation 7).

    That is the paper's group contribution; equation 8 would be sum_s (g_s w_s)^2. `g` is averaged over a batch, and
    the square over the batches, as in section 4 there.
    """
    held = _held(model, groups)
    tensors = [tensor for *_, tensor in held]
    totals = [torch.zeros(()) for _ in held]
    with evaluating(model), _differentiable(tensors), unstrided(model):
        for given, targets in read(model, batches, "taylor"):
            gradients = _gradients(loss(model(*given), targets), tensors)
            for at, (group, part, tensor) in enumerate(held):
                change = rows(gradients[at] * tensor.detach(), part, group.size).double().sum(1)
                totals[at] = totals[at] + change.square().cpu()
    return _by_group(groups, held, totals)


def hessian(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Batches | None = None,
    *,
    loss: Loss = F.cross_entropy,
    images: int = IMAGES,
) -> Scores:
    """Second-order change of the loss, sum_s w_s^2 mean_n g_ns^2 (LeCun et al., Optimal Brain Damage, NIPS 1989).

    Their saliency without its factor 1/2, summed over the filter. The diagonal of the Hessian is that of the empirical
    Fisher matrix: squared gradients of single images, averaged over the first `images` of the batches. torch-pruning
    1.6.1 keeps the gradient of the last image alone.
    """
    return _curvature(model, groups, _first(read(model, batches, "hessian"), images), loss)


def obd_c(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None, *, images: int = IMAGES) -> Scores:
    """`hessian` with labels drawn from the network's own predictions (C-OBD of EigenDamage, arXiv 1905.05934).

    So the curvature is the true Fisher matrix's, which does not vanish where the labels are fitted. One label is drawn
    for each image, as in the authors' code, from seed 0. Constant factors are left out.
    """
    generator = torch.Generator().manual_seed(0)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        likely = logits.detach().double().softmax(1).cpu()
        drawn = torch.multinomial(likely, 1, generator=generator).flatten()
        return F.cross_entropy(logits, drawn.to(logits.device))

    return _curvature(model, groups, _first(read(model, batches, "obd-c"), images), loss)


def activation(model: nn.Module, groups: Sequence[Group], batches: Batches | None = None) -> Scores:
    """Mean absolute value of the channel after norm and activation (Molchanov et al., arXiv 1611.06440, section 2.2).

    Taken where the channel is read, at the input of the layers behind it, so that it does not matter how the network
    spells its activations; a channel that no layer reads is taken at its own layer's output.
    """
    sums: dict[tuple[str, Slice], Tensor] = {}

    def watch(module: nn.Module, group: Group, part: Slice, places: Tensor, *, is_read: bool) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any = None) -> None:
            values = (inputs[0] if is_read else output).detach().abs().double()
            values = values.movedim(-1 if isinstance(module, nn.Linear) else 1, 0).flatten(1).sum(1).cpu()
            sums[group.name, part] = sums.get((group.name, part), 0) + values[places].flatten(1).sum(1)

        return module.register_forward_pre_hook(record) if is_read else module.register_forward_hook(record)

    handles = []
    for group in groups:
        at = list(layers(model, group, "in"))
        for module, part, places in at or layers(model, group, "out"):
            handles.append(watch(module, group, part, places, is_read=bool(at)))
    try:
        with evaluating(model), torch.no_grad():
            for given, _ in read(model, batches, "activation"):
                model(*given)
    finally:
        for handle in handles:
            handle.remove()
    return {g.name: layer_mean([v for (name, _), v in sums.items() if name == g.name], g.size) for g in groups}


Held = list[tuple[Group, Slice, Tensor]]  # every layer that makes a group's channels


def _held(model: nn.Module, groups: Sequence[Group]) -> Held:
    return [(group, part, tensor) for group in groups for part, tensor in weights(model, group, held=True)]


def _curvature(model: nn.Module, groups: Sequence[Group], batches: Iterator[Given], loss: Loss) -> Scores:
    """sum_s w_s^2 * sum_n g_ns^2, one image at a time: exact for any network, whatever it does to a batch."""
    held = _held(model, groups)
    tensors = [tensor for *_, tensor in held]
    squares = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors]
    with evaluating(model), _differentiable(tensors), unstrided(model):
        for given, targets in batches:
            for at in range(len(given[0])):
                one = loss(model(*(inputs[at : at + 1] for inputs in given)), _part(targets, at, at + 1))
                for total, gradient in zip(squares, _gradients(one, tensors), strict=True):
                    total += gradient.double().square()
    return _by_group(
        groups,
        held,
        [rows(t.detach().square() * s, part, g.size).sum(1) for (g, part, t), s in zip(held, squares, strict=True)],
    )


def _gradients(loss: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d tensor for each, zeros where the loss does not depend on it; `.grad` stays as it is."""
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def _by_group(groups: Sequence[Group], held: Held, values: Sequence[Tensor]) -> Scores:
    of: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    for (group, *_), value in zip(held, values, strict=True):
        of[group.name].append(value)
    return {group.name: layer_mean(of[group.name], group.size) for group in groups}


def _first(batches: Iterator[Given], images: int) -> Iterator[Given]:
    """The batches up to `images` images, the last one cut."""
    left = images
    for given, targets in batches:
        yield tuple(inputs[:left] for inputs in given), _part(targets, 0, left)
        left -= len(given[0])
        if left <= 0:
            return


def _part(targets: Any, start: int, end: int) -> Any:
    """Some images' targets, whatever they are made of; tensors have one row an image."""
    return tree_map_only(Tensor, lambda target: target[start:end], targets)


@contextmanager
def _differentiable(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Gradients are computed, and for weights too that training holds fixed."""
    fixed = [tensor for tensor in tensors if not tensor.requires_grad]
    try:
        for tensor in fixed:
            tensor.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for tensor in fixed:
            tensor.requires_grad_(False)
