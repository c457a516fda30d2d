"""compress report: the pages of a finished run, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compress.cli import options, view


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run")],
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write report.html and README.md of a run again, with the paths they have now, and show the result."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress import report as pages
    from compress.errors import LoadError
    from compress.folder import RunFolder

    run = RunFolder.finished(folder)
    content = run.read("report.json")
    places = {"out": "", "onnx": "model.onnx", "checkpoint": "pruned.safetensors", "report": "report.html"}
    content.update({key: str(folder / name) for key, name in places.items()})
    try:
        pages.write(folder, content)
    except (LookupError, TypeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise LoadError(f"{folder}: report.json is damaged or of another version ({first}): prune again") from error
    view.result(content)
    for name in ("report.html", "README.md", "report.json"):
        if run.has(name):
            view.note(f"  {folder / name}")
    if as_json:
        view.document(content)
