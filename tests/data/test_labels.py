import csv
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.training.data.arguments import QUESTION_KINDS
from elm_ecg.training.data.build import build_dataset
from elm_ecg.training.data.labels import WORDINGS, label_questions, read_labels, superclass_questions
from elm_ecg.training.data.questions import QuestionRow
from elm_ecg.training.data.tables import read_table
from helpers import write_rows

LABELS = ["atrial fibrillation", "left axis deviation", "normal ECG", "pacing"]
# record -> its labels, as few or as many as there are
about_records = st.dictionaries(
    st.integers(0, 300).map(str), st.lists(st.sampled_from(LABELS), max_size=4), min_size=1, max_size=60
).map(lambda labels: {record: {"labels": of_record} for record, of_record in labels.items()})


def made(about: Any, kinds: Any = QUESTION_KINDS, **options: Any) -> list[QuestionRow]:
    """Questions, but none of a kind of which nothing can be asked."""
    questions = []
    for kind in kinds:
        with suppress(ValueError):
            questions += label_questions(about, [kind], **{"min_records": 1} | options)[0]
    return questions


def answer_of(question: QuestionRow) -> str:
    return question.messages[1]["content"]


class TestLabelQuestions:
    @given(about_records, st.integers(0, 5))
    def test_answers_are_true(self, about, seed):
        for question in made(about, seed=seed):
            has = set(about[question.records[0]]["labels"])
            asked = question.columns["attribute"]
            match question.columns["question_type"]:
                case "single-verify":
                    true = "yes" if asked[0] in has else "no"
                case "single-choose":
                    true = "; ".join(label for label in asked if label in has) or "none"
                    assert all(label in question.messages[0]["content"] for label in asked)
                case "single-query":
                    true = "; ".join(sorted(has)) or "none"
            assert answer_of(question) == true
            assert [turn["role"] for turn in question.messages] == ["user", "assistant"]

    @given(about_records, st.integers(0, 5))
    def test_balance(self, about, seed):
        answers: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
        records: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for question in made(about, ("verify", "choose"), seed=seed):
            asked = tuple(question.columns["attribute"])
            answers[asked][answer_of(question)] += 1
            assert question.records[0] not in records[asked]  # asked once
            records[asked].add(question.records[0])
        for asked, counts in answers.items():
            having = sum(asked[0] in row["labels"] for row in about.values())
            if len(asked) == 1:
                assert counts["yes"] == counts["no"] == min(having, len(about) - having)
            else:
                assert counts[asked[0]] == counts[asked[1]] > 0
                assert counts["none"] in (0, counts[asked[0]])
                assert counts["; ".join(asked)] <= counts[asked[0]]
                if counts["none"] == 0:  # no record is without both
                    assert all({*asked} & {*row["labels"]} for row in about.values())

    @given(about_records, st.randoms(use_true_random=False))
    def test_same_in_any_order_of_records(self, about, random):
        shuffled = list(about.items())
        random.shuffle(shuffled)
        turned = {record: {"labels": row["labels"][::-1]} for record, row in shuffled}
        assert made(about) == made(turned)

    def test_seed_and_kinds(self):
        about = {str(i): {"labels": LABELS[i % 4 : i % 3 + 2]} for i in range(40)}
        assert made(about) == made(about)
        assert made(about) != made(about, seed=1)
        for kind in QUESTION_KINDS:
            questions, _ = label_questions(about, [kind])
            assert {question.columns["question_type"] for question in questions} == {f"single-{kind}"}
        assert len(made(about, ["query"])) == 40

    def test_balance_of_many(self):
        """All four answers to `choose` come up equally often where the labels allow it; each label stands first half the time."""
        rng = np.random.default_rng(0)
        about = {str(i): {"labels": [label for label in LABELS if rng.random() < 0.5]} for i in range(2000)}
        questions = made(about, ["choose"])
        answers = Counter(len(answer_of(q).split("; ")) if answer_of(q) != "none" else 0 for q in questions)
        assert answers == {0: 504, 1: 1008, 2: 504}  # 84 of each answer for each of 6 pairs
        is_first = [q.messages[0]["content"].find(q.columns["attribute"][0]) for q in questions]
        is_second = [q.messages[0]["content"].find(q.columns["attribute"][1]) for q in questions]
        assert 0.45 < np.mean(np.array(is_first) < np.array(is_second)) < 0.55
        assert len({q.messages[0]["content"] for q in questions}) == 6 * 2 * len(WORDINGS["choose"])

    def test_many_labels_have_few_partners(self):
        about = {str(i): {"labels": [f"label {i % 60:02d}"]} for i in range(600)}
        partners = defaultdict(set)
        for question in made(about, ["choose"]):
            one, other = question.columns["attribute"]
            partners[one].add(other)
            partners[other].add(one)
        assert {len(others) for others in partners.values()} == {20}

    def test_balanced_in_each_split(self):
        about = {str(i): {"labels": ["a"] if i < 10 else []} for i in range(100)}
        split_of = {str(i): "test" if i % 10 == 3 else "train" for i in range(100)}  # one of ten records with the label
        counts = Counter((split_of[q.records[0]], answer_of(q)) for q in made(about, ["verify"], split_of=split_of))
        assert counts == {("train", "yes"): 9, ("train", "no"): 9, ("test", "yes"): 1, ("test", "no"): 1}

    def test_what_is_left_out(self):
        about: dict[str, Any] = {
            str(i): {"labels": ["common"] if i % 2 else ["rare"] if i == 2 else []} for i in range(30)
        }
        about |= {"x": {"labels": None}, "y": {"age": 5}}
        questions, left_out = label_questions(about, ["verify", "query"], min_records=5)
        assert left_out == {"records without labels": 2, "labels of fewer than 5 records (--min_records)": 1}
        assert {*"xy"}.isdisjoint(question.records[0] for question in questions)
        (of_rare,) = (question for question in questions if answer_of(question) == "rare")
        assert of_rare.columns == {"question_type": "single-query", "attribute": None}
        assert {label for q in questions for label in q.columns["attribute"] or ()} == {"common"}

    def test_labels_as_they_come(self):
        """A semicolon would part a label in the answer; "none" is no label."""
        about = {"a": {"labels": ["b; a", " a ", "none", "x\n y"]}, "b": {"labels": ["None"]}}
        assert sorted(map(answer_of, made(about, ["query"]))) == ["a; b; x y", "none"]

    @pytest.mark.parametrize(
        ("about", "message"),
        [
            ({"a": {"labels": None}, "b": {}}, "none of the 2 records has labels. .* with --label_columns"),
            (
                {"a": {"labels": ["x"]}, "b": {"labels": ["x"]}},
                "verify choose: there is nothing to ask about 1 of 1 labels",
            ),
            ({"a": {"labels": ["x"]}, "b": {"labels": []}}, "--make_questions choose: there is nothing"),
        ],
    )
    def test_at_fault(self, about, message):
        with pytest.raises(ValueError, match=message):
            label_questions(about, ["verify", "choose"], min_records=1)


class TestReadLabels:
    def read(self, *cells: Any) -> list[Any]:
        labels = read_labels({str(i): {"x": cell} for i, cell in enumerate(cells)}, ["x"])
        return [labels[str(i)]["labels"] for i in range(len(cells))]

    @pytest.mark.parametrize(
        ("cells", "labels"),
        [
            (["a, b", "a", None, ""], [["a", "b"], ["a"], None, None]),
            (["a, b; c", "a, b"], [["a, b", "c"], ["a, b"]]),  # where semicolons separate, commas do not
            (['["a", "b, c"]', "[]", "['d']"], [["a", "b, c"], [], ["d"]]),
            ([["a", 3.0], (), float("nan")], [["a", "3"], [], None]),
            ([1, 0, 1.0, None], [["x"], [], ["x"], None]),
            (["yes", "No", "TRUE", False], [["x"], [], ["x"], []]),
            ([5, "1,7"], [["5"], ["1", "7"]]),  # codes
        ],
    )
    def test_forms(self, cells, labels):
        assert self.read(*cells) == labels

    def test_several_columns(self):
        rows = {
            "a": {"AF": 1, "SB": 0, "others": "pacing"},
            "b": {"AF": 0, "SB": 0, "others": None},
            "c": {"AF": None, "SB": 1, "others": "pacing"},  # it may have atrial fibrillation
        }
        labels = read_labels(rows, ["AF", "SB", "others"])
        assert [labels[name]["labels"] for name in "abc"] == [["AF", "pacing"], [], None]

    def test_at_fault(self):
        with pytest.raises(ValueError, match="The label column x holds 0 and -1; expected 0 and 1"):
            self.read(0, 1, -1)


def records(names: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {str(name): {"array": rng.normal(size=(12, 50)), "sampling_rate": 100, "unit": "mV"} for name in names}


def test_statements_of_ptbxl(shared):
    """Real labels, of which the frequent ones are asked about, each as often where it is as where it is not."""
    rows = read_table(shared / "data" / "ptbxl" / "records.csv")
    statements = {str(row["ecg_id"]): row for row in rows}
    about = read_labels(statements, ["statement_text_en"])
    assert about["1"]["labels"] == statements["1"]["statement_text_en"].split("; ")
    questions, left_out = label_questions(about, min_records=20)
    answers = defaultdict(Counter)
    for question in questions:
        answers[question.columns["question_type"], str(question.columns["attribute"])][answer_of(question)] += 1
    normal = sum("normal ECG" in (row["labels"] or ()) for row in about.values())
    fewer = min(normal, sum(row["labels"] is not None for row in about.values()) - normal)
    assert answers["single-verify", "['normal ECG']"] == {"yes": fewer, "no": fewer}
    assert len(answers) > 100
    assert left_out["labels of fewer than 20 records (--min_records)"] > 10


class TestBuilt:
    def test_chats_of_a_table_of_labels(self, tmp_path):
        """As CODE-15% has them, under the names of its columns; each name may be put in words."""
        rows = [{"exam": i, "subject": i // 2, "AF": int(i % 3 == 0), "SB": int(i % 4 == 0)} for i in range(24)]
        for table in (write_rows(tmp_path / "exams.xlsx", *rows), rows):
            data = build_dataset(
                records(range(24)),
                make_questions=["verify", "query"],
                label_columns=["atrial fibrillation", "SB"],
                metadata=table,
                columns=["record=exam", "patient_id=subject", "atrial fibrillation=AF"],
                min_records=6,
            )
            assert {*data} == {"train", "validation", "test"}
            chats = [row for part in data.values() for row in part]
            assert Counter(row["question_type"] for row in chats) == {"single-verify": 28, "single-query": 24}
            assert Counter(row["messages"][1]["content"] for row in chats if row["attribute"] == ["SB"]) == {
                "yes": 6,
                "no": 6,
            }
            assert all(row["patient_id"] == str(int(row["record_id"]) // 2) for row in chats)
            assert {"AF", "SB"}.isdisjoint(data["train"].column_names)  # they would be the answers

    def test_beside_questions_of_a_file(self):
        table = [{"record": str(i), "patient_id": i, "labels": "a" if i % 2 else "none"} for i in range(20)]
        asked = [{"record": "3", "question": "Is it?", "answer": "yes"}]
        options = {"make_questions": ["query"], "label_columns": ["labels"], "metadata": table}
        data = build_dataset(records(range(20)), asked, **options)
        chats = [row["messages"][0]["content"] for part in data.values() for row in part]
        assert len(chats) == 21
        assert "Is it?" in chats

    @pytest.mark.parametrize("split_by", ["patient", "record", "fold"])
    def test_answers_are_balanced_in_each_split(self, split_by):
        """And which records a split has does not depend on what is asked about them."""
        rows = [
            {"record": i, "patient_id": i // 2, "strat_fold": i % 10 // 2 * 2 + 2, "AF": int(i % 5 == 0)}
            for i in range(60)
        ]
        options = {"label_columns": ["AF"], "metadata": rows, "split_by": split_by, "shares": (0.5, 0.25, 0.25)}
        data = {
            kind: build_dataset(records(range(60)), make_questions=[kind], **options) for kind in ("verify", "query")
        }
        for split, part in data["verify"].items():
            answers = Counter(chat[1]["content"] for chat in part["messages"])
            assert answers["yes"] == answers["no"] > 0
            assert {*part["record_id"]} <= {*data["query"][split]["record_id"]}
            assert all(row["patient_id"] == str(int(row["record_id"]) // 2) for row in part)

    def test_types_of_both(self):
        table = [{"record": str(i), "patient_id": i, "labels": "a" if i % 2 else "none"} for i in range(20)]
        asked = [{"record": "3", "question": "Is it?", "answer": "yes", "question_type": kind} for kind in "xy"]
        options = {"make_questions": ["verify", "query"], "label_columns": ["labels"], "metadata": table}
        data = build_dataset(records(range(20)), asked, question_types=["x", "single-query"], **options)
        kinds = Counter(row["question_type"] for part in data.values() for row in part)
        assert kinds == {"x": 1, "single-query": 20}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"make_questions": ["ask"]}, "`make_questions` is ask; expected any of verify, choose, query"),
            (
                {"make_questions": ["query"]},
                "none of the 2 records has labels. .* with `source`, .* with `label_columns`",
            ),
            (
                {"label_columns": ["x"]},
                "`label_columns` are for questions about labels; say which with `make_questions`",
            ),
            ({"make_questions": ["query"], "label_columns": ["x"]}, "are those of a table .* with `metadata`"),
            (
                {"make_questions": ["query"], "label_columns": ["x"], "metadata": [{"record": 0, "X": 1}]},
                r"has no column x; it has record, X. Did you mean X\?",
            ),
            (
                {"make_questions": ["query"], "metadata": [{"record": 0, "X": 1}], "columns": ["patient_id=Subject"]},
                "has no column Subject; it has record, X",
            ),
            ({"make_questions": ["query"], "min_records": 0}, "`min_records` is 0; expected a whole number"),
        ],
    )
    def test_at_fault(self, options, message):
        with pytest.raises(ValueError, match=message):
            build_dataset(records(range(2)), **options)


class TestSuperclasses:
    def test_ptbxl(self, shared):
        folder = shared / "data" / "ptbxl" / "wfdb_examples"
        questions, without = superclass_questions(folder)
        with (shared / "data" / "ptbxl" / "records.csv").open(newline="") as file:
            known = {row["ecg_id"]: set(row["superclass"].split()) for row in csv.DictReader(file)}
        said = {
            record: {
                q.columns["question_type"]
                for q in questions
                if q.records == (record,) and q.messages[1]["content"] == "yes"
            }
            for record in {question.records[0] for question in questions}
        }
        assert said == {record: known[record] for record in said}
        assert len(said) + without == 22
        assert len(questions) == 5 * len(said)

    def tables(self, folder: Path, codes: str) -> Path:
        write_rows(
            folder / "scp_statements.csv",
            {"": "IMI", "diagnostic": 1.0, "diagnostic_class": "MI"},
            {"": "SR", "diagnostic": "", "diagnostic_class": ""},
        )
        write_rows(folder / "ptbxl_database.csv", {"ecg_id": 1, "scp_codes": codes})
        return folder

    def test_likelihood_0_counts_as_unknown(self, tmp_path):
        questions, without = superclass_questions(self.tables(tmp_path, "{'IMI': 0.0, 'SR': 0.0}"))
        answers = {question.columns["question_type"]: question.messages[1]["content"] for question in questions}
        assert answers == {"NORM": "no", "MI": "yes", "STTC": "no", "CD": "no", "HYP": "no"}
        assert without == 0

    def test_no_superclass(self, tmp_path):
        assert superclass_questions(self.tables(tmp_path, "{'SR': 100.0}")) == ([], 1)

    @pytest.mark.parametrize("codes", ["__import__('os').getcwd()", "[1]", "{'IMI'"])
    def test_codes_are_not_executed(self, codes, tmp_path):
        with pytest.raises(ValueError, match=r"scp_codes of ecg_id 1 are .*; expected a dict"):
            superclass_questions(self.tables(tmp_path, codes))
