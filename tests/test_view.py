"""What people see, to the character."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from compress.cli import view
from compress.pipeline import Event
from compress.train import Progress

LATENCY = {"p50": 0.205, "p90": 0.23, "p99": 0.27, "batch": 1, "threads": 1, "runtime": "ort-cpu"}
NETWORK = {"params": 269_722, "macs": 10_203_776, "size_bytes": 1_098_514, "top1": 98.607, "latency_ms": LATENCY}
REPORT: dict[str, Any] = {
    "method": "halo", "target": 0.05, "metric": "params", "out": "runs/tiny", "frozen": {"linear": "the output"},
    "dense": NETWORK, "pruned": {**NETWORK, "params": 12_680, "top1": 97.214},
    "kept": {"params": 0.04701, "macs": 1.0, "size": 1.0}, "split": {"name": "test", "images": 359},
    "speedup": {"value": 2.3246, "low": 2.304, "high": 2.3394, "confidence": 0.95, "verdict": "faster"},
    "parity": {"max_abs_diff": 9.3e-6, "output_scale": 4.74},
}  # fmt: skip


@pytest.fixture(params=[80, 120])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(view, "_console", Console(stderr=True, width=request.param))
    monkeypatch.setattr(view, "_quiet", False)
    yield request.param


def test_a_table_has_words_left_and_figures_right(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    view.table("title", ("name", "n", "why"), [("a", "1", ""), ("[b]", "1,000", "2 words")])
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "title",
        "┏━━━━━━┳━━━━━━━┳━━━━━━━━━┓",
        "┃ name ┃     n ┃     why ┃",
        "┡━━━━━━╇━━━━━━━╇━━━━━━━━━┩",
        "│ a    │     1 │         │",
        "│ [b]  │ 1,000 │ 2 words │",
        "└──────┴───────┴─────────┘",
    ]


def test_the_result_fits_in_80_columns(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    view.result(REPORT)
    lines = [line.rstrip() for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "halo, target 0.05 of the params",
        "┏━━━━━━━━━━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓",
        "┃                   ┃   dense ┃ pruned ┃              share / change ┃",
        "┡━━━━━━━━━━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩",
        "│ params            │ 269,722 │ 12,680 │                      0.0470 │",
        "│ MACs (M)          │    10.2 │   10.2 │                        1.00 │",
        "│ ONNX file (kB)    │   1,100 │  1,100 │                        1.00 │",
        "│ top-1 on test (%) │   98.61 │  97.21 │                -1.39 points │",
        "│ latency p50 (ms)  │   0.205 │  0.205 │ 2.32x faster (2.30 to 2.34) │",
        "└───────────────────┴─────────┴────────┴─────────────────────────────┘",
        "latency by ort-cpu, batch 1, 1 thread; in brackets the 95 % interval",
        "ONNX proved equal to torch: max difference 9e-06 at outputs of 4.74",
        "run folder: runs/tiny",
    ]


def test_without_a_terminal_an_epoch_is_a_line(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    with view.Live() as live:
        live.show(Event("recover"))
        live.show(Event("recover", progress=Progress(0, 2, 5, 10, 0.5, 0.1, 1000.0, 3.0)))
        live.show(Event("recover", progress=Progress(0, 2, 10, 10, 0.5, 0.1, 1000.0, 3.0, top1=91.5)))
        live.show(Event("recover", "a remark"))
    assert capsys.readouterr().err == (
        "recovering accuracy\n"
        "  recover epoch 1/2: loss 0.5000, penalty 0.1000, val top-1 91.50 %, 1000 images/s\n"
        "  a remark\n"
    )


def test_no_colour_means_no_colour(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(view, "_console", Console(stderr=True, width=80, force_terminal=True))
    view.table("title", ("check", "result"), [("a", "ok"), ("b", "FAILED")])
    view.error("no [such] file")
    shown = capsys.readouterr().err
    assert not any(f"\x1b[{code}m" in shown for code in ("31", "32", "1;31"))
    assert "no [such] file" in shown


def test_quiet_leaves_errors_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(view, "_quiet", True)
    view.note("a note")
    view.table("title", ("name",), [("a",)])
    with view.working("on it"):
        view.error("wrong")
    assert capsys.readouterr().err == "error: wrong\n"


def test_the_document_is_one_line_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    view.document({"a": "two\nlines", "b": [1.5, None]})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == {"a": "two\nlines", "b": [1.5, None]}


@pytest.mark.parametrize(
    ("value", "text"), [(0.0453, "0.0453"), (12.34, "12.3"), (270_123, "270,000"), (0.59, "0.590"), (0.0, "0")]
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert view.figure(value).rstrip("0").rstrip(".") == text.rstrip("0").rstrip(".")


@pytest.mark.parametrize(
    ("value", "text"), [(0.00091583, "0.000916"), (0.158, "0.158"), (0.1580001, "0.159"), (1.0, "1.00")]
)
def test_a_share_to_ask_for_is_rounded_up(value: float, text: str) -> None:
    assert view.share(value) == text


def test_counting() -> None:
    assert [view.count(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
