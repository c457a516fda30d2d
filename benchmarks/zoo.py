"""How many networks of a list can be pruned, and what is wrong with the others: one process per network.

    python benchmarks/zoo.py [--models benchmarks/zoo_models.txt] [--out zoo.jsonl] [--limit 120] [--memory 12]

Each line of the list is `family model size`, a model as `timm:NAME` or `torchvision:NAME`. Weights are random, scaled
layer by layer so that every output has a spread of 1 (an output of about zero would prove nothing). Each network is
asked for 0.7 of its parameters, score l1. Verdicts: `proved` (target reached, output shape and finiteness as before,
the cut of the local groups equals zeroing them, a fresh network resized to the cut one's tensors gives bit-equal
output), `refused` (a one-line reason), `broken` (anything else: an exception, a wrong output, the time or the memory).
Results go to --out as JSON lines as they come; models found there are not run again. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEEP = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=HERE / "zoo_models.txt")
    parser.add_argument("--out", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per network")
    parser.add_argument("--memory", type=float, default=12.0, help="GiB of address space per network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SIZE"), help="one network in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(attempt(options.one[0], int(options.one[1]), options.threads)))
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
    try:
        found = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=options.limit + 60, check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"verdict": "broken", "reason": f"no end within {options.limit:g} s"}
    if found.returncode:
        text = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        return {"verdict": "broken", "reason": text[:300]}
    answer: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return answer


def attempt(name: str, size: int, threads: int) -> dict[str, Any]:
    """Prune one network and check what came of it."""
    import torch

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
    found: dict[str, Any] = {}
    try:
        groups = trace(model, example)
        found["frozen"] = {group.name: group.frozen for group in groups if group.frozen}
        found["groups"] = len(groups)
        found["trace_seconds"] = round(time.perf_counter() - began, 2)
        plan = select(groups, SCORES["l1"](model, groups, None), measure(model, example), keep=KEEP, metric="params")
        apply(model, groups, plan)
    except CompressError as error:
        return {**found, "verdict": "refused", "reason": str(error), "seconds": round(time.perf_counter() - began, 2)}
    found["seconds"] = round(time.perf_counter() - began, 2)
    found["cpu_seconds"] = round(time.process_time() - busy, 2)
    found["kept"] = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())
    wrong = _wrong(name, dense, model, example, groups, plan.kept)
    return {**found, "verdict": "broken" if wrong else "proved", **({"reason": wrong} if wrong else {})}


def build(name: str) -> Any:
    """A network with random weights; torchvision's operators are declared where its compiled part does not fit."""
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        globals()["_LIBRARY"] = library  # the declarations last as long as this object
    source, _, rest = name.partition(":")
    if source == "timm":
        import timm

        return timm.create_model(rest)
    import torchvision

    return torchvision.models.get_model(rest, weights=None)


def _scale(model: Any, example: Any) -> None:
    """Scale each layer's weights so that its output spreads by 1 (LSUV, Mishkin and Matas 2015, one pass)."""
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
    from compress.groups.trace import find
    from compress.structure import resize, underived

    before, after = outputs(dense, example), outputs(pruned, example)
    if [t.shape for t in before] != [t.shape for t in after]:
        return "the output has another shape"
    if not all(bool(t.isfinite().all()) for t in after):
        return "the output is not finite"
    if sum(p.numel() for p in pruned.parameters()) > (KEEP + 1e-9) * sum(p.numel() for p in dense.parameters()):
        return "the target is missed"
    integers = underived(pruned, dense)
    fresh = build(name).eval()
    resize(fresh, pruned.state_dict())
    for path, values in integers.items():
        for attribute, value in values.items():
            setattr(fresh.get_submodule(path), attribute, value)
    if not all(torch.equal(a, b) for a, b in zip(outputs(fresh, example), after, strict=True)):
        return "a fresh network with these tensors gives another output"
    _, mixed = find(dense, example)
    local = [group for group in groups if group.name not in mixed]
    zeroed, smaller = copy.deepcopy(dense), dense
    zero(zeroed, local, kept)
    cut(smaller, local, kept)
    a, b = outputs(zeroed, example), outputs(smaller, example)
    scale = max(float(t.abs().max()) for t in a)
    worst = max(float((s - t).abs().max()) for s, t in zip(a, b, strict=True))
    return None if worst <= 1e-3 * scale else f"the cut differs from zeroing by {worst:.2g} of {scale:.2g}"


if __name__ == "__main__":
    main()
