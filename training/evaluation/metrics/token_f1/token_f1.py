"""Token F1: the words that an answer and its reference have in common, each as often as in both, whatever their order.

As SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250): 2 P R / (P + R) of each pair, where P is the share of the answer's
words that are in the reference and R the share of the reference's that are in the answer; the score is the mean over
the pairs. Words are those of the texts normalised as by `normalized_match`.

An empty answer scores 0.
"""

import re
import unicodedata
from collections import Counter
from typing import Any

import datasets
import evaluate

CITATION = """
@inproceedings{rajpurkar2016squad,
  title={{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP},
  year={2016}
}
"""
INPUTS = """
Args:
    predictions: [n] answers.
    references: [n] right answers, none of them empty.

Returns:
    token_f1: the mean over the pairs.
    samples: [n], the F1 of each pair.
"""
ARTICLES = {"a", "an", "the"}
OUTSIDE_NUMBERS = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|(?<=\S)-|-(?!\d)")


# the same as in normalized_match, which says why: a module of evaluate is one file
def normalized_words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(char for char in folded if char in ".,-" or not unicodedata.category(char).startswith("P"))
    words = OUTSIDE_NUMBERS.sub("", bare).split()
    return [word for word in words if word not in ARTICLES] or words or folded.split()


def token_f1(prediction: str, reference: str) -> float:
    given, right = Counter(normalized_words(prediction)), Counter(normalized_words(reference))
    return 2 * (given & right).total() / (given.total() + right.total())


class TokenF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        for index, reference in enumerate(references):
            if not reference.strip():
                raise ValueError(f"The reference of pair {index}, counted from 0, is empty; leave that pair out.")
        samples = [token_f1(*pair) for pair in zip(predictions, references, strict=True)]
        return {"token_f1": sum(samples) / len(samples), "samples": samples}
