"""The report of a run: figures pass through unchanged, words are honest, pages are safe and self-contained."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from compress import report
from compress.report import charts, pages, words

EVIL = "<script>alert('label')</script>"
SPEEDUPS = {"faster": (2.0, 1.9, 2.1), "slower": (0.8, 0.75, 0.85), "not distinguishable": (1.0, 0.97, 1.03)}
Facts = dict[str, Any]


def latency(file: str, p50: float) -> Facts:
    found = {"p50": p50, "p90": p50 * 1.2, "p99": p50 * 1.5, "mean": p50 * 1.1, "batch": 1, "threads": 1, "n": 300}
    found |= {"runtime": "ort-cpu", "warmup": 50, "throughput": 1000 / p50, "samples": [p50 * 0.99, p50, p50 * 1.01]}
    sizes = {"size_bytes": int(p50 * 40_000), "size_gzip_bytes": 30_000, "peak_memory_bytes": 2_000_000}
    return {"file": file, "sha256": "ab" * 32, **sizes, "load_ms": 3.0, "first_ms": 1.0, "latency": found}


def measured(verdict: str) -> Facts:
    value, low, high = SPEEDUPS[verdict]
    speedup = {"file": "model.onnx", "against": "dense.onnx", "value": value, "low": low, "high": high}
    machine = {"cpu": "A processor", "cores": 4, "vector_unit": "avx2", "memory_bytes": 8e9, "os": "Linux 6"}
    return {
        "measurements": [latency("dense.onnx", 2.0), latency("model.onnx", 2.0 / value)],
        "speedups": [{**speedup, "confidence": 0.95, "verdict": verdict}],
        "conditions": {**machine, "python": "3.12.1", "packages": {"torch": "2.13.0"}, "date": "2026-01-02T03:04:05",
                       "load_average": [0.1, 0.2, 0.3], "pinned_cpus": [0], "rounds": 3, "unavailable": {}},
    }  # fmt: skip


def epochs(phase: str, losses: list[float], top1: float) -> list[Facts]:
    return [
        {"phase": phase, "epoch": i, "loss": loss, "penalty": 0.1 if phase != "recover" else 0.0, "val_top1": top1 + i,
         "val_loss": loss * 2, "seconds": 1.5}
        for i, loss in enumerate(losses)
    ]  # fmt: skip


def make_facts(verdict: str = "faster") -> Facts:
    """A small run: three groups, one round, a frozen head, user-given names that would be markup."""
    proof = {"max_abs_diff": 2e-6, "output_scale": 4.0, "relative": 5e-7, "tolerance": 1e-4, "batches": [1, 2, 17]}
    proof |= {"top1_agreement": 100.0, "top1_torch": None, "exporter": "dynamo", "flushed": 0, "opset": 20}
    sparse, recover = epochs("round-1", [0.5, math.inf], 90.0), epochs("recover", [0.9, 0.4, 0.3], 80.0)
    cut = {"regularizers": [{"xi": 1e-9}], "val_top1": {"trained": 91.0, "cut": 40.0}}
    model = {
        "path": "/home/someone/nets/my net.pt",
        "arch": "/home/someone/code/net.py:small",
        "arch_args": {"width": 8},
    }
    prune = {"method": "halo", "keep": 0.25, "metric": "params", "round_to": "auto"}
    return {
        "recipe": {"model": model, "data": {"source": "/home/someone/images"}, "prune": prune, "seed": 3},
        "env": {"vector_unit": "avx2", "source_sha256": "cd" * 32, "seed": 3},
        "stages": {
            "prepare": {
                "dense": {"params": 1000.0, "macs": 20000.0, "size": 4000.0, "val_top1": 92.0},
                "widths": {"conv1": 16, "conv2": 16, "head": 10},
                "frozen": {"head": f"reaches the output {EVIL}"}, "uncounted": ["aten::odd"], "seconds": 1.0,
            },
            "sparse": {"rounds": [cut], "history": sparse, "seconds": 3.0},
            "recover": {"history": recover, "val_top1": {"best": 82.0, "best_epoch": 2, "last": 82.0}, "seconds": 4.5},
            "export": {
                "split": "test", "images": 400, "dense": {**proof, "top1": 93.25}, "pruned": {**proof, "top1": 92.5},
            },
            "measure": measured(verdict),
        },
        "pruned": {"params": 240, "macs": 5000},
        "widths": {"conv1": 2, "conv2": 4, "head": 10},
        "block": 8,
        "unaligned": {"conv1": 2, "conv2": 4},
        "info": {"arch": "small", "input_size": [3, 16, 12], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]},
        "labels": [EVIL, "cat | dog"],
        "data": {"name": f"mine {EVIL}", "fingerprint": "ef" * 32, "notes": [f"note {EVIL}"]},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path


def test_the_document_holds_what_the_stages_measured(run: Path) -> None:
    found = report.build(run, make_facts())
    assert found["dense"]["params"] == 1000 and found["pruned"]["macs"] == 5000
    assert found["kept"] == {"params": 0.24, "macs": 0.25, "size": 0.5}
    assert found["dense"]["latency_ms"]["p50"] == 2.0 and found["pruned"]["latency_ms"]["runtime"] == "ort-cpu"
    assert found["pruned"]["top1"] == 92.5 and found["split"] == {"name": "test", "images": 400}
    assert found["speedup"] == {"value": 2.0, "low": 1.9, "high": 2.1, "confidence": 0.95, "verdict": "faster"}
    assert found["widths"] == {
        "conv1": {"dense": 16, "pruned": 2}, "conv2": {"dense": 16, "pruned": 4}, "head": {"dense": 10, "pruned": 10},
    }  # fmt: skip
    assert found["block"] == 8  # avx2
    assert found["history"][1]["loss"] is None  # infinite: JSON has no such number
    assert found["seconds"] == {"prepare": 1.0, "sparse": 3.0, "recover": 4.5}
    assert found["input"] == {"name": "images", "size": [3, 16, 12], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}


def test_the_published_keys_are_there(run: Path) -> None:
    found = report.build(run, make_facts())
    assert {"out", "onnx", "checkpoint", "report", "method", "target", "metric", "seed", "dense", "pruned", "kept",
            "speedup", "parity", "frozen", "seconds"} <= found.keys()  # fmt: skip
    for network in (found["dense"], found["pruned"]):
        assert {"params", "macs", "size_bytes", "top1", "latency_ms"} <= network.keys()
        assert {"p50", "p90", "p99", "batch", "threads", "runtime"} <= network["latency_ms"].keys()
    assert {"params", "macs", "size"} == found["kept"].keys()
    assert {"value", "low", "high"} <= found["speedup"].keys()
    assert {"max_abs_diff", "output_scale", "top1_agreement"} <= found["parity"].keys()
    assert found["out"] == str(run) and found["onnx"] == str(run / "model.onnx")


def test_the_schema_is_the_one_published() -> None:
    path = Path(report.__file__).parent / "schema.json"
    assert path.read_text() == report.schema(), "write report.schema() to it"


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("faster", "2.00x faster (1.90 to 2.10) on ONNX Runtime CPU, batch 1, 1 thread"),
        ("slower", "1.25x slower (1.18 to 1.33) on ONNX Runtime CPU, batch 1, 1 thread"),
        ("not distinguishable", "speed not distinguishable (0.97x to 1.03x) on ONNX Runtime CPU, batch 1, 1 thread"),
    ],
)
def test_the_verdict_says_what_was_measured(run: Path, verdict: str, said: str) -> None:
    found = report.build(run, make_facts(verdict))
    assert found["verdict"] == f"240 of 1,000 parameters remain (24.0 %); {said}; top-1 93.25 -> 92.50 on test"
    assert said in pages.html(found) and said in pages.card(found)
    assert ('class="faster"' in pages.html(found)) is (verdict == "faster")


def test_the_verdict_speaks_of_the_metric_asked_for(run: Path) -> None:
    found = report.build(run, make_facts()) | {"metric": "macs"}
    assert words.verdict(found).startswith("5,000 of 20,000 MACs remain (25.0 %)")


def test_what_the_figures_do_not_say_is_said(run: Path) -> None:
    facts = make_facts("not distinguishable")
    facts["stages"]["export"]["split"] = "val"
    said = " ".join(words.limits(report.build(run, facts)))
    assert "one image is 0.250 points" in said and "89.5 to 94.7 %" in said  # Wilson's interval of 370 in 400
    assert "also chose the weights" in said and "no difference in speed" in said and "aten::odd" in said


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self._open += [tag] * (tag != "meta")  # the one void tag of the page

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_file_that_loads_nothing(run: Path) -> None:
    text = pages.html(report.build(run, make_facts()))
    page = Page(text)
    assert len(text.encode()) < 1_000_000
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "action", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    assert ("http-equiv", "Content-Security-Policy") in page.attributes
    assert page.tags.count("svg") == 5  # two latencies, accuracy, loss, penalty
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text


def test_what_users_named_is_shown_and_never_markup(run: Path) -> None:
    found = report.build(run, make_facts())
    text, card = pages.html(found), pages.card(found)
    shown = "".join(Page(text).words)
    assert "<script" not in text and f"reaches the output {EVIL}" in shown and f"note {EVIL}" in shown
    assert "<script" not in card.split("---\n", 2)[2] and "&lt;script>" in card
    assert "/home/someone" not in text + card
    command = "compress prune 'my net.pt' --arch net.py:small --arch-arg width=8 --recipe recipe.yaml"
    assert command in shown and command in card


def test_the_card_is_a_model_card(run: Path) -> None:
    found = report.build(run, make_facts())
    _, front, body = pages.card(found).split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "onnx" and values["pipeline_tag"] == "image-classification"
    assert values["tags"] == ["onnx", "pruning", "structured-pruning", "compress-to-onnx", "halo"]
    assert "license" not in values and "datasets" not in values
    pruned, dense = values["model-index"]
    assert (pruned["name"], dense["name"]) == ("small-halo", "small-dense")
    result = pruned["results"][0]
    assert result["dataset"]["split"] == "test" and result["metrics"][0]["value"] == 92.5
    assert {metric["type"] for metric in result["metrics"]} == {
        "accuracy",
        "parameters",
        "macs",
        "file_size",
        "latency",
    }
    assert "| parameters | 1,000 | 240 | 24.0 % remain |" in body
    assert "| latency p50 (ms) | 2.00 | 1.00 | 2.00x faster (1.90 to 2.10) |" in body
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None and '"images": x' in code[1] and "(12, 16)" in code[1]  # Pillow: width, height
    compile(code[1], "README.md", "exec")


def test_write_leaves_three_whole_files(run: Path) -> None:
    found = report.build(run, make_facts())
    report.write(run, found)
    assert sorted(path.name for path in run.iterdir()) == ["README.md", "report.html", "report.json"]
    assert json.loads((run / "report.json").read_text()) == found
    report.write(run, json.loads((run / "report.json").read_text()))  # the pages can be made again from it


def test_write_refuses_another_document_before_it_writes(run: Path) -> None:
    found = report.build(run, make_facts())
    del found["parity"]
    with pytest.raises(ValueError, match="parity"):
        report.write(run, found)
    assert not (run / "report.html").exists()


def test_a_run_without_training_or_normalisation_has_its_pages(tmp_path: Path) -> None:
    facts = make_facts()
    facts["stages"]["sparse"]["history"] = facts["stages"]["recover"]["history"] = []
    facts["stages"]["sparse"]["rounds"][0]["regularizers"] = []
    facts["info"] = {"arch": "small"}
    found = report.build(tmp_path, facts)
    assert charts.training(found) == ()
    assert Page(pages.html(found)).tags.count("svg") == 2
    assert "in the file's metadata" in pages.card(found)


def test_lines_break_between_phases_and_at_missing_values(run: Path) -> None:
    accuracy, loss, penalty = charts.training(report.build(run, make_facts()))
    assert [len(points) for points in accuracy.lines[0].runs] == [2, 3]
    assert [len(points) for points in loss.lines[0].runs] == [1, 3]
    assert [band.name for band in accuracy.bands] == ["round 1", "recover"]
    assert accuracy.cuts[0].x == 40.0 and accuracy.cuts[0].text == "after a cut: 40.00 %"
    assert sum(len(points) for points in penalty.lines[0].runs) == 2
    everything = [p for chart in (accuracy, loss, penalty) for line in chart.lines for part in line.runs for p in part]
    assert all(0 <= point.x <= 100 and 0 <= point.y <= 100 for point in everything)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0884010, "0.0884"), (12.34, "12.3"), (269722, "270,000"), (0, "0"), (8.37e-5, "8.37e-05"), (0.09999, "0.100"),
     (1.0, "1.00"), (None, "n/a"), (math.nan, "n/a")],
)  # fmt: skip
def test_figures_have_three_significant_digits(value: float | None, text: str) -> None:
    assert words.figure(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.04701, "4.7 %"), (0.566, "56.6 %"), (1.0, "100 %"), (0.00123, "0.12 %")]
)
def test_shares_as_percent(share: float, text: str) -> None:
    assert words.percent(share) == text


def test_differences_are_those_of_the_figures_shown() -> None:
    assert words.points(98.607, 92.758) == "-5.85"
    assert words.points(90.001, 90.0) == "+0.00"
    assert words.scaled(1_098_514, 62_144, ("bytes", "kB", "MB")) == ("kB", ("1,100", "62.1"))


def test_ticks_are_round_and_few() -> None:
    assert charts.ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert charts.ticks(3.2, 97, 5) == [20, 40, 60, 80]
    assert charts.log_ticks(3e-4, 150) == [1e-3, 1e-2, 0.1, 1, 10, 100]
    assert charts.log_ticks(2.0, 2.5) == [2.0, 2.2, 2.4]
