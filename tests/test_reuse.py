"""One training towards sparsity, several runs: it ends as if each had trained itself, and nothing else is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from compress.checkpoint import ModelInfo
from compress.errors import UsageError
from compress.folder import RunFolder
from compress.pipeline import Event, run, serves
from compress.pipeline.reuse import difference
from compress.recipe import Recipe, make
from tests import nets
from tests.shell import MODEL, refusal

INFO = ModelInfo(arch="net", input_size=(3, 8, 8), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def recipe_of(*, seed: int = 0, lr: float = 0.05, **prune: object) -> Recipe:
    return make(
        {
            "model": {"path": "x"},
            "data": {"source": "digits", "image_size": 8},
            "prune": {"method": "halo", "round_to": 1, **prune},
            "train": {"epochs": 3, "compile": "off", "lr": lr},
            "device": "cpu",
            "seed": seed,
        }
    )


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return nets.residual().eval()


def begin(place: Path, recipe: Recipe) -> RunFolder:
    return RunFolder.create(place, recipe.to_yaml())


@pytest.fixture(scope="module")
def first(dense: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has trained towards sparsity, and cut to half."""
    place = tmp_path_factory.mktemp("reuse") / "first"
    run(recipe_of(), dense, INFO, folder=begin(place, recipe_of()), source_sha256="0", until="sparse")
    return place


@pytest.mark.parametrize("change", [{"keep": 0.2}, {"keep": 0.3, "score": "l1", "fold": False, "metric": "macs"}])
def test_it_ends_as_if_it_had_trained_itself(
    change: dict[str, object], first: Path, dense: nn.Module, tmp_path: Path
) -> None:
    recipe = recipe_of(**change)
    heard: dict[str, list[Event]] = {"alone": [], "both": []}
    given = {"source_sha256": "0", "until": "recover"}
    alone = run(recipe, dense, INFO, folder=begin(tmp_path / "alone", recipe), on_event=heard["alone"].append, **given)
    both = run(
        recipe,
        dense,
        INFO,
        folder=begin(tmp_path / "both", recipe),
        on_event=heard["both"].append,
        reuse=first,
        **given,
    )
    for name in ("state/sparse.safetensors", "pruned.safetensors"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "both" / name).read_bytes()
    assert both["val_top1"] == alone["val_top1"]
    rounds = [json.loads((tmp_path / name / "state/round-1.json").read_text()) for name in heard]
    for key in ("plan", "strengths", "lambda_log", "regularizers", "val_top1"):
        assert rounds[0][key] == rounds[1][key]
    trained = [sum(e.stage == "round-1" and e.progress is not None for e in events) for events in heard.values()]
    assert trained[0] > 0 and trained[1] == 0
    assert f"the training towards sparsity is that of {first}" in [event.text for event in heard["both"]]
    told = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in heard]
    epochs = [[(json.loads(line)["phase"], json.loads(line)["loss"]) for line in lines] for lines in told]
    assert epochs[0] == epochs[1] and epochs[1][0][0] == "round-1"  # what was taken over is part of the run


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 0.01}, r"with train.lr = 0.05, not 0.01; leave out --reuse"),
        ({"seed": 1}, "with seed = 0, not 1"),
        ({"method": "ffr"}, "with prune.method = 'halo', not 'ffr'"),
        ({"regularize": ("lasso",)}, r"with prune.regularize = \(\), not \('lasso',\)"),
    ],
)
def test_other_training_is_refused_before_any(
    change: dict[str, object], text: str, first: Path, dense: nn.Module, tmp_path: Path
) -> None:
    recipe = recipe_of(keep=0.2, **change)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=text):
        run(recipe, dense, INFO, folder=begin(tmp_path / "run", recipe), source_sha256="0", reuse=first)
    assert not (tmp_path / "run" / "state" / "prepare.json").exists()


@pytest.mark.parametrize(
    ("file", "key", "text"),
    [
        ("env.json", "source_sha256", "another checkpoint"),
        ("state/data.json", "fingerprint", "other images"),
        ("state/round-1.json", "", "it has not come so far"),
        ("state/round-1.pt", "", "or its method trains nothing before the cut"),
    ],
)
def test_what_the_other_run_has_not_done_is_not_taken(
    file: str, key: str, text: str, first: Path, dense: nn.Module, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(first, tmp_path / "other"))
    assert serves(other, keep=0.2)
    if key:
        (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), key: "another"}))
    else:
        (other / file).unlink()
        assert not serves(other, keep=0.2)
    recipe = recipe_of(keep=0.2)
    with pytest.raises(UsageError, match=text):
        run(recipe, dense, INFO, folder=begin(tmp_path / "run", recipe), source_sha256="0", reuse=other)


def test_what_comes_after_the_cut_may_differ() -> None:
    for later in ({"keep": 0.1}, {"score": "l2"}, {"round_to": 8}, {"fold": False}, {"metric": "macs"}):
        assert difference(recipe_of(), recipe_of(**later)) == ""  # type: ignore[arg-type]
    assert difference(recipe_of(), recipe_of(penalty_share=1.0)) == "prune.penalty_share = 1.0, not 0.1"
    assert difference(recipe_of(options={"halo": {"xi": 1e-6}}), recipe_of()) != ""
    for name in ("ggr", "rigl", "set", "static-erk"):  # the density that they train at is the target's
        given = {"method": name, "score": "l2"}
        assert difference(recipe_of(**given), recipe_of(**given, keep=0.1)) == "prune.keep = 0.1, not 0.5"
        assert difference(recipe_of(regularize=(name,)), recipe_of(regularize=(name,), keep=0.1)) != ""
        assert difference(recipe_of(**given), recipe_of(**{**given, "score": "l1"})) == ""


def test_the_command_passes_it_on(first: Path, tmp_path: Path, in_the_repository: None) -> None:
    given = ("prune", MODEL, "--method", "halo", "--out", tmp_path / "out")
    for options, text in (
        (("--target", "0.2", "--reuse", tmp_path / "nowhere"), f"{tmp_path / 'nowhere'} holds no run"),
        (("--max-drop", "1", "--reuse", first), "the trials of a search share their sparse training already"),
        (("--target", "0.2", "--reuse", first), f"the run in {first} was trained towards sparsity with "),
    ):
        code, said = refusal(*given, *options)
        assert code == 2 and text in said and not (tmp_path / "out").exists()
