"""Module integers that follow tensor shapes: how a network takes on the widths of its tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.errors import LoadError, PruneError


def _conv(module: Any) -> None:
    out_channels, in_per_group = module.weight.shape[:2]  # (O, I/groups, *k)
    if module.groups == module.in_channels > 1:  # depthwise: each input channel feeds O/I filters of its own
        module.groups = out_channels // (module.out_channels // module.groups)
    module.out_channels, module.in_channels = out_channels, in_per_group * module.groups


def _conv_transpose(module: Any) -> None:
    in_channels, out_per_group = module.weight.shape[:2]  # (I, O/groups, *k)
    if module.groups == module.in_channels > 1:
        module.groups = in_channels
    module.in_channels, module.out_channels = in_channels, out_per_group * module.groups


def _linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _norm(module: Any) -> None:
    module.num_features = (module.weight if module.weight is not None else module.running_mean).shape[0]


def _group_norm(module: Any) -> None:
    module.num_channels = module.weight.shape[0]


def _layer_norm(module: Any) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _prelu(module: Any) -> None:
    module.num_parameters = module.weight.numel()


def _embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


Stand = Literal["pass", "zero", "zeros"]  # what a Gone module gives: its input, a scalar 0, zeros of its input's shape

# What each kind of module must be told after its tensors changed shape. Subclasses are matched too, first row wins.
INTEGERS: dict[type[nn.Module], Callable[[nn.Module], None]] = {
    nn.modules.conv._ConvTransposeNd: _conv_transpose,
    nn.modules.conv._ConvNd: _conv,
    nn.Linear: _linear,
    nn.modules.batchnorm._NormBase: _norm,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
    nn.PReLU: _prelu,
    nn.Embedding: _embedding,
}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a cut may change, by its name: the state, and behind it the float buffers that are not saved.

    Such a buffer is what `register_buffer(..., persistent=False)` holds, as the keys' bias of zeros in timm's BEiT.
    """
    state = {name: held for name, held in model.state_dict(keep_vars=True).items() if isinstance(held, Tensor)}
    buffers = model.named_buffers(remove_duplicate=False)
    return state | {name: held for name, held in buffers if name not in state and held.is_floating_point()}


def owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the tensor `name` (a key of `tensors(model)`), and the tensor's attribute name."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def resize(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `values` in the place of the model's own, whatever their shapes, and set the module integers along.

    Args:
        model: changed in place; parameters stay parameters (with their `requires_grad`), buffers stay buffers, and a
            parameter that several modules share stays shared. A buffer that is not saved and takes another shape
            is saved from then on: no network built anew has it in that shape.
        values: keys of `tensors(model)` -> the new values, taken over without a copy.

    Raises:
        LoadError: a name the model does not have, or a tensor with another number of dimensions; nothing is changed.
    """
    holders = _holders(model)
    for name, value in values.items():
        if name not in holders:
            raise LoadError(f"the network has no tensor {name!r}")
        module, leaf = owner(model, name)
        if (old := getattr(module, leaf)).dim() != value.dim():
            raise LoadError(f"{name} has {value.dim()} dimensions where the network has {old.dim()}")
    touched: dict[nn.Module, None] = {}
    for name, value in values.items():
        for module, leaf in holders[name]:
            old = getattr(module, leaf)
            if old.shape != value.shape:
                touched[module] = None
        new = value.detach()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for module, leaf in holders[name]:
            _put(module, leaf, new)
    for module in touched:
        update = next((rule for kind, rule in INTEGERS.items() if isinstance(module, kind)), None)
        if update is not None:
            update(module)
        forget(module)


def remove(model: nn.Module, gone: Mapping[str, Stand]) -> None:
    """Take whole submodules out of a network, in place; a `Gone` without weights stands where each one was.

    Args:
        gone: module path -> what stands there. A branch that is added to a skip path leaves when its last module gives
            zeros and those before it pass their input on.

    Raises:
        LoadError: a path that the model does not have; nothing is changed.
    """
    modules = dict(model.named_modules())
    for path in gone:
        if not path or path not in modules:
            raise LoadError(f"the module {path!r} is to leave, but the network has none of that name: check --arch")
    for path, stand in gone.items():
        parent, _, leaf = path.rpartition(".")
        setattr(modules[parent], leaf, Gone(stand))


def removed(model: nn.Module) -> dict[str, Stand]:
    """What `remove` took out: module path -> what stands there."""
    return {path: module.stand for path, module in model.named_modules() if isinstance(module, Gone)}


def forget(module: nn.Module) -> None:
    """Empty what a module keeps of earlier passes, such as timm's `attention_bias_cache`: it holds the old widths."""
    for name, value in vars(module).items():
        if "cache" in name and isinstance(value, dict):
            value.clear()


def underived(model: nn.Module, dense: nn.Module) -> dict[str, dict[str, int]]:
    """The module integers of a cut network that its tensors do not tell, for `checkpoint.save(..., integers=...)`.

    Args:
        model: the cut network.
        dense: the network it was cut from, or one built anew; not changed.

    Returns:
        module path -> {attribute: value} wherever `resize`, starting from `dense`, arrives at another value.
    """
    rebuilt = copy.deepcopy(dense)
    remove(rebuilt, removed(model))
    resize(rebuilt, model.state_dict())
    found: dict[str, dict[str, int]] = {}
    for path, module in rebuilt.named_modules():
        wanted = integers(model.get_submodule(path))
        for name, value in integers(module).items():
            if wanted.get(name, value) != value:
                found.setdefault(path, {})[name] = wanted[name]
    return found


def integers(module: nn.Module) -> dict[str, int]:
    """The integers that a module holds by attribute; those in a tuple or list as `name[0]`, `name[1]` and so on."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if type(value) is int:
            found[name] = value
        elif type(value) in (tuple, list):
            found.update({f"{name}[{at}]": item for at, item in enumerate(value) if type(item) is int})
    return found


def set_integer(module: nn.Module, name: str, value: int) -> None:
    """Set one of `integers`; a tuple or list is replaced by a new one, as others may hold it too."""
    name, _, place = name.partition("[")
    if not place:
        setattr(module, name, value)
        return
    held = getattr(module, name)
    at = int(place.rstrip("]"))
    setattr(module, name, type(held)([*held[:at], value, *held[at + 1 :]]))


def redraw(model: nn.Module, seed: int) -> None:
    """Draw new weights, at the shapes that are there, by each layer's own `reset_parameters`; the control of a pruning.

    In place, from `seed`, whatever the global random state, which stays as it is. Layers without a learned parameter
    of their own keep theirs: a fixed matrix is structure.

    Raises:
        PruneError: a learned parameter belongs to a module that cannot draw it anew.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for path, module in model.named_modules():
            own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
            if own and not hasattr(module, "reset_parameters"):
                raise PruneError(f"{path or 'the network'} cannot draw its {own[0]} anew: it has no reset_parameters")
            if own:
                module.reset_parameters()


def _put(module: nn.Module, leaf: str, new: Tensor) -> None:
    """Set a tensor; a buffer that is not saved becomes part of the state when it takes another shape.

    Buffers keep their order, by which processes that train together exchange them.
    """
    if getattr(module, leaf).shape != new.shape:
        module._non_persistent_buffers_set.discard(leaf)
    setattr(module, leaf, new)


def _holders(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every tensor's name -> all places it is held in: one, or more for a shared one."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    held = tensors(model)
    for name, value in held.items():
        places.setdefault(id(value), []).append(owner(model, name))
    return {name: places[id(value)] for name, value in held.items()}


class Gone(nn.Module):
    """Where a module of a residual branch has left: no weights, and no work that an exported file would keep."""

    def __init__(self, stand: Stand) -> None:
        super().__init__()
        self.stand = stand

    def extra_repr(self) -> str:
        return self.stand

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        x = next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))
        if self.stand == "pass":
            return x
        return torch.zeros((), dtype=x.dtype, device=x.device) if self.stand == "zero" else torch.zeros_like(x)
