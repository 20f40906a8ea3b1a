import csv
import json
import re
from ast import literal_eval
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_ecg.training.data.sources import Records
from elm_ecg.training.evaluation.benchmarks.chats import SuiteOptions, Turn
from elm_ecg.training.evaluation.benchmarks.ecg_qa import ECGQA, named_in, read_classes
from elm_ecg.training.evaluation.benchmarks.records import RecordPlaces
from helpers import write_rows

NOWHERE = RecordPlaces(Records({}), {})


def row(answer: list[str], **changes: Any) -> dict[str, Any]:
    columns = {"template_id": 2, "question_type": "single-verify", "split": "test", "ecg_id": [1]}
    return {"question": "What is there?", "answer": answer, **columns, **changes}


def script(rows: list[dict[str, Any]], texts: list[str], classes: dict[int, list[str]]) -> dict[str, float]:
    """Exact match accuracy of each type of question, written anew from the paper and the authors' experiments."""
    right: dict[str, list[bool]] = {}
    for entry, text in zip(rows, texts, strict=True):
        rest, found = f" {text.lower()} ", set()
        for option in sorted({*classes[entry["template_id"]], "none"}, key=len, reverse=True):
            place = 0
            while (place := rest.find(option.lower(), place)) >= 0:
                end = place + len(option)
                if not (re.match(r"\w", rest[place - 1]) or re.match(r"\w", rest[end])):
                    found.add(option.lower())
                    rest = rest[:place] + "\0" * len(option) + rest[end:]  # no shorter option is found in it
                place = end
        right.setdefault(entry["question_type"], []).append(found == {part.lower() for part in entry["answer"]})
    return {kind: float(np.mean(values)) for kind, values in right.items()}


def test_scores_are_those_of_an_independent_script(shared):
    folder = shared / "data" / "ecg_qa"
    with (folder / "answers_for_each_template.csv").open(newline="") as file:
        classes = {int(line["template_id"]): literal_eval(line["classes"]) for line in csv.DictReader(file)}
    for name in ("ecgqa_ptbxl_matched.jsonl", "ecgqa_ptbxl_sample.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()][::9]
        rng = np.random.default_rng(0)
        texts = []
        for entry in rows:
            known = classes[entry["template_id"]]
            drawn = [entry["answer"], [str(rng.choice(known))], [*entry["answer"], str(rng.choice(known))]][
                rng.integers(3)
            ]
            texts.append(
                [", ", " and ", "; ", "\n- "][rng.integers(4)].join(drawn).capitalize() + "." * int(rng.integers(2))
            )
        turns = [
            Turn("", "; ".join(entry["answer"]), entry["question_type"], tuple(classes[entry["template_id"]]))
            for entry in rows
        ]
        points = ECGQA().points(turns, range(len(turns)), texts)["set_match"]
        for kind, expected in script(rows, texts, classes).items():
            of_kind = np.array([turn.question_type == kind for turn in turns])
            assert points[of_kind, 0].mean() == expected
            assert 0 < expected < 1


def test_the_rows_of_the_matched_questions(shared):
    place = shared / "data" / "ecg_qa" / "ecgqa_ptbxl_matched.jsonl"
    chats = list(ECGQA().chats(place, NOWHERE, SuiteOptions("test")))
    assert len(chats) == 420
    assert {len(chat.records) for chat in chats} == {2}
    assert {turn.question_type for chat in chats for turn in chat.turns} == {"comparison_irrelevant-query"}
    assert "rr interval" in chats[0].turns[0].options
    assert len(list(ECGQA().chats(place, NOWHERE, SuiteOptions("all")))) == 5766


def test_splits_and_options(tmp_path):
    for split in ("train", "test"):
        entry = row(["yes"])
        del entry["split"]
        write_rows(tmp_path / "paraphrased" / split / "0.json", entry)
    write_rows(tmp_path / "answers_for_each_template.csv", {"template_id": 2, "classes": "['no', 'yes']"})
    assert read_classes(tmp_path / "paraphrased") == {2: ("no", "yes")}
    (chat,) = ECGQA().chats(tmp_path / "paraphrased", NOWHERE, SuiteOptions())
    assert chat.turns[0].question == "What is there?"
    (chat,) = ECGQA().chats(tmp_path / "paraphrased", NOWHERE, SuiteOptions(show_options=True))
    assert "Options: no, yes\n" in chat.turns[0].question
    with pytest.raises(ValueError, match=r"--split validation: the questions in .* are of test, train; name one"):
        list(ECGQA().chats(tmp_path / "paraphrased", NOWHERE, SuiteOptions("validation")))
    with pytest.raises(ValueError, match="holds no JSON"):
        list(ECGQA().chats(write_rows(tmp_path / "other" / "a.csv", {"a": 1}).parent, NOWHERE, SuiteOptions()))
    (tmp_path / "answers_for_each_template.csv").write_text("template_id,classes\n2,open('x')\n")
    with pytest.raises(ValueError, match="is damaged"):
        read_classes(tmp_path)


def test_without_their_table_the_answers_are_those_of_the_questions(tmp_path):
    place = write_rows(tmp_path / "questions.jsonl", row(["st/t change", "hypertrophy"]), row(["none"]))
    first, _ = ECGQA().chats(place, NOWHERE, SuiteOptions())
    assert first.turns[0].options == ("hypertrophy", "none", "st/t change")
    assert ECGQA().points(first.turns, [0], ["Hypertrophy and ST/T change"])["set_match"].tolist() == [[1, 1]]
    assert ECGQA().points(first.turns, [0], [""])["set_match"].tolist() == [[0, 1]]


def test_of_options_that_begin_alike_the_longest_is_named():
    options = ("sinus rhythm", "qt interval", "lead I", "lead II", "st/t change (any)")
    find = named_in(options).findall
    assert find("lead ii, lead i and qt intervals") == ["lead ii", "lead i"]
    assert find("none. st/t change (any)") == ["none", "st/t change (any)"]


@pytest.mark.parametrize("text", ["{}", '[{"question": "a"}]'])
def test_other_files(text, tmp_path):
    Path(tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json"):
        list(ECGQA().chats(tmp_path, NOWHERE, SuiteOptions()))


def test_a_template_that_the_table_of_answers_lacks(tmp_path):
    write_rows(tmp_path / "answers_for_each_template.csv", {"template_id": 1, "classes": "['yes', 'no']"})
    texts = write_rows(tmp_path / "test.json", row(["yes"]))
    with pytest.raises(ValueError, match=r"a question has template_id 2, of which answers_for_each_template.csv says"):
        list(ECGQA().chats(texts, NOWHERE, SuiteOptions()))
