"""hf:REPO_OR_DIR: image classifiers of transformers, from a folder to a pruned file that needs the folder no more."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compress import checkpoint
from compress.checkpoint import ModelInfo
from compress.cli import huggingface, load
from compress.cli.arch import resolve
from compress.errors import CompressError, LoadError, UsageError
from compress.export import to_onnx
from compress.shrinking import shrink
from compress.structure import underived
from tests.shell import answer, refusal

NAMES = {0: "cat", 1: "dog", 2: "owl"}
SMALL: dict[str, dict[str, Any]] = {
    "ResNet": {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1]},
    "ViT": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
        "patch_size": 8,
    },
    "ConvNext": {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
}  # fmt: skip
PROCESSOR = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25] * 3, "size": {"height": 32, "width": 32}}
AGAIN = """
import sys
for absent in ("torch_pruning", "onnx", "onnxruntime"):
    sys.modules[absent] = None
import tests.conftest, torch
from pathlib import Path
from compress.cli import load
for path in map(Path, sys.argv[1:]):
    network, info, _ = load.network(path, None, {})
    images, wanted = torch.load(path.with_suffix(".pt"), weights_only=True)
    assert info.labels == ("cat", "dog", "owl") and info.input_size == (3, 32, 32), info
    with torch.no_grad():
        assert torch.equal(network(images), wanted), path
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per kind of network, as save_pretrained writes it, and what transformers itself gives for X."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    for kind, sizes in SMALL.items():
        named = {"id2label": NAMES, "label2id": {name: place for place, name in NAMES.items()}}
        config = getattr(transformers, f"{kind}Config")(**sizes, **named)
        model = _lively(getattr(transformers, f"{kind}ForImageClassification")(config))
        with huggingface._quiet():
            model.save_pretrained(root / kind)
        (root / kind / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        with torch.no_grad():
            torch.save(model(X).logits, root / kind / "logits.pt")
    return root


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _lively(model: nn.Module) -> nn.Module:
    """Weights of a size at which the logits are far from zero."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() > 1:
            tensor.normal_(0, 1.5 * tensor[0].numel() ** -0.5)
    return model.eval()


def _refusal(spec: str, kind: type[CompressError] = LoadError, **arguments: Any) -> str:
    with pytest.raises(kind) as error:
        resolve(spec, arguments, None)
    assert "\n" not in str(error.value)
    return str(error.value)


# From a folder to a file that stands by itself -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(folder: Path) -> dict[str, tuple[nn.Module, ModelInfo, dict[str, dict[str, int]]]]:
    """Each kind loaded, checked, and cut to half; with what a checkpoint of it must say."""
    found = {}
    for kind in SMALL:
        network, info, source = load.network(folder / kind, None, {})
        assert (info.arch, info.input_size, info.labels) == (f"hf:{kind}", (3, 32, 32), ("cat", "dog", "owl"))
        assert (info.mean, info.std) == ((0.5, 0.4, 0.3), (0.25,) * 3)
        assert source.path == folder / kind / "model.safetensors"
        with torch.no_grad():
            assert torch.equal(network(X), torch.load(folder / kind / "logits.pt", weights_only=True))
        whole = copy.deepcopy(network)
        shrink(network, X[:1], keep=0.5, round_to=1)
        assert sum(p.numel() for p in network.parameters()) <= 0.5 * sum(p.numel() for p in whole.parameters())
        found[kind] = network, info.model_copy(update={"pruned": True}), underived(network, whole)
    return found


@pytest.mark.parametrize("kind", SMALL)
def test_what_is_cut_is_proved(kind: str, pruned: Any, tmp_path: Path) -> None:
    assert to_onnx(pruned[kind][0], X, tmp_path / "a.onnx").relative < 1e-4


def test_a_fresh_process_needs_the_file_alone(pruned: Any, folder: Path, tmp_path: Path) -> None:
    paths = []
    for kind, (network, info, integers) in pruned.items():
        paths.append(tmp_path / f"{kind}.safetensors")
        checkpoint.save(paths[-1], network, info, integers=integers)
        assert str(folder) not in paths[-1].read_bytes().decode("latin-1")
        with torch.no_grad():
            torch.save((X, network(X)), paths[-1].with_suffix(".pt"))
    command = [sys.executable, "-c", AGAIN, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_command_line_takes_the_folder(folder: Path, tmp_path: Path) -> None:
    place, weights = folder / "ResNet", folder / "ResNet" / "model.safetensors"
    found = answer("inspect", place, "-q")
    assert found["arch"] == "hf:ResNet" and found["input_size"] == [3, 32, 32]
    assert answer("inspect", "--arch", f"hf:{place}", "-q")["sha256"] == found["sha256"]
    assert answer("inspect", "--arch", "resnet20", "-q")["model"] is None  # weights as they are drawn
    assert refusal("inspect") == (2, "there is no network: name a checkpoint, or an architecture with --arch")
    assert answer("inspect", weights, "--arch", f"hf:{place}", "-q")["params"] == found["params"]
    checkpoint.save(tmp_path / "bare.safetensors", nn.Linear(1, 1), ModelInfo(arch="hf:some/where"))
    code, text = refusal("inspect", tmp_path / "bare.safetensors")  # a file may not have anything downloaded
    assert code == 3 and text.endswith(
        "was made by the code 'hf:some/where': if you trust it, say --arch hf:some/where"
    )


def test_arguments_are_values_of_the_configuration(folder: Path) -> None:
    other = resolve(f"hf:{folder / 'ViT'}", {"num_classes": 5, "num_hidden_layers": 1}, None)
    assert other.model(X).shape == (4, 5) and other.labels is None
    text = _refusal(f"hf:{folder / 'ViT'}", num_hidden_layer=1)
    assert text.startswith("--arch-arg num_hidden_layer is no value of the configuration of vit (did you mean num_hidd")
    assert "trust_remote_code is not allowed" in _refusal(
        f"hf:{folder / 'ViT'}", kind=UsageError, trust_remote_code=True
    )


def test_classes_are_read_off_the_weights(folder: Path, tmp_path: Path) -> None:
    tensors = dict(checkpoint.read(folder / "ResNet" / "model.safetensors").tensors)
    tensors |= {"classifier.1.weight": torch.ones(7, 32), "classifier.1.bias": torch.ones(7)}
    torch.save(tensors, tmp_path / "seven.pt")
    network, info, _ = load.network(tmp_path / "seven.pt", f"hf:{folder / 'ResNet'}", {})
    assert network(X).shape == (4, 7) and info.labels is None and info.arch_kwargs["num_classes"] == 7


# What the files of a folder say --------------------------------------------------------------------------------------


def _images(processor: dict[str, Any] | None, config: dict[str, Any], place: Path) -> huggingface.Images:
    if processor is not None:
        (place / "preprocessor_config.json").write_text(json.dumps(processor))
    return huggingface.images(config, f"hf:{place}")


@pytest.mark.parametrize(
    ("processor", "config", "size"),
    [
        ({"size": 224}, {}, (3, 224, 224)),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 240, "width": 200}}, {},
         (3, 240, 200)),
        ({"size": {"shortest_edge": 256}, "do_center_crop": False, "crop_size": 224}, {}, (3, 256, 256)),
        ({}, {"image_size": 64, "num_channels": 1}, (1, 64, 64)),
        (None, {"image_size": [48, 32]}, (3, 48, 32)),
        (None, {}, None),
    ],
)  # fmt: skip
def test_the_size(processor: Any, config: Any, size: Any, tmp_path: Path) -> None:
    assert _images(processor, config, tmp_path).size == size


@pytest.mark.parametrize("changes", [{}, {"rescale_factor": 1 / 127.5, "rescale_offset": True}, {"do_rescale": False}])
def test_the_normalisation_is_the_processors(changes: dict[str, Any], tmp_path: Path) -> None:
    mean, std = [0.5, 0.4, 0.3], [0.25, 0.5, 1.0]
    found = _images({"image_mean": mean, "image_std": std, **changes}, {}, tmp_path)
    assert found.mean is not None and found.std is not None
    pixels = torch.tensor([0.0, 130.0, 255.0])
    scaled = pixels * (1 if changes.get("do_rescale") is False else changes.get("rescale_factor", 1 / 255))
    wanted = (scaled - (1 if changes.get("rescale_offset") else 0) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close((pixels / 255 - torch.tensor(found.mean)) / torch.tensor(found.std), wanted)


def test_what_is_not_said_is_not_known(tmp_path: Path) -> None:
    config = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "num_channels": 1}
    found = _images({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, config, tmp_path)
    assert (found.mean, found.std, found.labels) == (None, None, None)
    assert _images({"do_normalize": False}, {}, tmp_path).mean == (0.0, 0.0, 0.0)


# What is refused -----------------------------------------------------------------------------------------------------


def _text(place: Path, config: str) -> str:
    place.mkdir()
    (place / "config.json").write_text(config)
    return _refusal(f"hf:{place}").replace(str(place), "DIR")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "none").mkdir()
    assert "holds no config.json: give a folder that save_pretrained wrote" in _refusal(f"hf:{tmp_path / 'none'}")
    assert _text(tmp_path / "a", "{").startswith("hf:DIR: config.json cannot be read: JSONDecodeError: ")
    assert "names no model_type" in _text(tmp_path / "b", "{}")
    text = _text(tmp_path / "c", '{"model_type": "resnt"}')
    assert text.startswith("transformers has no image classifier 'resnt' (did you mean resnet")
    with pytest.raises(LoadError, match=r"holds no weights: there is neither of model.safetensors, pytorch_model.bin"):
        load.network(tmp_path / "c", None, {})
    (tmp_path / "c" / "model.safetensors.index.json").touch()
    with pytest.raises(LoadError, match="in several parts: save it as one"):
        load.network(tmp_path / "c", None, {})
    torch.save(nn.Linear(1, 1), tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(LoadError, match="pickles are never executed"):
        load.network(tmp_path / "c", None, {})


def test_no_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    wanted = "hf:some/where: there is no folder some/where, and the Hub does not answer: check the network, or give"
    assert _refusal("hf:some/where").startswith(wanted)
    with pytest.raises(LoadError, match="the Hub does not answer"):
        load.network(Path("hf:some/where"), None, {})
    assert "neither a folder nor a repository that can be read" in _refusal("hf:a/b/c/d")


def test_transformers_is_absent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    text = _refusal(f"hf:{folder / 'ViT'}", kind=UsageError)
    assert text == 'transformers is not installed: pip install "compress-to-onnx[hf]"'


def test_weights_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = dict(checkpoint.read(folder / "ViT" / "model.safetensors").tensors)
    tensors["classifier.weight"] = torch.ones(3, 5)
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(LoadError, match=r"classifier.weight is \(3, 5\), not \(3, 32\)"):
        load.network(tmp_path / "a.pt", f"hf:{folder / 'ViT'}", {"num_classes": 3})
    del tensors["classifier.weight"]
    torch.save(tensors, tmp_path / "b.pt")
    with pytest.raises(LoadError, match=r"1 name \(model.classifier.weight\) missing"):
        load.network(tmp_path / "b.pt", f"hf:{folder / 'ViT'}", {"num_classes": 3})
