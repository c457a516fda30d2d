"""The regularisers that the four methods are compared with: value and gradient by brute force, and their laws."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.groups import Group, trace
from compress.regularize import (
    REGULARIZERS,
    SPARSE_TRAINING,
    BnSlimming,
    GroupLasso,
    GroupSparsity,
    GrowingReg,
    Halo,
    Lasso,
)
from tests.nets import NETS, lively
from tests.test_regularize import channels, gradients, same, setting

BASELINES = {n: m for n, m in REGULARIZERS.items() if n not in ("halo", "ffr", "cka-sr", *SPARSE_TRAINING)}
NORMED = [n for n in NETS if any(isinstance(m, nn.BatchNorm2d) for m in NETS[n]().modules())]


def agree(model: nn.Module, mine: Tensor, wanted: Tensor) -> None:
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    assert same(gradients(model, 3 * mine), gradients(model, 3 * wanted))  # 3: what comes from outside is passed on


def free(groups: tuple[Group, ...]) -> list[Group]:
    return [group for group in groups if group.frozen is None]


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


@pytest.mark.parametrize("name", NETS)
def test_lasso(name: str) -> None:
    model, groups = setting(name)
    made = Lasso(strength=0.1)
    made.attach(model, groups)
    agree(model, made.penalty(), 0.1 * sum(m.weight.abs().sum() for m in convolutions(model)))


@pytest.mark.parametrize("name", NETS)
def test_group_lasso(name: str) -> None:
    model, groups = setting(name)
    made = GroupLasso(strength=0.1)
    made.attach(model, groups)
    wanted = sum(0.1 * len(w) ** 0.5 * w.norm() for g in free(groups) for w in channels(model, g) if len(w))
    agree(model, made.penalty(), wanted)


def test_group_lasso_is_halo_with_lambda_held_at_1() -> None:
    model, groups = setting("residual")
    halo, made = Halo(xi=0.1, psi=0.0, solver="sgd"), GroupLasso(strength=0.1)
    halo.attach(model, groups)
    made.attach(model, groups)
    agree(model, halo.penalty(), made.penalty())


@pytest.mark.parametrize("name", NETS)
def test_group_sparsity(name: str) -> None:
    model, groups = setting(name)
    made = GroupSparsity(strength=0.1)
    made.attach(model, groups)
    wanted = torch.zeros((), dtype=torch.float64)
    for group in free(groups):
        norms = [w.norm() for w in channels(model, group)]
        low, high = min(float(n.detach()) for n in norms), max(float(n.detach()) for n in norms)
        for norm in norms:
            wanted = wanted + 0.05 * 2 ** (4 * (high - float(norm.detach())) / (high - low or 1)) * norm**2
    agree(model, made.penalty(), wanted)


def test_group_sparsity_pulls_the_weakest_16_times_as_hard() -> None:
    model, groups = setting("residual")
    norms = torch.stack([w.norm() for w in channels(model, next(g for g in groups if g.name == "3.0.conv1"))])
    made = GroupSparsity(strength=1.0)
    made.attach(model, tuple(g if g.name == "3.0.conv1" else g.freeze("not here") for g in groups))
    found = gradients(model, made.penalty())["3.0.conv1.weight"]
    pull = (found / model[3][0].conv1.weight.detach()).flatten(1).mean(1)
    assert float(pull[norms.argmin()]) == pytest.approx(16) and float(pull[norms.argmax()]) == pytest.approx(1)


@pytest.mark.parametrize("name", NORMED)
def test_bn_slimming(name: str) -> None:
    model, groups = setting(name)
    made = BnSlimming(strength=0.1)
    made.attach(model, groups)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    agree(model, made.penalty(), 0.1 * sum(m.weight.abs().sum() for m in norms))


def test_bn_slimming_needs_a_batch_norm() -> None:
    with pytest.raises(UsageError, match="this network has none; take group-lasso"):
        BnSlimming().attach(NETS["plain"](), ())


@pytest.mark.parametrize("name", NETS)
def test_growing_reg(name: str) -> None:
    model, groups = setting(name)
    made = GrowingReg(growth=0.1, interval=2, ceiling=0.25)
    made.attach(model, groups)
    for step in range(6):
        level = [0.1, 0.1, 0.2, 0.2, 0.25, 0.25][step]
        wanted = torch.zeros((), dtype=torch.float64)
        for group in free(groups):
            held = channels(model, group)
            wanted = wanted + sum(level / 2 * (held[c] ** 2).sum() for c in chosen(model, group))
        agree(model, made.penalty(), wanted)
        made.after_step()


def chosen(model: nn.Module, group: Group) -> list[int]:
    """The half of the channels whose filters have the least L1 norm, each layer in units of its mean."""
    kinds, worth = dict(model.named_modules()), torch.zeros(group.size, dtype=torch.float64)
    for part in group.slices:
        path, _, leaf = part.name.rpartition(".")
        owner = kinds[path]
        makes = part.dim == (1 if isinstance(owner, nn.ConvTranspose2d) else 0)
        if leaf == "weight" and makes and isinstance(owner, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            size = owner.weight.detach().movedim(part.dim, 0).flatten(1).abs().sum(1)
            worth += size / size.mean()
    return worth.argsort()[: group.size // 2].tolist()


def test_growing_reg_pushes_the_chosen_out_and_leaves_the_others() -> None:
    model, groups = setting("residual")
    group = next(g for g in groups if g.name == "3.0.conv1")
    picked = chosen(model, group)
    before = [w.detach().norm() for w in channels(model, group)]
    made = GrowingReg(growth=1e-2, interval=1)
    made.attach(model, tuple(g if g is group else g.freeze("not here") for g in groups))
    for _ in range(100):
        model.zero_grad()
        made.penalty().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        made.after_step()
    left = [float(w.detach().norm() / b) for w, b in zip(channels(model, group), before, strict=True)]
    assert all((share < 0.05) == (c in picked) for c, share in enumerate(left))
    assert all(left[c] == pytest.approx(1) for c in range(group.size) if c not in picked)
    assert set(made.scores()[group.name].argsort()[: len(picked)].tolist()) == set(picked)


def test_growing_reg_resumes_where_it_stood_and_starts_anew_on_another_network() -> None:
    model, groups = setting("residual")
    one = GrowingReg()
    one.attach(model, groups)
    for _ in range(25):
        one.after_step()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(tensor.flip(0))  # the weights have moved on: the choice must not
    two, three = GrowingReg(), GrowingReg()
    two.attach(model, groups)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two.penalty(), one.penalty()) and two.level() == pytest.approx(3e-4)
    three.attach(model, groups)
    three.load_state_dict({k: v for k, v in one.state_dict().items() if isinstance(v, int | float)})
    assert three.level() == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="out of range"):
        GrowingReg(share=1.0)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("net", NETS)
def test_dead_channels_have_finite_gradients_and_the_lowest_score(name: str, net: str) -> None:
    if name == "bn-slimming" and net not in NORMED:
        return
    model, groups = setting(net)
    with torch.no_grad():
        for group in free(groups):
            for part in group.slices:
                model.state_dict()[part.name].narrow(part.dim, part.offset, part.block).zero_()
    made = BASELINES[name]()
    made.attach(model, groups)
    assert all(bool(g.isfinite().all()) for g in gradients(model, made.penalty()).values())
    found = made.scores()
    assert found.keys() == {group.name for group in groups}
    for group in groups:
        assert found[group.name].shape == (group.size,) and found[group.name].dtype == torch.float32
        if group.frozen is None and (len(channels(model, group)[0]) or name in ("lasso", "bn-slimming")):
            assert found[group.name][0] == 0 == found[group.name].min()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("factor", [0.1, 7.0, 1e6])
def test_scaling_multiplies_the_penalty(name: str, factor: float) -> None:
    model, groups = setting("residual")
    made = BASELINES[name]()
    made.attach(model, groups)
    before = float(made.penalty().detach())
    made.scale_penalty(factor)
    assert float(made.penalty().detach()) == pytest.approx(factor * before, rel=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_stays_on_the_network(name: str) -> None:
    model = lively(NETS["residual"]())
    before = copy.deepcopy(model.state_dict())
    made = BASELINES[name]()
    made.attach(model, trace(model, torch.randn(1, 3, 16, 16)))
    made.penalty().backward()
    made.after_step()
    made.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(made.parameters()) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
