"""The stage that writes and proves the ONNX files, and judges them on the test split."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from compress import cost, sparse
from compress.data import Loader
from compress.errors import TargetError
from compress.export import Proof, metric, to_onnx
from compress.pipeline import zeros
from compress.pipeline.context import Run
from compress.task import reported


def export(run: Run) -> dict[str, Any]:
    """Both networks as ONNX, each proved equal to torch; then, once, the test split by ONNX Runtime itself."""
    split = run.data.test if run.data.test is not None else run.data.val
    found: dict[str, Any] = {"split": "test" if run.data.test is not None else "val", "images": len(split)}
    for name, file, model in (
        ("dense", "dense.onnx", copy.deepcopy(run.dense)),
        ("pruned", "model.onnx", run.network("pruned.safetensors")),
    ):
        path = run.folder.path / file
        proof = write_onnx(run, model, path, name)
        value = metric(path, _on_cpu(run.loader(split)), run.task)
        found[name] = {
            **proof.model_dump(mode="json"),
            **reported(run.task, value),
            "size_bytes": path.stat().st_size,
        }
        if zeros.is_fine(run.recipe) and name == "pruned":
            found[name]["weights"] = zeros.count_file(model, path)
    share = found["pruned"]["size_bytes"] / found["dense"]["size_bytes"]
    if run.recipe.prune.metric == "size" and share > run.keep < 1:  # at 1 nothing is cut; the file says how it was made
        raise TargetError(
            f"the file is {share:.4f} of the dense one, above the target {run.keep:g}; ask for less",
            lowest=share,
        )
    run.write("parity.json", found)
    return found


def write_onnx(run: Run, model: nn.Module, path: Path, name: str) -> Proof:
    example = run.example(17)
    is_sparse = zeros.is_fine(run.recipe) and name == "pruned"
    return to_onnx(model, example, path, metadata=_metadata(run, model, example, name), sparse=is_sparse)


def _metadata(run: Run, model: nn.Module, example: Tensor, name: str) -> dict[str, str]:
    """metadata_props: who made the file, from what, and what the network costs."""
    prune = run.recipe.prune
    values: dict[str, Any] = {
        "method": prune.method if name == "pruned" else "none",
        "target": run.keep if name == "pruned" else 1.0,
        "metric": prune.metric,
        "seed": run.recipe.seed,
        "source_sha256": run.read("env.json")["source_sha256"],
        "arch": run.info.arch,
        "data": run.public_data or "",
        "task": run.info.task,
        "labels": list(run.info.labels or ()),
        "mean": list(run.info.mean or ()),
        "std": list(run.info.std or ()),
        "dense": figures(run.dense, example[:1]),
        name: figures(model, example[:1], is_fine=zeros.is_fine(run.recipe) and name == "pruned"),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def figures(model: nn.Module, example: Tensor, *, is_fine: bool = False) -> dict[str, float]:
    """Parameters, without the zeros among single weights where `is_fine`, and MACs: a runtime multiplies by zeros."""
    costs = cost.measure(model, example)
    return {"params": sparse.remaining(model) if is_fine else costs.total("params"), "macs": costs.total("macs")}


def _on_cpu(loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
    return ((images.cpu(), labels.cpu()) for images, labels in loader)
