from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.training.evaluation.questions import (
    MAX_CANDIDATES,
    Question,
    candidate_answers,
    list_questions,
    most_frequent_answers,
    other_patients,
    rows_to_swap,
    without_thinking,
)


def test_questions_of_several_turns():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rate?"},
        {"role": "assistant", "content": " 80 "},
        {"role": "user", "content": "Rhythm?"},
        {"role": "assistant", "content": "sinus"},
    ]
    rows = [
        {"messages": turns, "patient_id": 0, "question_type": "rate"},
        {"messages": turns[1:3], "patient_id": None, "question_type": None},
        {"messages": turns[2:3], "patient_id": 7, "question_type": "axis"},
    ]
    assert list_questions(Dataset.from_list(rows)) == [
        Question(0, 2, "Rate?", "80", "rate", "0", "Rate?"),
        Question(0, 4, "Rhythm?", "sinus", "rate", "0", "Rhythm?"),
        Question(1, 1, "Rate?", "80", "all", "row 1", "Rate?"),
        Question(2, 0, "", "80", "axis", "7"),
    ]


def test_questions_of_parts_and_without_patients():
    content = [{"type": "ecg", "text": None}, {"type": "text", "text": "Is it?"}]
    answer = [{"type": "text", "text": "yes"}]
    rows = [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}] * 2
    questions = list_questions(Dataset.from_list(rows))
    assert [(q.question, q.answer, q.patient_id) for q in questions] == [
        ("Is it?", "yes", "row 0"),
        ("Is it?", "yes", "row 1"),
    ]


@given(
    patients=st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=2).map(tuple), min_size=2, max_size=30),
    seed=st.integers(0, 5),
)
def test_other_patients(patients, seed):
    """Of one ECG or two each: none of the patients is the same."""
    if any(all(set(one) & set(other) for other in patients) for one in patients):
        with pytest.raises(ValueError, match="no other ECG to swap in"):
            other_patients(patients, seed)
        return
    others = other_patients(patients, seed)
    assert all(not set(patients[other]) & set(patient) for other, patient in zip(others, patients, strict=True))
    assert np.array_equal(others, other_patients(patients, seed))
    if len(set().union(*patients)) == sum(map(len, patients)):
        assert sorted(others) == list(range(len(patients)))  # each used once


def test_most_frequent_answers():
    def asked(words: str, answer: str, kind: str) -> Question:
        return Question(0, 1, words, answer, kind, "p", words)

    training = [asked("Rate?", rate, "rate") for rate in ("60", "80", "80")]
    training += [asked("Fast?", answer, "rate") for answer in ("yes", "yes", "no", "yes")]
    training += [asked("Axis?", axis, "axis") for axis in ("right", "left")]
    test = [asked("Rate?", "", "rate"), asked("Slow?", "", "rate"), asked("Axis?", "", "axis"), asked("ST?", "", "st")]
    assert most_frequent_answers(test, training) == ["80", "yes", "left", "yes"]


def test_a_template_is_what_its_id_says():
    def rows(*asked: tuple[str, str]) -> Dataset:
        return Dataset.from_list(
            [
                {
                    "messages": [{"role": "user", "content": words}, {"role": "assistant", "content": answer}],
                    "template_id": 7,
                }
                for words, answer in asked
            ]
        )

    training = list_questions(rows(("Fast?", "yes"), ("Is it fast?", "yes"), ("Fast?", "no")))
    test = list_questions(rows(("Would you call it fast?", "no")))
    assert test[0].template == "template 7"
    assert most_frequent_answers(test, training) == ["yes"]


def test_an_empty_answer_cannot_be_scored():
    rows = [{"messages": [{"role": "user", "content": "Rate?"}, {"role": "assistant", "content": " "}]}]
    with pytest.raises(ValueError, match=r"Row 0 has an empty answer to 'Rate\?'"):
        list_questions(Dataset.from_list(rows))


def asked(answer: str, kind: str = "rate") -> Question:
    return Question(0, 1, "?", answer, kind, "p")


def test_candidates_of_a_type():
    questions, training = [asked("b"), asked("left", "axis")], [asked("a"), asked("right", "axis"), asked("x", "other")]
    assert candidate_answers(questions, training, None) == [["a", "b"], ["left", "right"]]
    assert candidate_answers(questions[:1], [], ["b", "c"]) == [["b", "c"]]


@pytest.mark.parametrize(
    ("training", "given", "message"),
    [
        (["b"], None, "type 'rate' have 1 different answer;"),
        ([str(number) for number in range(MAX_CANDIDATES)], None, f"have {MAX_CANDIDATES + 1} different answers"),
        ([], ["b"], "at least two different"),
        ([], ["a", "c"], "right answer 'b' to .* is none of the candidates a, c"),
    ],
)
def test_bad_candidates(training, given, message):
    with pytest.raises(ValueError, match=message):
        candidate_answers([asked("b")], [asked(answer) for answer in training], given)


def test_rows_without_ecg_are_not_swapped():
    ecg = {"array": [[0.0]], "sampling_rate": 100}
    rows = [{"ecg": [ecg], "patient_id": "a"}, {"ecg": [], "patient_id": "b"}, {"ecg": [ecg], "patient_id": "c"}]
    assert rows_to_swap(Dataset.from_list(rows), 0).tolist() == [2, 1, 0]


def test_questions_are_without_placeholders():
    """Of ECG-R1's rows, whose texts say where an ECG stands."""
    turns = [
        ("system", "S"),
        ("user", "<ecg>\nWhat is it?"),
        ("assistant", "<think>\nSo.\n</think>\n<answer> AF </answer>"),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    (question,) = list_questions(Dataset.from_list(rows))
    assert (question.question, question.turn) == ("What is it?", 2)
    assert without_thinking([question]) == [replace(question, answer="AF")]
    with pytest.raises(ValueError, match="Row 0 has nothing to score in the answer '<answer></answer>' to 'What is it"):
        without_thinking([replace(question, answer="<answer></answer>")])
