import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.training.rewards import Reward, answer_reward, format_reward, load_rewards, tags_reward

TAGS = ["<think>", "</think>", "<answer>", "</answer>"]


def chat(*texts: str) -> list[Any]:
    """Completions as TRL gives them."""
    return [[{"role": "assistant", "content": text}] for text in texts]


# the definitions, written again without a look at the module


def expected_format(text: str) -> float:
    """`<think>...</think>`, anything, `<answer>...</answer>`, and nothing before or behind."""
    text = text.strip()
    if not (text.startswith("<think>") and text.endswith("</answer>")):
        return 0.0
    thought = text.find("</think>", len("<think>"))
    if thought == -1:
        return 0.0
    answer = text.find("<answer>", thought + len("</think>"))
    return float(answer != -1 and len(text) - len("</answer>") >= answer + len("<answer>"))


def expected_tags(text: str, think_given: bool) -> float:
    tags = TAGS[1:] if think_given else TAGS
    return float(np.mean([len(text.split(tag)) == 2 for tag in tags]))


def last_answer(text: str) -> str:
    """What stands between a closing tag and the opening one before it, of the last such pair."""
    for end in reversed([match.start() for match in re.finditer("</answer>", text)]):
        start = text.rfind("<answer>", 0, end)
        if start != -1 and "</answer>" not in text[start:end]:
            return text[start + len("<answer>") : end].strip()
    return ""


def expected_answer(text: str, right: str) -> float:
    answer, right = last_answer(text), last_answer(right)
    given, expected = ({part.strip().lower() for part in one.split(";")} for one in (answer, right))
    given, expected = given - {""}, expected - {""}
    hits = sum(one in expected for one in given)
    f1 = 0.0
    if hits:
        precision, recall = hits / len(given), hits / len(expected)
        f1 = 2 * precision * recall / (precision + recall)
    return 0.5 * f1 + (0.5 if answer == right else 0.0)


def generated(number: int) -> list[tuple[str, str]]:
    """Answers as a model might write them, from perfect to nonsense, and what is right."""
    rng = np.random.default_rng(0)
    words = ["sinus rhythm", "Sinus Rhythm", "ST elevation", "left axis deviation", "normal ECG", "", " "]
    pieces = [*TAGS, "<think>", "</think>", "<answer>", "</answer>", "rate 80", "\n", "; ", *words]
    pairs = []
    for index in range(number):
        statements = rng.choice(words[:5], rng.integers(1, 4))
        right = f"<think>rate 80</think><answer>{'; '.join(statements)}</answer>"
        if index % 2:
            answer = "; ".join(rng.choice(words, rng.integers(0, 4)))
            text = f"<think>rate {rng.integers(40, 99)}</think>{rng.choice(['', chr(10), ' so '])}<answer>{answer}</answer>"
            if index % 5 == 0:  # cut off
                text = text[: rng.integers(len(text))]
        else:
            text = "".join(rng.choice(pieces, rng.integers(0, 9)))
        pairs.append((text, right))
    return pairs


def test_a_thousand_answers():
    texts, solutions = zip(*generated(1000), strict=True)
    completions, right = chat(*texts), list(solutions)
    formats = format_reward(completions)
    assert formats == [expected_format(text) for text in texts]
    for think_given in (False, True):
        assert tags_reward(completions, think_given=think_given) == pytest.approx(
            [expected_tags(text, think_given) for text in texts]
        )
    answers = answer_reward(completions, right)
    assert answers == pytest.approx([expected_answer(*pair) for pair in zip(texts, solutions, strict=True)])
    assert 0.1 < np.mean(formats) < 0.9  # the answers are neither all right nor all wrong
    assert len(set(np.round(answers, 6))) > 5


@pytest.mark.parametrize(
    ("text", "right", "of_format", "of_tags", "of_answer"),
    [
        ("<think>a</think><answer>af</answer>", "<answer>af</answer>", 1, 1, 1),
        ("<think>a</think> so <answer>AF</answer>", "<answer>af</answer>", 1, 1, 0.5),
        ("<think>a</think><answer>af; lvh</answer>", "<answer>af</answer>", 1, 1, 0.5 * 2 / 3),
        ("<think>a</think><answer>lvh; af</answer>", "<answer>af; lvh</answer>", 1, 1, 0.5),
        ("<think>a</think>af", "<answer>af</answer>", 0, 0.5, 0),
        ("<answer>af</answer>", "<answer>af</answer>", 0, 0.5, 1),
        ("<think>a</think><answer>af</answer> and more", "<answer>af</answer>", 0, 1, 1),
        ("<think>a</think><answer>lvh</answer><answer>af</answer>", "<answer>af</answer>", 1, 0.5, 1),
        ("", "<answer>af</answer>", 0, 0, 0),
        ("sinus rhythm", "sinus rhythm", 0, 0, 1),  # answers without tags, and what is right without
        ("<think>a</think>af", "af", 0, 0.5, 1),
        ("<think>af; lvh</think><answer></answer>", "af; lvh", 1, 1, 0),  # what is thought is no answer
        ("<think>;af;", "af", 0, 0.25, 0),
    ],
)
def test_worked_cases(text, right, of_format, of_tags, of_answer):
    assert format_reward(chat(text)) == [of_format]
    assert tags_reward(chat(text)) == [of_tags]
    assert answer_reward(chat(text), [right]) == pytest.approx([of_answer])


def test_think_that_is_given_is_not_rewarded():
    text = "<think>\na</think><answer>af</answer>"
    assert tags_reward(chat(text), think_given=True) == [1]
    assert tags_reward(chat("<think>\naf"), think_given=True) == [0]
    assert tags_reward(chat("<think>\naf"), think_given=False) == [0.25]


@given(st.text(), st.text(min_size=1))
def test_rewards_are_shares(text, right):
    for values in (format_reward(chat(text)), tags_reward(chat(text)), answer_reward(chat(text), [right])):
        assert 0 <= values[0] <= 1


def test_length():
    reward = load_rewards(["length"])[0]
    reward.context = {"max_completion_length": 100, "think_given": False}
    ids = [[1] * number for number in (1, 80, 90, 100)]
    assert reward(completions=chat("", "", "", ""), completion_ids=ids) == pytest.approx([0, 0, -0.5, -1])


def test_metrics_of_evaluation():
    texts = ["<think>a</think><answer>sinus rhythm</answer>", "sinus", ""]
    rewards = load_rewards(["exact_match", "set_f1", "token_f1"])
    assert [reward.name for reward in rewards] == ["exact_match", "set_f1", "token_f1"]
    values = [reward(completions=chat(*texts), solution=["<answer>sinus rhythm</answer>"] * 3) for reward in rewards]
    assert values == [[1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert rewards[2](completions=chat("sinus"), solution=["sinus rhythm"]) == pytest.approx([2 / 3])


def own(folder: Path, body: str, arguments: str = "completions, **kwargs") -> str:
    (folder / "mine.py").write_text(f"def mine({arguments}):\n    return {body}\n")
    return f"{folder / 'mine.py'}:mine"


def test_a_function_of_ones_own(tmp_path):
    (reward,) = load_rewards([own(tmp_path, "[age / 100 for age in kwargs['age']]")])
    assert (reward.name, reward.__name__) == ("mine", "mine")
    assert reward(completions=chat("a", "b"), age=[50, 60], solution=["", ""]) == [0.5, 0.6]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "The reward mine fails: ZeroDivisionError"),
        ("[1.0]", "The reward mine gives 1 values for 2 answers; expected one for each"),
        ("[1.0, float('nan')]", "The reward mine gives nan for the answer 'second'; expected a finite number"),
        ("[1.0, float('inf')]", "The reward mine gives inf for the answer 'second'"),
        ("[1.0, 'much']", "The reward mine gives 'much' for the answer 'second'; expected a number"),
        ("3", "The reward mine fails: TypeError"),
    ],
)
def test_a_function_that_fails(body, message, tmp_path):
    (reward,) = load_rewards([own(tmp_path, body)])
    with pytest.raises(ValueError, match=re.escape(message)):
        reward(completions=chat("first", "second"))


def test_nothing_to_say():
    assert Reward("some", lambda **kwargs: [None, 1])(completions=chat("a", "b")) == [None, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["anwser"], "--rewards anwser: there is no such reward. Did you mean answer?"),
        (["format", "format"], "--rewards names format twice"),
        (["bleu4"], "--rewards bleu4: this metric gives no score of a single answer"),
        (["bert_score"], "--rewards bert_score: this metric gives no score of a single answer"),
        (["nowhere.py:f"], "--rewards nowhere.py:f: there is no file nowhere.py"),
    ],
)
def test_rewards_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_rewards(options)


def test_files_without_the_function(tmp_path):
    option = own(tmp_path, "[]")
    for name, message in ((option.replace(":mine", ":other"), "cannot be loaded"),):
        with pytest.raises(ValueError, match=message):
            load_rewards([name])
    with pytest.raises(
        ValueError, match=r"takes no \*\*kwargs; expected def mine\(completions, solution, \*\*kwargs\)"
    ):
        load_rewards([own(tmp_path, "[]", "completions")])
    with pytest.raises(ValueError, match="there is a reward answer already; give your function another name"):
        load_rewards([option.replace(":mine", ":answer")])
    (tmp_path / "broken.py").write_text("1 +")
    with pytest.raises(ValueError, match="cannot be loaded: "):
        load_rewards([f"{tmp_path / 'broken.py'}:mine"])
    (tmp_path / "not-a-name.py").write_text("")
    with pytest.raises(ValueError, match="whose name has letters, digits and _ alone"):
        load_rewards([f"{tmp_path / 'not-a-name.py'}:mine"])
