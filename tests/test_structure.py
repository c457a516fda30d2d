"""Module integers follow tensor shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.errors import LoadError, PruneError
from compress.structure import redraw, resize, underived


def _narrowed(module: nn.Module, **shapes: tuple[int, ...]) -> nn.Module:
    resize(module, {name: torch.randn(shape) for name, shape in shapes.items()})
    return module


def _attributes(module: nn.Module, *names: str) -> tuple[object, ...]:
    return tuple(getattr(module, name) for name in names)


CONV = ("in_channels", "out_channels", "groups")


@pytest.mark.parametrize(
    ("module", "shape", "wanted", "image"),
    [
        (nn.Conv2d(8, 6, 3), (4, 5, 3, 3), (5, 4, 1), (1, 5, 9, 9)),
        (nn.Conv2d(1, 6, 3), (4, 1, 3, 3), (1, 4, 1), (1, 1, 9, 9)),
        (nn.Conv2d(8, 8, 3, groups=8), (5, 1, 3, 3), (5, 5, 5), (1, 5, 9, 9)),
        (nn.Conv2d(8, 16, 3, groups=8), (6, 1, 3, 3), (3, 6, 3), (1, 3, 9, 9)),
        (nn.Conv2d(8, 8, 3, groups=8), (1, 1, 3, 3), (1, 1, 1), (1, 1, 9, 9)),
        (nn.Conv2d(8, 12, 3, groups=4), (8, 1, 3, 3), (4, 8, 4), (1, 4, 9, 9)),
        (nn.Conv1d(8, 6, 3), (4, 5, 3), (5, 4, 1), (1, 5, 9)),
        (nn.ConvTranspose2d(8, 6, 3), (5, 4, 3, 3), (5, 4, 1), (1, 5, 9, 9)),
        (nn.ConvTranspose2d(8, 8, 3, groups=8), (5, 1, 3, 3), (5, 5, 5), (1, 5, 9, 9)),
    ],
)
def test_convolutions(
    module: nn.Module, shape: tuple[int, ...], wanted: tuple[int, ...], image: tuple[int, ...]
) -> None:
    out_channels = wanted[1]
    _narrowed(module, weight=shape, bias=(out_channels,))
    assert _attributes(module, *CONV) == wanted
    assert module(torch.randn(image)).shape[1] == out_channels


def test_other_modules() -> None:
    assert _attributes(_narrowed(nn.Linear(8, 6), weight=(4, 5)), "in_features", "out_features") == (5, 4)
    assert _attributes(_narrowed(nn.BatchNorm2d(8), weight=(5,)), "num_features") == (5,)
    assert _attributes(_narrowed(nn.BatchNorm2d(8, affine=False), running_mean=(5,)), "num_features") == (5,)
    assert _attributes(_narrowed(nn.GroupNorm(2, 8), weight=(4,)), "num_channels", "num_groups") == (4, 2)
    assert _attributes(_narrowed(nn.LayerNorm(8), weight=(5,)), "normalized_shape") == ((5,),)
    assert _attributes(_narrowed(nn.RMSNorm(8), weight=(5,)), "normalized_shape") == ((5,),)
    assert _attributes(_narrowed(nn.PReLU(8), weight=(5,)), "num_parameters") == (5,)
    assert _attributes(_narrowed(nn.Embedding(9, 8), weight=(9, 5)), "num_embeddings", "embedding_dim") == (9, 5)


def test_resize_keeps_kinds_and_takes_values_over() -> None:
    module = nn.BatchNorm2d(8)
    module.bias.requires_grad_(False)
    values = {name: torch.randn(5) for name in ("weight", "bias", "running_mean")}
    resize(module, values)
    assert isinstance(module.weight, nn.Parameter) and module.weight.requires_grad
    assert isinstance(module.bias, nn.Parameter) and not module.bias.requires_grad
    assert "running_mean" in dict(module.named_buffers())
    assert all(torch.equal(module.state_dict()[name], value) for name, value in values.items())


@pytest.mark.parametrize("names", [("0.weight",), ("1.weight",), ("0.weight", "1.weight")])
def test_a_shared_parameter_stays_shared(names: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    value = torch.randn(3, 3)
    resize(model, dict.fromkeys(names, value))
    assert model[0].weight is model[1].weight
    assert _attributes(model[0], "in_features") == _attributes(model[1], "in_features") == (3,)


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"weight": torch.ones(2, 2), "scale": torch.ones(2)}, "the network has no tensor 'scale'"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(2, 2)}, "bias has 2 dimensions where the network has 1"),
    ],
)
def test_refusals_change_nothing(tensors: dict[str, Tensor], text: str) -> None:
    module = nn.Linear(8, 6)
    with pytest.raises(LoadError) as error:
        resize(module, tensors)
    assert str(error.value) == text
    assert module.weight.shape == (6, 8)


def test_underived_names_what_tensors_do_not_tell() -> None:
    dense = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4, bias=False), nn.Conv2d(8, 4, 1))
    cut = copy.deepcopy(dense)
    cut[0] = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    cut[1] = nn.Conv2d(4, 4, 1)
    assert underived(cut, dense) == {"0": {"in_channels": 4, "groups": 2}}
    assert dense[0].weight.shape == (8, 2, 1, 1)
    assert underived(copy.deepcopy(dense), dense) == {}


def test_redraw_draws_by_seed_keeps_shapes_and_fixed_weights() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1)) for _ in range(2)]
    for model in models:
        model[2].weight.requires_grad_(False).fill_(2.0)
        model[2].bias.requires_grad_(False).fill_(3.0)
        model[1].running_mean.fill_(7.0)
    state = torch.get_rng_state()
    redraw(models[0], 1)
    redraw(models[1], 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(models[0][0].weight, models[1][0].weight)
    assert models[0][1].running_mean.eq(0).all() and models[0][2].weight.eq(2).all()
    before = models[0][0].weight.detach().clone()
    redraw(models[0], 2)
    assert models[0][0].weight.shape == before.shape and not torch.equal(models[0][0].weight, before)


def test_redraw_refuses_what_it_cannot_draw() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("scale", nn.Parameter(torch.ones(2)))
    with pytest.raises(PruneError) as error:
        redraw(model, 0)
    assert str(error.value) == "the network cannot draw its scale anew: it has no reset_parameters"
