"""What a reader may rely on in every source file: its size, a docstring where others use it, and imports that run one way."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from helpers import ROOT

SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "training").rglob("*.py")])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 600, 80
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def public_definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Classes, functions and methods that others may use, by their dotted names."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= MAX_FILE_LINES
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert not long, f"{long}: cut these functions into parts with names"
    assert not text.strip() or ast.get_docstring(tree), "say in one line what the module is for"
    silent = [name for name, node in public_definitions(tree.body) if not ast.get_docstring(node)]
    assert not silent, f"{silent}: say what these do, with shapes, units and errors"


def imports(path: Path) -> Iterator[str]:
    """The modules of this package that a file imports, at its head or late, by their dotted names below `elm_ecg`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            base = node.module.removeprefix("elm_ecg.").removeprefix("elm_ecg")
            if node.level or base != node.module:
                modules = {base, *(f"{base}.{alias.name}" for alias in node.names)}
                yield from (name for name in modules if (ROOT / f"{name.replace('.', '/')}.py").is_file())


def test_imports_run_one_way() -> None:
    """No circle of modules, none of rooms (`training/data`, ...), and no arrow from a model's code to `training`."""
    modules: dict[str, set[str]] = {}
    rooms: dict[str, set[str]] = {}
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if name == "__init__":  # the API, which imports from everywhere
            continue
        modules[name] = set(imports(path))
        assert name.startswith("training") or not any(module.startswith("training") for module in modules[name]), name
        room = name.split(".")[1] if name.count(".") > 1 else ""
        targets = {module.split(".")[1] for module in modules[name] if module.count(".") > 1}
        if room:
            rooms.setdefault(room, set()).update(targets - {room})
    assert rooms["sharing"] >= {"data", "evaluation"}  # arrows are found
    for graph in (modules, rooms):
        TopologicalSorter(graph).prepare()  # CycleError names the circle
