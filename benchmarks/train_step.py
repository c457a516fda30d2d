"""Images per second of the project's training loop against a plain float32 loop, in one run.

    python benchmarks/train_step.py [--arch resnet20] [--batch 128] [--threads 2] [--rounds 5]

The plain loop is what a tutorial shows: float32, default memory format, torch's SGD, no autocast, images already
normalised and neither shuffled nor augmented. Ours does the same work as in a run: shuffling, augmentation and
normalisation of uint8 images, bf16 where the hardware has it, channels last, fused SGD, clipping, the learning-rate
schedule. Both see random images of CIFAR-10's size. Blocks of the two alternate (A B B A ...); the last line of stdout
is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.bench.machine import describe
from compress.data import MemorySplit, loader
from compress.models import ARCHS
from compress.train import Settings, accelerator, finetune, has_bf16

STEPS = 12  # per block


def plain_loop(arch: str, batch: int) -> Callable[[], float]:
    """Blocks of the tutorial loop; each call trains STEPS steps and returns images per second."""
    model = ARCHS[arch]().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    images, labels = torch.randn(STEPS * batch, 3, 32, 32), torch.randint(10, (STEPS * batch,))

    def block() -> float:
        began = time.perf_counter()
        for x, y in zip(images.split(batch), labels.split(batch), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return STEPS * batch / (time.perf_counter() - began)

    return block


class Timed:
    """A loader that says how long its epoch took, from the first batch asked for to the last step done."""

    def __init__(self, inner: object) -> None:
        self.inner, self.seconds = inner, 0.0

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        self.inner.set_epoch(epoch)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        began = time.perf_counter()
        yield from self.inner  # type: ignore[misc]
        self.seconds = time.perf_counter() - began


def our_loop(arch: str, batch: int, compiled: bool) -> Callable[[], float]:
    """Blocks of this project's loop: each call is one epoch of STEPS steps of `finetune`."""
    model: nn.Module = ARCHS[arch]()
    device = accelerator("cpu")
    images = torch.randint(0, 256, (STEPS * batch, 3, 32, 32), dtype=torch.uint8)
    split = MemorySplit("noise", images, torch.arange(STEPS * batch) % 10, "flip-crop")
    options = {"batch_size": batch, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    train = Timed(loader(split, train=True, **options))  # type: ignore[arg-type]
    val = loader(split.subset(torch.arange(2).numpy(), "val"), train=False, **options)  # type: ignore[arg-type]

    def block() -> float:
        finetune(model, train, val, Settings(epochs=1, lr=0.01, compile=compiled), device=device)  # type: ignore[arg-type]
        return STEPS * batch / train.seconds

    return block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet20", choices=sorted(ARCHS))
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, as in long phases")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    loops = {"plain": plain_loop(given.arch, given.batch), "ours": our_loop(given.arch, given.batch, given.compile)}
    for block in loops.values():  # warm-up
        block()
    found: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(given.rounds):
        for name in list(loops) if turn % 2 else list(loops)[::-1]:
            found[name].append(loops[name]())
    ratios = [ours / plain for ours, plain in zip(found["ours"], found["plain"], strict=True)]
    machine = describe()
    document = {
        **vars(given),
        "images_per_second": {name: statistics.median(rates) for name, rates in found.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "bf16": has_bf16(on_cpu=True),
        "machine": machine,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
