"""The whole run: what it leaves, and that a kill at any moment changes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.errors import RunFolderError, TargetError, UsageError
from compress.folder import RunFolder
from compress.pipeline import epochs, run
from compress.recipe import make

ARGUMENTS = [
    "--method",
    "halo",
    "--target",
    "0.2",
    "--epochs",
    "5",
    "--set",
    "data.image_size=8",
    "--set",
    "prune.rounds=2",
    "-q",
]
# The moments of the kills: each file appears in another stage, while the next piece of work is under way.
MOMENTS = ["state/round-1.pt", "state/round-2.pt", "state/recover.pt", "state/recover.json", "state/export.json"]


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "compress.cli", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)


def finish(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_killed_in_every_stage_and_resumed_it_ends_with_the_same_weights(root: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(root, "prune", "models/digits_resnet20.pt", *ARGUMENTS, "--out", str(whole)))
    process = start(root, "prune", "models/digits_resnet20.pt", *ARGUMENTS, "--out", str(broken))
    killed = 0
    for moment in MOMENTS:
        deadline = time.monotonic() + 120
        while process.poll() is None and not (broken / moment).exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.communicate()
        assert (broken / moment).exists()
        process = start(root, "resume", str(broken), "-q")
    finish(process)
    assert killed == len(MOMENTS)
    assert sha256(whole / "pruned.safetensors") == sha256(broken / "pruned.safetensors")
    first, second = (json.loads((f / "report.json").read_text()) for f in (whole, broken))
    for key in ("kept", "widths", "parity"):
        assert first[key] == second[key]
    assert first["pruned"]["top1"] == second["pruned"]["top1"]
    lines = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert [(e["phase"], e["epoch"]) for e in lines] == [(e["phase"], e["epoch"]) for e in first["history"]]


def test_how_epochs_are_spent() -> None:
    def spent(**values: object) -> tuple[list[int], int]:
        train = {k: values.pop(k) for k in ("epochs", "sparse_share") if k in values}
        return epochs(make({"model": {"path": "x"}, "prune": values, "train": train}), 100)

    assert spent(method="halo", epochs=3) == ([1], 2)
    assert spent(method="halo", epochs=10, sparse_share=0.4) == ([4], 6)
    assert spent(method="halo", epochs=10, rounds=3) == ([2, 1, 1], 6)
    assert spent(method="l2", epochs=3) == ([0], 3)  # nothing to train before the cut
    assert spent(method="l2", epochs=4, regularize=("ffr",)) == ([2], 2)
    assert sum(spent(method="halo")[0]) + spent(method="halo")[1] >= 6
    with pytest.raises(UsageError, match=r"train.epochs = 1 is too few: halo needs an epoch for each of 1 rounds"):
        spent(method="halo", epochs=1)
    with pytest.raises(UsageError, match="each of 5 rounds"):
        spent(method="halo", epochs=5, rounds=5)


def test_a_target_out_of_reach_is_refused_before_any_training(tmp_path: Path, root: Path) -> None:
    from compress import checkpoint
    from compress.models import ARCHS

    read = checkpoint.read(root / "models" / "digits_resnet20.pt")
    model = ARCHS["resnet20"](**read.info.arch_kwargs)
    checkpoint.load_into(model, read)
    recipe = make({"model": {"path": "x"}, "prune": {"keep": 0.0005}, "data": {"image_size": 8}})
    with pytest.raises(TargetError, match="lowest reachable share"):
        run(recipe, model, read.info, folder=RunFolder.create(tmp_path / "run", recipe.to_yaml()))
    assert not list((tmp_path / "run" / "state").glob("round*"))


class TestFolder:
    def test_never_overwritten(self, tmp_path: Path) -> None:
        RunFolder.create(tmp_path / "a", "x: 1\n")
        with pytest.raises(RunFolderError, match="exists already; continue it with `compress resume`"):
            RunFolder.create(tmp_path / "a", "x: 2\n")
        RunFolder.create(tmp_path / "a", "x: 3\n", force=True)
        assert (tmp_path / "a" / "recipe.yaml").read_text() == "x: 3\n"

    def test_force_deletes_runs_only(self, tmp_path: Path) -> None:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        with pytest.raises(RunFolderError, match="exists already; choose another --out"):
            RunFolder.create(tmp_path / "mine", "", force=True)
        assert (tmp_path / "mine" / "thesis.tex").exists()

    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        folder = RunFolder.create(tmp_path / "a", "")
        with (
            folder.lock(),
            pytest.raises(RunFolderError, match="another process is working in"),
            RunFolder.open(tmp_path / "a").lock(),
        ):
            pass
        with folder.lock():
            pass

    def test_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunFolderError, match=r"holds no run \(no recipe.yaml\)"):
            RunFolder.open(tmp_path)


class TestRecipe:
    def test_round_trip_and_overrides(self) -> None:
        import yaml

        recipe = make({"model": {"path": "m.pt"}}, ["train.lr=0.01", "prune.round_to=auto", "seed=7"])
        assert recipe.train.lr == 0.01 and recipe.seed == 7
        assert make(yaml.safe_load(recipe.to_yaml())) == recipe

    @pytest.mark.parametrize(
        ("values", "overrides", "text"),
        [
            (
                {"model": {"path": "m"}, "prune": {"keep": 1.5}},
                [],
                r"prune.keep = 1.5: input should be less than or equal to 1",
            ),
            ({"model": {"path": "m"}, "prune": {"keep": 0}}, [], r"prune.keep = 0: input should be greater than 0"),
            ({"model": {"path": "m"}}, ["train.speed=3"], "the recipe has no key 'train.speed'"),
            ({"model": {"path": "m"}}, ["train.lr"], "--set 'train.lr' is not of the form section.key=value"),
            (
                {"model": {"path": "m"}, "prune": {"metric": "flops"}},
                [],
                "prune.metric = 'flops': input should be 'params', 'macs' or 'size'",
            ),
        ],
    )
    def test_refusals(self, values, overrides, text: str) -> None:
        with pytest.raises(UsageError, match=text):
            make(values, overrides)
