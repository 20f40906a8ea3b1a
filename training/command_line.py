"""What the command lines of all verbs share; the standard library alone, as it travels into Spaces."""

import argparse
from pathlib import Path


def read_system_prompt(text: str | None) -> str | None:
    """The text of `--system_prompt`, which may name a file that holds it.

    Raises:
        ValueError: the file is no text.
    """
    if text is None or not Path(text).is_file():
        return text
    return Path(text).read_text(encoding="utf-8").strip()


def whole_number(text: str) -> int:
    """A whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: the text is none.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return value
