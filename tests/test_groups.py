"""Groups: what hangs together, the law pruned == zeroed, and refusals that name the reason."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import checkpoint
from compress.cost import measure
from compress.errors import PruneError
from compress.groups import Bench, Count, Group, Slice, cut, prove, trace, zero
from compress.groups.twin import lively as awake
from compress.models import ARCHS
from tests.nets import NETS, PaddedShortcut, lively

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def halves(groups: tuple[Group, ...], seed: int = 0) -> dict[str, list[int]]:
    """A random half of every free group's channels."""
    generator = torch.Generator().manual_seed(seed)
    return {
        g.name: sorted(torch.randperm(g.size, generator=generator)[: max(1, g.size // 2)].tolist())
        for g in groups
        if g.frozen is None
    }


@pytest.mark.parametrize("name", NETS)
def test_pruned_equals_zeroed(name: str) -> None:
    model = lively(NETS[name]()).double()
    groups = trace(model, EXAMPLE.double())
    kept = halves(groups)
    assert kept
    zeroed, pruned = copy.deepcopy(model), copy.deepcopy(model)
    zero(zeroed, groups, kept)
    cut(pruned, groups, kept)
    with torch.no_grad():
        a, b, dense = zeroed(EXAMPLE.double()), pruned(EXAMPLE.double()), model(EXAMPLE.double())
    assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert (a - dense).abs().max() > 1e-3  # the cut is no empty one
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet20", "resnet20_b", "vgg16_bn", "mobilenet_v2"])
def test_our_architectures_keep_the_law_with_every_group_cut(name: str) -> None:
    model = lively(ARCHS[name](num_classes=7)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    groups = trace(model, x)
    frozen = {g.name: g.frozen for g in groups if g.frozen}
    assert len(frozen) == 1 and "output" in next(iter(frozen.values()))  # the classifier alone
    kept = halves(groups)
    zeroed, pruned = copy.deepcopy(model), copy.deepcopy(model)
    zero(zeroed, groups, kept)
    cut(pruned, groups, kept)
    with torch.no_grad():
        a, b = zeroed(x), pruned(x)
    assert (a - b).abs().max() <= 1e-12 * max(1, a.abs().max())


def test_option_a_trunks_are_groups_of_their_own() -> None:
    groups = {g.name: g for g in trace(ARCHS["resnet20"](), torch.randn(1, 3, 32, 32))}
    assert {g.size for g in groups.values() if g.frozen is None} == {16, 32, 64}
    first = groups["conv1"]
    assert Slice("layer2.0.shortcut.weight", 1) in first.slices and Slice("layer1.2.bn2.weight", 0) in first.slices


def test_blocks_and_offsets() -> None:
    groups = {g.name: g for g in trace(NETS["residual"](), EXAMPLE)}
    assert Slice("7.weight", 1, block=4) in groups["4.conv2"].slices  # 2x2 places a channel after the flatten
    groups = {g.name: g for g in trace(NETS["concat"](), EXAMPLE)}
    assert Slice("join.weight", 1, offset=6) in groups["right"].slices
    assert Slice("join.weight", 1, offset=0) in groups["left"].slices


def test_padded_channels_stay_and_those_between_them_are_cut() -> None:
    model = lively(PaddedShortcut()).double()
    groups = {g.name: g for g in trace(model, EXAMPLE.double())}
    assert groups["stem"].frozen is None and Slice("conv2.weight", 0, offset=4) in groups["stem"].slices
    assert groups["conv1"].frozen is None
    padded = [g for g in groups.values() if g.name.startswith("conv2")]
    assert [g.size for g in padded] == [4, 4] and all("joined to channels that stay (pad)" in g.frozen for g in padded)


def test_whole_groups_of_a_convolution_leave_or_as_many_channels_of_each() -> None:
    wide = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
    )
    groups = {g.name: g for g in trace(wide, EXAMPLE)}
    assert groups["0"].size == groups["1"].size == 4 and groups["0"].counts == ()  # of 2 groups of 4: one of each
    assert Slice("0.weight", 0, offset=4) in groups["0"].slices and Slice("1.weight", 1) in groups["0"].slices
    many = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1))
    groups = {g.name: g for g in trace(many, EXAMPLE)}
    assert groups["0"].size == 4 and groups["0"].counts == (Count("1", "groups"),)
    cut(many, tuple(groups.values()), {"0": [0, 2, 3]})
    assert many[1].groups == 3 and many[1].in_channels == 6 and many(EXAMPLE).shape == (2, 2, 14, 14)


class Unsaved(nn.Module):
    """Buffers that no state shows: a vector per channel, and timm's BlurPool2d, a fixed kernel per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.register_buffer("shift", torch.arange(8.0) - 3, persistent=False)
        self.register_buffer("blur", torch.full((8, 1, 3, 3), 1 / 9), persistent=False)
        self.register_buffer("places", torch.ones(10, 10), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x) + self.shift.view(-1, 1, 1))
        return self.last(F.conv2d(x, self.blur, groups=x.shape[1]) * self.places)


def test_buffers_that_are_not_saved_are_cut_and_saved_from_then_on(tmp_path: Path) -> None:
    dense, example = Unsaved(), torch.randn(2, 3, 14, 14)
    groups = {g.name: g for g in trace(dense, example)}
    assert groups["first"].frozen is None
    assert {Slice("shift", 0), Slice("blur", 0)} < set(groups["first"].slices)
    smaller, zeroed = copy.deepcopy(dense), copy.deepcopy(dense)
    kept = {"first": [0, 1, 4, 6, 7]}
    cut(smaller, groups.values(), kept)
    zero(zeroed, groups.values(), kept)
    assert torch.allclose(smaller(example), zeroed(example), atol=1e-6)
    assert smaller.shift.tolist() == [-3, -2, 1, 3, 4]
    assert smaller.state_dict().keys() == dense.state_dict().keys() | {"shift", "blur"}
    checkpoint.save(tmp_path / "a.safetensors", smaller, checkpoint.ModelInfo(pruned=True))
    again = Unsaved()
    checkpoint.load(tmp_path / "a.safetensors", again)
    assert torch.equal(again(example), smaller(example))
    assert "shift" in again.state_dict() and measure(again, example).shapes["blur"] == (5, 1, 3, 3)


def test_the_model_is_left_as_it_was() -> None:
    model = NETS["residual"]().train()
    model[0].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, EXAMPLE)
    assert model.training and not model[0].weight.requires_grad
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_wrong_group_fails_its_proof_and_only_that_one() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    good = Group("0", 8, (Slice("0.weight", 0), Slice("0.bias", 0), Slice("2.weight", 1)))
    incomplete = Group("2", 8, (Slice("2.weight", 0), Slice("2.bias", 0)))  # its reader is missing
    shifted = Group(
        "4", 4, (Slice("4.weight", 0), Slice("4.bias", 0), Slice("6.weight", 1, offset=4))
    )  # the wrong half
    judged = {g.name: g for g in prove(Bench.of(model, EXAMPLE), (good, incomplete, shifted))}
    assert judged["0"].frozen is None
    assert judged["2"].frozen is not None and "a trial cut fails: RuntimeError" in judged["2"].frozen
    assert judged["4"].frozen is not None and "differs from zeroing" in judged["4"].frozen


def test_a_branch_that_is_off_does_not_hide_a_wrong_group() -> None:
    """Zero-initialised last norms are usual; the proof must not be fooled by them."""

    class Off(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
            self.skip, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            nn.init.zeros_(self.bn.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bn(self.b(self.a(x).relu())) + self.skip(x))

    wrong = Group("a", 4, (Slice("a.weight", 0), Slice("a.bias", 0), Slice("b.weight", 1, offset=4)))
    (judged,) = prove(Bench.of(Off(), EXAMPLE), (wrong,))
    assert judged.frozen is not None and "differs" in judged.frozen


def test_what_is_added_in_a_trial_is_never_zero_and_never_drowns_the_input() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[1].weight)
    twin = awake(model)
    for added in (twin[0].bias, twin[1].bias, twin[1].running_mean):
        assert bool(added.all()) and 0.02 < float(added.std()) < 0.2
    assert float(twin[1].weight.min()) >= 0.5 and not model[1].weight.any()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Conv2d(5, 4, 1), r"does not run on an input of shape \(2, 3, 16, 16\): RuntimeError"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1)),
            r"no channel of this network can be removed \(0: its channels reach the output",
        ),
    ],
)
def test_refusals(model: nn.Module, text: str) -> None:
    with pytest.raises(PruneError, match=text):
        trace(model, EXAMPLE)


def test_tracing_has_a_time_limit() -> None:
    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while True:
                time.sleep(0.01)

    began = time.perf_counter()
    with pytest.raises(PruneError, match=r"tracing took more than 0.3 s"):
        trace(Endless(), EXAMPLE, time_limit=0.3)
    assert time.perf_counter() - began < 30


def test_networks_that_insist_on_float32_are_proved_in_it() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(x.float()).relu()).relu().mean((2, 3)))

    groups = {g.name: g.frozen for g in trace(Casting(), EXAMPLE)}
    assert groups["a"] is None and groups["b"] is None and groups["head"]


def test_what_cannot_be_traced_is_refused_in_one_line() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.a(-x)

    with pytest.raises(PruneError, match=r"torch.export cannot read the network: ") as caught:
        trace(Branches(), EXAMPLE)
    assert "\n" not in str(caught.value)
