import json
from pathlib import Path

import pytest

from elm_ecg.training.evaluation.results import (
    QUESTION_FIELDS,
    Results,
    move_old_results,
    read_predictions,
    read_results,
    results_in,
    results_of,
)
from helpers import RESULTS


def saved(folder: Path, **changes) -> Results:
    row = dict.fromkeys(QUESTION_FIELDS, "?") | {"ecg": "sinus\u2028rhythm"}
    results = Results({**RESULTS, "num_questions": 1, **changes}, [row])
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder)
    return results


def test_what_is_saved_is_read(tmp_path):
    results = saved(tmp_path)
    path = tmp_path / "evaluation_results.json"
    assert read_results(path) == results == json.loads(path.read_text())
    assert read_predictions(path, results) == results.predictions
    with pytest.raises(ValueError, match=r"holds 1 questions, and evaluation_results\.json is about 2"):
        read_predictions(path, results | {"num_questions": 2})


def test_predictions_of_another_run_are_not_taken_for_those_of_the_results(tmp_path):
    """As a process leaves them that ends between the two files, or an editor."""
    results = saved(tmp_path)
    path = tmp_path / "predictions.jsonl"
    path.write_text(path.read_text().replace("sinus", "fast"))
    with pytest.raises(ValueError, match=r"predictions\.jsonl is not what evaluation_results\.json is about"):
        read_predictions(tmp_path / "evaluation_results.json", results)


def test_a_file_of_another_schema(tmp_path):
    """A reader of results would not find in it what it looks for."""
    saved(tmp_path, schema_version=3)
    with pytest.raises(ValueError, match=r"schema_version 3, of another version .* expected 4\. Write it anew with"):
        read_results(tmp_path / "evaluation_results.json")
    saved(tmp_path, data={"split": "test"})
    with pytest.raises(ValueError, match=r"lacks data\.fingerprint; write it anew"):
        read_results(tmp_path / "evaluation_results.json")


def test_results_hold_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        saved(tmp_path, value=float("nan"))


def test_results_of_the_weights_that_are_there(tmp_path):
    saved(tmp_path, model_revision="sha256:old")
    saved(tmp_path / "evaluation" / "b", model_revision="sha256:new")
    saved(tmp_path / "evaluation" / "a", model_revision="sha256:new", verdict="a")
    names = ["evaluation/a", "evaluation/b"]
    assert [str(path.parent.relative_to(tmp_path)) for path in results_in(tmp_path)] == [".", *names]
    found = results_of(tmp_path, "sha256:new")
    assert [str(path.parent.relative_to(tmp_path)) for path, _ in found] == names
    assert found[0][1]["verdict"] == "a"
    (tmp_path / "evaluation_results.json").write_text('{"schema_version": 3, "model_revision": "sha256:weights"}')
    assert results_of(tmp_path, "sha256:new") == found  # one of another version is of other weights


def test_old_results_move_aside_and_nothing_is_lost(tmp_path, capsys):
    """Each time into a folder of their own; what is not of an evaluation stays."""
    assert move_old_results(tmp_path) is None
    (tmp_path / "model.safetensors").write_text("weights")
    for number in ("1", "2"):
        saved(tmp_path, verdict=number)
        saved(tmp_path / "evaluation" / "a", verdict=number)
        saved(tmp_path / "fold1" / "seed0", verdict=number)
        (tmp_path / "report.html").write_text(number)
        (tmp_path / "predictions.partial.0.jsonl").write_text(number)
        assert move_old_results(tmp_path) == tmp_path / "old_results" / number
        assert f"they are now in {tmp_path / 'old_results' / number}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "old_results"}
    for number in ("1", "2"):
        place = tmp_path / "old_results" / number
        for folder in (place, place / "evaluation" / "a", place / "fold1" / "seed0"):
            results = read_results(folder / "evaluation_results.json")
            assert results["verdict"] == number
            assert read_predictions(folder / "evaluation_results.json", results)
        assert (place / "report.html").read_text() == (place / "predictions.partial.0.jsonl").read_text() == number


def test_results_of_the_same_weights_and_interrupted_evaluations_stay(tmp_path):
    saved(tmp_path / "evaluation" / "old", model_revision="sha256:old")
    saved(tmp_path / "evaluation" / "new", model_revision="sha256:new")
    (tmp_path / "evaluation" / "begun").mkdir()
    (tmp_path / "evaluation" / "begun" / "predictions.partial.0.jsonl").write_text("key\n")
    (tmp_path / "evaluation" / "damaged").mkdir()
    (tmp_path / "evaluation" / "damaged" / "evaluation_results.json").write_text("{")
    place = move_old_results(tmp_path, keep="sha256:new")
    assert {path.name for path in (tmp_path / "evaluation").iterdir()} == {"new", "begun"}
    assert place is not None
    assert {path.name for path in (place / "evaluation").iterdir()} == {"old", "damaged"}
    assert move_old_results(tmp_path, keep="sha256:new") is None
