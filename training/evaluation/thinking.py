"""Answers that reason first: `<think>...</think>`, then `<answer>...</answer>`."""

import re

from elm_ecg.chat_template_elm import THINK_OPEN

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)  # no tag opens inside


def answer_of(text: str) -> str | None:
    """The answer that a text gives: what stands in its last `<answer>...</answer>`, without the white space around it.

    Returns:
        None where no such pair of tags stands in the text, as in one that was cut off while it reasons.
    """
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


__all__ = ["TAGS", "THINK_OPEN", "answer_of"]
