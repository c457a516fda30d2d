"""Densities of layers, and the weights that an update drops and grows: against plain Python, and their bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as effort
from hypothesis import strategies as some
from torch import Tensor

from compress.errors import UsageError
from compress.regularize import topology
from compress.regularize.channels import maskable
from compress.regularize.densities import FLOOR, floors, layer_counts
from tests.nets import NETS

SHAPES = {"a": (16, 3, 3, 3), "b": (32, 16, 3, 3), "c": (64, 32, 1, 1)}
LEAST = {"a": 16, "b": 32, "c": 64}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- how many weights each layer has ----------------------------------------------------------------------------------


def test_erk_by_hand() -> None:
    """a: 25 / 432, b: 54 / 4608, c: 98 / 2048 per unit of epsilon; at 60 % two of the layers are full."""
    erk = layer_counts(SHAPES, LEAST, density=0.1, initial="erk")
    epsilon = round(0.1 * 7088) / (25 + 54 + 98)
    assert all(erk[n] == pytest.approx(epsilon * v, abs=1) for n, v in {"a": 25, "b": 54, "c": 98}.items())
    full = layer_counts(SHAPES, LEAST, density=0.6, initial="erk")
    assert full == {"a": 432, "b": round(0.6 * 7088) - 432 - 2048, "c": 2048}


@pytest.mark.parametrize("density", [0.05, 0.1, 0.5, 1.0])
def test_uniform(density: float) -> None:
    found = layer_counts(SHAPES, LEAST, density=density, initial="uniform")
    assert all(abs(found[n] - density * math.prod(SHAPES[n])) <= 1 for n in found)


sizes = some.integers(1, 40)


@effort(max_examples=60, deadline=None, derandomize=True)
@given(
    some.lists(some.tuples(sizes, sizes, some.sampled_from([1, 3]), some.sampled_from([1, 3])), min_size=1, max_size=8),
    some.floats(0.03, 1.0),
    some.lists(some.floats(1e-6, 1.0), min_size=8, max_size=8),
    some.sampled_from(["erk", "uniform", "given"]),
)
def test_any_start_is_exact_in_sum_and_within_bounds(
    layers: list[tuple[int, ...]], density: float, by_hand: list[float], initial: str
) -> None:
    shapes = {str(place): shape for place, shape in enumerate(layers)}
    total = round(density * sum(math.prod(shape) for shape in layers))
    lowest = {n: max(shape[0], math.ceil(FLOOR * math.prod(shape))) for n, shape in shapes.items()}
    chosen: Any = {n: by_hand[int(n)] for n in shapes} if initial == "given" else initial
    if sum(lowest.values()) > total:
        with pytest.raises(UsageError, match="allowed is"):
            layer_counts(shapes, lowest, density=density, initial=chosen)
        return
    found = layer_counts(shapes, lowest, density=density, initial=chosen)
    assert sum(found.values()) == total
    assert all(lowest[n] <= found[n] <= math.prod(shapes[n]) for n in shapes)


def test_a_bad_start_is_repaired() -> None:
    """Nearly nothing for b, everything for a: b gets its floor, a is full, c takes the rest."""
    total = round(0.1 * 7088)
    found = layer_counts(SHAPES, LEAST, density=0.1, initial={"a": 1.0, "b": 1e-6, "c": 1e-3})
    assert found == {"a": 432, "b": 32, "c": total - 432 - 32}


@pytest.mark.parametrize(
    ("density", "initial", "words"),
    [
        (0.0, "erk", "the density is 0.0; allowed is"),
        (1.1, "erk", "the density is 1.1; allowed is"),
        (0.1, "even", "initial = 'even' is unknown"),
        (0.1, {"d": 0.1}, "initial names 'd'; the layers that may be thinned are a, b, c"),
        (0.1, {"a": 1.5}, "initial: a is 1.5; allowed is"),
        (0.01, "erk", "density 0.01 leaves 71 weights"),
    ],
)
def test_starts_that_are_refused(density: float, initial: Any, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        layer_counts(SHAPES, LEAST, density=density, initial=initial)
    assert words in str(caught.value)


def test_the_lowest_density_that_an_error_names_is_enough() -> None:
    with pytest.raises(UsageError, match="or more") as caught:
        layer_counts(SHAPES, LEAST, density=0.01, initial="erk")
    density = float(str(caught.value).split("allowed is ")[1].split()[0])
    assert sum(layer_counts(SHAPES, LEAST, density=density, initial="erk").values()) == round(density * 7088)


def test_floors_count_the_outputs_of_transposed_layers_too() -> None:
    model = NETS["transposed"]()
    assert floors(model, maskable(model)) == {"0.weight": 8, "2.weight": 6, "5.weight": 4}


# --- what an update does ----------------------------------------------------------------------------------------------


def random_layers(seed: int, density: float = 0.3) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Weights, gradients and masks of three layers of unequal size; double, so that nothing ties."""
    generator = torch.Generator().manual_seed(seed)
    alive = {n: torch.rand(s, generator=generator) < density for n, s in SHAPES.items()}
    weights = {n: torch.randn(s, generator=generator).double() * alive[n] for n, s in SHAPES.items()}
    scale = {"a": 3.0, "b": 0.5, "c": 1.0}
    return weights, {n: torch.randn(s, generator=generator).double() * scale[n] for n, s in SHAPES.items()}, alive


def test_the_share_that_moves_by_hand() -> None:
    share = [topology.moved_share(t, fraction=0.3, end=300.0) for t in (0, 100, 150, 200, 300, 900)]
    assert share == pytest.approx([0.3, 0.225, 0.15, 0.075, 0.0, 0.0])
    assert topology.moved_share(10**9, fraction=0.3, end=None) == 0.3


@pytest.mark.parametrize("seed", range(4))
def test_the_budget_is_a_count_in_plain_python(seed: int) -> None:
    _, gradients, alive = random_layers(seed)
    open_to = {n: gradients[n][~alive[n]].abs() for n in alive}
    for count in (0, 1, 50, 700):
        pairs = sorted(((value, name) for name in open_to for value in open_to[name].tolist()), reverse=True)[:count]
        wanted = {name: sum(owner == name for _, owner in pairs) for name in SHAPES}
        assert topology.top_counts(open_to, count) == wanted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("drop", ["layer", "global"])
def test_what_is_dropped_is_smallest(seed: int, drop: Any) -> None:
    weights, _, alive = random_layers(seed)
    weights["c"] *= 0.2  # by all weights together, this layer loses most
    living = {n: int(m.sum()) for n, m in alive.items()}
    drops = topology.drop_counts(weights, alive, LEAST, share=0.2, drop=drop)
    if drop == "layer":
        assert drops == {n: round(0.2 * living[n]) for n in alive}
    else:
        pairs = sorted((value, n) for n in alive for value in weights[n][alive[n]].abs().tolist())
        assert drops == {n: sum(o == n for _, o in pairs[: round(0.2 * sum(living.values()))]) for n in alive}
        assert drops["c"] > 2 * round(0.2 * living["c"])
    for name, mask in alive.items():
        left = topology.without_smallest(weights[name], mask, drops[name])
        gone = weights[name][mask & ~left].abs()
        assert len(gone) == drops[name] and gone.max() < weights[name][left].abs().min() and not (left & ~mask).any()


@pytest.mark.parametrize("drop", ["layer", "global"])
def test_no_layer_falls_below_its_floor(drop: Any) -> None:
    weights, _, alive = random_layers(0)
    lowest = {n: int(m.sum()) - room for (n, m), room in zip(alive.items(), (0, 3, 10_000), strict=True)}
    drops = topology.drop_counts(weights, alive, lowest, share=0.5, drop=drop)
    assert drops["a"] == 0 and drops["b"] <= 3 and drops["c"] > 100


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("across", [True, False])
def test_an_update_by_its_rules(rho: float, across: bool) -> None:
    weights, gradients, alive = random_layers(1)
    drops = topology.drop_counts(weights, alive, LEAST, share=0.3, drop="layer")
    found = topology.redistributed(weights, gradients, alive, drops, rho=rho, across=across, seed=3)
    new = {n: found[n] & ~alive[n] for n in alive}
    if across:
        open_to = {n: gradients[n][~alive[n]].abs() for n in alive}
        assert {n: int(m.sum()) for n, m in new.items()} == topology.top_counts(open_to, sum(drops.values()))
        assert int(new["a"].sum()) > 1.5 * drops["a"]  # its gradients are six times those of b
    else:
        assert {n: int(m.sum()) for n, m in new.items()} == drops
    assert sum(int(m.sum()) for m in found.values()) == sum(int(m.sum()) for m in alive.values())
    for name, mask in new.items():
        assert torch.equal(alive[name] & ~found[name], alive[name] & ~topology.without_smallest(
            weights[name], alive[name], drops[name]))  # fmt: skip
        count = int(mask.sum())
        by_gradient = round((1 - rho) * count)
        best = torch.where(alive[name], -1.0, gradients[name].abs())
        assert int((mask & topology.largest(best, by_gradient)).sum()) >= by_gradient
        if rho == 1 and count > 20:  # a random choice is not that of the gradient
            assert int((mask & topology.largest(best, count)).sum()) < count
    again = topology.redistributed(weights, gradients, alive, drops, rho=rho, across=across, seed=3)
    other = topology.redistributed(weights, gradients, alive, drops, rho=rho, across=across, seed=4)
    assert same(found, again) and same(found, other) == (rho == 0)


def test_a_full_layer_passes_its_share_on() -> None:
    """a has all the largest gradients but only five dead places: it gets five, the others the rest."""
    weights, gradients, alive = random_layers(2)
    alive["a"] = torch.ones_like(alive["a"])
    alive["a"].view(-1)[:5] = False
    weights["a"].view(-1)[5:] = 1.0
    gradients["a"] = gradients["a"].abs() + 1000
    drops = topology.drop_counts(weights, alive, LEAST, share=0.3, drop="layer")
    found = topology.redistributed(weights, gradients, alive, drops, rho=0.5, across=True, seed=0)
    grown = {n: int((found[n] & ~alive[n]).sum()) for n in alive}
    assert grown["a"] == 5 and sum(grown.values()) == sum(drops.values())


def test_above_half_density_no_more_is_dropped_than_can_grow() -> None:
    _, _, alive = random_layers(0, density=0.95)
    free = {n: int((~m).sum()) for n, m in alive.items()}
    drops = {n: round(0.3 * int(m.sum())) for n, m in alive.items()}
    assert topology.limited(drops, alive, across=False) == {n: min(drops[n], free[n]) for n in alive}
    across = topology.limited(drops, alive, across=True)
    assert sum(free.values()) - 3 <= sum(across.values()) <= sum(free.values())
    assert topology.limited({"a": 1, "b": 2, "c": 3}, alive, across=True) == {"a": 1, "b": 2, "c": 3}
