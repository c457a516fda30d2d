"""Sparse training: the number of weights never changes, dead ones are 0, and topologies follow their rules."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import checkpoint
from compress.errors import UsageError
from compress.groups import trace
from compress.models.resnet import resnet20
from compress.regularize import REGULARIZERS, SPARSE_TRAINING, Ggr, Regularizer, Rigl, SetTraining, StaticErk, topology
from compress.regularize.channels import maskable
from compress.regularize.densities import floors
from compress.regularize.make import make
from compress.regularize.sparse_training import SparseTraining
from tests.nets import NETS
from tests.shell import MODEL, answer, call, refusal

NAMES = sorted(SPARSE_TRAINING)
FAST = {"density": 0.2, "interval": 5, "steps": 60}


def network(name: str = "residual") -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().train()


def made(name: str, **options: Any) -> Regularizer:
    return make({name: options}, {} if "density" in options else FAST)[0]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 3, (8,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3, fused=True)


def train(model: nn.Module, method: Regularizer, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images, labels = batch(step)
        optimizer.zero_grad()
        (F.cross_entropy(model(images), labels) + method.penalty()).backward()
        optimizer.step()
        method.after_step()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- whole trainings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("net", ["residual", "concat", "transposed"])
def test_the_count_is_constant_and_dead_weights_are_zero(name: str, net: str) -> None:
    model = network(net)
    method = made(name)
    method.attach(model, ())
    masks = method.masks
    total = round(0.2 * sum(p.numel() for p in masks.tensors.values()))
    optimizer = optimizer_of(model)
    per_layer = {n: int(m.sum()) for n, m in masks.alive.items()}
    first = masks.state_dict()
    for step in range(60):
        train(model, method, optimizer, range(step, step + 1))
        assert masks.alive_count() == total
        for key, tensor in masks.tensors.items():
            momentum = optimizer.state[tensor]["momentum_buffer"]
            assert not any(part[~masks.alive[key]].any() for part in (tensor.detach(), momentum))
    now = {n: int(m.sum()) for n, m in masks.alive.items()}
    assert (now == per_layer) == (name != "ggr")
    assert same(first, masks.alive) == (name == "static-erk")
    assert len(method.density_log) == (1 if name == "static-erk" else 1 + 8)  # at 5, 10, ... 40, before 0.75 * 60
    assert all(now[n] >= floors(model, masks.tensors)[n] for n in now)
    assert dict(method.density_log[-1][1]) == masks.density()


def test_new_weights_and_their_momentum_are_zero() -> None:
    model = network()
    method = Ggr(density=0.2, interval=5)
    method.attach(model, ())
    optimizer = optimizer_of(model)
    train(model, method, optimizer, range(4))
    before = method.masks.state_dict()
    train(model, method, optimizer, range(4, 5))
    for name, tensor in method.masks.tensors.items():
        changed = before[name] ^ method.masks.alive[name]
        assert changed.any() and not tensor.detach()[changed].any()
        assert not optimizer.state[tensor]["momentum_buffer"][changed].any()


def test_the_gradients_of_the_last_four_batches_decide() -> None:
    """RigL's choice against gradients of an unmasked copy, added up by hand."""
    model = network()
    method = Rigl(density=0.2, interval=6)
    method.attach(model, ())
    optimizer = optimizer_of(model)
    sums = {name: torch.zeros_like(p) for name, p in method.masks.tensors.items()}
    for step in range(6):
        twin = copy.deepcopy(model)
        F.cross_entropy(twin(batch(step)[0]), batch(step)[1]).backward()
        if step >= 2:
            for name, parameter in maskable(twin).items():
                sums[name] += parameter.grad
        before = method.masks.state_dict()
        train(model, method, optimizer, range(step, step + 1))
    for name, mask in method.masks.alive.items():
        new = mask & ~before[name]
        best = torch.where(before[name], -1.0, sums[name].abs())
        assert torch.equal(new, topology.largest(best, int(new.sum())))
        assert new.any() == (not before[name].all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [5, 13])
def test_a_resumed_training_ends_the_same(name: str, stop: int, tmp_path) -> None:
    whole = network()
    method = made(name)
    method.attach(whole, ())
    train(whole, method, optimizer_of(whole), range(25))
    begun = network()
    first = made(name)
    first.attach(begun, ())
    optimizer = optimizer_of(begun)
    train(begun, first, optimizer, range(stop))
    torch.save({"m": begun.state_dict(), "o": optimizer.state_dict(), "r": first.state_dict()}, tmp_path / "state")
    first.detach()
    state = torch.load(tmp_path / "state", weights_only=True)
    resumed = network()
    second = made(name)
    second.attach(resumed, ())
    resumed.load_state_dict(state["m"])
    optimizer = optimizer_of(resumed)
    optimizer.load_state_dict(state["o"])
    second.load_state_dict(state["r"])
    train(resumed, second, optimizer, range(stop, 25))
    assert same(whole.state_dict(), resumed.state_dict()) and same(method.masks.alive, second.masks.alive)
    assert list(method.density_log) == list(second.density_log)
    with pytest.raises(UsageError, match="give the density that it was begun with"):
        other = made(name, density=0.5)
        other.attach(network(), ())
        other.load_state_dict(state["r"])


@pytest.mark.parametrize("order", ["attach first", "network first"])
@pytest.mark.parametrize("name", ["ggr", "rigl", "set"])
def test_the_network_may_be_loaded_before_or_after_it_is_attached(name: str, order: str) -> None:
    def begun() -> tuple[nn.Module, SparseTraining]:
        method = REGULARIZERS[name](density=0.2, interval=5)  # type: ignore[call-arg]
        assert isinstance(method, SparseTraining)
        return network(), method

    model, method = begun()
    method.attach(model, ())
    train(model, method, optimizer_of(model), range(30))  # the last update was just now: what grew is still 0
    kept = {key: value.clone() for key, value in model.state_dict().items()}, method.state_dict()
    again, other = begun()
    if order == "network first":
        again.load_state_dict(kept[0])
        other.attach(again, ())
    else:
        other.attach(again, ())
        again.load_state_dict(kept[0])
    other.load_state_dict(kept[1])
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in kept[0].items())
    assert same(other.masks.alive, method.masks.alive)


def test_a_pretrained_network_keeps_its_largest_weights_and_random_ones_are_random() -> None:
    model = network()
    before = {name: p.detach().clone() for name, p in maskable(model).items()}
    method = StaticErk(density=0.2)
    method.attach(model, ())
    for name, mask in method.masks.alive.items():
        assert mask.all() or before[name][mask].abs().min() > before[name][~mask].abs().max()
        assert torch.equal(maskable(model)[name][mask], before[name][mask])
    drawn = []
    for seed in (0, 0, 1):
        fresh = network()
        random = StaticErk(density=0.2, weights="random", seed=seed)
        random.attach(fresh, ())
        drawn.append(random.masks.state_dict())
    assert same(drawn[0], drawn[1]) and not same(drawn[0], drawn[2]) and not same(drawn[0], method.masks.alive)
    assert {n: int(m.sum()) for n, m in drawn[0].items()} == {n: int(m.sum()) for n, m in method.masks.alive.items()}


def test_filters_without_survivors_score_lowest() -> None:
    model = network()
    groups = trace(model, torch.randn(1, 3, 8, 8))
    with torch.no_grad():
        model[4].conv1.weight[5] *= 1e-4  # the smallest of its layer: all of it dies
    method = Ggr(density=0.2)
    method.attach(model, groups)
    name = next(g.name for g in groups if any(s.name == "4.conv1.weight" and s.dim == 0 for s in g.slices))
    scores = method.scores()[name]
    sizes = model[4].conv1.weight.detach().abs().sum((1, 2, 3))
    assert scores[5] == 0 and (scores > 0).sum() == 15
    assert torch.allclose(scores, sizes / sizes.mean(), rtol=1e-5)


def test_global_gradients_repair_what_fixed_densities_cannot() -> None:
    """From a start that starves all but the first layer, GGR gives the others more weights."""
    bad = {"0.weight": 1.0} | {n: 1e-6 for n in maskable(network()) if n != "0.weight"}
    ends = {}
    for kind in (Ggr, Rigl, SetTraining):
        model = network()
        method = kind(density=0.06, initial=bad, interval=5, steps=60)
        method.attach(model, ())
        ends[kind] = int(method.masks.alive["0.weight"].sum())
        train(model, method, optimizer_of(model), range(60))
        ends[kind] -= int(method.masks.alive["0.weight"].sum())
    assert ends[Rigl] == ends[SetTraining] == 0 and ends[Ggr] > 50


def test_the_classifier_is_thinned_on_request_only() -> None:
    model = network()
    method = StaticErk(density=0.5, classifier=True)
    method.attach(model, ())
    assert "7.weight" in method.masks.alive and "7.weight" not in maskable(model)


def test_what_is_wrong_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    for options, words in (
        ({"rho": 2.0}, "rho = 2.0 is out of range"),
        ({"interval": 0}, "interval = 0 is out of range"),
        ({"drop": "some"}, "drop = 'some' is out of range"),
        ({"weights": "best"}, "weights = 'best' is out of range; allowed is magnitude or random"),
        ({"densities": 1}, "ggr has no option 'densities'; there are density"),
    ):
        with pytest.raises(UsageError, match=words):
            made("ggr", **options)
    with pytest.raises(UsageError, match="ggr and rigl would mask the same weights"):
        make({"ggr": {}, "rigl": {}}, {})
    model, method = network(), Ggr(density=0.2, interval=1)
    method.attach(model, ())
    with pytest.raises(UsageError, match="no gradient was seen"):
        method.after_step()
    Ggr(density=0.2, steps=60).attach(network(), ())
    assert "the topology never changes: 45 of 60 steps" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_they_are_plain_regularisers(name: str) -> None:
    model = network()
    method = REGULARIZERS[name]()
    method.attach(model, trace(model, torch.randn(1, 3, 8, 8)))
    assert float(method.penalty()) == 0 and not list(method.parameters())
    before = method.state_dict()["masks"]
    method.scale_penalty(3.0)
    assert same(before, method.masks.alive) and all(
        not isinstance(v, int | float) for v in method.state_dict().values()
    )
    method.detach()
    method.detach()
    assert same({n: p != 0 for n, p in maskable(model).items()}, before)
    optimizer = optimizer_of(model)
    F.cross_entropy(model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()
    assert any(bool(p.detach()[~before[n]].any()) for n, p in maskable(model).items())  # free again


# --- the command line -------------------------------------------------------------------------------------------------

TRAIN = ("train", "--arch", "resnet20", "--data", "digits", "--image-size", 8, "--device", "cpu")


@pytest.mark.usefixtures("in_the_repository")
def test_train_ggr_leaves_exactly_the_weights_asked_for(tmp_path) -> None:
    out = tmp_path / "sparse.safetensors"
    options = ("--method", "ggr", "--density", 0.05, "--set", "ggr.interval=5", "--epochs", 2, "--batch-size", 64)
    still = ("--set", "ggr.rho=0")  # nothing grows at random, where no gradient may come by and a living weight stay 0
    document = answer(*TRAIN, *options, *still, "--out", out)
    saved = checkpoint.read(out).tensors
    names = maskable(resnet20(num_classes=10))
    total = sum(saved[n].numel() for n in names)
    assert document["nonzero"] == sum(int(saved[n].count_nonzero()) for n in names) == round(0.05 * total)
    assert document["density"] == document["nonzero"] / document["of"] and document["of"] == total
    assert document["layers"] == {n: int(saved[n].count_nonzero()) / saved[n].numel() for n in names}
    steps = [step for step, _ in document["density_log"]]
    assert steps == list(range(0, steps[-1] + 1, 5)) and len(steps) > 3
    assert document["density_log"][-1][1] == document["layers"]
    assert not (tmp_path / "sparse.state").exists()


@pytest.mark.usefixtures("in_the_repository")
def test_train_goes_on_from_a_checkpoint_with_a_penalty_beside(tmp_path) -> None:
    out = tmp_path / "sparse.pt"
    options = ("--init", MODEL, "--method", "static-erk", "--density", 0.3, "--regularize", "lasso", "--epochs", 1)
    result = call(*TRAIN, *options, "--out", out)
    assert result.exit_code == 0, result.stderr
    tensors, dense = checkpoint.read(out).tensors, checkpoint.read(Path(MODEL)).tensors
    assert "density 0.3: " in result.stderr and "places changed 0 times" in result.stderr
    assert re.search(r"lasso: strength \S+; calibrated to 10.0 % of the task loss", result.stderr), result.stderr
    name = "layer3.2.conv2.weight"
    kept = tensors[name] != 0
    assert dense[name][kept].abs().min() >= dense[name][~kept].abs().max()


@pytest.mark.usefixtures("in_the_repository")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "l1"), "l1 is no regulariser; there are halo"),
        (("--density", 0.1), "--density 0.1 needs a --method that holds it: ggr, rigl, set, static-erk"),
        (("--method", "ggr", "--regularize", "ggr"), "ggr takes part already"),
        (("--method", "ggr", "--set", "rigl.end=1"), "--set names 'rigl', which takes no part; there are ggr"),
        (("--method", "ggr", "--set", "interval"), "is not of the form regulariser.option=value"),
        (("--method", "ggr", "--regularize", "set"), "ggr and set would mask the same weights"),
        (("--method", "ggr", "--density", 0.001), "density 0.001 leaves 268 weights"),
    ],
)
def test_train_refuses(options: tuple[object, ...], words: str, tmp_path) -> None:
    code, text = refusal(*TRAIN, *options, "--epochs", 1, "--out", tmp_path / "a.pt")
    assert code == 2 and words in text
