"""Files of lower precision: the arithmetic of weights and ranges, what is refused, and what a run says of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from onnx import helper, numpy_helper
from torch import Tensor

from compress.bench.machine import has_int8_products
from compress.errors import AccuracyError, LoadError, ParityError
from compress.export import read_metadata
from compress.onnx_file import sparsify
from compress.precision import METHODS, convert, largest
from compress.quantize import Images, Setting, compare, quantize, recorded
from compress.task import Classification
from tests.shell import answer, call, copy, refusal

X = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
FLOAT = onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def network(pruned_run: tuple[Path, Any]) -> Path:
    """The pruned file of a tiny run."""
    return pruned_run[0] / "model.onnx"


def given(x: Tensor = X, labels: Tensor | None = None) -> Images:
    labels = torch.arange(len(x)) % 10 if labels is None else labels
    return Images((x[:16], x[16:32]), (x[32:],), lambda: [(x, labels)], "test", len(x))


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def run(path: Path, x: Tensor) -> Any:
    from compress.bench.session import open_session

    return open_session(path, threads=1).run(None, {"images": x.numpy()})[0].astype("float64")


def test_weights_are_the_nearest_of_255_values_per_channel(network: Path, tmp_path: Path) -> None:
    made = tmp_path / "int8.onnx"
    convert(network, made, "int8", calibration="minmax", images=[X])
    weights = {name: w.astype("float64") for name, w in tensors(network).items() if w.ndim == 4}
    found, graph = tensors(made), onnx.load(made).graph
    seen = 0
    for node in (n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in found):
        quantised, scale = found[node.input[0]], found[node.input[1]].astype("float64")
        name = node.input[0].removesuffix("_quantized")
        if name not in weights:
            continue
        most = np.abs(weights[name]).max((1, 2, 3))  # 0 in a channel that the shortcut pads
        assert scale == pytest.approx(np.where(most, most / (127 if has_int8_products() else 64), 1), rel=0.02)
        back = quantised.astype("float64") * scale[:, None, None, None]
        assert (np.abs(back - weights[name]) <= scale[:, None, None, None] * 0.501).all()
        seen += 1
    assert seen == len(weights) > 3


def test_minmax_takes_the_range_of_the_images_given(network: Path, tmp_path: Path) -> None:
    made = tmp_path / "int8.onnx"
    convert(network, made, "int8", calibration="minmax", images=[X[:20], X[20:]])  # batches of different sizes
    first = next(node for node in onnx.load(made).graph.node if node.op_type == "QuantizeLinear")
    assert first.input[0] == "images"
    assert tensors(made)[first.input[1]] == pytest.approx((X.max() - X.min()).item() / 255, rel=1e-5)


@pytest.mark.parametrize("calibration", METHODS)
def test_every_calibration_stays_near_the_network(network: Path, tmp_path: Path, calibration: Any) -> None:
    made = tmp_path / "int8.onnx"
    how = convert(network, made, "int8", calibration=calibration, images=[X[:16], X[16:32]])
    assert how["calibration"] == calibration and how["calibration_images"] == 32
    found = compare(network, made, [X[32:40], X[40:]])
    wanted, got = run(network, X[32:]), run(made, X[32:])
    assert found.snr_db is not None and found.snr_db > 10  # on noise, of a network of digits
    assert found.snr_db == pytest.approx(10 * math.log10((wanted**2).sum() / ((wanted - got) ** 2).sum()), abs=1e-6)
    assert found.top1_agreement == pytest.approx(100 * (wanted.argmax(1) == got.argmax(1)).mean())
    assert found.max_abs_diff == np.abs(wanted - got).max() and found.images == 16 and found.batches == (1, 2, 17)


def test_metadata_goes_along(network: Path, tmp_path: Path) -> None:
    convert(network, tmp_path / "int8.onnx", "int8", calibration="minmax", images=[X])
    before, after = read_metadata(network), read_metadata(tmp_path / "int8.onnx")
    assert before.items() <= after.items() and {"arch", "labels", "tool"} <= before.keys()
    assert after.keys() - before.keys() == {"quantized", *convert(
        network, tmp_path / "again.onnx", "int8", calibration="minmax", images=[X])}  # fmt: skip
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "int8.onnx").read_bytes()


def test_float16_inside_float32_outside(network: Path, tmp_path: Path) -> None:
    made = tmp_path / "fp16.onnx"
    convert(network, made, "fp16", calibration="minmax", images=[])
    graph = onnx.load(made).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    before, after = tensors(network), tensors(made)
    for name, weight in before.items():
        if weight.ndim == 4:  # the nearest float16; what is not 0 stays so, at the smallest there is
            wanted = np.where(weight == 0, 0, np.sign(weight) * np.maximum(np.abs(weight), 5.96e-8)).astype("float16")
            assert after[name].dtype == np.float16 and (after[name] == wanted).all()
    found = compare(network, made, [X])
    assert found.snr_db is not None and found.snr_db > 50  # 11 bits: 66 dB for one rounding
    assert made.stat().st_size < 0.7 * network.stat().st_size


def test_sparse_weights_are_unpacked_first(network: Path, tmp_path: Path) -> None:
    proto = onnx.load(network)
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.ndim == 4:
            tensor.CopyFrom(
                numpy_helper.from_array(values * (np.abs(values) > np.quantile(np.abs(values), 0.8)), tensor.name)
            )
    assert sparsify(proto.graph) > 3
    onnx.save(proto, tmp_path / "sparse.onnx")
    for to in ("int8", "fp16"):
        convert(tmp_path / "sparse.onnx", tmp_path / "made.onnx", to, calibration="minmax", images=[X])
        found = compare(tmp_path / "sparse.onnx", tmp_path / "made.onnx", [X])
        assert found.snr_db is not None and found.snr_db > 10
        assert not onnx.load(tmp_path / "made.onnx").graph.sparse_initializer


def sign_network(path: Path, scale: float = 1.0) -> Path:
    """Two logits, 5 + x and 5 - x, of the second pixel x, which is `scale` times larger on the way."""
    copied = np.array([1, -1], np.float32).reshape(2, 1, 1, 1) * np.float32(scale)
    read = np.zeros((2, 2, 1, 2), np.float32)
    read[0, 0, 0, 1] = read[1, 1, 0, 1] = 1 / scale
    return written(path, [("copied", copied), ("read", read), ("bias", np.full(2, 5, np.float32))], [1, 1, 2])


def written(path: Path, tensors: Sequence[tuple[str, Any]], shape: Sequence[int]) -> Path:
    """Two convolutions and a flatten."""
    nodes = [
        helper.make_node("Conv", ["images", tensors[0][0]], ["h"]),
        helper.make_node("Conv", ["h", *(name for name, _ in tensors[1:])], ["y"]),
        helper.make_node("Flatten", ["y"], ["logits"]),
    ]
    values = [helper.make_tensor_value_info("images", FLOAT, ["batch", *shape]),
              helper.make_tensor_value_info("logits", FLOAT, ["batch", "classes"])]  # fmt: skip
    weights = [numpy_helper.from_array(value, name) for name, value in tensors]
    graph = helper.make_graph(nodes, "network", values[:1], values[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def signs(first: float = 1000.0) -> tuple[Tensor, Tensor]:
    """The first pixel alone fills the range of the bytes; the second says the class."""
    classes = torch.arange(48) % 2
    x = torch.full((48, 1, 1, 2), first)
    x[:, 0, 0, 1] = 0.1 - 0.2 * classes
    return x, classes


def test_a_broken_budget_leaves_no_file(tmp_path: Path) -> None:
    source, out = sign_network(tmp_path / "model.onnx"), tmp_path / "model.int8.onnx"
    x, classes = signs()
    text = r"top1 on test falls from 100.00 to 50.00 %; allowed are 10 points; no file was written"
    with pytest.raises(AccuracyError, match=text) as caught:
        quantize(source, out, Setting("int8", max_drop=10.0), images=given(x, classes), task=Classification())
    assert caught.value.exit_code == 7
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    made = quantize(
        source, out, Setting("int8", max_drop=50.0, seconds=0.1), images=given(x, classes), task=Classification()
    )
    assert (made.before["top1"], made.after["top1"]) == (100.0, 50.0)
    assert "top-1 100.00 -> 50.00 on test" in made.verdict
    assert out.is_file()


def test_values_outside_the_range_of_float16_are_refused(tmp_path: Path) -> None:
    source = sign_network(tmp_path / "model.onnx", scale=1e3)
    assert largest(source, [signs()[0]]) == 1e6
    with pytest.raises(
        ParityError, match=r"model.fp16.onnx would overflow: values reach 1e\+06, float16 ends at 65504"
    ):
        quantize(source, tmp_path / "model.fp16.onnx", Setting("fp16"), images=given(*signs()), task=Classification())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_another_network_is_none_of_lower_precision(tmp_path: Path) -> None:
    source, x = sign_network(tmp_path / "model.onnx"), signs()[0]
    wide = [("a", np.ones((2, 1, 1, 1), np.float32)), ("b", np.ones((3, 2, 1, 2), np.float32))]
    with pytest.raises(ParityError, match=r"gives outputs of shape \[\(1, 3\)\], the float32 file \[\(1, 2\)\]"):
        compare(source, written(tmp_path / "wide.onnx", wide, [1, 1, 2]), [x])
    other = [("a", np.ones((2, 1, 1, 1), np.float32)), ("b", np.ones((2, 2, 1, 2), np.float32))]
    with pytest.raises(ParityError, match=r"outputs of rms .* with noise of rms .*: not the same network any more"):
        compare(source, written(tmp_path / "other.onnx", other, [1, 1, 2]), [x])
    other[1] = ("b", np.full((2, 2, 1, 2), np.inf, np.float32))
    with pytest.raises(ParityError, match="gives NaN or Inf"):
        compare(source, written(tmp_path / "other.onnx", other, [1, 1, 2]), [x])
    found = compare(source, source, [x])
    assert (found.snr_db, found.max_abs_diff, found.top1_agreement) == (None, 0.0, 100.0)


# --- the command and the run ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(pruned_run: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run that was finished without, and then resumed with a recipe that asks for int8."""
    folder = Path(shutil.copytree(pruned_run[0], tmp_path_factory.mktemp("run") / "r"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["quantize"] |= {"to": "int8", "images": 40}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "state" / "report.json").unlink()
    return folder, call("resume", folder, "--json")


def test_a_run_that_is_resumed_quantises_once(run_folder: tuple[Path, Any]) -> None:
    folder, result = run_folder
    assert result.exit_code == 0, result.stderr
    found, entry = json.loads(result.stdout)["quantized"], recorded(folder)["model.int8.onnx"]
    assert found["verdict"] == entry.verdict and found["sha256"] == entry.sha256
    assert found["metric"] == entry.after["metric"] and entry.how["calibration_images"] == 40
    assert found["verdict"] in result.stderr.replace("\n", " ")
    for page in ("README.md", "report.html"):
        assert "model.int8.onnx" in (folder / page).read_text()
    stamp = (folder / "model.int8.onnx").stat().st_mtime_ns
    assert call("resume", folder).exit_code == 0
    assert (folder / "model.int8.onnx").stat().st_mtime_ns == stamp


def states(folder: Path) -> dict[str, str]:
    return {row["name"]: row["detail"] for row in json.loads(call("verify", folder, "--json").stdout)["checks"]
            if row["state"] == "FAILED"}  # fmt: skip


def test_verify_sees_another_file(run_folder: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copy(run_folder[0], tmp_path / "sent")
    assert states(folder) == {}
    with (folder / "model.int8.onnx").open("ab") as file:
        file.write(b"\x00")
    assert "the measured file's" in states(folder)["quantised"]
    (folder / "quantize.json").write_text("{}")
    assert "quantize.json is damaged" in states(folder)["quantised"]
    with pytest.raises(LoadError, match="delete it, and quantise again"):
        recorded(folder)


def test_the_command_on_a_run_and_on_a_file(run_folder: tuple[Path, Any], tmp_path: Path) -> None:
    folder = copy(run_folder[0], tmp_path / "sent")
    code, line = refusal("quantize", folder)
    assert code == 2 and line.endswith("model.int8.onnx exists already; choose another --out or give --force")
    found = answer("quantize", folder, "--to", "fp16", "--seconds", 1)
    assert found["onnx"] == str(folder / "model.fp16.onnx") and found["how"] == {"weights": "float16"}
    assert found["verdict"].endswith("float16 is for GPUs, this CPU computes it in float32")
    assert [*recorded(folder)] == ["model.int8.onnx", "model.fp16.onnx"]
    assert {m["file"] for m in found["measurements"]} == {"model.onnx", "model.fp16.onnx"}
    report = json.loads((folder / "report.json").read_text())
    assert found["before"]["top1"] == report["pruned"]["top1"] and found["images"] == report["split"]["images"]
    assert report["quantized"]["file"] == "model.int8.onnx" and states(folder) == {}
    again = answer("quantize", folder, "--images", 16, "--force", "--seconds", 1)
    told = json.loads((folder / "report.json").read_text())["quantized"]
    assert told["sha256"] == again["sha256"] != report["quantized"]["sha256"] and states(folder) == {}


def test_a_run_whose_file_cannot_be_quantised_is_finished_all_the_same(
    pruned_run: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(pruned_run[0], tmp_path / "r"))
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["quantize"] |= {"to": "fp16", "images": 40}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "state" / "report.json").unlink()
    monkeypatch.setattr("compress.quantize.largest", lambda source, batches: 1e6)
    asked = list[Setting]()

    def make(source: Path, out: Path, setting: Setting, **given: Any) -> Any:
        asked.append(setting)
        return quantize(source, out, setting, **given)

    monkeypatch.setattr("compress.pipeline.lower.make", make)
    result = call("resume", folder, "--json")
    assert [setting.seconds for setting in asked] == [recipe["bench"]["seconds"]] == [1]
    why = "model.fp16.onnx would overflow: values reach 1e+06, float16 ends at 65504; take int8"
    assert result.exit_code == 0 and f"not quantised: {why}" in result.stderr.replace("\n", " ")
    found = json.loads(result.stdout)
    assert found["quantized"] is None and found["unquantized"] == why
    assert why in (folder / "report.html").read_text() and why in (folder / "README.md").read_text()
    assert states(folder) == {} and not (folder / "model.fp16.onnx").exists()
    # another form is written later, and the report tells of it
    made = answer("quantize", folder, "--images", 16, "--seconds", 1)
    told = json.loads((folder / "report.json").read_text())
    assert told["quantized"]["verdict"] == made["verdict"] and told["unquantized"] == ""


def test_a_file_that_takes_one_batch_is_measured_at_it(run_folder: tuple[Path, Any], tmp_path: Path) -> None:
    proto = onnx.load(run_folder[0] / "model.onnx")
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    onnx.save(proto, tmp_path / "fixed.onnx")
    code, line = refusal("quantize", tmp_path / "fixed.onnx", "--batch", 4)
    assert code == 2 and line.endswith("fixed.onnx takes batch 8 only; leave it out")
    found = answer("quantize", tmp_path / "fixed.onnx", "--images", 16, "--seconds", 1)
    assert found["measurements"][0]["latency"]["batch"] == 8 and found["fidelity"]["batches"] == [8]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--to", "int4"], 2, "--to int4 is unknown; there are int8, fp16"),
        (["--calibration", "x"], 2, "--calibration x is unknown; there are minmax, entropy, percentile"),
        (["--runtime", "torch-cpu"], 2, "--runtime torch-cpu is unknown; there are ort-cpu, ort-cuda"),
        (["--out", "x.pt"], 2, "--out x.pt must end in .onnx"),
        ([], 3, "the file names no data set: give --data"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, arguments: Sequence[str], code: int, text: str) -> None:
    found, line = refusal("quantize", sign_network(tmp_path / "model.onnx"), *arguments)
    assert found == code
    assert line.startswith(text)
