"""Normalised exact match: the share of answers that are the reference but for case, punctuation, articles and spaces.

Texts are normalised as by SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250), its rules carried over to Unicode: NFKC,
case folding, punctuation (Unicode's category P) and the words "a", "an" and "the" taken out, white space made one.
Where an answer would lose its meaning or all of its words, the rules give way:
    a point or comma within a number, a minus before one, and signs such as < and > stay: 1.2 mV is not 12 mV;
    an article stays where there is no other word, and punctuation where there is nothing else: "A" may be a choice.

An empty answer is wrong.
"""

from elm_ecg.training.evaluation.text import PairMetric, normalized_words

CITATION = """
@inproceedings{rajpurkar2016squad,
  title={{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author={Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle={Proceedings of EMNLP},
  year={2016}
}
"""


class NormalizedMatch(PairMetric):
    """1 where the normalised answer is right, else 0."""

    def _score(self, prediction: str, reference: str) -> float:
        return normalized_words(prediction) == normalized_words(reference)
