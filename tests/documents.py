"""What the documentation is made of: its pages, and their blocks of code."""

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from forks import ROOT

_spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
assert _spec is not None
assert _spec.loader is not None
hooks = importlib.util.module_from_spec(_spec)  # writes pages of the site
_spec.loader.exec_module(hooks)

# what people read: the pages of the site, and what stands at the root
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """The language and content of each block of code in one of these languages, in order."""
    # in one pass, as the end of a block looks like the beginning of one without a language
    found = re.findall(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(block)) for _, language, block in found if language in languages]


def block(page: str, beginning: str) -> str:
    """The one block of a page that begins so."""
    (found,) = (block for _, block in blocks(TEXTS[page], "bash", "python", "text") if block.startswith(beginning))
    return found


def run_blocks(text: str, folder: Path) -> list[str]:
    """What each block of Bash and Python prints, in order, in one folder, each in a process of its own.

    `uv run` has this environment already, and `uv pip` what it would install; the tests are running.
    """
    programs = folder / "programs"
    programs.mkdir()
    (programs / "uv").write_text('#!/bin/sh\n[ "$1" = pip ] && exit 0\n[ "$1" = run ] && shift && exec "$@"\n')
    (programs / "pytest").write_text("#!/bin/sh\nexit 0\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"}
    printed = []
    for language, block in blocks(text, "bash", "python"):
        command = ["bash", "-euo", "pipefail", "-c", block] if language == "bash" else [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
        printed.append(done.stdout)
    return printed
