"""What the command lines of all verbs share; the standard library alone, as it travels into Spaces."""

from pathlib import Path


def read_system_prompt(text: str | None) -> str | None:
    """The text of `--system_prompt`, which may name a file that holds it.

    Raises:
        ValueError: the file is no text.
    """
    if text is None or not Path(text).is_file():
        return text
    return Path(text).read_text(encoding="utf-8").strip()
