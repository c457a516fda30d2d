"""Single weights set to zero: exactly as many as asked, the smallest of all layers, and no layer dies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.errors import PruneError, TargetError, UsageError
from compress.regularize import Halo
from compress.regularize.channels import maskable
from compress.sparse import FLOOR, WORTHS, budget, choose, density, remaining, thin, weigh
from tests.nets import NETS, Tied


def network(name: str = "residual") -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("keep", [0.35, 0.5, 0.777, 1.0])
def test_the_target_is_met_to_the_weight(name: str, keep: float) -> None:
    model = network(name)
    total = params(model)
    if keep < budget(model).lowest:
        with pytest.raises(TargetError, match="the lowest reachable share is"):
            thin(model, keep=keep)
        return
    before = copy.deepcopy(model.state_dict())
    found = thin(model, keep=keep)
    weights = maskable(model)
    gone = sum(int((tensor == 0).sum()) for tensor in weights.values())
    assert found.params == remaining(model) == total - gone
    assert keep * total - 1 < found.params <= keep * total and found.reached == found.params / total
    for key, value in model.state_dict().items():
        if key not in weights:  # norms, biases, the classifier
            assert torch.equal(value, before[key])
        assert ((value == before[key]) | (value == 0)).all() and value.shape == before[key].shape
    assert found.density == {key: alive / all_ for key, (all_, alive) in density(model).items()}


def test_what_remains_is_what_is_largest() -> None:
    model = network()
    before = {name: tensor.detach().abs() for name, tensor in maskable(model).items()}
    thin(model, keep=0.5)
    alive = {name: tensor.detach() != 0 for name, tensor in maskable(model).items()}
    least = min(float(before[name][mask].min()) for name, mask in alive.items())
    most = max(float(before[name][~mask].max()) for name, mask in alive.items() if not mask.all())
    assert most <= least  # one threshold for all layers


def test_the_lowest_target_is_reachable_and_none_below() -> None:
    model = network()
    lowest = budget(model).lowest
    assert thin(copy.deepcopy(model), keep=lowest).params == round(lowest * params(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError) as caught:
        thin(model, keep=lowest - 1 / params(model))
    assert caught.value.lowest == lowest
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_layer_dies() -> None:
    model = network()
    with torch.no_grad():
        next(iter(maskable(model).values())).mul_(1e-6)
    thin(model, keep=budget(model).lowest + 0.05)
    for tensor in maskable(model).values():
        assert int(tensor.count_nonzero()) >= max(1, math.ceil(FLOOR * tensor.numel()))


def test_linear_layers_are_thinned_only_without_convolutions() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    thin(model, keep=0.3)
    assert [float((model[i].weight == 0).any()) for i in (1, 3, 5)] == [1, 1, 0]
    assert "9.weight" not in density(network("plain"))  # its classifier
    with pytest.raises(PruneError, match="nothing can be set to zero"):
        thin(nn.BatchNorm2d(3), keep=0.5)


def test_tied_weights_count_once() -> None:
    torch.manual_seed(0)
    model = Tied()
    assert thin(model, keep=0.5).params == params(model) // 2


@pytest.mark.parametrize("name", WORTHS)
def test_every_score_meets_the_target(name: str) -> None:
    model = network()
    assert thin(model, keep=0.4, worth=name, seed=3).params == int(0.4 * params(model))


def test_lamp_is_equation_1() -> None:
    weight = torch.tensor([[3.0, -1.0], [2.0, -2.0]], dtype=torch.float64)
    ranked = sorted(((float(v) ** 2, i) for i, v in enumerate(weight.flatten())))
    expected = torch.empty(4, dtype=torch.float64)
    for place, (square, index) in enumerate(ranked):
        expected[index] = square / sum(other for other, _ in ranked[place:])
    model = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False, dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(weight.view(2, 2, 1, 1))
    assert torch.allclose(weigh(model, "lamp")["0.weight"].flatten(), expected, atol=1e-15)


def test_ties_and_forbidden_places() -> None:
    worth = {"a": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([[-math.inf, 1.0], [-math.inf, -math.inf]])}
    chosen = choose(worth, 3)
    assert chosen["a"].tolist() == [True, True, False] and chosen["b"].tolist() == [[False, True], [False, False]]
    assert sum(int(mask.sum()) for mask in choose(worth, 7).values()) == 4  # never more than may stay


def test_random_depends_on_the_seed_alone() -> None:
    def kept(seed: int) -> Tensor:
        model = network()
        thin(model, keep=0.4, worth="random", seed=seed)
        return torch.cat([tensor.flatten() != 0 for tensor in maskable(model).values()])

    assert torch.equal(kept(1), kept(1)) and not torch.equal(kept(1), kept(2))


@pytest.mark.parametrize("solver", ["closed-form", "sgd"])
def test_halo_offers_a_score_for_every_weight(solver: str) -> None:
    model = network()
    halo = Halo(solver=solver, granularity="weight", xi=1e-3)
    halo.attach(model, ())
    if solver == "sgd":
        with torch.no_grad():
            next(iter(halo.parameters())).uniform_(0.1, 2.0)
    found, weights = halo.weight_scores(), maskable(model)
    assert weights.keys() <= found.keys()
    shrink = dict(zip(found, halo.shrinkage(halo.sizes()).split([t.numel() for t in found.values()]), strict=True))
    for name, tensor in weights.items():
        expected = tensor.detach().abs() * shrink[name].view_as(tensor).square()
        assert torch.allclose(found[name], expected, rtol=1e-6)
    assert thin(model, keep=0.4, worth=found).params == int(0.4 * params(model))
    assert Halo().weight_scores() == {}  # of channels it knows nothing finer


def test_refusals() -> None:
    model = network()
    with pytest.raises(UsageError, match=r"the share to keep is 1\.5"):
        thin(model, keep=1.5)
    with pytest.raises(UsageError, match="'taylor' does not rank single weights; at granularity weight there are l1"):
        thin(model, keep=0.5, worth="taylor")
    with pytest.raises(PruneError, match="no importance of shape"):
        thin(model, keep=0.5, worth={})
    with pytest.raises(PruneError, match="is NaN"):
        thin(model, keep=0.5, worth={name: t.detach() * math.nan for name, t in maskable(model).items()})


def test_it_is_public() -> None:
    model = network("plain")
    assert compress.thin(model, keep=0.5).params == remaining(model)
