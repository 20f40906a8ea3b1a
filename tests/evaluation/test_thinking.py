"""What answers with reasoning say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.training.evaluation.thinking import TAGS, THINK_OPEN, answer_of, scored_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nRate 48.\n</think>\n<answer>sinus bradycardia; LVH</answer>", "sinus bradycardia; LVH"),
        ("<answer>\n yes\n</answer>\n", "yes"),
        ("<answer>no</answer> or rather <answer>yes</answer>", "yes"),
        ("<answer>no <answer>yes</answer>", "yes"),
        ("<answer>yes</answer> <answer>cut o", "yes"),
        ("<answer></answer>", ""),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<think>\nRate 48", None),
        ("<answer>cut o", None),
        ("yes</answer>", None),
        ("</answer>yes<answer>", None),
        ("yes", None),
        ("", None),
    ],
)
def test_answer_of(text, answer):
    assert answer_of(text) == answer


words = st.text("<>/answer \n", max_size=12)


@given(words, st.text("answer/> \n", max_size=12), words)
def test_answer_of_any_texts(before, answer, after):
    """The last whole pair counts, whatever stands around it."""
    text = f"{before}<answer>{answer}</answer>{after}"
    expected = answer_of(after) if answer_of(after) is not None else answer.strip()
    assert answer_of(text) == expected


def test_what_is_given_is_the_opening_tag():
    assert f"{TAGS[0]}\n" == THINK_OPEN


@pytest.mark.parametrize(
    ("text", "reference", "scored"),
    [
        ("<think>\nSo.\n</think>\n<answer>AF</answer>", "<answer>AF</answer>", "AF"),
        ("<think>\nSo.\n</think>\nAF", "<answer>AF</answer>", ""),
        ("<think>\nSo.\n</think>\nAF", "AF", "AF"),
        ("<think>\nSo.\n</think>\n<answer>AF</answer>", "AF", "AF"),
        ("<think>\nIt goes on", "AF", ""),
        ("AF", "AF", "AF"),
        ("AF", "<answer>AF</answer>", ""),
    ],
)
def test_what_scores(text, reference, scored):
    assert scored_answer(text, reference) == scored
    assert scored_answer(reference, reference) == "AF"
