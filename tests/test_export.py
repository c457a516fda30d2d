"""From torch to ONNX: the file is equal to the network and says so, or there is no file."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from compress import export
from compress.errors import CompressError, LoadError, ParityError
from compress.export import flush_tiny, metric, predict, prove, read_metadata, to_onnx
from compress.task import CLASSIFICATION
from compress.train import accelerator


class Residual(nn.Module):
    """A convolution, a residual block with batch norm, a classifier over 4 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.norm(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


class Head(nn.Module):
    """One linear layer over the flattened image, so that an export takes well under a second."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 4)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1)) * self.scale


class Branching(Head):
    """A branch on a value, which only the legacy exporter's tracing gets past."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


class FrozenBatch(Branching):
    """As a tracer sees it, the batch size becomes a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(int(x.shape[0]), 4)


class Several(Head):
    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:  # type: ignore[override]
        logits = super().forward(x)
        return {"logits": logits, "more": (logits.flip(1), x.mean((2, 3)))}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network() -> Residual:
    torch.manual_seed(0)
    network = Residual()
    with torch.no_grad():
        network.norm.running_mean.normal_()
        network.norm.running_var.uniform_(0.5, 2)
    return network


def assert_no_file(folder: Path) -> None:
    assert list(folder.iterdir()) == []


def test_the_file_is_the_network(
    network: Residual, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    network = network.to(memory_format=torch.channels_last).train()
    before = copy.deepcopy(network.state_dict())
    path = tmp_path / "new" / "model.onnx"
    proof = to_onnx(network, images, path, metadata={"method": "halo", "seed": "3"})
    assert capfd.readouterr() == ("", "")
    assert proof.exporter == "dynamo" and proof.batches == (1, 2, 17) and proof.top1_agreement == 100
    assert proof.relative == proof.max_abs_diff / proof.output_scale < 1e-5 and proof.flushed == 0
    assert export.Proof.model_validate_json(proof.model_dump_json()) == proof

    assert network.training and network.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())

    found = np.concatenate(list(predict(path, [images[:2], images[2:].numpy()], threads=1)))
    assert np.allclose(found, network.eval()(images).detach().numpy(), atol=1e-5)
    metadata = read_metadata(path)
    assert metadata.pop("tool_version")
    assert metadata == {"method": "halo", "seed": "3", "tool": "compress-to-onnx", "exporter": "dynamo", "flushed": "0"}
    proto = onnx.load(path)
    assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["images", "logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "BatchNormalization" not in {node.op_type for node in proto.graph.node}
    assert b".py" not in path.read_bytes()  # the exporter's stack traces, with the paths of this machine
    assert prove(network, path, images) == proof


def test_several_outputs_are_flattened(images: Tensor, tmp_path: Path) -> None:
    proof = to_onnx(Several(), images, tmp_path / "model.onnx")
    outputs = onnx.load(tmp_path / "model.onnx").graph.output
    assert [value.name for value in outputs] == ["out_0", "out_1", "out_2"] and proof.relative < 1e-5


def test_a_changed_file_is_not_the_network(images: Tensor, tmp_path: Path) -> None:
    model, path = Head(), tmp_path / "model.onnx"
    to_onnx(model, images, path)
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if "weight" in tensor.name)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += 0.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, path)
    with pytest.raises(ParityError, match=r"differs from the network by .* a share of .*; allowed is 0\.0001"):
        prove(model, path, images)
    assert prove(model, path, images, tolerance=0.5).relative > 1e-4
    with pytest.raises(ParityError, match="has 1 outputs, the network 3"):
        prove(Several(), path, images)
    with pytest.raises(ParityError, match=r"has shape \(1, 4\), the network's \(1, 2\)"):
        prove(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), path, images)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Head(scale=0.0), r"output 0 of model\.onnx at batch 1 is almost zero \(rms 0"),
        (Head(scale=float("nan")), "holds NaN or Inf of the network"),
        (FrozenBatch(), r"model\.onnx does not run at shape \(1, 3, 4, 4\)|has shape \(2, 4\)|is a batch size fixed"),
    ],
)
def test_a_failed_proof_leaves_no_file(model: nn.Module, text: str, images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("from an earlier run")
    with pytest.raises(ParityError, match=text):
        to_onnx(model, images, tmp_path / "model.onnx")
    assert_no_file(tmp_path)


def test_the_legacy_exporter_is_a_reported_fallback(
    images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    assert to_onnx(Branching(), images, path).exporter == "legacy"
    assert read_metadata(path)["exporter"] == "legacy"
    loud = [record.name for record in caplog.records if record.levelno >= logging.INFO]
    assert loud == ["compress.export"]
    assert "the dynamo exporter failed, trying the legacy one" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_what_no_exporter_can_express_leaves_no_file(images: Tensor, tmp_path: Path) -> None:
    class Unknown(Head):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.linalg.eigvals(x[:, 0]).real

    with pytest.raises(CompressError, match="neither ONNX exporter can express the network") as caught:
        to_onnx(Unknown(), images, tmp_path / "model.onnx")
    assert not isinstance(caught.value, ParityError)
    assert_no_file(tmp_path)


def test_a_network_too_large_for_one_file_is_refused(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "LARGEST", 100)
    with pytest.raises(CompressError, match="the network holds 784 bytes; one ONNX file can hold 100"):
        to_onnx(Head(), images, tmp_path / "model.onnx")
    assert_no_file(tmp_path)


def test_tiny_weights_become_zeros_and_are_counted(images: Tensor, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[0].weight[0] = 1e-39  # 27 denormals
        model[0].weight[1] = -1e-31  # 27 whose products may be
        model[0].weight[2] = 0.0
        model[0].weight[3] = 1e-20  # 27 that stay, until they are folded into the batch norm's factor
        model[1].weight[3] = 1e-15
    expected = model.eval()(images)
    assert to_onnx(model, images, tmp_path / "model.onnx").flushed == 81
    assert flush_tiny(model) == 0
    assert not model[0].weight[:3].any() and (model[0].weight[3] == 1e-20).all()
    assert torch.equal(model(images), expected)


def test_top1_is_counted_by_onnx_runtime_itself(images: Tensor, tmp_path: Path) -> None:
    model = Head()
    to_onnx(model, images, tmp_path / "model.onnx")
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 4
    batches = [(images[:3], labels[:3]), (images[3:], labels[3:])]
    assert metric(tmp_path / "model.onnx", batches, CLASSIFICATION) == 80.0
    with pytest.raises(CompressError, match="no images to measure the metric"):
        metric(tmp_path / "model.onnx", [], CLASSIFICATION)
    with pytest.raises(ParityError, match=r"does not run at shape \(1, 5\)"):
        list(predict(tmp_path / "model.onnx", [torch.zeros(1, 5)]))
    with pytest.raises(CompressError, match=r"example inputs of shape \(0, 3, 4, 4\) hold no batch"):
        prove(model, tmp_path / "model.onnx", images[:0])


def test_a_file_that_is_not_onnx_cannot_be_proved(images: Tensor, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nothing of the kind")
    for use in (lambda path: prove(Head(), path, images), read_metadata, lambda path: predict(path, [])):
        with pytest.raises(LoadError, match="is not an ONNX file"):
            use(tmp_path / "model.onnx")


def test_a_network_that_cannot_run_at_some_batch_is_refused(images: Tensor, tmp_path: Path) -> None:
    class OnlyTwo(Head):
        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.reshape(2, 48))

    with pytest.raises(ParityError, match=r"the network does not run at shape \(1, 3, 4, 4\)"):
        to_onnx(OnlyTwo(), images, tmp_path / "model.onnx")
    assert_no_file(tmp_path)


def test_the_wrapping_of_a_training_loop_is_undone(images: Tensor, tmp_path: Path) -> None:
    model = Head()
    to_onnx(model, images, tmp_path / "model.onnx")
    wrapped = accelerator("cpu", "bf16").prepare_model(Head())
    wrapped.load_state_dict(model.state_dict())
    assert prove(wrapped, tmp_path / "model.onnx", images).relative < 1e-5
    assert prove(torch.compile(model, backend="eager"), tmp_path / "model.onnx", images).relative < 1e-5


def test_an_output_that_ignores_its_input_is_reported(
    images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Head()
    nn.init.zeros_(model.linear.weight)
    to_onnx(model, images, tmp_path / "model.onnx")
    assert "gives the same output for different images" in caplog.text
