"""Exact match: the share of answers that are the reference, character by character, but for white space at either end.

An empty answer is wrong.
"""

from elm_ecg.training.evaluation.text import PairMetric


class ExactMatch(PairMetric):
    """1 where the answer is right, else 0."""

    def _score(self, prediction: str, reference: str) -> float:
        return prediction.strip() == reference.strip()
