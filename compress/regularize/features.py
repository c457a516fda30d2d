"""Where a network's features are: the outputs of its residual blocks, or of its activations; and their first images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish)


def feature_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules to watch, by path: blocks of two or more weight layers that stand in a sequence, else activations.

    Of blocks inside others the outer ones count, but not those that hold two or more: a stage or a whole backbone is no
    block.
    """
    blocks: dict[str, nn.Module] = {}
    for path, container in model.named_modules():
        if isinstance(container, CONTAINERS):
            for name, child in container.named_children():
                weighted = sum(isinstance(m, nn.modules.conv._ConvNd | nn.Linear) for m in child.modules())
                if weighted > 1 and not isinstance(child, CONTAINERS):
                    blocks[f"{path}.{name}" if path else name] = child
    found = _outermost(blocks)
    if len(found) == 1:
        found = _outermost({path: block for path, block in blocks.items() if path not in found}) or found
    while any(_inside(block, blocks) for block in found.values()):
        found = {p: b for path, block in found.items() for p, b in (_inside(block, blocks) or {path: block}).items()}
    return found or {path: module for path, module in model.named_modules() if isinstance(module, ACTIVATIONS)}


def _outermost(blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those that are in no other."""
    inner = {id(m) for block in blocks.values() for m in block.modules() if m is not block}
    return {path: block for path, block in blocks.items() if id(block) not in inner}


def _inside(block: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The outermost blocks inside one; none unless there are two: a gate, say, in an inverted residual is no block."""
    own = {id(m) for m in block.modules() if m is not block}
    found = _outermost({path: other for path, other in blocks.items() if id(other) in own})
    return found if len(found) > 1 else {}


def first_tensor(output: Any) -> Tensor | None:
    """What a block gives: the tensor, or the first of a tuple (of features and attention maps, say)."""
    found = next(iter(output), None) if isinstance(output, tuple | list) else output
    return found if isinstance(found, Tensor) else None


def head(feature: Tensor, samples: int | None) -> Tensor:
    """A copy of the first `samples` images of a feature (None: of all), differentiable.

    Its gradient comes back in the feature's own memory format: that of a plain slice is contiguous, and adding it to
    the gradient of a channels-last network takes several times as long. The copy is there so that what follows may
    change the feature in place.
    """
    if samples is None or samples >= len(feature):
        return feature.clone()
    found: Tensor = _Head.apply(feature, samples)  # type: ignore[no-untyped-call]
    return found


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature: Tensor, samples: int) -> Tensor:
        ctx.shape, ctx.strides = feature.shape, torch.empty_like(feature, device="meta").stride()
        return feature[:samples].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].new_empty_strided(ctx.shape, ctx.strides)
        whole[: len(grads[0])] = grads[0]
        whole[len(grads[0]) :] = 0
        return whole, None
