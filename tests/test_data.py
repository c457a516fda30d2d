"""Data: batches are a function of (seed, epoch), splits never mix, sources agree, errors say what to do."""

from __future__ import annotations

import io
import itertools
import logging
import random
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from compress.checkpoint import ModelInfo
from compress.data import Data, Loader, MemorySplit, Split, StreamSplit, load, loader, named_as, statistics
from compress.data.decode import decode, fit_arrays
from compress.errors import DataError
from compress.inputs import load_data

CIFAR10 = Path(__file__).resolve().parents[1].parent / "shared" / "data" / "cifar10"
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # batches hold the pixels as they are


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the Arrow copies that `datasets` makes out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def _noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _folder(
    root: Path, counts: dict[str, int], *, size: tuple[int, int] = (12, 10), classes: str = "ant bee cat"
) -> Path:
    """An ImageFolder: `counts` PNG files of (width, height) per class in every split."""
    for split, count in counts.items():
        for label, index in itertools.product(classes.split(), range(count)):
            file = root / split / label / f"{index:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(_noise(zlib.crc32(f"{split}/{label}/{index}".encode()), size[1], size[0], 3)).save(file)
    return root


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _table(count: int, *, label: Any = None, name: str = "label", seed: int = 0) -> datasets.Dataset:
    """`count` 6x6 images as encoded bytes, labels 0, 1, 0, 1, ... named no and yes."""
    label = datasets.ClassLabel(names=["no", "yes"]) if label is None else label
    columns = {"img": [{"bytes": _png(_noise(seed + row, 6, 6, 3)), "path": None} for row in range(count)]}
    values = [row % 2 for row in range(count)]
    columns[name] = [("no", "yes")[v] for v in values] if getattr(label, "dtype", "") == "string" else values
    return datasets.Dataset.from_dict(columns, features=datasets.Features({"img": datasets.Image(), name: label}))


def _module(root: Path, body: str) -> str:
    """A user's file with a function `splits`, as a --data text."""
    file = root / "mine.py"
    file.write_text("import numpy as np\nimport torch\n\n\ndef splits():\n    " + body + "\n")
    return f"{file}:splits"


def _numbered(root: Path, count: int = 200) -> Data:
    """Image number i holds i in every pixel of 8x8; classes 0 (three quarters) and 1."""
    body = f"n = np.arange({count}, dtype=np.uint8); images = np.tile(n[:, None, None, None], (1, 3, 8, 8))"
    return load(
        _module(root, f"{body}; return {{'train': (images, (n % 4 == 0).astype(int)), 'test': (images, n % 2)}}"),
        image_size=None,
    )


def _streamed(root: Path, **options: Any) -> Data:
    return load(str(_folder(root, {"train": 8, "val": 3, "test": 3})), image_size=8, memory_limit=0, **options)


def _all(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, targets = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(targets)


def _epoch(batches: Loader, epoch: int) -> tuple[Tensor, Tensor]:
    batches.set_epoch(epoch)
    return _all(batches)


def _same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# Laws


@pytest.fixture(params=["memory", "streamed"])
def train(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    return _numbered(tmp_path).train if request.param == "memory" else _streamed(tmp_path).train


def _train_loader(split: Split, **options: Any) -> Loader:
    return loader(split, batch_size=7, train=True, augment="flip-crop", workers=0, **PLAIN, **options)


def test_an_epoch_is_a_function_of_seed_and_epoch(train: Split) -> None:
    first = _train_loader(train, seed=3)
    history = [_epoch(first, epoch) for epoch in range(4)]
    torch.manual_seed(12345)  # a resumed process is somewhere else in the global streams
    assert _same(_epoch(_train_loader(train, seed=3), 3), history[3])
    assert not _same(history[2], history[3])
    assert not _same(_epoch(_train_loader(train, seed=4), 3), history[3])


def test_batches_leave_the_global_generators_alone(train: Split) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    _epoch(_train_loader(train), 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_worker_processes_do_not_change_the_batches(tmp_path: Path) -> None:
    split = _streamed(tmp_path).train
    batches = loader(split, batch_size=7, train=True, workers=2, **PLAIN)
    alone = _train_loader(split)
    assert all(_same(_epoch(batches, epoch), _epoch(alone, epoch)) for epoch in (0, 5))
    next(iter(batches))  # a pass given up midway does not leak into the next
    assert _same(_epoch(batches, 1), _epoch(alone, 1))


def test_streamed_equals_in_memory_at_evaluation(tmp_path: Path) -> None:
    root = _folder(tmp_path, {"train": 4, "val": 2, "test": 2})
    odd = root / "test" / "bee"
    Image.fromarray(_noise(1, 30, 50, 4)).save(odd / "alpha.png")
    Image.fromarray(_noise(2, 9, 7)).save(odd / "grey.png")
    Image.fromarray(_noise(3, 20, 20, 3)).convert("P").save(odd / "palette.png", transparency=b"\x00\x80")
    Image.fromarray(_noise(4, 64, 33, 3)).save(odd / "photo.jpg")
    small, large = load(str(root), image_size=8), load(str(root), image_size=8, memory_limit=0)
    assert isinstance(small.test, MemorySplit) and isinstance(large.test, StreamSplit)
    assert "streamed" in " ".join(large.notes)
    options: Any = {"batch_size": 5, "train": False, "workers": 0, **PLAIN}
    for a, b in ((small.train, large.train), (small.val, large.val), (small.test, large.test)):
        assert _same(_all(loader(a, **options)), _all(loader(b, **options)))
    assert statistics(small.train) == statistics(large.train)


def test_held_out_images_are_disjoint_and_stratified(tmp_path: Path) -> None:
    data = _numbered(tmp_path)
    train, val = (set(split.images[:, 0, 0, 0].tolist()) for split in (data.train, data.val))
    assert not train & val and train | val == set(range(200))
    assert torch.bincount(data.val.targets).tolist() == [15, 5]
    assert torch.bincount(data.train.targets).tolist() == [135, 45]
    again, other = load(data.name, image_size=None), load(data.name, image_size=None, seed=1)
    assert torch.equal(data.val.images, again.val.images) and not torch.equal(data.val.images, other.val.images)
    assert data.fingerprint == again.fingerprint == other.fingerprint


def test_evaluation_sees_every_image_once_in_order(tmp_path: Path) -> None:
    data = _numbered(tmp_path)
    assert data.test is not None
    batches = loader(data.test, batch_size=32, train=False, **PLAIN)
    images, targets = _all(batches)
    assert len(batches) == len(list(batches)) == 7
    torch.testing.assert_close(images[:, 0, 0, 0], torch.arange(200.0))
    assert torch.equal(targets, torch.arange(200) % 2)


def test_training_sees_every_image_once_and_drops_the_last_batch(tmp_path: Path) -> None:
    split = _numbered(tmp_path).train  # 180 images
    options: Any = {"batch_size": 32, "train": True, "augment": "none", **PLAIN}
    assert [len(targets) for _, targets in loader(split, **options)] == [32] * 5
    seen = _all(loader(split, drop_last=False, **options))[0][:, 0, 0, 0].round().long()
    assert sorted(seen.tolist()) == sorted(split.images[:, 0, 0, 0].tolist()) != seen.tolist()
    few = split.subset(np.arange(5), "few")
    assert [len(targets) for _, targets in loader(few, drop_last=False, **options)] == [5]


@pytest.mark.parametrize("is_training", [True, False])
def test_ranks_share_an_epoch_equally(tmp_path: Path, is_training: bool) -> None:
    split = _numbered(tmp_path).train.subset(np.arange(50), "fifty")
    options: Any = {"batch_size": 8, "train": is_training, "augment": "none", "drop_last": False, **PLAIN}
    parts = [_all(loader(split, rank=rank, world=3, **options))[0][:, 0, 0, 0].round().tolist() for rank in range(3)]
    seen = list(itertools.chain(*parts))
    assert [len(part) for part in parts] == ([16] * 3 if is_training else [17, 17, 16])
    assert len(seen) == len(set(seen)) == (48 if is_training else 50)


def test_a_rank_without_an_image_has_an_empty_pass(tmp_path: Path) -> None:
    split = _numbered(tmp_path).train.subset(np.arange(2), "two")
    last = loader(split, rank=2, world=3, batch_size=8, train=False, **PLAIN)
    assert len(last) == 0 and list(last) == []


def test_normalisation_inverts() -> None:
    data = load("digits", image_size=None)
    mean, std = statistics(data.train)
    images, _ = next(iter(loader(data.val, batch_size=50, mean=mean, std=std, train=False)))
    assert images.dtype == torch.float32 and images.is_contiguous(memory_format=torch.channels_last)
    back = (images * torch.tensor(std).view(1, 3, 1, 1) + torch.tensor(mean).view(1, 3, 1, 1)) * 255
    torch.testing.assert_close(back, data.val.images[:50].float(), atol=1e-3, rtol=0)


def test_statistics_equal_brute_force() -> None:
    data = load("digits", image_size=12)
    pixels = data.train.images.double() / 255
    mean, std = statistics(data.train)
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean((0, 2, 3)), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(std).double(), pixels.std((0, 2, 3), correction=0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("augment", ["crop", "flip-crop"])
def test_augmentation_only_shifts_and_mirrors(augment: Any) -> None:
    split = MemorySplit("noise", torch.from_numpy(_noise(0, 64, 3, 8, 8)), torch.arange(64), "crop")
    images, rows = next(iter(loader(split, batch_size=64, train=True, augment=augment, **PLAIN)))
    seen = set()
    for image, row in zip(images.round(), rows, strict=True):
        padded = functional.pad(split.images[row].float(), (1, 1, 1, 1))
        for top, left, mirrored in itertools.product(range(3), range(3), (False, True)):
            shifted = padded[:, top : top + 8, left : left + 8]
            if torch.equal(image, shifted.flip(-1) if mirrored else shifted):
                seen.add((row.item(), top, left, mirrored))
    assert len(seen) == 64  # each image is exactly one shift of its original
    assert {mirrored for *_, mirrored in seen} == ({False} if augment == "crop" else {False, True})
    assert len({(top, left) for _, top, left, _ in seen}) == 9


# Sources


def test_digits() -> None:
    data, other = load("digits", image_size=32), load("digits", image_size=32, seed=7)
    assert data.test is not None and other.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (1295, 143, 359)
    assert data.labels == tuple("0123456789") and data.train.shape == (3, 32, 32) and data.train.augment == "crop"
    assert torch.equal(data.test.images, other.test.images)
    native, padded = load("digits", image_size=None, channels=1), load("digits", image_size=12, channels=1)
    assert native.train.shape == (1, 8, 8) and native.train.images.max() == 255
    assert torch.equal(padded.train.images[:, :, 2:10, 2:10], native.train.images)
    assert padded.train.images.sum() == native.train.images.sum()


def test_a_given_val_is_the_final_split_where_there_is_no_test(tmp_path: Path) -> None:
    data = load(str(_folder(tmp_path, {"train": 10, "val": 2})), image_size=8)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (27, 3, 6)
    assert data.labels == ("ant", "bee", "cat") and data.train.augment == "flip-crop"
    assert data.notes == (
        "test: the given val split, used once at the end; selection uses images held out of train",
        "val: 10 % of train held out per class (3 images), seed 0",
    )


def test_given_splits_stay_as_they_are(tmp_path: Path) -> None:
    data = load(str(_folder(tmp_path, {"train": 5, "valid": 2, "test": 1})), image_size=8, num_classes=7)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (15, 6, 3)
    assert data.notes == ("the data has 3 classes, the network 7 outputs",)


def test_val_only_is_for_evaluation(tmp_path: Path) -> None:
    data = load(str(_folder(tmp_path, {"val": 2})), image_size=8)
    assert data.test is not None
    assert (len(data.train), len(data.val), len(data.test)) == (0, 6, 6)
    assert len(_all(loader(data.test, batch_size=4, train=False, **PLAIN))[0]) == 6
    with pytest.raises(DataError, match=r"holds no images: this data can only be evaluated on; add a train split"):
        loader(data.train, batch_size=4, train=True, **PLAIN)
    with pytest.raises(DataError, match=r"holds no images to take the mean"):
        statistics(data.train)


def test_parquet_and_hub_layouts(tmp_path: Path) -> None:
    _table(40).to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    _table(10, seed=50).to_parquet(tmp_path / "data" / "test-00000-of-00001.parquet")
    (tmp_path / "README.md").write_text("A set.\n")
    folder = load(str(tmp_path), image_size=None)
    assert folder.test is not None
    assert folder.labels == ("no", "yes") and (len(folder.train), len(folder.val), len(folder.test)) == (36, 4, 10)
    assert torch.equal(folder.test.images[3], torch.from_numpy(_noise(53, 6, 6, 3)).permute(2, 0, 1))
    assert folder.test.targets.tolist() == [0, 1] * 5
    single = load(str(tmp_path / "data" / "train-00000-of-00001.parquet"), image_size=None)
    assert torch.equal(single.train.images, folder.train.images) and "test: none given" in single.notes
    assert load(f"hf:{tmp_path}", image_size=None).fingerprint == folder.fingerprint
    streamed = load(str(tmp_path), image_size=6, memory_limit=0)
    a, b = (_all(loader(d.val, batch_size=4, train=False, workers=0, **PLAIN)) for d in (folder, streamed))
    assert _same(a, b)


def test_files_that_name_their_split_otherwise_or_not_at_all(tmp_path: Path) -> None:
    _table(12).to_parquet(tmp_path / "training.parquet")
    _table(4, seed=50).to_parquet(tmp_path / "testing-0.parquet")
    found = load(str(tmp_path), image_size=None)
    assert found.test is not None and (len(found.train) + len(found.val), len(found.test)) == (12, 4)
    _table(4, seed=60).to_parquet(tmp_path / "more.parquet")
    with pytest.raises(DataError, match=r"'more.parquet' in .* names no split and other files do"):
        load(str(tmp_path), image_size=None)
    _folder(tmp_path / "twice", {"train": 2, "val": 2, "validation": 2})
    with pytest.raises(DataError, match=r"holds val/ and validation/, which are the same split"):
        load(str(tmp_path / "twice"), image_size=None)


def test_classes_are_numbered_as_the_network_numbers_them(tmp_path: Path) -> None:
    source = str(_folder(tmp_path, {"train": 4, "test": 2}))
    given = load(source, image_size=8)
    known = ("cat", "dog", "ant", "bee")
    found = load_data(ModelInfo(labels=known, input_size=(3, 8, 8)), source)
    assert found.labels == known and found.test is not None and given.test is not None
    assert [known[i] for i in found.test.targets] == [given.labels[i] for i in given.test.targets]
    assert found.train.targets.tolist() == [(2, 3, 0)[i] for i in given.train.targets.tolist()]
    for other in (("x", "y", "z"), ("ant", "bee"), ("ant", "bee", "cat", "ant")):
        assert named_as(given, other) is given


def test_images_that_are_no_squares_stay_what_they_were(tmp_path: Path) -> None:
    source = str(_folder(tmp_path, {"train": 4, "test": 2}, size=(12, 10)))
    own = load(source, image_size=None)
    assert own.train.shape == (3, 10, 12)
    again = load_data(ModelInfo(input_size=own.train.shape), source)
    assert again.train.shape == own.train.shape and again.fingerprint == own.fingerprint
    assert load_data(ModelInfo(), source, channels=1).train.shape == (1, 10, 12)


def test_code_that_a_file_names_is_not_run_whatever_else_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text("raise SystemExit(5)")
    Path("evil.py:f").touch()
    with pytest.raises(DataError, match=r"names the code 'evil.py:f' as its data set: if you trust it, say --data"):
        load_data(ModelInfo(data="evil.py:f"))
    with pytest.raises(DataError, match=r"cannot be imported: SystemExit: 5; allowed are"):
        load_data(ModelInfo(), "evil.py:f")


def test_a_users_file_may_hold_what_python_files_hold(tmp_path: Path) -> None:
    body = "return {'train': (np.zeros((8, 3, 6, 6), np.uint8), np.arange(8) % 2)}"
    name = _module(tmp_path, body)
    file = tmp_path / "mine.py"
    own = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
    )
    file.write_text(own + file.read_text())
    assert len(load(name, image_size=None).train) == 6
    with pytest.raises(DataError, match=r"mine.py:splits' failed: ZeroDivisionError: .*; correct the function"):
        load(_module(tmp_path, "1 / 0"), image_size=None)


def test_labels_that_are_text_or_bare_numbers(tmp_path: Path) -> None:
    for kind, labels in (("string", ("no", "yes")), ("int32", ("0", "1"))):
        file = tmp_path / f"{kind}.parquet"
        _table(8, label=datasets.Value(kind)).to_parquet(file)
        data = load(str(file), image_size=None)
        assert data.labels == labels and torch.bincount(data.train.targets).tolist() == [3, 3]


def test_a_functions_arrays_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "y = np.arange(20) % 2; x = np.arange(20 * 6 * 5 * 3, dtype=np.uint8).reshape(20, 6, 5, 3); "
    data = load(
        _module(tmp_path, body + "return {'train': (torch.tensor(x), y), 'labels': ['ox', 'yak']}"), image_size=None
    )
    assert data.train.shape == (3, 6, 5) and data.labels == ("ox", "yak") and data.test is None
    assert data.train.images[0, :, 0, 0].tolist() == [0, 1, 2]
    table = "import datasets; y = datasets.load_from_disk('there'); return datasets.DatasetDict(train=y, extra=y)"
    (tmp_path / "pack").mkdir()
    _module(tmp_path / "pack", table)
    _table(8).save_to_disk(tmp_path / "there")
    monkeypatch.chdir(tmp_path)  # pkg.module is looked for where the command runs
    found = load("pack.mine:splits", image_size=None)
    assert len(found.train) == 6 and "split 'extra' (8 images) is not used" in found.notes


def test_a_split_without_labels_is_left_out(tmp_path: Path) -> None:
    tables = datasets.DatasetDict(train=_table(8), test=_table(4).map(lambda row: {"label": -1}))
    for name, table in tables.items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    data = load(str(tmp_path), image_size=None)
    assert data.test is None and "split 'test' (4 images) has no labels and is not used" in data.notes


def test_arrays_change_channels_and_size() -> None:
    grey = torch.from_numpy(_noise(0, 2, 1, 4, 4))
    assert torch.equal(fit_arrays(grey, (3, 4, 4)), grey.expand(-1, 3, -1, -1))
    assert torch.equal(fit_arrays(grey.expand(-1, 3, -1, -1), (1, 4, 4)), grey)
    flat = torch.full((1, 3, 40, 20), 77, dtype=torch.uint8)
    assert torch.equal(fit_arrays(flat, (3, 8, 8)), torch.full((1, 3, 8, 8), 77, dtype=torch.uint8))


def test_pixels_are_upright_and_16_bits_are_scaled() -> None:
    pixels, buffer = _noise(0, 4, 6, 3), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 3  # turned upside down
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(buffer.getvalue(), 3)), pixels[::-1, ::-1])
    deep = np.array([[0, 256, 65535]], np.uint16)
    assert np.asarray(decode(_png(deep), 1)).tolist() == [[0, 1, 255]]


def test_cifar10() -> None:
    file = CIFAR10 / "test-00000-of-00001.parquet"
    if not file.is_file():
        pytest.skip(f"CIFAR-10 is not at {CIFAR10}")
    data = load(str(file), image_size=32, num_classes=10)
    assert data.labels[:3] == ("airplane", "automobile", "bird") and data.train.augment == "flip-crop"
    assert torch.bincount(data.train.targets).tolist() == [900] * 10 and len(data.val) == 1000
    mean, _ = statistics(data.train)
    assert mean == pytest.approx(
        (0.494, 0.485, 0.450), abs=0.01
    )  # the published mean of its pixels is 0.491 0.482 0.447


# Unreadable images


def _spoil(root: Path, count: int) -> None:
    for file in sorted((root / "train" / "bee").iterdir())[:count]:
        file.write_bytes(file.read_bytes()[:60])


def test_unreadable_images_are_counted_and_named(tmp_path: Path) -> None:
    _spoil(_folder(tmp_path, {"train": 10}), 1)
    data = load(str(tmp_path), image_size=8, max_unreadable=0.05)
    assert len(data.train) + len(data.val) == 29
    assert data.notes[0] == f"train of '{tmp_path}': 1 of 30 images unreadable: train/bee/000.png"


def test_streaming_skips_unreadable_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _folder(tmp_path, {"train": 10, "val": 1, "test": 1})
    _spoil(tmp_path, 4)
    split = load(str(tmp_path), image_size=8, memory_limit=0, max_unreadable=0.2).train
    batches = loader(split, batch_size=10, train=False, workers=0, **PLAIN)
    with caplog.at_level(logging.WARNING, "compress"):
        assert [len(targets) for _, targets in batches] == [10, 6, 10]
        assert len(list(batches)) == 3
    assert len(caplog.records) == 1  # told once
    assert "4 of 30 images unreadable: train/bee/000.png, train/bee/001.png, train/bee/002.png, ..." in caplog.text
    strict = load(str(tmp_path), image_size=8, memory_limit=0).train
    with pytest.raises(DataError, match=r"4 of 30 images unreadable"):
        list(loader(strict, batch_size=10, train=False, workers=0, **PLAIN))


# Errors: each text once


def _empty_class(root: Path) -> str:
    (_folder(root, {"train": 4}) / "train" / "dog").mkdir()
    return str(root)


def _unreadable(root: Path) -> str:
    _spoil(_folder(root, {"train": 8}), 4)
    return str(root)


def _all_unreadable(root: Path) -> str:
    _spoil(_folder(root, {"train": 4}, classes="bee cat"), 4)
    for file in root.rglob("*.png"):
        file.write_bytes(b"none")
    return str(root)


def _mixed_sizes(root: Path) -> str:
    _folder(root, {"train": 2})
    Image.fromarray(_noise(0, 5, 5, 3)).save(root / "train" / "cat" / "small.png")
    return str(root)


def _foreign_class(root: Path) -> str:
    _folder(root, {"train": 2})
    return str(_folder(root, {"val": 2}, classes="ant gnu"))


def _file(name: str) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        (root / name).write_bytes(b"nothing useful")
        return str(root / name)

    return make


def _parquet(**options: Any) -> Callable[[Path], str]:
    def make(root: Path) -> str:
        _table(8, **options).to_parquet(root / "a.parquet")
        return str(root / "a.parquet")

    return make


def _without_images(root: Path) -> str:
    _table(8).remove_columns("img").to_parquet(root / "a.parquet")
    return str(root / "a.parquet")


def _returning(text: str) -> Callable[[Path], str]:
    return lambda root: _module(root, f"x, y = np.zeros((8, 3, 4, 4), np.uint8), np.arange(8) % 2; return {text}")


ERRORS: list[tuple[str | Callable[[Path], str], dict[str, Any], str]] = [
    ("imagenet", {}, r"data 'imagenet' is unknown; allowed are: digits, a folder .* file.py:function$"),
    ("no/such/place", {}, r"data 'no/such/place' does not exist; check the path"),
    (_file("a.csv"), {}, r"a.csv' is a file of an unknown kind; allowed are: digits"),
    (_file("a.parquet"), {}, r"a.parquet' cannot be read by datasets: .*; check the name, the files and the network"),
    (
        lambda root: str(root),
        {},
        r"holds neither train/, val/ nor test/ nor Parquet files; .* put one folder per class",
    ),
    (_empty_class, {}, r"class 'dog' has no readable image in train of .* \(1 of 4 classes are empty\)"),
    (
        lambda root: str(_folder(root, {"train": 3}, classes="ant")),
        {},
        r"has a single class, 'ant'; at least 2 are needed",
    ),
    (lambda root: str(_folder(root, {"train": 0}) / "train"), {}, r"does not exist"),
    (lambda root: str(_folder(root, {"train": 1})), {}, r"class 'ant' has 1 training image, a held-out .* at least 2"),
    (_foreign_class, {}, r"has the class 'gnu' that train/ has not; allowed are the 3 classes of train/"),
    (
        _unreadable,
        {},
        r"4 of 24 images unreadable: train/bee/000.png, .*002.png, ...; allowed are 0.01 of them; repair",
    ),
    (
        _all_unreadable,
        {"image_size": None},
        r"none of the first 8 images can be read, the first is 'train/bee/000.png'",
    ),
    (
        _mixed_sizes,
        {"image_size": None},
        r"image 'train/cat/small.png' is 5x5, the first one 12x10; give an image size",
    ),
    (_mixed_sizes, {"image_size": None, "memory_limit": 9}, r"decoded, .* streaming needs an image size; give one"),
    (
        _parquet(name="colour"),
        {"num_classes": 1},
        r"label 1 of image 1 in train of .* out of range; allowed are 0 to 0;",
    ),
    (
        _parquet(label=datasets.Value("int64"), name="colour"),
        {},
        r"has no label column, its columns are img, colour; allowed",
    ),
    (_without_images, {}, r"has no image column, its columns are label; allowed are an Image feature or encoded bytes"),
    (_parquet(), {"channels": 4}, r"4 channels are asked of train of .*; allowed are 1 for grey and 3 for colour"),
    (_returning("[x]"), {}, r"returned list; allowed are a DatasetDict or a dict of splits"),
    (_returning("{}"), {}, r"returned no split; allowed are train, val and test"),
    (_returning("{'extra': (x, y)}"), {}, r"returned 'extra': tuple; allowed are train, val and test, each a pair"),
    (_returning("{'train': (x / 255, y)}"), {}, r"train images of torch.float64 and 4 axes; allowed are uint8 arrays"),
    (
        _returning("{'train': (x, y / 2)}"),
        {},
        r"train labels of float64 \(8,\) for 8 images; allowed is one integer per",
    ),
    (
        _returning("{'train': (x[:0], y[:0])}"),
        {},
        r"train of .* holds no image; allowed are splits with images; fill or remove",
    ),
    (_returning("{'train': (x, y - 1)}"), {}, r"label -1 of image 0 in train of .* is out of range; allowed are 0 to"),
    (
        _returning("{'train': (x[:, :2], y)}"),
        {},
        r"images have 2 channels, 3 are asked for; allowed are 1, 3 or an equal",
    ),
    ("nowhere.py:splits", {}, r"data 'nowhere.py:splits' does not exist: no file 'nowhere.py'"),
    ("no_such_package.data:splits", {}, r"cannot be imported: No module named 'no_such_package'; allowed are: digits"),
    ("json:no_function", {}, r"'json' has no function 'no_function'; allowed is a function that returns the splits"),
    ("hf:./no/such/set", {}, r"data 'hf:./no/such/set' cannot be read by datasets: .*; check the name, the files and"),
    ("digits", {"image_size": 0}, r"image size is 0; allowed is 1 pixel and more"),
    ("digits", {"channels": 0}, r"channels is 0; allowed are 1 for grey, 3 for colour"),
    ("digits", {"val_share": 1.0}, r"validation share is 1.0; allowed is a share of train between 0 and 1"),
    ("digits", {"max_unreadable": 2}, r"share of unreadable images is 2; allowed is 0 to 1"),
]


@pytest.mark.parametrize(("source", "options", "text"), ERRORS, ids=[text[:40] for *_, text in ERRORS])
def test_load_errors(tmp_path: Path, source: str | Callable[[Path], str], options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        load(source if isinstance(source, str) else source(tmp_path), **{"image_size": 8, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, r"batch size is 0; allowed is 1 and more"),
        (
            {"batch_size": 2000},
            r"holds 1,295 images, fewer than a batch of 2000; allowed is at most 1295; take a smaller",
        ),
        (
            {"batch_size": 700, "world": 2},
            r"1,295 images for 2 processes, fewer than a batch of 700; allowed is at most 647",
        ),
        ({"mean": (0.5,)}, r"normalisation is mean \(0.5,\), .* allowed are 3 values each, one per channel"),
        ({"std": (1.0, 0.0, 1.0)}, r"std above 0$"),
    ],
)
def test_loader_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        loader(load("digits", image_size=8).train, **{"batch_size": 8, "train": True, **PLAIN, **options})
