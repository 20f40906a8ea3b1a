"""Exact match: the share of answers that are the reference, character by character, but for white space at either end.

An empty answer is wrong.
"""

from typing import Any

import datasets
import evaluate

INPUTS = """
Args:
    predictions: [n] answers.
    references: [n] right answers, none of them empty.

Returns:
    exact_match: the mean over the pairs.
    samples: [n], 1 where the answer is right, else 0.
"""


class ExactMatch(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        for index, reference in enumerate(references):
            if not reference.strip():
                raise ValueError(f"The reference of pair {index}, counted from 0, is empty; leave that pair out.")
        samples = [float(given.strip() == right.strip()) for given, right in zip(predictions, references, strict=True)]
        return {"exact_match": sum(samples) / len(samples), "samples": samples}
