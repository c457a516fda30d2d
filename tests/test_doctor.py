"""The doctor on planted cases: each cause is found with its gain, and a healthy file raises no alarm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.bench.machine import vector_block
from compress.doctor import FINDINGS, Asked, Diagnosis, examine
from compress.doctor.alone import widened
from compress.doctor.layers import SMALLEST, denormal_activations, denormal_weights, layers
from compress.doctor.profile import feeds, open_session
from compress.errors import UsageError
from tests.shell import answer, call, refusal

pytestmark = pytest.mark.alone
BLOCK = vector_block()
GENERATOR = np.random.default_rng(0)
Parts = list[tuple[str, dict[str, Any], Any]]  # operator, attributes, its weight or None


def write(path: Path, parts: Parts, *, shape: Sequence[int] = (3, 32, 32)) -> Path:
    """A chain of operators from `images` to `logits`."""
    nodes, tensors, at = [], [], "images"
    for index, (op, attributes, weight) in enumerate(parts):
        to = "logits" if index + 1 == len(parts) else f"t{index}"
        given = [weight] if isinstance(weight, np.ndarray) else list(weight or ())
        names = [f"{to}.{place}" for place in range(len(given))]
        tensors += [numpy_helper.from_array(w, name) for w, name in zip(given, names, strict=True)]
        nodes.append(helper.make_node(op, [at, *names], [to], name=f"n{index}", **attributes))
        at = to
    values = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", *shape]),
              helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)]  # fmt: skip
    graph = helper.make_graph(nodes, "planted", values[:1], values[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> tuple[str, dict[str, Any], Any]:
    weight = GENERATOR.standard_normal((outputs, inputs // groups, kernel, kernel)) / (
        kernel * (inputs // groups) ** 0.5
    )
    return "Conv", {"pads": [kernel // 2] * 4, "group": groups}, weight.astype(np.float32)


def network(*widths: int) -> Parts:
    """Convolutions with ReLU from 3 channels through the widths to a classifier of 10."""
    pairs = zip((3, *widths[:-1]), widths, strict=True)
    body = [part for i, o in pairs for part in (conv(i, o), ("Relu", {}, None))]
    head = (GENERATOR.standard_normal((widths[-1], 10)) / widths[-1] ** 0.5).astype(np.float32)
    return [*body, ("GlobalAveragePool", {}, None), ("Flatten", {}, None), ("MatMul", {}, head)]


def diagnosed(path: Path, **asked: Any) -> Diagnosis:
    return examine(path, Asked(runs=50, **asked))


def kinds(found: Diagnosis) -> list[str]:
    return [one.kind for one in found.findings]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("doctor") / "healthy.onnx", network(*[2 * BLOCK] * 4))


def test_a_healthy_file_raises_no_alarm(healthy: Path) -> None:
    found = diagnosed(healthy)
    assert found.findings == ()
    assert found.looked_for == tuple(FINDINGS)
    assert found.conv_macs == (9 * 1024 * 2 * BLOCK * (3 + 3 * 2 * BLOCK),)
    assert {one.op for one in found.operators} >= {"Conv"}
    assert 0 < found.profiles[0].latency_ms < 50


def test_unaligned_widths_are_found_with_what_the_next_multiple_gains(tmp_path: Path) -> None:
    odd = 2 * BLOCK - 2
    found = diagnosed(write(tmp_path / "x.onnx", network(2 * BLOCK, odd, odd, 2 * BLOCK)))
    one = next(one for one in found.findings if one.kind == "misaligned widths")
    rows = {row["layer"]: row for row in one.details}
    assert rows["t4"]["channels"] == [odd, odd] and rows["t4"]["aligned"] == [2 * BLOCK, 2 * BLOCK]
    assert rows["t4"]["aligned_ms"] < rows["t4"]["ms"] and rows["t4"]["basis"] == "measured"
    assert "t0" not in rows  # its width is aligned, and the images have three channels whatever is done
    assert one.gain_ms == pytest.approx(sum(row["gain_ms"] for row in one.details)) and one.share > 0.02
    assert f"--round-to {BLOCK}" in one.remedy


def test_a_width_that_costs_what_the_next_one_costs_is_an_estimate(tmp_path: Path) -> None:
    if BLOCK != 16:
        pytest.skip("the runtime pads to the block where channels are a multiple of four below it: seen with AVX-512")
    found = diagnosed(write(tmp_path / "x.onnx", network(16, 20, 20, 16)))
    one = next(one for one in found.findings if one.kind == "misaligned widths")
    row = next(row for row in one.details if row["channels"] == [20, 20])
    assert row["aligned"] == [32, 32] and row["gain_ms"] < row["ms"]


def test_widening_keeps_what_the_file_gives_and_takes(healthy: Path) -> None:
    asked = Asked()
    given = feeds(open_session(healthy, asked), asked)
    first, second, *_ = layers(healthy, asked, given)
    assert first.is_first and not second.is_first and not first.is_last
    assert (first.inputs, first.size, first.out_size) == (3, (32, 32), (32, 32))
    assert widened(first, BLOCK) == first and widened(first, 3 * BLOCK).inputs == 3
    assert widened(second, 3 * BLOCK).inputs == widened(second, 3 * BLOCK).outputs == 3 * BLOCK


def test_channels_in_groups_follow_no_width(tmp_path: Path) -> None:
    first, last = conv(3, 4 * BLOCK), conv(4 * BLOCK, 2 * BLOCK + 2)
    grouped = conv(4 * BLOCK, 4 * BLOCK, groups=BLOCK), conv(4 * BLOCK, 8 * BLOCK, groups=4 * BLOCK)
    for middle in grouped:
        path = write(tmp_path / "groups.onnx", [first, middle, conv(len(middle[2]), 4 * BLOCK), last])
        asked = Asked()
        found = layers(path, asked, feeds(open_session(path, asked), asked))
        assert widened(found[1], BLOCK) == found[1] and found[1].groups > 1
        assert widened(found[3], BLOCK) == found[3] and found[3].is_last


@pytest.mark.parametrize(("where", "pads"), [("SAME_UPPER", (0, 0, 1, 1)), ("SAME_LOWER", (1, 1, 0, 0))])
def test_pads_that_the_file_leaves_to_the_runtime(tmp_path: Path, where: str, pads: tuple[int, ...]) -> None:
    op, _, weight = conv(3, BLOCK + 2)
    path = write(tmp_path / "auto.onnx", [(op, {"auto_pad": where, "strides": [2, 2]}, weight), conv(BLOCK + 2, 4)])
    asked = Asked()
    found = layers(path, asked, feeds(open_session(path, asked), asked))
    assert found[0].pads == pads and found[0].out_size == (16, 16)
    assert examine(path, Asked(runs=5)).conv_macs[0] > 0


def test_denormal_weights_are_counted_and_timed(tmp_path: Path) -> None:
    parts = network(*[2 * BLOCK] * 3)
    parts[2][2][0] = 1e-42
    parts[2][2][1] = -SMALLEST / 2
    parts[2][2][2] = SMALLEST  # normal
    parts[2][2][3] = 0.0
    path = write(tmp_path / "x.onnx", parts)
    each = 9 * 2 * BLOCK
    assert denormal_weights(path) == {"t2.0": 2 * each}
    found = diagnosed(path)
    one = next(one for one in found.findings if one.kind == "denormals")
    assert one.text.startswith(f"{2 * each:,} weights in 1 tensors and ")
    assert one.basis == "measured" and {"tensor": "t2.0", "denormal": 2 * each} in one.details
    assert {row["tensor"] for row in one.details} > {"t2.0"}  # what they give is denormal as well
    assert "session.set_denormal_as_zero" in one.remedy
    assert not torch.set_flush_denormal(False) or torch.tensor([1e-39]).mul(1).item() != 0  # the mode is as before


def test_denormals_that_cost_time_are_found_with_the_time(tmp_path: Path) -> None:
    if not torch.set_flush_denormal(False):
        pytest.skip("this processor cannot flush denormal numbers")
    tiny = ("Mul", {}, np.array(1e-39, np.float32))
    parts: Parts = [("Abs", {}, None), tiny, ("Sqrt", {}, None), ("GlobalAveragePool", {}, None)]
    path = write(tmp_path / "x.onnx", parts, shape=(16, 128, 128))
    asked = Asked()
    found = denormal_activations(path, asked, feeds(open_session(path, asked), asked))
    assert found["t1"] > 0.99 * 16 * 128 * 128 and "t0" not in found
    one = diagnosed(path).findings[0]
    assert one.kind == "denormals" and one.gain_ms > 0
    assert "flushed to zero an inference is" in one.text


@pytest.mark.parametrize("runtime", ["ort-cuda", "AzureExecutionProvider"])
def test_a_provider_that_fell_back_is_named(healthy: Path, runtime: str) -> None:
    here = onnxruntime.get_available_providers()
    asked = Asked(runtime=runtime).provider
    if (asked in here) is not (runtime == "AzureExecutionProvider"):
        pytest.skip(f"{asked} is {'' if asked in here else 'not '}here: no such fallback")
    found = diagnosed(healthy, runtime=runtime)
    assert kinds(found) == ["fallback"]
    one = found.findings[0]
    count = len(found.profiles[0].nodes)
    assert one.text.startswith(f"{count} of {count} operators ran on CPUExecutionProvider, not on {asked}: it ")
    assert ("not in the installed onnxruntime" in one.text) is (asked not in here)
    assert one.share == pytest.approx(1) and {row["provider"] for row in one.details} == {"CPUExecutionProvider"}


def test_depthwise_layers_are_memory_bound(tmp_path: Path) -> None:
    wide = 8 * BLOCK
    middle = [part for _ in range(4) for part in (conv(wide, wide, groups=wide), ("Relu", {}, None))]
    path = write(tmp_path / "x.onnx", [conv(3, wide), *middle, conv(wide, 2 * BLOCK, 1), *network(3)[-3:-1]])
    one = next(one for one in diagnosed(path).findings if one.kind == "memory-bound")
    assert len([row for row in one.details if row["op"] == "Conv"]) == 4
    assert all(row["macs_per_byte"] < 2 for row in one.details)
    assert one.basis == "estimate" and 0 < one.share < 1


def test_norms_that_are_not_folded(tmp_path: Path) -> None:
    norm = [np.ones(16, np.float32), np.zeros(16, np.float32), np.zeros(16, np.float32), np.ones(16, np.float32)]
    parts: Parts = [("Sigmoid", {}, None), ("BatchNormalization", {}, norm), conv(16, 16, 1)]
    one = next(o for o in diagnosed(write(tmp_path / "x.onnx", parts, shape=(16, 32, 32))).findings
               if o.kind == "unfused norms")  # fmt: skip
    assert one.text.startswith("1 batch norms run as operators of their own") and one.gain_ms > 0


def test_layouts_that_change_on_the_way(tmp_path: Path) -> None:
    turn = ("Transpose", {"perm": [0, 3, 2, 1]}, None), ("Reshape", {}, np.array([0, 16, 32, 32]))
    parts: Parts = [("Sigmoid", {}, None), *turn * 6]
    one = next(o for o in diagnosed(write(tmp_path / "x.onnx", parts, shape=(16, 32, 32))).findings
               if o.kind == "conversions")  # fmt: skip
    assert sum(row["op"] == "Transpose" for row in one.details) == 6
    assert one.text.startswith("6 Transpose: ") and one.gain_ms > 0


def test_operators_too_small_for_their_own_cost(tmp_path: Path) -> None:
    parts = [part for _ in range(20) for part in (("Sigmoid", {}, None), ("Neg", {}, None))]
    one = next(
        o for o in diagnosed(write(tmp_path / "x.onnx", parts, shape=(1, 1, 1))).findings if o.kind == "overhead"
    )
    assert one.text.startswith("40 operators of ") and one.share > 0.25


def test_findings_come_largest_first_and_the_command_says_them(healthy: Path, tmp_path: Path) -> None:
    odd = 2 * BLOCK - 2
    path = write(tmp_path / "odd.onnx", network(odd, odd, odd))
    found = answer("doctor", healthy, path, "--runs", "30", "--runtime", "ort-xnnpack")
    gains = [one["gain_ms"] for one in found["findings"]]
    assert gains == sorted(gains, reverse=True)
    assert {"fallback", "misaligned widths"} <= {one["kind"] for one in found["findings"]}
    assert (found["file"], found["against"]) == ("odd.onnx", "healthy.onnx")
    assert len(found["profiles"]) == 2 and found["conditions"]["block"] == BLOCK
    assert " of the time of odd.onnx for " in call("doctor", path, healthy, "--runs", "30").stderr.replace("\n", " ")
    said = call("doctor", healthy, "--runs", "30").stderr
    assert "nothing found in healthy.onnx; looked for: fallback, denormals, misaligned widths" in said.replace(
        "\n", " "
    )


def test_what_the_doctor_refuses(healthy: Path) -> None:
    code, line = refusal("doctor", healthy, "--runtime", "nope")
    assert code == 2 and line.startswith("runtime 'nope' is unknown; there are ort-cpu, ort-cuda")
    assert refusal("doctor", "absent.onnx") == (3, "absent.onnx is not a file; give the path of an .onnx file")
    code, line = refusal("doctor", healthy, "--threads", "999")
    assert code == 1 and line.startswith("999 threads, but this process may use ")
    with pytest.raises(UsageError, match="or a provider"):
        examine(healthy, Asked(runtime="cuda"))
