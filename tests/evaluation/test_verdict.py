from typing import Any

import pytest

from elm_ecg.training.evaluation.questions import Question
from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.evaluation.verdict import gives_one_answer, verdict

SHARE = MetricScale(title="exact match")


def results_of(
    intervals: dict[str, Any], metric: str = "exact_match", scale: MetricScale = SHARE, **changes: Any
) -> dict:
    """One metric, the differences to each condition with these intervals."""
    lost = {
        name: {metric: {"difference": None if row is None else sum(row) / 2, "interval_95": row}}
        for name, row in intervals.items()
    }
    ecg = {
        "one_answer": changes.pop("one_answer", False),
        "metrics": {metric: {"value": 0.75, "interval_95": [0.7, 0.8]}},
    }
    facts = {"main_metric": metric, "metrics": {metric: scale.to_dict()}, "num_patients": 20}
    return {**facts, "conditions": {"ecg": ecg}, "ecg_minus": lost, **changes}


def test_it_says_on_which_comparisons_it_rests():
    better = {"zeroed": [0.1, 0.3], "swapped": [0.1, 0.3]}
    assert verdict(results_of(better)) == (
        "Exact match 75.0 [70.0, 80.0]% (+20.0 [10.0, 30.0] over the ECG zeroed, +20.0 [10.0, 30.0] over another patient's), better than "
        "with the ECG zeroed and another patient's: by exact match, the model looks at the ECG."
    )
    assert verdict(results_of({"zeroed": [0.1, 0.3]})).endswith(
        "better than with the ECG zeroed: by exact match, the model looks at the ECG; with another patient's it was not compared."
    )
    line = verdict(results_of({"zeroed": [0.1, 0.3], "swapped": [0.0, 0.3], "noise": [-0.1, 0.1]}))
    assert (
        "not shown to be better than with another patient's or noise in its place: by exact match, the model may not"
        in line
    )


def test_where_nothing_can_be_said_it_says_why():
    assert "as there is nothing to compare with" in verdict(results_of({}))
    assert "it was asked with its ECG alone" in verdict(results_of({"most_frequent": [0.1, 0.3]}))
    few = verdict(results_of({"zeroed": None}, num_patients=1))
    assert "no interval: the questions are about 1 patient, and fewer than 10 are too few." in few
    assert "the score is undefined in too many of the resamples" in verdict(results_of({"zeroed": None}))


def test_one_answer_to_all_decides_nothing():
    """Exact match 50.9 in every condition, of a model whose AUROC is 0.775 with and 0.444 with another's ECG."""
    same = {"zeroed": [0.0, 0.0], "swapped": [0.0, 0.0]}
    line = verdict(results_of(same, one_answer=True))
    assert "may not look" not in line
    assert "gives one answer to each question, whatever the ECG, so its exact match cannot tell" in line
    assert "`score likelihood`" in line
    both = results_of(same, one_answer=True)
    both["conditions"]["ecg"]["metrics"]["auroc"] = {"value": 0.775, "interval_95": [0.7, 0.85]}
    assert "`main_metric auroc`" in verdict(both)
    by_auroc = results_of({"swapped": [0.2, 0.45]}, "auroc", MetricScale(title="AUROC"), one_answer=True)
    assert verdict(by_auroc).endswith("better than with another patient's: by AUROC, the model looks at the ECG.")


def test_of_an_error_lower_is_better():
    scale = MetricScale(title="error of the rate", unit="bpm", high=None, higher_is_better=False)
    line = verdict(results_of({"swapped": [-30.0, -10.0]}, "rate_error", scale))
    assert line.startswith(
        "Error of the rate 0.8 [0.7, 0.8] bpm (-20.0 [-30.0, -10.0] over another patient's), better than"
    )
    assert "may not look" in verdict(results_of({"swapped": [10.0, 30.0]}, "rate_error", scale))


def asked(*pairs: tuple[str, str]) -> list[Question]:
    return [Question(row, 1, words, answer, "type", f"p{row}", words) for row, (words, answer) in enumerate(pairs)]


@pytest.mark.parametrize(
    ("questions", "texts", "one"),
    [
        (asked(("fast?", "yes"), ("fast?", "no"), ("rate?", "60"), ("rate?", "80")), ["no", "no ", "60", "60"], True),
        (asked(("fast?", "yes"), ("fast?", "no"), ("rate?", "60"), ("rate?", "80")), ["no", "no", "60", "80"], False),
        (
            asked(("fast?", "yes"), ("fast?", "yes"), ("rate?", "60"), ("rate?", "80")),
            ["yes", "yes", "60", "80"],
            False,
        ),
        (asked(("a?", "yes"), ("b?", "no"), ("c?", "no")), ["no", "no", "no"], True),  # each asked once
        (asked(("a?", "yes"), ("b?", "no"), ("c?", "no")), ["no", "yes", "no"], False),
        (asked(("a?", "yes"), ("a?", "yes")), ["yes", "yes"], False),  # there is but one right answer
    ],
)
def test_gives_one_answer(questions, texts, one):
    assert gives_one_answer(questions, texts) is one
