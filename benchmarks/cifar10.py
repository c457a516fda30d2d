"""The methods side by side on CIFAR-10: one `compress prune` per row and seed, and the README's tables from them.

    python benchmarks/cifar10.py --checkpoints DIR --data DIR [--table filters] [--keep 0.3] ...

Every row starts from the same dense checkpoint (fine-tuned once on each machine, for `--epochs` epochs; a star in the
table marks a mean over seeds that start from several), trains the same number of epochs on the same images, two of five
with the regulariser, cuts once unless its options say otherwise, is selected on the validation split and reads the test
split once. A finished run stands in benchmarks/results/cifar10-TABLE-CONDITIONS.jsonl with its seed, data hash,
versions and figures, and is not made again; an unfinished one is resumed at its last epoch. `--jobs 2 --threads 1` on
two cores trains more images a second than one run with two threads. Latencies are not taken from here: the machine is
busy.
`--only-table` rewrites the table alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINTS = {"resnet20": "resnet20-12fca82f.th", "resnet56": "resnet56-4bfd9763.th"}

ONE_EPOCH = ("--set", "train.sparse_share=0.2")  # of five with the regulariser; `Job.arguments` asks for two
AS_IT_COMES = (*ONE_EPOCH, "--set", "prune.rounds=auto")  # the defaults; `against_torch_pruning.py` has those of l2
# row -> what it adds to `compress prune`; the first two are the controls that every comparison carries
FILTERS: dict[str, tuple[str, ...]] = {
    "dense, fine-tuned": ("--method", "l2", "--target", "1"),
    "pruned, from scratch": ("--method", "l2", "--set", "prune.redraw=true", "--set", "train.lr=0.1"),
    "halo": ("--method", "halo"),
    "ffr": ("--method", "ffr"),
    "cka-sr + l2": ("--method", "cka-sr", "--score", "l2"),
    "ggr": ("--method", "ggr"),
    "l2": ("--method", "l2"),
    "taylor": ("--method", "taylor"),
    "bn-slimming": ("--method", "bn-slimming"),
    "group-sparsity": ("--method", "group-sparsity"),
    "growing-reg": ("--method", "growing-reg"),
    "random": ("--method", "random"),
    "halo, as it comes": ("--method", "halo", *AS_IT_COMES),
    "group-sparsity, as it comes": ("--method", "group-sparsity", *AS_IT_COMES),
    # ways to mend the four, see LOG.md
    "halo, penalty_share 300": ("--method", "halo", "--set", "prune.penalty_share=300"),
    "halo, one sparse epoch of five": ("--method", "halo", *ONE_EPOCH),
    "ffr, one sparse epoch of five": ("--method", "ffr", *ONE_EPOCH),
    "cka-sr + l2, one sparse epoch of five": ("--method", "cka-sr", "--score", "l2", *ONE_EPOCH),
    "ggr, one sparse epoch of five": ("--method", "ggr", *ONE_EPOCH),
    "ffr + l2": ("--method", "ffr", "--score", "l2"),
    "l2, temperature 2": ("--method", "l2", "--set", "train.temperature=2"),
    "l2, weight decay 1e-4": ("--method", "l2", "--set", "train.weight_decay=0.0001"),
    "growing-reg, penalty_share 10": ("--method", "growing-reg", "--set", "prune.penalty_share=10"),
}
# A bad start for 5 %: early layers nearly dense, late ones nearly empty; scaled to the density, floors respected.
_STAGES = {1: 0.9, 2: 0.05, 3: 0.005}
BAD = {f"layer{s}.{b}.conv{c}.weight": share for s, share in _STAGES.items() for b in range(3) for c in (1, 2)}
SPARSE_TRAINING = ("ggr", "rigl", "set", "static-erk")


def sparse_training(name: str, **options: Any) -> tuple[str, ...]:
    """Four of five epochs of training with dead weights, which then stay where they are."""
    paces = {} if name == "static-erk" else {"interval": 50}  # a short training changes places more often
    given = json.dumps({name: {**paces, **options}})
    return ("--method", name, "--set", "train.sparse_share=0.8", "--set", f"prune.options={given}")


def weights_rows() -> dict[str, tuple[str, ...]]:
    """Single weights: cut by size after a penalty, or trained sparse from two starts; each alone and with CKA-SR."""
    rows = {
        "halo": ("--method", "halo"),
        "magnitude": ("--method", "l1"),
        "lasso": ("--method", "lasso"),
    }
    for name in SPARSE_TRAINING:
        rows[name] = sparse_training(name)
        rows[f"{name}, bad start"] = sparse_training(name, initial=BAD)
    both = {f"{name} + cka-sr": (*options, "--regularize", "cka-sr") for name, options in rows.items()}
    mended = {  # see LOG.md
        "halo, one sparse epoch of five": ("--method", "halo", *ONE_EPOCH),
        "ggr, fraction 0.1": sparse_training("ggr", fraction=0.1),
        "ggr, end 0.5": sparse_training("ggr", end=0.5),
        "ggr, rho 0": sparse_training("ggr", rho=0.0),
    }
    return {name: ("--granularity", "weight", *options) for name, options in (rows | both | mended).items()}


WEIGHTS = weights_rows()
# The same latency, one thread, by the milliseconds of the layers or by their MACs: `--keep` is the share of what a row
# prices by. `auto` keeps to widths that the processor likes, blocks of 4 leave it to the price to find them.
LATENCY = {
    f"{metric}, blocks {block}": (
        *("--metric", metric, "--method", "l2", "--on", "ort-cpu:threads=1:batch=1", "--round-to", block),
    )
    for block in ("auto", "4")
    for metric in ("latency", "macs")
}
TABLES = {"filters": FILTERS, "weights": WEIGHTS, "latency": LATENCY}


@dataclass(frozen=True)
class Bench:
    """What all rows of one table share."""

    table: str
    arch: str
    epochs: int
    checkpoints: Path
    data: Path
    work: Path  # the run folders and the dense checkpoint; not part of the project
    threads: int
    val_share: float = 0.02

    @property
    def results(self) -> Path:
        return RESULTS / f"cifar10-{self.table}-{self.conditions}.jsonl"

    @property
    def conditions(self) -> str:
        return f"{self.arch}-{self.epochs}epochs-val{self.val_share:g}"

    @property
    def dense(self) -> Path:
        return self.work / f"dense-{self.conditions}.safetensors"

    def call(self, *arguments: str) -> str:
        """The command line in a process of its own; its last line of stdout. Raises RuntimeError where it fails."""
        command = [sys.executable, "-m", "compress.cli", *arguments, "--json", "-q"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        return done.stdout.strip().splitlines()[-1]


@dataclass(frozen=True)
class Job:
    """One run: a row at one share of the parameters with one seed."""

    row: str
    keep: float
    seed: int

    def arguments(self, bench: Bench) -> list[str]:
        options = TABLES[bench.table][self.row]
        target = [] if "--target" in options else ["--target", f"{self.keep:g}"]
        folder = bench.work / f"{bench.table}-{bench.conditions}"
        name = f"{_plain(self.row)}-{self.keep:g}-{self.seed}"
        settings = {
            "data.val_share": bench.val_share, "prune.rounds": 1, "train.sparse_share": 0.4,
            "bench.seconds": 1,  # latencies are not taken from here
        }  # fmt: skip
        return [
            *("prune", str(bench.dense), "--data", str(bench.data), "--epochs", str(bench.epochs)),
            *("--seed", str(self.seed), "--round-to", "1", "--device", "cpu"),
            *(word for knob, value in settings.items() for word in ("--set", f"{knob}={value}")),
            *("--out", str(folder / name), "--resume", *self._reused(folder)),
            *target,
            *options,
        ]

    def _reused(self, folder: Path) -> list[str]:
        """`--reuse` with the run at another share that has the training towards sparsity which this row begins with."""
        from compress.pipeline import serves  # loads torch, which a table alone does not need

        mates = folder.glob(f"{_plain(self.row)}-*-{self.seed}")
        return next((["--reuse", str(mate)] for mate in mates if serves(mate, keep=self.keep)), [])


def train_dense(bench: Bench) -> None:
    """The pretrained network, fine-tuned on these files: what every row starts from."""
    if bench.dense.exists():
        return
    bench.work.mkdir(parents=True, exist_ok=True)
    weights = str(bench.checkpoints / CHECKPOINTS[bench.arch])
    bench.call(
        *("train", "--arch", bench.arch, "--init", weights, "--data", str(bench.data), "--epochs", str(bench.epochs)),
        *("--lr", "0.05", "--seed", "0", "--val-share", str(bench.val_share), "--device", "cpu"),
        *("--out", str(bench.dense), "--resume"),
    )


def run(bench: Bench, job: Job) -> dict[str, Any]:
    """One run, from the start or from where it was broken off; its line in the results."""
    report = json.loads(bench.call(*job.arguments(bench)))
    conditions = {"epochs": bench.epochs, "options": list(TABLES[bench.table][job.row]), "threads": bench.threads}
    return {"row": job.row, "keep": job.keep, "seed": job.seed, **conditions, **describe_run(report)}


def describe_run(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a results file keeps of a run's report."""
    environment = report["environment"]
    return {
        "top1": report["pruned"]["top1"],
        "val_top1": report["val_top1"]["recovered"]["best"],
        "last_val_top1": report["val_top1"]["recovered"]["last"],
        "dense_top1": report["dense"]["top1"],
        "kept": report["kept"],
        "split": report["split"],
        "data": report["data"]["fingerprint"],
        "source_sha256": environment["source_sha256"],
        "environment": {key: environment[key] for key in environment if key not in ("source_sha256", "seed")},
        "seconds": sum(report["seconds"].values()),
    }


def finished(bench: Bench) -> dict[Job, dict[str, Any]]:
    """The runs in the results file."""
    if not bench.results.exists():
        return {}
    lines = [json.loads(line) for line in bench.results.read_text().splitlines()]
    return {Job(line["row"], line["keep"], line["seed"]): line for line in lines}


def table(bench: Bench) -> str:
    """Mean and spread (largest minus smallest) of test top-1 over the seeds, as Markdown: rows by keep.

    A star marks what starts from several dense networks: each machine trains its own.
    """
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for job, line in finished(bench).items():
        found.setdefault((job.row, job.keep), []).append(line)
    keeps = sorted({keep for _, keep in found}, reverse=True)
    lines = [f"| method | {' | '.join(f'keep {keep:g}' for keep in keeps)} |", "|---" * (len(keeps) + 1) + "|"]
    for row in TABLES[bench.table]:
        cells = [_marked(found.get((row, keep), ())) for keep in keeps]
        if any(cells):
            lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({max(values) - min(values):.2f}, n = {len(values)})" if len(values) > 1 else " (n = 1)"
    return f"{statistics.mean(values):.2f}{spread}"


def _marked(lines: Sequence[Mapping[str, Any]]) -> str:
    return cell([line["top1"] for line in lines]) + "*" * (len({line["source_sha256"] for line in lines}) > 1)


def _plain(row: str) -> str:
    return "".join(letter for letter in row if letter.isalnum() or letter == "-")


def jobs(bench: Bench, given: argparse.Namespace) -> Iterator[Job]:
    """All runs asked for, one seed of every row before the next, so that an unfinished table is an even one."""
    done = finished(bench)
    for seed in range(given.seeds):
        wanted = (Job(row, keep, seed) for keep in given.keep for row in given.rows or TABLES[bench.table])
        whole = (replace(job, keep=1.0) if "--target" in TABLES[bench.table][job.row] else job for job in wanted)
        yield from (job for job in dict.fromkeys(whole) if job not in done)


def make(bench: Bench, wanted: Sequence[Job], count: int) -> int:
    """Run all `wanted`, `count` at a time; each line is written as its run ends. The number that failed."""
    failed = 0
    with ThreadPoolExecutor(count) as pool:
        running = {pool.submit(run, bench, job): job for job in wanted}
        for future in as_completed(running):
            try:
                line = future.result()
            except RuntimeError as error:  # one row that fails must not cost the others
                failed += 1
                print(f"{running[future]}: {error}", file=sys.stderr)
                continue
            with bench.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{running[future]}: {line['top1']:.2f} % on {line['split']['name']}", file=sys.stderr, flush=True)
    return failed


def write_readme(bench: Bench, text: str) -> None:
    """Put the table between its two marks in the README."""
    readme = ROOT / "README.md"
    begin, end = (f"<!-- {word} cifar10-{bench.table}-{bench.arch} -->" for word in ("begin", "end"))
    before, found, rest = readme.read_text().partition(begin)
    if found and end in rest:
        readme.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def options(text: str | None, *, keep: Sequence[float]) -> argparse.ArgumentParser:
    """The command line of a comparison on CIFAR-10; `keep`: the shares unless others are asked for."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of the pretrained ResNets")
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as Parquet files")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "cifar10", help="where the run folders go")
    parser.add_argument("--arch", choices=CHECKPOINTS, default="resnet20")
    parser.add_argument("--epochs", type=int, default=5, help="of the dense fine-tune, and of every row")
    parser.add_argument("--keep", type=float, nargs="+", default=list(keep), help="shares of the parameters")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--val-share", type=float, default=0.02, help="of train, held out to choose the epoch by")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="of each run")
    parser.add_argument("--only-table", action="store_true", help="train nothing, write the table")
    return parser


def bench_of(table: str, given: argparse.Namespace) -> Bench:
    """What the options say of one table."""
    paths = (given.checkpoints.resolve(), given.data.resolve(), given.work.resolve())
    return Bench(table, given.arch, given.epochs, *paths, given.threads, given.val_share)


def main() -> int:
    parser = options(__doc__, keep=[0.3])
    parser.add_argument("--table", choices=TABLES, default="filters")
    parser.add_argument("--rows", nargs="+", help="some rows only")
    given = parser.parse_args()
    bench = bench_of(given.table, given)
    failed = 0
    if not given.only_table:
        train_dense(bench)
        failed = make(bench, list(jobs(bench, given)), given.jobs)
    text = table(bench)
    write_readme(bench, text)
    print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
