"""What a regulariser costs: the time of a training step with each one over the plain step, and its memory.

    python benchmarks/regularizer_overhead.py [--arch resnet20 ...] [--method halo ...] [--threads 2] [--device cpu]

The step is that of compress.train: channels last, bf16 where the hardware has it, loss and penalty, backward,
clipping, fused SGD with momentum, `after_step`. Steps with and without the regulariser alternate (A B B A ...) on two
networks of the same weights. Rounds are whole periods of the method; a round's ratio is the mean step with over the
mean step without it (medians where every step does the same), and a row holds the median and range over its rounds.
A method that acts at the end of a period too long to measure runs with a short one; its quiet steps are then counted as
often as the true period has them (PERIODS).

Memory: the peak of a fresh process that takes the steps of a period, above that of one without a regulariser; and the
most bytes of tensors that the regulariser holds meanwhile, its parameters' gradients and momenta included.

Every row is written as it ends to benchmarks/results/regularizer_overhead-<conditions>.jsonl, and skipped when it is
there. The last line of stdout is JSON; the exit code is 1 when a method is over its bar, in time or in copies (COPIES).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.bench.child import peak_bytes
from compress.bench.machine import describe
from compress.groups import Group, trace
from compress.models import ARCHS
from compress.regularize import REGULARIZERS, Halo, Regularizer
from compress.regularize.channels import penalised
from compress.train import accelerator, has_bf16

RESULTS = Path(__file__).parent / "results"
NETWORKS = {"resnet20": 5, "resnet56": 3, "vgg16_bn": 2}  # name -> rounds of STEPS steps (or of a period)
STEPS = 5  # of a round, with and without
VARIANTS: dict[str, Callable[..., Regularizer]] = {
    "halo": Halo,
    "halo-sgd": lambda: Halo(solver="sgd"),
    "halo-weight": lambda: Halo(granularity="weight"),
    "halo-weight-sgd": lambda: Halo(granularity="weight", solver="sgd"),
}
METHODS = VARIANTS | {name: make for name, make in REGULARIZERS.items() if name != "halo"}
BARS = {"ggr": 1.05}
BAR = 1.10  # of every other method
COPIES = {"halo": 0, "halo-sgd": 0, "halo-weight": 0, "halo-weight-sgd": 3}  # of the penalised weights, at most


@dataclass(frozen=True)
class Period:
    """A method that acts in the last `acting` of every `steps` steps; measured with a period of `measured`."""

    steps: int
    acting: int
    measured: int


UPDATES = Period(100, 4, 10)  # of a topology: the gradients of four batches, an update with the last
PERIODS = {"cka-sr": Period(5, 1, 5), "ggr": UPDATES, "rigl": UPDATES, "set": UPDATES}
EVERY = Period(1, 1, 1)
Step = Callable[[], float]


class Loop:
    """One network in training: each call takes one step and returns its seconds."""

    def __init__(self, arch: str, batch: int, device: Any, held: tuple[Regularizer, Sequence[Group]] | None) -> None:
        torch.manual_seed(0)
        self.model = ARCHS[arch]().to(device.device, memory_format=torch.channels_last).train()
        self.device, self.regularizer = device, held[0] if held else None
        if held:
            held[0].attach(self.model, held[1])
        self.optimizer = torch.optim.SGD(self._groups(), lr=1e-3, momentum=0.9, nesterov=True, fused=True)
        images = torch.randn(batch, 3, 32, 32, device=device.device)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.arange(batch, device=device.device) % 10

    def __call__(self) -> float:
        self._wait()
        began = time.perf_counter()
        with self.device.autocast():
            logits = self.model(self.images).float()
            penalty = (
                self.regularizer.penalty().to(logits.device) if self.regularizer else torch.zeros_like(logits[0, 0])
            )
        loss = F.cross_entropy(logits, self.labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.device.backward(loss + penalty)
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        if self.regularizer:
            self.regularizer.after_step()
        self._wait()
        return time.perf_counter() - began

    def state_bytes(self) -> int:
        """Of all tensors that the regulariser holds and the network does not, its gradients and momenta included."""
        if self.regularizer is None:
            return 0
        found: dict[int, Tensor] = {}
        gather(vars(self.regularizer), found, set())
        for own in self.regularizer.parameters():
            gather([own, own.grad, self.optimizer.state.get(own, {})], found, set())
        shared = {t.untyped_storage().data_ptr() for t in self.model.state_dict().values()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found.values()}
        return sum(size for place, size in storages.items() if place not in shared)

    def _groups(self) -> list[dict[str, Any]]:
        learned = [p for p in self.model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in learned if p.dim() > 1], "weight_decay": 5e-4},
            {"params": [p for p in learned if p.dim() <= 1], "weight_decay": 0.0},
        ]
        own = list(self.regularizer.parameters()) if self.regularizer else []
        return [*groups, {"params": own, "weight_decay": 1e-4}] if own else groups

    def _wait(self) -> None:
        if self.device.device.type == "cuda":
            torch.cuda.synchronize()


def gather(value: Any, found: dict[int, Tensor], seen: set[int]) -> None:
    """Every tensor below `value`, through containers and attributes of our own objects; networks are passed over."""
    if isinstance(value, Tensor):
        found[id(value)] = value
    if id(value) in seen or isinstance(value, Tensor | nn.Module | str | int | float | type(None)):
        return
    seen.add(id(value))
    below: Any = ()
    if isinstance(value, Mapping):
        below = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        below = value
    elif type(value).__module__.startswith("compress."):
        below = vars(value).values()
    for inner in below:
        gather(inner, found, seen)


def shortened(name: str) -> Regularizer:
    """The method, with the period that it is measured with."""
    return METHODS[name](interval=UPDATES.measured) if PERIODS.get(name) == UPDATES else METHODS[name]()


def mean_step(seconds: Sequence[float], period: Period) -> float:
    """The mean step over whole true periods, from steps of measured ones: (rounds * measured,) -> seconds."""
    if period.steps == 1:
        return statistics.median(seconds)
    quiet, acting = [], []
    for at, each in enumerate(seconds):
        (acting if at % period.measured >= period.measured - period.acting else quiet).append(each)
    return (
        statistics.mean(acting) * period.acting + statistics.mean(quiet) * (period.steps - period.acting)
    ) / period.steps


def ratios(plain: Step, method: Step, period: Period, rounds: int) -> tuple[list[float], list[float]]:
    """Of each round: mean step with over mean step without, and the latter in milliseconds."""
    for _ in range(max(2, period.measured)):  # warm-up: one period of the method
        method()
    plain(), plain()
    found, milliseconds = [], []
    for _ in range(rounds):
        times: dict[Step, list[float]] = {plain: [], method: []}
        for turn in range(max(STEPS, period.measured)):
            for loop in (plain, method) if turn % 2 else (method, plain):
                times[loop].append(loop())
        without = statistics.median(times[plain]) if period.steps == 1 else statistics.mean(times[plain])
        found.append(mean_step(times[method], period) / without)
        milliseconds.append(1e3 * without)
    return found, milliseconds


def traced(arch: str) -> tuple[Group, ...]:
    torch.manual_seed(0)
    return trace(ARCHS[arch](), torch.randn(1, 3, 32, 32))


def measure(given: argparse.Namespace, arch: str, name: str, groups: Sequence[Group]) -> dict[str, Any]:
    """One row: time, memory, and whether the bar holds."""
    device = accelerator(given.device)
    regularizer, period = shortened(name), PERIODS.get(name, EVERY)
    plain, method = Loop(arch, given.batch, device, None), Loop(arch, given.batch, device, (regularizer, groups))
    found, milliseconds = ratios(plain, method, period, given.rounds or NETWORKS[arch])
    with_it, without = in_fresh_process(given, arch, name), in_fresh_process(given, arch, "plain")
    ratio, bar = statistics.median(found), BARS.get(name, BAR)
    copies = with_it["state_bytes"] / with_it["penalised_bytes"]
    return {
        "arch": arch,
        "method": name,
        "ratio": {"median": ratio, "min": min(found), "max": max(found), "rounds": len(found)},
        "plain_ms": statistics.median(milliseconds),
        "bar": bar,
        "holds": ratio <= bar and copies <= COPIES.get(name, math.inf) + 0.01,  # a value per channel is no copy
        "period": period.steps,
        "extra_peak_bytes": with_it["peak_bytes"] - without["peak_bytes"],
        "plain_peak_bytes": without["peak_bytes"],
        "state_bytes": with_it["state_bytes"],
        "weight_bytes": with_it["weight_bytes"],
        "copies": copies,
        "commit": commit(),
    }


def commit() -> str:
    """What the checkout stands at."""
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=RESULTS, capture_output=True, text=True)
    return done.stdout.strip()


_PLAIN: dict[str, dict[str, int]] = {}


def in_fresh_process(given: argparse.Namespace, arch: str, name: str) -> dict[str, int]:
    """`memory` of one network in a process of its own; the plain one of each network is measured once."""
    if name == "plain" and arch in _PLAIN:
        return _PLAIN[arch]
    asked = [
        "--arch",
        arch,
        "--method",
        name,
        "--batch",
        given.batch,
        "--threads",
        given.threads,
        "--device",
        given.device,
    ]
    command = [sys.executable, __file__, "--memory", *map(str, asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    if name == "plain":
        _PLAIN[arch] = found
    return found


def memory(given: argparse.Namespace) -> dict[str, int]:
    """The peak of a period's steps (two at least) in this process, and the most that the regulariser holds in them."""
    arch, name = given.arch[0], given.method[0]
    groups, device = traced(arch), accelerator(given.device)
    loop = Loop(arch, given.batch, device, None if name == "plain" else (shortened(name), groups))
    held = []
    for _ in range(max(2, PERIODS[name].measured if name in PERIODS else 1)):
        loop()
        held.append(loop.state_bytes())
    on_gpu = device.device.type == "cuda"
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
        "state_bytes": max(held),
        "weight_bytes": sum(p.nbytes for p in loop.model.parameters()),
        "penalised_bytes": sum(p.nbytes for p in penalised(loop.model)),
    }


def conditions(given: argparse.Namespace) -> str:
    machine = describe()
    where = f"{machine['cpu']}-{machine['vector_unit']}" if given.device == "cpu" else torch.cuda.get_device_name()
    words = "".join(c if c.isalnum() else " " for c in where.lower()).split()
    return f"batch{given.batch}-threads{given.threads}-{given.device}-{'-'.join(words)}"


def line(row: Mapping[str, Any]) -> str:
    ratio, mega = row["ratio"], 1e6
    return (
        f"{row['arch']:<9} {row['method']:<16} {ratio['median']:>6.3f} {ratio['min']:>6.3f} {ratio['max']:>6.3f} "
        f"{row['bar']:>5.2f} {row['plain_ms']:>9.1f} {row['extra_peak_bytes'] / mega:>10.1f} "
        f"{row['state_bytes'] / mega:>8.2f} {row['state_bytes'] / row['weight_bytes']:>8.2f}"
    )


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that are there; the last line of a killed run may be torn."""
    found = {}
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(text)
            found[row["arch"], row["method"]] = row
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=["plain", *METHODS])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, help="of every network; without it those of NETWORKS")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the result file")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)  # the fresh process
    return parser.parse_args()


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    if given.memory:
        print(json.dumps(memory(given)))
        return
    path = given.results / f"regularizer_overhead-{conditions(given)}.jsonl"
    rows, head = (
        read(path),
        "arch      method           median    min    max   bar  plain ms  peak (MB) state MB  weights",
    )
    print(head, flush=True)
    for arch in given.arch:
        groups = traced(arch)
        for name in given.method:
            if (arch, name) not in rows:
                rows[arch, name] = measure(given, arch, name, groups)
                with path.open("a") as file:
                    file.write(json.dumps(rows[arch, name]) + "\n")
            print(line(rows[arch, name]), flush=True)
    asked = [rows[arch, name] for arch in given.arch for name in given.method]
    missed = [row for row in asked if not row["holds"]]
    for row in missed:
        found = f"{row['ratio']['median']:.3f} of the plain step, {row['copies']:.2f} copies"
        print(f"over its bar: {row['method']} on {row['arch']}: {found}")
    document = {"batch": given.batch, "threads": given.threads, "device": given.device, "file": path.name}
    document |= {"bf16": has_bf16(given.device == "cpu"), "machine": describe(), "rows": asked, "holds": not missed}
    print(json.dumps(document))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
