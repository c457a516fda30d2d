"""The command table, and the one place where errors become exit codes."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from compress import ranks
from compress.cli import view
from compress.cli.bench import bench
from compress.cli.compare import compare
from compress.cli.doctor import doctor
from compress.cli.evaluate import evaluate
from compress.cli.export import export
from compress.cli.inspect import inspect
from compress.cli.methods import methods
from compress.cli.prune import prune, resume
from compress.cli.quantize import quantize
from compress.cli.report import report
from compress.cli.sensitivity import sensitivity
from compress.cli.train import train
from compress.cli.verify import verify
from compress.errors import CompressError, UsageError

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
    "sensitivity": sensitivity,
    "eval": evaluate,
    "export": export,
    "quantize": quantize,
    "bench": bench,
    "compare": compare,
    "doctor": doctor,
    "verify": verify,
    "report": report,
    "methods": methods,
}


# those that several processes may do together
TOGETHER = ("prune", "resume", "train")


def guarded(command: Callable[..., None], *, is_shared: bool = True) -> Callable[..., None]:
    """The same command, ending with one line of error text and the exit code of what went wrong."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            ranks.join()
            if not is_shared and ranks.launched()[1] > 1:
                raise UsageError(f"only {', '.join(TOGETHER)} work in several processes: leave out torchrun")
            with _interrupts():
                command(*args, **options)
            ranks.leave()
        except CompressError as error:
            _end(error, str(error), code=error.exit_code, is_verbose=bool(options.get("verbose")))
        except KeyboardInterrupt as error:
            _end(error, "interrupted", code=ranks.INTERRUPTED)
        except BrokenPipeError as error:  # the reader of stdout has gone, e.g. `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from error
        except OSError as error:  # a full disk, a folder without permission
            where = f"{error.filename}: " if error.filename else ""
            text = f"{where}{error.strerror or error} (run with -v for the traceback)"
            _end(error, text, code=1, is_verbose=bool(options.get("verbose")))
        except Exception as error:  # the last line of defence: never a bare stack trace
            text = (str(error).strip().splitlines() or [""])[0]
            text = f"unexpected {type(error).__name__}: {text} (-v shows the traceback; please report it)"
            if ranks.is_broken(error):
                text = "another process of this run has ended; what is done is kept, see `compress resume`"
            _end(error, text, code=1, is_verbose=bool(options.get("verbose")))

    return run


@contextmanager
def _interrupts() -> Iterator[None]:
    """An interrupt of all processes may end another one first: then it is on its way to this one too."""
    try:
        yield
    except Exception as error:
        if ranks.is_broken(error):
            time.sleep(0.5)
        raise


def _end(error: BaseException, text: str, *, code: int, is_verbose: bool = False) -> NoReturn:
    """Say why, unless another process of the run does, and end."""

    def say() -> None:
        if is_verbose:
            view.traceback()
        view.error(text)

    code = ranks.part(error, code, say)
    if ranks.launched()[1] > 1:  # an orderly end would wait for what other processes will never send
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code) from error


for _verb, _command in COMMANDS.items():
    app.command(_verb)(guarded(_command, is_shared=_verb in TOGETHER))


def main() -> None:
    """The `compress` script."""
    app()
