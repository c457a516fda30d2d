"""Masks over weights that hold under any torch optimiser, without being told of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

Look = Callable[[Mapping[str, Tensor]], None]


class Masks:
    """Which weights of a network are alive; the others stay exactly 0 in value, gradient and optimiser state.

    While watched, a hook before every optimiser's step multiplies the gradients of this network by the masks: after
    the ranks of a distributed run have agreed on them, and before the hooks of the optimiser itself (a norm that is
    clipped there is the masked gradient's). A step that is given a closure works its gradients out itself; there they
    are masked as the closure returns. With weight, gradient and state at 0, no step moves a dead weight, so that
    nothing remains to be done after it.

    Args:
        tensors: name -> the masked parameter.
        alive: name -> bool, of the parameter's shape; None: alive is what is not 0.

    Raises:
        ValueError: names or shapes of `alive` that are not those of `tensors`.
    """

    def __init__(self, tensors: Mapping[str, nn.Parameter], alive: Mapping[str, Tensor] | None = None) -> None:
        self.tensors = dict(tensors)
        self.alive: dict[str, Tensor] = {}
        self._factors: dict[str, Tensor] = {}  # the masks as 0 and 1, as the gradients are laid out
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._hook: weakref.finalize[..., Masks] | None = None
        self._look: Look | None = None
        self.set({name: tensor.detach() != 0 for name, tensor in self.tensors.items()} if alive is None else alive)

    def set(self, alive: Mapping[str, Tensor]) -> None:
        """Take other masks, and `apply` them."""
        if alive.keys() != self.tensors.keys():
            raise ValueError(f"there are masks for {sorted(alive)}, but weights {sorted(self.tensors)}")
        for name, tensor in self.tensors.items():
            if alive[name].shape != tensor.shape:
                raise ValueError(f"{name}: the mask has shape {tuple(alive[name].shape)}, not {tuple(tensor.shape)}")
            self.alive[name] = alive[name].to(tensor.device, torch.bool, copy=True)
        self._factors = {}
        self.apply()

    def watch(self, look: Look | None = None) -> None:
        """Mask the gradients of every optimiser's steps from now on; `look` is shown the dense ones first.

        No reference to the masks is left with torch: whoever drops them drops the hook.
        """
        self.release()
        self._look = look
        own = weakref.ref(self)

        def mask(optimizer: Optimizer) -> None:
            masks = own()
            if masks is not None:
                masks._before_step(optimizer)

        def hook(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimiser
            if closure is None:
                mask(optimizer)
                return None

            def masked() -> Any:
                loss = closure()
                mask(optimizer)
                return loss

            return args[:1], {**kwargs, "closure": masked}

        self._hook = weakref.finalize(self, register_optimizer_step_pre_hook(hook).remove)
        self._hook.atexit = False

    def release(self) -> None:
        """Take the hook off; the zeros stay where they are."""
        if self._hook is not None:
            self._hook()
        self._hook, self._look = None, None

    @torch.no_grad()
    def apply(self) -> None:
        """Set dead weights to 0, and what the optimisers seen so far remember of them."""
        for name, tensor in self.tensors.items():
            tensor.masked_fill_(~self._on(name), 0)
        for optimizer in self._seen:
            self._clear(optimizer)

    def density(self) -> dict[str, float]:
        """Name -> share of the weights that are alive."""
        return {name: int(mask.sum()) / mask.numel() for name, mask in self.alive.items()}

    def alive_count(self) -> int:
        return sum(int(mask.sum()) for mask in self.alive.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: mask.clone() for name, mask in self.alive.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.set(state)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        own = [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._names]
        gradients = {self._names[id(p)]: p.grad for p in own if p.grad is not None}
        if not gradients:
            return
        if optimizer not in self._seen:
            self._seen.add(optimizer)
            self._clear(optimizer)
        if self._look is not None:
            self._look(gradients)
        factors = [self._factor(name, gradient) for name, gradient in gradients.items()]
        torch._foreach_mul_(list(gradients.values()), factors)

    def _clear(self, optimizer: Optimizer) -> None:
        for tensor, name in ((tensor, name) for name, tensor in self.tensors.items() if tensor in optimizer.state):
            for value in optimizer.state[tensor].values():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    value.masked_fill_(~self._on(name), 0)

    def _on(self, name: str) -> Tensor:
        """The mask on the device where its weight is now."""
        self.alive[name] = self.alive[name].to(self.tensors[name].device)
        return self.alive[name]

    def _factor(self, name: str, gradient: Tensor) -> Tensor:
        """The mask as 0 and 1, in the gradient's dtype and layout: six times as fast on a CPU as bool."""
        found = self._factors.get(name)
        if found is None or found.dtype != gradient.dtype or found.device != gradient.device:
            found = torch.empty_like(gradient).copy_(self._on(name))
            self._factors[name] = found
        return found
