"""The command line as people and programs meet it: every verb with its JSON, and what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress import checkpoint
from compress.cli.app import COMMANDS
from tests.browser import visit
from tests.shell import MODEL, answer, call, copy, refusal

pytestmark = pytest.mark.usefixtures("in_the_repository")
PYTHON = [sys.executable, "-m", "compress.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


# --- help and start-up ------------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_help_is_quick() -> None:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([*PYTHON, "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 1.0  # half of that on a quiet machine
    assert all(verb in done.stdout for verb in COMMANDS)
    assert done.stderr == ""


def test_the_command_table_needs_no_heavy_package() -> None:
    heavy = "torch", "onnx", "onnxruntime", "pydantic", "numpy", "datasets", "torch_pruning"
    code = f"import sys, compress.cli.app; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help(verb: str) -> None:
    result = call(verb, "--help")
    assert result.exit_code == 0
    assert f"Usage: compress {verb}" in result.stdout or f"{verb} [OPTIONS]" in result.stdout


def test_a_reader_that_leaves_is_no_crash() -> None:
    command = f"{sys.executable} -m compress.cli methods --json -q | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1)
    assert done.stderr == ""


# --- prune, resume ----------------------------------------------------------------------------------------------------


def test_prune_end_to_end(pruned_run: tuple[Path, Any]) -> None:
    folder, result = pruned_run
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    document = json.loads(result.stdout)
    assert document == json.loads((folder / "report.json").read_text())
    assert document["kept"]["params"] <= 0.3
    assert {"p50", "p90", "p99", "batch", "threads", "runtime"} <= document["pruned"]["latency_ms"].keys()
    for key in ("onnx", "checkpoint"):
        assert Path(document[key]).is_file()
    assert "halo, target 0.3 of the params" in result.stderr
    assert "\x1b" not in result.stderr  # neither bars nor colours where there is no terminal
    assert re.search(r"recover epoch 1/1: loss", result.stderr)


def test_resume_of_a_finished_run_answers_at_once(pruned_run: tuple[Path, Any]) -> None:
    folder, first = pruned_run
    assert answer("resume", folder) == json.loads(first.stdout)
    assert answer("prune", MODEL, "--out", folder, "--resume") == json.loads(first.stdout)
    code, text = refusal("prune", MODEL, "--out", folder, "--resume", "--dry-run")
    assert code == 2 and text.endswith("is begun: leave out --resume")


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = [
        "--method",
        "l1",
        "--epochs",
        "8",
        "--set",
        "data.image_size=8",
        "--out",
        str(folder),
        "--set",
        "bench.seconds=1",
        "--device",
        "cpu",
    ]
    command = [*PYTHON, "prune", MODEL, *options]

    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ONE_THREAD) as process:
        assert process.stderr is not None
        assert any("epoch 1/8" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert f"stopped; continue with: compress resume {folder}" in rest
    assert rest.endswith("error: interrupted\n")
    assert answer("resume", folder)["method"] == "l1"


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(tmp_path)
    document = answer("prune", root / MODEL, "--method", "l2", "--target", "0.5", "--dry-run")
    assert document["plan"]["reached"] <= 0.5
    assert "linear" in document["frozen"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_goes_on_with_its_own_images_alone_and_past_half_a_line(
    pruned_run: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(pruned_run[0], tmp_path / "r"))
    (folder / "state" / "report.json").unlink()
    (folder / "state" / "recover.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "rec')
    assert answer("resume", folder)["pruned"]["top1"] == json.loads(pruned_run[1].stdout)["pruned"]["top1"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["phase"] in ("round-1", "recover") for line in lines)
    (folder / "state" / "report.json").unlink()
    (folder / "state" / "data.json").write_text('{"fingerprint": "another"}')
    code, text = refusal("resume", folder)
    assert code == 3 and "digits holds other images than when the run was begun; bring them back" in text


def test_a_share_asked_for_stands_above_the_milliseconds_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("prune: {target_ms: 0.1, metric: params}")
    asked = ("prune", MODEL, "--recipe", tmp_path / "r.yaml", "--target", "0.5", "--method", "l2", "--dry-run")
    plan = answer(*asked)["plan"]
    assert plan["keep"] == 0.5 and plan["metric"] == "params"


# --- the other verbs --------------------------------------------------------------------------------------------------


def test_inspect_a_checkpoint(root: Path) -> None:
    document = answer("inspect", MODEL)
    assert document["arch"] == "resnet20"
    assert document["params"] == sum(layer["params"] for layer in document["layers"]) == 269_722
    assert document["macs"] == sum(layer["macs"] for layer in document["layers"])
    assert {group["name"] for group in document["groups"] if group["frozen"]} == {"linear"} == document["frozen"].keys()
    assert 0 < document["lowest"]["params"] < document["lowest_in_blocks"]["params"] < 1
    assert document["uncounted"] == []
    assert document["seconds"].keys() == {"load", "trace"}


def test_inspect_tells_the_truth_about_what_is_reachable() -> None:
    lowest = answer("inspect", MODEL)["lowest"]["params"]
    common = ["prune", MODEL, "--method", "l1", "--dry-run", "--round-to", "1"]
    assert answer(*common, "--target", lowest * 1.0001)["plan"]["reached"] == pytest.approx(lowest, rel=1e-3)
    assert call(*common, "--target", lowest * 0.999).exit_code == 5


def test_inspect_a_pruned_network_at_another_size(pruned_run: tuple[Path, Any]) -> None:
    document = answer("inspect", pruned_run[0] / "pruned.safetensors", "--input-size", "16", "--metric", "macs")
    report = json.loads(pruned_run[1].stdout)
    assert document["pruned"] and document["input_size"] == [3, 16, 16]
    assert document["params"] == report["pruned"]["params"]
    assert document["macs"] > 3 * report["pruned"]["macs"]  # four times the places


def test_eval_checkpoint_and_onnx_agree(pruned_run: tuple[Path, Any]) -> None:
    folder, result = pruned_run
    torch_says, onnx_says = answer("eval", folder / "pruned.safetensors"), answer("eval", folder / "model.onnx")
    assert torch_says["top1"] == onnx_says["top1"] == json.loads(result.stdout)["pruned"]["top1"]
    assert torch_says["loss"] == pytest.approx(onnx_says["loss"], rel=1e-4)
    assert torch_says["split"] == onnx_says["split"] == "test"
    assert torch_says["images"] == onnx_says["images"] == 359
    assert (torch_says["by"], onnx_says["by"]) == ("torch", "ONNX Runtime")


def test_eval_of_another_split_is_said() -> None:
    document = answer("eval", MODEL, "--split", "val")
    assert (document["split"], document["images"], document["data"]) == ("val", 143, "digits")
    assert "10 % of train held out" in call("eval", MODEL, "--split", "val").stderr


def test_eval_fills_up_the_last_batch_of_a_fixed_file(pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
    fixed = onnx.load(pruned_run[0] / "model.onnx")
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 100
    onnx.save(fixed, tmp_path / "fixed.onnx")
    assert answer("eval", tmp_path / "fixed.onnx")["top1"] == answer("eval", pruned_run[0] / "model.onnx")["top1"]


def test_export_with_real_images(pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.onnx"
    document = answer("export", pruned_run[0] / "pruned.safetensors", "--out", out)
    assert document["inputs"] == "images of digits"
    assert document["proof"]["relative"] < 1e-4
    assert document["size_bytes"] == out.stat().st_size
    assert answer("eval", out)["top1"] == json.loads(pruned_run[1].stdout)["pruned"]["top1"]


def test_export_without_data_says_that_it_was_noise(tmp_path: Path, shared: Path) -> None:
    checkpoint = shared / "checkpoints" / "resnet20-12fca82f.th"
    document = answer("export", checkpoint, "--arch", "resnet20", "--out", tmp_path / "model.onnx")
    assert document["inputs"].startswith("noise")
    assert document["params"] == 269_722
    code, text = refusal("eval", tmp_path / "model.onnx")
    assert code == 3 and "names no data set: give --data" in text


def test_bench_compares_with_the_first(pruned_run: tuple[Path, Any]) -> None:
    files = [pruned_run[0] / name for name in ("dense.onnx", "model.onnx")]
    first, second = answer("bench", *files, "--batch", "1,8", "--seconds", "0.2")["comparisons"]
    assert [found["conditions"]["batch"] for found in (first, second)] == [1, 8]
    assert [found["file"] for found in first["measurements"]] == ["dense.onnx", "model.onnx"]
    assert first["speedups"][0]["against"] == "dense.onnx"
    assert first["measurements"][1]["size_bytes"] == files[1].stat().st_size
    shown = call("bench", files[0], "--batch", "1", "--seconds", "0.2").stderr
    if "ort-cuda" in first["conditions"]["unavailable"]:
        assert "not available here: ort-cuda: " in shown


def test_report_is_written_again_where_the_folder_is_now(pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
    moved = copy(pruned_run[0], tmp_path / "moved")
    (moved / "report.html").unlink(missing_ok=True)
    document = answer("report", moved)
    assert document["onnx"] == str(moved / "model.onnx")
    assert json.loads((moved / "report.json").read_text()) == document
    assert (moved / "report.html").is_file() and (moved / "README.md").is_file()


def test_train_reads_images_with_the_channels_of_the_network(tmp_path: Path) -> None:
    out = tmp_path / "grey.safetensors"
    grey = ("--arch", "resnet20", "--arch-arg", "in_channels=1", "--data", "digits", "--image-size", 8)
    trained = answer("train", *grey, "--epochs", 1, "--device", "cpu", "--out", out)
    info = checkpoint.read(out).info
    assert info.input_size == (1, 8, 8) and info.arch_kwargs == {"num_classes": 10, "in_channels": 1}
    assert answer("eval", out, "--device", "cpu")["top1"] == pytest.approx(trained["top1"], abs=0.6)  # two images
    onwards = answer("train", *grey, "--init", out, "--epochs", 1, "--device", "cpu", "--out", tmp_path / "again.pt")
    assert onwards["top1"] > trained["top1"]


def test_methods_are_those_of_the_tables() -> None:
    from compress.regularize import REGULARIZERS
    from compress.scores import SCORES

    document = answer("methods")
    assert document["regularizers"].keys() == REGULARIZERS.keys()
    assert document["scores"].keys() == SCORES.keys()
    assert all(line.endswith(".") for table in document.values() for line in table.values())


def test_the_report_of_a_run_in_a_real_browser(pruned_run: tuple[Path, Any]) -> None:
    path = pruned_run[0] / "report.html"
    assert path.stat().st_size < 5_000_000
    with visit(path) as seen:
        light = seen.figures()
        names = ["latency-0", "latency-1", "widths", "accuracy", "loss", "lambda"]
        assert [figure["name"] for figure in light] == names
        dark, phone = seen.figures(is_dark=True), seen.figures(width=390)
        for figure in (*light, *dark, *phone):
            assert figure["isDrawn"] and figure["traces"] >= figure["wanted"] > 0, figure
        assert {figure["colour"] for figure in light}.isdisjoint(figure["colour"] for figure in dark)
        assert max(figure["right"] for figure in phone) <= 390 and seen.overhang() <= 0
        assert seen.complaints == [] and seen.requests == []


def test_verify_passes_in_another_place(pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
    document = answer("verify", copy(pruned_run[0], tmp_path / "moved"))
    assert document["ok"] and document["failed"] == 0
    assert {check["name"] for check in document["checks"] if check["state"] == "ok"} >= {
        "ONNX == torch",
        "top-1",
        "costs",
    }
    assert not (tmp_path / "moved" / "state").exists()  # nothing was written


# --- streams ----------------------------------------------------------------------------------------------------------


def test_without_json_stdout_is_empty_and_quiet_is_quiet() -> None:
    loud, quiet = call("methods"), call("methods", "-q")
    assert loud.stdout == quiet.stdout == quiet.stderr == ""
    assert "halo" in loud.stderr


def test_verbose_adds_the_traceback() -> None:
    assert "Traceback" not in call("inspect", "absent.pt").stderr
    assert "Traceback" in call("inspect", "absent.pt", "-v").stderr
