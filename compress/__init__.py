"""From a pretrained network to a smaller ONNX file that is proved equal and measured faster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress import regularize as regularize
    from compress.bench import benchmark as benchmark
    from compress.checkpoint import load as load
    from compress.cost import measure as measure
    from compress.export import to_onnx as to_onnx
    from compress.folding import fold as fold
    from compress.groups import Group as Group
    from compress.groups import Slice as Slice
    from compress.groups import trace as trace
    from compress.pipeline import run as run
    from compress.plan import Plan as Plan
    from compress.plan import apply as apply
    from compress.plan import select as select
    from compress.prices import price as price
    from compress.scores import SCORES as SCORES
    from compress.sensitivities import sensitivity as sensitivity
    from compress.shrinking import shrink as shrink
    from compress.sparse import thin as thin

__version__ = "0.1.0"

# public name -> where it lives; each is imported on first use, so that `import compress` costs nothing
_PLACES = {
    "Group": "compress.groups:Group",
    "Plan": "compress.plan:Plan",
    "SCORES": "compress.scores:SCORES",
    "Slice": "compress.groups:Slice",
    "apply": "compress.plan:apply",
    "benchmark": "compress.bench:benchmark",
    "fold": "compress.folding:fold",
    "load": "compress.checkpoint:load",
    "measure": "compress.cost:measure",
    "price": "compress.prices:price",
    "regularize": "compress.regularize:",
    "run": "compress.pipeline:run",
    "select": "compress.plan:select",
    "sensitivity": "compress.sensitivities:sensitivity",
    "shrink": "compress.shrinking:shrink",
    "thin": "compress.sparse:thin",
    "to_onnx": "compress.export:to_onnx",
    "trace": "compress.groups:trace",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    path, _, attribute = _PLACES[name].partition(":")
    module = import_module(path)
    return getattr(module, attribute) if attribute else module


def __dir__() -> list[str]:
    return sorted([*_PLACES, "__version__"])
