"""The correction of a latency: from what was asked by price to what a whole network takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compress.aim import TOLERANCE, TRIES, aim, measured_share
from compress.bench.on import On
from compress.errors import TargetError
from compress.export import draft
from compress.groups import trace
from compress.plan import Plan
from compress.shrinking import shrink


def of_width(width: int, share: float) -> Plan:
    return Plan(kept={"g": tuple(range(width))}, metric="latency", keep=share, reached=share)


def stairs(block: int) -> Callable[[float], Plan]:
    """1,000 channels in blocks; the price is their share."""
    return lambda share: of_width(max(block, int(share * 1000 / block + 1e-9) * block), share)


@given(
    keep=st.floats(0.2, 0.9), factor=st.floats(0.6, 1.7), bend=st.floats(0.7, 1.4), block=st.sampled_from([1, 8, 20])
)
def test_a_wrong_price_is_corrected(keep: float, factor: float, bend: float, block: int) -> None:
    def measure(plan: Plan) -> float:
        return min(1.0, factor * (len(plan.kept["g"]) / 1000) ** bend)

    if factor < keep * 1.3:  # even the whole network may be faster than asked
        factor = keep * 1.3
    closest, tries = aim(stairs(block), measure, keep=keep)
    assert abs(closest.measured / keep - 1) <= TOLERANCE + 1.5 * bend * block / len(closest.plan.kept["g"])
    assert closest in tries and len(tries) <= TRIES
    assert closest.measured == measure(closest.plan)


def test_a_good_price_needs_one_measurement() -> None:
    closest, tries = aim(stairs(1), lambda plan: len(plan.kept["g"]) / 1000, keep=0.5)
    assert len(tries) == 1 and closest.measured == 0.5


def test_no_plan_is_measured_twice() -> None:
    measured: list[int] = []

    def measure(plan: Plan) -> float:
        measured.append(len(plan.kept["g"]))
        return measured[-1] / 1000

    closest, _ = aim(stairs(400), measure, keep=0.55)
    assert len(measured) == len(set(measured)) and closest.measured == 0.4  # 0.8 would be above what was asked


def test_out_of_reach_says_what_was_measured() -> None:
    def choose(share: float) -> Plan:
        if share < 0.1:
            raise TargetError("lower than that is out of reach", lowest=0.1)
        return stairs(1)(share)

    with pytest.raises(TargetError, match=r"takes 0\.5") as caught:
        aim(choose, lambda plan: 0.5 + len(plan.kept["g"]) / 1e5, keep=0.2)
    assert math.isclose(caught.value.lowest, 0.5, rel_tol=0.02)


@pytest.mark.alone
def test_a_cut_network_is_measured_against_the_dense_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 16, 3))
    example = torch.randn(2, 3, 24, 24)
    draft(model.eval(), example, tmp_path / "dense.onnx")
    groups = trace(model, example)
    measure = measured_share(model, groups, example, tmp_path / "dense.onnx", on=On())
    free = [group for group in groups if group.frozen is None]
    kept = {group.name: tuple(range(max(1, group.size // 4))) for group in free}
    assert 0.02 < measure(Plan(kept=kept, metric="latency", keep=0.2, reached=0.2)) < 0.5
    assert model[2].out_channels == 128  # the network itself is left alone


@pytest.mark.alone
def test_shrink_meets_a_latency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path))
    model = nn.Sequential(nn.Conv2d(3, 128, 3), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 16, 3))
    plan = shrink(model.eval(), torch.randn(2, 3, 24, 24), keep=0.5, metric="latency", round_to=4)
    assert plan.keep == 0.5 and 0.3 < plan.reached <= 0.5 * (1 + TOLERANCE)  # how near it gets is up to the machine
    assert model[2].out_channels == len(plan.kept["2"]) < 128
