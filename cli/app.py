"""The command table, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from compress.cli import view
from compress.cli.bench import bench
from compress.cli.evaluate import evaluate
from compress.cli.export import export
from compress.cli.inspect import inspect
from compress.cli.methods import methods
from compress.cli.prune import prune, resume
from compress.cli.report import report
from compress.cli.train import train
from compress.cli.verify import verify
from compress.errors import CompressError

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    name="compress",
    help="From a pretrained network to a smaller ONNX file that is proved equal and measured faster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# verb -> its function, in the order of `compress --help`
COMMANDS: dict[str, Callable[..., None]] = {
    "prune": prune,
    "resume": resume,
    "train": train,
    "inspect": inspect,
    "eval": evaluate,
    "export": export,
    "bench": bench,
    "verify": verify,
    "report": report,
    "methods": methods,
}


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The same command, ending with one line of error text and the exit code of what went wrong."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except CompressError as error:
            if options.get("verbose"):
                view.traceback()
            view.error(str(error))
            raise SystemExit(error.exit_code) from error
        except KeyboardInterrupt as error:
            view.error("interrupted")
            raise SystemExit(INTERRUPTED) from error
        except BrokenPipeError as error:  # the reader of stdout has gone, e.g. `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from error
        except OSError as error:  # a full disk, a folder without permission
            if options.get("verbose"):
                view.traceback()
            where = f"{error.filename}: " if error.filename else ""
            view.error(f"{where}{error.strerror or error} (run with -v for the traceback)")
            raise SystemExit(1) from error
        except Exception as error:  # the last line of defence: never a bare stack trace
            if options.get("verbose"):
                view.traceback()
            text = (str(error).strip().splitlines() or [""])[0]
            view.error(f"unexpected {type(error).__name__}: {text} (-v shows the traceback; please report it)")
            raise SystemExit(1) from error

    return run


for _verb, _command in COMMANDS.items():
    app.command(_verb)(guarded(_command))


def main() -> None:
    """The `compress` script."""
    app()
