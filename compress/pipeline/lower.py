"""The stage that quantises: the pruned file at lower precision, where the recipe asks for it."""

from __future__ import annotations

from typing import Any

from compress import inputs
from compress.errors import CompressError
from compress.pipeline.context import Event, Run
from compress.quantize import Setting, images_of, record
from compress.quantize import quantize as make


def quantize(run: Run) -> dict[str, Any]:
    """The pruned file again at lower precision, judged on the same split and measured beside it.

    Where that cannot be had the reason stands under `failed`: the pruned network is no worse for it.
    """
    part, bench = run.recipe.quantize, run.recipe.bench
    assert part.to != "none"
    setting = Setting(
        part.to, part.calibration, batch=bench.batch, threads=bench.threads, runtime=bench.runtime,
        seconds=bench.seconds, seed=run.recipe.seed,
    )  # fmt: skip
    images = images_of(run.data, inputs.normalisation(run.info), count=part.images, seed=run.recipe.seed)
    source = run.folder.path / "model.onnx"
    try:
        made = make(source, source.with_suffix(f".{part.to}.onnx"), setting, images=images, task=run.task)
    except CompressError as error:
        run.emit(Event("quantize", f"no {part.to} file: {error}"))
        return {"failed": str(error)}
    record(run.folder.path, made)
    return made.model_dump(mode="json")
