"""Two processes, launched by torchrun on the CPU: the same weights, scores and figures on each, and one that speaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.regularize import REGULARIZERS
from tests.shell import answer

SECONDS = 120  # for one launch; a hang fails
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# accelerate's launcher for several processes on a machine; it is the only one of its that needs no MPI on processors
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
PRUNE = [
    *("-m", "compress.cli", "prune", "models/digits_resnet20.pt", "--set", "data.image_size=8", "--device", "cpu"),
    *("--set", "bench.batches=[1]", "--set", "bench.seconds=1"),
]


def launch(root: Path, launcher: list[str], *arguments: object) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "COLUMNS": "200"}
    return subprocess.Popen(
        [*launcher, *map(str, arguments)], cwd=root, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends what it has started
        process.communicate(timeout=40)
        raise
    return process.returncode, out, err


@pytest.fixture(scope="module")
def laws(root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What tests/processes.py found on each rank."""
    out = tmp_path_factory.mktemp("laws")
    code, _, err = finish(launch(root, TORCHRUN, root / "tests" / "processes.py", out))
    assert code == 0, err
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="the system does not list threads")
def test_no_thread_of_the_group_outlives_it(laws: list[dict[str, Any]]) -> None:
    for found in laws:  # one that does may abort the process at its end
        assert "pt_gloo_runloop" in found["threads together"]
        assert "pt_gloo_runloop" not in found["threads alone"]


def test_everything_but_the_rank_is_equal_to_the_last_bit(laws: list[dict[str, Any]]) -> None:
    first, second = ({k: v for k, v in found.items() if k not in ("rank", "failure")} for found in laws)
    assert [found["rank"] for found in laws] == [0, 1]
    for key, value in first.items():
        assert second[key] == value, key


def test_every_regulariser_was_in_a_bare_loop(laws: list[dict[str, Any]]) -> None:
    assert laws[0]["loops"].keys() == laws[0]["gradients"].keys() == {*REGULARIZERS, "halo by sgd", "ffr by flow"}
    for found in laws[0]["loops"].values():
        assert len({found["scores"], found["trained"], found["cut"]}) == 3
    changes = {name: found["changes"] for name, found in laws[0]["loops"].items() if "changes" in found}
    assert changes == {"ggr": "3", "rigl": "3", "set": "3", "static-erk": "0"}


def test_the_gradient_of_a_penalty_is_the_mean_over_the_processes(laws: list[dict[str, Any]]) -> None:
    assert max(laws[0]["gradients"].values()) < 1e-12


def test_two_shares_train_as_one_whole_batch_does(laws: list[dict[str, Any]]) -> None:
    assert laws[0]["add up"].keys() == {"None", "lasso", "halo by sgd"}
    assert max(laws[0]["add up"].values()) < 1e-4  # thirty steps in float32


def test_a_resumed_phase_equals_an_unbroken_one(laws: list[dict[str, Any]]) -> None:
    assert laws[0]["resumed"] == laws[0]["whole"] and len(laws[0]["whole"]["history"]) == 3


def test_evaluation_counts_every_image_once(laws: list[dict[str, Any]]) -> None:
    judged = laws[0]["judged"]
    assert judged["images"] % 2 == 1  # or nothing could come twice
    assert judged["together"][0] == judged["alone"][0]
    assert judged["together"][1] == pytest.approx(judged["alone"][1], rel=1e-6)


def test_what_one_process_meets_stops_all(laws: list[dict[str, Any]]) -> None:
    assert all("the loss became NaN or infinite in training at epoch 1" in found["diverged"] for found in laws)
    assert [found["failure"] for found in laws] == ["as it is said there: 2"] * 2


def test_what_is_told(laws: list[dict[str, Any]]) -> None:
    assert laws[1]["told"] == {"rank": 0, "pair": [1, 2.5, None]} and laws[1]["bytes"] == "00ff"
    assert laws[1]["averaged"] == [0.5, 5.0]


def test_a_batch_is_shared_evenly_or_refused(laws: list[dict[str, Any]]) -> None:
    whole, odd, small = laws[0]["refusals"]
    assert whole == "64"
    assert odd.startswith(
        "a batch of 127 images cannot be shared by 2 processes; allowed are multiples of 2, at least 4"
    )
    assert odd.endswith("--set train.batch_size=126") and small.endswith("--set train.batch_size=4")


@pytest.mark.usefixtures("in_the_repository")
def test_interrupted_and_resumed_by_the_other_launcher(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = launch(root, TORCHRUN, *PRUNE, "--method", "cka-sr", "--target", "0.3", "--epochs", "2", "--out", out)
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and not (out / "state" / "round-1.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code != 0 and err.count("error: interrupted") == 1, err
    assert err.count("stopped; continue with: compress resume") == 1, err
    assert not (out / "report.json").exists()

    code, text, err = finish(launch(root, ACCELERATE, "-m", "compress.cli", "resume", out, "--json"))
    assert code == 0, err
    assert text.count("\n") == 1 and json.loads(text)["kept"]["params"] <= 0.3
    assert err.count("writing the report") == 1 and "Warning" not in err
    log = (out / "log.txt").read_text()
    assert log.count("compress.pipeline.sequence: report: begins") == 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["epoch"]) for line in lines] == [("round-1", 0), ("recover", 0)]
    state = torch.load(out / "state" / "recover.pt", weights_only=True)
    assert not any(name.startswith("module.") for name in state["model"])
    answer("verify", out)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--target", "0.0005"], 5, "the lowest reachable share is"),
        (["--set", "train.batch_size=33"], 2, "a batch of 33 images cannot be shared by 2 processes"),
    ],
)
def test_a_failure_is_said_once_and_ends_all(root: Path, tmp_path: Path, arguments: list[str], code: int, text: str):
    returned, out, err = finish(launch(root, TORCHRUN, *PRUNE, *arguments, "--out", tmp_path / "run", "--json"))
    assert returned != 0 and out == ""
    assert err.count("error: ") == 1 and text in err.replace("\n", " "), err
    assert err.count(f"exitcode  : {code} ") == 2, err  # torchrun's own account of the two
    assert not (tmp_path / "run").exists()
