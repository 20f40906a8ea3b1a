import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import f1_score, hamming_loss, roc_auc_score
from sklearn.preprocessing import MultiLabelBinarizer

from elm_ecg.training.data.sources import Records
from elm_ecg.training.evaluation.benchmarks.chats import SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.ecgbench import LABELS, ECGBench, is_right, letter_of, task_of
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces
from helpers import write_rows

NOWHERE = RecordPlaces(Records({}), {})


def script(right: list[list[str]], given: list[list[str]]) -> dict[str, float]:
    """The authors' scores of sets of labels, by another library."""
    binarizer = MultiLabelBinarizer().fit(right)
    given = [[label for label in row if label in binarizer.classes_] for row in given]
    truth, said = binarizer.transform(right), binarizer.transform(given)
    return {
        "label_f1": f1_score(truth, said, average="macro", zero_division=0),
        "label_auc": np.mean([roc_auc_score(truth[:, column], said[:, column]) for column in range(truth.shape[1])]),
        "hamming_loss": hamming_loss(truth, said),
    }


@pytest.mark.parametrize("task", LABELS)
def test_scores_are_those_of_an_independent_script(task):
    rng = np.random.default_rng(0)
    labels = [label for label in LABELS[task] if label not in ("NORM", "ABNORMAL")]
    # names that hold each other, such as ST and STTC, are found in each other's place, as by the authors
    labels = [label for label in labels if not any(label != other and label in other for other in LABELS[task])]
    rare = labels[-1]
    right = [[label for label in labels[:-1] if rng.random() < 0.4] or ["NORM"] for _ in range(60)]
    given = [[label for label in labels if (label in row) != (rng.random() < 0.2)] for row in right]
    turns = [Turn("", ", ".join(row), task, LABELS[task]) for row in right]
    texts = [f"Answer: {'; '.join(row)}." for row in given]
    expected = script(right, given)
    points = ECGBench().points(turns, range(60), texts)["hamming_loss"].sum(axis=0)
    assert points[0] / points[1] == pytest.approx(expected["hamming_loss"])
    figures = ECGBench().figures(turns, texts)
    for name in ("label_f1", "label_auc"):
        for scope in (None, task):
            figure = figures[scope, name, "value"]
            assert figure.statistic(figure.samples.sum(axis=0)) == pytest.approx(expected[name])
    assert any(rare in row for row in given)


def test_reports_of_real_records(shared):
    place = shared / "data" / "ecgbench_pulse"
    chats = list(ECGBench().chats(place, NOWHERE, SuiteOptions()))
    assert len(chats) == 500
    turns = [chat.turns[0] for chat in chats]
    assert {turn.question_type for turn in turns} == {"ptb-test-report"}
    assert turns[0].question == "Please write a clinical report based on this ECG."  # what stood there was "image"
    suite = ECGBench()
    assert suite.points(turns, range(500), [turn.answer for turn in turns])["report_f1"][:, 0].min() == 1
    assert suite.points(turns[:1], [0], ["Sinus rhythm."])["report_f1"][0, 0] == pytest.approx(2 * 2 / (2 + 6))
    assert suite.figures(turns, [""] * 500) == {}


def test_options(tmp_path):
    question = (
        "What is it?\nOptions: Yes, no, not sure. Only answer based on the given Options without any explanation."
    )
    rows = [
        {
            "id": "1",
            "image_path": "00001_hr-0.png",
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "yes"}],
        }
    ]
    (tmp_path / "ecgqa-test.json").write_text(json.dumps(rows))
    rows[0]["conversations"] = [{"from": "human", "value": "A. x B. y"}, {"from": "gpt", "value": "B. y"}]
    (tmp_path / "csn-test-no-cot.json").write_text(json.dumps(rows))
    (tmp_path / "other.json").write_text("[]")
    by_letter, by_text = (chat.turns[0] for chat in ECGBench().chats(tmp_path, NOWHERE, SuiteOptions()))
    assert is_right(by_text, "Yes.")
    assert not is_right(by_text, "Yes or no")
    assert is_right(by_letter, "The correct option is B")
    assert not is_right(by_letter, "A. x")
    scores = ECGBench().points([by_letter, by_text], [0, 1], ["B", "no"])
    assert scores["accuracy"].tolist() == [[1, 1], [0, 1]]
    assert [*scores] == ["accuracy"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [("C", "C"), ("D. sinus rhythm", "D"), ("Answer: F", "F"), ("It is G.", "G"), ("A patient", None), ("", None)],
)
def test_letters(text, letter):
    assert letter_of(text) == letter


def test_files(tmp_path):
    assert (
        task_of(Path("ptb-test-report/test-0.parquet"))
        == task_of(Path("ptb_test_report_500.jsonl"))
        == "ptb-test-report"
    )
    assert task_of(Path("ptb-test.json")) == "ptb-test"
    assert task_of(Path("mmmu-ecg.json")) is None
    write_rows(tmp_path / "a.csv", {"a": 1})
    with pytest.raises(ValueError, match="holds no file of its tasks; expected names with ptb-test-report"):
        list(ECGBench().chats(tmp_path, NOWHERE, SuiteOptions()))
