"""Every runtime gives the network's outputs, or a reason in one line; none passes work on quietly."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compress.bench import RUNTIMES, Network, Runtime, benchmark, open_on, runtimes, session
from compress.bench.child import draw
from compress.bench.fresh import measure_fresh
from compress.errors import LoadError, MeasureError
from compress.recipe import BenchPart

pytestmark = pytest.mark.alone
ONNX = [name for name, adapter in RUNTIMES.items() if adapter.takes is Path]
TORCH = [name for name, adapter in RUNTIMES.items() if adapter.takes is Network]


class Small(nn.Module):
    """A convolution and a mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.conv(images).relu().mean((2, 3), keepdim=True)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "small.safetensors"
    path.write_bytes(b"weights")
    return Network(path, Small().eval(), (3, 9, 9))


@pytest.fixture(scope="module")
def file(network: Network) -> Path:
    """The same network as ONNX, written by hand."""
    path = network.path.with_suffix(".onnx")
    nodes = [
        helper.make_node("Conv", ["images", "weight", "bias"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("GlobalAveragePool", ["z"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("images", TensorProto.FLOAT, ("batch", 3, 9, 9))],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(p.detach().numpy(), name) for name, p in network.module.conv.named_parameters()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_one_list_of_runtimes() -> None:
    assert tuple(RUNTIMES) == get_args(Runtime)
    allowed = get_args(BenchPart.model_fields["runtime"].annotation)
    assert list(allowed) == ONNX, "a run measures its ONNX files"


@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if name != "torch-compile-cpu"])
def test_a_runtime_gives_the_networks_outputs_and_times_them(runtime: Runtime, file: Path, network: Network) -> None:
    if reason := runtimes.inactive(runtime):
        pytest.skip(reason)
    opened = open_on(runtime, file if RUNTIMES[runtime].takes is Path else network, threads=2)
    signature = opened.signature(batch=5)
    assert signature == (("images", (5, 3, 9, 9), "float32"),)
    feeds = draw(signature, seed=3)
    with torch.no_grad():
        expected = network.module(torch.from_numpy(feeds["images"])).numpy()
    for _ in range(2):
        (found,) = opened.run(feeds)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        times = [once() for once in [opened.timed(feeds)] for _ in range(3)]
        assert all(0 < ms < 1000 for ms in times)


def test_bound_memory_gives_the_same_outputs(file: Path, network: Network) -> None:
    opened = session.open_session(file, threads=1)
    bound = session.OrtSession(opened, "cpu")
    feeds = draw(bound.signature(batch=2), seed=0)
    assert bound.timed(feeds)() > 0
    binding = opened.io_binding()
    binding.bind_cpu_input("images", feeds["images"])
    binding.bind_output("logits", "cpu")
    opened.run_with_iobinding(binding)
    np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], bound.run(feeds)[0])


def test_a_provider_that_leaves_nodes_to_the_cpu_is_an_error(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("no provider here that starts and takes no node")
    monkeypatch.setitem(session.PROVIDERS, "ort-cuda", "AzureExecutionProvider")
    with pytest.raises(
        MeasureError, match=r"ort-cuda .* does not take all of small.onnx .* run on the CPU; use ort-cpu"
    ):
        session.open_session(file, threads=1, runtime="ort-cuda")
    assert "AzureExecutionProvider does not start" in str(session.inactive("ort-cuda"))


def test_what_a_runtime_lacks_is_said_with_the_remedy(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    runtimes.inactive.cache_clear()
    with pytest.raises(
        MeasureError, match=r'here: openvino is not installed; pip install "compress-to-onnx\[openvino\]"'
    ):
        open_on("openvino", file)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    runtimes.inactive.cache_clear()
    assert "no g++ or clang++" in str(runtimes.inactive("torch-compile-cpu"))
    runtimes.inactive.cache_clear()


def test_what_a_runtime_does_not_take_is_refused(file: Path, network: Network, tmp_path: Path) -> None:
    with pytest.raises(
        MeasureError, match=r"runtime torch-cpu takes a network \(compress.bench.Network\), not small.onnx"
    ):
        benchmark([file], runtime="torch-cpu")
    with pytest.raises(MeasureError, match=r"runtime openvino takes an ONNX file, not small.safetensors"):
        benchmark([network], runtime="openvino")
    if runtimes.inactive("openvino") is None:
        with pytest.raises(LoadError, match="is not a file"):
            open_on("openvino", tmp_path)
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(b"no protobuf")
        with pytest.raises(LoadError, match=r"broken.onnx is not an ONNX file that OpenVINO can load"):
            open_on("openvino", broken)


@pytest.mark.alone
def test_openvino_loads_in_a_fresh_process(file: Path) -> None:
    if reason := runtimes.inactive("openvino"):
        pytest.skip(reason)
    found = measure_fresh(file, signature=(("images", (2, 3, 9, 9), "float32"),), threads=1, runtime="openvino")
    assert found.load_ms > 0 and found.first_ms > 0 and found.peak_memory_bytes > 0


@pytest.mark.slow
def test_a_compiled_network_is_measured(network: Network) -> None:
    if reason := runtimes.inactive("torch-compile-cpu"):
        pytest.skip(reason)
    opened = open_on("torch-compile-cpu", network)
    feeds = draw(opened.signature(batch=2), seed=0)
    with torch.no_grad():
        expected = network.module(torch.from_numpy(feeds["images"])).numpy()
    np.testing.assert_allclose(opened.run(feeds)[0], expected, rtol=1e-5, atol=1e-6)
    before = [tensor.data_ptr() for tensor in opened.module.parameters()]  # type: ignore[attr-defined]
    assert opened.timed(feeds)() < 1000
    assert all(new.data_ptr() != old for new, old in zip(opened.module.parameters(), before, strict=True))  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if not name.endswith("cpu") and name != "openvino"])
def test_a_gpu_is_measured_where_it_is_active(runtime: Runtime, file: Path, network: Network) -> None:
    if reason := runtimes.inactive(runtime):
        pytest.skip(reason)
    source = network if runtime in TORCH else file
    found = benchmark([source, source], runtime=runtime, rounds=5, seconds=10)
    assert found.measurements[0].latency.runtime == runtime and found.measurements[0].latency.p50 > 0
