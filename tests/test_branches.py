"""Residual branches that leave: what is found, that without one is with zeros, and that what is left is kept whole."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import checkpoint
from compress.checkpoint import ModelInfo
from compress.cli import load
from compress.cost import METRICS, measure
from compress.errors import LoadError, PruneError, TargetError, UsageError
from compress.export import to_onnx
from compress.groups import branches, trace
from compress.models import ARCHS
from compress.pipeline import zeros
from compress.pipeline.stages import _widths
from compress.plan import Plan, apply, select
from compress.reach import without
from compress.recipe import make
from compress.scores import SCORES
from compress.structure import Gone, remove, removed, underived
from compress.verify import verify
from tests.nets import Concat, Tied, lively, residual
from tests.shell import answer

X = torch.randn(3, 3, 8, 8, dtype=torch.float64)


class InPlace(nn.Module):
    """The sum is written into the branch, as torchvision does: no scalar can stand in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.norm(self.conv(x))
        y += x
        return self.head(F.relu(y).mean((2, 3)))


class Attention(nn.Module):
    """One head of two, fused."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Two branches in one block; the first with a layer scale that belongs to no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.scale = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 4), nn.Parameter(torch.rand(8))
        self.norm1, self.attention = nn.LayerNorm(8), Attention()
        self.norm2, self.mlp = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)  # (N, 8, 2, 2) -> (N, 4, 8)
        x = x + self.scale * self.attention(self.norm1(x))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


def block(number: str) -> dict[str, str]:
    return {f"{number}.{part}": "pass" for part in ("conv1", "bn1", "conv2")} | {f"{number}.bn2": "zero"}


FOUND: dict[str, tuple[Callable[[], nn.Module], dict[str, dict[str, str]]]] = {
    "residual": (residual, {"3.0": block("3.0"), "3.1": block("3.1"), "4": block("4")}),
    "in place": (InPlace, {"norm": {"conv": "pass", "norm": "zeros"}}),
    "transformer": (
        Transformer,
        {"attention": {"norm1": "pass", "attention": "zero"}, "mlp": {"norm2": "pass", "mlp": "zero"}},
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return lively(FOUND[name][0]().double())


def answers(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("name", FOUND)
def test_each_branch_is_found_and_without_it_is_with_zeros(name: str, tmp_path: Path) -> None:
    model = made(name)
    before = copy.deepcopy(model.state_dict())
    found = branches(model, X)
    assert {b.name if name != "in place" else "norm": dict(b.gone) for b in found} == FOUND[name][1]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    whole = answers(model)
    for branch in found:
        without_it, zeroed = copy.deepcopy(model), copy.deepcopy(model)
        remove(without_it, branch.gone)
        last = zeroed.get_submodule(list(branch.gone)[-1])
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.zero_()
        assert torch.equal(answers(without_it), answers(zeroed))
        distance = (answers(without_it) - whole).norm() / whole.norm()
        assert branch.distortion == pytest.approx(float(distance), abs=1e-12) and distance > 1e-6
        checkpoint.save(tmp_path / "cut.safetensors", without_it, ModelInfo(pruned=True))
        again = FOUND[name][0]().double()
        checkpoint.load(tmp_path / "cut.safetensors", again)
        assert torch.equal(answers(again), answers(without_it)) and removed(again) == branch.gone
        assert underived(without_it, model) == {}


@pytest.mark.parametrize("name", ["in place", "transformer"])
def test_an_exported_file_has_lost_the_branch(name: str, tmp_path: Path) -> None:
    model = made(name).float()
    for branch in branches(model, X):
        remove(model, branch.gone)
    to_onnx(model, X.float(), tmp_path / "cut.onnx")
    left = {node.op_type for node in onnx.load(tmp_path / "cut.onnx").graph.node}
    assert not left & {"Add", "Expand", "Shape", "Softmax", "Erf", "LayerNormalization"}


class Shared(nn.Module):
    """Additions whose branches may not leave: as deep as what they join, read elsewhere too, of shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(w, 4, 1) for w in (3, 3, 4, 4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x) + self.b(x)
        y = self.c(x)
        x = x + y
        return self.head(torch.cat([self.d(x) + x, self.d(y)], 1).mean((2, 3)))


@pytest.mark.parametrize("net", [Shared, Concat, Tied])
def test_what_is_no_branch_stays(net: Callable[[], nn.Module]) -> None:
    assert branches(lively(net()), X.float()) == ()


class Nested(nn.Module):
    """A branch with a branch in it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.outer, self.inner = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = F.relu(self.outer(x))
        return self.head((x + F.relu(y + self.inner(y))).mean((2, 3)))


def test_of_nested_branches_the_innermost_is_offered() -> None:
    assert [dict(branch.gone) for branch in branches(lively(Nested()), X.float())] == [{"inner": "zero"}]


@pytest.mark.parametrize("name", FOUND)
def test_what_is_left_is_traced_and_cut_as_ever(name: str) -> None:
    model = made(name)
    remove(model, branches(model, X)[0].gone)
    free = [group for group in trace(model, X) if group.frozen is None]
    assert {"residual": "0", "in place": "stem", "transformer": "stem"}[name] in {group.name for group in free}


def test_a_target_beyond_the_rounding_is_reached_and_counted(root: Path) -> None:
    model, x = ARCHS["resnet20"]().eval(), X[:1].float()
    checkpoint.load(root / "models/digits_resnet20.pt", model)
    groups, costs, found = trace(model, x), measure(model, x), branches(model, x)
    assert len(found) == 9
    scores = SCORES["l2"](model, groups)
    with pytest.raises(TargetError, match="out of reach"):
        select(groups, scores, costs, keep=0.02, round_to=8)
    assert select(groups, scores, costs, keep=0.5, round_to=8, branches=found).dropped == {}
    for metric in ("params", "macs"):
        plan = select(groups, scores, costs, keep=0.02, metric=metric, round_to=8, branches=found)
        order = sorted(found, key=lambda branch: branch.distortion)
        count = next(n for n in range(10) if {k for b in order[:n] for k in b.gone} == {*plan.dropped})
        assert count and all(len(kept) % 8 == 0 for kept in plan.kept.values())
        cut = copy.deepcopy(model)
        apply(cut, groups, Plan.model_validate_json(plan.model_dump_json()))
        left = measure(cut, x).total(metric)
        assert plan.reached * costs.total(metric) == pytest.approx(left) and left <= 0.02 * costs.total(metric)
        zeroed = copy.deepcopy(model)
        apply(zeroed, groups, plan.model_copy(update={"dropped": {}}))
        for branch in order[:count]:
            last = zeroed.get_submodule(list(branch.gone)[-1])
            torch.nn.init.zeros_(last.weight), torch.nn.init.zeros_(last.bias)
        assert torch.equal(answers(cut, x), answers(zeroed, x))
    left, prices = without(groups, costs, plan.dropped)
    assert all(prices.total(m) < costs.total(m) for m in METRICS) and len(left) == len(groups) - count


def test_refusals_name_the_module() -> None:
    model = residual()
    groups = trace(model, X[:1].float())
    with pytest.raises(PruneError) as wrong:
        apply(model, groups, Plan(kept={}, metric="params", keep=1, reached=1, dropped={"9": "zero"}))
    assert str(wrong.value) == "the plan takes out '9', which this network does not have"
    with pytest.raises(LoadError) as missing:
        remove(model, {"4.bn2": "zero", "9": "zero"})
    assert str(missing.value) == "the module '9' is to leave, but the network has none of that name: check --arch"
    assert removed(model) == {} and str(Gone("zero")) == "Gone(zero)"


def test_widths_of_several_rounds_go_by_the_dense_groups() -> None:
    prepared = {"widths": {"a": 8, "b.1": 8, "b.2": 8}, "layers": {"a": ["a", "c"], "b.1": ["b.1"], "b.2": ["b.2"]}}
    plans = [{"kept": {"a": [0, 1], "b.2": [1]}, "dropped": {"b.1": "pass"}}, {"kept": {"c": [0]}}]
    assert _widths(prepared, plans) == {"a": 1, "b.1": 0, "b.2": 1}


def test_a_run_drops_blocks_and_verifies_and_inspect_names_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "dense.safetensors", lively(residual()), ModelInfo(input_size=(3, 8, 8)))
    out, arch = tmp_path / "run", "tests.nets:residual"
    asked = ["--arch", arch, "--data", "digits", "--target", "0.4", "--round-to", "8", "--drop-blocks"]
    asked = ["prune", tmp_path / "dense.safetensors", *asked, "--epochs", "1", "--set", "data.image_size=8"]
    asked += ["--set", "bench.batches=[1]", "--set", "bench.seconds=1"]
    assert answer(*asked, "--dry-run")["plan"]["dropped"]
    report = answer(*asked, "--out", out, "-q")
    left = [number for number in ("3.0", "3.1", "4") if f"{number}.bn2" in report["dropped"]]
    assert left and sorted(report["dropped"]) == sorted(path for number in left for path in block(number))
    assert report["kept"]["params"] <= 0.4 and not report["unaligned"]
    assert [name for name, width in report["widths"].items() if not width["pruned"]] == [f"{n}.conv1" for n in left]
    nodes = [node.op_type for node in onnx.load(out / "model.onnx").graph.node]
    assert nodes.count("Add") == 3 - len(left) and "Expand" not in nodes
    checks = verify(out, lambda: load.network(out / "pruned.safetensors", arch, {})[:2])
    assert {check.state for check in checks} == {"ok"}
    assert answer("inspect", out / "pruned.safetensors", "--arch", arch)["gone"] == report["dropped"]


def test_single_weights_leave_no_block() -> None:
    recipe = make({"model": {"path": "x"}, "prune": {"granularity": "weight", "drop_blocks": True}})
    with pytest.raises(UsageError, match="zeros leave no block"):
        zeros.check(recipe, residual())
