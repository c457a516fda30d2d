"""Copies of a network for trials: the structure is copied, the weights are shared until one is replaced."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from compress.structure import forget


def shared(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose tensors are the model's own memory; none may be written in place."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    twin = copy.deepcopy(model, memo).eval()
    for module in twin.modules():
        forget(module)
    return twin


def lively(model: nn.Module) -> nn.Module:
    """A shared copy in which no vector and no weight is zero or all but zero, so that no branch is off in a trial.

    A zero-initialised last norm of a residual branch, or a layer scale of 1e-6, would let any cut inside the branch
    pass. What is added becomes about a tenth: more would drown what the layers say of the input, and with it a wrong
    order of tokens. Other values keep their size: activations neither die out nor overflow. [ours]
    """
    twin = shared(model)
    generator = torch.Generator().manual_seed(0)
    fresh: dict[int, Tensor] = {}
    for module in twin.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or not tensor.is_floating_point():
                continue
            if id(tensor) not in fresh:
                fresh[id(tensor)] = _awake(tensor, name, generator)
            new = fresh[id(tensor)]
            if name in module._parameters:
                module._parameters[name] = new if isinstance(new, nn.Parameter) else nn.Parameter(new, False)
                fresh[id(tensor)] = module._parameters[name]  # type: ignore[assignment]
            else:
                module._buffers[name] = new
    return twin


def _awake(tensor: Tensor, name: str, generator: torch.Generator) -> Tensor:
    if tensor.dim() == 0:  # a gate that begins at 0 would hide its whole branch from a trial
        return tensor if bool(tensor) else torch.rand((), generator=generator, dtype=torch.float64).add_(0.5).to(tensor)
    if tensor.dim() != 1:
        if bool(tensor[:1].any()) or bool(tensor.any()):
            return tensor
        return torch.randn(tensor.shape, generator=generator).to(tensor) / math.sqrt(max(1, tensor[0].numel()))
    spread = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).add_(0.5).to(tensor)
    scaled = tensor.mul(spread)
    if name == "running_var":
        return scaled
    is_added = "bias" in name or name == "running_mean"
    fresh = torch.randn(tensor.shape, generator=generator).to(tensor).mul_(0.1) if is_added else spread
    return torch.where(tensor.abs() < 1e-3, fresh, scaled)
