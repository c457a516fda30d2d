"""compress verify: a run's folder proved again, wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compress.cli import options, view

if TYPE_CHECKING:
    from torch import nn

    from compress.checkpoint import ModelInfo


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a finished run")],
    data: options.Data = None,
    arch: options.Arch = None,
    arch_arg: options.ArchArg = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Test a run's claims again from its files: hashes, sizes, ONNX == torch, top-1. Writes nothing."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress.cli import arch as architectures
    from compress.errors import ParityError
    from compress.verify import verify as test

    arch_args = architectures.parse_arch_args(arch_arg or [])

    def rebuild() -> tuple[nn.Module, ModelInfo]:
        return _network(folder / "pruned.safetensors", arch, arch_args)

    with view.working(f"testing {folder}"):
        checks = test(folder, rebuild, source=data)
    view.table(str(folder), ("check", "result", "what was found"), [(c.name, c.state, c.detail) for c in checks])
    failed = [check for check in checks if check.state == "FAILED"]
    skipped = sum(check.state == "skipped" for check in checks)
    passed = len(checks) - len(failed) - skipped
    view.note(f"{passed} of {len(checks)} checks passed, {len(failed)} failed, {skipped} skipped")
    if as_json:
        rows = [{"name": c.name, "state": c.state, "detail": c.detail} for c in checks]
        view.document({"out": str(folder), "ok": not failed, "failed": len(failed), "skipped": skipped, "checks": rows})
    if failed:
        raise ParityError(f"{folder} fails {view.count(len(failed), 'check')}: {failed[0].name}: {failed[0].detail}")


def _network(path: Path, arch: str | None, arch_args: dict[str, object]) -> tuple[nn.Module, ModelInfo]:
    """The pruned network; code that only the file names is not run."""
    from compress import checkpoint
    from compress.cli import arch as architectures
    from compress.cli import load
    from compress.errors import UsageError

    named = checkpoint.read(path).info.arch
    if arch is None and ":" in named and not named.startswith(architectures.LIBRARIES):
        raise UsageError(f"the network was built by the code {named!r}: if you trust it, say --arch {named}")
    network, info, _ = load.network(path, arch, arch_args)
    return network, info
