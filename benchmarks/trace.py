"""Time and peak memory of trace + select + apply, beside torch-pruning's graph alone, over networks of growing depth.

    python benchmarks/trace.py [--threads 2] [--rounds 3] [--out trace.jsonl]

Each figure is one fresh process: a tiny network is pruned first, so that imports are not counted, then the network is
built and, with a clock and a memory gauge running, read. `ours` proves every group and cuts to 0.7 of the parameters;
`torch-pruning` builds its dependency graph and lists its groups, without proof or cut. The tools alternate (A B B A).
Memory is the rise of the peak resident size over what the process held with the network built, in units of its weights.
Lines already in --out are not measured again. The last line of stdout is JSON: medians per network and tool.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NETWORKS = (
    *(f"torchvision:resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"timm:vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
    "torchvision:convnext_base",
)
TOOLS = ("ours", "torch-pruning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("trace.jsonl"))
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "TOOL"), help="one figure in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(figure(options.one[0], options.one[1], options.threads)))
        return
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    done = {(found["network"], found["tool"], found["round"]) for found in map(json.loads, lines)}
    for number in range(options.rounds):
        for network in options.networks:
            for tool in TOOLS if number % 2 == 0 else reversed(TOOLS):
                if (network, tool, number) in done:
                    continue
                found = {"network": network, "tool": tool, "round": number, **_child(options, network, tool)}
                with options.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    if errors := [found for found in map(json.loads, options.out.read_text().splitlines()) if "error" in found]:
        print(f"{len(errors)} figures failed, {errors[0]['network']}: {errors[0]['error']}", file=sys.stderr)
    print(json.dumps(_medians(options.out)))
    sys.exit(bool(errors))


def _child(options: argparse.Namespace, network: str, tool: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--threads", str(options.threads), "--one", network, tool]
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False)
    if found.returncode:
        return {"error": (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1][:200]}
    answer: dict[str, Any] = json.loads(found.stdout.strip().splitlines()[-1])
    return answer


def _medians(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    every = [found for found in map(json.loads, path.read_text().splitlines()) if "error" not in found]
    table: dict[str, dict[str, dict[str, float]]] = {}
    for network, tool in sorted({(found["network"], found["tool"]) for found in every}):
        rows = [found for found in every if (found["network"], found["tool"]) == (network, tool)]
        middle = {key: statistics.median(row[key] for row in rows) for key in ("seconds", "cpu_seconds", "memory")}
        table.setdefault(network, {})[tool] = {**middle, "n": len(rows)}
    return table


def figure(network: str, tool: str, threads: int) -> dict[str, Any]:
    """Seconds (wall, processor) and peak memory of one tool on one network."""
    import torch
    from zoo_networks import build

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tiny = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 2, 1))
    _work(tiny, torch.randn(1, 3, 8, 8), tool)
    model, example = build(network).eval(), torch.randn(1, 3, 224, 224)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        model(example)  # one forward pass is not counted
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began, busy = time.perf_counter(), time.process_time()
    groups = _work(model, example, tool)
    seconds, cpu = time.perf_counter() - began, time.process_time() - busy
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held
    return {"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3), "memory": round(1 + rise / weights, 2),
            "groups": groups, "threads": threads, "torch": torch.__version__}  # fmt: skip


def _work(model: Any, example: Any, tool: str) -> int:
    from compress.cost import measure
    from compress.groups import trace
    from compress.groups.oracle import consult
    from compress.plan import apply, select
    from compress.scores import SCORES

    if tool == "torch-pruning":
        return len(consult(model, example))
    groups = trace(model, example)
    plan = select(groups, SCORES["l1"](model, groups, None), measure(model, example), keep=0.7, metric="params")
    apply(model, groups, plan)
    return len(groups)


if __name__ == "__main__":
    main()
