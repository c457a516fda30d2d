"""From the artefacts of a run to one JSON document; every figure is one that a stage measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def build(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Put together what `compress prune --json` prints and what the pages show.

    Args:
        folder: of the run; named in the document, not read.
        facts: recipe, env, the result of every stage, costs and widths of the pruned network.

    Units: MACs per image, bytes, percent, milliseconds, seconds; shares are what remains, 0 to 1.
    """
    recipe, stages = facts["recipe"], facts["stages"]
    prepared, proof, bench = stages["prepare"], stages["export"], stages["measure"]
    dense = _network(prepared["dense"], proof["dense"], bench["measurements"][0])
    pruned = _network(facts["pruned"], proof["pruned"], bench["measurements"][1])
    prune = recipe["prune"]
    cut = stages["sparse"]["rounds"][-1]["plan"]
    return {
        "out": str(folder),
        "onnx": str(folder / "model.onnx"),
        "checkpoint": str(folder / "pruned.safetensors"),
        "report": str(folder / "report.html"),
        "method": prune["method"],
        "target": prune["keep"],
        "metric": prune["metric"],
        "seed": recipe["seed"],
        "dense": dense,
        "pruned": pruned,
        "kept": {
            "params": pruned["params"] / dense["params"],
            "macs": pruned["macs"] / dense["macs"],
            "size": pruned["size_bytes"] / dense["size_bytes"],
        },
        "speedup": {key: bench["speedups"][0][key] for key in ("value", "low", "high", "verdict")},
        "parity": {
            key: proof["pruned"][key]
            for key in ("max_abs_diff", "output_scale", "tolerance", "batches", "top1_agreement", "exporter", "flushed")
        },
        "split": {"name": proof["split"], "images": proof["images"]},
        "frozen": prepared["frozen"],
        "widths": {
            name: {"dense": size, "pruned": facts["widths"].get(name, size)} for name, size in prepared["widths"].items()
        },
        "unaligned": cut["unaligned"],
        "uncounted": prepared["uncounted"],
        "val_top1": {
            "dense": prepared["dense"]["val_top1"],
            "rounds": [found["val_top1"] for found in stages["sparse"]["rounds"]],
            "recovered": stages["recover"]["val_top1"],
        },
        "history": [*stages["sparse"]["history"], *stages["recover"]["history"]],
        "regularizers": stages["sparse"]["rounds"][-1]["regularizers"],
        "conditions": {**facts["env"], **bench["conditions"]},
        "data": facts["data"],
        "labels": facts["labels"],
        "recipe": recipe,
        "seconds": {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage},
    }


def _network(costs: Mapping[str, Any], proof: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    latency = measured["latency"]
    return {
        "params": int(costs["params"]),
        "macs": int(costs["macs"]),
        "size_bytes": measured["size_bytes"],
        "top1": proof["top1"],
        "latency_ms": {key: latency[key] for key in ("p50", "p90", "p99", "batch", "threads", "runtime", "n")},
        "throughput": latency["throughput"],
    }
