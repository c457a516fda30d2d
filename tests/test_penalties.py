"""Penalties and scores written out once more, in float64: grouped layers, several segments, every option."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import groupby, pairwise, permutations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.groups import Group, cut, trace
from compress.groups.parts import weights
from compress.regularize import (
    BnSlimming,
    CkaSr,
    Ffr,
    GroupLasso,
    GroupSparsity,
    GrowingReg,
    Halo,
    Lasso,
    Regularizer,
)
from compress.regularize.channels import filter_sizes
from compress.scores import SCORES
from tests.nets import NETS, NormsLast, Residual, SelfReading, lively
from tests.test_cka import similarity

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def grouped() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, groups=4), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 1, groups=2, bias=False), nn.ReLU(), nn.Conv2d(12, 6, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )


def staged() -> nn.Module:
    """Two stages of blocks, of three features each."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Sequential(Residual(8, 8), Residual(8, 8))),
        nn.Sequential(Residual(8, 16, 2), Residual(16, 16), Residual(16, 16)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3)),
    )


KINDS: dict[str, Callable[[], nn.Module]] = {
    "grouped": grouped,
    "staged": staged,
    "self-reading": SelfReading,
    "norms-last": NormsLast,
    **NETS,
}


def setting(kind: str, seed: int = 0) -> tuple[nn.Module, tuple[Group, ...]]:
    torch.manual_seed(seed)
    model = lively(KINDS[kind]()).double()
    return model, trace(model, X)


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of convolutions and of linear layers but the last, by name."""
    modules = dict(model.named_modules())
    *_, classifier = (module for module in modules.values() if isinstance(module, nn.Linear))
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    held = {name for name, module in modules.items() if isinstance(module, kinds) and module is not classifier}
    return {name: p for name, p in model.named_parameters() if p.dim() > 1 and name.rpartition(".")[0] in held}


def owned(model: nn.Module, group: Group) -> list[Tensor]:
    """The weights that leave when one channel does, for each channel: found by cutting it from numbered weights."""
    numbered, start = copy.deepcopy(model), 0
    with torch.no_grad():
        for parameter in numbered.parameters():
            numbers = torch.arange(start, start + parameter.numel(), dtype=torch.float64)
            parameter.copy_(numbers.view_as(parameter))
            start += parameter.numel()
    before = {name: numbered.get_parameter(name).detach().clone() for name in matrices(model)}
    found = []
    for channel in range(group.size):
        smaller = copy.deepcopy(numbered)
        cut(smaller, (group,), {group.name: [c for c in range(group.size) if c != channel]})
        gone = [~torch.isin(numbers, smaller.get_parameter(name).detach()) for name, numbers in before.items()]
        held = zip(matrices(model).values(), gone, strict=True)
        found.append(torch.cat([parameter[mask] for parameter, mask in held]))
    return found


def by_channel(model: nn.Module, groups: tuple[Group, ...]) -> list[Tensor]:
    """The weights of every channel that may leave and has some, in the order of the groups."""
    found = [owned(model, group) for group in groups if group.frozen is None]
    return [own for channels in found for own in channels if len(own)]


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward(retain_graph=True)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 1e-14}


def check(model: nn.Module, mine: Tensor, wanted: Tensor) -> None:
    """Value and gradient agree to 1e-10, relative to the largest entry of each gradient."""
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10) and float(wanted.detach()) != 0
    found, right = gradients(model, mine), gradients(model, wanted)
    assert found.keys() == right.keys()
    for name, gradient in right.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-10 * float(gradient.abs().max()), name


# Groups of one channel per group of a grouped layer, and shuffled ones, do not part with a single channel.
SINGLY = ("grouped", "staged", "self-reading", "plain", "residual", "depthwise", "concat")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", SINGLY)
def test_group_lasso_and_halo_over_channels(kind: str, seed: int) -> None:
    model, groups = setting(kind, seed)
    single = tuple(g if _parts_singly(model, g) else g.freeze("its channels leave several at a time") for g in groups)
    held = by_channel(model, single)
    lasso = GroupLasso(strength=0.1)
    lasso.attach(model, single)
    check(model, lasso.penalty(), sum((0.1 * math.sqrt(len(w)) * w.norm() for w in held), torch.zeros(())))
    for solver in ("closed-form", "sgd"):
        halo = Halo(xi=1e-3, psi=1e-2, solver=solver, target=2.0)  # type: ignore[arg-type]
        halo.attach(model, single)
        sizes = torch.stack([math.sqrt(len(w)) * w.norm() for w in held])
        if solver == "closed-form":
            shrink = (2e-3 * sizes.detach() / 1e-4) ** 0.25
            check(model, halo.penalty(), (1e-3 * sizes / shrink**2).sum())
            continue
        (trained,) = halo.parameters()
        with torch.no_grad():
            trained.copy_(0.5 + torch.rand(trained.shape, generator=torch.Generator().manual_seed(2)))
        free = trained.detach().clone().requires_grad_()
        check(model, halo.penalty(), (1e-3 * sizes / free**2).sum() + 1e-2 * (free.abs().sum() - 2.0).abs())
        assert trained.grad is not None and free.grad is not None
        assert torch.allclose(trained.grad, free.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", SINGLY)
def test_group_sparsity_growing_reg_and_bn_slimming(kind: str, seed: int) -> None:
    model, groups = setting(kind, seed)
    single = tuple(g if _parts_singly(model, g) else g.freeze("its channels leave several at a time") for g in groups)
    held = {group.name: owned(model, group) for group in single if group.frozen is None}
    sparsity, growing = GroupSparsity(strength=0.1, alpha=3.0), GrowingReg(growth=0.2, ceiling=2.0, share=0.4)
    terms = []
    for own in held.values():
        norms = torch.stack([w.norm() for w in own])
        shrink = 2.0 ** (3 * (norms.max() - norms) / (norms.max() - norms.min())).detach()
        terms.append(0.05 * (shrink * norms.square()).sum())
    sparsity.attach(model, single)
    check(model, sparsity.penalty(), torch.stack(terms).sum())
    growing.attach(model, single)
    sizes = {group.name: filter_sizes(model, group) for group in single}
    weakest = {name: sizes[name].argsort(stable=True)[: int(0.4 * len(own))].tolist() for name, own in held.items()}
    chosen = [held[name][channel].square().sum() for name, places in weakest.items() for channel in places]
    check(model, growing.penalty(), 0.1 * torch.stack(chosen).sum())
    scales = [m.weight.abs().sum() for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if scales:
        slimming = BnSlimming(strength=0.3)
        slimming.attach(model, single)
        check(model, slimming.penalty(), 0.3 * torch.stack(scales).sum())


def _parts_singly(model: nn.Module, group: Group) -> bool:
    if group.frozen is not None or group.size == 1:
        return False
    smaller = copy.deepcopy(model)
    try:
        cut(smaller, (group,), {group.name: list(range(1, group.size))})
        smaller(X)
    except Exception:
        return False
    return True


def test_every_kind_has_channels_that_leave_singly() -> None:
    for kind in SINGLY:
        model, groups = setting(kind)
        assert sum(_parts_singly(model, group) for group in groups) >= (
            1 if kind in ("grouped", "self-reading", "plain") else 2
        ), kind


@pytest.mark.parametrize("kind", KINDS)
def test_halo_and_lasso_over_weights(kind: str) -> None:
    model, groups = setting(kind)
    halo, lasso = Halo(xi=1e-3, granularity="weight"), Lasso(strength=1e-3)
    halo.attach(model, groups)
    lasso.attach(model, groups)
    convolutions = [module for module in model.modules() if isinstance(module, nn.modules.conv._ConvNd)]
    held = [p for module in convolutions for p in (module.weight, module.bias) if p is not None]
    total = sum((1e-3 * p.abs() / (2e-3 * p.detach().abs() / 1e-4).sqrt()).sum() for p in held)
    assert isinstance(total, Tensor)
    check(model, halo.penalty(), total)
    check(model, lasso.penalty(), 1e-3 * sum((m.weight.abs().sum() for m in convolutions), torch.zeros(())))


def fitted(feature: Tensor, like: Tensor) -> Tensor:
    while feature.shape[-1] > like.shape[-1]:
        n, c, height, width = feature.shape
        feature = feature.view(n, c, height // 2, 2, width // 2, 2).mean((3, 5))
    return F.pad(feature, (0, 0, 0, 0, 0, like.shape[1] - feature.shape[1]))


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("align", ["skip", "pad"])
@pytest.mark.parametrize("curvature", ["second-difference", "angle"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_ffr_with_every_option(norm: str, curvature: str, align: str, samples: int | None) -> None:
    model, _ = setting("staged")
    model.train()
    stem, (first, second) = nn.Sequential(*model[:2]), model[2:4]  # type: ignore[index]
    stages: list[list[Tensor]] = [[stem(X)], []]
    for block in first:
        stages[0].append(block(stages[0][-1]))
    feature = stages[0][-1]
    for block in second:
        feature = block(feature)
        stages[1].append(feature)
    if align == "pad":
        stages = [[fitted(x, stages[1][0]) for x in stages[0]] + stages[1]]
    stages = [[x[:samples] for x in stage] for stage in stages]

    def size(v: Tensor) -> Tensor:
        return v.abs().mean() if norm == "l1" else v.square().mean()

    def bend(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        if curvature == "second-difference":
            return size(c - 2 * b + a)
        back, on = (b - a).flatten(1), (c - b).flatten(1)
        return (1 - (back * on).sum(1) / (back.norm(dim=1) * on.norm(dim=1))).mean()

    lengths = [torch.stack([size(b - a) for a, b in pairwise(s)]).mean() for s in stages]
    bends = [torch.stack([bend(*s[i : i + 3]) for i in range(len(s) - 2)]).mean() for s in stages]
    wanted = 0.3 * torch.stack(lengths).mean() + 0.7 * torch.stack(bends).mean()
    ffr = Ffr(k1=0.3, k2=0.7, norm=norm, curvature=curvature, align=align, samples=samples)  # type: ignore[arg-type]
    ffr.attach(model, ())
    model(X)
    mine = ffr.penalty()
    ffr.detach()
    check(model, mine, wanted)


@pytest.mark.parametrize("kind", ["grouped", "depthwise", "self-reading", "norms-last"])
def test_ffr_and_cka_sr_over_the_activations_of_networks_without_blocks(kind: str) -> None:
    model, groups = setting(kind)
    model.train()
    features: list[Tensor] = []
    acts = [m for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    handles = [act.register_forward_hook(lambda module, inputs, output: features.append(output)) for act in acts]
    model(X)
    for handle in handles:
        handle.remove()
    stages = [list(run) for _, run in groupby(features, key=lambda feature: feature.shape)]
    steps = [torch.stack([(b - a).abs().mean() for a, b in pairwise(s)]).mean() for s in stages if len(s) > 1]
    bends = [(s[2] - 2 * s[1] + s[0]).abs().mean() for s in stages if len(s) == 3]
    # the formula would cancel what all images share, with a loss of digits: it goes first
    pairs = [(a - a.mean(0), b - b.mean(0)) for stage in stages for a, b in permutations(stage, 2)]
    assert steps and max(map(len, stages)) <= 3
    wanted = 0.3 * torch.stack(steps).mean() + 0.7 * sum(bends, torch.zeros(())) / max(len(bends), 1)
    methods: dict[Regularizer, Tensor] = {
        Ffr(k1=0.3, k2=0.7, samples=None): wanted,
        CkaSr(beta=0.2, samples=len(X)): 0.2 * torch.stack([similarity(a, b) for a, b in pairs]).sum(),
    }
    for method, value in methods.items():
        method.attach(model, groups)
        model(X)
        check(model, method.penalty(), value)
        method.detach()


@pytest.mark.parametrize("kind", ["grouped", "staged"])
def test_scores_are_their_formulas(kind: str) -> None:
    """On groups that one layer makes: there is nothing to average, and a score is known up to a factor."""
    model, groups = setting(kind)
    norms = {"grouped": {"2": "3"}, "staged": {}}[kind]
    found = 0
    for group in groups:
        made = list(weights(model, group))
        if group.frozen is not None or len(made) != 1:
            continue
        ((part, weight),) = made
        rows = weight.detach().flatten(1)
        assert part.block == 1 and rows.shape[0] == group.size
        formulas = {"l1": rows.abs().sum(1), "l2": rows.square().sum(1).sqrt()}
        if norm := norms.get(part.name.rpartition(".")[0]):
            formulas["bn-scale"] = model.get_parameter(f"{norm}.weight").detach().abs()
        for name, wanted in formulas.items():
            score = SCORES[name](model, groups)[group.name].double()
            assert torch.allclose(score / score.sum(), wanted / wanted.sum(), rtol=1e-6), (name, group.name)
            found += 1
    assert found >= 2


def test_ffr_s_score_has_the_scale_of_the_norm_in_it() -> None:
    model, groups = setting("staged")
    ffr = Ffr()
    ffr.attach(model, groups)
    for block in ("2.0", "3.1"):
        filters = model.get_parameter(f"{block}.conv1.weight").detach().flatten(1).abs().sum(1)
        filters = filters * model.get_parameter(f"{block}.bn1.weight").detach().abs()
        assert torch.allclose(ffr.scores()[f"{block}.conv1"].double(), filters / filters.max(), rtol=1e-6)


def test_the_scores_of_halo_are_their_formulas() -> None:
    model, groups = setting("staged")
    singly = [group for group in groups if _parts_singly(model, group)]
    halo = Halo(xi=1e-3)
    halo.attach(model, groups)
    scores = halo.scores()
    for group in singly:
        own = [w.detach() for w in owned(model, group)]
        shrink = [math.sqrt(2e-3 * math.sqrt(len(w)) * float(w.norm()) / 1e-4) for w in own]  # lambda^2
        wanted = [float(w.norm()) * s / math.sqrt(len(w)) for w, s in zip(own, shrink, strict=True)]
        assert torch.allclose(scores[group.name].double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6)
    finely = Halo(xi=1e-3, granularity="weight")
    finely.attach(model, groups)
    for group in (g for g in singly if len(list(weights(model, g))) == 1):
        ((_, weight),) = weights(model, group)
        each = weight.detach().abs()
        wanted_sum = (each * (2e-3 * each / 1e-4).sqrt()).flatten(1).sum(1)
        assert torch.allclose(finely.scores()[group.name].double(), wanted_sum, rtol=1e-6)


def test_halo_by_weight_ranks_the_channels_of_a_hidden_linear_layer_by_size() -> None:
    model, groups = setting("plain")
    halo = Halo(granularity="weight")
    halo.attach(model, groups)
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    hidden = [g for g in groups if g.frozen is None and any(p.name.rpartition(".")[0] in linear for p in g.slices
              if p.dim == 0)]  # fmt: skip
    assert hidden
    for group in hidden:
        assert torch.equal(halo.scores()[group.name], SCORES["l1"](model, groups)[group.name])


def test_in_a_transformer_the_linear_layers_are_penalised_too() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Flatten(),
        nn.Linear(512, 2),
    ).double()  # fmt: skip
    for method in (Halo(granularity="weight"), Lasso()):
        method.attach(model, ())
        assert gradients(model, method.penalty()).keys() >= {"0.weight", "2.weight", "4.weight"}
        assert "6.weight" not in gradients(model, method.penalty())


@pytest.mark.parametrize("make", [Ffr, CkaSr])
def test_attached_twice_it_watches_once(make: type) -> None:
    model, groups = setting("residual")
    model.train()
    method: Regularizer = make()
    method.attach(model, groups)
    model(X)
    once = float(method.penalty().detach())
    method.attach(model, groups)
    model(X)
    assert float(method.penalty().detach()) == pytest.approx(once, rel=1e-6) and once > 0
    method.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
