"""verify(): a finished run's folder proved again, from its files alone, wherever it lies now. Nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from compress import checkpoint, cost, data, export, quantize, recipe, sparse
from compress.checkpoint import ModelInfo
from compress.data import Data
from compress.errors import CompressError, DataError, UsageError
from compress.files import sha256
from compress.folder import RunFolder
from compress.inputs import choose, example, load_data, noise, normalisation
from compress.onnx_file import count_weights
from compress.report.words import metric_words
from compress.task import OWN, ours

State = Literal["ok", "FAILED", "skipped"]
LATENCY = ("p50", "p90", "p99", "batch", "threads", "runtime")
FLIPS = 0.001  # of the images may fall into another class: other processors round differently where two classes tie


@dataclass(frozen=True)
class Check:
    """One claim of the folder and what became of it; `detail` is the finding, or the reason."""

    name: str
    state: State
    detail: str


class _Failed(Exception):
    """The claim is wrong."""


class _Skipped(Exception):
    """The claim could not be tested here."""


@dataclass
class _Evidence:
    """The folder's documents, and what one check leaves for the next."""

    folder: RunFolder
    rebuild: Callable[[], tuple[nn.Module, ModelInfo]]
    source: str | None
    documents: dict[str, dict[str, Any]] = field(default_factory=dict)
    network: nn.Module | None = None
    info: ModelInfo | None = None
    images: Data | None = None
    is_same_data: bool = False

    def get(self, name: str, key: str) -> Any:
        """A value of one of the folder's JSON files, by its dotted path."""
        if name not in self.documents:
            try:
                self.documents[name] = self.folder.read(name)
            except (OSError, ValueError) as error:
                raise _Failed(f"{name} cannot be read: {str(error).splitlines()[0]}") from error
        value: Any = self.documents[name]
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise _Failed(f"{name} has no {key}")
            value = value[part]
        return value

    def rebuilt(self) -> tuple[nn.Module, ModelInfo]:
        if self.network is None or self.info is None:
            raise _Skipped("needs the network, which was not rebuilt")
        return self.network, self.info


def verify(
    folder: Path, rebuild: Callable[[], tuple[nn.Module, ModelInfo]], *, source: str | None = None,
    on_check: Callable[[str], None] = lambda name: None,
) -> tuple[Check, ...]:  # fmt: skip
    """Test every claim of a run's folder that can be tested here.

    Args:
        folder: with or without its state/ folder, which is not read.
        rebuild: builds the network from pruned.safetensors; a UsageError means that this is not possible here.
        source: data set to use instead of the one that the checkpoint names.
        on_check: told the name of each check as it begins.

    Raises:
        RunFolderError: the folder holds no finished run.
    """
    evidence = _Evidence(RunFolder.finished(folder), rebuild, source)
    found: list[Check] = []
    for name, check in CHECKS.items():
        on_check(name)
        try:
            found.append(Check(name, "ok", check(evidence)))
        except _Skipped as reason:
            found.append(Check(name, "skipped", str(reason)))
        except (_Failed, CompressError) as error:
            found.append(Check(name, "FAILED", str(error)))
        except (KeyError, IndexError, TypeError, ValueError) as error:  # documents of another shape than ours
            found.append(Check(name, "FAILED", f"the folder's files are damaged: {type(error).__name__}: {error}"))
    return tuple(found)


def _recipe(evidence: _Evidence) -> str:
    saved = recipe.make(recipe.read(evidence.folder.path / "recipe.yaml"))
    if saved != recipe.make(evidence.get("report.json", "recipe")):
        raise _Failed("recipe.yaml is not the recipe that report.json was made with")
    return "recipe.yaml is valid and the one of report.json"


def _file(name: str) -> Callable[[_Evidence], str]:
    """A check that a measured file is the one in the folder."""

    def check(evidence: _Evidence) -> str:
        path = evidence.folder.path / name
        measured = {Path(found["file"]).name: found for found in evidence.get("bench.json", "measurements")}
        if not path.is_file():
            if name == "model.onnx":
                raise _Failed(f"{name} is not in the folder")
            raise _Skipped(f"{name} is not in the folder")
        digest = sha256(path)
        if digest != measured[name]["sha256"]:
            raise _Failed(f"sha256 is {digest[:12]}..., the measured file's {measured[name]['sha256'][:12]}...")
        return f"sha256 {digest[:12]}..., {path.stat().st_size:,} bytes: the file that was measured"

    return check


def _source(evidence: _Evidence) -> str:
    path = Path(evidence.get("report.json", "recipe.model.path"))
    if not path.is_file():
        raise _Skipped(f"{path} is not here")
    if sha256(path) != evidence.get("env.json", "source_sha256"):
        raise _Skipped(f"{path} is another file than the one that was pruned")
    return f"{path} is the file that was pruned"


def _origin(evidence: _Evidence) -> str:
    """Method, target, metric, seed and source: the same in the report, the weights and the ONNX file."""
    claimed = {key: evidence.get("report.json", key) for key in ("method", "target", "metric", "seed")}
    claimed["source_sha256"] = evidence.get("env.json", "source_sha256")
    weights = checkpoint.read(evidence.folder.path / "pruned.safetensors").info.origin
    model = export.read_metadata(evidence.folder.path / "model.onnx")
    for key, value in claimed.items():
        if weights.get(key) != value:
            raise _Failed(f"{key} is {value!r} in the report and {weights.get(key)!r} in pruned.safetensors")
        text = value if isinstance(value, str) else json.dumps(value)
        if model.get(key) != text:
            raise _Failed(f"{key} is {text} in the report and {model.get(key)} in model.onnx")
    return f"{claimed['method']}, {claimed['target']:g} of the {claimed['metric']}, seed {claimed['seed']} in all files"


def _report(evidence: _Evidence) -> str:
    """The report's figures are those of the artefacts."""
    names = {"dense": "dense.onnx", "pruned": "model.onnx"}
    measured = {Path(found["file"]).name: found for found in evidence.get("bench.json", "measurements")}
    for which, file in names.items():
        told, found = evidence.get("report.json", which), measured[file]
        pairs = {
            "top1": (told["top1"], evidence.get("parity.json", f"{which}.top1")),
            "metric": (told.get("metric"), evidence.get("parity.json", which).get("metric")),
            "metric as top1": (_value(told, "top1", told["top1"]), told["top1"]),
            "size_bytes": (told["size_bytes"], found["size_bytes"]),
            **{key: (told["latency_ms"][key], found["latency"][key]) for key in LATENCY},
        }
        for key, (reported, recorded) in pairs.items():
            if reported != recorded:
                raise _Failed(f"{key} of the {which} network is {reported} in the report, {recorded} as measured")
    gain = evidence.get("bench.json", "speedups")[0]
    for key, value in evidence.get("report.json", "speedup").items():
        if gain[key] != value:
            raise _Failed(f"the speed-up's {key} is {value} in the report, {gain[key]} in bench.json")
    return "sizes, top-1 or the task's metric, latencies and speed-up are those of parity.json and bench.json"


def _value(told: Mapping[str, Any], name: str, other: Any) -> Any:
    """The value of the metric if it is the one called `name`; reports from before there were several have none."""
    metric = told.get("metric") or {"name": ""}
    return metric["value"] if metric["name"] == name else other


def _network(evidence: _Evidence) -> str:
    try:
        evidence.network, evidence.info = evidence.rebuild()
    except UsageError as error:
        raise _Skipped(str(error)) from error
    return f"{evidence.info.arch} from pruned.safetensors alone"


def _costs(evidence: _Evidence) -> str:
    """Parameters and MACs counted again, the shares, and the target."""
    network, info = evidence.rebuilt()
    assert info.input_size is not None
    costs = cost.measure(network, noise(info.input_size, 1))
    counted = {"macs": int(costs.total("macs")), "params": _params(evidence, network, int(costs.total("params")))}
    dense, pruned = evidence.get("report.json", "dense"), evidence.get("report.json", "pruned")
    for metric, value in counted.items():
        if value != pruned[metric]:
            raise _Failed(f"{metric} are {value:,}, {pruned[metric]:,} in the report")
    for name, key in (("params", "params"), ("macs", "macs"), ("size", "size_bytes")):
        share = evidence.get("report.json", f"kept.{name}")
        if not math.isclose(share, pruned[key] / dense[key], rel_tol=1e-9):
            raise _Failed(f"kept.{name} is {share:g} in the report, {pruned[key] / dense[key]:g} by its figures")
    target, metric = evidence.get("report.json", "target"), evidence.get("report.json", "metric")
    is_counted = metric not in ("size", "latency")  # bytes are of weights here, not of ONNX
    if is_counted and pruned[metric] > target * dense[metric] * (1 + 1e-9):
        raise _Failed(f"{pruned[metric] / dense[metric]:.4g} of the {metric} remain, the target is {target:g}")
    return f"{pruned['params']:,} params, {pruned['macs']:,} MACs counted again; shares agree"


def _params(evidence: _Evidence, network: nn.Module, params: int) -> int:
    """Parameters as the report counts them; zeros in place are no parameters, and must be zeros in the file as well."""
    if evidence.documents["report.json"].get("granularity", "filter") == "filter":
        return params
    layers = {
        name.removesuffix(".weight"): {"weights": total, "nonzero": alive}
        for name, (total, alive) in sparse.density(network).items()
    }
    told = evidence.get("report.json", "density")
    wrong = sorted(name for name in layers.keys() | told.keys() if layers.get(name) != told.get(name))
    if wrong:
        raise _Failed(f"{wrong[0]} has {layers.get(wrong[0])}, {told.get(wrong[0])} in the report")
    found, claimed = count_weights(evidence.folder.path / "model.onnx"), evidence.get("parity.json", "pruned.weights")
    if claimed != {"weights": found.total, "nonzero": found.nonzero, "sparse_tensors": found.sparse_tensors}:
        raise _Failed(f"model.onnx has {found.nonzero:,} weights that are not 0, {claimed['nonzero']:,} when proved")
    return sparse.remaining(network)


def _data(evidence: _Evidence) -> str:
    info = evidence.rebuilt()[1]
    part, seed = evidence.get("report.json", "recipe.data"), evidence.get("report.json", "recipe.seed")
    options = {key: part[key] for key in ("image_size", "val_share", "max_unreadable")}
    try:
        evidence.images = load_data(info, evidence.source, seed=seed, **options)
    except DataError as error:
        if evidence.source is not None:
            raise
        raise _Skipped(str(error)) from error
    fingerprint = evidence.get("report.json", "data.fingerprint")
    evidence.is_same_data = evidence.images.fingerprint == fingerprint
    if not evidence.is_same_data:
        raise _Skipped(f"{evidence.images.name} holds other images than the run's, or they decode differently here")
    return f"{evidence.images.name}: the images of the run, by their fingerprint"


def _parity(evidence: _Evidence) -> str:
    network, info = evidence.rebuilt()
    assert info.input_size is not None
    if evidence.images is not None:
        count = max(export.BATCHES)
        inputs, about = example(info, evidence.images.val, count), f"{count} images of {evidence.images.name}"
    else:
        inputs, about = noise(info.input_size, max(export.BATCHES)), "noise, as there are no images"
    proof = export.prove(network, evidence.folder.path / "model.onnx", inputs)
    return f"on {about}: max difference {proof.max_abs_diff:.1g} at outputs of {proof.output_scale:.3g}"


def _top1(evidence: _Evidence) -> str:
    if evidence.images is None:
        raise _Skipped("needs the data set")
    info = evidence.rebuilt()[1]
    if info.task == OWN:
        raise _Skipped("needs the task, which is none of ours")
    task = ours(info.task)
    name, count = evidence.get("report.json", "split.name"), evidence.get("report.json", "split.images")
    reported = evidence.get("report.json", "pruned.top1" if task.metric == "top1" else "pruned.metric.value")
    split = choose(evidence.images, name)[1]
    mean, std = normalisation(info)
    batches = data.loader(split, batch_size=quantize.BATCH, mean=mean, std=std, train=False)
    measured = export.metric(evidence.folder.path / "model.onnx", batches, task)
    what = "" if task.metric == "top1" else f"{metric_words(task.metric)} "
    text = f"{what}{measured:.2f} % by ONNX Runtime on {len(split):,} images of {name}, {reported:.2f} % in the report"
    if not evidence.is_same_data:
        raise _Skipped(f"{text}: other images than the run's")
    allowed = math.ceil(FLIPS * count) / count if task.metric == "top1" else FLIPS
    if len(split) != count or abs(measured - reported) > 100 * allowed + 1e-9:
        raise _Failed(text)
    return text


CHECKS: dict[str, Callable[[_Evidence], str]] = {
    "recipe": _recipe,
    "source checkpoint": _source,
    "model.onnx": _file("model.onnx"),
    "dense.onnx": _file("dense.onnx"),
    "quantised": lambda evidence: quantize.check(evidence.folder.path),
    "origin": _origin,
    "report": _report,
    "network": _network,
    "costs": _costs,
    "data": _data,
    "ONNX == torch": _parity,
    "top-1": _top1,
}
