"""Latency of ONNX files: the statistics on known noise, the measuring on tiny real networks."""

from __future__ import annotations

import gc
import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.bench import Comparison, available, benchmark, identity, machine
from compress.bench.fresh import measure_fresh
from compress.bench.protocol import sized
from compress.bench.session import input_signature, open_session
from compress.bench.speedup import RESOLUTION, compare
from compress.errors import LoadError, MeasureError

pytestmark = pytest.mark.alone
Shape = tuple[int | str, ...]
FLOAT = TensorProto.FLOAT


def write_network(path: Path, width: int, *, shape: Shape = ("batch", 3, 16, 16), dtype: int = FLOAT) -> Path:
    """Two convolutions of `width` filters and a mean over the image."""
    generator = np.random.default_rng(0)
    weights = [generator.standard_normal((width, inputs, 3, 3)).astype("float32") / 9 for inputs in (3, width)]
    nodes = [
        helper.make_node("Cast", ["images"], ["x0"], to=TensorProto.FLOAT),
        *(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"], pads=[1, 1, 1, 1]) for i in range(2)),
        helper.make_node("GlobalAveragePool", ["x2"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("images", dtype, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("small") / "model.onnx", 8)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_network(tmp_path_factory.mktemp("large") / "model.onnx", 64)


def test_the_interval_covers_the_true_ratio_and_excludes_wrong_ones() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(100):
        drift = 1 + generator.random(20)  # hits both files of a round alike
        slow = 1.3 * drift * (1 + 0.02 * generator.standard_normal(20))
        fast = drift * (1 + 0.02 * generator.standard_normal(20))
        found = compare(slow.tolist(), fast.tolist(), names=("slow", "fast"), seed=seed)
        covered += found.low <= 1.3 <= found.high
        assert found.verdict == "faster"
        assert found.value == pytest.approx(1.3, rel=0.05)
    assert covered >= 93


def test_verdicts_follow_the_interval() -> None:
    even = [1.0, 1.01, 0.99] * 7
    assert compare(even, even, names=("a", "b")).verdict == "not distinguishable"
    assert compare(even, [2 * x for x in even], names=("a", "b")).verdict == "slower"
    nearly = compare(even, [x * (1 + RESOLUTION / 2) for x in even], names=("a", "b"))
    assert nearly.verdict == "not distinguishable"
    assert nearly.low < 1 < nearly.high


def test_two_copies_of_one_file_compare_as_equal(large: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(large.read_bytes())
    speedup = benchmark([large, copy], seconds=8).speedups[0]
    assert abs(speedup.value - 1) <= 0.02
    assert speedup.verdict == "not distinguishable"


def test_a_comparison_says_what_was_measured_and_where(large: Path, small: Path) -> None:
    before = machine.allowed_cpus()
    seen: list[tuple[int, int]] = []
    found = benchmark([large, small], batch=2, rounds=6, seconds=3, on_round=lambda *counts: seen.append(counts))
    slow, fast = found.measurements
    assert (slow.file, fast.file) == (f"{large.parent.name}/model.onnx", f"{small.parent.name}/model.onnx")
    assert found.speedups[0].verdict == "faster" and found.speedups[0].against == slow.file
    assert fast.latency.p50 < slow.latency.p50 <= slow.latency.p90 <= slow.latency.p99
    assert slow.latency.n >= len(slow.latency.samples) == len(fast.latency.samples) == found.conditions["rounds"]
    assert slow.latency.throughput == pytest.approx(2000 / slow.latency.p50)
    assert slow.size_bytes == large.stat().st_size > slow.size_gzip_bytes > 0
    assert slow.sha256 != fast.sha256 and len(slow.sha256) == 64
    assert slow.load_ms > 0 and slow.first_ms > 0 and slow.peak_memory_bytes > 0
    assert all(done < expected for done, expected in seen[:-1]) and seen[-1][0] == seen[-1][1]
    assert Comparison.model_validate_json(found.model_dump_json()) == found
    assert machine.allowed_cpus() == before and gc.isenabled()


def test_a_single_file_needs_no_other(small: Path) -> None:
    found = benchmark([small], rounds=2, seconds=2)
    assert found.speedups == () and found.measurements[0].file == "model.onnx"


def test_memory_of_the_parent_is_not_counted(small: Path) -> None:
    ballast = np.ones(300 << 17)  # 300 MiB
    signature = input_signature(open_session(small, threads=1), batch=1)
    assert measure_fresh(small, signature=signature, threads=1).peak_memory_bytes < ballast.nbytes / 3


def test_conditions_are_json_and_name_no_user_or_path() -> None:
    text = json.dumps(machine.describe())
    assert "cpu" in text and "onnxruntime" in text
    assert str(Path.home()) not in text and sys.prefix not in text
    for private in (platform.node(), getpass.getuser()):
        assert f'"{private}"' not in text


def test_the_block_is_that_of_the_vector_unit() -> None:
    assert machine.vector_block() == machine.BLOCKS[machine.vector_unit()]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert (machine.vector_block() == 16) == ("avx512f" in flags)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this operating system does not pin")
def test_pinning_is_undone_after_an_error() -> None:
    before = machine.allowed_cpus()
    with pytest.raises(KeyError), machine.pinned(1) as cpus:
        assert cpus is not None and machine.allowed_cpus() == cpus and len(cpus) == 1
        raise KeyError
    assert machine.allowed_cpus() == before


def test_an_inactive_provider_gives_a_reason_and_never_a_number(small: Path) -> None:
    reasons = available()
    assert reasons["ort-cpu"] is None
    if reasons["ort-cuda"] is None:
        pytest.skip("CUDA is active here")
    with pytest.raises(MeasureError, match=r"ort-cuda cannot be measured here: CUDAExecutionProvider .*use ort-cpu"):
        benchmark([small], runtime="ort-cuda")
    lacking = {name: reason for name, reason in reasons.items() if reason}
    assert benchmark([small], rounds=1, seconds=0).conditions["unavailable"] == lacking


@pytest.mark.gpu
def test_cuda_is_measured_where_it_is_active(large: Path) -> None:
    if reason := available()["ort-cuda"]:
        pytest.skip(reason)
    assert benchmark([large], runtime="ort-cuda", rounds=2, seconds=10).measurements[0].latency.runtime == "ort-cuda"


@pytest.mark.parametrize("content", [None, b"", b"not a protobuf at all", "half"])
def test_what_is_not_an_onnx_file_cannot_be_loaded(content: bytes | str | None, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(small.read_bytes()[: small.stat().st_size // 2] if isinstance(content, str) else content)
    with pytest.raises(LoadError, match=r"model\.onnx is not a"):
        benchmark([path])
    with pytest.raises(LoadError, match="is not a file"):
        benchmark([tmp_path])


def test_inputs_come_from_the_signature_of_the_file(tmp_path: Path) -> None:
    fixed = write_network(tmp_path / "fixed.onnx", 4, shape=(2, 3, 8, 8))
    with pytest.raises(MeasureError, match=r"takes batch 2 only, not 1; measure with batch 2"):
        benchmark([fixed])
    assert benchmark([fixed], batch=2, rounds=1, seconds=0).measurements[0].latency.batch == 2
    free = write_network(tmp_path / "free.onnx", 4, shape=("batch", 3, "height", "width"), dtype=TensorProto.UINT8)
    with pytest.raises(MeasureError, match="leaves dimension 2 open; give its shape"):
        benchmark([free])
    signature = input_signature(open_session(free, threads=1), batch=4, shape=(3, 8, 8))
    assert signature == (("images", (4, 3, 8, 8), "uint8"),)
    assert benchmark([free], shape=(3, 8, 8), rounds=1, seconds=0).measurements[0].latency.n > 0
    assert sized(
        [("images", ["N", 3, 8, 8], "float32"), ("extra", [2], "int64"), ("state", [2, "N", 64], "float32")],
        batch=8, shape=None,
    ) == (("images", (8, 3, 8, 8), "float32"), ("extra", (2,), "int64"), ("state", (2, 8, 64), "float32"))  # fmt: skip
    with pytest.raises(MeasureError, match=r"'a' takes batch 1 only, not 8"):
        sized([("a", [1, 3], "float32"), ("b", [1, 2], "float32")], batch=8, shape=None)
    words = write_network(tmp_path / "words.onnx", 4, dtype=TensorProto.STRING)
    with pytest.raises(MeasureError, match=r"is a tensor\(string\)"):
        benchmark([words])
    wrong = write_network(tmp_path / "wrong.onnx", 4, shape=("batch", "channels", 8, 8))
    with pytest.raises(MeasureError, match="failed in a new process"):
        benchmark([wrong], shape=(5, 8, 8))


def test_impossible_requests_are_refused(small: Path) -> None:
    with pytest.raises(MeasureError, match=r"threads on .* processors measure the scheduler"):
        benchmark([small], threads=10_000)
    with pytest.raises(MeasureError, match="0 files, batch 1, threads 1, rounds 20: each must be at least 1"):
        benchmark([])
    with pytest.raises(MeasureError, match="runtime 'ort-tpu' is not known; use one of ort-cpu, ort-cuda"):
        benchmark([small], runtime="ort-tpu")  # type: ignore[arg-type]


def test_names_are_as_short_as_tells_the_files_apart() -> None:
    assert identity.names([Path("/a/x/m.onnx"), Path("/a/y/n.onnx")]) == ["m.onnx", "n.onnx"]
    assert identity.names([Path("/a/x/m.onnx"), Path("/a/y/m.onnx")]) == ["x/m.onnx", "y/m.onnx"]
    assert identity.names([Path("/a/m.onnx"), Path("/a/m.onnx")]) == ["m.onnx", "m.onnx"]


def test_measuring_does_not_load_torch() -> None:
    code = "import sys, compress.bench; sys.exit('torch' in sys.modules or 'onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
