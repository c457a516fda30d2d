"""Latency as the target: what was asked, what came, and what a target in MACs gives at the same latency.

    python benchmarks/latency_target.py [--on ort-cpu:threads=1:batch=1] [--keep 0.7 0.5 0.35] [--networks ...]

Networks with random weights, 224 x 224, ranked by l2. For each share: the widths by measured prices, corrected by whole
networks; their latency measured once more beside the dense file; the widths chosen by MACs for the same share, and
those chosen by MACs whose latency is the same (corrected alike), with the importance each keeps: the mean over channels
of the scores kept, in units of their layer's mean. `--ratio` instead: the speed-up at half of the MACs, rounded as
`compress` rounds, beside torch-pruning's default (one ratio for all layers, unrounded). Lines go to benchmarks/results,
those already there are not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo_networks import build

import compress
from compress.aim import aim, dense_file, measured_share
from compress.bench import benchmark
from compress.bench.machine import describe, vector_block
from compress.bench.on import On, parse
from compress.cost import Costs, Metric, measure
from compress.errors import CompressError
from compress.export import draft
from compress.groups import Group
from compress.plan import Plan, apply, select

RESULTS = Path(__file__).parent / "results"
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")
SECONDS = 8.0  # of the last measurement of each file


@dataclass(frozen=True)
class Dense:
    """A network, what is known of it, and its file."""

    name: str
    model: nn.Module
    example: Tensor
    groups: Sequence[Group]
    costs: Costs
    scores: compress.scores.Scores  # type: ignore[name-defined]
    file: Path
    on: On
    facts: dict[str, Any]

    def choose(self, metric: Metric) -> Callable[[float], Plan]:
        """A share of the metric -> widths, rounded as `compress prune` rounds them."""
        asked = {"metric": metric, "round_to": vector_block(), "adapt": True}
        return lambda keep: select(self.groups, self.scores, self.costs, keep=keep, **asked)

    def importance(self, plan: Plan) -> float:
        whole = kept = 0.0
        for group in self.groups:
            if group.frozen is None:
                score = self.scores[group.name].double() / self.scores[group.name].double().mean()
                whole, kept = whole + float(score.sum()), kept + float(score[list(plan.kept[group.name])].sum())
        return kept / whole

    def figures(self, plan: Plan) -> dict[str, Any]:
        """Latency against the dense file, with its interval, MACs and importance."""
        cut = copy.deepcopy(self.model)
        apply(cut, self.groups, plan)
        return {**speed(self, cut), "importance": round(self.importance(plan), 4)}


def read(name: str, on: On, folder: Path) -> Dense:
    torch.manual_seed(0)
    model, example = build(f"torchvision:{name}").eval(), torch.randn(2, 3, 224, 224)
    groups = compress.trace(model, example[:1])
    file, dense_ms = dense_file(model, example, folder, on=on)
    began = time.perf_counter()
    times = compress.price(model, groups, example[:1], on=on, dense_ms=dense_ms)
    facts = {"dense_ms": round(dense_ms, 3), "pricing_seconds": round(time.perf_counter() - began, 1)}
    costs = replace(measure(model, example[:1]), times=times)
    scores = compress.SCORES["l2"](model, groups)
    return Dense(name, model, example, groups, costs, scores, file, on, facts)


def speed(dense: Dense, cut: nn.Module) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "cut.onnx"
        draft(cut, dense.example, file)
        on = dense.on
        made = benchmark([dense.file, file], batch=on.batch, threads=on.threads, runtime=on.runtime, seconds=SECONDS)
    gain = made.speedups[0]
    macs = measure(cut, dense.example[:1]).total("macs") / dense.costs.total("macs")
    found = {"latency": 1 / gain.value, "low": 1 / gain.high, "high": 1 / gain.low, "macs": macs}
    return {key: round(value, 4) for key, value in found.items()}


def targets(dense: Dense, keep: float) -> dict[str, Any]:
    """One share, three ways: by latency, by MACs, and by MACs at the same latency."""
    share = measured_share(dense.model, dense.groups, dense.example, dense.file, on=dense.on)
    closest, tries = aim(dense.choose("latency"), share, keep=keep)
    by_latency = dense.figures(closest.plan)
    alike, _ = aim(dense.choose("macs"), share, keep=by_latency["latency"])
    return {
        "tries": [[round(one.asked, 4), round(one.measured, 4)] for one in tries],
        "latency": by_latency,
        "macs": dense.figures(dense.choose("macs")(keep)),
        "macs at equal latency": dense.figures(alike.plan),
    }


def ratio(dense: Dense, keep: float) -> dict[str, Any]:
    """The speed-up at a share of the MACs, divided by how many times fewer they are; torch-pruning beside it."""
    import torch_pruning as tp

    ours = copy.deepcopy(dense.model)
    apply(ours, dense.groups, dense.choose("macs")(keep))
    head = [m for m in dense.model.modules() if isinstance(m, nn.Linear)][-1].out_features

    def by_ratio(amount: float) -> nn.Module:
        model = copy.deepcopy(dense.model)
        last = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == head]
        score = tp.importance.GroupMagnitudeImportance(p=2)
        tp.pruner.BasePruner(model, dense.example, score, pruning_ratio=amount, ignored_layers=last).step()
        return model

    low, high, whole = 0.0, 0.9, dense.costs.total("macs")
    for _ in range(10):
        middle = (low + high) / 2
        enough = measure(by_ratio(middle), dense.example[:1]).total("macs") <= keep * whole
        low, high = (low, middle) if enough else (middle, high)
    found = {"ours": speed(dense, ours), "torch-pruning": speed(dense, by_ratio(high))}
    return {name: {**f, "efficiency": round(f["macs"] / f["latency"], 3)} for name, f in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default=str(On()))
    parser.add_argument("--keep", type=float, nargs="+", help="default: 0.7 0.5 0.35; 0.5 with --ratio")
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="of torchvision")
    parser.add_argument("--ratio", action="store_true", help="speed-up over MACs, torch-pruning beside it")
    given = parser.parse_args()
    on, kind = parse(given.on), ratio if given.ratio else targets
    path = RESULTS / f"latency-{kind.__name__}-{str(on).replace(':', '-').replace('=', '')}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(line["network"], line["keep"]) for line in lines}
    failed = 0
    for name in given.networks:
        left = [k for k in given.keep or ((0.5,) if given.ratio else (0.7, 0.5, 0.35)) if (name, k) not in done]
        if not left:
            continue
        with tempfile.TemporaryDirectory() as folder:
            dense = read(name, on, Path(folder))
            for keep in left:
                try:
                    found = kind(dense, keep)
                except CompressError as error:
                    print(f"{name} at {keep}: {error}", file=sys.stderr)
                    failed += 1
                    continue
                line = {"network": name, "keep": keep, "on": str(on), **dense.facts, **found}
                with path.open("a") as file:
                    file.write(json.dumps({**line, "environment": describe()}) + "\n")
                print(json.dumps(line), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
