import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from elm_ecg.ecg_utils import ECGRecord
from elm_ecg.training.evaluation.conditions import CONDITIONS
from elm_ecg.training.evaluation.explain import Explanation
from elm_ecg.training.evaluation.questions import Question
from elm_ecg.training.evaluation.report import (
    NUM_EXAMPLES,
    alike,
    example,
    examples,
    score_tables,
    write_report,
    wrong_answers,
)
from elm_ecg.training.evaluation.scale import MetricScale
from elm_ecg.training.evaluation.scores import Scorer, load_metrics
from elm_ecg.training.evaluation.verdict import verdict


def prediction(row: int, kind: str, answer: str, given: str) -> dict:
    return {"row": row, "question_type": kind, "answer": answer, "ecg": given, "question": "?", "record_id": f"r{row}"}


def test_wrong_answers():
    rows = [prediction(i, "heart_rate", "80", "60") for i in range(3)] + [prediction(3, "axis", "left", "")]
    rows += [prediction(4, "axis", "left", "left")]
    assert wrong_answers(rows) == [("heart rate", "80", "60", 3), ("axis", "left", "", 1)]


def test_metrics_that_say_the_same_share_a_row():
    score = {"value": 0.5, "interval_95": [0.4, 0.6]}
    other = {**score, "value": 0.6}
    rows = {
        "ecg": {"exact_match": score, "closed_set": score, "token_f1": score, "rate_error": score},
        "zeroed": {"exact_match": score, "closed_set": score, "token_f1": other, "rate_error": score},
    }
    scales = {"rate_error": MetricScale(unit="bpm", higher_is_better=False)}
    assert alike(rows, scales) == [["exact_match", "closed_set"], ["token_f1"], ["rate_error"]]


def test_examples_are_of_all_types_right_and_wrong():
    rows = [
        prediction(i % 30, kind, "a", "a" if i % 3 else "b") for i, kind in enumerate(["rate"] * 60 + ["axis"] * 30)
    ]
    chosen = examples(rows)
    assert len(chosen) == NUM_EXAMPLES
    assert {(row["question_type"], row["ecg"] == row["answer"]) for row in chosen} == {
        (kind, right) for kind in ("rate", "axis") for right in (True, False)
    }
    assert len({row["row"] for row in chosen}) == NUM_EXAMPLES
    assert examples(rows[:3]) == examples(rows[:3], 5)
    assert len(examples(rows[:3])) == 3


class Page(HTMLParser):
    """Tags that are open, and the text of the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def page(tmp_path) -> str:
    ecg = {
        "array": np.zeros((12, 500), dtype=np.int16).tolist(),
        "sampling_rate": 100,
        "lead_names": ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"],
        "unit": "uV",
    }
    asked = [("<script>alert(1)</script>", "yes"), ("Fast?", "no"), ("Fast?", "yes"), ("Fast?", "no")]
    data = Dataset.from_list([{"ecg": [ecg, {**ecg, "sampling_rate": 0}]}] * len(asked))
    questions = [Question(i, 1, words, answer, "rate & rhythm", f"p{i}") for i, (words, answer) in enumerate(asked)]
    answers = {"ecg": ["yes", "</td><b>", "no", "no"], "zeroed": ["no"] * 4, "most_frequent": ["yes"] * 4}
    results = {
        "schema_version": 4,
        "model": "m",
        "model_revision": "sha256:0",
        "data": {"names": ["d"], "split": "test", "fold": None, "fingerprint": "f"},
        "settings": {"score": "generation", "dtype": "float32", "seed": 0, "num_resamples": 50},
        "packages": {"torch": "2"},
        **Scorer(questions, load_metrics(["exact_match", "closed_set"]), 50, 0).summarise(answers),
        "not_scored": {"swapped": "nobody else"},
        "main_metric": "exact_match",
    }
    results["verdict"] = verdict(results)
    predictions = [
        prediction(q.row, q.question_type, q.answer, answers["ecg"][i])
        | {"question": q.question, "zeroed": answers["zeroed"][i], "most_frequent": answers["most_frequent"][i]}
        for i, q in enumerate(questions)
    ]
    words = {"title": "A & B", "notice": "Simulated <b>ECGs</b>.", "pictures": [(b"<svg/>", "Loss < 1")]}
    write_report(tmp_path / "report.html", results, predictions, data, **words)
    return (tmp_path / "report.html").read_text()


def test_report_is_one_file_of_escaped_text(page):
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "&lt;/td&gt;&lt;b&gt;" in page
    sources = re.findall(r'src="([^"]*)"', page)
    assert {source.split(",")[0] for source in sources} == {"data:image/png;base64", "data:image/svg+xml;base64"}
    assert len(sources) == 3 + 1 + 4  # scores, differences, confusion; the one given; the ECG of each example
    assert page.count("cannot be drawn") == 4
    parser = Page()
    parser.feed(page)
    assert parser.open == []
    text = "".join(parser.text)
    for words in (
        "not a medical device",
        "nobody else",
        "rate & rhythm",
        "most frequent answer",
        "Most frequent wrong answers",
        "A & B",
        "Simulated <b>ECGs</b>.",
        "Loss < 1",
        "Without intervals and p-values: the questions are about 4 patients, and fewer than 10 do not show",
    ):
        assert words in text


def test_an_example_is_explained():
    """In place of the plain picture; rows of several ECGs have theirs."""
    ecg = {"array": [[0] * 500] * 2, "sampling_rate": 100, "lead_names": ["I", "II"], "unit": "uV"}
    data = Dataset.from_list([{"ecg": [ecg]}, {"ecg": [ecg, ecg]}])

    def explain(row, prediction):
        record = ECGRecord(np.zeros((2, 500), np.float32), 100, ("I", "II"))
        assert len(row["ecg"]) == 1
        attribution = np.ones((2, 500))
        return Explanation(record, "?", prediction["ecg"], "occlusion", 0.75, attribution, {"most": 0.5, "least": 0.7})

    (shaded,) = example(prediction(0, "rate", "a", "a"), data, explain)["pictures"]
    (plain,) = example(prediction(0, "rate", "a", "a"), data, None)["pictures"]
    assert "shaded where the answer rests on it. 'a' has probability 0.75" in shaded["caption"]
    assert shaded["uri"] != plain["uri"]
    assert len(example(prediction(1, "rate", "a", "a"), data, explain)["pictures"]) == 2


def test_the_contents_lead_to_every_section(page):
    """And each section stands in them once."""
    links, sections = (
        re.findall(r'<a href="#(\w+)">([^<]+)</a>', page),
        re.findall(r'<h2 id="(\w+)">([^<]+)</h2>', page),
    )
    assert links == sections
    assert len(links) == len(set(links)) == 6


def test_tables_are_no_wider_than_the_conditions(page):
    """However many metrics there are: each is a row. A screen of 1200 pixels shows all columns."""
    tables = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)
    assert max(len(re.findall("<th>", table)) for table in tables) <= 2 + len(CONDITIONS)
    scores = page.split('<h2 id="scores">')[1].split("</table>")[0]
    assert "<th>metric</th><th>with its ECG</th><th>ECG zeroed</th>" in scores
    assert "<td>exact match; closed set</td>" in scores  # one row, as they are the same here


def page_of(folder: Path, conditions: list[str], **changes: Any) -> str:
    """The report of an evaluation of 24 types of questions."""
    questions = [Question(row, 1, "?", "yes", f"type{row % 24}", f"p{row}") for row in range(48)]
    answers = dict.fromkeys(conditions, ["yes", "no"] * 24)
    summary = Scorer(questions, load_metrics(["exact_match"]), 20, 0).summarise(answers)
    facts = {"model": "m", "model_revision": "sha256:0", "packages": {}, "not_scored": {}, "main_metric": "exact_match"}
    settings = {"score": "generation", "dtype": "float32", "seed": 0, "num_resamples": 20}
    data = {"names": ["d"], "split": "test", "fold": None}
    results = {**summary, **facts, "settings": settings, "data": data, "verdict": "v", **changes}
    write_report(folder / "report.html", results, [], Dataset.from_list([{"ecg": None}]))
    return (folder / "report.html").read_text()


def test_a_benchmark_with_the_ecg_alone(tmp_path):
    """There is nothing to compare with, and the page says what was not asked."""
    page = page_of(
        tmp_path, ["ecg"], suite={"title": "ECG-QA", "left_out": {"chats that were not drawn (--limit)": 1234}}
    )
    assert "<td>chats that were not drawn (--limit): 1,234</td>" in page
    assert "It was asked with its ECG alone." in page
    assert "What the ECG adds" not in page
    assert "the scores of ECG-QA may count it as right" in page


def test_every_type_of_question_stands_in_the_page(tmp_path):
    """However many there are; numbers of narrow columns go on in a second line in place of beyond the edge."""
    page = page_of(tmp_path, ["ecg", "zeroed"])
    table = page.split("By type of question</h2>")[1].split("</table>")[0]
    assert re.findall(r"<td>(type\d+)</td>", table) == sorted(f"type{kind}" for kind in range(24))
    assert not re.search(r"td\.score[^{]*{[^}]*nowrap", page)


def test_scores_of_tagged_parts_and_closed_questions_have_their_tables():
    questions = [
        Question(i, 1, "?", f"<think>why</think><answer>{answer}</answer>", "rate", f"p{i}")
        for i, answer in enumerate(["yes", "no"] * 2)
    ]
    texts = [question.answer for question in questions]
    scorer = Scorer(questions, load_metrics(["exact_match", "closed_set"]), 50, 0)
    tables = dict(score_tables(scorer.summarise({"ecg": texts, "zeroed": texts[:1] * 4})))
    headings = ["", "What stands in <think>", "What stands in <answer>", "Closed questions, mean over their types"]
    assert list(tables) == headings
    assert all(list(rows) == ["ecg", "zeroed"] for rows in tables.values())
    assert tables["What stands in <answer>"]["zeroed"]["exact_match"]["value"] == 0.5
    assert tables["What stands in <think>"]["zeroed"]["exact_match"]["value"] == 1
    assert list(tables[headings[-1]]["ecg"]) == ["balanced_accuracy", "macro_f1"]
