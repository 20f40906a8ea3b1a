"""What the documentation is made of: its pages, and their blocks of code."""

import importlib.util
import re
import textwrap

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
