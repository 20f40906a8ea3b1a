"""Set F1: the statements that an answer and its reference have in common, for answers such as "hypertrophy; st change".

A text is the set of its statements, parted by semicolons, but for case, white space and a point at the end; "none" is a
statement as any other. 2 P R / (P + R) of each pair, where P is the share of the answer's statements that are right and
R the share of the right ones that are given; the score is the mean over the pairs.

An answer without a statement scores 0.
"""

from typing import Any

from elm_ecg.training.evaluation.text import TextMetric, folded, trimmed

INPUTS = """
Args:
    predictions: [n] answers.
    references: [n] right answers, each with a statement.

Returns:
    set_f1: the mean over the pairs.
    precision, recall: their means.
    samples: [n], the F1 of each pair.
    pairs: [n], of each its precision, recall, f1, and the statements missed and extra, sorted.
"""


def statements(text: str) -> set[str]:
    """What stands between the semicolons of a text."""
    return {trimmed(part) for part in folded(text).split(";")} - {""}


def compare(prediction: str, reference: str) -> dict[str, Any]:
    """One of the `pairs`, as `INPUTS` has it."""
    answered, right = statements(prediction), statements(reference)
    hits = len(answered & right)
    return {
        "precision": hits / len(answered) if answered else 0.0,
        "recall": hits / len(right),
        "f1": 2 * hits / (len(answered) + len(right)),  # 2 P R / (P + R), but never 0 / 0
        "missed": sorted(right - answered),
        "extra": sorted(answered - right),
    }


class SetF1(TextMetric):
    """F1 of the statements of each pair."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        for index, reference in enumerate(references):
            if not statements(reference):
                raise ValueError(
                    f"The reference of pair {index}, counted from 0, is {reference!r}, which has no statement; "
                    "leave that pair out."
                )
        pairs = [compare(*pair) for pair in zip(predictions, references, strict=True)]
        precision, recall, f1 = (
            sum(pair[name] for pair in pairs) / len(pairs) for name in ("precision", "recall", "f1")
        )
        samples = [pair["f1"] for pair in pairs]
        return {"set_f1": f1, "precision": precision, "recall": recall, "samples": samples, "pairs": pairs}
