"""METEOR: words in common, also by stem or as synonyms, less a penalty for another order (Banerjee and Lavie 2005).

10 P R / (R + 9 P) of each pair, where P and R are the shares of the answer's and of the reference's words that are
matched, times 1 - 0.5 (chunks / matches)^3, where a chunk is a run of matches in the same order; the score is the mean
over the pairs. Words and punctuation are parted by nltk's `wordpunct_tokenize`. A right answer scores
1 - 0.5 / words^3: one word, 0.5.

By nltk, which differs from the paper in two ways: of several alignments it takes the one of the last words, not that of
the fewest chunks; and it looks for synonyms of stems, so it finds none of "large" (larg).
Synonyms are WordNet's, which nltk needs as a file: `python -m nltk.downloader wordnet`. An empty answer scores 0.
"""

from typing import Any

import nltk.corpus
from nltk.tokenize import wordpunct_tokenize
from nltk.translate.meteor_score import single_meteor_score

from elm_ecg.training.evaluation.text import PairMetric

CITATION = """
@inproceedings{banerjee2005meteor,
  title={{METEOR}: An Automatic Metric for {MT} Evaluation with Improved Correlation with Human Judgments},
  author={Banerjee, Satanjeev and Lavie, Alon},
  booktitle={Proceedings of the ACL Workshop on Intrinsic and Extrinsic Evaluation Measures},
  year={2005}
}
"""


class Meteor(PairMetric):
    """METEOR of each pair."""

    def _download_and_prepare(self, dl_manager: Any) -> None:
        """Called by `evaluate.load`.

        Raises:
            FileNotFoundError: nltk has no WordNet.
        """
        try:
            nltk.corpus.wordnet.ensure_loaded()  # loads lazily: would fail only at the first answer
        except LookupError as error:
            raise FileNotFoundError(
                "METEOR needs WordNet, which is in none of nltk's folders "
                f"({', '.join(nltk.data.path)}); get it with `python -m nltk.downloader wordnet`, or leave METEOR out."
            ) from error

    def _score(self, prediction: str, reference: str) -> float:
        words = wordpunct_tokenize(reference), wordpunct_tokenize(prediction)  # nltk wants the reference first
        return single_meteor_score(*words, wordnet=nltk.corpus.wordnet)
