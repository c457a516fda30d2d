"""Each regulariser is what its paper says: value and gradient against a float64 brute force, and its laws."""

from __future__ import annotations

import inspect
import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import UsageError
from compress.groups import Group, trace
from compress.regularize import COUNTERS, REGULARIZERS, SPARSE_TRAINING, Ffr, Halo, is_given, numbers
from compress.regularize.features import feature_modules, head
from compress.regularize.halo import GUARD, PATIENCE
from compress.regularize.make import make
from tests.nets import NETS, NormsLast, Residual, Wrapped, lively

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def setting(name: str) -> tuple[nn.Module, tuple[Group, ...]]:
    torch.manual_seed(0)
    model = lively(NETS[name]()).double()
    return model, trace(model, X.double())


def channels(model: nn.Module, group: Group) -> list[Tensor]:
    """By brute force: for each channel, every weight but the classifier's that makes or reads it, one by one."""
    state = dict(model.named_parameters())
    kinds = dict(model.named_modules())
    *hidden, _classifier = [m for m in kinds.values() if isinstance(m, nn.Linear)]
    kept = {id(m) for m in kinds.values() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)} | {id(m) for m in hidden}
    held = [{name: torch.zeros_like(p, dtype=torch.bool) for name, p in state.items()} for _ in range(group.size)]
    for part in group.slices:
        owner = kinds[part.name.rpartition(".")[0]]
        if part.name in state and state[part.name].dim() > 1 and id(owner) in kept:
            for channel in range(group.size):
                for index in range(part.block):
                    held[channel][part.name].select(part.dim, part.offset + channel * part.block + index).fill_(True)
    return [torch.cat([state[name][mask] for name, mask in masks.items()]) for masks in held]


def brute(model: nn.Module, groups: tuple[Group, ...], xi: float, decay: float) -> Tensor:
    """xi * sum sqrt(n) ||w|| / lambda^2 with lambda at its equilibrium, held fixed."""
    total = torch.zeros((), dtype=torch.float64)
    for group in groups:
        if group.frozen is None:
            for weights in channels(model, group):
                if len(weights):
                    u = math.sqrt(len(weights)) * weights.norm()
                    shrink = (2 * xi * u.detach() / decay) ** 0.25
                    total = total + xi * u / shrink.clamp(min=GUARD) ** 2
    return total


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=1e-10, atol=0) for n in a)


@pytest.mark.parametrize("name", NETS)
def test_halo_by_channel(name: str) -> None:
    model, groups = setting(name)
    halo = Halo(xi=1e-3)
    halo.attach(model, groups)
    mine, wanted = halo.penalty(), brute(model, groups, 1e-3, 1e-4)
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    assert same(gradients(model, mine), gradients(model, wanted))


@pytest.mark.parametrize("name", NETS)
def test_halo_by_weight(name: str) -> None:
    model, groups = setting(name)
    halo = Halo(xi=1e-3, psi=1e-2, granularity="weight", solver="sgd", target=3.0)
    halo.attach(model, groups)
    shrink = list(halo.parameters())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for own in shrink:
            own.copy_(0.5 + torch.rand(own.shape, generator=generator))
    mine = gradients(model, halo.penalty())
    mine_shrink = torch.cat([own.grad.flatten() for own in shrink])
    convs = [
        p
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
        for p in (m.weight, m.bias)
        if p is not None
    ]
    free = torch.cat([own.detach().flatten() for own in shrink]).requires_grad_()
    flat = torch.cat([p.flatten() for p in convs])
    wanted = 1e-3 * (flat.abs() / free**2).sum() + 1e-2 * (free.abs().sum() - 3.0).abs()
    assert float(halo.penalty().detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    assert same(mine, gradients(model, wanted))
    assert torch.allclose(mine_shrink, free.grad, rtol=1e-10)


@pytest.mark.parametrize("solver", ["closed-form", "sgd"])
def test_halo_by_weight_is_the_same_in_any_memory_format(solver: str) -> None:
    """Lambda lies in memory as the weights do when attached; what is saved has the order of the axes."""
    found, states = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        model, groups = setting("residual")
        model.to(memory_format=layout)
        halo = Halo(xi=1e-3, psi=1e-2, granularity="weight", solver=solver)
        halo.attach(model, groups)
        if solver == "sgd":
            size = halo.sizes()
            halo.load_state_dict({"xi": 1e-3, "psi": 1e-2, "lambda": 0.5 + size})
        model.to(memory_format=torch.channels_last)  # also one that changes after it was attached
        value = halo.penalty()
        found.append({**gradients(model, value), "value": value.detach()})
        states.append([halo.shrinkage(halo.sizes()), *halo.scores().values()])
    assert same(found[0], found[1])
    assert all(torch.allclose(a, b, rtol=1e-10, atol=0) for a, b in zip(*states, strict=True))


def test_the_head_of_a_feature_has_the_slice_s_gradient_in_the_feature_s_format() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        x = X.clone().to(memory_format=layout).requires_grad_()
        (grad,) = torch.autograd.grad(head(x, 2).square().sum(), x)
        (wanted,) = torch.autograd.grad(x[:2].square().sum(), x)
        assert torch.equal(grad, wanted) and grad.stride() == x.stride()
    for samples in (2, len(X), 100, None):
        hidden = 2 * x
        first = head(hidden, samples)
        hidden.relu_()  # what follows may change the feature: the copy is of the feature as it was
        assert torch.equal(first, 2 * x[:samples])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("halo", {"solver": "SGD"}, "solver = 'SGD' is out of range; allowed is closed-form or sgd"),
        ("halo", {"granularity": "filters"}, "granularity = 'filters'"),
        ("halo", {"xi": -1, "solver": "sgd", "lambda_weight_decay": 0}, "xi = -1"),
        ("halo", {"lambda_weight_decay": 0}, "lambda_weight_decay = 0"),
        ("ffr", {"norm": "L1"}, "norm = 'L1'"),
        ("ffr", {"curvature": "second_difference"}, "curvature = "),
        ("ffr", {"align": "Pad"}, "align = 'Pad'"),
        ("ffr", {"samples": 0}, "samples = 0 is out of range; allowed is a whole number from 1 on"),
        ("cka-sr", {"period": 2.5}, "period = 2.5"),
        ("cka-sr", {"samples": 16.5}, "samples = 16.5"),
        ("lasso", {"strength": -1}, "strength = -1"),
        ("group-lasso", {"strength": 0}, "strength = 0"),
        ("bn-slimming", {"strength": 0}, "strength = 0"),
        ("group-sparsity", {"alpha": -4}, "alpha = -4"),
        ("growing-reg", {"interval": 2.5}, "interval = 2.5"),
        ("growing-reg", {"ceiling": 1e-9}, "ceiling = 1e-09"),
        ("ggr", {"interval": 2.5}, "interval = 2.5"),
    ],
)
def test_an_option_that_is_misspelt_or_out_of_range_is_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        make({name: options}, {})


@pytest.mark.parametrize("is_given", [False, True])
def test_a_lambda_that_nothing_trains_is_spoken_of(is_given: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, groups = setting("residual")
    halo = Halo(xi=1e-3, solver="sgd")
    halo.attach(model, groups)
    own = [{"params": list(halo.parameters()), "weight_decay": 1e-4}] if is_given else []
    optimizer = torch.optim.SGD([{"params": model.parameters()}, *own], lr=0.01)
    for _ in range(PATIENCE):
        optimizer.zero_grad()
        halo.penalty().backward()
        optimizer.step()
        halo.after_step()
    assert ("lambda is still 1 everywhere after 100 steps" in caplog.text) is not is_given


def test_the_numbers_alone_are_the_strength_for_another_network() -> None:
    model, groups = setting("residual")
    for name in REGULARIZERS.keys() - SPARSE_TRAINING:
        method = REGULARIZERS[name](solver="sgd") if name == "halo" else REGULARIZERS[name]()  # type: ignore[call-arg]
        method.attach(model, groups)
        before = {key: value * 2 for key, value in numbers(method.state_dict()).items() if key not in COUNTERS}
        method.load_state_dict({**before, **dict.fromkeys(COUNTERS, 0)})
        assert before and {key: numbers(method.state_dict())[key] for key in before} == before
        method.detach()


def test_which_option_is_a_strength() -> None:
    assert is_given(Halo(), {"xi"}) and not is_given(Halo(), {"psi", "solver"})
    assert is_given(Ffr(), {"k2"}) and not is_given(Ffr(), {"norm"})
    assert not is_given(REGULARIZERS["growing-reg"](), {"ceiling"})
    assert all(is_given(REGULARIZERS[name](), ()) for name in SPARSE_TRAINING)  # there is nothing to calibrate
    for name in REGULARIZERS.keys() - SPARSE_TRAINING:
        method = REGULARIZERS[name]()
        assert set(method.STRENGTHS) and all(is_given(method, {one}) for one in method.STRENGTHS)  # type: ignore[attr-defined]
        assert set(method.STRENGTHS) <= inspect.signature(REGULARIZERS[name]).parameters.keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize("granularity", ["filter", "weight"])
def test_halo_tells_its_mean_lambda(granularity: str) -> None:
    model, groups = setting("residual")
    halo = Halo(xi=1e-3, granularity=granularity)
    halo.attach(model, groups)
    sizes = {
        "filter": {g.name: [math.sqrt(len(w)) * w.norm() for w in channels(model, g)] for g in groups if not g.frozen},
        "weight": {n: p.abs().flatten() for n, p in model.named_parameters() if p.dim() == 4 or n == "0.bias"},
    }[granularity]
    wanted = {name: [(2e-3 * float(u.detach()) / 1e-4) ** 0.25 for u in found] for name, found in sizes.items()}
    wanted = {name: sum(found) / len(found) for name, found in wanted.items()}
    assert halo.lambdas() == pytest.approx(wanted, rel=1e-6)  # told in float32


def test_halo_sgd_settles_at_the_closed_form_and_without_decay_nowhere() -> None:
    model, groups = setting("residual")
    xi, decay = 1e-2, 1e-2
    for weight_decay, moves in ((decay, True), (0.0, False)):
        halo = Halo(xi=xi if moves else 1e-8, psi=1e-8, lambda_weight_decay=weight_decay, solver="sgd")
        halo.attach(model, groups)
        optimizer = torch.optim.SGD(list(halo.parameters()), lr=0.5, momentum=0.9, weight_decay=weight_decay)
        for _ in range(4000 if moves else 200):
            optimizer.zero_grad()
            halo.penalty().backward()
            optimizer.step()
            halo.after_step()
        (shrink,) = halo.parameters()
        size = halo.sizes()
        used = size > 0
        if moves:
            assert torch.allclose(shrink[used], (2 * xi * size[used] / decay) ** 0.25, rtol=1e-3)
        else:
            assert (shrink - 1).abs().max() < 1e-2  # the trap: the paper's psi and xi alone move nothing


def test_halo_guard_keeps_lambda_positive_and_the_gradient_finite() -> None:
    model, groups = setting("residual")
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].weight[1] = 1e-30
    halo = Halo(xi=1e-8)
    halo.attach(model, groups)
    found = gradients(model, halo.penalty())
    assert all(bool(g.isfinite().all()) for g in found.values())
    assert halo.shrinkage(halo.sizes()).min() >= GUARD


def test_halo_shrinks_weak_channels_much_and_strong_ones_little() -> None:
    """The profiled penalty is concave: under the same strength small channels vanish first."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([0.1, 1.0]).view(2, 1, 1, 1)
        model[1].weight[:] = torch.tensor([0.1, 1.0]).view(1, 2, 1, 1)
    groups = trace(model, torch.randn(1, 1, 4, 4))
    halo = Halo(xi=1e2)
    halo.attach(model, groups)
    before = halo.sizes()[:2]
    for _ in range(200):
        model.zero_grad()
        halo.penalty().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 2e-3 * p.grad
    weak, strong = (halo.sizes()[:2] / before).tolist()
    assert weak < 0.5 and strong > 0.95


@pytest.mark.parametrize("solver", ["closed-form", "sgd"])
@pytest.mark.parametrize("factor", [0.1, 7.0])
def test_scaling_multiplies_the_penalty(solver, factor: float) -> None:
    model, groups = setting("residual")
    halo = Halo(xi=1e-2, psi=0.0 if solver == "sgd" else 1e-8, solver=solver)
    halo.attach(model, groups)
    before = float(halo.penalty().detach())
    halo.scale_penalty(factor)
    assert float(halo.penalty().detach()) == pytest.approx(factor * before, rel=1e-6)


def test_halo_scores_rank_by_size_and_dead_channels_last() -> None:
    model, groups = setting("residual")
    for options in ({}, {"granularity": "weight"}, {"solver": "sgd"}):
        halo = Halo(xi=1e-2, **options)
        halo.attach(model, groups)
        with torch.no_grad():
            for group in groups:
                for part in group.slices:
                    model.state_dict()[part.name].select(part.dim, part.offset).zero_()
        for group in groups:
            if group.frozen is None:
                found = halo.scores()[group.name]
                assert found.shape == (group.size,) and found.dtype == torch.float32
                assert found.argmin() == 0 and found[0] == 0


class Path(nn.Module):
    """Blocks in a sequence whose features are given: the path is known."""

    class Step(nn.Module):
        def __init__(self, shift: Tensor) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
            self.shift = nn.Parameter(shift)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.shift

    def __init__(self, shifts: list[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Step(s) for s in shifts))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def ffr(model: nn.Module, x: Tensor, **options) -> Ffr:
    made = Ffr(**options)
    made.attach(model, ())
    model.train()(x)
    return made


def test_ffr_on_known_paths() -> None:
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    one = torch.full((1, 2, 1, 1), 0.25, dtype=torch.float64)
    still = Path([torch.zeros_like(one)] * 3)
    assert float(ffr(still, x, k1=1, k2=1).penalty().detach()) == 0  # zero branches: zero length
    straight = Path([one.clone() for _ in range(4)])
    assert float(ffr(straight, x, k1=0, k2=1).penalty().detach()) == pytest.approx(0, abs=1e-15)  # no curvature
    assert float(ffr(straight, x, k1=0, k2=1, curvature="angle").penalty().detach()) == pytest.approx(0, abs=1e-14)
    assert float(ffr(straight, x, k1=1, k2=0).penalty().detach()) == pytest.approx(0.25)
    back = Path([one.clone(), -one.clone()])
    assert float(ffr(back, x, k1=0, k2=1).penalty().detach()) == pytest.approx(0.5)
    assert float(ffr(back, x, k1=0, k2=1, curvature="angle").penalty().detach()) == pytest.approx(2)


def walk(model: nn.Sequential, x: Tensor, stops: list[int]) -> list[Tensor]:
    found = []
    for index, layer in enumerate(model):
        x = layer(x)
        if index in stops:
            found.append(x)
    return found


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", ["residual", "plain"])
def test_ffr_against_brute_force(name: str, norm: str) -> None:
    torch.manual_seed(0)
    if name == "residual":
        model = NETS["residual"]().double().train()
        path, blocks = nn.Sequential(*model[:3], *model[3]), {"3.0", "3.1", "4"}
        stops = [2, 3, 4]  # what enters the first block, and both blocks; the third has another shape
    else:
        layers = [[nn.Conv2d(8 if i else 3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()] for i in range(4)]
        model = (
            nn.Sequential(*(layer for block in layers for layer in block), nn.Flatten(), nn.Linear(2048, 2))
            .double()
            .train()
        )
        path, blocks, stops = model, {"2", "5", "8", "11"}, [2, 5, 8, 11]
    made = Ffr(k1=0.3, k2=0.7, norm=norm, samples=None)
    made.attach(model, ())
    assert set(feature_modules(model)) == blocks
    x = walk(path, X.double(), stops)
    size = (lambda v: v.abs().mean()) if norm == "l1" else (lambda v: (v**2).mean())
    length = sum(size(b - a) for a, b in pairwise(x)) / (len(x) - 1)
    bend = sum(size(c - 2 * b + a) for a, b, c in zip(x, x[1:], x[2:], strict=False)) / (len(x) - 2)
    wanted = 0.3 * length + 0.7 * bend
    model(X.double())
    mine = made.penalty()
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    expected, found = gradients(model, wanted), gradients(model, mine)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-10 * float(gradient.abs().max()) + 1e-15, name


def test_ffr_pad_joins_segments() -> None:
    model = NETS["plain"]()
    made = ffr(model, X, k1=1, k2=0, align="pad")
    assert float(made.penalty().detach()) > 0
    assert float(ffr(NETS["plain"](), X, k1=1, k2=0).penalty().detach()) == 0


def test_ffr_pad_leaves_what_it_cannot_join_as_it_is() -> None:
    """Neither odd sizes nor fewer channels can be reached by halving and zeros."""
    draw = torch.Generator().manual_seed(0)
    run = [torch.randn(2, 8, 15, 15, generator=draw) for _ in range(2)]
    for shape in ((2, 8, 8, 8), (2, 6, 15, 15)):
        other = torch.randn(shape, generator=draw)
        (segment,) = Ffr(align="pad").segments([*run, other])
        assert all(torch.equal(a, b) for a, b in zip(segment, run, strict=True))
    (joined,) = Ffr(align="pad").segments([*run, torch.randn(2, 10, 7, 7, generator=draw)])
    assert [x.shape for x in joined] == [(2, 10, 7, 7)] * 3


class Overwritten(nn.Module):
    """Blocks whose outputs what follows changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.hardtanh_(block(x), -0.5, 0.5)
        return x


@pytest.mark.parametrize("samples", [2, 100, None])
def test_ffr_does_not_mind_what_is_done_to_a_feature_in_place(samples: int | None) -> None:
    torch.manual_seed(0)
    model = Overwritten().double().train()
    x = X.double()
    given = [x]
    for block in model.blocks:
        given.append(block(x))
        x = F.hardtanh(given[-1], -0.5, 0.5)
    given = [feature[:samples] for feature in given]
    length = sum((b - a).abs().mean() for a, b in pairwise(given)) / 3
    found = ffr(model, X.double(), k1=1, k2=0, samples=samples).penalty()
    assert float(found.detach()) == pytest.approx(float(length.detach()), rel=1e-10)


def test_ffr_leaves_no_hook_and_ignores_evaluation() -> None:
    model = NETS["residual"]()
    made = Ffr()
    made.attach(model, ())
    with pytest.raises(UsageError, match="after a forward pass in training mode"):
        made.penalty()
    model.eval()(X)
    with pytest.raises(UsageError):
        made.penalty()
    model.train()(X)
    once = float(made.penalty().detach())
    model(X.flip(0) * 3)
    model(X)  # only the last pass counts
    assert float(made.penalty().detach()) == once > 0
    made.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(UsageError, match="this network has neither"):
        Ffr().attach(nn.Linear(2, 2), ())


def test_ffr_scores_see_the_batch_norm() -> None:
    model, groups = setting("residual")
    with torch.no_grad():
        model[3][0].bn1.weight[2] = 0.0
    made = Ffr()
    made.attach(model, groups)
    assert made.scores()["3.0.conv1"].argmin() == 2
    assert made.scores()["3.0.conv1"].max() == 1


def test_ffr_s_score_takes_the_norm_that_a_layer_feeds_whatever_the_order_of_registration() -> None:
    torch.manual_seed(0)
    model = lively(NormsLast()).double()
    groups = trace(model, X.double())
    with torch.no_grad():
        model.bn1.weight[2] = 0  # channel 2 of conv1 is dead, that of conv2 is not
    made = Ffr()
    made.attach(model, groups)
    scores = made.scores()
    assert scores["conv1"].argmin() == 2 and scores["conv1"][2] == 0
    assert all(bool((scores[group.name] > 0).all()) for group in groups if group.name != "conv1")


@pytest.mark.parametrize("name", [name for name in REGULARIZERS if name not in SPARSE_TRAINING])
def test_state_comes_back(name: str) -> None:
    model, groups = setting("residual")
    one, two = REGULARIZERS[name](), REGULARIZERS[name]()
    one.attach(model, groups)
    two.attach(model, groups)
    one.scale_penalty(3.0)
    two.load_state_dict(one.state_dict())
    assert one.state_dict() == two.state_dict()


@pytest.mark.parametrize("name", REGULARIZERS)
def test_every_group_has_scores_frozen_ones_too(name: str) -> None:
    model, groups = setting("residual")
    assert any(group.frozen for group in groups)
    made = REGULARIZERS[name]()
    made.attach(model, groups)
    model.train()(X.double())
    made.penalty()
    assert {n: tuple(s.shape) for n, s in made.scores().items()} == {group.name: (group.size,) for group in groups}


def test_hidden_linear_layers_are_ranked_too() -> None:
    model, groups = setting("plain")
    halo = Halo(xi=1e-2)
    halo.attach(model, groups)
    with torch.no_grad():
        model[6].weight[3] = 0  # the hidden linear layer's fourth channel, and what reads it
        model[8].weight[:, 3] = 0
    found = halo.scores()["6"]
    assert found.argmin() == 3 and found.std() > 0


def test_nothing_to_penalise_is_said() -> None:
    model, groups = setting("plain")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no learned weight belongs to a channel that may be cut"):
        Halo().attach(model, groups)


def test_a_backbone_inside_a_sequence_is_looked_into() -> None:
    assert len(feature_modules(Wrapped())) == 3
    assert float(ffr(Wrapped(), X, k1=1, k2=0).penalty().detach()) > 0
