"""The command line as people and programs meet it: verbs, streams, exit codes, error texts."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from compress.cli.app import COMMANDS, app
from compress.errors import AccuracyError, CompressError

MODEL = "models/digits_resnet20.pt"
PYTHON = [sys.executable, "-m", "compress.cli"]
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def in_the_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run where the bundled checkpoint is; the logging they set up is undone."""
    monkeypatch.chdir(root)
    handlers, level = logging.root.handlers, logging.root.level
    yield
    logging.captureWarnings(False)
    logging.root.handlers, logging.root.level = handlers, level


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    """The JSON document of a command that succeeds; stdout holds nothing else."""
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def refusal(*arguments: object) -> tuple[int, str]:
    """The exit code and the one line of a command that fails."""
    result = call(*arguments)
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0]), result.stderr
    return result.exit_code, lines[0].removeprefix("error: ")


# --- help and start-up ------------------------------------------------------------------------------------------------


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


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--method", "l1", "--epochs", "60", "--set", "data.image_size=8", "--out", str(folder), "--device", "cpu"]
    process = subprocess.Popen([*PYTHON, "prune", MODEL, *options], stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 1/60" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read()
    assert process.wait() == 130
    assert f"stopped; continue with: compress resume {folder}" in rest
    assert rest.endswith("error: interrupted\n")
    shorten = folder / "state" / "prepare.json"  # so that the test need not wait for 60 epochs
    prepared = json.loads(shorten.read_text())
    shorten.write_text(json.dumps(prepared | {"epochs": {**prepared["epochs"], "recover": 2}}))
    assert answer("resume", folder)["method"] == "l1"


def test_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(tmp_path)
    document = answer("prune", root / MODEL, "--method", "l2", "--target", "0.5", "--dry-run")
    assert document["plan"]["reached"] <= 0.5
    assert "linear" in document["frozen"]
    assert list(tmp_path.iterdir()) == []


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
    shown = call("bench", files[0], "--seconds", "0.2").stderr
    if "ort-cuda" in first["conditions"]["unavailable"]:
        assert "not available here: ort-cuda: " in shown


def test_report_is_written_again_where_the_folder_is_now(pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
    moved = copy(pruned_run[0], tmp_path / "moved")
    (moved / "report.html").unlink(missing_ok=True)
    document = answer("report", moved)
    assert document["onnx"] == str(moved / "model.onnx")
    assert json.loads((moved / "report.json").read_text()) == document
    assert (moved / "report.html").is_file() and (moved / "README.md").is_file()


def test_methods_are_those_of_the_tables() -> None:
    from compress.regularize import REGULARIZERS
    from compress.scores import SCORES

    document = answer("methods")
    assert document["regularizers"].keys() == REGULARIZERS.keys()
    assert document["scores"].keys() == SCORES.keys()
    assert all(line.endswith(".") for table in document.values() for line in table.values())


def test_verify_passes_in_another_place(pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
    document = answer("verify", copy(pruned_run[0], tmp_path / "moved"))
    assert document["ok"] and document["failed"] == 0
    assert {check["name"] for check in document["checks"] if check["state"] == "ok"} >= {"ONNX == torch", "top-1", "costs"}
    assert not (tmp_path / "moved" / "state").exists()  # nothing was written


def copy(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("state")))


# --- streams ----------------------------------------------------------------------------------------------------------


def test_without_json_stdout_is_empty_and_quiet_is_quiet() -> None:
    loud, quiet = call("methods"), call("methods", "-q")
    assert loud.stdout == quiet.stdout == quiet.stderr == ""
    assert "halo" in loud.stderr


def test_verbose_adds_the_traceback() -> None:
    assert "Traceback" not in call("inspect", "absent.pt").stderr
    assert "Traceback" in call("inspect", "absent.pt", "-v").stderr


# --- exit codes and error texts ---------------------------------------------------------------------------------------

PRUNE = ["prune", MODEL, "--dry-run"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([*PRUNE, "--method", "nope"], "--method nope is unknown; there are halo, "),
        ([*PRUNE, "--score", "nope"], "--score nope is unknown; there are l1, "),
        ([*PRUNE, "--regularize", "nope"], "--regularize nope is unknown; there are halo, "),
        ([*PRUNE, "--target", "0"], "prune.keep = 0.0: input should be greater than 0"),
        ([*PRUNE, "--target", "1.5"], "prune.keep = 1.5: input should be less than or equal to 1"),
        ([*PRUNE, "--round-to", "foo"], "prune.round_to = 'foo': input should be a valid integer"),
        ([*PRUNE, "--round-to", "0"], "prune.round_to = 0: input should be greater than or equal to 1"),
        ([*PRUNE, "--metric", "flops"], "prune.metric = 'flops': input should be 'params', 'macs' or 'size'"),
        ([*PRUNE, "--set", "train.nope=1"], "the recipe has no key 'train.nope'"),
        ([*PRUNE, "--set", "nope"], "--set 'nope' is not of the form section.key=value"),
        ([*PRUNE, "--arch-arg", "nope"], "--arch-arg 'nope' is not of the form key=value"),
        ([*PRUNE, "--recipe", "absent.yaml"], "the recipe absent.yaml cannot be read"),
        (["resume", "tests"], "tests holds no run (no recipe.yaml)"),
        (["verify", "tests"], "tests holds no run (no recipe.yaml)"),
        (["report", "tests"], "tests holds no run (no recipe.yaml)"),
        (["inspect", MODEL, "--metric", "flops"], "--metric flops is unknown; there are params, macs, size"),
        (["eval", MODEL, "--split", "nope"], "--split nope is unknown; there are test, val and train"),
        (["eval", "x.onnx", "--arch", "resnet20"], "--arch is for checkpoints; x.onnx holds its network"),
        (["export", MODEL, "--out", "x.pt"], "--out x.pt must end in .onnx"),
        (["bench", "x.onnx", "--batch", "1,zero"], "--batch '1,zero' is not of the form N or N,N,..."),
        (["bench", "x.onnx", "--runtime", "nope"], "--runtime nope is unknown; there are ort-cpu, ort-cuda"),
    ],
)
def test_usage_errors_end_with_2(arguments: list[str], text: str) -> None:
    code, line = refusal(*arguments)
    assert code == 2
    assert line.startswith(text)


@pytest.mark.parametrize("arguments", [["prune"], ["prune", MODEL, "--nope"], ["nope"], ["bench"], ["inspect", MODEL, "--input-size", "x"]])
def test_what_typer_refuses_ends_with_2(arguments: list[str]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["inspect", "absent.pt"], "absent.pt does not exist: check the path"),
        (["prune", "pyproject.toml"], "is truncated, damaged or no PyTorch checkpoint"),
        (["prune", MODEL, "--arch", "resnet56", "--dry-run"], "does not fit the network: 180 names"),
        (["prune", MODEL, "--arch", "resnet21", "--dry-run"], "--arch 'resnet21' is unknown (did you mean resnet"),
        (["inspect", "x.onnx"], "x.onnx is an ONNX file: inspect the checkpoint it was made from"),
        (["eval", MODEL, "--data", "absent/folder"], "data 'absent/folder' does not exist"),
        (["eval", "absent.onnx"], "absent.onnx is not a file"),
        (["bench", "pyproject.toml"], "pyproject.toml is not an ONNX file that ONNX Runtime can load"),
    ],
)
def test_what_cannot_be_loaded_ends_with_3(arguments: list[str], text: str) -> None:
    code, line = refusal(*arguments)
    assert code == 3
    assert text in line


def test_a_network_that_cannot_be_pruned_ends_with_4(tmp_path: Path) -> None:
    (tmp_path / "single.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))\n"
    )
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).state_dict(), tmp_path / "single.pt")
    arguments = ["inspect", tmp_path / "single.pt", "--arch", f"{tmp_path / 'single.py'}:build"]
    assert refusal(*arguments) == (2, "the size of the network's images is not known: give --input-size N, in pixels a side")
    code, line = refusal(*arguments, "--input-size", "4")
    assert code == 4
    assert line.startswith("no channel of this network can be removed (1: ")


def test_a_target_out_of_reach_ends_with_5_and_names_the_lowest() -> None:
    code, line = refusal("prune", MODEL, "--method", "l1", "--target", "0.0001", "--dry-run")
    assert code == 5
    assert "the target 0.0001 of the params is out of reach; the lowest reachable share is 0.0009" in line


def test_a_changed_onnx_file_ends_with_6(pruned_run: tuple[Path, Any], tmp_path: Path) -> None:
    moved = copy(pruned_run[0], tmp_path / "moved")
    changed = onnx.load(moved / "model.onnx")
    bias = next(tensor for tensor in changed.graph.initializer if list(tensor.dims) == [10])
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.5, bias.name))
    onnx.save(changed, moved / "model.onnx")
    result = call("verify", moved, "--json")
    assert result.exit_code == 6
    states = {check["name"]: check["state"] for check in json.loads(result.stdout)["checks"]}
    assert states["model.onnx"] == states["ONNX == torch"] == "FAILED"
    assert f"error: {moved} fails 2 checks: model.onnx: sha256 is " in result.stderr.replace("\n", " ")


def test_a_command_on_an_existing_file_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept.onnx").write_text("precious")
    code, line = refusal("export", MODEL, "--out", tmp_path / "kept.onnx")
    assert code == 2 and line.endswith("exists already; choose another --out or give --force")
    assert (tmp_path / "kept.onnx").read_text() == "precious"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CompressError("one line"), 1, "one line"),
        (AccuracyError("too low"), 7, "too low"),
        (PermissionError(13, "Permission denied", "/x/y"), 1, "/x/y: Permission denied (run with -v for the traceback)"),
        (ZeroDivisionError("by\nzero"), 1, "unexpected ZeroDivisionError: by (-v shows the traceback; please report it)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_error_has_its_exit_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.cli.app import guarded

    def command() -> None:
        raise error

    with pytest.raises(SystemExit) as raised:
        guarded(command)()
    assert raised.value.code == code
    assert capsys.readouterr().err == f"error: {text}\n"
