"""Batches whose order and augmentation are a function of (seed, epoch) alone, as a resumed run needs them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from compress.data.decode import UNREADABLE, check_unreadable, cpus, decode, fit, random_box
from compress.data.split import Augment, MemorySplit, Shape, Split, StreamSplit
from compress.errors import DataError

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W), targets (N,) int64, or masks (N, H, W) int64
_Fetch = Callable[[int], Iterator[Batch]]  # the batches of an epoch, as they are stored


@dataclass(frozen=True)
class _Plan:
    """Which images lie in which batch."""

    count: int  # images in the split
    batch_size: int
    is_shuffled: bool
    is_dropping: bool  # the last batch, where it is incomplete
    seed: int
    rank: int
    world: int

    def order(self, epoch: int) -> Tensor:
        """Positions of this rank's images, (n,) int64.

        Shuffled, every rank has equally many, and up to world - 1 images are left out; in order, every image comes
        once, and ranks may differ by one.
        """
        if self.is_shuffled:
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(mix(self.seed, epoch)))
            order = order[: self.count // self.world * self.world]
        else:
            order = torch.arange(self.count)
        return order[self.rank :: self.world]

    def __len__(self) -> int:
        own = self.count // self.world if self.is_shuffled else len(range(self.rank, self.count, self.world))
        return own // self.batch_size if self.is_dropping else -(-own // self.batch_size)

    def batches(self, order: Tensor) -> tuple[Tensor, ...]:
        return torch.split(order, self.batch_size)[: len(self)]


class Loader:
    """One pass per epoch over a split; made by `loader`."""

    def __init__(self, plan: _Plan, fetch: _Fetch, prepare: _Prepare) -> None:
        self._plan, self._fetch, self._prepare = plan, fetch, prepare
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._plan)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next pass; 0 until called."""
        self._epoch = epoch

    def positions(self) -> tuple[Tensor, ...]:
        """For each batch of the next pass where its images lie in the split, (n,) int64."""
        return self._plan.batches(self._plan.order(self._epoch))

    @property
    def is_still(self) -> bool:
        """Whether outputs may be kept from pass to pass: images in memory, not augmented, without a mask each."""
        return isinstance(self._fetch, _MemoryFetch) and not self._fetch.has_masks and not self._prepare.is_changing

    def in_order(self) -> Loader:
        """Every image of a still loader once, this process's share: positions rank, rank + world, ..."""
        assert isinstance(self._fetch, _MemoryFetch)
        plan = replace(self._plan, is_shuffled=False, is_dropping=False)
        return Loader(plan, self._fetch.by(plan), self._prepare)

    @property
    def count(self) -> int:
        """Images in the split, of all processes."""
        return self._plan.count

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (N, C, H, W) float32, channels last, normalised, and targets int64, both on the device.

        Targets are labels (N,) or masks (N, H, W).
        """
        epoch = self._epoch
        for number, (images, targets) in enumerate(self._fetch(epoch)):
            yield self._prepare(images, mix(self._plan.seed, epoch, self._plan.rank, number)), targets


def loader(
    split: Split,
    *,
    batch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    train: bool,
    augment: Augment | Literal["auto"] = "auto",
    seed: int = 0,
    device: str | torch.device = "cpu",
    drop_last: bool | None = None,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
) -> Loader:
    """Batches of a split: shuffled and augmented with `train`, else all images in order and as they are.

    `mean`, `std`: per channel in 0..1. `augment`: "auto" is "flip-crop", without the flip where a mirrored image is
    another class; crops are shifts by up to 1/8 in memory (He et al., arXiv:1512.03385) and random resized crops where
    streamed. `drop_last`: None = with `train`. `rank` of `world`: this process's share, of equal size with `train`.
    `workers`: processes that decode a streamed split, None = one per processor, at most 8.
    Raises DataError.
    """
    assert 0 <= rank < world, (rank, world)
    plan = _Plan(len(split), batch_size, train, train if drop_last is None else drop_last, seed, rank, world)
    _check(split, plan, mean, std)
    chosen = "none" if not train else split.augment if augment == "auto" else augment
    if split.has_masks and chosen != "none":
        raise DataError(f"augmentation is '{chosen}', but {split.name} has masks, which would have to move along; "
                        "allowed is none")  # fmt: skip
    target = torch.device(device)
    fetch: _Fetch
    if isinstance(split, MemorySplit):
        fetch = _MemoryFetch(plan, split.images.to(target), split.targets.to(target))
        change = _augmentation(split.shape, target, is_cropping=chosen != "none", is_flipping=chosen == "flip-crop")
    else:
        workers = min(8, max(1, cpus() // world)) if workers is None else workers  # 8 feed one GPU; more cost memory
        fetch = _StreamFetch(split, plan, target, is_cropping=chosen != "none", workers=workers)
        change = _augmentation(split.shape, target, is_cropping=False, is_flipping=chosen == "flip-crop")
    return Loader(plan, fetch, _Prepare(mean, std, target, change))


def _check(split: Split, plan: _Plan, mean: Sequence[float], std: Sequence[float]) -> None:
    if plan.batch_size < 1:
        raise DataError(f"batch size is {plan.batch_size}; allowed is 1 and more")
    if not len(split):
        raise DataError(f"{split.name} holds no images: this data can only be evaluated on; add a train split to train")
    if plan.is_dropping and not len(plan):
        own = f"{len(split):,} images" + (f" for {plan.world} processes" if plan.world > 1 else "")
        raise DataError(
            f"{split.name} holds {own}, fewer than a batch of {plan.batch_size}; "
            f"allowed is at most {max(1, len(split) // plan.world)}; take a smaller batch or more images"
        )
    channels = split.shape[0]
    if not len(mean) == len(std) == channels or min(std) <= 0:
        raise DataError(
            f"normalisation is mean {tuple(mean)}, std {tuple(std)}; allowed are {channels} values "
            f"each, one per channel of {split.name}, std above 0"
        )


def mix(*keys: int) -> int:
    """One seed out of several numbers, 0 to 2**63 - 1; equal on every machine."""
    words = np.random.SeedSequence([key % 2**64 for key in keys]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class _MemoryFetch:
    """Rows of the image tensor, which is moved to the device once."""

    def __init__(self, plan: _Plan, images: Tensor, targets: Tensor) -> None:
        self._plan, self._images, self._targets = plan, images, targets

    @property
    def has_masks(self) -> bool:
        return self._targets.ndim > 1

    def by(self, plan: _Plan) -> _MemoryFetch:
        """The same images in other batches."""
        return _MemoryFetch(plan, self._images, self._targets)

    def __call__(self, epoch: int) -> Iterator[Batch]:
        for index in self._plan.batches(self._plan.order(epoch).to(self._images.device)):
            yield self._images[index], self._targets[index].long()  # masks are kept in bytes


class _StreamFetch:
    """Images decoded by worker processes, which live as long as the loader; unreadable ones are left out and named."""

    def __init__(
        self, split: StreamSplit, plan: _Plan, device: torch.device, *, is_cropping: bool, workers: int
    ) -> None:
        self._split, self._device, self._keys = split, device, _Keys(plan)
        self._is_in_step = plan.world > 1 and plan.is_shuffled
        self._unreadable: set[int] = set()
        self._loader: DataLoader[Any] = DataLoader(
            _Decoder(split, plan.seed if is_cropping else None),
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=_stack,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else every pass draws from the global one
        )

    def __call__(self, epoch: int) -> Iterator[Batch]:
        self._keys.epoch = epoch
        for images, positions, failed in self._loader:
            if failed:
                self._note(failed)
            if len(positions):
                yield images, self._split.targets[positions].to(self._device)
            elif self._is_in_step:
                raise DataError(
                    f"{self._split.name}: no image of a batch can be read, and the other processes would wait for it "
                    "for ever; mend or remove the files that log.txt names"
                )

    def _note(self, failed: Sequence[int]) -> None:
        new = [position for position in failed if position not in self._unreadable]
        self._unreadable.update(new)
        if new:
            names = [self._split.images.name(int(self._split.indices[row])) for row in sorted(self._unreadable)]
            share = self._split.max_unreadable
            log.warning(check_unreadable(names, len(self._split), share=share, about=self._split.name))


class _Keys:
    """What the workers are asked for: lists of (epoch, position)."""

    def __init__(self, plan: _Plan) -> None:
        self._plan, self.epoch = plan, 0

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        for batch in self._plan.batches(self._plan.order(epoch)):
            yield [(epoch, position) for position in batch.tolist()]


Sample = tuple[Tensor | None, int]  # (C, H, W) uint8 or None where unreadable, position


class _Decoder(Dataset[Sample]):
    """Decodes one image, and crops it at random if a seed is given."""

    def __init__(self, split: StreamSplit, seed: int | None) -> None:
        self._split, self._seed = split, seed

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, position = key
        split = self._split
        try:
            image = decode(split.images.read(int(split.indices[position])), split.shape[0])
        except UNREADABLE:
            return None, position
        box = None
        if self._seed is not None:
            box = random_box(image, np.random.default_rng(mix(self._seed, epoch, position)))
        return torch.from_numpy(fit(image, split.shape, box).copy()), position


def _stack(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, list[int]]:
    images = [image for image, _ in samples if image is not None]
    positions = [position for image, position in samples if image is not None]
    failed = [position for image, position in samples if image is None]
    stacked = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
    return stacked, torch.tensor(positions, dtype=torch.int64), failed


class _Prepare:
    """uint8 pixels to normalised, possibly augmented float32 on the device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device, change: nn.Module | None):
        means, stds = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self._scale = (1 / (255 * stds)).view(1, -1, 1, 1)
        self._shift = (-means / stds).view(1, -1, 1, 1)
        self._device, self._change = device, change

    @property
    def is_changing(self) -> bool:
        """Whether images are augmented."""
        return self._change is not None

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        x = images.to(self._device, torch.float32, non_blocking=True)
        if self._change is not None:
            with _global_seed(seed):
                x = self._change(x)
        return torch.addcmul(self._shift, x, self._scale).contiguous(memory_format=torch.channels_last)


@contextlib.contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """torch's own generator seeded for a while: kornia draws from it, on the CPU whatever the device of the images."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well
        yield


def _augmentation(shape: Shape, device: torch.device, *, is_cropping: bool, is_flipping: bool) -> nn.Module | None:
    """Shifts by up to 1/8 into black, mirroring left and right, on (N, C, H, W) float32."""
    if not (is_cropping or is_flipping):
        return None
    from kornia import augmentation

    _, height, width = shape
    steps: list[nn.Module] = []
    if is_cropping:
        # Slices are exact but one small copy per image, which a GPU is slow at; resampling is off by rounding.
        mode = "slice" if device.type == "cpu" else "resample"
        padding = (max(1, width // 8), max(1, height // 8))
        steps.append(augmentation.RandomCrop((height, width), padding=padding, cropping_mode=mode))
    if is_flipping:
        steps.append(augmentation.RandomHorizontalFlip())
    return nn.Sequential(*steps)


def statistics(split: Split) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel in 0..1, std at least 1/255; of 2,048 images if streamed."""
    if not len(split):
        raise DataError(f"{split.name} holds no images to take the mean and deviation of; add a train split")
    if isinstance(split, MemorySplit):
        images = split.images
    else:
        rows = np.unique(np.linspace(0, len(split) - 1, 2048).astype(np.int64))
        decoder = _Decoder(split, None)
        images, _, failed = _stack([decoder[0, int(row)] for row in rows])
        if len(failed) == len(rows):
            check_unreadable(
                [split.images.name(int(split.indices[row])) for row in failed], len(rows), share=0, about=split.name
            )
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()  # exact, and no float copy
        mean = (counts * levels).sum() / counts.sum()
        means.append(mean.item())
        stds.append(max(1 / 255, ((counts * (levels - mean) ** 2).sum() / counts.sum()).sqrt().item()))
    return tuple(means), tuple(stds)
