"""The house rules as a test: floors, walls, and the package list."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# module (or package) -> floor; a module imports only from lower floors, or from its own package
FLOORS = {
    "models": 0, "errors": 0, "files": 0, "silence": 0, "user_file": 0, "curves": 0, "unstrided": 0,
    "example": 1, "structure": 1, "foreign": 1, "recipe": 1, "task": 1, "data": 1, "bench": 1, "ranks": 1,
    "groups": 2,
    "cost": 3, "scores": 3, "regularize": 3, "onnx_file": 3,
    "allocation": 4, "folding": 4, "prices": 4, "reach": 4, "sparse": 4, "train": 4, "export": 4, "checkpoint": 4,
    "precision": 4,
    "plan": 5, "sensitivities": 5, "fit": 5, "folder": 5, "report": 5, "inputs": 5, "quantize": 5, "doctor": 5,
    "aim": 6,
    "pipeline": 7, "shrinking": 7,
    "verify": 8, "search": 8,
    "comparison": 9,
    "cli": 10,
}  # fmt: skip
WALLS = {  # foreign package -> the rooms that may import it
    "typer": {"cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "onnx": {"export", "onnx_file", "bench", "verify", "precision", "doctor"},
    "onnxruntime": {"export", "bench", "precision", "doctor"},
    "torch_pruning": {"groups", "scores"},
}


def _sources() -> list[Path]:
    folders = [ROOT / "compress", ROOT / "cli", ROOT / "models"]
    return sorted(
        p
        for f in folders
        for p in f.rglob("*.py")
        if not p.is_relative_to(ROOT / "compress" / "cli") and not p.is_relative_to(ROOT / "compress" / "models")
    )


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "compress" else parts[0]


def _imports(path: Path) -> set[str]:
    """Every dotted name that a file imports, lazily or not; `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", _sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_from_lower_floors(path: Path) -> None:
    room = _room(path)
    if room == "__init__":  # the public page may name every room
        return
    assert room in FLOORS, f"{room} has no floor yet"
    for name in _imports(path):
        parts = name.split(".")
        if parts[0] in ("cli", "models"):
            pytest.fail(f"a bare `import {parts[0]}` would find the user's own package")
        if parts[0] in WALLS:
            assert room in WALLS[parts[0]], f"{parts[0]} is imported in {room}"
        if parts[0] == "compress" and len(parts) > 1 and parts[1] in FLOORS and parts[1] != room:
            assert FLOORS[parts[1]] < FLOORS[room], f"{room} imports {parts[1]} from a floor that is not lower"
    if room == "models":
        assert not any(name.split(".")[0] == "compress" and "models" not in name for name in _imports(path))


def test_nothing_prints_below_the_command_line() -> None:
    for path in _sources():
        if _room(path) != "cli":
            calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
            assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path


def test_every_package_is_listed_for_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    inits = [p.parent.relative_to(ROOT) for p in _sources() if p.name == "__init__.py"]
    found = {".".join(p.parts if p.parts[0] == "compress" else ("compress", *p.parts)) for p in inits}
    assert set(listed) == found


def test_the_links_say_the_same_as_the_package_mapping() -> None:
    for name in ("cli", "models"):
        link = ROOT / "compress" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_the_readme_names_every_method_and_every_file() -> None:
    from compress.regularize import REGULARIZERS
    from compress.scores import SCORES

    text = (ROOT / "README.md").read_text()
    assert [name for name in (*REGULARIZERS, *SCORES) if f"`{name}`" not in text] == []
    tree = text[text.index("## The tree") :]
    assert [str(p) for p in _sources() if p.name not in tree] == []
