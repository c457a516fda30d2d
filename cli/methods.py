"""compress methods: the names that --method, --regularize and --score take."""

from __future__ import annotations

import sys

from compress.cli import options, view


def methods(as_json: options.Json = False, quiet: options.Quiet = False, verbose: options.Verbose = False) -> None:
    """List the regularisers and scores, each with its source."""
    view.set_up(quiet=quiet, verbose=verbose)
    from compress.regularize import REGULARIZERS
    from compress.scores import SCORES

    regularizers = {name: _first_line(sys.modules[made.__module__]) for name, made in REGULARIZERS.items()}
    scores = {name: _first_line(score) for name, score in SCORES.items()}
    view.table(
        "regularisers: --method (trains, then ranks by its own score), --regularize (joins another method)",
        ("name", "what it is"),
        [*regularizers.items()],
    )
    view.table("scores: --method (cuts without sparse training), --score", ("name", "what it is"), [*scores.items()])
    if as_json:
        view.document({"regularizers": regularizers, "scores": scores})


def _first_line(documented: object) -> str:
    """Of a score's docstring, or of the file that a regulariser has to itself: what it is, and its source."""
    return (documented.__doc__ or "").strip().partition("\n")[0]
