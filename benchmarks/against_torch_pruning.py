"""Accuracy after a short recovery: this project's default against torch-pruning, the same epochs for both.

    python benchmarks/against_torch_pruning.py --checkpoints DIR --data DIR [--keep 0.5 0.3 0.15] [--seeds 3]

From ResNet-20, fine-tuned on CIFAR-10 for five epochs, to a share of its parameters, five more epochs in all:
* `global`: torch-pruning's group L2 norm, ranked over all layers, channels inside blocks, one-cycle fine-tune;
* `global + distillation`: the same, taught by the dense network;
* `uniform + distillation`: torch-pruning with one ratio for all layers, the simple baseline;
* `compress`: `compress prune` as it comes.
All rows train in this project's loop on the same images (as they are, without shifts or flips, where the epochs are
few), batch norm recalibrated after the cut, the epoch chosen on the validation split, the test split read once.
Finished runs stand in benchmarks/results and are not made again.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from cifar10 import Bench, bench_of, cell, describe_run, options, train_dense
from torch import nn

from compress import checkpoint, data, inputs, train
from compress.bench.machine import describe
from compress.files import sha256
from compress.models import ARCHS
from compress.pipeline.context import augmentation

ROWS = ("global", "global + distillation", "uniform + distillation", "compress")
Key = tuple[str, float, int]  # row, keep, seed


def cut(dense: nn.Module, example: torch.Tensor, keep: float, *, is_global: bool) -> nn.Module:
    """torch-pruning at the smallest ratio that leaves at most `keep` of the parameters, channels inside blocks only."""
    import torch_pruning as tp

    whole = _parameters(dense)

    def at(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
        outer = [m for name, m in convolutions.items() if not ("." in name and name.endswith("conv1"))]
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=ratio,
            global_pruning=is_global,
            ignored_layers=outer,
        )
        pruner.step()
        return model

    return at(_smallest(lambda ratio: _parameters(at(ratio)) <= keep * whole))


def _smallest(holds: Callable[[float], bool]) -> float:
    """The least ratio in 0..1 for which `holds`, to a thousandth."""
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def baseline(bench: Bench, key: Key) -> dict[str, Any]:
    """Cut by torch-pruning, then recover in this project's loop."""
    row, keep, seed = key
    torch.set_num_threads(bench.threads)
    dense = ARCHS[bench.arch]()
    read = checkpoint.read(bench.dense)
    checkpoint.load_into(dense, read)
    loaded = inputs.load_data(read.info, str(bench.data), val_share=bench.val_share, seed=seed)
    mean, std = inputs.normalisation(read.info)

    augment = augmentation(bench.epochs)  # as `compress prune` has it

    def loader(split: data.Split, *, training: bool = False) -> data.Loader:
        return data.loader(split, batch_size=128, mean=mean, std=std, train=training, augment=augment, seed=seed)

    device = train.accelerator("cpu")
    model = cut(dense.eval(), inputs.example(read.info, loaded.val, 1), keep, is_global=row.startswith("global"))
    share = _parameters(model) / _parameters(dense)
    train_split = loader(loaded.train, training=True)
    train.recalibrate(model, train_split, device=device)
    distill = 0.9 if "distillation" in row else 0.0
    settings = train.Settings(epochs=bench.epochs, distill=distill, keep_best=True, seed=seed)
    outcome = train.finetune(model, train_split, loader(loaded.val), settings, device=device, teacher=dense)
    assert loaded.test is not None
    top1, _ = train.evaluate(model, loader(loaded.test), device=device)
    found = {"top1": top1, "val_top1": outcome.best_top1, "kept": {"params": share}, "augment": augment}
    return {**found, "source_sha256": sha256(bench.dense), "data": loaded.fingerprint}


def ours(bench: Bench, key: Key) -> dict[str, Any]:
    """`compress prune` with nothing but the target set; widths unrounded, as torch-pruning's are."""
    _, keep, seed = key
    folder = bench.work / f"{bench.table}-{bench.conditions}" / f"{keep:g}-{seed}"
    text = bench.call(
        *("prune", str(bench.dense), "--data", str(bench.data), "--target", str(keep), "--epochs", str(bench.epochs)),
        *(
            "--set",
            f"data.val_share={bench.val_share}",
            "--seed",
            str(seed),
            "--round-to",
            "1",
            "--device",
            "cpu",
            "--out",
            str(folder),
            "--resume",
        ),
    )
    return describe_run(json.loads(text))


def main() -> int:
    parser = options(__doc__, keep=[0.5, 0.3, 0.15])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    given = parser.parse_args()
    bench = bench_of("against-torch-pruning", given)
    lines = [json.loads(line) for line in bench.results.read_text().splitlines()] if bench.results.exists() else []
    done = {(line["row"], line["keep"], line["seed"]) for line in lines}
    keys = [(row, keep, seed) for seed in range(given.seeds) for keep in given.keep for row in given.rows]
    if not given.only_table:
        train_dense(bench)
        with ProcessPoolExecutor(given.jobs) as pool:
            wanted = [key for key in keys if key not in done]
            running = {pool.submit(ours if key[0] == "compress" else baseline, bench, key): key for key in wanted}
            for future in as_completed(running):
                row, keep, seed = running[future]
                line = {"row": row, "keep": keep, "seed": seed, **future.result(), "environment": describe()}
                lines.append(line)
                with bench.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print(f"| top-1 on test | {' | '.join(f'keep {keep:g}' for keep in given.keep)} |")
    print("|---" * (len(given.keep) + 1) + "|")
    for row in ROWS:
        found = [[line["top1"] for line in lines if (line["row"], line["keep"]) == (row, keep)] for keep in given.keep]
        print(f"| {row} | {' | '.join(cell(values) for values in found)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
