"""select spends the target exactly, apply cuts once, and both refuse what cannot be."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from compress.allocation import ALLOCATIONS, powers
from compress.checkpoint import ModelInfo, load_into, read, save
from compress.cost import METRICS, Costs, Widths, measure
from compress.errors import PruneError, TargetError, UsageError
from compress.groups import Group, trace
from compress.models import ARCHS
from compress.plan import Plan, apply, select
from compress.scores import SCORES
from compress.shrinking import shrink
from tests.nets import NETS, lively

X = torch.randn(1, 3, 32, 32)


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, tuple[Group, ...], Costs]:
    model = ARCHS["resnet20"]()
    return model, trace(model, X), measure(model, X)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3, 0.05])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_target_is_met_within_one_block(resnet, metric: str, keep: float, allocation: str) -> None:
    model, groups, costs = resnet
    plan = select(groups, SCORES["l2"](model, groups), costs, keep=keep, metric=metric, allocation=allocation)
    pruned = copy.deepcopy(model)
    apply(pruned, groups, plan)
    total = costs.total(metric)
    reached = measure(pruned, X).total(metric)
    assert reached == pytest.approx(plan.reached * total)
    assert reached <= keep * total
    by_name = {g.name: g for g in groups}
    for name, channels in plan.kept.items():  # one more channel anywhere would be too much
        if len(channels) < by_name[name].size:
            wider = {**plan.kept, name: tuple(range(len(channels) + 1))}
            bigger = copy.deepcopy(model)
            apply(bigger, groups, Plan(kept=wider, metric=metric, keep=keep, reached=1))
            assert measure(bigger, X).total(metric) > keep * total


@pytest.mark.parametrize("block", [4, 8, 16])
def test_widths_are_multiples_of_the_block(resnet, block: int) -> None:
    model, groups, costs = resnet
    plan = select(groups, SCORES["l1"](model, groups), costs, keep=0.5, round_to=block)
    assert all(len(kept) % block == 0 for kept in plan.kept.values())
    assert not plan.unaligned and plan.reached <= 0.5


def test_auto_rounding_reaches_what_a_fixed_block_cannot(resnet) -> None:
    model, groups, costs = resnet
    scores = SCORES["l2"](model, groups)
    with pytest.raises(
        TargetError, match=r"the target 0.05 of the params is out of reach; the lowest reachable share is 0.159"
    ) as caught:
        select(groups, scores, costs, keep=0.05, round_to=16)
    assert caught.value.exit_code == 5 and 0.05 < caught.value.lowest < 0.16
    plan = select(groups, scores, costs, keep=0.05, round_to=16, adapt=True)
    assert plan.reached <= 0.05
    assert plan.unaligned and all(
        len(plan.kept[name]) == width and width % 16 for name, width in plan.unaligned.items()
    )
    sizes = {g.name: g.size for g in groups}
    assert any(width < 16 for name, width in plan.unaligned.items() if sizes[name] == 16)  # narrow layers give too


def test_unreachable_even_at_one_channel_each(resnet) -> None:
    model, groups, costs = resnet
    with pytest.raises(TargetError, match="out of reach"):
        select(groups, SCORES["l2"](model, groups), costs, keep=0.0005, round_to=16, adapt=True)


def test_the_floor_guards_narrow_layers(resnet) -> None:
    _, groups, costs = resnet
    scores = {g.name: torch.rand(g.size) * (0.001 if g.name == "layer3.1.conv1" else 1) + 0.001 for g in groups}
    plan = select(groups, scores, costs, keep=0.5, floor=0.5)
    sizes = {g.name: g.size for g in groups}
    assert all(len(kept) >= 0.5 * 0.5**0.5 * sizes[name] for name, kept in plan.kept.items())


def test_lowest_scores_leave_first(resnet) -> None:
    _, groups, costs = resnet
    scores = {g.name: torch.arange(g.size, dtype=torch.float32) + 1 for g in groups}
    for kept, size in (
        (plan_kept, {g.name: g.size for g in groups}[n])
        for n, plan_kept in select(groups, scores, costs, keep=0.4).kept.items()
    ):
        assert kept == tuple(range(size - len(kept), size))


def test_uniform_keeps_like_shares_and_more_of_what_many_layers_share(resnet) -> None:
    model, groups, costs = resnet
    plan = select(groups, SCORES["l2"](model, groups), costs, keep=0.3, allocation="uniform")
    sizes = {g.name: g.size for g in groups}
    trunk = {"conv1", "layer2.0.conv2", "layer3.0.conv2"}
    shares = {name: len(kept) / sizes[name] for name, kept in plan.kept.items()}
    for part, power in ((trunk, 0.25), (shares.keys() - trunk, 0.75)):
        assert all(abs(shares[name] - 0.3**power) < 0.07 for name in part)


@pytest.mark.parametrize("allocation", ["balanced", "uniform"])
def test_several_cuts_lead_to_the_widths_of_one(resnet, allocation: str) -> None:
    dense, groups, costs = resnet
    falls = powers([g for g in groups if g.frozen is None], costs, Widths(groups, costs, "params"), allocation)
    given = {"allocation": allocation, "falls": falls, "whole": costs.total("params")}
    one = select(groups, SCORES["l2"](dense, groups), costs, keep=0.15, allocation=allocation)
    model = copy.deepcopy(dense)
    for keep in (0.53, 0.28, 0.15):
        traced = trace(model, X)
        plan = select(traced, SCORES["l2"](model, traced), measure(model, X), keep=keep, **given)
        apply(model, traced, plan)
    assert 0.14 < plan.reached <= 0.15
    assert all(abs(len(kept) - len(one.kept[name])) <= 1 for name, kept in plan.kept.items())


def test_balanced_spends_on_cheap_channels_and_leaves_macs_even(resnet) -> None:
    model, groups, costs = resnet
    scores = SCORES["l2"](model, groups)
    sizes = {g.name: g.size for g in groups}
    kept = select(groups, scores, costs, keep=0.15).kept
    share = {name: len(channels) / sizes[name] for name, channels in kept.items()}
    stages = [[share[f"layer{stage}.{block}.conv1"] for block in (1, 2)] for stage in (1, 2, 3)]
    assert min(stages[0]) > 1.3 * max(stages[1]) and min(stages[1]) > 1.3 * max(stages[2])
    plans = [select(groups, scores, costs, keep=0.3, metric="macs", allocation=a) for a in ("balanced", "uniform")]
    assert plans[0].kept == plans[1].kept


def test_uniform_on_a_plain_chain_is_even() -> None:
    model = NETS["plain"]()
    groups = trace(model, X)
    plan = select(groups, SCORES["l2"](model, groups), measure(model, X), keep=0.25, allocation="uniform")
    sizes = {g.name: g.size for g in groups}
    assert all(0.3 < len(kept) / sizes[name] < 0.7 for name, kept in plan.kept.items())


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    keep=st.floats(0.02, 1),
    block=st.sampled_from([1, 2, 4]),
    name=st.sampled_from(sorted(NETS)),
    metric=st.sampled_from(sorted(METRICS)),
)
def test_any_target_is_met_or_refused_with_a_true_lowest_share(keep: float, block: int, name: str, metric: str) -> None:
    model = NETS[name]().eval()
    x = X[:, :, :16, :16]
    groups, costs = trace(model, x), measure(model, x)
    scores = SCORES["random"](model, groups)
    try:
        plan = select(groups, scores, costs, keep=keep, metric=metric, round_to=block)
    except TargetError as error:
        assert error.lowest > keep
        assert (
            select(groups, scores, costs, keep=min(1, error.lowest * 1.0001), metric=metric, round_to=block).reached
            <= error.lowest * 1.0001
        )
        return
    apply(model, groups, plan)
    assert measure(model, x).total(metric) <= keep * costs.total(metric) * (1 + 1e-9)
    assert all(plan.kept.values())


def test_refusals(resnet) -> None:
    model, groups, costs = resnet
    scores = SCORES["l2"](model, groups)
    with pytest.raises(UsageError, match="the share to keep is 0; it must be above 0"):
        select(groups, scores, costs, keep=0)
    with pytest.raises(UsageError, match="round_to is 0"):
        select(groups, scores, costs, keep=0.5, round_to=0)
    with pytest.raises(PruneError, match=r"no scores of shape \(16,\) for the group conv1"):
        select(groups, {}, costs, keep=0.5)
    with pytest.raises(PruneError, match="the scores of conv1 are not finite"):
        select(groups, {**scores, "conv1": torch.full((16,), torch.nan)}, costs, keep=0.5)
    with pytest.raises(PruneError, match="no group of channels may be cut"):
        select([g.freeze("test") for g in groups], scores, costs, keep=0.5)


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        ({"nowhere": (0,)}, "names the group 'nowhere'"),
        ({"linear": (0, 1)}, "cuts linear, which is frozen: its channels reach the output"),
        ({"conv1": ()}, r"keeps channels \(\) of conv1, which has 16"),
        ({"conv1": (3, 2)}, r"keeps channels \(3, 2\) of conv1"),
        ({"conv1": (3, 16)}, r"keeps channels \(3, 16\) of conv1"),
    ],
)
def test_a_wrong_plan_leaves_the_network_untouched(resnet, kept, text: str) -> None:
    model, groups, _ = resnet
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(PruneError, match=text):
        apply(model, groups, Plan(kept={"layer1.0.conv1": (0,), **kept}, metric="params", keep=0.5, reached=0.5))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", "mobilenet_v2"])
def test_the_saved_structure_restores_bit_equal_without_tracing(
    name: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    model = lively(ARCHS[name]())
    plan = shrink(model, X, keep=0.3, round_to="auto")
    assert plan.reached <= 0.3
    save(tmp_path / "p.safetensors", model, ModelInfo(arch=name, pruned=True))
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # any import of it would fail now
    monkeypatch.setattr("compress.groups.trace", None)
    again = ARCHS[name]()
    load_into(again, read(tmp_path / "p.safetensors"))
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again.eval()(X), model(X))


def test_shrink_refuses_an_unknown_score() -> None:
    with pytest.raises(UsageError, match="no score is called 'l3'; there are l1, l2"):
        shrink(NETS["plain"](), X, keep=0.5, score="l3")


def test_the_public_page_and_the_readme_example(tmp_path) -> None:
    """What the README shows in Python, with text for paths as people write it."""
    import compress

    assert all(getattr(compress, name) is not None for name in dir(compress))
    model, example = lively(NETS["residual"]()), torch.randn(4, 3, 16, 16)
    compress.shrink(model, example, keep=0.6, metric="macs", score="l1", round_to=2)
    compress.to_onnx(model, example, str(tmp_path / "model.onnx"))
    groups = compress.trace(model, example)
    halo = compress.regularize.Halo(xi=1e-2)
    halo.attach(model, groups)
    (model.train()(example).square().mean() + halo.penalty()).backward()
    halo.after_step()
    assert set(halo.scores()) == {group.name for group in groups}
    found = compress.benchmark([str(tmp_path / "model.onnx")], rounds=1, seconds=0.1)
    assert found.measurements[0].latency.p50 > 0
    with pytest.raises(AttributeError, match="module 'compress' has no attribute 'prune'"):
        _ = compress.prune


@settings(max_examples=30, deadline=None)
@given(keep=st.floats(0.15, 0.95), block=st.sampled_from([1, 4, 8]), seed=st.integers(0, 99), base=st.floats(0.0, 0.5))
def test_a_latency_of_stairs_is_met_and_what_costs_nothing_stays(
    keep: float, block: int, seed: int, base: float
) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.Conv2d(48, 4, 1))
    groups = trace(model, torch.randn(1, 3, 8, 8))

    def stairs(shape: tuple[int, ...]) -> float:
        return base + math.ceil(shape[0] / 8) * math.ceil(shape[1] / 8)

    costs = measure(model, torch.randn(1, 3, 8, 8))
    costs = replace(costs, times=dict.fromkeys(("0.weight", "2.weight", "4.weight"), stairs))
    scores = {group.name: torch.rand(group.size) for group in groups}
    try:
        plan = select(groups, scores, costs, keep=keep, metric="latency", round_to=block)
    except TargetError as error:
        assert error.lowest > keep
        return
    assert plan.reached <= keep * (1 + 1e-9)
    widths = Widths(groups, costs, "latency")
    widths.kept.update({name: len(kept) for name, kept in plan.kept.items()})
    for name, kept in plan.kept.items():  # a wider layer at no cost would have been kept
        wider = min(widths.size[name], (len(kept) // block + 1) * block)
        assert wider == len(kept) or -widths.change(name, wider) > 0
