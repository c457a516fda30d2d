"""From the artefacts of a run to one JSON document; every figure is one that a stage measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.report.document import Gain, LatencyMs, Parity, Proof, Report
from compress.report.words import verdict

INPUT_NAME = "images"  # as compress.export names it


def build(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Put together what `compress prune --json` prints and what the pages show.

    Args:
        folder: of the run; named in the document.
        facts: recipe, env, info, the result of every stage, costs and widths of the pruned network, block, unaligned.

    Units: MACs per image, bytes, percent, milliseconds, seconds; shares are what remains, 0 to 1.
    """
    recipe, stages, prune = facts["recipe"], facts["stages"], facts["recipe"]["prune"]
    names = {"method": prune["method"], "target": facts["keep"], "metric": prune["metric"], "seed": recipe["seed"]}
    files = {"onnx": "model.onnx", "checkpoint": "pruned.safetensors", "report": "report.html"}
    found = {
        "out": str(folder),
        **{key: str(folder / name) for key, name in files.items()},
        **names,
        **_results(facts),
        **_structure(facts),
        **_training(stages),
        **_lower(stages.get("quantize")),
        **_conditions(facts),
        "seconds": {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage},
    }
    return Report.model_validate({"verdict": verdict(found), **_finite(found)}).model_dump(mode="json")


def _results(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the two files cost and do, and the proof that they are the networks."""
    prepared, proof, bench = (facts["stages"][name] for name in ("prepare", "export", "measure"))
    dense = _network(prepared["dense"], proof["dense"], bench["measurements"][0])
    pruned = _network(facts["pruned"], proof["pruned"], bench["measurements"][1])
    shares = {"params": "params", "macs": "macs", "size": "size_bytes"}
    return {
        "dense": dense,
        "pruned": pruned,
        "kept": {name: pruned[key] / dense[key] for name, key in shares.items()},
        "speedup": {key: bench["speedups"][0][key] for key in Gain.model_fields},
        "parity": {
            **_known(proof["pruned"], [*Parity.model_fields]),
            "dense": _known(proof["dense"], [*Proof.model_fields]),
        },
        "split": {"name": proof["split"], "images": proof["images"]},
        "measurements": bench["measurements"],
        "speedups": bench["speedups"],
        "further": bench.get("further", []),
    }


def _network(costs: Mapping[str, Any], proof: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    latency = measured["latency"]
    return {
        "params": int(costs["params"]),
        "macs": int(costs["macs"]),
        "size_bytes": measured["size_bytes"],
        "top1": proof["top1"],
        "metric": proof.get("metric") or {"name": "top1", "value": proof["top1"]},
        "latency_ms": {key: latency[key] for key in LatencyMs.model_fields},
        "throughput": latency["throughput"],
    }


def _lower(stage: Mapping[str, Any] | None) -> dict[str, Any]:
    """The file of lower precision, or why there is none."""
    if stage is None or "failed" in stage:
        return {"quantized": None, "unquantized": stage["failed"] if stage else ""}
    return {"quantized": quantized(stage)}


def quantized(made: Mapping[str, Any]) -> dict[str, Any]:
    """What a report says of a file of lower precision; `made`: its entry of quantize.json."""
    one, other = made["measurements"]
    return {
        **_known(made, ["verdict", "file", "sha256", "to", "how"]),
        **_known(made["fidelity"], ["top1_agreement", "snr_db"]),
        "size_bytes": other["size_bytes"],
        "metric": made["after"]["metric"],
        "before_ms": {key: one["latency"][key] for key in LatencyMs.model_fields},
        "latency_ms": {key: other["latency"][key] for key in LatencyMs.model_fields},
        "speedup": {key: made["speedup"][key] for key in Gain.model_fields},
    }


def _structure(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Widths or densities before and after, and what could not be cut or did not come out aligned."""
    prepared, widths = facts["stages"]["prepare"], facts["widths"]
    rounds = facts["stages"]["sparse"]["rounds"]
    return {
        "granularity": facts["recipe"]["prune"].get("granularity", "filter"),
        "density": facts.get("density", {}),
        "density_log": _over_steps(rounds, "density_log", "layers"),
        "lambda_log": _over_steps(rounds, "lambda_log", "groups"),
        "sensitivity": facts.get("sensitivity"),
        "frozen": prepared["frozen"],
        "widths": {name: {"dense": n, "pruned": widths[name]} for name, n in prepared["widths"].items()},
        "dropped": facts.get("dropped", []),
        "unaligned": facts["unaligned"],
        "block": facts["block"],
        "uncounted": prepared["uncounted"],
    }


def _over_steps(rounds: Sequence[Mapping[str, Any]], log: str, key: str) -> list[dict[str, Any]]:
    """What a method noted at some steps of every round, as one list."""
    return [
        {"round": number, "step": step, key: values}
        for number, found in enumerate(rounds, 1)
        for step, values in found.get(log, ())
    ]


def _training(stages: Mapping[str, Any]) -> dict[str, Any]:
    """The epochs of every phase, and the metric on the validation split along the way."""
    rounds, recover = stages["sparse"]["rounds"], stages["recover"]
    return {
        "val_top1": {
            "dense": stages["prepare"]["dense"]["val_top1"],
            "rounds": [found["val_top1"] for found in rounds],
            "recovered": recover["val_top1"],
        },
        "history": [*stages["sparse"]["history"], *recover["history"]],
        "regularizers": rounds[-1]["regularizers"],
        "strengths": rounds[0].get("strengths", []),
    }


def _conditions(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Machine, versions, data, recipe, and what the ONNX file takes."""
    info = facts["info"]
    taken = {"name": INPUT_NAME, "size": info.get("input_size"), "mean": info.get("mean"), "std": info.get("std")}
    return {
        "arch": info.get("arch") or facts["recipe"]["model"]["arch"] or Path(facts["recipe"]["model"]["path"]).stem,
        "conditions": facts["stages"]["measure"]["conditions"],
        "environment": facts["env"],
        "data": facts["data"],
        "input": taken,
        "labels": facts["labels"],
        "recipe": facts["recipe"],
    }


def _known(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: such a loss is null, and a gap in the chart."""
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
