"""--arch: what it may name, what the weights tell, and what is refused."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress.checkpoint import Checkpoint, ModelInfo, load_into, read, save
from compress.cli.arch import parse_arch_args, resolve
from compress.errors import CompressError, LoadError, UsageError
from compress.models import ARCHS

MINE = """
import sys
from torch import nn
VALUE = 3
BUILT = nn.Linear(1, 1)
def small(num_classes=10, in_channels=3, width=4):
    return nn.Sequential(nn.Conv2d(in_channels, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, num_classes))
def reads(num_classes=10):
    return nn.Linear(int(nn.Linear(3, 3).weight.isfinite().sum().item()) // 3, num_classes)
def text():
    return "network"
def fails():
    raise ValueError("no\\nway")
def leaves():
    sys.exit(3)
def needs(depth):
    return nn.Linear(depth, depth)
"""


def _checkpoint(tensors: dict[str, Tensor], info: ModelInfo | None = None) -> Checkpoint:
    return Checkpoint(tensors, info or ModelInfo(), "", Path("FILE"), 0)


def _of(model: nn.Module, info: ModelInfo | None = None) -> Checkpoint:
    return _checkpoint(dict(model.state_dict()), info)


def _refusal(spec: str | None, checkpoint: Checkpoint | None = None, kind: type[CompressError] = LoadError,
             **arguments: Any) -> str:  # fmt: skip
    with pytest.raises(kind) as error:
        resolve(spec, arguments, checkpoint)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is the current one and holds the user's `models/mine.py`."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").touch()
    (tmp_path / "models" / "mine.py").write_text(MINE)
    (tmp_path / "models" / "beside.py").write_text("from mine import small\n")
    (tmp_path / "models" / "wrong.py").write_text("import nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("models", "models.mine", "mine"):
        sys.modules.pop(name, None)


# Without --arch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHS)
def test_ours_are_found_by_their_shapes(name: str) -> None:
    model = ARCHS[name](num_classes=7, in_channels=1)
    dense = {n: v for n, v in model.state_dict().items() if "num_batches" not in n}
    if not name.endswith("_b"):
        dense = {n: v for n, v in dense.items() if "shortcut" not in n}
    checkpoint = _checkpoint(dict(sorted(dense.items())))  # safetensors sorts
    resolved = resolve(None, {}, checkpoint)
    assert (resolved.name, resolved.kwargs) == (name, {"num_classes": 7, "in_channels": 1})
    assert resolved.input_size == (1, 32, 32)
    assert resolved.note == (
        f"the weights have the names and shapes of {name}; from the weights: num_classes=7, in_channels=1"
    )
    load_into(resolved.model, checkpoint)


def test_a_real_checkpoint(shared: Path) -> None:
    checkpoint = read(shared / "checkpoints/resnet56-4bfd9763.th")
    resolved = resolve(None, {}, checkpoint)
    load_into(resolved.model, checkpoint)
    assert (resolved.name, resolved.kwargs) == ("resnet56", {"num_classes": 10, "in_channels": 3})


def test_the_metadata_of_our_own_files(tmp_path: Path) -> None:
    info = ModelInfo(
        arch="resnet20", arch_kwargs={"num_classes": 3, "in_channels": 1}, input_size=(1, 8, 8), mean=(0.5,), std=(0.2,)
    )
    save(tmp_path / "a.safetensors", ARCHS["resnet20"](3, 1), info)
    resolved = resolve(None, {}, read(tmp_path / "a.safetensors"))
    assert (resolved.name, resolved.kwargs, resolved.note) == ("resnet20", info.arch_kwargs, None)
    assert (resolved.input_size, resolved.mean, resolved.std) == ((1, 8, 8), (0.5,), (0.2,))


def test_metadata_does_not_name_code(mine: Path) -> None:
    checkpoint = _checkpoint({"a": torch.ones(1)}, ModelInfo(arch="os:getcwd"))
    assert _refusal(None, checkpoint) == "FILE was made by the code 'os:getcwd': if you trust it, say --arch os:getcwd"
    info = ModelInfo(arch="models.mine:small", arch_kwargs={"width": 6, "num_classes": 2})
    resolved = resolve("models.mine:small", {"num_classes": 5}, _checkpoint({}, info))
    assert resolved.kwargs == {"width": 6, "num_classes": 5}


def test_nothing_of_ours_fits() -> None:
    text = _refusal(None, _checkpoint({"a": torch.ones(1)}))
    assert text.startswith("the weights in FILE fit none of our architectures: say --arch with one of resnet20, ")
    assert text.endswith("hf:REPO_OR_DIR, pkg.module:function or path/to/file.py:function")
    text = _refusal(None, _checkpoint({"a": torch.ones(1)}, ModelInfo(arch="resnet50")))
    assert "(it calls itself 'resnet50': timm:resnet50 or torchvision:resnet50?): say" in text
    cut = {**ARCHS["resnet20"]().state_dict(), "layer1.0.conv1.weight": torch.ones(9, 16, 3, 3)}
    assert "fit none" in _refusal(None, _checkpoint(cut))


def test_several_of_ours_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHS, "twin", ARCHS["resnet20"])
    text = _refusal(None, _of(ARCHS["resnet20"]()))
    assert text == "the weights in FILE fit several of our architectures, resnet20, twin: say --arch with one of them"


def test_nothing_is_given() -> None:
    assert _refusal(None).startswith("no architecture is given: say --arch with one of resnet20, ")


# Ours and the user's -------------------------------------------------------------------------------------------------


def test_a_name_of_ours_and_its_arguments() -> None:
    resolved = resolve("resnet20", {"num_classes": 4}, None)
    assert resolved.kwargs == {"num_classes": 4} and resolved.note is None
    assert resolved.model(torch.randn(1, 3, 8, 8)).shape == (1, 4)


def test_a_misspelled_name() -> None:
    assert _refusal("resnet65").startswith("--arch 'resnet65' is unknown (did you mean resnet56")
    assert "resnet20 could not be built with {'depth': 3}: TypeError: " in _refusal("resnet20", depth=3)


@pytest.mark.parametrize("spec", ["models.mine:small", "models/mine.py:small", "models/beside.py:small"])
def test_the_users_function(mine: Path, spec: str) -> None:
    path = list(sys.path)
    checkpoint = _of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.ReLU(), nn.Linear(4, 6)))
    resolved = resolve(spec, {}, checkpoint)
    assert resolved.kwargs == {"num_classes": 6, "in_channels": 1}
    assert resolved.input_size is None
    load_into(resolved.model, checkpoint)
    assert sys.path == path


def test_a_builder_that_cannot_run_without_memory(mine: Path) -> None:
    assert resolve("models.mine:reads", {}, _of(nn.Linear(3, 6))).kwargs == {"num_classes": 6}


def test_a_wrapped_network_keeps_the_inference(tmp_path: Path, mine: Path) -> None:
    (mine / "wrapped.py").write_text(
        "from torch import nn\ndef net(num_classes=10): return nn.ModuleDict({'model': nn.Linear(3, num_classes)})"
    )
    torch.save(nn.ModuleDict({"model": nn.Linear(3, 6)}).state_dict(), tmp_path / "a.pt")
    assert resolve("wrapped.py:net", {}, read(tmp_path / "a.pt")).kwargs == {"num_classes": 6}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("models.mine:smal", "--arch models.mine:smal: models.mine has no 'smal' (did you mean small?)"),
        ("models.mine:VALUE", "--arch models.mine:VALUE: VALUE is a int: name a function that builds the network"),
        ("models.mine:BUILT", "--arch models.mine:BUILT: BUILT is a Linear: name a function that builds the network"),
        ("models.mine:text", "models.mine:text returned a str, not a torch.nn.Module: name a function that builds one"),
        ("models.mine:fails", "models.mine:fails could not be built with {}: ValueError: no way; see --arch-arg"),
        ("models.mine:leaves", "models.mine:leaves could not be built with {}: SystemExit: 3; see --arch-arg"),
        ("models.mine:needs", "TypeError: needs() missing 1 required positional argument: 'depth'; see --arch-arg"),
        ("models.none:net", "models.none cannot be imported: ModuleNotFoundError: No module named 'models.none'"),
        ("models/wrong.py:net", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("none.py:net", "--arch none.py:net: none.py cannot be imported: FileNotFoundError: there is no file none.py"),
    ],
)
def test_what_the_user_can_get_wrong(mine: Path, name: str, text: str) -> None:
    assert text in _refusal(name)


def test_the_random_state_is_not_touched(mine: Path) -> None:
    ours, users = _of(ARCHS["resnet20"]()), _of(nn.Linear(3, 6))
    before = torch.get_rng_state(), random.getstate()
    resolve(None, {}, ours)
    resolve("models.mine:reads", {}, users)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_seed_decides_the_first_weights() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(3)
        weights.append(resolve("resnet20", {}, None).model.get_parameter("linear.weight"))
    assert torch.equal(*weights)


# timm and torchvision ------------------------------------------------------------------------------------------------


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    checkpoint = _of(timm.create_model("resnet18", num_classes=5, in_chans=1))
    resolved = resolve("timm:resnet18", {}, checkpoint)
    assert resolved.kwargs == {"num_classes": 5, "in_chans": 1}
    assert (resolved.input_size, resolved.mean) == ((1, 224, 224), None)
    load_into(resolved.model, checkpoint)
    own = resolve("timm:resnet18", {}, None)
    assert own.mean == (0.485, 0.456, 0.406) and own.labels is not None and own.labels[0].startswith("tench")
    other = resolve("timm:mixer_s16_224", {"num_classes": 10}, None)  # it has a normalisation of its own
    assert (other.mean, other.labels) == ((0.5, 0.5, 0.5), None)
    assert resolve("timm:test_vit", {}, None).input_size == (3, 160, 160)
    assert _refusal("timm:resnet19").startswith("timm has no network 'resnet19' (did you mean resnet1")
    text = _refusal("timm:resnet18", kind=UsageError, pretrained=True)
    assert text == "--arch-arg pretrained is not allowed: the weights come from the checkpoint; leave it out"
    info = ModelInfo(arch="timm:resnet18", arch_kwargs={"checkpoint_path": "evil.pth"})
    with pytest.raises(LoadError, match="with checkpoint_path, which would bring weights or run code: not allowed"):
        resolve(None, {}, replace(checkpoint, info=info))


def test_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    checkpoint = _of(torchvision.models.resnet18(num_classes=5))
    resolved = resolve("torchvision:resnet18", {}, checkpoint)
    assert (resolved.kwargs, resolved.input_size, resolved.labels) == ({"num_classes": 5}, (3, 224, 224), None)
    load_into(resolved.model, checkpoint)
    own = resolve("torchvision:efficientnet_b1", {}, None)  # its weights were made for a size of their own
    assert own.input_size == (3, 240, 240) and own.labels is not None and own.labels[0] == "tench"
    parts = resolve("torchvision:lraspp_mobilenet_v3_large", {}, None)
    assert parts.input_size == (3, 520, 520) and parts.labels is not None and len(parts.labels) == 21
    assert resolve("torchvision:ssdlite320_mobilenet_v3_large", {}, None).std == (1.0, 1.0, 1.0)
    assert "torchvision has no network 'resnet19' (did you mean resnet" in _refusal("torchvision:resnet19")


@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_an_absent_package(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    text = _refusal(f"{package}:resnet18", kind=UsageError)
    assert text == f'{package} is not installed: pip install "compress-to-onnx[{package}]"'


def test_a_package_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    text = _refusal("timm:resnet18", kind=UsageError)
    assert text.startswith(f"timm is installed but does not fit torch {torch.__version__}: operator torchvision::nms")


# --arch-arg ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100", 100), ("-1", -1), ("0.5", 0.5), ("1e-3", 0.001), ("true", True), ("False", False), ("none", "none"),
        ("null", None), ("None", None), ("relu", "relu"), ('"1"', "1"), ("a=b", "a=b"), ("", ""), ("NaN", "NaN"),
        ("[1]", "[1]"), ("1_0", "1_0"),
    ],
)  # fmt: skip
def test_arguments_are_typed(text: str, value: object) -> None:
    found = parse_arch_args([f"key={text}"])["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["width"], "--arch-arg 'width' is not of the form key=value: write for example num_classes=100"),
        (["a-b=1"], "--arch-arg 'a-b=1' is not of the form key=value: write for example num_classes=100"),
        (["a=1", "a=2"], "--arch-arg a is given twice: give it once"),
    ],
)
def test_arguments_that_are_refused(values: Sequence[str], text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_arch_args(values)
    assert str(error.value) == text
