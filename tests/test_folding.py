"""Folding: what the layers behind a cut read before, they give again as far as least squares can."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.folding import fold
from compress.groups import Group, cut, trace
from tests.nets import NETS, lively

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()


def _groups(model: nn.Module) -> tuple[Group, ...]:
    return trace(model, X[:1])


def _doubled() -> tuple[nn.Module, dict[str, range]]:
    """A chain in which the second half of every layer's channels repeats the first, and the first halves as kept."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5),
    ).double()  # fmt: skip
    with torch.no_grad():
        for layer in (model[0], model[3]):
            half = layer.out_channels // 2
            for tensor in (layer.weight, layer.bias):
                tensor[half:] = tensor[:half]
    model.eval()
    return model, {"0": range(4), "3": range(6)}


def _by_batch(model: nn.Module) -> Tensor:
    for module in model.modules():
        module.train(isinstance(module, nn.BatchNorm2d))
    with torch.no_grad():
        return model(X)


def test_channels_that_repeat_others_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.folding.RIDGE", 1e-12)
    dense, kept = _doubled()
    groups = _groups(dense)
    wanted = _by_batch(copy.deepcopy(dense))
    dense.train()
    with torch.no_grad():  # running statistics of these very images
        for norm in (m for m in dense.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
        dense(X)
    dense.eval()
    smaller = copy.deepcopy(dense)
    cut(smaller, groups, kept)
    assert not torch.allclose(_by_batch(copy.deepcopy(smaller)), wanted, rtol=1e-2)
    assert set(fold(smaller, dense, groups, kept, [X])) == {"3.weight", "8.weight"}
    assert torch.allclose(_by_batch(smaller), wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", sorted(NETS))
def test_any_network_folds_where_it_was_cut_and_nowhere_else(name: str) -> None:
    dense = lively(NETS[name]()).double().eval()
    groups = _groups(dense)
    kept = {g.name: range(0, g.size, 2) for g in groups if g.frozen is None}
    smaller = copy.deepcopy(dense)
    cut(smaller, groups, kept)
    before = copy.deepcopy(smaller.state_dict())
    untouched = copy.deepcopy(dense.state_dict())
    found = fold(smaller, dense, groups, kept, X.split(32))
    after = smaller.state_dict()
    changed = {key for key in after if not torch.equal(after[key], before[key])}
    assert changed <= set(found) and all(after[key].shape == before[key].shape for key in after)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert all(torch.equal(value, untouched[key]) for key, value in dense.state_dict().items())
    assert not any(m._forward_pre_hooks for m in [*smaller.modules(), *dense.modules()])


def test_one_layer_against_least_squares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.folding.RIDGE", 0.0)
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4)).double()
    images = torch.randn(50, 6).double()
    groups = trace(dense, images[:1])
    kept = {"0": [0, 2, 3, 5, 9]}
    smaller = copy.deepcopy(dense)
    cut(smaller, groups, kept)
    assert fold(smaller, dense, groups, kept, [images[:20], images[20:]]) == ("2.weight",)
    read = F.relu(dense[0](images)).detach()
    matrix = torch.linalg.lstsq(read[:, kept["0"]], read).solution  # (kept, channels)
    assert torch.allclose(smaller[2].weight, dense[2].weight @ matrix.T, rtol=1e-8)


def test_a_convolution_against_least_squares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One matrix over channels for all places of the kernel."""
    monkeypatch.setattr("compress.folding.RIDGE", 0.0)
    torch.manual_seed(2)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, 2, 1)).double()
    kept = [0, 3, 4, 6, 7]
    groups = _groups(dense)
    smaller = copy.deepcopy(dense)
    cut(smaller, groups, {"0": kept})
    flat = F.relu(dense[0](X)).detach().movedim(1, -1).reshape(-1, 8)
    matrix = torch.linalg.lstsq(flat[:, kept], flat).solution  # (kept, channels)
    wanted = torch.einsum("ocab,kc->okab", dense[2].weight.detach(), matrix)
    assert fold(smaller, dense, groups, {"0": kept}, X.split(32)) == ("2.weight",)
    assert torch.allclose(smaller[2].weight, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_is_never_seen_stays_as_it_was_cut(kernel: int) -> None:
    dense = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, kernel)).double()
    with torch.no_grad():
        dense[0].weight.zero_()
        dense[0].bias.zero_()
    groups, kept = _groups(dense), {"0": range(4)}
    smaller = copy.deepcopy(dense)
    cut(smaller, groups, kept)
    before = smaller[2].weight.detach().clone()
    assert fold(smaller, dense, groups, kept, [X]) == ("2.weight",)
    assert torch.allclose(smaller[2].weight, before, rtol=1e-9)


def test_layers_too_wide_and_networks_in_training_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.groups.reading.WIDEST", 4)
    dense, kept = _doubled()
    groups = _groups(dense)
    smaller = copy.deepcopy(dense)
    cut(smaller, groups, kept)
    smaller.train()
    before = copy.deepcopy(smaller.state_dict())
    assert fold(smaller, dense, groups, kept, [X]) == ()
    assert smaller.training and all(torch.equal(v, before[k]) for k, v in smaller.state_dict().items())
