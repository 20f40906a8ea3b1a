"""The front page: short, and what it tells a newcomer to type works as printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from documents import TEXTS, blocks

README = TEXTS["README.md"]
LINES = 200  # of a front page that is read


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= LINES


@pytest.mark.slow
@pytest.mark.minutes
def test_every_block_runs_in_order(tmp_path: Path) -> None:
    """In one folder, each block in a process of its own. `uv run` has this environment already, and the tests are running."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "uv").write_text('#!/bin/sh\n[ "$1" = run ] && shift && exec "$@"\n')
    (programs / "pytest").write_text("#!/bin/sh\nexit 0\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HOME": str(tmp_path / "hf_home"), "HF_HUB_OFFLINE": "1"}
    folder = tmp_path / "clone"
    folder.mkdir()
    typed = blocks(README, "bash", "python")
    printed = []
    for language, block in typed:
        command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    assert "looks at the ECG" in printed[0]
    assert (folder / "runs" / "quickstart" / "report.html").is_file()
    answer = "inferior"
    assert answer in printed[2], "the chat does not answer as the README has it"
    assert printed[3].strip() == answer
    assert (folder / "record.svg").is_file()
    assert "III" in printed[2].partition("rests most on")[2], (
        "the answer does not rest on the leads that the picture shows"
    )
    assert (folder / "why.svg").is_file()
    assert list(folder.glob("runs/my_elm/evaluation/*/report.html"))
