"""Accuracy of closed questions, whose answer is one of a few labels, with the figures of each class.

An answer is a label but for case, white space and a point at the end. One that is none, as an empty one, is wrong: in
the confusion matrix it is in a column of its own, OTHER, and it lowers the recall of the right class and no precision.
What the answers do not say is None: the recall of a class that no reference has, the precision of one that no answer
has.
"""

from collections import Counter
from typing import Any

from elm_ecg.training.evaluation.text import TextMetric, closed_label

INPUTS = """
Args:
    predictions: [n] answers.
    references: [n] right answers, each one of the labels.
    labels: the classes, in their order. None: those of the references, sorted.

Returns:
    closed_set: accuracy, the share of right answers.
    balanced_accuracy: mean recall over the classes that occur in the references.
    macro_f1: mean F1 over the classes that occur in the references or the answers.
    labels: the classes.
    per_class: of each class its precision, recall, f1, and support, the number of references.
    confusion_matrix: [classes][classes + 1] counts; rows are references, columns answers, the last of them OTHER.
    samples: [n] pairs of the right label and the label given, or OTHER.

Raises:
    ValueError: a reference is empty or none of the labels, or two labels differ in nothing that counts.
"""
OTHER = "(other)"


def ratio(part: float, whole: float) -> float | None:
    """A share; None of nothing."""
    return part / whole if whole else None


def mean(values: list[float | None]) -> float:
    """Of the values that are defined."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined)


class ClosedSet(TextMetric):
    """Accuracy, and the figures of each class."""

    def _compute(
        self, predictions: list[str], references: list[str], labels: list[str] | None = None
    ) -> dict[str, Any]:
        if labels is None:
            labels = sorted({closed_label(reference) for reference in references} - {""})
        label_of = {closed_label(label): label for label in labels}
        if len(label_of) < len(labels):
            raise ValueError(f"Of the labels {labels}, two differ in nothing but case or white space; give each once.")
        for index, reference in enumerate(references):
            if closed_label(reference) not in label_of:
                raise ValueError(
                    f"The reference of pair {index}, counted from 0, is {reference!r}; expected one of {labels}. "
                    "Name its label too, or leave that pair out."
                )
        samples = [
            [label_of[closed_label(right)], label_of.get(closed_label(answer), OTHER)]
            for answer, right in zip(predictions, references, strict=True)
        ]
        pairs = Counter(map(tuple, samples))
        occurs, answered = (Counter(column) for column in zip(*samples, strict=True))
        per_class = {
            label: {
                "precision": ratio(pairs[label, label], answered[label]),
                "recall": ratio(pairs[label, label], occurs[label]),
                "f1": ratio(2 * pairs[label, label], answered[label] + occurs[label]),  # 2 TP / (2 TP + FP + FN)
                "support": occurs[label],
            }
            for label in labels
        }
        return {
            "closed_set": sum(pairs[label, label] for label in labels) / len(samples),
            "balanced_accuracy": mean([row["recall"] for row in per_class.values()]),
            "macro_f1": mean([row["f1"] for row in per_class.values()]),
            "labels": labels,
            "per_class": per_class,
            "confusion_matrix": [[pairs[right, answer] for answer in [*labels, OTHER]] for right in labels],
            "samples": samples,
        }
