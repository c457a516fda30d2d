"""FFR's score `flow`: what each channel alone carries from one feature to the next, against float64 brute force."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.groups import Group, trace
from compress.regularize import Ffr
from compress.regularize.flow import ELEMENTS, contribution
from tests.nets import NETS, Residual, lively

X = torch.randn(6, 3, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SAMPLES = 4


def trained(name: str, **options: object) -> tuple[nn.Module, tuple[Group, ...], Ffr]:
    """A network in float64 with FFR attached, after one forward pass and penalty in training mode."""
    torch.manual_seed(0)
    model = lively(NETS[name]())
    groups = trace(model, X[:1].float())
    model.double().train()
    ffr = Ffr(score="flow", samples=SAMPLES, **options)  # type: ignore[arg-type]
    ffr.attach(model, groups)
    model(X)
    ffr.penalty()
    return model, groups, ffr


def group_of(groups: tuple[Group, ...], name: str, dim: int) -> str:
    return next(g.name for g in groups if any(part.name == name and part.dim == dim for part in g.slices))


def brute(values: Tensor, conv: nn.Conv2d, gain: Tensor) -> Tensor:
    """Every channel on its own through the layer, all others 0."""
    found = []
    for channel in range(values.shape[1]):
        alone = torch.zeros_like(values)
        alone[:, channel] = values[:, channel]
        made = F.conv2d(alone, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        made = (made * gain.view(1, -1, 1, 1)).abs()
        inputs, outputs = conv.in_channels // conv.groups, conv.out_channels // conv.groups
        first = channel // inputs * outputs  # only the outputs of its own group can be other than 0
        found.append(made[:, first : first + outputs].mean())
    return torch.stack(found)


def test_channels_inside_a_block_have_their_part_of_its_branch() -> None:
    model, groups, ffr = trained("residual")
    with torch.no_grad():
        x = model[:3](X)
        for index in (0, 1):
            block = model[3][index]
            assert isinstance(block, Residual)
            inner = F.relu(block.bn1(block.conv1(x)))
            gain = block.bn2.weight / (block.bn2.running_var + block.bn2.eps).sqrt()
            found = ffr._flow.worth[group_of(groups, f"3.{index}.conv2.weight", 1)]
            assert torch.allclose(found, brute(inner[:SAMPLES], block.conv2, gain), atol=1e-10, rtol=1e-10)
            x = block(x)


def test_channels_of_the_trunk_have_the_mean_step() -> None:
    model, groups, ffr = trained("residual")
    with torch.no_grad():
        features = [model[:3](X)]
        for block in model[3]:
            features.append(block(features[-1]))
    steps = [(b - a)[:SAMPLES].abs().mean((0, 2, 3)) for a, b in pairwise(features)]
    found = ffr._flow.worth[group_of(groups, "3.0.conv1.weight", 1)]
    assert torch.allclose(found, torch.stack(steps).mean(0), atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_channel_at_a_time(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(6, 8, 3, 2, 1, groups=groups, dtype=torch.float64)
    values = torch.randn(3, 6, 7, 7, dtype=torch.float64)
    expected = brute(values, conv, torch.ones(8, dtype=torch.float64)).detach()
    for most in (ELEMENTS, 1):  # all at once, and one by one
        monkeypatch.setattr("compress.regularize.flow.ELEMENTS", most)
        found = contribution(values, conv, places=2 + torch.arange(4).view(4, 1, 1))
        assert torch.allclose(found, expected[2:], atol=1e-12)
    linear, rows = nn.Linear(12, 5, dtype=torch.float64), torch.randn(4, 12, dtype=torch.float64)
    found = contribution(rows, linear, places=3 + torch.arange(9).view(3, 1, 3))
    for channel in range(3):
        columns = slice(3 + 3 * channel, 6 + 3 * channel)
        assert torch.allclose(found[channel], (rows[:, columns] @ linear.weight[:, columns].T).abs().mean(), atol=1e-12)


def test_a_dead_channel_carries_nothing_and_leaves_first() -> None:
    torch.manual_seed(0)
    model = lively(NETS["residual"]())
    groups = trace(model, X[:1].float())
    block = model[3][0]
    with torch.no_grad():
        block.bn1.weight[2], block.bn1.bias[2] = 0.0, 0.0
    model.train()
    ffr = Ffr(score="flow")
    ffr.attach(model, groups)
    model(X.float())
    ffr.penalty()
    scores = ffr.scores()[group_of(groups, "3.0.conv2.weight", 1)]
    assert scores[2] == 0 and int(scores.argmin()) == 2 and scores.dtype == torch.float32


@pytest.mark.parametrize("name", [name for name in NETS if name != "concat"])  # which has no features to watch
def test_every_group_of_every_network_has_a_score(name: str) -> None:
    torch.manual_seed(0)
    model = lively(NETS[name]())
    groups = trace(model, X[:1].float())
    model.train()
    ffr = Ffr(score="flow", align="pad")
    ffr.attach(model, groups)
    model(X.float())
    ffr.penalty()
    scores = ffr.scores()
    assert all(scores[g.name].shape == (g.size,) and bool(scores[g.name].isfinite().all()) for g in groups)
    ffr.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_it_looks_now_and_then_and_remembers_through_its_state() -> None:
    def steps(ffr: Ffr, model: nn.Module, count: int) -> None:
        for _ in range(count):
            model(X.float())
            ffr.penalty()
            ffr.after_step()

    torch.manual_seed(0)
    model = lively(NETS["residual"]())
    groups = trace(model, X[:1].float())
    model.train()
    ffr = Ffr(score="flow", period=3)
    ffr.attach(model, groups)
    steps(ffr, model, 7)
    assert ffr.state_dict()["flow"]["looks"] == 3  # steps 1, 3 and 6
    other = Ffr(score="flow", period=3)
    other.attach(model, groups)
    other.load_state_dict(ffr.state_dict())
    assert all(torch.equal(other.scores()[name], values) for name, values in ffr.scores().items())
    other.load_state_dict({"k1": 1.0, "k2": 2.0})
    assert other.k1 == 1 and "flow" not in Ffr().state_dict()
    with pytest.raises(ValueError, match="score = 'best' is out of range; allowed is folded or flow"):
        Ffr(score="best")  # type: ignore[arg-type]
