"""The tracer: one coupling a network, the law cut == zeroed, and what stays with its reason."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.checkpoint import ModelInfo, load_into, read, save
from compress.groups import Group, Slice, cut, trace, zero
from compress.groups.trace import find
from compress.structure import underived
from tests.couplings import COUPLINGS, Fused, Images, Tokens, normed
from tests.nets import NETS, NormsLast, Tied, lively

EXAMPLE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def parts(groups: tuple[Group, ...], seed: int = 0) -> dict[str, list[int]]:
    """Of every free group another share of its channels."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        if group.frozen is None:
            number = int(torch.randint(1, group.size, (1,), generator=generator))
            kept[group.name] = sorted(torch.randperm(group.size, generator=generator)[:number].tolist())
    return kept


@pytest.mark.parametrize("name", COUPLINGS)
def test_groups_and_the_law(name: str) -> None:
    build, wanted = COUPLINGS[name]
    torch.manual_seed(0)
    model = lively(build()).double()
    groups = trace(model, EXAMPLE)
    assert {g.name: g.size for g in groups if g.frozen is None} == wanted
    _, mixed = find(model, EXAMPLE)
    kept = {g: channels for g, channels in parts(groups).items() if g not in mixed}
    zeroed, pruned = copy.deepcopy(model), copy.deepcopy(model)
    zero(zeroed, groups, kept)
    cut(pruned, groups, kept)
    with torch.no_grad():
        a, b, dense = (torch.utils._pytree.tree_leaves(m(EXAMPLE)) for m in (zeroed, pruned, model))
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= 1e-10 * max(1, x.abs().max())
    assert not kept or (a[0] - dense[0]).abs().max() > 1e-6  # the cut is no empty one


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_behind_a_norm_the_cut_network_is_the_one_built_at_that_width(norm: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = lively(normed(norm=norm)).double()
    groups = trace(model, EXAMPLE)
    assert {g.name: g.size for g in groups if g.frozen is None} == {"embed": 24, "mix.1": 32}
    assert find(model, EXAMPLE)[1] == {"embed", "mix.1"}
    cut(model, groups, {"embed": range(3, 20), "mix.1": range(0, 32, 3)})
    built = normed(17, 11, norm).double().eval()
    built.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(EXAMPLE), built(EXAMPLE))


def test_group_norms_lose_as_many_channels_from_each_part() -> None:
    model = Images(nn.Sequential(nn.GroupNorm(3, 12), nn.ReLU(), nn.Conv2d(12, 12, 1))).double()
    groups = {g.name: g for g in trace(model, EXAMPLE)}
    assert groups["stem"].size == 4 and Slice("stem.weight", 0, offset=8) in groups["stem"].slices
    cut(model, tuple(groups.values()), {"stem": [0, 3]})
    assert model.middle[0].num_channels == 6 and model(EXAMPLE).shape == (2, 5)


def test_heads_leave_as_wholes_and_their_count_is_saved(tmp_path) -> None:
    model = Tokens(Fused()).double().eval()
    dense = copy.deepcopy(model)
    groups = trace(model, EXAMPLE)
    heads = next(g for g in groups if g.name == "mix.qkv")
    assert {s for s in heads.slices if s.name == "mix.qkv.weight"} == {
        Slice("mix.qkv.weight", 0, block=6, offset=offset) for offset in (0, 24, 48)
    }
    cut(model, groups, {"mix.qkv": [1, 2]})
    assert model.mix.num_heads == 2 and model.mix.qkv.weight.shape == (36, 24)
    integers = underived(model, dense)
    assert integers == {"mix": {"num_heads": 2}}
    save(tmp_path / "x.safetensors", model, ModelInfo(pruned=True), integers=integers)
    fresh = Tokens(Fused()).double().eval()
    load_into(fresh, read(tmp_path / "x.safetensors"))
    with torch.no_grad():
        assert torch.equal(fresh(EXAMPLE), model(EXAMPLE))


class Crossed(nn.Module):
    """Convolutions registered before the norms of their sums, and one norm that takes a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm2d(6)
        self.stem, self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.behind_a, self.behind_b, self.last = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.hidden, self.flat, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.stem(x)))
        x = x + self.behind_a(self.a(x))
        x = x + self.behind_b(self.b(x))
        return self.head(F.relu(self.flat(self.hidden(F.relu(self.last(x)).mean((2, 3))))))


@pytest.mark.parametrize("build", [Crossed, NormsLast, *NETS.values()])
def test_the_norm_right_behind_a_layer_is_known(build: Callable[[], nn.Module]) -> None:
    model = lively(build()).double()
    made: list[tuple[str, Tensor]] = []
    fed: dict[str, str] = {}
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_pre_hook(
                lambda module, inputs, path=path: fed.update({layer: path for layer, out in made if out is inputs[0]})
            )
        elif isinstance(module, kinds):
            module.register_forward_hook(lambda module, inputs, output, path=path: made.append((path, output)))
    model(EXAMPLE)
    groups = trace(build().double(), EXAMPLE)
    assert dict(pair for group in groups for pair in group.norms) == fed
    assert fed == ({"stem": "first", "a": "behind_a", "b": "behind_b", "hidden": "flat"} if build is Crossed else fed)


def test_tied_weights_are_one_tensor() -> None:
    groups = {g.name: g for g in trace(Tied().double(), EXAMPLE)}
    assert groups["a"].size == 8 and Slice("b.weight", 0) in groups["a"].slices
    assert not any(part.name.startswith("c.") for g in groups.values() for part in g.slices)


@torch.library.custom_op("compress_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.flip(1)


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_without_a_rule_freezes_what_it_touches_and_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(mystery(self.b(self.a(x).relu())))

    groups = {g.name: g.frozen for g in trace(Odd().double(), EXAMPLE)}
    assert groups["a"] is None
    assert groups["b"] == "compress_tests.mystery has no rule (in the network)"


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.b(m.a(x)[:, torch.tensor([1, 0, 3, 2, 5, 4])]), "picked by number (index)"),
        (lambda m, x: m.b(m.a(x).roll(1, 1)), "moved by a fixed amount (roll)"),
        (lambda m, x: m.b(m.a(x)) + m.a(x).cumsum(1)[:, :2], "put in order (cumsum)"),
        (lambda m, x: m.b(m.a(x) * torch.arange(6.0, dtype=x.dtype).view(6, 1, 1)), "meet positions that stay (mul)"),
        (lambda m, x: m.b(F.avg_pool1d(m.a(x).flatten(2).mT, 3, 1, 1).mT.unflatten(2, (16, 16))), "are places"),
        (lambda m, x: m.b(m.a(x)) + m.a(x)[:, 2].unsqueeze(1), "a single channel is picked"),
    ],
)
def test_what_cannot_lose_channels_says_why(forward, reason: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self, self.first(x))

    groups = {g.name: g.frozen for g in trace(Net().double(), EXAMPLE)}
    assert groups["first"] is None and reason in groups["a"]


@pytest.mark.parametrize("heads", [2, 4])
def test_a_head_dim_taken_from_the_trunk_falls_with_it(heads: int) -> None:
    """reshape(.., heads, C // heads) with C of the input: a place leaves all heads, and the trunk in as many places."""

    class Derived(Fused):
        def forward(self, x: Tensor) -> Tensor:
            n, t, c = x.shape
            q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
            return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).reshape(n, t, c))

    model = Tokens(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24), Derived(heads=heads))).double()
    groups = trace(model, EXAMPLE)
    places = 24 // heads
    assert {g.name: g.size for g in groups if g.frozen is None} == {"embed": 24, "mix.0": 16, "mix.2": places}
    trunk = next(g for g in groups if g.name == "mix.2")
    assert {s.offset for s in trunk.slices if s.name == "mix.3.qkv.weight" and s.dim == 0} == {*range(0, 72, places)}
    zeroed, pruned = copy.deepcopy(model), copy.deepcopy(model)
    zero(zeroed, groups, {"mix.2": [0, 2, 3]})
    cut(pruned, groups, {"mix.2": [0, 2, 3]})
    with torch.no_grad():
        assert (zeroed(EXAMPLE) - pruned(EXAMPLE)).abs().max() < 1e-12
    assert pruned.mix[3].num_heads == heads


def test_the_proof_freezes_when_time_runs_out_and_leaves_the_model() -> None:
    from compress.groups import Bench, prove

    model = Tokens(Fused()).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found, mixed = find(model, EXAMPLE)
    bench = Bench.of(model, EXAMPLE)
    assert [g.frozen for g in prove(bench, found, mixed=mixed, until=0)][:2] == [None, None]
    wrong = Group("mix.proj", 24, (Slice("mix.proj.bias", 0),))  # the first trial, of all, fails; there is no other
    groups = prove(bench, (*found, wrong), mixed=mixed, until=0)
    assert all(g.frozen == "it could not be proved within the time limit" for g in groups if g.name != "head")
    trace(model, EXAMPLE)
    assert model.mix.num_heads == 4 and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_a_layer_keeps_of_earlier_passes_is_forgotten() -> None:
    class Caching(Fused):
        def __init__(self) -> None:
            super().__init__(fast=False)
            self.biases, self.bias_cache = nn.Parameter(torch.randn(4, 1, 1)), {}

        def forward(self, x: Tensor) -> Tensor:
            if "cpu" not in self.bias_cache:
                self.bias_cache["cpu"] = self.biases * 2
            n, t, _ = x.shape
            q, k, v = self.qkv(x).view(n, t, 3, self.num_heads, 6).permute(2, 0, 3, 1, 4)
            y = (q @ k.mT * self.bias_cache["cpu"]).softmax(-1) @ v
            return self.proj(y.transpose(1, 2).flatten(2))

    model = Tokens(Caching()).double().eval()
    with torch.no_grad():
        model(EXAMPLE)  # fills the cache
    groups = trace(model, EXAMPLE)
    assert {g.name: g.size for g in groups if g.frozen is None} == {"embed": 24, "mix.qkv": 4}
    cut(model, groups, {"mix.qkv": [0, 3]})
    with torch.no_grad():
        assert model(EXAMPLE).shape == (2, 5)
