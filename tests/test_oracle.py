"""torch-pruning's graph as a second opinion: the same groups on every network that it can read, or a named difference."""

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


# Where the two differ: what the other one does.
DIFFERENCES = {
    "fused": "counts heads in places of the fused layer, and misses that a head is a unit",
    "plain attention": "the same",
    "separate": "the same, and freezes at the parameter of the relative positions",
    "gated": "freezes at the parameter of the layer scale",
    "shuffle": "does not see that a shuffle needs the same channels from each part",
    "standardised": "freezes at the parameter of the gain",
    "response": "freezes at the parameters of the norm",
    "depth": "reads a space-to-depth as blocks in the wrong order",
    "parts": "does not see that equal parts lose equal channels",
    "whole groups": "is not asked for grouped convolutions",
    "within groups": "is not asked for grouped convolutions",
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_the_two_differ(name: str) -> None:
    model = COUPLINGS[name][0]().eval()
    ours = _as_set(find(model, X)[0])
    try:
        theirs = _as_set(consult(model, X))
    except Exception as error:  # it has no errors of its own
        pytest.skip(f"torch-pruning cannot read it: {error}")
    assert {key for key, g in ours.items() if not g.frozen} != {key for key, g in theirs.items() if not g.frozen}


def test_a_tied_layer() -> None:
    assert _as_set(find(Tied().eval(), X)[0]).keys() != _as_set(consult(Tied().eval(), X)).keys()
