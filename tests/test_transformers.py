"""Networks with tokens, tables of positions, stages and gates: what regularisers watch there, and what scores read."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import UsageError
from compress.groups import trace
from compress.groups.parts import layers as layers_of
from compress.groups.twin import lively as awake
from compress.pipeline.rounds import _attach
from compress.recipe import make
from compress.regularize import REGULARIZERS
from compress.regularize.channels import maskable
from compress.regularize.cka_sr import CkaSr
from compress.regularize.features import feature_modules
from compress.regularize.ffr import Ffr
from compress.regularize.growing_reg import GrowingReg
from compress.regularize.protocol import numbers
from compress.scores import SCORES
from compress.sparse import choose
from compress.train import recalibrate
from tests.nets import NETS, lively

X = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8) % 3


class Block(nn.Module):
    """Attention and a perceptron; gives its features, or a tuple that begins with them."""

    def __init__(self, width: int, heads: int, *, gives_tuple: bool = False) -> None:
        super().__init__()
        self.heads, self.gives_tuple = heads, gives_tuple
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Any:
        n, tokens, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, -1)
        x = x + self.proj(mixed)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return (x, q) if self.gives_tuple else x


class Vit(nn.Module):
    def __init__(self, width: int = 24, heads: int = 2, depth: int = 3, **block: Any) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(Block(width, heads, **block) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
            x = x[0] if isinstance(x, tuple) else x
        return self.head(self.norm(x)[:, 0])


def vit(**options: Any) -> Vit:
    torch.manual_seed(0)
    return Vit(**options)


def test_tables_of_positions_read_no_channels() -> None:
    model = vit()
    (trunk,) = (g for g in trace(model, X[:1]) if any(part.name == "positions" for part in g.slices))
    read: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read.append(inputs[0].abs().double().flatten(0, -2).mean(0))

    layers = [*(m for b in model.blocks for m in (b.qkv, b.fc1)), model.head]
    assert {id(module) for module, *_ in layers_of(model, trunk, "in")} == {id(layer) for layer in layers}
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    model.eval()(X)
    for hook in hooks:
        hook.remove()
    expected = torch.stack([values / values.mean() for values in read]).mean(0).float()
    assert torch.allclose(SCORES["activation"](model, (trunk,), [(X, Y)])[trunk.name], expected.detach(), rtol=1e-4)


@pytest.mark.parametrize("gives_tuple", [False, True])
@pytest.mark.parametrize("make_one", [CkaSr, lambda: Ffr(score="flow"), Ffr], ids=["cka-sr", "flow", "ffr"])
def test_features_of_a_transformer(make_one: Any, *, gives_tuple: bool) -> None:
    model = vit(gives_tuple=gives_tuple).train()
    assert list(feature_modules(model)) == ["blocks.0", "blocks.1", "blocks.2"]
    groups = trace(model, X[:1])
    made = make_one()
    made.attach(model, groups)
    with pytest.raises(UsageError, match=r"has seen no features: call penalty\(\) after a forward pass"):
        made.penalty()
    F.cross_entropy(model(X), Y)
    penalty = made.penalty()
    penalty.backward()
    assert penalty > 0 and model.blocks[0].fc2.weight.grad.abs().sum() > 0
    made.after_step()
    for group in groups:
        found = made.scores()[group.name]
        assert found.shape == (group.size,) and found.isfinite().all()
    made.detach()


class Stage(nn.Module):
    def __init__(self, blocks: nn.Module) -> None:
        super().__init__()
        self.down, self.blocks = nn.Identity(), blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks:
            x = block(x)
        return x


def test_stages_are_no_blocks() -> None:
    def blocks(count: int) -> list[nn.Module]:
        return [Block(8, 2) for _ in range(count)]

    stages = [Stage(nn.Sequential(*blocks(2))), Stage(nn.ModuleDict({"a": Block(8, 2), "b": Block(8, 2)}))]
    backbone = nn.Sequential(nn.Linear(3, 8), *stages, Stage(nn.ModuleList(blocks(1))))
    assert set(feature_modules(backbone)) == {
        "1.blocks.0", "1.blocks.1", "2.blocks.a", "2.blocks.b", "3",
    }  # fmt: skip

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.path = nn.Sequential(nn.Conv2d(8, 8, 3), Gate(), nn.Conv2d(8, 8, 1))

    assert set(feature_modules(nn.Sequential(Inverted(), Inverted()))) == {"0", "1"}


def test_a_mask_thins_the_linear_layers_of_a_transformer() -> None:
    model = vit()
    hidden = {f"blocks.{i}.{name}.weight" for i in range(3) for name in ("qkv", "proj", "fc1", "fc2")}
    assert set(maskable(model)) == hidden | {"patch.weight"}
    made = REGULARIZERS["ggr"](density=0.1)
    made.attach(model, ())
    assert sum(int((p != 0).sum()) for p in maskable(model).values()) == pytest.approx(
        0.1 * sum(p.numel() for p in maskable(model).values()), rel=0.01
    )


@pytest.mark.parametrize("score", [name for name in SCORES if name != "random"])
def test_what_is_not_trained_is_ranked_all_the_same(score: str) -> None:
    model = lively(NETS["residual"]())
    groups = trace(model, X[:1])
    before = SCORES[score](model, groups, [(X, Y)])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    after = SCORES[score](model, groups, [(X, Y)])
    assert all(torch.allclose(before[name], after[name], rtol=1e-4) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(values.std() > 0 for values in before.values() if len(values) > 3)


class Targets:
    """Loss of a task whose targets are a dict."""

    def __call__(self, output: Tensor, targets: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(output, targets["y"])


@pytest.mark.parametrize("score", ["taylor", "hessian"])
def test_targets_may_be_more_than_a_tensor(score: str) -> None:
    model = lively(NETS["residual"]())
    groups = trace(model, X[:1])
    plain = SCORES[score](model, groups, [(X, Y)])
    nested = SCORES[score](model, groups, [(X, {"y": Y})], loss=Targets())  # type: ignore[call-arg]
    assert all(torch.allclose(plain[name], nested[name]) for name in plain)


def test_a_grouped_convolution_reads_each_channel_in_every_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    group = next(g for g in trace(model, X[:1]) if g.name == "0")
    assert group.size == 4  # a channel leaves from each part
    ((_, _, places),) = layers_of(model, group, "in")
    assert places[:, :, 0].tolist() == [[c, 4 + c] for c in range(4)]
    with torch.no_grad():
        own = model[1](model[0](X)).double().mean((0, 2, 3)).view(2, 4).sum(0)
    found = SCORES["activation"](model, (group,), [(X, Y)])["0"]
    assert torch.allclose(found, (own / own.mean()).float(), rtol=1e-5)


def test_the_scale_of_the_norm_is_that_of_the_channel_where_it_spans_several() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, groups=4, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 3, 1)
    )
    group = next(g for g in trace(model, X[:1]) if any(part.block > 1 for part in g.slices))
    model[2].weight.data[1] = 0.0
    made = Ffr()
    made._model, made._groups = model, (group,)
    rows = {name: model[int(name)].weight.detach() for name in ("0", "1")}
    gamma = model[2].weight.detach().abs()
    grouped = (rows["1"].abs().sum((1, 2, 3)) * gamma).view(4, 4).sum(1)
    first = rows["0"].abs().sum((1, 2, 3)).view(4, 4).sum(1)
    expected = torch.stack([first / first.max(), grouped / grouped.max()]).mean(0)
    assert torch.allclose(made.scores()[group.name], expected, rtol=1e-5)


def test_a_further_round_grows_from_the_start() -> None:
    model = lively(NETS["residual"]())
    groups = trace(model, X[:1])
    first = GrowingReg()
    first.attach(model, groups)
    start = first.level()
    for _ in range(600):
        first.after_step()
    assert first.level() > start
    recipe = make({"model": {"path": "x"}, "prune": {"method": "growing-reg"}})
    further = GrowingReg()
    _attach(SimpleNamespace(recipe=recipe), model, groups, [further], [numbers(first.state_dict())])
    assert further.level() == start and further.growth == first.growth


def test_a_rest_of_one_image_is_left_out_behind_a_global_pooling() -> None:
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    device: Any = SimpleNamespace(autocast=torch.no_grad)
    recalibrate(pooled, [(X, Y), (X[:1], Y[:1])], device=device)
    with torch.no_grad():
        mean = pooled[:3](X).mean((0, 2, 3))
    assert torch.allclose(pooled[3].running_mean, mean, atol=1e-6)


def test_what_chooses_weights_leaves_their_worth_alone() -> None:
    worth = {"a": torch.rand(10, dtype=torch.float64)}
    before = worth["a"].clone()
    choose(worth, 3)
    assert torch.equal(worth["a"], before)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_gate_at_zero_hides_nothing_from_the_trial(shape: tuple[int, ...]) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.gain = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), nn.Parameter(torch.zeros(shape))
            self.head = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.gain * self.b(torch.flip(self.a(x), [1, 2])))

    assert abs(float(awake(Gated()).gain)) > 0.1
    group = next(g for g in trace(Gated(), X[:1]) if g.name == "a")
    assert group.frozen is not None and "put in order" in group.frozen
