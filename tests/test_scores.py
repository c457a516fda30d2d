"""Each score is what its paper says, by brute force, and keeps the laws that its docstring promises."""

from __future__ import annotations

import copy
import warnings
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress import cost, shrink
from compress.errors import PruneError, UsageError
from compress.groups import Group, Slice, trace
from compress.pipeline import dry_run
from compress.recipe import Recipe
from compress.scores import DATA_DRIVEN, SCORES
from compress.scores.reconstruction import obs
from compress.scores.samples import activation, hessian, obd_c, taylor
from compress.scores.weights import fpgm, l2, lamp
from tests.nets import NETS, lively

X = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ZERO_FOR_DEAD = [name for name in SCORES if name not in ("random", "fpgm")]  # fpgm asks for a filter's place, not size


def batches(classes: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(len(X)) % classes
    return list(zip(X.chunk(count), labels.chunk(count), strict=True))


def score(name: str, model: nn.Module, groups: tuple[Group, ...], classes: int = 3) -> dict[str, Tensor]:
    return dict(SCORES[name](model, groups, batches(classes) if name in DATA_DRIVEN else None))


def chain(seed: int = 0, width: int = 8) -> nn.Sequential:
    """One free group of filters, each with a bias and a norm, then a reader and a classifier."""
    torch.manual_seed(seed)
    return lively(
        nn.Sequential(
            nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )
    ).double()  # fmt: skip


def filters(model: nn.Sequential) -> list[Tensor]:
    """What filter i of the first layer owns, along axis 0; the reader's columns come last, along axis 1."""
    norm = model[1]
    return [model[0].weight, model[0].bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]


GROUPS = trace(chain(), X[:1])


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("net", NETS)
def test_scores_are_finite_and_whole_and_leave_the_network_alone(name: str, net: str) -> None:
    torch.manual_seed(0)
    model = lively(NETS[net]())
    classes = model(X).shape[1]
    groups = trace(model, X)
    model.train()
    before = copy.deepcopy(model.state_dict())
    found = score(name, model, groups, classes)
    assert found.keys() == {g.name for g in groups}
    for group in groups:
        assert found[group.name].shape == (group.size,) and found[group.name].dtype == torch.float32
        assert bool(found[group.name].isfinite().all()) and float(found[group.name].min()) >= 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules()) and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", [n for n in SCORES if n != "random"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), order=st.permutations(range(8)))
def test_permuting_filters_permutes_scores(name: str, seed: int, order: list[int]) -> None:
    model = chain(seed)
    before = score(name, model, GROUPS)["0"]
    with torch.no_grad():
        for tensor in filters(model):
            tensor.copy_(tensor[order].clone())
        model[3].weight.copy_(model[3].weight[:, order].clone())
    assert torch.allclose(score(name, model, GROUPS)["0"], before[order], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ZERO_FOR_DEAD)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), dead=st.integers(0, 7))
def test_a_dead_filter_scores_lowest(name: str, seed: int, dead: int) -> None:
    model = chain(seed)
    with torch.no_grad():
        for tensor in filters(model):
            tensor[dead] = 0
    found = score(name, model, GROUPS)["0"]
    assert found[dead] == 0 == found.min()


@pytest.mark.parametrize("name", SCORES)
@settings(max_examples=10, deadline=None)
@given(dead=st.sets(st.sampled_from(range(len(list(NETS["residual"]().parameters())))), min_size=1))
def test_scores_are_finite_on_dead_layers(name: str, dead: set[int]) -> None:
    torch.manual_seed(0)
    model = lively(NETS["residual"]())
    groups = trace(model, X[:1]) if not CACHE else CACHE[0]
    CACHE.append(groups)
    with torch.no_grad():
        for index, tensor in enumerate(model.parameters()):
            if index in dead:
                tensor.zero_()
    found = score(name, model, groups, 10)
    assert all(bool(values.isfinite().all()) for values in found.values())


CACHE: list[tuple[Group, ...]] = []


# --- by hand ----------------------------------------------------------------------------------------------------------


def relative(values: Tensor) -> Tensor:
    return (values / values.mean()).float()


def theirs(model: nn.Sequential, importance: str, **options: object) -> Tensor:
    """What torch-pruning 1.6.1 gives the first layer's filters, or its norm's scales."""
    import torch_pruning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(model, X[:1].double(), verbose=False)
        part = graph.get_pruning_group(model[0], torch_pruning.prune_conv_out_channels, list(range(8)))
        part._group = [item for item in part._group if item.dep.target.module in (model[0], model[1])]
        if importance != "BNScaleImportance":
            part._group = [item for item in part._group if item.dep.target.module is model[0]]
        return getattr(torch_pruning.importance, importance)(**options)(part).detach()


@pytest.mark.parametrize("seed", [0, 1])
def test_torch_pruning_s_importances_agree_where_they_mean_the_same(seed: int) -> None:
    """Ours are in units of the layer's mean; theirs for p = 2 are squared."""
    model = chain(seed)
    for name, wanted in {
        "l1": theirs(model, "MagnitudeImportance", p=1, normalizer=None),
        "l2": theirs(model, "MagnitudeImportance", p=2, normalizer=None).sqrt(),
        "lamp": theirs(model, "LAMPImportance"),
        "bn-scale": theirs(model, "BNScaleImportance", normalizer=None),
    }.items():
        assert torch.allclose(score(name, model, GROUPS)["0"], relative(wanted), rtol=1e-5), name


def test_fpgm_is_the_sum_of_distances_and_torch_pruning_s_is_not() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[1] = -model[0].weight[0]  # as far apart as can be; |w|^p sees one filter twice
    flat = model[0].weight.detach().flatten(1)
    wanted = torch.stack([(flat - row).norm(dim=1).sum() for row in flat])
    found = fpgm(model, GROUPS)["0"]
    assert torch.allclose(found, relative(wanted), rtol=1e-6)
    other = theirs(model, "FPGMImportance", p=2, normalizer=None)
    assert torch.allclose(other.double(), torch.cdist(flat**2, flat**2).sum(1), rtol=1e-5)
    assert other.argsort().tolist() != wanted.argsort().tolist()


def test_fpgm_removes_the_filter_in_the_middle_not_the_smallest() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[9.0, 9.0], [11.0, 9.0], [10.0, 11.0], [0.0, 0.0]]).view(4, 2, 1, 1))
    found = fpgm(model, trace(model, torch.randn(1, 2, 4, 4)))["0"]
    assert found.argmax() == 3


def test_lamp_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 1.0, -3.0, 1.0]).view(4, 1, 1, 1))
    found = lamp(model, trace(model, torch.randn(1, 1, 4, 4)))["0"]
    assert torch.allclose(found, relative(torch.tensor([4 / 13, 1 / 15, 9 / 9, 1 / 15])))


def single_gradients(model: nn.Module, data: list[tuple[Tensor, Tensor]], tensor: Tensor) -> Tensor:
    """d loss / d tensor for each image on its own: (images, *tensor)."""
    found = []
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            loss = F.cross_entropy(model(image[None].double()), label[None])
            found.append(torch.autograd.grad(loss, tensor)[0])
    return torch.stack(found)


def test_taylor_is_the_squared_group_contribution_averaged_over_batches() -> None:
    model, data = chain(), batches(3)
    weight = model[0].weight
    each = []
    for images, labels in data:
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(images.double()), labels), weight)
        each.append((gradient * weight.detach()).flatten(1).sum(1) ** 2)
    assert torch.allclose(taylor(model, GROUPS, data)["0"], relative(torch.stack(each).mean(0)), rtol=1e-6)


def test_taylor_predicts_the_change_of_the_loss() -> None:
    """sum_s g_s w_s is the slope of the loss when a filter is scaled."""
    model, data = chain(), batches(3, count=1)
    images, labels = data[0][0].double(), data[0][1]
    slopes = []
    for index in range(8):
        with torch.no_grad():
            values = []
            for factor in (1 - 1e-4, 1 + 1e-4):
                other = copy.deepcopy(model)
                other[0].weight[index] *= factor
                values.append(F.cross_entropy(other(images), labels))
        slopes.append(((values[1] - values[0]) / 2e-4) ** 2)
    assert torch.allclose(taylor(model, GROUPS, data)["0"], relative(torch.stack(slopes)), rtol=1e-3)


def test_hessian_is_the_mean_over_images_and_torch_pruning_s_is_the_last() -> None:
    import torch_pruning

    model, data = chain(), batches(3)
    weight = model[0].weight
    gradients = single_gradients(model, data, weight)
    wanted = (weight.detach() ** 2 * gradients.square().mean(0)).flatten(1).sum(1)
    assert torch.allclose(hessian(model, GROUPS, data)["0"], relative(wanted), rtol=1e-6)
    first = (weight.detach() ** 2 * gradients[:7].square().mean(0)).flatten(1).sum(1)
    assert torch.allclose(hessian(model, GROUPS, iter(data), images=7)["0"], relative(first), rtol=1e-6)

    theirs = torch_pruning.importance.GroupHessianImportance(normalizer=None)
    theirs.zero_grad()
    for images, labels in data:
        for image, label in zip(images, labels, strict=True):
            model.zero_grad()
            F.cross_entropy(model(image[None].double()), label[None]).backward()
            theirs.accumulate_grad(model)
    kept = theirs._accu_grad[weight] / theirs._counter[weight]
    assert torch.equal(kept, gradients[-1].square())
    assert not torch.allclose(kept, gradients.square().mean(0), rtol=0.1)


def test_obd_c_draws_labels_from_the_predictions() -> None:
    model, data = chain(), batches(3)
    with torch.no_grad():
        model[-1].weight *= 8  # so that the predictions say something
    weight = model[0].weight
    exact = torch.zeros_like(weight)  # the Fisher diagonal by definition: every label, by its probability
    for image in X.double():
        likely = model(image[None]).softmax(1)[0].detach()
        for label, share in enumerate(likely):
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(image[None]), torch.tensor([label])), weight)
            exact += share * gradient**2
    wanted = relative((weight.detach() ** 2 * exact).flatten(1).sum(1))
    assert torch.allclose(obd_c(model, GROUPS, data * 60, images=720)["0"], wanted, rtol=0.25)
    wrong = [(images, torch.zeros_like(labels)) for images, labels in data]
    assert torch.equal(obd_c(model, GROUPS, wrong)["0"], obd_c(model, GROUPS, data)["0"])  # given labels play no part


def test_activation_is_taken_behind_norm_and_activation() -> None:
    model, data = chain(), batches(3)
    wanted = model[:3](X.double()).abs().mean((0, 2, 3)).detach()
    found = activation(model, GROUPS, data)
    assert torch.allclose(found["0"], relative(wanted), rtol=1e-6)
    last = model(X.double()).abs().mean(0).detach()
    assert torch.allclose(found["7"], relative(last), rtol=1e-6)  # nothing reads the logits
    assert torch.allclose(found["3"], relative(model[:6](X.double()).abs().mean((0, 2, 3)).detach()), rtol=1e-6)


def test_activation_finds_channels_behind_a_flatten_and_a_concatenation() -> None:
    torch.manual_seed(0)
    model = lively(NETS["residual"]())
    found = activation(model, trace(model, X), batches(10))["4.conv2"]
    assert torch.allclose(found, relative(model[:6](X).abs().mean((0, 2, 3)).detach()), rtol=1e-5)
    both = lively(NETS["concat"]())
    right = activation(both, trace(both, X), batches(5))["right"]
    assert torch.allclose(right, relative(both.right(X).relu().mean((0, 2, 3)).detach()), rtol=1e-5)


def unfitted(outputs: Tensor, columns: Tensor) -> float:
    """The squared error of the best linear map of `columns` (rows, n) to `outputs` (rows, o)."""
    if not columns.shape[1]:
        return float(outputs.square().sum())
    return float((outputs - columns @ torch.linalg.lstsq(columns, outputs).solution).square().sum())


@pytest.mark.parametrize("channels_alone", [False, True])
def test_obs_is_what_least_squares_cannot_make_up_for(channels_alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.scores.reconstruction.RIDGE", 1e-12)
    model = chain(width=5)
    groups = trace(model, X[:1])
    read = model[:3](X.double()).detach()  # (N, 5, 14, 14), what the second convolution reads
    layer = model[3]
    if channels_alone:  # one matrix over channels for all nine places of the kernel, as folding has it then
        monkeypatch.setattr("compress.groups.reading.COLUMNS", 9)
        rows = read.movedim(1, -1).reshape(-1, 5)
        outputs = torch.einsum("rc,ockl->rokl", rows, layer.weight.detach()).flatten(1)
        columns = {c: [c] for c in range(5)}
    else:
        rows = F.unfold(read, 3).transpose(1, 2).reshape(-1, 45)
        outputs = rows @ layer.weight.detach().flatten(1).T
        columns = {c: list(range(9 * c, 9 * c + 9)) for c in range(5)}
    left, before, wanted, last = list(range(5)), 0.0, torch.zeros(5), 0.0
    while left:  # by brute force: every way to let one more leave
        errors = [unfitted(outputs, rows[:, [i for c in left if c != out for i in columns[c]]]) for out in left]
        least = min(errors)
        out = left.pop(errors.index(least))
        wanted[out] = last = max(least - before, last)
        before = least
    found = obs(model, groups, batches(3, count=1))["0"]
    assert torch.allclose(found, relative(wanted), rtol=1e-3, atol=1e-5)


def test_obs_lets_a_channel_go_that_another_repeats_however_large() -> None:
    model = chain()
    with torch.no_grad():
        for tensor in filters(model):
            tensor[5] = tensor[2]
        model[3].weight[:, 5] *= 10
    found = obs(model, GROUPS, batches(3))["0"]
    twins = found[[2, 5]].sort().values
    assert twins[0] == found.min() and twins[0] < 0.02 * twins[1]


def test_obs_adds_up_all_readers_and_takes_those_it_cannot_refit_at_their_weight() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.grouped, self.plain = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            seen = self.first(x).relu()
            return torch.cat([self.grouped(seen), self.plain(seen)], 1)

    torch.manual_seed(0)
    model = Two().double()
    with torch.no_grad():
        model.plain.weight[:, 1:] = 0  # reads its first channel alone
    slices = Slice("first.weight", 0), Slice("grouped.weight", 1), Slice("plain.weight", 1, offset=0)
    read = model.first(X.double()).relu().detach()
    energy = read.square().mean((0, 2, 3))
    halves = model.grouped.weight.detach().view(2, 3, 2, 9).square().sum((1, 3))  # (half, input of it)
    lost = (halves.flatten() * energy).view(2, 2).sum(0)  # channel i is input i of both halves
    found = obs(model, [Group("first", 2, slices[:2], None)], batches(3))["first"]
    assert torch.allclose(found, relative(lost), rtol=1e-5)
    both = obs(model, [Group("first", 2, slices, None)], batches(3))["first"]
    rows = F.unfold(read, 3).transpose(1, 2).reshape(-1, 36)
    outputs = rows[:, :9] @ model.plain.weight.detach()[:, 0].flatten(1).T
    beyond = unfitted(outputs, rows[:, 18:]) / float(outputs.square().sum())  # once the second channel has left, too
    assert torch.allclose(both, relative(lost / lost.sum() + torch.tensor([beyond, 0.0])), rtol=2e-3)


@pytest.mark.parametrize("largest", [5, 4096])
def test_obs_behind_a_flatten_and_in_wide_linear_layers(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel of four inputs each; beyond WIDEST inputs it costs what it gives, else what the others cannot."""
    monkeypatch.setattr("compress.groups.reading.WIDEST", largest)
    monkeypatch.setattr("compress.scores.reconstruction.RIDGE", 1e-12)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4))
    model = model.double()
    groups = trace(model, X[:1])
    images = torch.randn(60, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    read, weight = model[:4](images.double()).detach(), model[4].weight.detach()
    found = obs(model, groups, [(images[:40], torch.zeros(40)), (images[40:], torch.zeros(20))])["0"]
    if largest == 5:
        wanted = (weight.square().sum(0) * read.square().mean(0)).view(3, 4).sum(1)
        assert torch.allclose(found, relative(wanted), rtol=1e-5)
        return
    outputs = read @ weight.T
    alone = [
        unfitted(outputs, read.view(-1, 3, 4)[:, [c for c in range(3) if c != out]].flatten(1)) for out in range(3)
    ]
    assert found.argmin() == torch.tensor(alone).argmin()
    first = min(alone) / float(outputs.square().sum())
    last = 1 - unfitted(outputs, read.view(-1, 3, 4)[:, int(found.argmax())]) / float(outputs.square().sum())
    assert torch.allclose(found.max() / found.min(), torch.tensor(last / first), rtol=1e-3)


def test_obs_takes_a_group_whose_reader_is_never_called_for_unread() -> None:
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.a(x), self.b.weight)

    model, group = Unseen(), Group("a", 4, (Slice("a.weight", 0), Slice("b.weight", 1)), None)
    assert torch.equal(obs(model, [group], batches(2))["a"], l2(model, [group])["a"])


def test_obs_of_a_broken_network_is_not_finite() -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    assert not bool(obs(model, GROUPS, batches(3))["0"].isfinite().any())


# --- callers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DATA_DRIVEN))
def test_a_score_that_needs_data_says_so(name: str) -> None:
    model = chain()
    with pytest.raises(UsageError, match=f"the score '{name}' needs data: give batches"):
        SCORES[name](model, GROUPS)
    with pytest.raises(UsageError, match="there was no batch"):
        SCORES[name](model, GROUPS, iter(()))


def test_shrink_takes_batches() -> None:
    model = chain(width=16).float()
    with pytest.raises(UsageError, match="needs data"):
        shrink(model, X[:1], keep=0.5, score="taylor")
    assert cost.measure(model, X[:1]).total("params") == sum(p.numel() for p in model.parameters())
    plan = shrink(model, X[:1], keep=0.5, score="taylor", round_to=1, batches=islice(iter(batches(3)), 1))
    assert plan.reached <= 0.5


def test_shrink_takes_scores_and_measure_is_public() -> None:
    model, twin = chain(width=16).float(), chain(width=16).float()
    groups = trace(model, X[:1])
    before = compress.measure(model, X[:1]).total("params")
    plan = shrink(model, X[:1], keep=0.5, score=SCORES["l2"](model, groups, None), round_to=1)
    assert plan == shrink(twin, X[:1], keep=0.5, score="l2", round_to=1)
    assert compress.measure(model, X[:1]).total("params") <= 0.5 * before
    with pytest.raises(PruneError, match="no scores of shape"):
        shrink(model, X[:1], keep=0.5, score={})


def test_a_dry_run_without_data_ranks_by_l2() -> None:
    model = chain(width=16).float()

    def kept(**prune) -> object:
        recipe = Recipe.model_validate(
            {"model": {"path": "x"}, "prune": {"keep": 0.5, "allocation": "relative", "round_to": 1, **prune}}
        )
        return dry_run(recipe, model, X[:1])[0].kept

    assert kept(method="taylor") == kept(method="halo", score="obd-c") == kept(method="l2") != kept(method="random")
