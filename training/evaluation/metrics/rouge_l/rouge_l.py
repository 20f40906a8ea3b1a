"""ROUGE-L: F1 of the longest run of words, gaps allowed, that an answer and its reference have in common (Lin 2004).

2 P R / (P + R) of each pair, where P and R are the length of that run over the words of the answer and of the
reference; the score is the mean over the pairs. By `rouge_score` with Porter's stems; its words are of a-z and 0-9
alone, here of the letters and digits of every alphabet, which for plain English is the same.

An empty answer, or one without a word, scores 0.
"""

import re
import unicodedata
from typing import Any

import datasets
import evaluate
from nltk.stem import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

CITATION = """
@inproceedings{lin2004rouge,
  title={{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author={Lin, Chin-Yew},
  booktitle={Text Summarization Branches Out},
  year={2004}
}
"""
INPUTS = """
Args:
    predictions: [n] answers.
    references: [n] right answers, none of them empty.

Returns:
    rouge_l: the mean over the pairs.
    samples: [n], the F1 of each pair.
"""


class StemTokenizer(Tokenizer):
    def __init__(self) -> None:
        self.stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
        return [self.stemmer.stem(word) if len(word) > 3 else word for word in words]


class RougeL(evaluate.Metric):
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
        scorer = RougeScorer(["rougeL"], tokenizer=StemTokenizer())
        pairs = zip(predictions, references, strict=True)
        samples = [float(scorer.score(right, given)["rougeL"].fmeasure) for given, right in pairs]
        return {"rouge_l": sum(samples) / len(samples), "samples": samples}
