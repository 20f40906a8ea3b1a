"""What the metrics in `metrics/` share: the form of a module of `evaluate`, and how texts are made comparable."""

import re
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from typing import Any

import datasets
import evaluate

from elm_ecg.training.evaluation.scale import MetricScale

ARGUMENTS = """
Args:
    predictions: [n] answers.
    references: [n] right answers, none of them empty.
"""
PAIR_INPUTS = f"""{ARGUMENTS}
Returns:
    the metric's name: the mean over the pairs.
    samples: [n], the score of each pair.
"""
ARTICLES = {"a", "an", "the"}
OUTSIDE_NUMBERS = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|(?<=\S)-|-(?!\d)")  # 1.2 and -30 stay


# abstract, as `evaluate.load` takes the first class in a module's namespace that is not for its metric
class TextMetric(evaluate.Metric, ABC):
    """A metric of answers and their references. The docstring of its module describes it; the module's `INPUTS` and `CITATION`,
    if it has them, say what it takes and where it is from."""

    scale = MetricScale()  # a share, higher is better

    def _info(self) -> evaluate.MetricInfo:
        module, text = sys.modules[type(self).__module__], datasets.Value("string")
        return evaluate.MetricInfo(
            description=module.__doc__ or "",
            citation=getattr(module, "CITATION", ""),
            inputs_description=getattr(module, "INPUTS", PAIR_INPUTS),
            features=datasets.Features({"predictions": text, "references": text}),
        )

    @abstractmethod
    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        """The score by its name, and `samples`, a number or a row of numbers for each pair."""


class PairMetric(TextMetric):
    """A metric that is the mean of the scores of each answer and its reference."""

    @abstractmethod
    def _score(self, prediction: str, reference: str) -> float:
        """The score of one pair, on the `scale` of the metric."""

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        require_references(references)
        samples = [float(self._score(*pair)) for pair in zip(predictions, references, strict=True)]
        return {self.name: sum(samples) / len(samples), "samples": samples}


def require_references(references: list[str]) -> None:
    """
    Raises:
        ValueError: a reference is empty, so that nothing could be right.
    """
    for index, reference in enumerate(references):
        if not reference.strip():
            raise ValueError(f"The reference of pair {index}, counted from 0, is empty; leave that pair out.")


def folded(text: str) -> str:
    """A text without differences of case and of Unicode's ways to write the same character."""
    return unicodedata.normalize("NFKC", text).casefold()  # NFKC: ligatures and full-width letters become plain ones


def trimmed(text: str) -> str:
    """A text with single spaces, and without points and spaces at its end."""
    return " ".join(text.split()).rstrip(" .")


def closed_label(text: str) -> str:
    """A label of a closed question, or an answer, as they are compared: unlike `normalized_words`, with articles and punctuation."""
    return trimmed(folded(text))


def normalized_words(text: str) -> list[str]:
    """The words of a text, normalised as `normalized_match` says."""
    bare = "".join(c for c in folded(text) if c in ".,-" or not unicodedata.category(c).startswith("P"))
    words = OUTSIDE_NUMBERS.sub("", bare).split()
    # an answer "A" may be a choice, and "?" is not "!"
    return [word for word in words if word not in ARTICLES] or words or folded(text).split()


def word_f1(answer: str, right: str) -> float:
    """F1 of the words that two texts have in common, each as often as in both; see `token_f1`."""
    given, wanted = Counter(normalized_words(answer)), Counter(normalized_words(right))
    shared = (given & wanted).total()
    return 2 * shared / (given.total() + wanted.total()) if shared else 0.0
