"""What a reader may rely on in every source file: its size, and a docstring where others use it."""

import ast
from collections.abc import Iterator
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
