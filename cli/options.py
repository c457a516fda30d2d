"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="Checkpoint: .safetensors, .pt, .pth, .th; a transformers folder; hf:REPO"),
]
Arch = Annotated[
    str | None,
    typer.Option("--arch", help="resnet20 ..., timm:NAME, torchvision:NAME, hf:REPO_OR_DIR, pkg.module:f, file.py:f"),
]
ArchArg = Annotated[
    list[str] | None, typer.Option("--arch-arg", metavar="KEY=VALUE", help="For the builder; may repeat")
]
Data = Annotated[
    str | None,
    typer.Option("--data", help="digits, a folder, Parquet files, hf:NAME, pkg.module:function"),
]
Task = Annotated[
    str | None,
    typer.Option(
        "--task", help="classification, segmentation, pkg.module:Task, file.py:Task; default: what the file says"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document as the last line of stdout")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Log lines, and a traceback with an error")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Splits, order, augmentation, initialisation")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:N, auto")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads")]
InputSize = Annotated[
    int | None,
    typer.Option("--input-size", min=1, help="Pixels a side of the images; default: what the file says"),
]
