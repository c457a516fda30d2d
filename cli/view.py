"""What people see: tables, progress and error text. The only file that writes to the terminal."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from compress.pipeline import Event

_console = Console(stderr=True)
_quiet = False

STAGES = {
    "load": "loading the data",
    "prepare": "tracing and judging the dense network",
    "sparse": "training towards sparsity, then cutting",
    "recover": "recovering accuracy",
    "export": "exporting and proving the ONNX files",
    "measure": "measuring latency",
    "report": "writing the report",
}


def set_up(*, quiet: bool = False, verbose: bool = False) -> None:
    """Choose how much is shown; log lines of the library go to stderr with `verbose`."""
    global _quiet
    _quiet = quiet
    logging.captureWarnings(True)
    logger = logging.getLogger()
    logger.handlers = [RichHandler(console=_console, show_path=False)] if verbose else [logging.NullHandler()]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)


def error(text: str) -> None:
    _console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)


def traceback() -> None:
    _console.print_exception()


def note(text: str) -> None:
    if not _quiet:
        _console.print(escape(text), soft_wrap=True, highlight=False)


def document(content: Mapping[str, Any]) -> None:
    """The last line of stdout: one JSON document."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stderr; the first column is text, the others are figures."""
    if _quiet:
        return
    made = Table(title=title, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        made.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(escape(cell) for cell in row))
    _console.print(made)


def figure(value: float) -> str:
    """Three significant digits with thousands separators: 0.0453, 12.3, 270,000."""
    if value == 0:
        return "0"
    text = f"{float(f'{value:.3g}'):,.10f}".rstrip("0").rstrip(".")
    return text or "0"


def result(report: Mapping[str, Any]) -> None:
    """The end of a run: dense -> pruned, and where everything is."""
    dense, pruned = report["dense"], report["pruned"]
    latency = pruned["latency_ms"]
    split = report["split"]["name"]
    rows = [
        ("params", f"{dense['params']:,}", f"{pruned['params']:,}", f"{report['kept']['params']:.3f}"),
        ("MACs (millions)", figure(dense["macs"] / 1e6), figure(pruned["macs"] / 1e6), f"{report['kept']['macs']:.3f}"),
        ("ONNX file (kB)", figure(dense["size_bytes"] / 1e3), figure(pruned["size_bytes"] / 1e3), f"{report['kept']['size']:.3f}"),
        (f"top-1 on {split} (%)", f"{dense['top1']:.2f}", f"{pruned['top1']:.2f}", f"{pruned['top1'] - dense['top1']:+.2f} points"),
        (
            f"latency p50 (ms, {latency['runtime']}, batch {latency['batch']}, {_count(latency['threads'], 'thread')})",
            figure(dense["latency_ms"]["p50"]),
            figure(latency["p50"]),
            _speedup(report["speedup"]),
        ),
    ]
    table(
        f"{report['method']}, target {report['target']:g} of the {report['metric']}",
        ("", "dense", "pruned", "share / change"),
        rows,
    )
    parity = report["parity"]
    note(f"ONNX proved equal to torch: max difference {parity['max_abs_diff']:.1g} at outputs of {parity['output_scale']:.3g}")
    for name, reason in report["frozen"].items():
        logging.getLogger(__name__).info("frozen: %s: %s", name, reason)
    note(f"run folder: {report['out']}")


def _speedup(speedup: Mapping[str, Any]) -> str:
    span = f"({speedup['low']:.2f} to {speedup['high']:.2f})"
    return f"{speedup['value']:.2f}x faster {span}" if speedup["verdict"] == "faster" else f"{speedup['verdict']} {span}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


class Live:
    """Progress of a run: bars on a terminal, one line per epoch elsewhere."""

    def __init__(self) -> None:
        self._bars: Progress | None = None
        if _console.is_terminal and not _quiet:
            self._bars = Progress(
                TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(), console=_console,
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
                note(
                    f"  {event.stage} epoch {at.epoch + 1}/{at.epochs}: loss {at.loss:.4f}, penalty {at.penalty:.4f}, "
                    f"val top-1 {at.top1:.2f} %, {at.images_per_second:.0f} images/s"
                )
            return
        if self._stage != event.stage or self._task is None:
            self._stage = event.stage
            self._task = self._bars.add_task(event.stage, total=at.epochs * at.steps, facts="")
        facts = f"loss {at.loss:.3f}  {at.images_per_second:,.0f} images/s"
        if at.top1 is not None:
            facts += f"  val {at.top1:.2f} %"
        self._bars.update(self._task, completed=at.epoch * at.steps + at.step, facts=facts)
