"""The report of a run: figures pass through unchanged, words are honest, pages are safe and self-contained."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects
import pytest
import yaml
from huggingface_hub import ModelCard
from plotly.offline import get_plotlyjs

from compress import report
from compress.report import figures, over_time, pages, words
from compress.report.curves import sensitivity_page
from tests.browser import visit

EVIL = "<script>alert('label')</script>"
SPEEDUPS = {"faster": (2.0, 1.9, 2.1), "slower": (0.8, 0.75, 0.85), "not distinguishable": (1.0, 0.97, 1.03)}
Facts = dict[str, Any]
SENSITIVITY: Facts = {
    "score": "l2", "metric": "top1", "images": 8, "calibration_images": 8,
    "dense": {"value": 82.0, "loss": 0.5, "distortion": 0.0},
    "groups": {
        "conv1": {"size": 8, "widths": [{"keep": 0.5, "kept": 4, "value": 60.0, "loss": 1.5, "distortion": 0.5}]},
        EVIL: {"size": 4, "widths": [
            {"keep": 0.25, "kept": 1, "value": 80.0, "loss": 0.7, "distortion": 0.2},
            {"keep": 0.5, "kept": 2, "value": 81.0, "loss": 0.6, "distortion": 0.1},
        ]},
    },
    "frozen": {"head": "its channels reach the output"},
}  # fmt: skip


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
    cut |= {"lambda_log": [(1, {"conv1": 0.5, EVIL: 0.25}), (9, {"conv1": 0.4, EVIL: 0.0})]}
    model = {
        "path": "/home/someone/nets/my net.pt",
        "arch": "/home/someone/code/net.py:small",
        "arch_args": {"width": 8},
    }
    prune = {"method": "halo", "keep": 0.25, "metric": "params", "round_to": "auto"}
    return {
        "recipe": {"model": model, "data": {"source": "/home/someone/images"}, "prune": prune, "seed": 3},
        "keep": 0.25,
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


def test_a_latency_asked_for_stands_beside_what_came_of_it(run: Path) -> None:
    found = report.build(run, make_facts()) | {"metric": "latency", "target": 0.45}
    found["recipe"]["prune"]["target_ms"] = 0.9
    said = "Asked to keep 45 % of the latency (0.9 ms); 50.0 % is left."
    assert said in pages.html(found) and said[:-1].replace("A", "a", 1) in pages.card(found)
    assert words.verdict(found).startswith("240 of 1,000 parameters remain")


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


def scripts(text: str) -> dict[str, str]:
    """The page's scripts by their ids; the one that runs has none."""
    return dict(re.findall(r"""<script(?: type="[a-z/]+" id="([a-z]+)")?>(.*?)</script>""", text, re.DOTALL))


def sha256(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_page_is_one_file_that_loads_nothing(run: Path) -> None:
    text = pages.html(report.build(run, make_facts()))
    page, found = Page(text), scripts(text)
    assert len(text.encode()) < 2_500_000
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "action", "srcset"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text.replace(found["plotly"], ""))
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    code = gzip.decompress(base64.b64decode(found["plotly"])).decode()
    assert code == get_plotlyjs()
    assert page.tags.count("script") == text.count("<script") == len(found) == 3
    policy = next(value for name, value in page.attributes if value.startswith("default-src"))
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {sha256(code)} {sha256(found[''])}"
    drawn = [value for name, value in page.attributes if name == "data-figure"]
    assert drawn == [*json.loads(found["figures"])]
    assert drawn == ["latency-0", "widths", "accuracy", "loss", "penalty", "lambda"]


def test_plotly_knows_every_figure(run: Path) -> None:
    facts = make_facts()
    facts["sensitivity"] = SENSITIVITY
    specs = json.loads(scripts(pages.html(report.build(run, facts)))["figures"])
    assert {"sensitivity-value", "sensitivity-loss", "sensitivity-distortion"} <= specs.keys()
    for name, spec in specs.items():
        painted = json.loads(re.sub(r"shade\([0-9.]+\)", "#123456", json.dumps(spec)))
        assert plotly.graph_objects.Figure(painted).data, name  # raises where plotly has no such attribute


def test_what_users_named_is_shown_and_never_markup(run: Path) -> None:
    found = report.build(run, make_facts())
    text, card = pages.html(found), pages.card(found)
    shown = "".join(Page(text).words)
    assert "<script>alert" not in text and EVIL in found["lambda_log"][0]["groups"]
    assert "&lt;script&gt;alert" in json.loads(scripts(text)["figures"])["lambda"]["data"][1]["name"]
    assert f"reaches the output {EVIL}" in shown and f"note {EVIL}" in shown
    assert "<script" not in card.split("---\n", 2)[2] and "&lt;script>" in card
    assert "/home/someone" not in text + card
    for command in ("compress prune 'my net.pt' --arch net.py:small --arch-arg width=8 --recipe recipe.yaml",
                    "compress bench dense.onnx model.onnx --runtime ort-cpu --batch 1 --threads 1"):  # fmt: skip
        assert command in shown and command in card


def test_the_card_is_a_model_card(run: Path) -> None:
    found = report.build(run, make_facts())
    _, front, body = pages.card(found).split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "onnx" and values["pipeline_tag"] == "image-classification"
    assert values["tags"] == ["onnx", "pruning", "structured-pruning", "compress-to-onnx", "halo"]
    assert "license" not in values and "datasets" not in values
    (pruned,) = values["model-index"]  # the Hub takes all results in it for the model's own
    assert pruned["name"] == "small-halo"
    result = pruned["results"][0]
    assert result["dataset"]["split"] == "test" and result["metrics"][0]["value"] == 92.5
    kinds = [metric["type"] for metric in result["metrics"]]
    assert kinds == ["accuracy", "parameters", "macs", "file_size", "latency"]
    assert "| parameters | 1,000 | 240 | 24.0 % remain |" in body
    assert "| latency p50 (ms) | 2.00 | 1.00 | 2.00x faster (1.90 to 2.10) |" in body
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None and '"images": x' in code[1] and "(12, 16)" in code[1]  # Pillow: width, height
    compile(code[1], "README.md", "exec")


def test_the_hub_reads_the_card(run: Path) -> None:
    facts = make_facts()
    facts["recipe"]["model"] |= {"path": "hf:someone/resnet", "arch": None}
    facts["recipe"]["data"] = {"source": "hf:beans"}
    facts["stages"]["measure"]["further"] = [at_batch(8)]
    data = ModelCard(pages.card(report.build(run, facts))).data
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("onnx", "image-classification", ["accuracy"])
    assert (data.base_model, data.datasets, data.model_name) == ("someone/resnet", ["beans"], "small-halo")
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    row = "| ONNX Runtime CPU, batch 8, 1 thread | 8.00 | 8.00 | speed not distinguishable (0.97x to 1.03x) |"
    assert row in pages.card(report.build(run, facts))
    assert found["Top-1 accuracy (percent)"] == 92.5 and found["Parameters"] == 240
    assert found["Median latency (ms), ONNX Runtime CPU, batch 8, 1 thread"] == 8.0
    assert {(result.task_type, result.dataset_split) for result in data.eval_results} == {
        ("image-classification", "test")
    }


def test_write_leaves_three_whole_files(run: Path) -> None:
    found = report.build(run, make_facts())
    report.write(run, found)
    assert sorted(path.name for path in run.iterdir()) == ["README.md", "report.html", "report.json"]
    assert json.loads((run / "report.json").read_text()) == found
    older = {key: value for key, value in found.items() if key not in ("lambda_log", "sensitivity", "further")}
    report.write(
        run, {**older, "lambda_log": found["lambda_log"]}
    )  # the pages can be made again, from an older one too
    assert json.loads((run / "report.json").read_text()) == found


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
    assert over_time.training(found) == ()
    assert [*json.loads(scripts(pages.html(found))["figures"])] == ["latency-0", "widths", "lambda"]
    assert "in the file's metadata" in pages.card(found)


def test_lines_break_between_phases_and_at_missing_values(run: Path) -> None:
    accuracy, loss, penalty = over_time.training(report.build(run, make_facts()))
    line, cut = accuracy.spec["data"]
    assert line["x"] == [1, 2, None, 3, 4, 5] and line["y"] == [90, 91, None, 80, 81, 82]
    assert loss.spec["data"][0]["y"] == [0.5, None, None, 0.9, 0.4, 0.3]  # the second was infinite
    assert line["text"][3] == "recover, epoch 1: validation 80.0"
    assert (cut["x"], cut["y"], cut["text"]) == ([2.5], [40.0], ["right after a cut: 40.00 %"])
    assert [name["text"] for name in accuracy.spec["layout"]["annotations"]] == ["round 1", "recover"]
    band, level = accuracy.spec["layout"]["shapes"]
    assert (band["x0"], band["x1"], level["y0"]) == (2.5, 5.5, 92.0)
    assert penalty.spec["data"][0]["x"] == [1, 2]


def test_what_moves_is_drawn_over_the_steps_of_all_rounds(run: Path) -> None:
    facts = make_facts()
    first = facts["stages"]["sparse"]["rounds"][0]
    logs = {"lambda_log": [(2, {"conv1": 0.1, EVIL: 0.2})], "density_log": [(0, {"conv1": 0.5})]}
    facts["stages"]["sparse"]["rounds"].append({**first, **logs})
    found = report.build(run, facts)
    (drawn,) = over_time.over_steps(found)  # a single density is no line
    conv, evil = drawn.spec["data"]
    assert conv["x"] == evil["x"] == [1, 9, None, 11]
    assert conv["y"] == [0.5, 0.4, None, 0.1] and evil["y"] == [0.25, None, None, 0.2]  # no 0 on a logarithmic axis
    assert conv["line"]["color"] == "shade(0.000)" and evil["line"]["color"] == "shade(1.000)"
    assert '<th scope="row">2, 2</th><td>0.100</td>' in pages.html(found)


def test_a_long_log_is_thinned_on_the_page_alone(run: Path) -> None:
    facts = make_facts()
    log = [(step, {"conv1": 0.1 + step / 1e4}) for step in range(500)]
    facts["stages"]["sparse"]["rounds"][0] |= {"density_log": log}
    found = report.build(run, facts)
    assert len(found["density_log"]) == 500
    density, _ = over_time.over_steps(found)
    steps = density.spec["data"][0]["x"]
    assert len(steps) == len({*steps}) == 120 and (steps[0], steps[-1]) == (0, 499)
    assert "Density at 120 of 500 steps (report.json has all), as a table" in pages.html(found)
    assert over_time.thinned(found["lambda_log"]) == found["lambda_log"]


def at_batch(batch: int) -> Facts:
    """The same two files at another batch."""
    found = measured("not distinguishable")
    for one in found["measurements"]:
        one["latency"] |= {"batch": batch} | {key: one["latency"][key] * 4 for key in ("p50", "p90", "p99")}
        one["latency"]["samples"] = [value * 4 for value in one["latency"]["samples"]]
    return found


def test_every_measurement_has_its_plot_and_its_rows(run: Path) -> None:
    facts = make_facts()
    facts["stages"]["measure"]["further"] = [at_batch(8)]
    found = report.build(run, facts)
    one, eight = figures.latency(words.comparisons(found))
    assert (one.title, one.unit) == ("ONNX Runtime CPU, batch 1, 1 thread", "2.00x faster (1.90 to 2.10)")
    assert (eight.title, eight.unit) == (
        "ONNX Runtime CPU, batch 8, 1 thread",
        "speed not distinguishable (0.97x to 1.03x)",
    )
    box, strokes, *_ = eight.spec["data"]
    assert box["x"] == pytest.approx([7.92, 8.0, 8.08]) and set(box["y"]) == {"dense"}
    assert strokes["x"] == pytest.approx([9.6, 12.0]) and strokes["text"][1] == "p99 of single inferences: 12.0 ms"
    found["further"][0]["conditions"]["warnings"] = ["another process was busy"]
    text = pages.html(found)
    assert "<li>ONNX Runtime CPU, batch 8, 1 thread: another process was busy</li>" in text
    assert "--runtime ort-cpu --batch 1,8 --threads 1" in text
    assert 'colspan="10">ONNX Runtime CPU, batch 8, 1 thread</th>' in text and "7.92, 8.00, 8.08" in text


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


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([3e-4, None, 0.0, 150], ["0.001", "0.01", "0.1", "1", "10", "100"]), ([0.2, 0.9], ["0.2", "0.5"]),
     ([1e-12, 1.0], ["1e-12", "1e-10", "1e-08", "1e-06", "0.0001", "0.01", "1"]),
     ([0.035, 0.3], ["0.05", "0.1", "0.2"]), ([2.0, 5.0], ["2", "2.5", "3", "3.5", "4", "4.5", "5"]),
     ([1.25, 2.2], ["1.2", "1.4", "1.6", "1.8", "2", "2.2", "2.4"]), ([], ["0.92", "0.94", "0.96", "0.98", "1"])],
)  # fmt: skip
def test_logarithmic_axes_have_few_round_ticks(values: list[float | None], ticks: list[str]) -> None:
    axis = figures.log_axis(values)
    assert axis["ticktext"] == ticks
    low, high = axis["range"]
    drawn = [math.log10(value) for value in values or [1.0] if value]
    assert low < min(drawn) and max(drawn) < high


# --- in a real browser ------------------------------------------------------------------------------------------------


def test_every_kind_of_plot_is_drawn_and_names_stay_text(run: Path) -> None:
    facts = make_facts()
    facts["stages"]["measure"]["further"] = [at_batch(8), at_batch(32)]
    facts["widths"][f"<b>{EVIL}"] = 3
    facts["stages"]["prepare"]["widths"][f"<b>{EVIL}"] = 5
    facts["sensitivity"] = SENSITIVITY
    (run / "report.html").write_text(pages.html(report.build(run, facts)))
    with visit(run / "report.html") as seen:
        figures = seen.figures(width=390)
        assert len(figures) == 11 and all(figure["traces"] >= figure["wanted"] for figure in figures)
        assert "</script>" in seen.page.locator("[data-figure=widths]").inner_text()  # the name's end
        assert seen.overhang() <= 0 and seen.complaints == [] and seen.requests == []


def test_in_an_old_browser_and_without_script_the_figures_are_still_there(run: Path) -> None:
    document = SENSITIVITY | {"arch": "x", "data": "/home/someone/<d>", "remark": ""}
    (run / "s.html").write_text(sensitivity_page(document))
    with visit(run / "s.html", script="delete window.DecompressionStream") as seen:
        said = seen.page.locator("[data-figure]").first.inner_text()
        assert "too old" in said and "in the tables" in said and seen.complaints == []
        assert seen.page.locator("tbody tr").count() == 4
    page = Page((run / "s.html").read_text())
    assert "/home/someone" not in "".join(page.words)
    assert "Drawn by a script of this page; the figures are in a table below." in page.words
