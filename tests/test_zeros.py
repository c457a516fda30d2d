"""Whole runs at granularity weight: the zeros are counted, held, written, resumed and proved again."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress import checkpoint, verify
from compress.checkpoint import ModelInfo
from compress.errors import TargetError, UsageError
from compress.folder import RunFolder
from compress.onnx_file import read_weights
from compress.pipeline import Event, check, dry_run_weights, run
from compress.pipeline.context import open_run
from compress.pipeline.stages import STAGES
from compress.recipe import Recipe, make
from compress.regularize import SPARSE_TRAINING
from compress.report import pages
from compress.sparse import density, remaining

DYNAMIC = sorted(SPARSE_TRAINING)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 24, 1), (24, 24, 1), (24, 24, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


PARAMS = sum(p.numel() for p in network().parameters())


def recipe(method: str = "halo", **prune: Any) -> Recipe:
    part = {"method": method, "granularity": "weight", "keep": 0.1, **prune}
    train = {"epochs": 3, "batch_size": 512, "precision": "fp32", "compile": "off"}
    data, bench = {"source": "digits", "image_size": 8}, {"batches": [], "seconds": 1}
    return make(
        {"model": {"path": "mine"}, "prune": part, "train": train, "data": data, "device": "cpu", "bench": bench}
    )


def finish(folder: Path, wanted: Recipe, until: str = "") -> dict[str, Any]:
    """A run in `folder`, killed at the first event of which `until` is the text or stage."""

    def on_event(event: Event) -> None:
        done = event.progress is not None and event.progress.top1 is not None
        if until and until in (event.stage if done else event.text):
            raise KeyboardInterrupt

    made = RunFolder.open(folder) if folder.exists() else RunFolder.create(folder, wanted.to_yaml())
    return run(wanted, network(), ModelInfo(arch="mine"), folder=made, on_event=on_event)


def load(path: Path) -> nn.Module:
    model = network()
    checkpoint.load(path, model)
    return model


def nonzero(model: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in model.parameters() if p.dim() == 4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("zeros") / "run"
    return folder, finish(folder, recipe())


def test_the_target_is_met_in_the_weights_and_in_the_file(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, report = finished
    model = load(folder / "pruned.safetensors")
    assert report["pruned"]["params"] == remaining(model) == int(0.1 * PARAMS) and report["kept"]["macs"] == 1
    assert report["kept"]["params"] == remaining(model) / PARAMS
    file = {name: values for name, values in read_weights(folder / "model.onnx").items() if values.ndim == 4}
    assert sum(int((values != 0).sum()) for values in file.values()) == nonzero(model)
    assert report["density"] == {
        name.removesuffix(".weight"): {"weights": total, "nonzero": alive}
        for name, (total, alive) in density(model).items()
    }
    proof = json.loads((folder / "parity.json").read_text())["pruned"]
    assert proof["weights"]["nonzero"] == nonzero(model) + int(model[-1].weight.count_nonzero())
    assert report["kept"]["size"] < 0.4 and proof["relative"] < 1e-4
    assert checkpoint.read(folder / "pruned.safetensors").info.pruned is False  # the shapes are the architecture's


def test_the_zeros_are_those_of_the_cut(finished: tuple[Path, dict[str, Any]]) -> None:
    names = [f"state/round-{n + 1}.safetensors" for n in range(len(finished[1]["val_top1"]["rounds"]))]
    networks = [load(finished[0] / name) for name in (*names, "pruned.safetensors")]
    assert len(names) > 1  # by default a target of a tenth is reached in more than one cut
    for *earlier, cut, tuned in zip(*(network.parameters() for network in networks), strict=True):
        if cut.dim() == 4:
            assert torch.equal(cut == 0, tuned == 0) and not torch.equal(cut, tuned)
            assert all(bool((cut[early == 0] == 0).all()) for early in earlier)


def test_the_folder_is_proved_again_and_a_weight_too_many_is_found(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    def states(folder: Path) -> dict[str, str]:
        def rebuild() -> tuple[nn.Module, ModelInfo]:
            model = network()
            return model, checkpoint.load(folder / "pruned.safetensors", model)

        return {check.name: f"{check.state}: {check.detail}" for check in verify.verify(folder, rebuild)}

    found = states(finished[0])
    assert [name for name, said in found.items() if not said.startswith("ok")] == ["source checkpoint"]
    assert "params" in found["costs"]

    forged = tmp_path / "forged"
    RunFolder.create(forged, "")
    for path in finished[0].iterdir():
        if path.is_file():
            (forged / path.name).write_bytes(path.read_bytes())
    model = load(forged / "pruned.safetensors")
    info = checkpoint.read(forged / "pruned.safetensors").info
    with torch.no_grad():
        model[0].weight[model[0].weight == 0] = 1e-9
    checkpoint.save(forged / "pruned.safetensors", model, info)
    assert states(forged)["costs"].startswith("FAILED: 0 has {'weights': 648, 'nonzero': 648}")


def test_the_pages_speak_of_the_file_and_claim_no_speed(finished: tuple[Path, dict[str, Any]]) -> None:
    report = copy.deepcopy(finished[1])
    assert report["verdict"].startswith("zeros in place: the ONNX file shrinks from ")
    assert f"{report['pruned']['params']:,} of {PARAMS:,} parameters are not 0 (10.0 %)" in report["verdict"]
    report["speedup"] |= {"verdict": "not distinguishable"}
    for page in (pages.html(report), pages.card(report)):
        assert (
            "x faster" not in page and "What shrinks is the file" in page and "whole filters were removed" not in page
        )
    html = pages.html(report)
    assert "<h2>Density</h2>" in html and "<h2>Widths</h2>" not in html and "MACs that remain" not in html
    assert "halo: xi " in html and "calibrated to 10.0 % of the task loss" in html
    assert "round-1: halo: xi" in (finished[0] / "log.txt").read_text()
    report["density_log"] = [
        {"round": 1, "step": step, "layers": {"0.weight": 0.5, "3.weight": 0.1}} for step in (0, 5)
    ]
    html = pages.html(report)
    assert "Density per layer" in html and '"name":"3.weight"' in html and "<td>0.100</td>" in html


def test_killed_and_resumed_it_ends_with_the_same_weights(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for moment in ("round-1", "cut to", "recover"):
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path / "run", recipe(), until=moment)
    report = finish(tmp_path / "run", recipe())
    digests = [
        hashlib.sha256((f / "pruned.safetensors").read_bytes()).hexdigest() for f in (finished[0], tmp_path / "run")
    ]
    assert digests[0] == digests[1] and report["density"] == finished[1]["density"]


METHODS: dict[str, dict[str, Any]] = {
    "halo": {"options": {"halo": {"solver": "sgd"}}}, "lasso": {"rounds": 2}, "group-lasso": {}, "cka-sr": {},
    "growing-reg": {"score": "lamp"}, "lamp": {}, **{name: {} for name in DYNAMIC},
    "ggr": {"options": {"ggr": {"interval": 1}}},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_method_meets_the_target_and_holds_it(tmp_path: Path, method: str) -> None:
    wanted = recipe(method, **METHODS[method])
    folder = RunFolder.create(tmp_path / "run", wanted.to_yaml())
    opened = open_run(wanted, network(), ModelInfo(arch="mine"), folder, "", lambda event: None)
    for name in ("prepare", "sparse", "recover"):
        folder.write(f"state/{name}.json", STAGES[name](opened))
    rounds = folder.read("state/sparse.json")["rounds"]
    assert rounds[-1]["plan"]["params"] == int(0.1 * PARAMS) and bool(rounds[0]["density_log"]) is (method in DYNAMIC)
    model = load(folder.path / "pruned.safetensors")
    assert remaining(model) == int(0.1 * PARAMS)
    if method in DYNAMIC:  # its own last mask, or that less the weights that the guards had added
        trained = load(folder.path / "state/sparse.safetensors")
        for before, after in zip(trained.parameters(), model.parameters(), strict=True):
            assert before.dim() < 4 or torch.equal(before == 0, after == 0)


def test_what_cannot_work_is_refused() -> None:
    model = network()
    for wanted, text in (
        (recipe(metric="macs"), "--metric macs with --granularity weight: zeros in place change neither"),
        (recipe(metric="size"), "use --metric params"),
        (recipe(redraw=True), "would fill the zeros again; use --granularity filter"),
        (recipe("fpgm"), "'fpgm' does not rank single weights"),
        (recipe(score="taylor"), "'taylor' does not rank single weights"),
    ):
        with pytest.raises(UsageError, match=text):
            dry_run_weights(wanted, model)
    with pytest.raises(TargetError, match="the lowest reachable share is"):
        dry_run_weights(recipe(keep=0.01), model)
    for method in DYNAMIC:
        with pytest.raises(UsageError, match=f"prune.rounds = 2 with {method}"):
            check(recipe(method, rounds=2))
        with pytest.raises(UsageError, match=f"prune.rounds = 2 with {method}"):
            check(recipe("l1", rounds=2, regularize=(method,)))
    found, score = dry_run_weights(recipe(), model)
    assert found.params == int(0.1 * PARAMS) and score == "l1" and remaining(model) == PARAMS
