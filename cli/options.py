"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint: .safetensors, .pt, .pth, .th")]
Arch = Annotated[
    Optional[str],  # noqa: UP007, UP045  typer reads the annotation at run time
    typer.Option("--arch", help="resnet20 ..., timm:NAME, torchvision:NAME, pkg.module:function, file.py:function"),
]
ArchArg = Annotated[Optional[list[str]], typer.Option("--arch-arg", metavar="KEY=VALUE", help="For the builder; may repeat")]  # noqa: UP007, UP045
Data = Annotated[
    Optional[str],  # noqa: UP007, UP045
    typer.Option("--data", help="digits, a folder, Parquet files, hf:NAME, pkg.module:function"),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document as the last line of stdout")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Log lines, and a traceback with an error")]
Seed = Annotated[Optional[int], typer.Option("--seed", min=0, help="Splits, order, augmentation, initialisation")]  # noqa: UP007, UP045
Device = Annotated[Optional[str], typer.Option("--device", help="cpu, cuda, cuda:N, auto")]  # noqa: UP007, UP045
Threads = Annotated[Optional[int], typer.Option("--threads", min=1, help="CPU threads")]  # noqa: UP007, UP045
