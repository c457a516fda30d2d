"""Sensitivity: the figures are those of real cuts with fresh batch norms, and select keeps to the limits."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import compress
from compress.checkpoint import read as read_checkpoint
from compress.cli import load
from compress.cost import measure
from compress.errors import PruneError, TargetError, UsageError
from compress.folder import RunFolder
from compress.groups import trace, zero
from compress.pipeline import Event, run
from compress.pipeline.widths import select_as
from compress.plan import select
from compress.recipe import make
from compress.report.curves import curves, sensitivity_page
from compress.scores import SCORES
from compress.sensitivities import Curve, Outcome, Sensitivity, Width, limits, read
from compress.task import IGNORED, Segmentation, loss_of
from tests.couplings import normed
from tests.nets import NETS, lively
from tests.shell import MODEL, answer, call, refusal

X = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(24) % 10


def fresh_norms(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Batch norms that hold the statistics of one batch, written out anew."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    seen: dict[nn.Module, torch.Tensor] = {}
    for norm in norms:
        norm.train()
        norm.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0].detach()}))
    with torch.no_grad():
        model(images)
    for norm in norms:
        norm.running_mean.copy_(seen[norm].mean((0, 2, 3)))
        norm.running_var.copy_(seen[norm].var((0, 2, 3)))
    return model.eval()


@pytest.mark.parametrize("name", ["residual", "concat", "depthwise"])
def test_every_figure_is_that_of_the_zeroed_network_with_fresh_norms(name: str) -> None:
    torch.manual_seed(0)
    model = lively(NETS[name]()).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    groups, told = trace(model, X[:1]), []
    found = compress.sensitivity(
        model, [(X, Y % 4)], groups=groups, score="l1", widths=(0.5, 0.26), on_progress=lambda *at: told.append(at)
    )
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert told[0] == (0, told[-1][0]) and told[-1][0] == told[-1][1]
    dense = fresh_norms(copy.deepcopy(model), X)(X).detach()
    assert found.dense.loss == pytest.approx(float(F.cross_entropy(dense, Y % 4)), rel=1e-9)
    scores = SCORES["l1"](model, groups)
    free = [g for g in groups if g.frozen is None]
    assert found.groups.keys() == {g.name for g in free}
    for group in free:
        curve = found.groups[group.name]
        assert [w.kept for w in curve.widths] == sorted({round(0.26 * group.size), round(0.5 * group.size)})
        for width in curve.widths:
            kept = scores[group.name].argsort(descending=True, stable=True)[: width.kept].tolist()
            zeroed = copy.deepcopy(model)
            zero(zeroed, (group,), {group.name: kept})
            outputs = fresh_norms(zeroed, X)(X).detach()
            assert width.distortion == pytest.approx(float((outputs - dense).norm() / dense.norm()), rel=1e-9)
            assert width.loss == pytest.approx(float(F.cross_entropy(outputs, Y % 4)), rel=1e-9)
            assert width.value == pytest.approx(100 * float((outputs.argmax(1) == Y % 4).double().mean()))


def test_without_labels_the_outputs_are_compared_and_layer_norms_see_the_narrow_trunk() -> None:
    torch.manual_seed(0)
    model = lively(normed()).double()
    found = compress.sensitivity(model, [(X, None)], widths=(0.5,))
    assert found.dense.model_dump() == {"value": None, "loss": None, "distortion": 0.0} and found.metric is None
    kept = SCORES["l2"](model, trace(model, X[:1]))["embed"].argsort(descending=True, stable=True)[:12].sort().values
    state = {
        key: value.index_select(value.dim() - 1 if key in ("mix.1.weight", "head.weight") else 0, kept)
        if 24 in value.shape and not key.startswith("mix.4")
        else value[kept] if key.startswith("mix.4") else value
        for key, value in model.state_dict().items()
    }  # fmt: skip
    built = normed(12).double().eval()
    built.load_state_dict(state)
    with torch.no_grad():
        dense, outputs = model(X), built(X)
    width = found.groups["embed"].widths[0]
    assert width.distortion == pytest.approx(float((outputs - dense).norm() / dense.norm()), rel=1e-9)


class Two(Segmentation):
    """Both outputs of a dict, of a network that takes two images; a pair comes as (one, other, masks)."""

    name, metric = "two", "pixels"

    def unpack(self, batch: Any) -> tuple[Any, Any]:
        return batch[:2], batch[2]

    def logits(self, output: Any) -> torch.Tensor:
        return output["a"] + output["b"]

    def value(self, counts: torch.Tensor) -> float:
        return float(100 * counts.diagonal().sum() / counts.sum())


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        both = torch.relu(self.one(x)) + torch.relu(self.other(y))
        return {"a": self.a(both), "b": self.b(both)}


@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_a_task_of_ones_own_is_judged_by_its_metric(score: str) -> None:
    torch.manual_seed(0)
    model, masks = Pair().double(), torch.randint(3, (24, 16, 16))
    masks[:, 0] = IGNORED
    batches = [(X[at : at + 8], X[at : at + 8].flip(2), masks[at : at + 8]) for at in (0, 8, 16)]
    found = compress.sensitivity(model, batches, task=Two(), score=score, widths=(0.5,))
    (group,) = (g for g in trace(model, (X[:1], X[:1])) if g.frozen is None)
    width = found.groups[group.name].widths[0]
    assert found.metric == "pixels" and found.images == 24 and width.kept == 4
    given = [((x, y), m) for x, y, m in batches]
    scored = SCORES[score](model, (group,), given, **({"loss": loss_of(Two())} if score == "taylor" else {}))
    kept = scored[group.name].argsort(descending=True, stable=True)[:4].tolist()
    zeroed = copy.deepcopy(model)
    zero(zeroed, (group,), {group.name: kept})
    for network, outcome in ((model, found.dense), (zeroed, width)):
        with torch.no_grad():
            logits = Two().logits(network(X, X.flip(2)))
        counts = masks != IGNORED
        right = (logits.argmax(1) == masks)[counts].double().mean()
        assert outcome.value == pytest.approx(100 * float(right))
        assert outcome.loss == pytest.approx(float(F.cross_entropy(logits, masks, ignore_index=IGNORED)), rel=1e-9)


def made(harms: dict[str, list[float]], dense: float = 90.0) -> Sensitivity:
    """Groups of 8 channels measured at 2, 4 and 6, with these drops of the metric, the narrowest first."""
    curves = {
        name: Curve(
            size=8,
            widths=tuple(
                Width(keep=k / 8, kept=k, value=dense - harm, loss=1.0, distortion=harm / 100)
                for k, harm in zip((2, 4, 6), values, strict=True)
            ),
        )
        for name, values in harms.items()
    }
    whole = Outcome(value=dense, loss=1.0)
    return Sensitivity(score="l2", metric="top1", images=9, calibration_images=9, dense=whole, groups=curves, frozen={})


def test_limits_between_and_below_the_widths() -> None:
    groups = tuple(compress.Group(name, 8, ()) for name in "abc")
    found = made({"a": [8, 4, 0], "b": [0.5, -1, 0.2], "c": [9, 6, 4]})
    least = limits(found, groups, max_drop=1.0)
    assert least == {"a": pytest.approx(0.75 - 0.25 / 4), "b": 0.25, "c": pytest.approx(1 - 0.25 / 4)}
    assert limits(found, groups, max_distortion=0.01) == pytest.approx(least)
    both = limits(found, groups, max_drop=4.0, max_distortion=0.01)
    assert both == pytest.approx(least)  # the stricter one holds
    cut_since = (compress.Group("a", 7, ()), *groups[1:])
    assert limits(found, cut_since, max_drop=1.0)["a"] == pytest.approx((0.75 - 0.25 / 4) * 8 / 7)


@pytest.mark.parametrize("round_to", [1, 4])
def test_select_keeps_to_limits_whatever_the_target(round_to: int) -> None:
    model = NETS["residual"]()
    groups, costs = trace(model, X[:1].float()), measure(model, X[:1].float())
    scores = SCORES["l2"](model, groups)
    wanted = {"0": 0.75, "3.0.conv1": 1.0, "4.conv1": 0.3}
    free = select(groups, scores, costs, keep=0.3, round_to=round_to)
    bound = select(groups, scores, costs, keep=0.3, round_to=round_to, limits=wanted, adapt=True)
    sizes = {g.name: g.size for g in groups}
    assert all(len(bound.kept[name]) >= share * sizes[name] for name, share in wanted.items())
    assert any(len(free.kept[name]) < share * sizes[name] for name, share in wanted.items())
    assert bound.reached <= 0.3
    with pytest.raises(
        TargetError, match=r"out of reach under the limits of the groups; the lowest .* is 0\."
    ) as caught:
        select(groups, scores, costs, keep=0.3, limits=dict.fromkeys(free.kept, 0.9))
    again = select(groups, scores, costs, keep=caught.value.lowest, limits=dict.fromkeys(free.kept, 0.9))
    assert again.reached == pytest.approx(caught.value.lowest)
    for wrong, text in (({"nobody": 0.5}, "'nobody', which this network does not have"), ({"0": 1.5}, "is 1.5; it mu")):
        with pytest.raises(UsageError, match=text):
            select(groups, scores, costs, keep=0.5, limits=wrong)


def test_refusals(tmp_path: Path) -> None:
    model = NETS["plain"]()
    x = X.float()
    for options, text in (
        ({"score": "best"}, "no score is called 'best'"),
        ({"widths": (0.5, 1.0)}, r"the widths are \[0.5, 1.0\]; allowed are shares above 0 and below 1"),
        ({"score": "taylor"}, "the score 'taylor' needs labels"),
    ):
        with pytest.raises(UsageError, match=text):
            compress.sensitivity(model, [(x, None)], **options)
    with pytest.raises(UsageError, match="there was no batch"):
        compress.sensitivity(model, [])
    with pytest.raises(UsageError, match="some batches have labels and others none"):
        compress.sensitivity(model, [(x, None), (x, Y)])
    groups = trace(model, x[:1])
    with pytest.raises(PruneError, match="the outputs are all 0 or not finite"):
        compress.sensitivity(model, [(x * float("nan"), None)], groups=groups)
    found, groups = made({"a": [1, 1, 1]}), (compress.Group("a", 8, ()),)
    with pytest.raises(UsageError, match="no limit is given"):
        limits(found, groups)
    with pytest.raises(UsageError, match="another network: it has no group 'z' of 8 channels"):
        limits(found, (compress.Group("z", 8, ()),), max_drop=1)
    with pytest.raises(UsageError, match="measured without labels"):
        limits(found.model_copy(update={"dense": Outcome()}), groups, max_drop=1)
    recipe = make({"model": {"path": "x"}, "prune": {"max_group_drop": 2}})
    with pytest.raises(UsageError, match=r"need prune\.sensitivity, a file to go by"):
        select_as(recipe, groups, {}, measure(model, x[:1]), keep=0.5, whole=1.0, found=None)
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UsageError, match=r"x.json is no sensitivity file \(another format\)"):
        read(tmp_path / "x.json")
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "y.json")


def test_the_page_holds_every_figure_and_needs_no_network() -> None:
    found = {**made({"a<b>": [8, 4, 0], "c": [0, 0, 0]}).model_dump(mode="json"), "arch": "x", "data": "<d>"}
    page = sensitivity_page({**found, "remark": ""})
    assert "a&lt;b&gt;" in page and "<d>" not in page and "http" not in page.replace("http-equiv", "")
    assert "82.0" in page and "default-src &#39;none&#39;" in page.replace("'", "&#39;")
    top1 = curves(found)[0]
    assert top1.name == "sensitivity-value" and top1.title == "top-1" and top1.keys[0] == ("cut", "a<b>")
    other, worst = top1.spec["data"]  # the worst one is drawn last, on top, in a colour of its own
    assert worst["name"] == "a&lt;b&gt;" and worst["line"]["color"] == "var(--cut)" != other["line"]["color"]
    assert worst["x"] == [0.25, 0.5, 0.75, 1.0] and worst["text"][0].startswith("a&lt;b&gt;, ")
    assert worst["y"] == sorted(worst["y"]) and worst["y"][-1] == top1.spec["layout"]["shapes"][0]["y0"]
    alone = {**found, "groups": {**found["groups"], "one": {"size": 1, "widths": []}}}
    assert curves(alone)[0] == top1 and "one" in sensitivity_page({**alone, "remark": ""})


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_the_repository")
def test_from_the_command_line_to_a_limited_cut(tmp_path: Path) -> None:
    file, page = tmp_path / "s.json", tmp_path / "s.html"
    options = ("--widths", "0.5", "--images", 64, "--input-size", 8, "--device", "cpu")
    found = answer("sensitivity", MODEL, *options, "--out", file, "--plot", page)
    assert found == json.loads(file.read_text()) and found["split"] == "val" and found["images"] == 64
    assert len(found["groups"]) == 12 and page.read_text().startswith("<!doctype html>")
    trunk = found["dense"]["value"] - found["groups"]["conv1"]["widths"][0]["value"]
    assert trunk > 1  # or it would limit nothing
    least = limits(read(file), [compress.Group(n, c["size"], ()) for n, c in found["groups"].items()], max_drop=1.0)
    setting = ("--set", f"prune.sensitivity={file}", "--set", "data.image_size=8", "--round-to", 1)
    code, text = refusal("prune", MODEL, "--target", 0.05, *setting, "--dry-run")
    assert code == 5 and "out of reach under the limits of the groups" in text
    plan = cut_once({"sensitivity": str(file), "keep": 0.6, "round_to": 1, "fold": False}, tmp_path / "run")
    assert plan["reached"] <= 0.6 and (tmp_path / "run" / "sensitivity.json").is_file()
    kept = {name: len(channels) for name, channels in plan["kept"].items()}
    assert all(kept[name] >= share * found["groups"][name]["size"] - 1e-9 for name, share in least.items())
    assert any(width < found["groups"][name]["size"] for name, width in kept.items())


def cut_once(prune: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The plan of a run that is stopped when its recovery begins."""

    def stop(event: Event) -> None:
        if event.stage == "recover":
            raise KeyboardInterrupt

    network, info, _ = load.network(Path(MODEL), None, {})
    recipe = make({"model": {"path": MODEL}, "prune": prune, "data": {"image_size": 8}, "device": "cpu"})
    with pytest.raises(KeyboardInterrupt):
        run(recipe, network, info, folder=RunFolder.create(folder, recipe.to_yaml()), on_event=stop)
    return json.loads((folder / "state" / "round-1.json").read_text())["plan"]


@pytest.mark.usefixtures("in_the_repository")
def test_images_without_labels_and_no_images(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for index in range(5):
        Image.effect_noise((12, 12), 60 + index).save(tmp_path / ("sub" if index % 2 else "") / f"{index}.png")
    options = ("--arch-arg", "num_classes=10", "--widths", "0.5", "--input-size", 8, "--device", "cpu")
    found = answer("sensitivity", MODEL, *options, "--data", tmp_path)
    assert (
        found["images"] == 5 and found["split"] is None and found["dense"]["value"] is None and found["metric"] is None
    )
    assert all(0 < w["distortion"] < 10 for curve in found["groups"].values() for w in curve["widths"])
    bare = tmp_path / "bare.safetensors"
    save_file(read_checkpoint(Path(MODEL)).tensors, bare)  # without a word on the data
    result = call("sensitivity", bare, "--arch", "resnet20", *options, "--images", 8)
    assert result.exit_code == 0 and "These are random images" in result.stderr, result.stderr
    code, text = refusal("sensitivity", MODEL, "--widths", "half")
    assert code == 2 and "give shares with commas" in text
    code, text = refusal("sensitivity", MODEL, "--out", tmp_path / "no" / "x.json")
    assert code == 2 and "there is no folder" in text
    (tmp_path / "empty").mkdir()
    code, text = refusal("sensitivity", MODEL, "--data", tmp_path / "empty")
    assert code == 3 and "holds no image file" in text
