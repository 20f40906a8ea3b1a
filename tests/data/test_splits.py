from typing import Any

import pytest

from elm_ecg.training.data import splits
from elm_ecg.training.data.questions import QuestionRow


def question_of(record: str, patient: str | None = None, split: str | None = None) -> QuestionRow:
    return QuestionRow((record,), [], split, (patient,))


def split(*questions: QuestionRow, by: str = "patient", metadata: Any = None, shares: Any = (0.8, 0.1, 0.1)) -> Any:
    return splits.split_questions(list(questions), by, metadata or {}, shares, 0)


def test_by_patient():
    questions = [question_of(f"{patient}-{number}", str(patient)) for patient in range(50) for number in range(3)]
    parts, left_out = split(*questions)
    patients = {split: {question.patients for question in part} for split, part in parts.items()}
    assert {split: len(found) for split, found in patients.items()} == {"train": 40, "validation": 5, "test": 5}
    assert len(set.union(*patients.values())) == 50
    assert sum(map(len, parts.values())) == 150
    assert left_out == 0
    again, _ = splits.split_questions(questions, "patient", {}, (0.8, 0.1, 0.1), 1)
    assert again != parts


def test_by_fold():
    metadata = {str(fold): {"strat_fold": fold} for fold in range(1, 11)}
    parts, _ = split(*(question_of(str(fold)) for fold in range(1, 11)), by="fold", metadata=metadata)
    assert [[q.records[0] for q in part] for part in parts.values()] == [list("12345678"), ["9"], ["10"]]


def test_records_of_different_splits():
    metadata = {"a": {"strat_fold": 1}, "b": {"strat_fold": 2.0}, "c": {"strat_fold": 10}}
    pairs = [QuestionRow(pair, [], patients=(None, None)) for pair in (("a", "b"), ("a", "c"), ("c", "b"))]
    parts, left_out = split(*pairs, by="fold", metadata=metadata)
    assert parts == {"train": pairs[:1]}
    assert left_out == 2


def test_default():
    fold, given = {"a": {"strat_fold": 1}}, question_of("a", split="test")
    assert splits.default_split([given], fold) == "given"
    assert splits.default_split([given, question_of("a")], fold) == "fold"
    assert splits.default_split([given, question_of("b")], fold) == "patient"


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        (
            [("a", "p", "train"), ("b", "p", "test"), ("c", "q", "test")],
            {"by": "given"},
            r"1 of 2 .* patient p \(test, train\)",
        ),
        ([("a", None, "train"), ("a", None, "test")], {"by": "given"}, r"record a \(test, train\).*choose --split_by"),
        ([("a", "p", None)], {"by": "given"}, "about the record a has no split"),
        ([("a", "p", None)], {"by": "fold"}, "record a has strat_fold None"),
        ([("a", "p", None)], {"by": "fold", "metadata": {"a": {"strat_fold": 11}}}, "record a has strat_fold 11"),
        (
            [("a", "p", None), ("b", "p", None), ("c", None, None)],
            {"by": "fold", "metadata": {"a": {"strat_fold": 1}, "b": {"strat_fold": 9}, "c": {"strat_fold": 10}}},
            r"1 of 1 are in several splits by the folds: patient p \(train, validation\).*correct the folds",
        ),
        ([("a", None, None), ("b", "p", None)], {}, "patient of 1 of 2 records is unknown, such as a"),
        ([("a", "p", None)], {"shares": (0.8, 0.1, 0.2)}, "--shares is 0.8 0.1 0.2"),
    ],
)
def test_at_fault(questions, options, message):
    with pytest.raises(ValueError, match=message):
        split(*(question_of(*question) for question in questions), **options)


def test_two_patients_of_a_record():
    with pytest.raises(ValueError, match="record a is of the patients 1 and 2"):
        splits.with_patients([question_of("a", "2")], {"a": {"patient_id": "1.0"}})
