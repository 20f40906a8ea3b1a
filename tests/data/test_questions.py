from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_ecg.training.data.build import build_dataset
from elm_ecg.training.data.questions import (
    QuestionRow,
    candidates,
    choose_questions,
    count_absent,
    read_questions,
    set_of,
)
from elm_ecg.training.data.sources import Records, find_records
from helpers import write_rows

ROW = {"record": "a", "question": "Is it?", "answer": "yes"}
MIMIC = "files/p1000/p10000032/s40689238/40689238"


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def contents(question: QuestionRow) -> list[str]:
    return [turn["content"] for turn in question.messages]


# set -> the file as its authors publish it, a row of it, and what becomes of the row: records, texts
PUBLISHED = {
    "ecg_qa": (
        "train/00000.json",
        {
            **{
                "template_id": 1,
                "question_id": 2,
                "sample_id": 3,
                "question_type": "single-verify",
                "attribute": ["af"],
            },
            **{"question": "Is it AF?", "answer": ["yes"], "ecg_id": [12662], "attribute_type": "scp_code"},
        },
        (("12662",), ["Is it AF?", "yes"]),
    ),
    "ecg_qa of two": (
        "valid/00000.json",
        {"question": "What is new?", "answer": ["pr interval", "none"], "ecg_id": [46, 81], "attribute": None},
        (("46", "81"), ["What is new?", "pr interval; none"]),
    ),
    "pretrain_mimic": (
        "pretrain_mimic.json",
        {"id": "40689238", "ecg": MIMIC, "conversations": said("<ecg>\n", "Sinus rhythm. An image of health.")},
        ((MIMIC,), ["", "Sinus rhythm. An image of health."]),
    ),
    "ecg_instruct_45k": (
        "ecg_instruct_45k.json",
        {"id": 1, "ecg": MIMIC, "conversations": said("Describe it.\n<ecg>", "Normal.", "Why?", "No finding.")},
        ((MIMIC,), ["Describe it.", "Normal.", "Why?", "No finding."]),
    ),
    "ECGInstruct": (
        "ECGInstruct.json",
        {
            **{"id": "x", "image": "ptb-xl/records500/00000/00001_hr-0.png"},
            "conversations": said(
                "<image>\nWhat do these ECG Images and this image show?", "The image: AF. Imaging is off."
            ),
        },
        (
            ("ptb-xl/records500/00000/00001_hr-0.png",),
            ["What do these ECGs and this ECG show?", "The ECG: AF. Imaging is off."],
        ),
    ),
    "ECGBench": (
        "code15-test/test-00000-of-00001.parquet",
        {
            **{
                "id": "code15-1",
                "image_path": "test_images/code15_v4/99-0.png",
                "image": {"bytes": b"\xff\xd8", "path": None},
            },
            "conversations": said("Read this IMAGE.", "RBBB"),
        },
        (("test_images/code15_v4/99-0.png",), ["Read this ECG.", "RBBB"]),
    ),
    "ECG-Grounding": (
        "ECG_Grounding_30k.json",
        {"id": 4, "ecg": f"mimic-iv/{MIMIC}", "image": "40689238-0.png", "conversations": said("<image>\nWhy?", "AF")},
        ((f"mimic-iv/{MIMIC}",), ["Why?", "AF"]),
    ),
    "ECG-R1": (
        "base.jsonl",
        {
            "messages": [
                {"role": "system", "content": "Think first."},
                {"role": "user", "content": "<ecg>Is this an image of AF?"},
                {"role": "assistant", "content": "<think>\nNo P waves.\n</think>\n<answer>yes</answer>"},
            ],
            "objects": {"ecg": ["code15/99"]},
            "source": "CODE-15%",
        },
        (
            ("code15/99",),
            ["Think first.", "Is this an image of AF?", "<think>\nNo P waves.\n</think>\n<answer>yes</answer>"],
        ),
    ),
    "ecg_qa_cot": (
        "ecg_qa_cot_test.csv",
        {
            **{"ecg_id": "[12662]", "sample_id": 1, "question_id": 2, "question_type": "single-verify"},
            **{"question": "Is it AF?", "answer": "No P waves, so it is.\nAnswer: yes"},
        },
        (("12662",), ["Is it AF?", "No P waves, so it is.\nAnswer: yes"]),
    ),
}


class TestPublished:
    """Text sets in their authors' form."""

    @pytest.mark.parametrize("name", PUBLISHED)
    def test_form(self, name, tmp_path):
        file, row, expected = PUBLISHED[name]
        write_rows(tmp_path / file, row, row)
        one, other = read_questions(tmp_path)
        assert one == other
        assert (one.records, contents(one)) == expected

    def test_what_is_kept_of_them(self, tmp_path):
        file, row, _ = PUBLISHED["ecg_qa"]
        (question,) = read_questions(write_rows(tmp_path / file, row))
        assert question.columns == {name: row[name] for name in row if name not in ("question", "answer", "ecg_id")}
        assert not hasattr(question, "__dict__")  # millions of rows are held

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (MIMIC, [MIMIC, "40689238"]),
            (f"mimic-iv/{MIMIC}", [f"mimic-iv/{MIMIC}", MIMIC, "40689238"]),
            (f"mimic_v4/{MIMIC}-0.png", [f"mimic_v4/{MIMIC}-0.png", MIMIC, "40689238"]),
            ("mimic_v4/40689238-0.png", ["mimic_v4/40689238-0.png", "40689238"]),
            ("ptb-xl/00001_hr-0.png", ["ptb-xl/00001_hr-0.png", "00001_hr", "1"]),
            (
                "ecg_ptbxl_benchmarking/data/ptbxl/records500/21000/21837_hr",
                [
                    "ecg_ptbxl_benchmarking/data/ptbxl/records500/21000/21837_hr",
                    *("records500/21000/21837_hr", "21837_hr", "21837"),
                ],
            ),
            ("code15/99", ["code15/99", "99"]),
            ("code15_v4/part/99-0.png", ["code15_v4/part/99-0.png", "99"]),
            ("cpsc_v4/A0001-0.png", ["cpsc_v4/A0001-0.png", "A0001"]),
            ("csn/JS00001-0.png", ["csn/JS00001-0.png", "JS00001"]),
            *((name, [name]) for name in ("a", "2024/ward-7.png", "17", "17-0.png", "x/17", "A0001b", "decode15/x")),
        ],
    )
    def test_candidates(self, name, expected):
        """A user's own names stay as they are: `ward-7` is no second picture of `ward`."""
        assert candidates(name) == expected

    def test_records_of_several_sets(self):
        """Those of the given records alone are found; the others are counted by what their names begin with."""
        asked = [
            f"mimic_v4/{MIMIC}-0.png",
            "ptb-xl/x/00017_hr-0.png",
            "code15_v4/17-0.png",
            "code15_v4/18-0.png",
            "who",
        ]
        questions = [QuestionRow((name,), []) for name in asked]
        files = {"17": Path("p/records500/00000/00017_hr.hea"), "18": Path("p/records500/00000/00018_hr.hea")}
        chosen, absent = choose_questions(questions, Records(files))
        assert [question.records for question in chosen] == [("17",)]  # and not of CODE-15%'s 17
        text = "questions whose records are not there"
        assert count_absent(absent) == {f"{text}, named mimic_v4/...": 1, f"{text}, named code15_v4/...": 2, text: 1}
        files = {"exams_part0#17": Path("c/exams_part0.hdf5#17"), MIMIC: Path(f"m/{MIMIC}.hea")}
        chosen, _ = choose_questions(questions, Records(files, {"17": {"exams_part0#17"}}))
        assert [question.records for question in chosen] == [(MIMIC,), ("exams_part0#17",)]

    def test_numbers_that_two_sets_share(self):
        records = Records({"17": np.zeros(1), "18": np.zeros(1)})  # of whatever set
        names = ("ptb-xl/00017_hr-0.png", "code15_v4/18-0.png")
        for name, record in zip(names, ("17", "18"), strict=True):
            ((question,), _) = choose_questions([QuestionRow((name,), [])], records)
            assert question.records == (record,)
        with pytest.raises(
            ValueError, match=r"name ptb-xl/00017_hr-0.png of PTB-XL and code15_v4/18-0.png of CODE-15%:"
        ):
            choose_questions([QuestionRow((name,), []) for name in names], records)

    def test_many_beginnings(self):
        counts = count_absent([*(f"{i}/a" for i in range(20)), "x/a", "x/b"])
        assert len(counts) == 6
        assert counts["questions whose records are not there, named x/..."] == 2
        assert counts["questions whose records are not there, with other names"] == 16

    def test_sets_of_files(self):
        paths = (
            "x/records100/00000/00017_lr.hea",
            f"/m/{MIMIC}.hea",
            "c/exams_part3.hdf5#17",
            "g/A0001.mat",
            "own/a.edf",
        )
        assert [set_of(path) for path in paths] == [
            *("PTB-XL", "MIMIC-IV-ECG", "CODE-15%", "the PhysioNet Challenges", None)
        ]

    def test_types_that_are_kept(self):
        questions = [QuestionRow(("a",), [], columns={"question_type": kind}) for kind in ("x-1", "y", "x-2")]
        chosen, absent = choose_questions(questions, Records({"a": 1}), ["x*"])
        assert [question.columns["question_type"] for question in chosen] == ["x-1", "x-2"]
        assert absent == []
        with pytest.raises(ValueError, match="--question_types z fits none of x-1, x-2, y"):
            choose_questions(questions, Records({"a": 1}), ["z"])

    def test_pulse_with_real_records(self, shared):
        """ECGBench's reports about PTB-XL, asked by picture alone, find the records that are here."""
        folder = shared / "data"
        questions = list(
            read_questions(folder / "ecgbench_pulse" / "ptb_test_report_500.jsonl", names={"record": "image"})
        )
        chosen, absent = choose_questions(questions, find_records(folder / "ptbxl" / "raw500.npz"))
        assert len(chosen) + len(absent) == 500
        assert all(absent)
        by_number = list(read_questions(folder / "ecgbench_pulse" / "ptb_test_report_500.jsonl"))
        same, _ = choose_questions(by_number, find_records(folder / "ptbxl" / "raw500.npz"))
        assert [question.records for question in chosen] == [question.records for question in same]
        assert contents(same[0])[0] == "Please write a clinical report based on this ECG."


class TestRecordColumns:
    @pytest.mark.parametrize("column", ["ecg", "ecg_path", "image", "image_path", "time_series", "objects.ecg"])
    @pytest.mark.parametrize("chat", ["messages", "conversations", "conversation"])
    def test_columns(self, column, chat):
        outer, _, inner = column.partition(".")
        turns = said("Is it?", "yes")
        for value, records in (("a", ("a",)), (["a", "b"], ("a", "b")), ([{"path": "a"}], ("a",))):
            row = {outer: {inner: value} if inner else value, chat: turns}
            (question,) = read_questions([row])
            assert question.records == records
            assert question.columns == {}

    def test_arrays_are_no_names(self):
        row = {"ecg": {"array": [[1, 2]]}, "time_series": [[1, 2]], "image": "a", "question": "Is it?", "answer": "no"}
        (question,) = read_questions([row])
        assert question.records == ("a",)

    def test_names_of_all_columns(self, tmp_path):
        row = {"bild": "a", "dialog": said("Is it?", "yes"), "fold": "dev", "kind": "verify", "subject": 7.0}
        names = {
            **{
                "record": "bild",
                "messages": "dialog",
                "split": "fold",
                "question_type": "kind",
                "patient_id": "subject",
            }
        }
        for name in ("q.json", "q.parquet"):
            (question,) = read_questions(write_rows(tmp_path / name, row), names=names)
            assert (question.records, question.split, question.patients) == (("a",), "validation", ("7",))
            assert question.columns == {"question_type": "verify"}
            assert contents(question) == ["Is it?", "yes"]

    def test_columns_of_another_table(self):
        names = {"answer": "response", "patient_id": "subject"}
        row = {"record": "a", "question": "Is it?", "response": "yes"}
        (question,) = read_questions([row], names=names, elsewhere=["patient_id"])
        assert question.patients == (None,)
        with pytest.raises(ValueError, match=r"no column subject; it has record, question, response\.$"):
            list(read_questions([row], names=names))
        with pytest.raises(ValueError, match=r"no column Response; .*Did you mean response\?"):
            list(read_questions([row], names={"answer": "Response"}))

    def test_a_sheet_of_excel(self, tmp_path):
        file = write_rows(tmp_path / "train.xlsx", {**ROW, "record": 17, "answer": 2.0})
        for source in (file, f"{file}#Sheet", tmp_path):
            (question,) = read_questions(source)
            assert question.records == ("17",)
            assert question.split == (None if source == file else "train") or source != tmp_path
            assert contents(question) == ["Is it?", "2"]
        (tmp_path / "~$train.xlsx").write_bytes(b"of Excel, while the file is open")
        assert len(list(read_questions(tmp_path))) == 1

    def test_placeholders_alone(self):
        """An ECG without words may be a question, but no answer."""
        (question,) = read_questions([{**ROW, "question": "<ECG> <image>"}])
        assert contents(question) == ["", "yes"]
        with pytest.raises(ValueError, match="What the assistant says is '<ecg>'"):
            list(read_questions([{**ROW, "answer": "<ecg>"}]))


class TestBuilt:
    """`--columns` over the two tables of a dataset."""

    ASKED = [{"filename": name, "prompt": "Is it?", "response": "yes", "site": "x"} for name in "abc"]
    ABOUT = [{"filename": name, "subject": f"s{name}", "years": 50, "prompt": "of nobody"} for name in "abc"]

    def build(self, *columns: str, **options: Any) -> Any:
        ecg = {"array": np.ones((12, 50)), "sampling_rate": 100, "unit": "mV"}
        names = ["question=prompt", "answer=response", "record=filename", *columns]
        return build_dataset(dict.fromkeys("abc", ecg), self.ASKED, columns=names, metadata=self.ABOUT, **options)

    def test_columns_of_both(self):
        data = self.build("patient_id=subject", "age=years", "site", shares=(1, 0, 0))["train"]
        rows = {row["record_id"]: row for row in data}
        assert {name: row["patient_id"] for name, row in rows.items()} == {name: f"s{name}" for name in "abc"}
        assert [rows["a"][name] for name in ("age", "site")] == [50, "x"]
        assert [turn["content"] for turn in rows["a"]["messages"]] == ["Is it?", "yes"]
        data = self.build("patient_id=subject", "alter=years", metadata_columns=["alter"], shares=(1, 0, 0))["train"]
        assert data[0]["alter"] == 50

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ("patient_id=Subject", "Question 1 has no column Subject; it has filename, prompt, response, site"),
            ("years", "Question 1 has no column years"),  # of --metadata, where it would have to be named
            ("alter=years", "Question 1 has no column years"),
            ("split=sight", r"no column sight; .* Did you mean site\?"),
        ],
    )
    def test_at_fault(self, column, message):
        with pytest.raises(ValueError, match=message):
            self.build(column)


class TestRows:
    def read(self, tmp_path: Path, *rows: dict[str, Any], name: str = "questions.jsonl", **options: Any) -> list:
        return list(read_questions(write_rows(tmp_path / name, *rows), **options))

    def test_question_and_answer(self, tmp_path):
        row = {"ecg_id": 17, "question": " Is it? ", "answer": 3, "patient_id": 5.0, "split": "Valid", "grade": 2}
        (question,) = self.read(tmp_path, row)
        assert question.records == ("17",)
        assert question.patients == ("5",)
        assert question.split == "validation"
        assert question.messages == [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "3"}]
        assert question.columns == {"grade": 2}

    def test_names_of_theirs(self, tmp_path):
        """Their text stays a text, also where it is a number; what is no name of theirs is said."""
        names = {"question": "Frage", "answer": "Antwort", "record": "EKG", "grade": "Note"}
        row = {"EKG": "a", "Frage": "How long?", "Antwort": "1.50", "Note": "2", "answer": "not this"}
        for name in ("questions.csv", "questions.json"):
            (question,) = self.read(tmp_path, row, name=name, names=names)
            assert question.records == ("a",)
            assert [turn["content"] for turn in question.messages] == ["How long?", "1.50"]
            assert question.columns == {"grade": 2 if name.endswith("csv") else "2"}
        (question,) = read_questions([row], names=names)
        assert question.messages[1]["content"] == "1.50"
        for source in (write_rows(tmp_path / "q.csv", row), write_rows(tmp_path / "q.jsonl", row), [row]):
            with pytest.raises(ValueError, match="has no column Antwrot; it has EKG, Frage, Antwort"):
                list(read_questions(source, names={"answer": "Antwrot"}))

    def test_roles_as_chats_spell_them(self, tmp_path):
        turns = [{"role": "Human", "content": "Is it?"}, {"role": "model", "content": "yes"}]
        (question,) = self.read(tmp_path, {"record": "a", "messages": turns})
        assert [turn["role"] for turn in question.messages] == ["user", "assistant"]

    def test_several_records_in_csv(self, tmp_path):
        row = {"record": "[46, 81]", "question": "Is it?", "answer": "no", "patient_id": '["a", "b"]'}
        (question,) = self.read(tmp_path, row, name="questions.csv")
        assert question.records == ("46", "81")
        assert question.patients == ("a", "b")

    def test_one_patient_of_several_records(self, tmp_path):
        (question,) = self.read(tmp_path, {**ROW, "record": ["a", "b"], "patient_id": "p"})
        assert question.patients == ("p", "p")

    def test_chats(self, tmp_path):
        turns = [
            {"role": "system", "content": "Be brief."},
            *({"role": r, "content": r} for r in ("user", "assistant")),
        ]
        said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A normal image."}]
        one, two = self.read(tmp_path, {"record": "a", "messages": turns}, {"record": "a", "conversation": said})
        assert one.messages == turns
        assert [turn["content"] for turn in two.messages] == ["What?", "A normal image."]

    def test_split_by_name(self, tmp_path):
        write_rows(tmp_path / "qa" / "train" / "0.json", ROW)
        write_rows(tmp_path / "qa" / "valid" / "0.json", ROW, {**ROW, "split": "test"})
        write_rows(tmp_path / "qa" / "other" / "test.csv", ROW)
        assert sorted(str(question.split) for question in read_questions(tmp_path / "qa")) == [
            *("test", "test"),
            *("train", "validation"),
        ]

    def test_where_the_questions_lie_is_no_split(self, tmp_path):
        file = write_rows(tmp_path / "test" / "questions.csv", ROW)
        assert [question.split for path in (file, file.parent) for question in read_questions(path)] == [None, None]

    def test_answers_that_are_lists(self, tmp_path):
        row = {**ROW, "answer": ["qt interval", "p duration"]}
        (as_is,), (as_sorted,) = self.read(tmp_path, row), self.read(tmp_path, row, sort_answers=True)
        assert as_is.messages[1]["content"] == "qt interval; p duration"
        assert as_sorted.messages[1]["content"] == "p duration; qt interval"

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"question": "Is it?", "answer": "yes"}, "expected its record in one of record, record_id"),
            ({**ROW, "question": " "}, "What the user says is ' '"),
            ({**ROW, "answer": []}, "What the assistant says is ''"),
            ({**ROW, "answer": True}, "What the assistant says is True"),
            ({"record": "a", "question": "Is it?", "answer": None}, "What the assistant says is None"),
            (
                {"record": "a", "question": "Is it?"},
                "columns record, question, but no answer. --columns answer=NAME says",
            ),
            ({"record": "a"}, "but no question and no answer. --columns question=NAME says"),
            (
                {"time_series": [[0.1, 0.2]], "question": "Is it?", "answer": "yes"},
                r"Its time_series is '\[\[0.1, 0.2\]\]', which names no record; .*--columns record=NAME says",
            ),
            ({"EKG": "a"}, "columns EKG; expected its record in one of record, .*--columns record=NAME says"),
            ({"record": "a", "messages": [{"role": "user", "content": "Is it?"}]}, "lack a question or an answer"),
            ({"record": "a", "messages": [{"role": "doctor", "content": "x"}]}, "is no turn"),
            ({"record": "a", "conversation": [{"from": "doctor", "value": "x"}]}, "is no turn"),
            ({**ROW, "split": "holdout"}, "Its split is 'holdout'; expected train, validation, test"),
            ({**ROW, "record": ["a", "b", "c"], "patient_id": ["p", "q"]}, "2 patients and 3 records"),
        ],
    )
    def test_at_fault(self, row, message, tmp_path):
        with pytest.raises(ValueError, match=f"questions.jsonl, row 2: .*{message}"):
            self.read(tmp_path, ROW, row)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="No questions at"):
            list(read_questions(tmp_path))

    def test_ecg_qa(self, shared):
        questions = list(read_questions(shared / "data" / "ecg_qa" / "ecgqa_ptbxl_matched.jsonl"))
        assert len(questions) == 5766
        compared = questions[0]
        assert compared.records == ("46", "81")
        assert compared.split == "test"
        assert compared.columns["question_type"] == "comparison_irrelevant-query"
        assert compared.columns["template_id"] == 69
        assert len(list(read_questions(shared / "data" / "ecg_qa" / "ecgqa_ptbxl_diverse200.jsonl"))) == 200

    def test_pulse(self, shared):
        questions = list(read_questions(shared / "data" / "ecgbench_pulse" / "ptb_test_report_500.jsonl"))
        assert len(questions) == 500
        assert questions[0].messages[1]["content"] == "Sinus rhythm, normal axis, normal ECG."
