"""CKA-SR is what METHODS.md says: the estimator's laws, value and gradient by brute force, its schedule and score."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from compress.errors import UsageError
from compress.groups import Group, trace
from compress.regularize import CkaSr
from compress.regularize.cka import centred, channel_grams, cka, gram
from tests.nets import NETS, Residual

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """HSIC_1 as METHODS.md writes it, term by term."""
    n = len(k)
    k, l = k - torch.diag(k.diagonal()), l - torch.diag(l.diagonal())  # noqa: E741
    ones = torch.ones(n, dtype=k.dtype)
    first = torch.trace(k @ l)
    second = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    third = 2 / (n - 2) * (ones @ k @ l @ ones)
    return (first + second - third) / (n * (n - 3))


def similarity(x: Tensor, y: Tensor) -> Tensor:
    k, l = (v.flatten(1).double() @ v.flatten(1).double().T for v in (x, y))  # noqa: E741
    return hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()


def pair(x: Tensor, y: Tensor) -> float:
    return float(cka(torch.stack([centred(gram(x)), centred(gram(y))]))[0, 1])


def made(model: nn.Module, groups: tuple[Group, ...] = (), **options) -> CkaSr:
    found = CkaSr(**options)
    found.attach(model, groups)
    return found


def blocks(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of the three blocks of NETS["residual"]."""
    first = model[3][0](model[:3](x))
    second = model[3][1](first)
    return [first, second, model[4](second)]


def setting() -> tuple[nn.Module, tuple[Group, ...]]:
    torch.manual_seed(0)
    model = NETS["residual"]().double()
    return model.train(), trace(model, X.double())


def gradients(model: nn.Module, value: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    value.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """To 1e-10 of each tensor's own length, or to rounding of the largest (a bias in front of a norm has slope 0)."""
    rounding = 1e-14 * max(float(g.norm()) for g in expected.values())
    return all(float((found[n] - g).norm()) <= 1e-10 * float(g.norm()) + rounding for n, g in expected.items())


# --- the estimator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "spread"), [(8, 0.21), (16, 0.11)])
def test_independent_features_have_mean_0_within_the_stated_spread(n: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    found = torch.tensor(
        [pair(*torch.randn(2, n, 64, generator=generator, dtype=torch.float64).unbind()) for _ in range(3000)]
    )
    assert abs(float(found.mean())) < 3 * spread / 3000**0.5
    assert float(found.std()) == pytest.approx(spread, abs=0.02)


def test_the_biased_form_would_call_independent_features_alike() -> None:
    x, y = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    x, y = x - x.mean(0), y - y.mean(0)
    biased = (x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert biased > 0.95 and abs(pair(x, y)) < 0.6


@pytest.mark.parametrize("n", [4, 8, 16])
def test_it_is_the_formula_and_1_with_itself(n: int) -> None:
    x, y = torch.randn(2, n, 40, generator=torch.Generator().manual_seed(n), dtype=torch.float64).unbind()
    y = x + y
    assert pair(x, y) == pytest.approx(float(similarity(x, y)), rel=1e-10)
    assert pair(x, x) == pytest.approx(1, rel=1e-12)
    assert pair(x, y) == pytest.approx(pair(y, x), rel=1e-12)


def test_orthogonal_maps_scales_and_float32_change_nothing() -> None:
    x, y = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    y = x * 0.7 + y
    turn, _ = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    before = pair(x, y)
    assert pair(x.flatten(1) @ turn, y) == pytest.approx(before, rel=1e-10)
    assert pair(1e-6 * x, 1e4 * y) == pytest.approx(before, rel=1e-10)
    assert pair(x + 3, y) == pytest.approx(before, rel=1e-9)  # the estimator centres by itself
    assert pair(x.float(), y.float()) == pytest.approx(before, rel=1e-5)


def test_a_dead_feature_is_harmless() -> None:
    x = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    dead = torch.zeros(8, 5, dtype=torch.float64, requires_grad=True)
    value = cka(torch.stack([centred(gram(x)), centred(gram(dead))]))[0, 1]
    value.backward()
    assert value == 0 and bool(x.grad.isfinite().all()) and bool(dead.grad.isfinite().all())


def test_channel_grams_add_up() -> None:
    for x, axis in ((torch.randn(6, 5, 3, 3), 1), (torch.randn(6, 5), -1), (torch.randn(6, 4, 5), -1)):
        parts, whole = channel_grams(x.double(), axis), gram(x.double())
        assert parts.shape == (5, 6, 6) and torch.allclose(parts.sum(0), whole, rtol=1e-12, atol=1e-12)
        rounded = channel_grams(x, axis)  # summed in float32
        assert (rounded.sum(0) - whole).abs().max() < 1e-6 * whole.abs().max()


# --- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [8, 5])
def test_value_and_gradient_against_brute_force(samples: int) -> None:
    model, groups = setting()
    regularizer = made(model, groups, beta=0.3, samples=samples)
    x = X.double()
    model(x)
    mine = regularizer.penalty()
    stage = [feature[:samples] for feature in blocks(model, x)[:2]]  # the third block alone has its shape
    wanted = 0.3 * sum(similarity(a, b) for i, a in enumerate(stage) for j, b in enumerate(stage) if i != j)
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    found, expected = gradients(model, mine), gradients(model, wanted)
    assert found.keys() == expected.keys() and "4.conv1.weight" not in found
    assert same(found, expected)


def test_stages_are_runs_of_equal_shape_in_a_plain_network() -> None:
    torch.manual_seed(0)
    widths = [3, 6, 6, 6, 9, 9]
    layers = [m for a, b in pairwise(widths) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers).double().train()
    for conv in model[::2]:  # so that features differ between images: the formula above cancels where they do not
        nn.init.orthogonal_(conv.weight, 2.0)
    regularizer = made(model, beta=1.0)
    features = [model[: 2 * i + 2](X.double()) for i in range(5)]
    wanted = sum(2 * similarity(features[i], features[j]) for i, j in ((0, 1), (0, 2), (1, 2), (3, 4)))
    model(X.double())
    mine = regularizer.penalty()
    assert float(mine.detach()) == pytest.approx(float(wanted.detach()), rel=1e-10)
    found, expected = gradients(model, mine), gradients(model, wanted)
    assert same(found, expected)


@pytest.mark.parametrize("period", [1, 2, 5])
def test_over_a_period_the_penalties_average_to_the_full_one(period: int) -> None:
    model, groups = setting()
    regularizer = made(model, groups, beta=1.0, period=period)
    once = 0.0
    values = []
    for step in range(2 * period):
        model(X.double())
        assert bool(regularizer._seen) == (step in (0, period - 1, 2 * period - 1))  # nothing is watched in between
        values.append(float(regularizer.penalty().detach()))
        once = once or values[0]
        regularizer.after_step()
    assert sum(v != 0 for v in values) <= 3
    assert sum(values[:period]) == pytest.approx(period * once) == pytest.approx(sum(values[period:]))


def test_descent_makes_the_layers_say_different_things() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Residual(3, 6), nn.Sequential(Residual(6, 6), Residual(6, 6))).train()
    regularizer = made(model, beta=1.0, period=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = []
    for _ in range(30):
        model(X)
        loss = regularizer.penalty()
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regularizer.after_step()
    assert values[-1] < 0.5 * values[0]


def test_evaluation_keeps_nothing_and_no_hook_stays() -> None:
    model, groups = setting()
    regularizer = made(model, groups)
    model.eval()(X.double())
    assert not regularizer._seen
    with pytest.raises(UsageError, match="after a forward pass in training mode"):
        regularizer.penalty()
    with torch.no_grad():
        model.train()(X.double())
    assert not regularizer._seen
    model(X.double())
    assert regularizer._seen
    model.eval()(X.double())
    assert not regularizer._seen  # what training left is gone, too
    regularizer.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="neither"):
        CkaSr().attach(nn.Linear(2, 2), ())
    plain = NETS["plain"]().train()  # no two activations of equal shape
    regularizer = made(plain)
    plain(X)
    with pytest.raises(UsageError, match="equal shape that follow each other"):
        regularizer.penalty()
    model, groups = setting()
    regularizer = made(model, groups)
    model(X[:3].double())
    with pytest.raises(UsageError, match="at least 4 images in a batch, this one has 3"):
        regularizer.penalty()
    with pytest.raises(UsageError, match="no training step yet"):
        regularizer.scores()
    with pytest.raises(ValueError, match="samples = 3 is out of range; allowed is a whole number from 4 on"):
        CkaSr(samples=3)


# --- the score --------------------------------------------------------------------------------------------------------


def test_the_score_is_leave_one_channel_out_by_brute_force() -> None:
    model, groups = setting()
    regularizer = made(model, groups)
    x = X.double()
    model(x)
    regularizer.penalty()
    first, second, third = blocks(model, x)
    found = regularizer.scores()

    def change(feature: Tensor, others: list[Tensor]) -> Tensor:
        values = []
        for channel in range(feature.shape[1]):
            rest = feature.clone()
            rest[:, channel] = 0
            values.append(sum(abs(similarity(rest, o) - similarity(feature, o)) for o in others) / len(others))
        return torch.stack(values).detach().float()

    block = model[3][0]
    inner = torch.relu(block.bn1(block.conv1(model[:3](x))))
    assert torch.allclose(found["3.0.conv1"], change(inner, [first, second]), rtol=1e-5)
    block = model[4]
    inner = torch.relu(block.bn1(block.conv1(second)))
    assert torch.allclose(found["4.conv1"], change(inner, [third]), rtol=1e-5)
    # the trunk: read as the stem's output, as the first block's and as the second's (twice, by conv1 and shortcut)
    stem = change(model[:3](x), [first, second])
    trunk = torch.stack([stem, change(first, [second]), change(second, [first])]).mean(0)
    assert torch.allclose(found["0"], trunk, rtol=1e-5)
    assert found["7"].tolist() == [1] * 10  # the classifier's outputs, which nothing reads


def test_a_dead_channel_is_the_most_redundant() -> None:
    model, groups = setting()
    with torch.no_grad():
        model[3][0].bn1.weight[2] = model[3][0].bn1.bias[2] = 0
    regularizer = made(model, groups)
    model(X.double())
    regularizer.penalty()
    found = regularizer.scores()["3.0.conv1"]
    assert found[2] == 0 == found.min() and found.argmin() == 2


def test_state_comes_back_with_counter_and_score() -> None:
    model, groups = setting()
    one, two = made(model, groups), CkaSr()
    for _ in range(7):
        model(X.double())
        one.penalty()
        one.after_step()
    two.attach(model, groups)
    two.load_state_dict(one.state_dict())
    assert all(torch.equal(a, two.scores()[n]) for n, a in one.scores().items())
    for _ in range(5):
        model(X.double())
        values = [float(r.penalty().detach()) for r in (one, two)]
        one._seen, two._seen = [], []
        assert values[0] == values[1]
        one.after_step(), two.after_step()
    assert all(torch.equal(a, two.scores()[n]) for n, a in one.scores().items())
    three = made(model, groups)
    three.load_state_dict({k: v for k, v in one.state_dict().items() if isinstance(v, int | float)})
    assert three.beta == one.beta and three._step == one._step
    with pytest.raises(UsageError):
        three.scores()  # of another network: seen anew
