"""Prices of layers: the grid, the table between its points, and what is timed of a network."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress import cost, prices
from compress.bench import layers as bench_layers
from compress.bench import machine
from compress.bench.layers import Layer, time_layers
from compress.bench.on import On, parse
from compress.bench.protocol import Runtime
from compress.errors import UsageError
from compress.groups import trace
from compress.plan import select
from compress.prices import Table, Use, grid, price, uses
from compress.scores import SCORES


class Net(nn.Module):
    """Plain, depthwise, grouped and transposed convolutions, one of them called twice, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32)
        self.twice = nn.Conv2d(32, 32, 1)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.grouped = nn.Conv2d(16, 24, 3, padding=1, groups=4)
        self.token = nn.Linear(24, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.depthwise(self.stem(x).relu())).relu()).relu()
        x = self.grouped(self.up(x)).relu()
        return self.head(self.token(x.flatten(2).transpose(1, 2)).mean(1))  # (N, C, H, W) -> (N, H*W, C) -> (N, 5)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


@given(size=st.integers(1, 4096), unit=st.sampled_from([8, 16]))
def test_the_grid_ends_with_the_whole_width_and_holds_both_ends_of_stairs(size: int, unit: int) -> None:
    points = grid(size, unit)
    assert points == tuple(sorted(set(points))) and points[-1] == size and points[0] >= 1
    assert all(point - unit + unit // 4 in points for point in points if point % unit == 0 and point < size)
    assert len(points) <= 3 + 2 * prices.STEPS + 1
    if size >= unit:
        assert unit in points or size > prices.STEPS * unit


@settings(max_examples=50)
@given(data=st.data())
def test_a_table_gives_back_what_was_measured_and_lies_between_elsewhere(data: st.DataObject) -> None:
    axis = st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True).map(lambda found: tuple(sorted(found)))
    ins, outs = data.draw(axis), data.draw(axis)
    ms = tuple(tuple(data.draw(st.floats(0.01, 10)) for _ in outs) for _ in ins)
    table = Table(ins, outs, ms)
    for i, inner in enumerate(ins):
        for o, outer in enumerate(outs):
            assert table(inner, outer) == pytest.approx(ms[i][o])
    low, high = min(map(min, ms)), max(map(max, ms))
    assert low * 0.999 <= table(data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))) <= high * 1.001


def test_every_layer_is_found_as_the_runtime_meets_it() -> None:
    found = uses(Net().eval(), torch.randn(2, 3, 8, 8), batch=4)
    square, once = (1, 1), (1, 1)
    assert found == (
        Use("stem.weight", Layer("conv", 3, 32, (8, 8), (3, 3), once, (1, 1), (1, 1), batch=4)),
        Use("depthwise.weight", Layer("conv", 32, 32, (8, 8), (3, 3), (2, 2), (1, 1), (1, 1), groups=32, batch=4)),
        *[Use("twice.weight", Layer("conv", 32, 32, (4, 4), square, once, (0, 0), (1, 1), batch=4))] * 2,
        Use("up.weight", Layer("transposed", 32, 16, (4, 4), (2, 2), (2, 2), (0, 0), (1, 1), batch=4)),
        Use("grouped.weight", Layer("conv", 16, 24, (8, 8), (3, 3), once, (1, 1), (1, 1), groups=4, batch=4)),
        Use("token.weight", Layer("matmul", 24, 20, (64,), batch=4), is_turned=True),
        Use("head.weight", Layer("matmul", 20, 5, (1,), batch=4), is_turned=True),
    )


def test_prices_add_up_to_the_whole_network_and_fall_with_its_widths() -> None:
    model, example = Net().eval(), torch.randn(1, 3, 8, 8)
    groups = trace(model, example)
    times = price(model, groups, example, on=On(), dense_ms=3.0)
    costs = replace(cost.measure(model, example), times=times)
    assert costs.total("latency") == pytest.approx(3.0)
    plan = select(groups, SCORES["l1"](model, groups), costs, keep=0.6, metric="latency")
    assert plan.reached <= 0.6 and any(len(kept) < g.size for g in groups for kept in [plan.kept.get(g.name, ())])
    assert times["grouped.weight"]((24, 2, 3, 3)) < times["grouped.weight"]((24, 4, 3, 3))  # narrower groups


def test_what_was_timed_once_is_read_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval(), torch.randn(1, 3, 8, 8)
    groups = trace(model, example)
    first = price(model, groups, example, on=On(), dense_ms=1.0)
    (file,) = prices.cache_folder().glob("layers-ort-cpu-threads1-*.json")
    assert all(ms > 0 for ms in json.loads(file.read_text()).values())
    monkeypatch.setattr(prices, "time_layers", None)
    again = price(model, groups, example, on=On(), dense_ms=1.0)
    assert all(again[name]((4, 4, 1, 1)) == first[name]((4, 4, 1, 1)) for name in ("1.weight",))


def test_latency_without_measured_layers_is_refused() -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval(), torch.randn(1, 3, 8, 8)
    groups = trace(model, example)
    with pytest.raises(UsageError, match="latency needs measured layers"):
        select(groups, SCORES["l1"](model, groups), cost.measure(model, example), keep=0.5, metric="latency")


@pytest.mark.alone
@pytest.mark.parametrize("runtime", ["ort-cpu", "openvino"])
def test_a_wider_layer_takes_longer_and_a_block_just_begun_costs_a_whole_one(runtime: Runtime) -> None:
    unit = machine.vector_block()
    # Four blocks share what is read of the input: with AVX2 a fifth adds half a layer, a second a tenth, near noise.
    sizes = (unit, 4 * unit, 4 * unit + unit // 4, 5 * unit, 128)
    narrow, four, begun, five, wide = time_layers(
        [Layer("conv", 64, n, (28, 28), (3, 3), (1, 1), (1, 1), (1, 1)) for n in sizes], runtime=runtime
    )
    assert wide > 4 * narrow
    assert begun - four > 0.7 * (five - four) > 0  # by its channels, a quarter of a block would cost 0.25 of one


def test_layers_are_timed_in_the_order_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_layers, "CHUNK", 1 << 16)
    sizes = [8, 256, 16, 256, 8]
    seen: list[tuple[int, int]] = []
    found = time_layers(
        [Layer("matmul", n, n, (64,)) for n in sizes], on_progress=lambda done, whole: seen.append((done, whole))
    )
    assert min(found[1], found[3]) > 5 * max(found[0], found[2], found[4])
    assert seen[-1] == (5, 5) and len(seen) > 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("ort-cpu", On()), ("ort-cpu:threads=2", On(threads=2)), ("ort-cpu:batch=8:threads=2", On("ort-cpu", 2, 8))],
)
def test_on_reads_what_it_writes(text: str, wanted: On) -> None:
    assert parse(text) == wanted == parse(str(wanted))


@pytest.mark.parametrize("text", ["gpu", "ort-cpu:1", "ort-cpu:threads=0", "ort-cpu:batch=x", "ort-cpu:images=2"])
def test_on_refuses_other_forms(text: str) -> None:
    with pytest.raises(UsageError, match="--on"):
        parse(text)
