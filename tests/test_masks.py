"""A masked weight is 0 in value, gradient and optimiser state, whatever optimises it; nothing else is touched."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

from compress.groups import trace
from compress.regularize.channels import maskable
from compress.regularize.keep_zeros import KeepZeros
from compress.regularize.masks import Masks
from tests.nets import NETS

X = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 4
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=True),
}


def network(name: str = "residual") -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().train()


def random_masks(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(p.shape, generator=generator) < density for name, p in maskable(model).items()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()


def dead_parts(masks: Masks, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every dead place's value, gradient and optimiser state."""
    found = []
    for name, tensor in masks.tensors.items():
        kept = [v for v in optimizer.state[tensor].values() if v.shape == tensor.shape]
        found += [t[~masks.alive[name]] for t in (tensor.detach(), tensor.grad, *kept)]
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dead_weights_stay_exactly_zero_under(name: str) -> None:
    model = network()
    masks = Masks(maskable(model), random_masks(model))
    masks.watch()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = {n: p.detach().clone() for n, p in masks.tensors.items()}
    for _ in range(20):
        step(model, optimizer)
        assert all(not part.any() for part in dead_parts(masks, optimizer))
    assert len(dead_parts(masks, optimizer)) >= 3 * len(masks.tensors)  # the state was looked at, too
    for n, alive in masks.alive.items():
        assert (before[n] != masks.tensors[n])[alive].all()
    masks.release()
    step(model, optimizer)
    assert any(part.any() for part in dead_parts(masks, optimizer))


WITH_CLOSURE = {
    **OPTIMIZERS,
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=3, line_search_fn="strong_wolfe"),
}


@pytest.mark.parametrize("is_named", [False, True])
@pytest.mark.parametrize("name", WITH_CLOSURE)
def test_dead_weights_stay_zero_where_the_step_is_given_a_closure(name: str, is_named: bool) -> None:
    """So do LBFGS, and loops that hand the optimiser the forward and backward pass."""
    model = network()
    masks = Masks(maskable(model), random_masks(model))
    looks: list[int] = []
    masks.watch(lambda gradients: looks.append(sum(int(g.count_nonzero()) for g in gradients.values())))
    optimizer = WITH_CLOSURE[name](model.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), LABELS)
        loss.backward()
        return loss.detach()

    before = {n: p.detach().clone() for n, p in masks.tensors.items()}
    losses = [float(optimizer.step(closure=closure) if is_named else optimizer.step(closure)) for _ in range(6)]
    assert all(not p.detach()[~masks.alive[n]].any() for n, p in masks.tensors.items())
    assert losses[-1] < losses[0] and len(looks) >= 6 and min(looks) > masks.alive_count()  # they were shown dense
    assert all((before[n] != masks.tensors[n])[alive].any() for n, alive in masks.alive.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_dies_later_is_forgotten_by_the_optimiser(name: str) -> None:
    model = network()
    masks = Masks(maskable(model))
    masks.watch()
    optimizer = OPTIMIZERS[name](model.parameters())
    for _ in range(3):
        step(model, optimizer)
    masks.set(random_masks(model))
    masks.apply()
    for name, tensor in masks.tensors.items():
        kept = [v for v in optimizer.state[tensor].values() if v.shape == tensor.shape]
        assert kept and all(not v[~masks.alive[name]].any() and v.any() for v in kept)
    for _ in range(3):
        step(model, optimizer)
        assert all(not part.any() for part in dead_parts(masks, optimizer))


def test_an_optimiser_older_than_the_masks_is_cleared_too() -> None:
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    masks = Masks(maskable(model), random_masks(model))
    masks.watch()
    step(model, optimizer)
    assert all(not part.any() for part in dead_parts(masks, optimizer))


def test_living_weights_train_as_if_there_were_no_mask() -> None:
    """Against gradients masked by hand, in a loop without any hook."""
    model, plain = network(), network()
    alive = random_masks(model)
    masks = Masks(maskable(model), alive)
    masks.watch()
    optimizers = [OPTIMIZERS["sgd"](m.parameters()) for m in (model, plain)]
    state = maskable(plain)
    for name, tensor in state.items():
        tensor.data[~alive[name]] = 0
    for _ in range(5):
        step(model, optimizers[0])
        optimizers[1].zero_grad()
        F.cross_entropy(plain(X), LABELS).backward()
        for name, tensor in state.items():
            tensor.grad[~alive[name]] = 0
        optimizers[1].step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_dense_gradients_are_shown_before_they_are_masked_and_own_hooks_see_masked_ones() -> None:
    model = network()
    masks = Masks(maskable(model), random_masks(model))
    seen: dict[str, Tensor] = {}
    masks.watch(lambda gradients: seen.update({n: g.clone() for n, g in gradients.items()}))
    optimizer = OPTIMIZERS["sgd-fused"](model.parameters())
    norms: list[float] = []
    parameters = list(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: norms.append(float(nn.utils.clip_grad_norm_(parameters, 1e9))))
    step(model, optimizer)
    assert seen.keys() == masks.tensors.keys() and all(seen[n][~masks.alive[n]].any() for n in seen)
    squares = sum(float(p.grad.double().square().sum()) for p in parameters)
    assert norms[0] == pytest.approx(squares**0.5, rel=1e-5)


def test_another_network_is_not_touched_and_no_hook_is_left() -> None:
    gc.collect()  # masks that other tests have dropped let go of the optimisers here, not in between
    before = len(hooks)
    model, other = network(), network()
    masks = Masks(maskable(model), random_masks(model))
    masks.watch()
    masks.watch()
    assert len(hooks) == before + 1
    step(other, OPTIMIZERS["sgd"](other.parameters()))
    assert all(p.grad.count_nonzero() > 0.5 * p.numel() for p in maskable(other).values())
    masks.release()
    masks.release()
    assert len(hooks) == before
    masks.watch()
    del masks
    gc.collect()
    assert len(hooks) == before


def test_the_masks_follow_a_change_of_layout_and_are_kept_in_a_state() -> None:
    model = network()
    masks = Masks(maskable(model), random_masks(model))
    masks.watch()
    model.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    step(model, optimizer)
    assert all(not part.any() for part in dead_parts(masks, optimizer))
    wanted = {n: int(a.sum()) / a.numel() for n, a in masks.alive.items()}
    assert masks.density() == wanted and masks.alive_count() == sum(int(a.sum()) for a in masks.alive.values())
    other = Masks(maskable(network()))
    assert other.alive_count() == sum(p.numel() for p in other.tensors.values())
    other.load_state_dict(masks.state_dict())
    assert other.density() == wanted and all(not t[~other.alive[n]].any() for n, t in other.tensors.items())


def test_masks_that_do_not_fit_are_refused() -> None:
    tensors = maskable(network())
    with pytest.raises(ValueError, match="there are masks for"):
        Masks(tensors, {})
    with pytest.raises(ValueError, match=r"0.weight: the mask has shape \(2,\)"):
        Masks(tensors, {name: torch.ones(2, dtype=torch.bool) for name in tensors})


def test_what_may_be_masked() -> None:
    model = network("plain")
    assert list(maskable(model)) == ["0.weight", "2.weight"]
    assert list(maskable(model, classifier=True)) == ["0.weight", "2.weight", "8.weight"]
    assert list(maskable(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)))) == ["0.weight"]
    assert list(maskable(nn.Linear(4, 3))) == ["weight"]
    with pytest.raises(ValueError, match="no learned weight"):
        maskable(nn.BatchNorm2d(3))


def test_keep_zeros_keeps_the_zeros_it_finds() -> None:
    model = network()
    groups = trace(model, X)
    alive = random_masks(model)
    for name, tensor in maskable(model).items():
        tensor.data[~alive[name]] = 0
    model[0].weight.data[3] = 0
    keep = KeepZeros()
    keep.attach(model, groups)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    assert not keep.penalty().requires_grad and float(keep.penalty()) == 0 and not list(keep.parameters())
    for _ in range(10):
        step(model, optimizer)
        keep.after_step()
    assert all(torch.equal(p != 0, alive[n]) for n, p in maskable(model).items() if n != "0.weight")
    assert not model[0].weight[3].any()
    scores = keep.scores()
    group = next(g for g in groups if [s.name for s in g.slices if s.name == "4.conv1.weight" and s.dim == 0])
    sizes = model[4].conv1.weight.detach().abs().sum((1, 2, 3))
    assert torch.allclose(scores[group.name], sizes / sizes.mean(), rtol=1e-5)
    kept, fresh = copy.deepcopy(keep.state_dict()), KeepZeros()
    keep.detach()
    keep.detach()
    fresh.attach(network(), ())
    fresh.load_state_dict(kept)
    assert fresh.masks.alive_count() == sum(int(m.sum()) for m in kept["masks"].values())
    fresh.detach()
    with pytest.raises(AssertionError, match="attach first"):
        fresh.state_dict()
