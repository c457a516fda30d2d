"""All stages in order; here those that recover, measure and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from compress import report
from compress.bench import benchmark
from compress.bench.machine import vector_block
from compress.errors import MeasureError
from compress.pipeline import zeros
from compress.pipeline.context import Event, Run
from compress.pipeline.export import export, figures
from compress.pipeline.lower import quantize
from compress.pipeline.prepare import prepare
from compress.pipeline.rounds import sparsify, teacher
from compress.recipe import Recipe
from compress.structure import removed

FURTHER_SECONDS = 3.0  # for each further batch size: 20 rounds of two small networks


def recover(run: Run) -> dict[str, Any]:
    """Train the cut network back, taught by the uncut one, and keep the best epoch on the validation split."""
    counts = run.prepared["epochs"]
    model = run.on_device(run.network(f"state/round-{len(counts['sparse'])}.safetensors"))
    settings = replace(run.settings("recover", counts["recover"]), keep_best=True)
    held = zeros.held(run.recipe, is_cut=True)
    for regularizer in held:
        regularizer.attach(model, ())
    try:
        outcome = run.train(model, settings, held, teacher=teacher(run))
    finally:
        for regularizer in held:
            regularizer.detach()
    run.save("pruned.safetensors", model.cpu(), pruned=not zeros.is_fine(run.recipe))
    return {
        "history": [{"phase": "recover", **line} for line in outcome.history],
        "val_top1": {"best": outcome.best_top1, "best_epoch": outcome.best_epoch, "last": outcome.last_top1},
    }


def measure(run: Run) -> dict[str, Any]:
    """Latency of the dense and the pruned file, interleaved in one run; under `further` that at other batch sizes.

    Memory may not suffice for those: what could not be measured is a warning, not the end of a run.
    """
    part, seed = run.recipe.bench, run.recipe.seed
    files = [run.folder.path / "dense.onnx", run.folder.path / "model.onnx"]
    place: dict[str, Any] = {"threads": part.threads, "runtime": part.runtime, "seed": seed}
    first = benchmark(files, batch=part.batch, seconds=part.seconds, **place)
    found = {**first.model_dump(mode="json"), "further": list[dict[str, Any]]()}
    for batch in dict.fromkeys(batch for batch in part.batches if batch != part.batch):
        try:
            more = benchmark(files, batch=batch, seconds=min(FURTHER_SECONDS, part.seconds), **place)
            found["further"].append(more.model_dump(mode="json"))
        except MeasureError as error:
            found["conditions"]["warnings"].append(f"batch {batch} was not measured: {error}")
    for warning in found["conditions"]["warnings"]:
        run.emit(Event("measure", warning))
    run.write("bench.json", found)
    return found


def write_report(run: Run) -> dict[str, Any]:
    """The measured numbers with their conditions, for machines and for people."""
    pruned = run.network("pruned.safetensors")
    stages = {name: run.read(f"state/{name}.json") for name in STAGES if run.has(f"state/{name}.json")}
    widths = _widths(stages["prepare"], [found["plan"] for found in stages["sparse"]["rounds"]])
    asked = run.recipe.prune.round_to
    block = vector_block() if asked == "auto" else asked
    dense = stages["prepare"]["widths"]
    facts = {
        "recipe": run.recipe.model_dump(mode="json"),
        "keep": run.keep,
        "env": run.read("env.json"),
        "info": run.info.model_dump(mode="json"),
        "stages": stages,
        "pruned": figures(pruned, run.example(), is_fine=zeros.is_fine(run.recipe)),
        "sensitivity": run.read("sensitivity.json") if run.has("sensitivity.json") else None,
        "density": zeros.of_layers(pruned) if zeros.is_fine(run.recipe) else {},
        "widths": widths,
        "dropped": list(removed(pruned)),
        "block": block,
        "unaligned": {name: width for name, width in widths.items() if width % block and width != dense[name]},
        "labels": list(run.data.labels),
        "data": {"name": run.data.name, "fingerprint": run.data.fingerprint, "notes": list(run.data.notes)},
    }
    report.write(run.folder.path, report.build(run.folder.path, facts))
    return {}


TOGETHER = frozenset({"sparse", "recover"})  # the stages in which all processes work; rank 0 does the others alone
# name -> stage; each writes state/NAME.json, and a stage whose file is there is not run again
STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "prepare": prepare,
    "sparse": sparsify,
    "recover": recover,
    "export": export,
    "measure": measure,
    "quantize": quantize,
    "report": write_report,
}


LAST = list(STAGES)[-1]


def stages_of(recipe: Recipe, *, until: str = LAST) -> dict[str, Callable[[Run], dict[str, Any]]]:
    """The stages that the recipe asks for, in order, up to the one called `until`."""
    first = list(STAGES)[: list(STAGES).index(until) + 1]
    return {name: STAGES[name] for name in first if name != "quantize" or recipe.quantize.to != "none"}


def _widths(prepared: dict[str, Any], plans: Sequence[dict[str, Any]]) -> dict[str, int]:
    """What every group of the dense network is left with; 0 where all its layers are gone.

    A later round names a group by its first layer that is left.
    """
    widths, layers = dict(prepared["widths"]), prepared.get("layers", {})
    gone: tuple[str, ...] = ()
    for plan in plans:
        for name, kept in plan.get("kept", {}).items():
            known = name if name in widths else next((g for g, found in layers.items() if name in found), name)
            widths[known] = len(kept)
        gone += tuple(f"{path}." for path in plan.get("dropped", {}))
    return {
        name: 0 if gone and all(f"{layer}.".startswith(gone) for layer in layers[name]) else width
        for name, width in widths.items()
    }
