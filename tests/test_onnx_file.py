"""Sparse initialisers: the same network in fewer bytes, zero for zero."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from compress import export
from compress.export import predict, prove, to_onnx
from compress.onnx_file import READERS, count_weights, read_weights, skip_zeros
from tests.nets import lively

X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(density: float) -> nn.Module:
    """Every kind of weight there is: with norms behind, with groups, transposed, as a matrix; thinned at random."""
    torch.manual_seed(0)
    features = [
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
    ]
    features += [nn.ConvTranspose2d(64, 32, 2, 2), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=2), nn.BatchNorm2d(32)]
    model = lively(
        nn.Sequential(*features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 64), nn.Linear(64, 10))
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in (p for p in model.parameters() if p.dim() > 1):
            tensor.mul_((torch.rand(tensor.shape, generator=generator) < density) / density**0.5)
    return model


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path, Path]:
    """A network of density 0.05 with its dense and its sparse file."""
    model, folder = network(0.05), tmp_path_factory.mktemp("onnx")
    to_onnx(model, X, folder / "dense.onnx")
    to_onnx(model, X, folder / "sparse.onnx", sparse=True)
    return model, folder / "dense.onnx", folder / "sparse.onnx"


def test_the_file_shrinks_and_is_still_the_network(pair: tuple[nn.Module, Path, Path]) -> None:
    model, dense, sparse = pair
    floats = 4 * sum(tensor.numel() for tensor in weights(model).values())
    saved = dense.stat().st_size - sparse.stat().st_size
    assert saved > (1 - 0.05 * 8 / 4) * floats * 0.98  # four bytes a value and less than four an index
    proof = prove(model, sparse, X)
    assert proof.relative < 1e-5 and proof.batches == (1, 2, 17)
    both = [np.concatenate(list(predict(path, [X]))) for path in (dense, sparse)]
    assert np.array_equal(*both)
    onnx.checker.check_model(onnx.load(sparse))


def test_every_zero_survives_the_export(pair: tuple[nn.Module, Path, Path]) -> None:
    """Folding a batch norm into a filter multiplies it: zeros stay zeros, and nothing else becomes one."""
    model, dense, sparse = pair
    for path in (dense, sparse):
        found = read_weights(path)
        assert found.keys() == weights(model).keys()
        for name, tensor in weights(model).items():
            assert np.array_equal(found[name] != 0, tensor.numpy() != 0), name
        counted = count_weights(path)
        assert counted.nonzero == sum(int(tensor.count_nonzero()) for tensor in weights(model).values())
        assert counted.total == sum(tensor.numel() for tensor in weights(model).values())
        assert counted.sparse_tensors == (6 if path is sparse else 0)


def test_what_is_written_is_coo_and_ascending(pair: tuple[nn.Module, Path, Path]) -> None:
    graph = onnx.load(pair[2]).graph
    read = {name for node in graph.node if node.op_type in READERS for name in node.input}
    dense = {tensor.name for tensor in graph.initializer}
    for stored in graph.sparse_initializer:
        places = onnx.numpy_helper.to_array(stored.indices)
        assert places.ndim == 1 and (np.diff(places) > 0).all() and places[-1] < np.prod(stored.dims)
        assert stored.values.name in read - dense
        assert stored.values.name not in {value.name for value in (*graph.value_info, *graph.input)}


def test_onnx_runtime_sees_constant_weights_in_either_file(pair: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    """Loaded, the two are one: fused and packed alike, so that neither is slower by its form."""
    optimised = []
    for path in pair[1:]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / path.name)
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        optimised.append(onnx.load(tmp_path / path.name).graph)
    assert [node.op_type for node in optimised[0].node] == [node.op_type for node in optimised[1].node]
    assert {n.name for n in optimised[0].node} == {n.name for n in optimised[1].node}


def test_weights_with_few_zeros_stay_as_they_are(tmp_path: Path) -> None:
    model = network(0.9)
    to_onnx(model, X, tmp_path / "dense.onnx")
    to_onnx(model, X, tmp_path / "model.onnx", sparse=True)
    assert count_weights(tmp_path / "model.onnx").sparse_tensors == 0
    assert (tmp_path / "model.onnx").read_bytes() == (tmp_path / "dense.onnx").read_bytes()


def test_a_layer_of_zeros_can_be_loaded(tmp_path: Path) -> None:
    model = network(0.5)
    with torch.no_grad():
        model[3].weight.zero_()
    assert to_onnx(model, X, tmp_path / "model.onnx", sparse=True).relative < 1e-5
    assert not read_weights(tmp_path / "model.onnx")["3.weight"].any()


def test_the_legacy_exporter_writes_sparse_files_too(tmp_path: Path) -> None:
    class Branching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > -1e9 else x

    model = Branching(*network(0.05))
    assert to_onnx(model, X, tmp_path / "model.onnx", sparse=True).exporter == "legacy"
    counted = count_weights(tmp_path / "model.onnx")
    assert counted.sparse_tensors == 6
    assert counted.nonzero == sum(int(tensor.count_nonzero()) for tensor in weights(model).values())
    assert export.read_metadata(tmp_path / "model.onnx")["tool"] == "compress-to-onnx"


@pytest.mark.parametrize(("rows", "taken"), [(["N", 3], 1), ([1, 3], 0)])
def test_zeros_that_only_widen_stay_and_others_leave(rows: list[object], taken: int) -> None:
    make = onnx.helper
    given = make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, rows)
    asked = make.make_tensor_value_info("shape", onnx.TensorProto.INT64, [2])
    sums = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 3]) for name in ("sum", "out")]
    nodes = [
        make.make_node("Expand", ["zero", "shape"], ["zeros"]),
        make.make_node("Add", ["zeros", "x"], ["sum"]),
        make.make_node("Relu", ["sum"], ["out"]),
    ]
    zero = onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")
    graph = make.make_graph(nodes, "g", [given, asked], sums[1:], [zero], value_info=sums[:1])
    assert skip_zeros(graph) == taken
    assert [node.op_type for node in graph.node] == (["Relu"] if taken else ["Expand", "Add", "Relu"])
    assert graph.node[-1].input[0] == ("x" if taken else "sum") and len(graph.initializer) == 1 - taken
