"""Normalised exact match: the share of answers that are the reference but for case, punctuation, articles and spaces.

Texts are normalised as by SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), its rules carried over to Unicode: NFKC,
case folding, punctuation (Unicode's category P) and the words "a", "an" and "the" taken out, white space made one.
Where an answer would lose its meaning or all of its words, the rules give way:
    a point or comma within a number, a minus before one, and signs such as < and > stay: 1.2 mV is not 12 mV;
    an article stays where there is no other word, and punctuation where there is nothing else: "A" may be a choice.

An empty answer is wrong.
"""

import re
import unicodedata
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
    normalized_match: the mean over the pairs.
    samples: [n], 1 where the answer is right, else 0.
"""
ARTICLES = {"a", "an", "the"}
OUTSIDE_NUMBERS = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|(?<=\S)-|-(?!\d)")


# the same as in token_f1: a module of evaluate is one file
def normalized_words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    bare = "".join(char for char in folded if char in ".,-" or not unicodedata.category(char).startswith("P"))
    words = OUTSIDE_NUMBERS.sub("", bare).split()
    return [word for word in words if word not in ARTICLES] or words or folded.split()


class NormalizedMatch(evaluate.Metric):
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
        pairs = zip(predictions, references, strict=True)
        samples = [float(normalized_words(given) == normalized_words(right)) for given, right in pairs]
        return {"normalized_match": sum(samples) / len(samples), "samples": samples}
