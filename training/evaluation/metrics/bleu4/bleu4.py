"""BLEU-4 of the corpus (Papineni et al. 2002), smoothed: nltk's `corpus_bleu` with `SmoothingFunction().method1`.

Runs of 1 to 4 words that are in the reference too, summed over the pairs before they are divided; no match of a length
counts as a tenth of one (Chen and Cherry 2014, method 1). Words are what white space parts, as they stand.
As in nltk, an answer of fewer words than a run is long adds one run that is not in the reference: of short answers,
even right ones, BLEU-4 says little. An empty answer matches nothing, and the answers together are shorter.
"""

from collections import Counter
from typing import Any

import numpy as np

from elm_ecg.training.evaluation.text import ARGUMENTS, TextMetric, require_references

CITATION = """
@inproceedings{papineni2002bleu,
  title={{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author={Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle={Proceedings of ACL},
  year={2002}
}
@inproceedings{chen2014smoothing,
  title={A Systematic Comparison of Smoothing Techniques for Sentence-Level {BLEU}},
  author={Chen, Boxing and Cherry, Colin},
  booktitle={Proceedings of WMT},
  year={2014}
}
"""
INPUTS = f"""{ARGUMENTS}
Returns:
    bleu4: the score of the corpus, which is not the mean over the pairs: `statistic` gives it of the samples' sums.
    samples: [n, 10]: matching runs of 1, 2, 3 and 4 words, runs of the answer, and the words of the answer and of the
        reference.
"""
MAX_ORDER = 4
SMOOTHING = 0.1


def counts(prediction: str, reference: str) -> list[float]:
    """The sample of one pair, as `INPUTS` has it."""
    answered, right = prediction.split(), reference.split()
    matches, totals = [], []
    for order in range(1, MAX_ORDER + 1):
        # the runs of `order` words: a word, and those after it
        runs, right_runs = (
            Counter(zip(*(words[i:] for i in range(order)), strict=False)) for words in (answered, right)
        )
        matches.append((runs & right_runs).total())  # clipped: none counts more often than in the reference
        totals.append(max(1, runs.total()))  # as nltk, so that nothing is divided by 0
    return [float(count) for count in (*matches, *totals, len(answered), len(right))]


class BLEU4(TextMetric):
    """BLEU-4 of the corpus."""

    @staticmethod
    def statistic(sums: np.ndarray) -> np.ndarray:
        """The score of sums of the samples, [..., 10] -> [...]."""
        matches, totals = sums[..., :MAX_ORDER], sums[..., MAX_ORDER : 2 * MAX_ORDER]
        length, right_length = sums[..., -2], sums[..., -1]
        precisions = np.where(matches > 0, matches, SMOOTHING) / totals
        brevity = np.exp(np.minimum(0, 1 - right_length / np.maximum(length, 1)))  # 1 for longer answers
        return np.where(matches[..., 0] > 0, brevity * np.exp(np.log(precisions).mean(axis=-1)), 0.0)

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        require_references(references)
        samples = [counts(*pair) for pair in zip(predictions, references, strict=True)]
        return {"bleu4": float(self.statistic(np.sum(samples, axis=0))), "samples": samples}
