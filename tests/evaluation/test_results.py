import json

import pytest

from elm_ecg.training.evaluation.results import (
    QUESTION_FIELDS,
    Results,
    as_percent,
    main_metric,
    read_predictions,
    read_results,
    title_of,
    verdict,
    with_interval,
)


def saved(folder, **changes) -> Results:
    scores = {"schema_version": 3, "model": "m", "data": {"split": "test", "fingerprint": "f"}, "num_questions": 1}
    row = dict.fromkeys(QUESTION_FIELDS, "?") | {"ecg": "sinus\u2028rhythm"}
    results = Results({**scores, "conditions": {}, "verdict": "v", **changes}, [row])
    results.save(folder)
    return results


def test_what_is_saved_is_read(tmp_path):
    results = saved(tmp_path)
    path = tmp_path / "evaluation_results.json"
    assert read_results(path) == results == json.loads(path.read_text())
    assert read_predictions(path, 1) == results.predictions
    with pytest.raises(ValueError, match=r"holds 1 questions, and evaluation_results\.json is about 2"):
        read_predictions(path, 2)


def test_a_file_of_another_schema(tmp_path):
    """A reader of results would not find in it what it looks for."""
    saved(tmp_path, schema_version=2)
    with pytest.raises(ValueError, match=r"schema_version 2; expected 3\. Write it anew with `elm evaluate`"):
        read_results(tmp_path / "evaluation_results.json")
    saved(tmp_path, data={"split": "test"})
    with pytest.raises(ValueError, match=r"lacks data\.fingerprint; write it anew"):
        read_results(tmp_path / "evaluation_results.json")


def test_results_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        saved(tmp_path, value=float("nan"))


def test_numbers_in_words():
    assert as_percent(0.125) == "12.5"
    assert as_percent(0.5, "+") == "+50.0"
    assert as_percent(None) == "undefined"
    assert with_interval({"value": 0.875, "interval_95": [0.8, 0.95]}) == "87.5 [80.0, 95.0]"
    assert with_interval({"difference": 0.1, "interval_95": [-0.1, 0.3]}, "difference", "+") == "+10.0 [-10.0, 30.0]"
    assert with_interval({"value": 0.5, "interval_95": None}) == "50.0"
    assert with_interval({"value": None, "interval_95": None}) == "undefined"
    assert (title_of("auroc"), title_of("exact_match")) == ("AUROC", "exact match")


def test_main_metric():
    for metrics, metric in ((["exact_match", "auroc"], "auroc"), (["exact_match", "token_f1"], "exact_match")):
        assert main_metric({"conditions": {"ecg": {"metrics": dict.fromkeys(metrics)}}}) == metric


def test_verdict():
    def words(intervals: dict) -> str:
        lost = {name: {"exact_match": {"difference": 0.2, "interval_95": row}} for name, row in intervals.items()}
        metrics = {"exact_match": {"value": 0.75, "interval_95": [0.7, 0.8]}}
        return verdict({"conditions": {"ecg": {"metrics": metrics}}, "ecg_minus": lost})

    assert "Exact match 75.0 [70.0, 80.0]%" in words({"zeroed": [0.1, 0.3]})
    assert "the model looks at the ECG" in words({"zeroed": [0.1, 0.3], "swapped": [0.1, 0.3]})
    line = words({"zeroed": [0.1, 0.3], "swapped": [0.0, 0.3]})
    assert "not shown to be better than with another patient's: the model may not look" in line
    assert "nothing can be said" in words({"zeroed": None})
    assert "nothing can be said of whether it looks" in words({"most_frequent": [0.1, 0.3]})
