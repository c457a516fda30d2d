"""What a network is tried on: one batch of images, or a tuple of the tensors that its forward pass takes in order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from compress.errors import UsageError

Example = Tensor | Sequence[Tensor]


def arguments(example: Example) -> tuple[Tensor, ...]:
    """The tensors to call the network with; each has the batch as its first axis.

    Raises:
        UsageError: there is none, or something that is no tensor.
    """
    given = (example,) if isinstance(example, Tensor) else tuple(example)
    strange = next((type(item).__name__ for item in given if not isinstance(item, Tensor)), None)
    if strange is not None or not given:
        raise UsageError(f"the example holds {strange or 'nothing'}; give one tensor, or a tuple of tensors")
    return given


def like(example: Example, tensor: Tensor) -> tuple[Tensor, ...]:
    """The arguments on `tensor`'s device, and those of floating point in its dtype."""
    found = (given.detach().to(tensor.device) for given in arguments(example))
    return tuple(given.to(tensor.dtype) if given.is_floating_point() else given for given in found)


def fitting(example: Example, model: nn.Module) -> tuple[Tensor, ...]:
    """The arguments on the device and in the dtype of the network's first tensor of floating point, if it has one."""
    own = next((t for t in model.state_dict().values() if t.is_floating_point()), arguments(example)[0])
    return like(example, own)


def shapes(example: Example) -> str:
    """The shapes for an error's text: (1, 3, 8, 8), or several joined by `and`."""
    return " and ".join(str(tuple(given.shape)) for given in arguments(example))


def tile(example: Example, batch: int) -> tuple[Tensor, ...]:
    """The first `batch` entries of each tensor, from the start again where there are fewer; floats as float32, CPU."""
    found = (given.detach().cpu() for given in arguments(example))
    held = (given.float() if given.is_floating_point() else given for given in found)
    return tuple(given[torch.arange(batch) % len(given)].contiguous() for given in held)
