"""`compress bench` with several runtimes, threads and batch sizes, and what a run measures beside its headline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.bench import Comparison, available
from compress.bench.machine import allowed_cpus
from compress.cli.bench import IN_A_RUN, _numbers, _threads
from tests.shell import answer, call, refusal
from tests.test_bench import write_network

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("in_the_repository")]


def test_bench_takes_a_run_and_several_runtimes(pruned_run: tuple[Path, Any]) -> None:
    found = call("bench", "--runtimes", "--json")
    active = json.loads(found.stdout)["runtimes"]
    assert next(iter(active)) == "ort-cpu" and active["ort-cpu"] is None and "what to do" in found.stderr
    names = [name for name in ("ort-cpu", "openvino") if active[name] is None]
    given = ("--runtime", ",".join(names), "--threads", "all", "--batch", "2", "--seconds", "0.1")
    made = answer("bench", pruned_run[0], *given)["comparisons"]
    wanted = [(name, len(allowed_cpus())) for name in names]
    assert [(one["conditions"]["runtime"], one["conditions"]["threads"]) for one in made] == wanted
    assert all([found["file"] for found in one["measurements"]] == ["dense.onnx", "model.onnx"] for one in made)


def test_lists_of_numbers() -> None:
    assert _threads("1,all,1") == list(dict.fromkeys([1, len(allowed_cpus())]))
    assert _numbers("--batch", "32, 8,32") == [32, 8]


def test_bench_of_networks_by_torch(pruned_run: tuple[Path, Any]) -> None:
    one = pruned_run[0] / "pruned.safetensors"
    (made,) = answer("bench", one, "--runtime", "torch-cpu", "--batch", 1, "--seconds", 0.1)["comparisons"]
    (found,) = made["measurements"]
    assert found["file"] == "pruned.safetensors" and found["size_bytes"] == one.stat().st_size
    assert found["latency"]["runtime"] == "torch-cpu" and found["latency"]["p50"] > 0
    assert found["load_ms"] > 0 and found["first_ms"] > 0 and found["peak_memory_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "there is nothing to measure: name ONNX files, checkpoints for torch, or one run folder"),
        (["a.onnx", "--runtime", "ort-cpu,tpu"], 2, "--runtime tpu is unknown; there are ort-cpu, ort-cuda, "),
        (["a.onnx", "--threads", "1,some"], 2, "--threads '1,some' is not of the form N or N,N,..."),
        (["a.onnx", "--batch", "0"], 2, "--batch '0' is not of the form N or N,N,..., each at least 1"),
        (["a.onnx", "--runtime", "torch-cpu"], 2, "--runtime torch-cpu takes checkpoints (.safetensors, .pt, "),
        (["a.onnx", "a.pt"], 2, "a.pt is for runtimes that take checkpoints (.safetensors, .pt, .pth, .th); add one"),
        (["a.onnx"], 3, "a.onnx is not a file; give the path of an .onnx file"),
    ],
)
def test_bench_refuses_in_one_line(arguments: list[str], code: int, text: str) -> None:
    found, said = refusal("bench", *arguments)
    assert found == code and text in said


def test_a_run_measures_further_batch_sizes(pruned_run: tuple[Path, Any]) -> None:
    bench = json.loads((pruned_run[0] / "bench.json").read_text())
    assert bench["conditions"]["batch"] == 1
    (more,) = bench["further"]
    assert more["conditions"]["batch"] == 4 and [one["file"] for one in more["measurements"]] == [*IN_A_RUN[:2]]
    assert Comparison.model_validate(more).speedups[0].against == "dense.onnx"


def test_a_batch_that_the_file_fixes_is_the_default(tmp_path: Path) -> None:
    file = write_network(tmp_path / "fixed.onnx", 4, shape=(2, 3, 8, 8))
    (made,) = answer("bench", file, "--seconds", 0.1)["comparisons"]
    assert made["conditions"]["batch"] == 2


@pytest.mark.skipif(available()["ort-cuda"] is None, reason="CUDA is active here")
def test_a_lacking_runtime_is_refused_before_anything_is_measured(pruned_run: tuple[Path, Any]) -> None:
    arguments = ("bench", pruned_run[0], "--runtime", "ort-cpu,ort-cuda")
    code, said = refusal(*arguments)
    assert code == 1 and "runtime ort-cuda cannot be measured here: CUDAExecutionProvider is not in the" in said
    assert "install onnxruntime-gpu" in said and "measuring" not in call(*arguments).stderr
