"""How many networks of a list can be pruned, and what is wrong with the others: one process per network.

    python benchmarks/zoo.py [--models benchmarks/zoo_models.txt] [--out zoo.jsonl] [--limit 120] [--memory 12]
    python benchmarks/zoo.py --table zoo.jsonl ...

Each line of the list is `family model size`, as zoo_networks.py makes it. Weights are random, scaled layer by layer so
that every output has a spread of 1 (an output of about zero would prove nothing). Each network is asked for 0.7 of its
parameters, score l1. Verdicts: `proved` (target reached; output shape and finiteness as before; the given network not
changed by the trace; the cut of the local groups equals zeroing them; a network built anew and loaded from the saved
file gives bit-equal output; the ONNX file equals the network at batches 1, 2 and 3), `refused` (a one-line reason) or
`broken` (anything else: an exception, a wrong output, the time or the memory). `seconds` is trace, select and apply,
`onnx_seconds` export and its proof; the limit is on `cpu_seconds`, the processor's, so that a busy machine does not
decide. Results go to --out as JSON lines as they come; models found there are not run
again. The last line of stdout is JSON. --table prints the results as Markdown, a row per network.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEEP = 0.7
BATCHES = (1, 2, 3)  # of the ONNX proof; to_onnx itself takes 17 for the last, too long here


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "zoo_models.txt")
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per network, ONNX and checks apart")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space per network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-onnx", action="store_true", help="leave out the ONNX file, a quicker first look")
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SIZE"), help="one network in this process")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print results as Markdown")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(attempt(options.one[0], int(options.one[1]), options.threads, onnx=not options.no_onnx)))
        return
    if options.table:
        print(table([json.loads(line) for path in options.table for line in path.read_text().splitlines()]))
        return
    done = (
        {json.loads(line)["model"] for line in options.out.read_text().splitlines()} if options.out.exists() else set()
    )
    for line in options.models.read_text().splitlines():
        family, model, size = line.split()
        if model not in done:
            found = {"family": family, "model": model, "size": int(size), **_child(options, model, size)}
            with options.out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(f"{found['verdict']:8} {found.get('seconds', 0):6.1f} s  {model}  {found.get('reason', '')[:120]}")
    every = [json.loads(line) for line in options.out.read_text().splitlines()]
    print(json.dumps(collections.Counter(found["verdict"] for found in every)))


def _child(options: argparse.Namespace, model: str, size: str) -> dict[str, Any]:
    limit = int(options.memory * 2**30)
    command = [sys.executable, __file__, "--threads", str(options.threads), "--one", model, size]
    command += ["--no-onnx"] * options.no_onnx
    try:
        found = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=4 * options.limit, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"verdict": "broken", "reason": f"no end within {4 * options.limit:g} s, ONNX and checks included"}
    if found.returncode:
        text = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        return {"verdict": "broken", "reason": text[:300]}
    answer: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    if answer.get("cpu_seconds", 0) > options.limit * options.threads:
        return {**answer, "verdict": "broken", "reason": f"it took more than {options.limit:g} s"}
    return answer


def attempt(name: str, size: int, threads: int, *, onnx: bool = True) -> dict[str, Any]:
    """Prune one network and check what came of it."""
    import torch
    from zoo_networks import build

    from compress.cost import measure
    from compress.errors import CompressError
    from compress.groups import trace
    from compress.plan import apply, select
    from compress.scores import SCORES

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, example = build(name).eval(), torch.randn(1, 3, size, size)
    _scale(model, example)
    dense = copy.deepcopy(model)
    began, busy = time.perf_counter(), time.process_time()
    found: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters())}
    try:
        groups = trace(model, example)
        found["frozen"] = {group.name: group.frozen for group in groups if group.frozen}
        found["groups"] = len(groups)
        found["trace_seconds"] = round(time.perf_counter() - began, 2)
        changed = any(not torch.equal(t, dense.state_dict()[n]) for n, t in model.state_dict().items())
        plan = select(groups, SCORES["l1"](model, groups, None), measure(model, example), keep=KEEP, metric="params")
        apply(model, groups, plan)
    except CompressError as error:
        return {**found, **_taken(began, busy), "verdict": "refused", "reason": str(error)}
    found |= _taken(began, busy)
    found["kept"] = round(sum(p.numel() for p in model.parameters()) / found["params"], 4)
    wrong = "the trace changed the network" if changed else _wrong(name, dense, model, example, groups, plan.kept)
    if wrong:
        return {**found, "verdict": "broken", "reason": wrong}
    if not onnx:
        return {**found, "verdict": "proved without ONNX"}
    began, busy = time.perf_counter(), time.process_time()
    reason = _not_as_onnx(model, example)
    found |= {f"onnx_{name}": value for name, value in _taken(began, busy).items()}
    return {**found, "verdict": "refused" if reason else "proved", **({"reason": reason} if reason else {})}


def _taken(began: float, busy: float) -> dict[str, float]:
    """Seconds on the wall, and those of the processor, which other programs on the machine do not change."""
    wall, processor = time.perf_counter() - began, time.process_time() - busy
    return {"seconds": round(wall, 2), "cpu_seconds": round(processor, 2)}


def _scale(model: Any, example: Any) -> None:
    """Scale each layer's weights so that its output spreads by 1 (LSUV, Mishkin and Matas 2015, one pass).

    Weights of nothing but zeros, as some heads begin with, are drawn first.
    """
    import torch

    def hook(layer: Any, inputs: Any, output: Any) -> Any:
        spread = float(output.float().std())
        if spread > 0 and spread == spread:
            layer.weight.data /= spread
            if layer.bias is not None:
                layer.bias.data /= spread
        return output / spread if spread > 0 else output

    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    for layer in layers:
        if not layer.weight.any():
            torch.nn.init.normal_(layer.weight)
    handles = [layer.register_forward_hook(hook) for layer in layers]
    with torch.no_grad():
        model(example)
    for handle in handles:
        handle.remove()


def _wrong(name: str, dense: Any, pruned: Any, example: Any, groups: Any, kept: Any) -> str | None:
    """What a pruned network does not fulfil, or None."""
    import torch

    from compress.groups import cut, zero
    from compress.groups.prove import outputs

    before, after = outputs(dense, example), outputs(pruned, example)
    if [t.shape for t in before] != [t.shape for t in after]:
        return "the output has another shape"
    if not all(bool(t.isfinite().all()) for t in after):
        return "the output is not finite"
    if sum(p.numel() for p in pruned.parameters()) > (KEEP + 1e-9) * sum(p.numel() for p in dense.parameters()):
        return "the target is missed"
    if not all(torch.equal(a, b) for a, b in zip(_reloaded(name, dense, pruned, example), after, strict=True)):
        return "a fresh network with these tensors gives another output"
    local = [group for group in groups if not group.mixed]
    zeroed, smaller = copy.deepcopy(dense), dense
    zero(zeroed, local, kept)
    cut(smaller, local, kept)
    a, b = outputs(zeroed, example), outputs(smaller, example)
    scale = max(float(t.abs().max()) for t in a)
    worst = max(float((s - t).abs().max()) for s, t in zip(a, b, strict=True))
    return None if worst <= 1e-3 * scale else f"the cut differs from zeroing by {worst:.2g} of {scale:.2g}"


def _reloaded(name: str, dense: Any, pruned: Any, example: Any) -> list[Any]:
    """What a network built anew gives, after it has read the saved file."""
    from zoo_networks import build

    from compress.checkpoint import ModelInfo, load_into, read, save
    from compress.groups.prove import outputs
    from compress.structure import underived

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pruned.safetensors")
        save(path, pruned, ModelInfo(arch=name, pruned=True), integers=underived(pruned, dense))
        fresh = build(name).eval()
        load_into(fresh, read(path))
    return outputs(fresh, example)


def _not_as_onnx(model: Any, example: Any) -> str | None:
    """Why no ONNX file equals the network, or None."""
    import torch

    from compress import export
    from compress.errors import CompressError

    export.BATCHES = BATCHES
    images = torch.cat([example, torch.randn(1, *example.shape[1:], generator=torch.Generator().manual_seed(1))])
    with tempfile.TemporaryDirectory() as folder:
        try:
            export.to_onnx(model, images, Path(folder, "model.onnx"))
        except CompressError as error:
            return f"ONNX: {error}"
    return None


def table(results: Sequence[dict[str, Any]]) -> str:
    """The verdicts, counted by source, then a row per network."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for found in results:
        counts[found["model"].partition(":")[0]][found["verdict"]] += 1
    rows = ["| source | proved | refused | broken |", "|---|---|---|---|"]
    rows += [f"| {name} | {n['proved']} | {n['refused']} | {n['broken']} |" for name, n in counts.items()]
    rows += [
        "",
        "| family | network | parameters, M | verdict | kept | processor, s | ONNX, s | groups, frozen | reason |",
    ]
    rows += ["|---|---|---|---|---|---|---|---|---|"]
    for found in sorted(results, key=lambda f: (f["family"], f.get("params", 0))):
        frozen = f"{found['groups']}, {len(found['frozen'])}" if "groups" in found else ""
        cells = [found["family"], found["model"].partition(":")[2], f"{found.get('params', 0) / 1e6:.3g}"]
        cells += [found["verdict"], f"{found['kept']:.3f}" if "kept" in found else ""]
        cells += [str(found.get("cpu_seconds", "")), str(found.get("onnx_cpu_seconds", "")), frozen]
        rows.append("| " + " | ".join([*cells, found.get("reason", "").replace("|", "/")[:300]]) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
