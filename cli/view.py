"""What people see: tables, progress and error text. The only file that writes to the terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from compress import ranks

if TYPE_CHECKING:
    from compress.pipeline import Event

_console = Console(stderr=True)
_quiet = False

_STATES = {"ok": "green", "skipped": "yellow", "FAILED": "bold red"}  # cells that stand out
STAGES = {
    "load": "loading the data",
    "prepare": "tracing and judging the dense network",
    "sparse": "training towards sparsity, then cutting",
    "recover": "recovering accuracy",
    "export": "exporting and proving the ONNX files",
    "measure": "measuring latency",
    "quantize": "quantising the pruned file, and measuring it beside float32",
    "report": "writing the report",
}


def set_up(*, quiet: bool = False, verbose: bool = False) -> None:
    """Choose how much is shown, by one of several processes; log lines go to stderr with `verbose`."""
    global _quiet
    verbose = verbose and _is_first()
    _quiet = quiet or not _is_first()
    logging.captureWarnings(True)
    logger = logging.getLogger()
    logger.handlers = [RichHandler(console=_console, show_path=False)] if verbose else [logging.NullHandler()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def _is_first() -> bool:
    return ranks.launched()[0] == 0


def error(text: str) -> None:
    _console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)


def hint(text: str) -> None:
    """What to do next after a failure; shown even when quiet."""
    if _is_first():
        _console.print(escape(text), soft_wrap=True, highlight=False)


def traceback() -> None:
    _console.print_exception()


def note(text: str) -> None:
    if not _quiet:
        _console.print(escape(text), soft_wrap=True, highlight=False)


def document(content: Mapping[str, Any]) -> None:
    """The last line of stdout: one JSON document."""
    if _is_first():
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr. The first column and columns of words stand left, columns of figures right."""
    if _quiet:
        return
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        cells = [row[index] for row in rows if row[index]]
        is_figures = index > 0 and 2 * sum(cell[0] in "0123456789+-" for cell in cells) > len(cells)
        made.add_column(name, justify="right" if is_figures else "left", overflow="fold")
    for row in rows:
        made.add_row(*(f"[{_STATES[cell]}]{cell}[/]" if cell in _STATES else escape(cell) for cell in row))
    _console.print(made)


@contextmanager
def working(text: str) -> Iterator[None]:
    """What is being done: a line that moves and then goes away on a terminal, an ordinary line elsewhere."""
    if _console.is_terminal and not _quiet:
        with _console.status(escape(text)):
            yield
        return
    note(text)
    yield


@contextmanager
def counting(text: str) -> Iterator[Callable[[int, int], None]]:
    """Yields what is to be told how much is done, of how much: a bar on a terminal, one line elsewhere."""
    if not _console.is_terminal or _quiet:
        note(text)
        yield lambda done, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(compact=True), console=_console, transient=True) as bars:
        task = bars.add_task(escape(text), total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def figure(value: float) -> str:
    """Three significant digits with thousands separators: 0.0453, 12.3, 270,000."""
    from compress.report.words import figure as written

    return written(value)


def share(value: float) -> str:
    """A share to ask for: three significant digits, rounded up so that it is not below what was found."""
    from compress.reach import rounded_up

    return figure(rounded_up(value))


def result(report: Mapping[str, Any]) -> None:
    """The end of a run: dense -> pruned, and where everything is."""
    from compress.report.words import measured, metric_words, reached

    dense, pruned = report["dense"], report["pruned"]
    latency = pruned["latency_ms"]
    split, what = report["split"]["name"], metric_words(measured(pruned))
    before, after = reached(dense), reached(pruned)
    kept = report["kept"]
    rows = [
        ("params", f"{dense['params']:,}", f"{pruned['params']:,}", figure(kept["params"])),
        ("MACs (M)", figure(dense["macs"] / 1e6), figure(pruned["macs"] / 1e6), figure(kept["macs"])),
        ("ONNX file (kB)", figure(dense["size_bytes"] / 1e3), figure(pruned["size_bytes"] / 1e3), figure(kept["size"])),
        (f"{what} on {split} (%)", f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f} points"),
        ("latency p50 (ms)", figure(dense["latency_ms"]["p50"]), figure(latency["p50"]), speedup(report["speedup"])),
    ]
    table(
        f"{report['method']}, target {report['target']:g} of the {report['metric']}",
        ("", "dense", "pruned", "share / change"),
        rows,
    )
    where = f"{latency['runtime']}, batch {latency['batch']}, {count(latency['threads'], 'thread')}"
    note(f"latency by {where}; in brackets the {100 * report['speedup'].get('confidence', 0.95):g} % interval")
    if report.get("quantized"):
        note(f"{report['quantized']['file']}, {report['quantized']['verdict']}")
    if report.get("unquantized"):
        hint(f"not quantised: {report['unquantized']}")
    parity = report["parity"]
    scale = figure(parity["output_scale"])
    note(f"ONNX proved equal to torch: max difference {parity['max_abs_diff']:.1g} at outputs of {scale}")
    for name, reason in report["frozen"].items():
        logging.getLogger(__name__).info("frozen: %s: %s", name, reason)
    note(f"run folder: {report['out']}")


def speedup(found: Mapping[str, Any]) -> str:
    """`2.32x faster (2.30 to 2.34)`, or that no difference was seen."""
    from compress.report.words import speed_words

    return speed_words(found)


def count(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


class Live:
    """Progress of a run: bars on a terminal, one line per epoch elsewhere; `metric` is what validation measures."""

    def __init__(self, metric: str = "top1") -> None:
        self._metric = metric
        self._bars: Progress | None = None
        if _console.is_terminal and not _quiet:
            self._bars = Progress(
                TextColumn("{task.description:<8}"), BarColumn(bar_width=20), MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"), TimeRemainingColumn(compact=True), console=_console,
            )  # fmt: skip
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> Live:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, event: Event) -> None:
        if event.progress is None:
            text = event.text or STAGES.get(event.stage, event.stage)
            note(f"  {text}" if event.text else text)
            return
        at = event.progress
        if self._bars is None:
            if at.top1 is not None:
                from compress.report.words import metric_words

                note(
                    f"  {event.stage} epoch {at.epoch + 1}/{at.epochs}: loss {at.loss:.4f}, penalty {at.penalty:.4f}, "
                    f"val {metric_words(self._metric)} {at.top1:.2f} %, {at.images_per_second:.0f} images/s"
                )
            return
        if self._stage != event.stage or self._task is None:
            self._stage = event.stage
            self._task = self._bars.add_task(event.stage, total=at.epochs * at.steps, facts="")
        facts = f"loss {at.loss:.3f}  {at.images_per_second:,.0f} images/s"
        if at.top1 is not None:
            facts += f"  val {at.top1:.2f} %"
        self._bars.update(self._task, completed=at.epoch * at.steps + at.step, facts=facts)
