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


def scored_answer(text: str, reference: str) -> str:
    """What scores of a text that reasons, against a reference that may reason too; the reference itself scores as itself.

    Returns:
        What `answer_of` finds. Without such tags nothing, where the reference has them or the text is still thinking when it ends, and
        else what follows the thinking.
    """
    answer = answer_of(text)
    if answer is not None:
        return answer
    if answer_of(reference) is not None or ("<think>" in text and "</think>" not in text):
        return ""
    return text.rpartition("</think>")[2].strip()


__all__ = ["TAGS", "THINK_OPEN", "answer_of", "scored_answer"]
