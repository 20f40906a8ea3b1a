import json
from typing import Any

import numpy as np
import pytest

from elm_ecg.training.data.sources import Records
from elm_ecg.training.evaluation.benchmarks.chats import Chat, SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.ecg_reasoning import ECGReasoning, is_right
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces

NOWHERE = RecordPlaces(Records({}), {})
FURTHER = "Further findings are required to confirm the diagnosis"


def ask(kind: str, answer: Any, *options: str) -> dict[str, Any]:
    return {"question": f"{kind}?", "answer": answer, "options": [*options], "question_type": kind}


def sample() -> dict[str, Any]:
    yes_no = ("Yes", "No")
    leads = ask("lead_grounding", ["Lead V2", "Lead V3"], "Lead I", "Lead V2", "Lead V3")
    waves = ask("wave_grounding", ["[1.12s - 1.24s]"], "[1.12s - 1.24s]", "[2.12s - 2.24s]")
    loops = [
        {
            "criterion_selection": ask("criterion_selection", "Presence of A", "Presence of A", "Presence of B"),
            "finding_identification": ask("finding_identification", "Yes", *yes_no),
            "ecg_grounding": [leads, waves],
            "diagnostic_decision": ask("diagnostic_decision", FURTHER, *yes_no, FURTHER),
        },
        {
            "criterion_selection": ask("criterion_selection", "Presence of B", "Presence of A", "Presence of B"),
            "finding_identification": ask("finding_identification", "No", *yes_no),
            "ecg_grounding": [],
            "diagnostic_decision": ask("diagnostic_decision", "Yes", *yes_no, FURTHER),
        },
    ]
    first = ask("initial_diagnostic_question", "Yes", *yes_no)
    return {
        "metadata": {"data_source": "ptbxl", "ecg_id": "919", "target_dx": "a", "dx_label": True},
        "data": {"initial_diagnostic_question": first, "reasoning": loops},
    }


def save(folder, *samples: dict[str, Any]):
    path = folder / "ptbxl.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in samples))
    return path


def script(samples: list[dict[str, Any]], answers: list[list[bool]]) -> dict[str, float]:
    """The scores of right and wrong answers, written anew from the authors' description: the first question, then the chain."""
    scores: dict[str, list[float]] = {}
    for entry, given in zip(samples, answers, strict=True):
        scores.setdefault("initial_diagnosis", []).append(given[0])
        left = list(given[1:])
        hard = soft = last = True
        for loop in entry["data"]["reasoning"]:
            alive, depth = True, 0.0
            for name, step in loop.items():
                for question in step if name == "ecg_grounding" else [step]:
                    right = left.pop(0)
                    kind = question["question_type"]
                    scores.setdefault(f"{kind}_with_gold_history", []).append(right)
                    alive = alive and right
                    depth += alive * (1 / len(step) if name == "ecg_grounding" else 1)
                    hard = hard and right
                    soft = soft and (right or question["answer"] == FURTHER)
                    last = right
            if loop["ecg_grounding"]:
                scores.setdefault("depth", []).append(depth)
        assert not left
        for name, value in (("completion", hard), ("completion_soft", soft), ("gold_history_diagnosis", last)):
            scores.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in scores.items()}


def totals(chats: list[Chat], texts: list[str]) -> dict[str, float]:
    turns = [turn for chat in chats for turn in chat.turns]
    numbers = [number for number, chat in enumerate(chats) for _ in chat.turns]
    points = ECGReasoning().points(turns, numbers, texts)
    return {name: rows[:, 0].sum() / rows[:, 1].sum() for name, rows in points.items()}


@pytest.mark.parametrize("chance", [0.5, 0.9, 0.98])
def test_scores_are_those_of_an_independent_script(shared, chance):
    place = shared / "data" / "ecg_reasoning_benchmark" / "ptbxl_matched.jsonl"
    samples = [json.loads(line) for line in place.read_text().splitlines()]
    chats = list(ECGReasoning().chats(place, NOWHERE, SuiteOptions()))
    assert len(chats) == 2 * len(samples) == 530
    rng = np.random.default_rng(0)
    answers, texts = [], []
    for first, chain in zip(chats[::2], chats[1::2], strict=True):
        right = rng.random(1 + len(chain.turns)) < chance
        for turn, one in zip((*first.turns, *chain.turns), right, strict=True):
            wrong = next(option for option in (*turn.options, "maybe") if not is_right(turn, option))
            texts.append(turn.answer if one else wrong)
        answers.append(right.tolist())
    found, expected = totals(chats, texts), script(samples, answers)
    assert found == pytest.approx(expected)
    assert expected.keys() == ECGReasoning.scales.keys()
    assert 0 < expected["depth"] < 4


def test_right_answers_are_right(shared):
    place = shared / "data" / "ecg_reasoning_benchmark"
    chats = list(ECGReasoning().chats(place, NOWHERE, SuiteOptions()))
    best = totals(chats, [turn.answer for chat in chats for turn in chat.turns])
    assert best == {name: scale.high for name, scale in ECGReasoning.scales.items()}


def test_a_sample_by_hand(tmp_path):
    first, chain = ECGReasoning().chats(save(tmp_path, sample()), NOWHERE, SuiteOptions())
    assert first.records == chain.records == ("919",)
    assert len(chain.turns) == 8
    assert chain.turns[2].question.endswith(
        "Options:\n- Lead I\n- Lead V2\n- Lead V3\nAnswer with the text of all options that apply, separated by commas, and nothing else."
    )
    right = [turn.answer for turn in chain.turns]
    # wrong in the second question of grounding: two steps and a half
    scores = totals([first, chain], ["No", *right[:3], "[2.12s - 2.24s]", *right[4:]])
    assert scores["initial_diagnosis"] == 0
    assert scores["depth"] == 2.5
    assert scores["completion"] == scores["completion_soft"] == 0
    assert scores["gold_history_diagnosis"] == 1
    # a decision that came too early
    scores = totals([first, chain], ["Yes", *right[:4], "Yes", *right[5:]])
    assert (scores["completion"], scores["completion_soft"], scores["depth"]) == (0, 1, 3)


@pytest.mark.parametrize(
    ("kind", "answer", "text", "expected"),
    [
        ("finding_identification", "Yes", "**Yes**.", True),
        ("finding_identification", "Yes", "Yes, it does", True),
        ("finding_identification", "No", "The answer is no", True),
        ("finding_identification", "No", "Not sure", False),
        ("finding_identification", "Yes", "", False),
        ("diagnostic_decision", "Yes", FURTHER, False),
        ("diagnostic_decision", FURTHER, f"- {FURTHER.upper()}.", True),
        ("criterion_selection", "Presence of A", "presence of a", True),
        ("criterion_selection", "Presence of A", "presence of ab", False),
        ("lead_grounding", "Lead V2, Lead V3", "V3 and V2", True),
        ("lead_grounding", "Lead V2, Lead V3", "Leads V2, V3, aVL", False),
        ("lead_grounding", "Lead II", "lead III", False),
        ("wave_grounding", "[1.12s - 1.24s]", "[1.12s - 1.24s]", True),
        ("measurement_grounding", "[230ms - 240ms]", "230ms", False),
    ],
)
def test_which_texts_are_right(kind, answer, text, expected):
    assert is_right(Turn("", answer, kind), text) is expected


def test_other_files(tmp_path):
    suite, options = ECGReasoning(), SuiteOptions()
    with pytest.raises(ValueError, match=r"holds no .jsonl file; give the folder"):
        list(suite.chats(tmp_path, NOWHERE, options))
    broken = sample()
    del broken["data"]["reasoning"]
    with pytest.raises(
        ValueError, match=r"Line 1 of .*ptbxl.jsonl is no sample of ECG-Reasoning-Benchmark: it lacks 'reasoning'"
    ):
        list(suite.chats(save(tmp_path, broken), NOWHERE, options))
    (tmp_path / "ptbxl.jsonl").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        list(suite.chats(tmp_path, NOWHERE, options))
    odd = sample()
    odd["data"]["initial_diagnostic_question"]["options"] = 3
    with pytest.raises(ValueError, match="is no sample"):
        list(suite.chats(save(tmp_path, odd), NOWHERE, options))
