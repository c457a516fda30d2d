"""Every way for a command to fail: its exit code, and one line that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from compress.errors import AccuracyError, CompressError
from tests.shell import MODEL, call, copy, refusal

pytestmark = pytest.mark.usefixtures("in_the_repository")
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
        (
            [*PRUNE, "--metric", "flops"],
            "prune.metric = 'flops': input should be 'params', 'macs', 'size' or 'latency'",
        ),
        (
            [*PRUNE, "--target-ms", "2", "--metric", "macs"],
            "--target-ms is a latency in place of --target",
        ),
        ([*PRUNE, "--on", "gpu:0"], "--on 'gpu:0': the runtime 'gpu' is unknown; there are ort-cpu, ort-cuda"),
        ([*PRUNE, "--on", "ort-cpu:2"], "--on 'ort-cpu:2' is not of the form RUNTIME:threads=N:batch=N"),
        ([*PRUNE, "--set", "train.nope=1"], "the recipe has no key 'train.nope'"),
        ([*PRUNE, "--set", "nope"], "--set 'nope' is not of the form section.key=value"),
        ([*PRUNE, "--set", "train.lr=[1"], "--set 'train.lr=[1': '[1' is no YAML value"),
        ([*PRUNE, "--set", "train=3", "--set", "train.lr=1"], "--set 'train.lr=1' sets a key of train, which is 3"),
        ([*PRUNE, "--arch-arg", "nope"], "--arch-arg 'nope' is not of the form key=value"),
        ([*PRUNE, "--recipe", "absent.yaml"], "the recipe absent.yaml cannot be read"),
        (["resume", "tests"], "tests holds no run (no recipe.yaml)"),
        (["verify", "tests"], "tests holds no run (no recipe.yaml)"),
        (["report", "tests"], "tests holds no run (no recipe.yaml)"),
        (["inspect", MODEL, "--metric", "flops"], "--metric flops is unknown; there are params, macs, size"),
        (["eval", MODEL, "--split", "nope"], "--split nope is unknown; there are test, val and train"),
        (["eval", "x.onnx", "--arch", "resnet20"], "--arch is for checkpoints; x.onnx holds its network"),
        (["export", MODEL, "--out", "x.pt"], "--out x.pt must end in .onnx"),
        (["bench"], "there is nothing to measure: name ONNX files"),
        (["bench", "x.onnx", "--batch", "1,zero"], "--batch '1,zero' is not of the form N or N,N,..."),
        (["bench", "x.onnx", "--runtime", "nope"], "--runtime nope is unknown; there are ort-cpu, ort-cuda"),
    ],
)
def test_usage_errors_end_with_2(arguments: list[str], text: str) -> None:
    code, line = refusal(*arguments)
    assert code == 2
    assert line.startswith(text)


@pytest.mark.parametrize(
    "arguments", [["prune"], ["prune", MODEL, "--nope"], ["nope"], ["inspect", MODEL, "--input-size", "x"]]
)
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
    assert refusal(*arguments) == (
        2,
        "the size of the network's images is not known: give --input-size N, in pixels a side",
    )
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
        (
            PermissionError(13, "Permission denied", "/x/y"),
            1,
            "/x/y: Permission denied (run with -v for the traceback)",
        ),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "unexpected ZeroDivisionError: by (-v shows the traceback; please report it)",
        ),
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
