"""torch-pruning's graph as a second opinion: the same groups wherever it can read, or a named difference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.groups.oracle import consult
from compress.groups.trace import find
from compress.groups.types import Group
from compress.models import ARCHS
from tests.couplings import COUPLINGS
from tests.nets import NETS, Tied

X = torch.randn(1, 3, 32, 32)


def _as_set(groups: tuple[Group, ...]) -> dict[tuple[int, frozenset[object]], Group]:
    return {(group.size, frozenset(group.slices)): group for group in groups}


def _torchvision(name: str) -> nn.Module:
    return pytest.importorskip("torchvision").models.get_model(name, weights=None)


SAME = {
    **NETS,
    **{name: ARCHS[name] for name in ("resnet20", "resnet20_b", "vgg16_bn", "mobilenet_v2")},
    **{name: COUPLINGS[name][0] for name in ("excite", "nested")},
    **{name: lambda name=name: _torchvision(name) for name in ("resnet18", "squeezenet1_1", "mobilenet_v3_small")},
}


@pytest.mark.parametrize("name", SAME)
def test_both_find_the_same_groups(name: str) -> None:
    model = SAME[name]().eval()
    ours, theirs = _as_set(find(model, X)[0]), _as_set(consult(model, X))
    assert ours.keys() == theirs.keys()
    named = [(ours[key].name, group.name) for key, group in theirs.items()]
    assert all(one == other for one, other in named)
    assert not [g.name for key, g in theirs.items() if g.frozen and not ours[key].frozen]


# Where the two differ: groups that torch-pruning reads otherwise, as (name, size, why it cannot be cut by that reading)
DIFFERENCES: dict[str, list[tuple[str, int, str | None]]] = {
    "fused": [("mix.qkv", 72, "in an order that is no block")],  # it counts indices, not heads
    "plain attention": [("mix.qkv", 72, "in an order that is no block")],
    "separate": [("mix.q", 24, "parameter mix.table")],  # it knows no bare parameters
    "gated": [("embed", 24, "parameter mix.scale"), ("mix.up", 32, "in an order that is no block")],
    "shuffle": [("middle.a", 12, None)],  # wrong: the shuffle needs the same channels from each part
    "standardised": [("stem", 12, "parameter middle.gain")],  # and the convolution is not seen at all
    "response": [("middle.up", 20, "parameter middle.weight")],
    "depth": [("stem", 12, None), ("middle.mix", 48, None)],  # wrong: the reader of the blocks is missing
    "parts": [("stem", 12, "in an order that is no block")],
    "whole groups": [("stem", 12, "grouped"), ("middle.0", 12, "grouped"), ("middle.3", 24, "grouped")],
    "within groups": [("stem", 12, "grouped"), ("middle.0", 12, "grouped"), ("middle.3", 24, "grouped")],
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_the_two_differ(name: str) -> None:
    model, x = COUPLINGS[name][0]().eval(), torch.randn(1, 3, 16, 16)
    ours, theirs = _as_set(find(model, x)[0]), _as_set(consult(model, x))
    differing = [(g.name, g.size, g.frozen) for key, g in theirs.items() if key not in ours]
    wanted = DIFFERENCES[name]
    assert [(group, size) for group, size, _ in differing] == [(group, size) for group, size, _ in wanted]
    for (_, _, found), (_, _, reason) in zip(differing, wanted, strict=True):
        assert found is None if reason is None else reason in found
    assert not any(g.frozen for g in ours.values() if g.name != "head")  # what it freezes, we can cut


def test_a_tied_layer() -> None:
    assert _as_set(find(Tied().eval(), X)[0]).keys() == _as_set(consult(Tied().eval(), X)).keys()
