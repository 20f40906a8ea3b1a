"""Token F1: the words that an answer and its reference have in common, each as often as in both, whatever their order.

As SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250, cited by `normalized_match`): 2 P R / (P + R) of each pair, where P
is the share of the answer's words that are in the reference and R the share of the reference's that are in the answer;
the score is the mean over the pairs. Words are those of the texts normalised as by `normalized_match`.

An empty answer scores 0.
"""

from elm_ecg.training.evaluation.text import PairMetric, word_f1


class TokenF1(PairMetric):
    """F1 of the words of each pair."""

    def _score(self, prediction: str, reference: str) -> float:
        return word_f1(prediction, reference)
