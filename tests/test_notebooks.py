"""The notebooks: what they use is there, they run from top to bottom, and the site shows what came of it."""

import ast
import csv
import importlib
import inspect
import json
import shutil
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from documents import hooks
from public_sets import save_table, save_wfdb

MINUTES = 5
notebooks = pytest.mark.parametrize("path", hooks.NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_two() -> None:
    assert [path.stem for path in hooks.NOTEBOOKS] == ["ptbxl_to_report", "quickstart"]


@notebooks
def test_what_they_use_is_there(path: Path) -> None:
    """Modules, names, and arguments of what is called by an imported name."""
    imported: dict[str, Any] = {}
    calls = []
    for cell in code_of(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                imported |= {alias.name: getattr(module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                calls.append((node.func.id, node))
    assert "new_elm" in imported
    for name, call in calls:
        if name in imported:
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(imported[name]).bind(*call.args, **keywords)


@notebooks
def test_the_site_shows_them(path: Path) -> None:
    """Run in order, without errors and warnings, with pictures that do not weigh much."""
    cells = code_of(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.get("name") != "stderr" for cell in cells for output in cell.outputs)
    page = hooks.notebook_page(path)
    assert page.startswith("# ")
    assert f"({path.name})" in page
    assert all(f"```python\n{cell.source}\n```" in page for cell in cells)
    assert "![Picture](data:image/png" in page
    assert "![Picture](data:image/svg+xml" in page
    assert "the model looks at the ECG." in " ".join(page.split())
    assert len(page) < 500_000


def save_ptbxl(folder: Path, source: Path) -> None:
    """PTB-XL's own layout with the files of 100 Hz of those records of ../shared whose row of the table is known."""
    raw = np.load(source / "raw100.npz")
    ecgs = dict(zip(raw["ecg_id"].tolist(), raw["ecg"], strict=True))
    rows = []
    with (source / "records.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            number = int(row["ecg_id"])
            if row["scp_codes"] and number in ecgs:
                name = f"records100/{number // 1000:02d}000/{number:05d}_lr"
                save_wfdb(folder / name, ecgs[number] / 1000, 100)
                report, codes = row.pop("report_de"), str(json.loads(row["scp_codes"]))
                rows.append({**row, "report": report, "scp_codes": codes, "filename_lr": name})
    save_table(folder / "ptbxl_database.csv", *rows)
    shutil.copy(source / "scp_statements.csv", folder)


@pytest.mark.slow
@pytest.mark.minutes
@notebooks
def test_runs(path: Path, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_ptbxl(tmp_path / "ptb-xl", shared / "data" / "ptbxl")
    monkeypatch.setenv("PTBXL", str(tmp_path / "ptb-xl"))
    notebook = nbformat.read(path, as_version=4)
    started = time.monotonic()
    NotebookClient(notebook, timeout=60 * MINUTES, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.monotonic() - started < 60 * MINUTES
    printed = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    assert any(", the model looks at the ECG." in text for text in printed)
