"""ROUGE-L: F1 of the longest run of words, gaps allowed, that an answer and its reference have in common (Lin 2004).

2 P R / (P + R) of each pair, where P and R are the length of that run over the words of the answer and of the
reference; the score is the mean over the pairs. By `rouge_score` with Porter's stems; its words are of a-z and 0-9
alone, here of the letters and digits of every alphabet, which for plain English is the same.

An empty answer, or one without a word, scores 0.
"""

import re
import unicodedata

from nltk.stem import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from elm_ecg.training.evaluation.text import PairMetric

CITATION = """
@inproceedings{lin2004rouge,
  title={{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out},
  year={2004}
}
"""


class StemTokenizer(Tokenizer):
    """The stems of the words of a text, in every alphabet."""

    def __init__(self) -> None:
        self.stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """Words of more than three letters as their stems, as `rouge_score` has it."""
        words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())  # `\w` without underscore
        return [self.stemmer.stem(word) if len(word) > 3 else word for word in words]


class RougeL(PairMetric):
    """F1 of the longest common run of each pair."""

    scorer = RougeScorer(["rougeL"], tokenizer=StemTokenizer())

    def _score(self, prediction: str, reference: str) -> float:
        return self.scorer.score(reference, prediction)["rougeL"].fmeasure  # target first
