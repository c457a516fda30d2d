"""Reading anybody's weights without unpickling, and save -> restore bit for bit."""

from __future__ import annotations

import copy
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, ModelInfo, load_into, read, save, save_pt
from compress.errors import LoadError
from compress.files import atomic_path, atomic_write
from compress.models import resnet20
from compress.structure import resize, underived

INFO = ModelInfo(
    arch="resnet20", arch_kwargs={"num_classes": 10, "in_channels": 1}, input_size=(1, 8, 8), labels=tuple("abc"),
    mean=(0.5,), std=(0.25,), data="digits", origin={"method": "halo", "seed": 1, "source": {"sha256": "00"}},
)  # fmt: skip


class Net(nn.Module):
    """Small, with a buffer, a depthwise convolution and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.bn = nn.BatchNorm2d(8)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.depthwise(self.conv(x))).mean((2, 3))
        return self.second(self.first(y))  # type: ignore[no-any-return]


def _is_equal(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def _refusal(path: Path) -> str:
    with pytest.raises(LoadError) as error:
        read(path)
    text = str(error.value)
    assert "\n" not in text
    return text.replace(str(path), "FILE")


# Reading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_state_dict", "net", "ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module."])
def test_wrappers_and_prefixes(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    model, path = Net(), tmp_path / "weights.pt"
    state: dict[str, Any] = {prefix + name: value for name, value in model.state_dict().items()}
    torch.save({wrapper: state, "epoch": 3, "best": 1.5} if wrapper else state, path)
    restored = Net()
    load_into(restored, read(path))
    assert _is_equal(model, restored)


@pytest.mark.parametrize("is_zip", [True, False])
def test_zip_and_older_format(tmp_path: Path, is_zip: bool) -> None:
    model, path = Net(), tmp_path / "weights.th"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=is_zip)
    restored = Net()
    load_into(restored, read(path))
    assert _is_equal(model, restored)


def test_foreign_safetensors_and_what_is_told_about_the_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata={"format": "pt"})
    checkpoint = read(path)
    assert checkpoint.info == ModelInfo()
    assert checkpoint.size_bytes == path.stat().st_size
    assert len(checkpoint.sha256) == 64


def test_a_model_whose_own_names_begin_with_a_prefix(tmp_path: Path) -> None:
    model, path = nn.ModuleDict({"model": Net()}), tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    restored = nn.ModuleDict({"model": Net()})
    load_into(restored, read(path))
    assert _is_equal(model, restored)


def test_averaged_and_compiled_names(tmp_path: Path) -> None:
    model, path = Net(), tmp_path / "weights.pt"
    averaged = torch.optim.swa_utils.AveragedModel(model)
    state = {name.replace("conv.", "conv._orig_mod."): value for name, value in averaged.state_dict().items()}
    torch.save(state, path)
    assert read(path).tensors.keys() == model.state_dict().keys()


def test_tensors_saved_on_a_gpu(shared: Path) -> None:
    checkpoint = read(shared / "checkpoints/resnet20-12fca82f.th")
    assert {value.device.type for value in checkpoint.tensors.values()} == {"cpu"}
    assert len(checkpoint.tensors) == 97 and "linear.weight" in checkpoint.tensors


def test_the_architecture_a_foreign_file_names_is_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"arch": "resnet50", "data": 3, "labels": "x", "state_dict": {"a": torch.ones(1)}}, path)
    assert read(path).info == ModelInfo(arch="resnet50")


def test_half_precision_is_converted(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(Net().half().state_dict(), path)
    restored = Net()
    load_into(restored, read(path))
    assert restored.conv.weight.dtype == torch.float32


# Refusing ------------------------------------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (exec, (f"open({str(self.target)!r}, 'w').close()",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_malicious_pickle_does_not_run(tmp_path: Path, is_zip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, proof = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": Payload(proof)}, path, _use_new_zipfile_serialization=is_zip)
    torch.load(path, weights_only=False)
    assert proof.exists()  # the payload works where pickles are executed
    proof.unlink()
    assert "refers to exec, and pickles are never executed" in _refusal(path)
    assert not proof.exists()


def test_a_bare_pickle_does_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "weights.pkl", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Payload(proof)))
    _refusal(path)
    assert not proof.exists()


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickled_network(tmp_path: Path, is_zip: bool) -> None:
    path = tmp_path / "network.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path, _use_new_zipfile_serialization=is_zip)
    assert _refusal(path) == (
        "FILE is a pickle that refers to torch.nn.modules.container.Sequential, and pickles are never executed: in the "
        'program that made the file, save the weights alone with torch.save(model.state_dict(), "weights.pt")'
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))  # type: ignore[no-untyped-call]
    assert _refusal(path).startswith("FILE is a TorchScript program, not weights: save the state dict")


def test_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("program/archive_format", "pt2")
    assert _refusal(path).startswith("FILE is a torch.export program, not weights")


def test_absent_folder_empty_and_unreadable(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "none.pt") == "FILE does not exist: check the path of the checkpoint"
    assert _refusal(tmp_path) == "FILE is a folder: give the checkpoint file in it"
    (tmp_path / "empty.pt").touch()
    assert _refusal(tmp_path / "empty.pt") == "FILE is empty: copy or download it again"
    (tmp_path / "file").touch()
    assert _refusal(tmp_path / "file" / "weights.pt") == "FILE cannot be read: Not a directory"


def test_other_kinds_of_file(tmp_path: Path) -> None:
    for name, content, text in (
        ("a.pt", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the weights: run git"),
        ("a.onnx", b"\x08\x07", "is an ONNX file, which cannot be trained: give the checkpoint it was made from"),
        ("b.pt", b"<!doctype html><html>", "(21 bytes) is truncated, damaged or no PyTorch checkpoint: copy or"),
    ):
        (tmp_path / name).write_bytes(content)
        assert text in _refusal(tmp_path / name)


def test_no_state_dict_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, text in (
        ([torch.ones(1)], "FILE holds a list, not a state dict: save it with torch.save"),
        ({"epoch": 1, "w": {"a": torch.ones(1)}, "c": 2, "d": 3}, "it has the keys epoch, w, c, ... (4 in all);"),
        ({}, "it has the keys none; allowed are a state dict, or a dict holding one under state_dict, model, "),
        ({"a": torch.ones(1), "epoch": 1}, "FILE mixes tensors with other values (epoch): save weights only, with"),
    ):
        torch.save(content, path)
        assert text in _refusal(path)
    safetensors.torch.save_file({}, tmp_path / "a.safetensors")
    assert _refusal(tmp_path / "a.safetensors").startswith("FILE holds no tensor")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf(tmp_path: Path, value: float) -> None:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2), "b": torch.tensor([1.0, value]), "n": torch.tensor(3)}, path)
    assert _refusal(path) == "FILE has NaN or Inf in 1 of 3 tensors, first b: use an earlier checkpoint"


def test_tensors_without_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for value in (torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")):
        torch.save({"a": value}, path)
        assert _refusal(path) == "FILE has a sparse, quantised or empty tensor, a: save the dense float weights"


def _contents() -> list[bytes]:
    zipped, older = io.BytesIO(), io.BytesIO()
    state = nn.Conv2d(3, 4, 3).state_dict()
    torch.save(state, zipped)
    torch.save(state, older, _use_new_zipfile_serialization=False)
    return [zipped.getvalue(), older.getvalue(), safetensors.torch.save(dict(state), {"compress": '{"compress": 1}'})]


CONTENTS = _contents()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), share=st.floats(0, 1, exclude_max=True))
def test_any_truncation_is_refused(tmp_path: Path, which: int, share: float) -> None:
    content = CONTENTS[which]
    path = tmp_path / "a.pt"
    path.write_bytes(content[: int(share * len(content))])
    # Cut inside a name, the older format refers to something unknown.
    text = _refusal(path)
    assert "truncated" in text or "is empty" in text or "refers to" in text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(which=st.integers(0, 2), place=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_byte_is_read_or_refused(tmp_path: Path, which: int, place: int, value: int) -> None:
    content = bytearray(CONTENTS[which])
    content[place] = value
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    try:
        read(path)
    except LoadError as error:
        assert "\n" not in str(error)


# Filling a network ---------------------------------------------------------------------------------------------------


def _from_memory(tensors: dict[str, Tensor], info: ModelInfo | None = None, **integers: dict[str, int]) -> Checkpoint:
    return Checkpoint(tensors, info or ModelInfo(), "", Path("FILE"), 0, integers)


def _misfit(model: nn.Module, checkpoint: Checkpoint) -> str:
    with pytest.raises(LoadError) as error:
        load_into(model, checkpoint)
    return str(error.value)


@pytest.mark.parametrize("pruned", [True, False])
def test_missing_and_unexpected(pruned: bool) -> None:
    state = Net().state_dict()
    absent = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "conv.weight")
    tensors = {name: value for name, value in state.items() if name not in absent}
    tensors["extra"] = torch.ones(1)
    names = "conv.weight, bn.weight, bn.bias, ..."
    assert _misfit(Net(), _from_memory(tensors, ModelInfo(pruned=pruned))) == (
        f"FILE does not fit the network: 5 names ({names}) missing, 1 name (extra) unexpected; "
        "name the architecture it was saved from with --arch"
    )


def test_other_shapes_in_a_foreign_file() -> None:
    tensors = dict(Net().state_dict())
    tensors["conv.weight"] = torch.ones(8, 1, 3, 3)
    assert _misfit(Net(), _from_memory(tensors)) == (
        "FILE has 1 tensors of other shapes than the network: conv.weight is (8, 1, 3, 3), not (8, 3, 3, 3); "
        "give the matching --arch and --arch-arg"
    )


def test_integers_the_network_does_not_have() -> None:
    checkpoint = _from_memory(dict(Net().state_dict()), ModelInfo(pruned=True), conv={"heads": 2})
    assert _misfit(Net(), checkpoint) == "FILE sets conv.heads, which the network does not have: check --arch"


def test_tensors_are_copied() -> None:
    state = {name: value.clone() for name, value in Net().state_dict().items()}
    for info in (ModelInfo(), ModelInfo(pruned=True)):
        model = Net()
        load_into(model, _from_memory(state, info))
        with torch.no_grad():
            model.conv.weight.zero_()
        assert state["conv.weight"].abs().sum() > 0


# Saving --------------------------------------------------------------------------------------------------------------


def _cut(model: nn.Module) -> None:
    """Three of eight channels leave `conv` and what depends on it; the classifier narrows with them."""
    keep = torch.tensor([0, 2, 3, 5, 7])
    state = model.state_dict()
    cut = {name: value[keep] for name, value in state.items() if value.dim() and name.startswith(("conv", "dep", "bn"))}
    resize(model, {**cut, "first.weight": state["first.weight"][keep][:, keep]})


@pytest.mark.parametrize("writer", [save, save_pt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_pruned_network_restores_bit_equal(tmp_path: Path, writer: Callable[..., None], dtype: torch.dtype) -> None:
    model, path = Net().to(dtype).eval(), tmp_path / "pruned.safetensors"
    _cut(model)
    info = INFO.model_copy(update={"pruned": True})
    writer(path, model, info)
    restored = Net().eval()
    checkpoint = read(path)
    assert checkpoint.info == info
    load_into(restored, checkpoint)
    assert _is_equal(model, restored)
    assert restored.first.weight is restored.second.weight
    assert restored.depthwise.groups == 5
    x = torch.randn(2, 3, 9, 9, dtype=dtype)
    assert torch.equal(model(x), restored(x))


@pytest.mark.parametrize("writer", [save, save_pt])
def test_integers_that_tensors_do_not_tell(tmp_path: Path, writer: Callable[..., None]) -> None:
    dense = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4, bias=False), nn.Conv2d(8, 4, 1))
    cut = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2, bias=False), nn.Conv2d(4, 4, 1))
    writer(tmp_path / "a", cut, ModelInfo(pruned=True), integers=underived(cut, dense))
    restored = copy.deepcopy(dense)
    load_into(restored, read(tmp_path / "a"))
    x = torch.randn(1, 4, 3, 3)
    assert torch.equal(cut(x), restored(x))


@pytest.mark.parametrize("writer", [save, save_pt])
def test_a_dense_network_in_channels_last(tmp_path: Path, writer: Callable[..., None]) -> None:
    model = resnet20(in_channels=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    writer(tmp_path / "a", model, INFO)
    checkpoint = read(tmp_path / "a")
    assert all(value.is_contiguous() for value in checkpoint.tensors.values())
    restored = resnet20(in_channels=1)
    load_into(restored, checkpoint)
    assert _is_equal(model, restored)
    assert not restored.get_parameter("layer2.0.shortcut.weight").requires_grad


def test_our_pt_is_a_plain_dict(tmp_path: Path) -> None:
    save_pt(tmp_path / "a.pt", Net(), INFO)
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["arch"] == "resnet20" and content["data"] == "digits" and content["mean"] == [0.5]
    assert content["state_dict"].keys() == Net().state_dict().keys()


@pytest.mark.parametrize("writer", [save, save_pt])
def test_the_same_network_is_the_same_file(tmp_path: Path, writer: Callable[..., None]) -> None:
    model = Net()
    writer(tmp_path / "a", model, INFO)
    writer(tmp_path / "b", model, INFO)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def _with_header(path: Path, text: str) -> Path:
    safetensors.torch.save_file({"a": torch.ones(1)}, path, metadata={"compress": text})
    return path


def test_headers_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for header, text in (
        ('{"compress": 3}', "FILE has format 3, and this version reads up to 2: upgrade compress-to-onnx"),
        ("{", "FILE has a damaged header: it is no JSON; save it again"),
        (
            '{"compress": 1, "input_size": [3, 32]}',
            "FILE has a damaged header: input_size.2: Field required; save it again",
        ),
        ('{"compress": 1, "aliases": [1]}', "FILE has a damaged header: aliases: Input should be a valid dictionary;"),
    ):
        assert text in _refusal(_with_header(path, header))


def test_a_header_of_wrong_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**40) + json.dumps({}).encode())
    assert "is truncated, damaged" in _refusal(path)


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> int:
            return 3

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(LoadError) as error:
        save(tmp_path / "a", Extra(2, 2), ModelInfo())
    assert str(error.value) == "_extra_state of the network is a int, not a tensor, and cannot be saved"
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    atomic_write(path, "old ü")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".txt"
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old ü"
    assert list(tmp_path.iterdir()) == [path]
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_bytes() == b"new"
