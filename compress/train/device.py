"""Where and how fast: the device, its precision, and whether compiling pays."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from compress import ranks
from compress.data import Loader
from compress.errors import TrackerError, UsageError
from compress.example import arguments
from compress.task import CLASSIFICATION, Task
from compress.unstrided import unstrided

if TYPE_CHECKING:
    from accelerate import Accelerator

# What torch.compile costs and gains on two cores: 45 s for the 65 layers of ResNet-20 and no end in sight after ten
# minutes for ResNet-56 on a busy machine; 4 to 26 % of a bf16 step. Hence the caution: benchmarks/LOG.md.
COMPILE_SECONDS_PER_LAYER = 3.0
COMPILE_GAIN = 0.1


def accelerator(
    device: str = "auto", precision: str = "auto", trackers: Sequence[str] = (), folder: Path | None = None
) -> Accelerator:
    """The accelerate object of a run: device, autocast and processes.

    precision `auto` takes bf16 where the CPU (AVX512-BF16 or AMX) or the GPU has it in hardware.

    Raises:
        UsageError: a device that is unknown or not here. TrackerError: a tracker that is unknown or not installed.
    """
    _check_device(device)
    ranks.join()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    AcceleratorState._reset_state()  # one process may run several prunings, each with its own precision
    PartialState._reset_state()
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    bf16 = precision == "bf16" or (precision == "auto" and has_bf16(on_cpu))
    precision = "bf16" if bf16 else "no"
    if not trackers:
        return Accelerator(cpu=on_cpu, mixed_precision=precision)
    try:
        made = Accelerator(cpu=on_cpu, mixed_precision=precision, log_with=list(trackers), project_dir=folder)
    except ValueError as error:
        raise TrackerError(f"train.trackers = {list(trackers)}: {str(error).splitlines()[0]}") from error
    made.init_trackers("compress")
    if len(made.trackers) < len(trackers):
        here = ", ".join(tracker.name for tracker in made.trackers) or "none"
        raise TrackerError(
            f"of the trackers {', '.join(trackers)}, only these are installed here: {here}; pip install them"
        )
    return made


def _check_device(device: str) -> None:
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
        raise UsageError(f"the device {device!r} is unknown; allowed are auto, cpu, cuda and cuda:N")
    if number and ranks.launched()[1] > 1:
        raise UsageError(f"the device {device} is one GPU for several processes; take cuda, which gives one to each")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"there is no device {device}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )


def has_bf16(on_cpu: bool) -> bool:
    """Whether bfloat16 products run in hardware here."""
    if on_cpu:
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def compile_pays(
    model: nn.Module, loader: Loader, *, epochs: int, device: Accelerator, task: Task = CLASSIFICATION
) -> bool:
    """Whether torch.compile would win back its own time in a phase of `epochs`: a few eager steps are timed on `model`.

    Every phase compiles anew, for its own widths. Without a C++ compiler, and on short training, it never pays.
    """
    if shutil.which("c++") is None:
        return False
    model.train()
    seconds = []
    with seeded(0), unstrided(model):
        for batch in islice(loader, 4):
            began = time.perf_counter()
            images, targets = task.unpack(batch)
            with device.autocast():
                loss = task.loss(task.logits(model(*arguments(images))).float(), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())
            seconds.append(time.perf_counter() - began)
    layers = sum(not list(module.children()) for module in model.modules())
    return min(seconds) * len(loader) * epochs * COMPILE_GAIN > layers * COMPILE_SECONDS_PER_LAYER


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Dropout and the like draw from `seed` inside, and leave the global random state as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
