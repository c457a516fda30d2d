"""A Python file of the user's, run as a module of its own; only ever one that the user has named."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def run_file(path: Path) -> ModuleType:
    """The module; FileNotFoundError without such a file, else whatever its code raises."""
    unique = f"compress_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    specification = importlib.util.spec_from_file_location(unique, path)
    assert specification is not None and specification.loader is not None, path
    module = importlib.util.module_from_spec(specification)
    sys.modules[unique] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
