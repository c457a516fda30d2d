"""compress compare: methods side by side, by runs that several processes and machines share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from compress.comparison import Grid, Progress

Number = Annotated[int | None, typer.Option(min=1)]


def compare(
    models: Annotated[
        list[Path] | None, typer.Argument(metavar="[MODEL ...]", help="Checkpoints; none: go on with --out")
    ] = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="M,...", help="As --method, or METHOD+SCORE, REGULARISER+METHOD")
    ] = None,
    targets: Annotated[
        str | None, typer.Option("--targets", metavar="SHARE,...", help="Of the metric, that remain")
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=100, help="Runs of each: seeds 0, 1, ...")] = 1,
    metric: Annotated[str, typer.Option("--metric", help="What the targets are shares of, as for prune")] = "params",
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    task: options.Task = None,
    data: options.Data = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Of every run, all training together")] = None,
    device: options.Device = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any knob, the same for every run")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Where the runs and the pages go")] = Path("comparison"),
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time, here")] = 1,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="CPU threads of each run; default: processors / jobs")
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL|FILE", help="Shared by several machines; default: in --out")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Run every method at every target and seed, with both controls; plot accuracy over latency, say who wins."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress import comparison
    from compress.comparison import grid as grids
    from compress.errors import CompressError, UsageError

    asked = _grid(
        models or [], methods, targets, seeds, metric, _shared(arch, arch_arg, task, data, epochs, device, set_)
    )
    grid = asked or comparison.read(out)
    if grid is None:
        raise UsageError(f"{out} holds no comparison yet: name checkpoints, --methods and --targets")
    grids.settle(out, grid)
    every = {cell.name: cell for cell in grids.cells(grid)}
    queue = comparison.Queue(storage or str(out / "compare.journal"), f"compare-{grid.digest}", _is_free(out))
    queue.fill(every)
    threads = threads or max(1, len(os.sched_getaffinity(0)) // jobs if hasattr(os, "sched_getaffinity") else 1)
    children = Children(out, grid, threads)
    try:
        comparison.work(
            queue,
            lambda name: children.run(every[name]),
            jobs=jobs,
            on_progress=_show(len(every), queue),
            on_stop=children.interrupt,
        )
    except KeyboardInterrupt:
        view.hint(f"stopped; continue with: compress compare --out {out}")
        raise
    content = _finish(out, grid, queue)
    if as_json:
        view.document(content)
    if not content["runs"]:
        raise CompressError(f"all {len(every)} runs failed: {next(iter(content['failed'].values()), '')}")


def _finish(out: Path, grid: Grid, queue: Any) -> dict[str, Any]:
    """Measure all files together, write the pages, show the table."""
    from filelock import FileLock

    from compress import comparison
    from compress.comparison import grid as grids
    from compress.recipe import make

    outcomes, failures = queue.outcomes(), queue.failures()
    named = {model: [c.name for c in grids.cells(grid) if c.model == model and c.name in outcomes]
             for model in grid.models}  # fmt: skip
    sets = [b for a, b in zip(grid.options, grid.options[1:], strict=False) if a == "--set"]
    part = make({"model": {"path": "-"}}, sets).bench
    with FileLock(out / "compare.lock"):  # of several workers one measures, the others then find it done
        with view.counting("measuring latency, with nothing beside it") as told:
            bench = {"batch": part.batch, "threads": part.threads, "runtime": part.runtime}
            latency = comparison.measure(out, named, bench=bench, on_progress=told)
        content = comparison.document(grid, outcomes, failures, latency)
        comparison.write(out, content)
    _table(content)
    for run, why in content["failed"].items():
        view.hint(f"failed: {run}: {why}")
    missing = sorted({run["run"] for run in content["runs"]} - set(latency["files"]))
    if missing:
        view.note(f"not measured, as their files are not here: {', '.join(missing)}")
    called = grids.labels(grid.models)
    for model, verdict in content["verdicts"].items():
        view.note(f"{called[model]}: {verdict['sentence']}")
    view.note(f"{out / 'compare.html'}")
    return content


def _table(content: Mapping[str, Any]) -> None:
    """One row a method and target; compare.html has it in full."""
    from compress.comparison.grid import labels

    named = labels(content["grid"]["models"])
    rows = []
    for row in content["rows"]:
        value, latency, gain = row["value"], row["latency_ms"], row["speedup"]
        rows.append(
            (
                row["method"] if len(named) == 1 else f"{named[row['model']]}: {row['method']}",
                "" if row["target"] is None else f"{row['target']:g}",
                str(row["n"]),
                f"{value['mean']:.2f} ({value['high'] - value['low']:.2f})",
                view.figure(row["kept"]["params"]),
                "" if latency is None else view.figure(latency["mean"]),
                "" if gain is None else f"{view.figure(gain['mean'])}x",
            )
        )
    header = ("method", "target", "n", "% (spread)", "params left", "ms", "faster")
    view.table("mean (largest less smallest) over the seeds", header, rows)


class Children:
    """The runs of this worker: each a `compress prune` in its own process, so that one that dies costs no other."""

    def __init__(self, out: Path, grid: Grid, threads: int) -> None:
        self._out, self._grid, self._threads = out, grid, threads
        self._running: set[subprocess.Popen[str]] = set()

    def run(self, cell: Any) -> Mapping[str, Any]:
        """Do a cell's run, or go on with it. Returns: its report.

        Raises:
            KeyboardInterrupt: it was interrupted.
            CompressError: it failed; the last line it wrote says why.
        """
        from compress.comparison.grid import arguments
        from compress.errors import CompressError

        place = self._out / "runs" / cell.name
        begun = ["resume", str(place)]  # with the threads that it was begun with, here or on another machine
        new = [*arguments(self._grid, cell, place), "--threads", str(self._threads), *self._reused(cell)]
        given = begun if (place / "recipe.yaml").is_file() else new
        child = subprocess.Popen(
            [sys.executable, "-m", "compress.cli", *given, "--json", "-q"],
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
        )  # fmt: skip
        self._running.add(child)
        try:
            out, err = child.communicate()
        finally:
            self._running.discard(child)
        if child.returncode in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if child.returncode:
            last = (err.strip().splitlines() or [f"ended by signal {-child.returncode}"])[-1]
            raise CompressError(last.removeprefix("error: "))
        report: dict[str, Any] = json.loads(out.splitlines()[-1])
        return report

    def _reused(self, cell: Any) -> list[str]:
        """`--reuse` with the run of another target whose training towards sparsity is the same."""
        from compress import pipeline
        from compress.comparison.grid import cells

        for other in cells(self._grid):
            place = self._out / "runs" / other.name
            is_mate = (other.model, other.row, other.seed) == (cell.model, cell.row, cell.seed) and other != cell
            if is_mate and pipeline.serves(place, keep=cell.target):
                return ["--reuse", str(place)]
        return []

    def interrupt(self) -> None:
        for child in list(self._running):
            child.send_signal(signal.SIGINT)


def _grid(
    models: list[Path], methods: str | None, targets: str | None, seeds: int, metric: str, shared: list[str]
) -> Grid | None:
    """What the options ask for; None: nothing, that is, to go on.

    Raises:
        UsageError: models without methods or targets, or the other way round; a value out of range.
    """
    from compress.comparison import Grid
    from compress.comparison.grid import method_options
    from compress.errors import UsageError

    if not models and methods is None and targets is None:
        return None
    if not models or methods is None or targets is None:
        raise UsageError("a comparison needs checkpoints, --methods and --targets; with --out alone one goes on")
    missing = next((model for model in models if not str(model).startswith("hf:") and not model.exists()), None)
    if missing is not None:
        raise UsageError(f"there is no checkpoint {missing}")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        method_options(name)
    try:
        shares = [float(word) for word in targets.split(",")]
    except ValueError as error:
        raise UsageError(f"--targets {targets}: give shares with commas between them, such as 0.5,0.3") from error
    if not names or not all(0 < share <= 1 for share in shares):
        raise UsageError(
            f"--methods {methods} --targets {targets}: allowed are names, and shares above 0 and at most 1"
        )
    places = [str(model) if str(model).startswith("hf:") else str(model.absolute()) for model in models]
    return Grid(
        models=tuple(dict.fromkeys(places)), methods=tuple(dict.fromkeys(names)),
        targets=tuple(dict.fromkeys(shares)), seeds=seeds, metric=metric, options=tuple(shared),
    )  # fmt: skip


def _shared(
    arch: str | None, arch_args: list[str] | None, task: str | None, data: str | None, epochs: int | None,
    device: str | None, sets: list[str] | None,
) -> list[str]:  # fmt: skip
    """The arguments that every run gets, with absolute paths."""
    from compress.cli.prune import absolute, absolute_code

    pairs = [("--arch", absolute_code(arch)), *(("--arch-arg", text) for text in arch_args or ()),
             ("--task", absolute_code(task)), ("--data", absolute(data)), ("--epochs", epochs), ("--device", device),
             *(("--set", text) for text in sets or ())]  # fmt: skip
    return [str(word) for name, value in pairs if value is not None for word in (name, value)]


def _is_free(out: Path) -> Any:
    from compress.errors import RunFolderError
    from compress.folder import RunFolder

    def is_free(cell: str) -> bool:
        place = out / "runs" / cell
        if not (place / "recipe.yaml").is_file():
            return True
        try:
            with RunFolder.open(place).lock():
                return True
        except RunFolderError:
            return False

    return is_free


def _show(total: int, queue: Any) -> Any:
    def show(progress: Progress) -> None:
        if progress.error:
            view.hint(f"failed: {progress.cell}: {progress.error}")
        elif progress.outcome is None:
            view.note(f"{progress.cell} begins")
        else:
            done = len(queue.outcomes())
            value, split = progress.outcome["value"], progress.outcome["split"]["name"]
            view.note(f"{progress.cell}: {value:.2f} % on {split}; {done} of {total} done")

    return show
