"""int8 (min-max and entropy) and float16 beside float32: bytes, top-1 by ONNX Runtime, latency in the same run.

    compress export ../shared/checkpoints/resnet20-12fca82f.th --arch resnet20 --data ../shared/data/cifar10 \
        --input-size 32 --out resnet20.onnx
    python benchmarks/quantize.py resnet20.onnx --data ../shared/data/cifar10 [--batch 1] [--threads 1]

Every row is written as it ends to benchmarks/results/quantize-<conditions>.jsonl, and skipped when it is there; the
networks are told apart by the files' names. The last line of stdout is JSON: the rows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from compress.bench.machine import describe
from compress.fit import complete
from compress.inputs import load_data, normalisation, onnx_info
from compress.quantize import Setting, images_of, quantize
from compress.task import ours

RESULTS = Path(__file__).parent / "results"
VARIANTS: dict[str, dict[str, Any]] = {
    "int8-minmax": {"to": "int8", "calibration": "minmax"},
    "int8-entropy": {"to": "int8", "calibration": "entropy"},
    "fp16": {"to": "fp16"},
}


def measure(source: Path, data: str | None, variant: str, asked: argparse.Namespace) -> dict[str, Any]:
    """One file at lower precision, without the samples of its timing."""
    info, fixed = onnx_info(source)
    loaded = load_data(info, data)
    images = images_of(loaded, normalisation(complete(info, loaded)), count=asked.images, fixed=fixed)
    setting = Setting(**VARIANTS[variant], batch=asked.batch, threads=asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        made = quantize(
            source, Path(folder) / f"{source.stem}.{variant}.onnx", setting, images=images, task=ours(info.task)
        )
    row = made.model_dump(mode="json")
    for measured in row["measurements"]:
        del measured["latency"]["samples"]
    return {"network": source.stem, "variant": variant, "data": loaded.name, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--data", help="default: what each file names")
    parser.add_argument("--images", type=int, default=256, help="for the ranges")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    machine = describe()
    where = f"{machine['cpu']}-{machine['vector_unit']}".lower().replace(" ", "-")
    out = RESULTS / f"quantize-batch{asked.batch}-threads{asked.threads}-cpu-{where}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    done = {(row["network"], row["variant"]) for row in rows}
    for source in asked.files:
        for variant in VARIANTS:
            if (source.stem, variant) not in done:
                rows.append(measure(source, asked.data, variant, asked))
                with out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    print(json.dumps({"out": out.name, "rows": [[row["network"], row["variant"], row["verdict"]] for row in rows]}))


if __name__ == "__main__":
    main()
