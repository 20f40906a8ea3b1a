import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from elm_ecg.ecg_utils import as_record
from elm_ecg.training import cli
from elm_ecg.training.data import check as data_check
from elm_ecg.training.data.check import Checker
from elm_ecg.training.dataset_commands import main

LEADS = ["I", "II"]


def signal(seed: int, num_samples: int = 1000) -> np.ndarray:
    """Microvolts [2, samples] in which nothing is flat or noisy."""
    time = np.arange(num_samples) / 500
    return (800 * np.sin(2 * np.pi * (1 + 0.01 * seed) * time + np.array([[0.0], [1.0]]))).astype(np.int16)


def ecg_of(array: np.ndarray, sampling_rate: int = 500) -> dict[str, Any]:
    unit = "mV" if array.dtype.kind == "f" else "uV"
    return {"array": array, "sampling_rate": sampling_rate, "lead_names": LEADS[: len(array)], "unit": unit}


def make_row(number: int, **changes: Any) -> dict[str, Any]:
    question, answer = changes.pop("question", "Is it?"), changes.pop("answer", "yes")
    return {
        "ecg": ecg_of(signal(number)),
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "record_id": f"record {number}",
        "patient_id": f"patient {number}",
        "question_type": "verify",
    } | changes


def check(**splits: list[dict[str, Any]]) -> Checker:
    checker = Checker()
    for split, rows in splits.items():
        for index, row in enumerate(rows):
            checker.add(row, split, index)
    checker.finish()
    return checker


def found(**splits: list[dict[str, Any]]) -> dict[str, tuple[int, str]]:
    """Finding -> how often, and its first example."""
    findings = check(**splits).findings
    return {kind: (finding.count, finding.examples[0]) for kind, finding in findings.items()}


def save(folder: Path, **splits: list[dict[str, Any]]) -> str:
    listed = {
        split: [
            {
                **row,
                "ecg": {**row["ecg"], "array": row["ecg"]["array"].tolist()}
                if isinstance(row["ecg"], dict)
                else row["ecg"],
            }
            for row in rows
        ]
        for split, rows in splits.items()
    }
    DatasetDict({split: Dataset.from_list(rows) for split, rows in listed.items()}).save_to_disk(folder)
    return str(folder)


def test_nothing_to_find():
    assert found(train=[make_row(0), make_row(1)], test=[make_row(2)]) == {}


class TestLeaks:
    def test_patient(self):
        leaking = make_row(1, patient_id="patient 0")
        assert found(train=[make_row(0)], test=[leaking, leaking])["shared_patients"] == (1, "patient 0 (test, train)")

    def test_record(self):
        leaking = make_row(1, record_id="record 0")
        assert found(train=[make_row(0)], test=[leaking])["shared_records"] == (1, "record 0 (test, train)")

    @pytest.mark.parametrize(
        "copy", [signal(0), (signal(0) / 1000).astype(np.float32)], ids=["as integers", "as millivolts"]
    )
    def test_signal_under_another_name(self, copy):
        findings = found(train=[make_row(0)], test=[make_row(1, ecg=ecg_of(copy))])
        assert findings["shared_signals"] == (1, "record 0 (test, train)")
        assert findings["copied_signals"] == (1, "record 0 and record 1")

    def test_signal_of_another_rate_is_another(self):
        assert found(train=[make_row(0)], test=[make_row(1, ecg=ecg_of(signal(0), 499))]) == {}

    def test_one_of_several_ecgs(self):
        pair = {"ecg": [ecg_of(signal(1)), ecg_of(signal(0))], "record_id": ["1", "0"], "patient_id": ["1", "0"]}
        row = make_row(0, ecg=[ecg_of(signal(0))], record_id=["0"], patient_id=["0"])
        findings = found(train=[row], test=[make_row(1, **pair)])
        assert (
            findings["shared_patients"]
            == findings["shared_records"]
            == findings["shared_signals"]
            == (1, "0 (test, train)")
        )

    def test_empty_signals_are_alike(self):
        empty = ecg_of(np.zeros((2, 1000), np.int16))
        findings = found(train=[make_row(0, ecg=empty)], test=[make_row(1, ecg=empty, question="And now?")])
        assert findings == {"flagged_leads": (1, "train 0: I, II")}

    def test_a_record_without_id(self):
        rows = {"train": [make_row(0, record_id=None)] * 2, "test": [make_row(0, record_id=None, patient_id="p")]}
        findings = found(**rows)
        assert findings["shared_signals"] == (1, "without record_id (test, train)")
        assert "copied_signals" not in findings


class TestChats:
    def test_empty_answer(self):
        assert found(train=[make_row(0), make_row(1, answer=" ")])["empty_answers"] == (1, "train 1")

    def test_empty_question(self):
        assert found(train=[make_row(0, question="")]) == {"empty_questions": (1, "train 0")}

    def test_no_answer(self):
        assert found(train=[make_row(0, messages=[{"role": "user", "content": "Is it?"}])]) == {
            "no_answer": (1, "train 0")
        }

    @pytest.mark.parametrize(
        ("messages", "message"),
        [
            ([], "has no messages"),
            (None, "has no messages"),
            ("Is it?", "has no messages, but 'Is it?'"),
            ([{"role": "user", "content": None}], "'content': None"),
            ([*make_row(0)["messages"], {"role": "tool", "content": "x"}], "'role': 'tool'"),
            ([*make_row(0)["messages"], {"role": None, "content": "x"}], "'role': None"),
        ],
    )
    def test_malformed(self, messages, message):
        findings = found(train=[make_row(0, messages=messages), make_row(1)])
        assert list(findings) == ["unusable_chats"]
        assert findings["unusable_chats"][0] == 1
        assert message in findings["unusable_chats"][1]

    def test_no_question(self):
        count, example = found(train=[make_row(0, messages=[{"role": "assistant", "content": "yes"}])])[
            "unusable_chats"
        ]
        assert count == 1
        assert "no user message" in example

    def test_places(self):
        parts = [{"type": "ecg"}, {"type": "ecg"}, {"type": "text", "text": "Which?"}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "The second."}]
        findings = found(train=[make_row(0, messages=messages)])
        assert list(findings) == ["unusable_chats"]
        assert "2 places for ECGs" in findings["unusable_chats"][1]

    def test_repeated_and_contradictory(self):
        rows = [make_row(0), make_row(0), make_row(0, question="Is it not?"), make_row(0, answer="no"), make_row(1)]
        assert found(train=rows) == {"repeated_questions": (2, "train 1"), "contradictory_answers": (1, "train 3")}

    def test_balance(self):
        several = [turn for answer in ("no", "x" * 300) for turn in make_row(0, answer=answer)["messages"]]
        rows = [make_row(0), make_row(1), make_row(2, answer="no"), make_row(3, messages=several)]
        rows.append(make_row(4, messages=several, question_type=["a", "b"]))
        rows.append(make_row(5, question_type=None))
        answers = check(train=rows).splits["train"].as_dict()["answers"]
        assert answers == {
            "a": {"answers": 1, "different": 1, "shares": {"no": 1.0}},
            "all": {"answers": 1, "different": 1, "shares": {"yes": 1.0}},
            "b": {"answers": 1, "different": 1, "shares": {"x" * 200 + "...": 1.0}},
            "verify": {"answers": 5, "different": 3, "shares": {"yes": 0.4, "no": 0.4, "x" * 200 + "...": 0.2}},
        }


class TestECGs:
    def test_missing_and_broken_files(self, tmp_path):
        (tmp_path / "broken.npz").write_bytes(b"nothing")
        np.savez(tmp_path / "good.npz", array=signal(0), sampling_rate=500, lead_names=LEADS, unit="uV")
        paths = [str(tmp_path / name) for name in ("good.npz", "broken.npz", "gone.npz", "gone.npz")]
        checker = check(train=[make_row(number, ecg=path) for number, path in enumerate(paths)])
        findings = checker.findings
        assert findings["missing_files"].count == 1
        assert findings["missing_files"].examples == [f"train 2: {paths[2]}"]
        assert findings["unreadable_ecgs"].count == 1
        assert "broken.npz" in findings["unreadable_ecgs"].examples[0]
        assert dict(checker.splits["train"].rates) == {"500 Hz": 1}

    def test_files_that_are_not_read(self, tmp_path):
        (tmp_path / "a.npz").write_bytes(b"nothing")
        checker = Checker()
        for index in range(2):
            checker.add(make_row(0, ecg=str(tmp_path / "a.npz")), "train", index, read_files=False)
        assert list(checker.findings) == ["repeated_questions"]

    def test_a_file_in_two_splits(self, tmp_path):
        np.savez(tmp_path / "a.npz", array=signal(0), sampling_rate=500, lead_names=LEADS, unit="uV")
        row = make_row(0, ecg=str(tmp_path / "a.npz"), record_id=None)
        assert {"shared_records", "shared_signals"} <= set(found(train=[row], test=[row]))

    def test_arrays_at_fault(self):
        short = make_row(0, ecg={"array": signal(0), "sampling_rate": 0, "lead_names": LEADS, "unit": "uV"})
        count, example = found(train=[short])["unreadable_ecgs"]
        assert count == 1
        assert "sampling_rate is 0" in example

    def test_none(self):
        assert found(train=[make_row(0, ecg=None)]) == {"without_ecg": (1, "train 0")}

    def test_made_ecgs_are_no_records(self):
        rows = [make_row(0, ecg="noise"), make_row(0, ecg="flatline")]
        assert found(train=rows, test=[{**row, "patient_id": "p"} for row in rows]) == {}

    def test_histograms(self):
        long, lead = ecg_of(signal(1, 5000)), ecg_of(signal(2)[:1], 250)
        report = (
            check(train=[make_row(0), make_row(0), make_row(1, ecg=long), make_row(2, ecg=lead)])
            .splits["train"]
            .as_dict()
        )
        assert report["rates"] == {"500 Hz": 3, "250 Hz": 1}
        assert report["leads"] == {"2: I II": 3, "1: I": 1}
        assert report["seconds"] == {"shortest": 2.0, "median": 4.0, "longest": 10.0}
        assert [report["rows"], report["records"], report["patients"]] == [4, 3, 3]

    def test_quality(self):
        flat = signal(0).copy()
        flat[1] = 0
        checker = check(train=[make_row(0, ecg=ecg_of(flat)), make_row(0, ecg=ecg_of(flat), question="And now?")])
        assert checker.findings["flagged_leads"].count == 1  # one ECG, two questions
        assert dict(checker.splits["train"].flags) == {"II flat": 1}

    def test_limb_leads(self):
        array = np.concatenate([signal(0), signal(1)[:1]])
        wrong = {**ecg_of(array), "lead_names": ["I", "II", "III"]}
        assert found(train=[make_row(0, ecg=wrong)])["limb_leads"][0] == 1

    def test_notices_are_counted_by_ecg(self, monkeypatch):
        noticed = {"notices": ("Lead V4R was left out.",)}
        monkeypatch.setattr(data_check, "as_record", lambda ecg: replace(as_record(ecg), metadata=noticed))
        checker = check(train=[make_row(0), make_row(0, question="And now?"), make_row(1)])
        assert dict(checker.notices) == {"Lead V4R was left out.": 2}

    def test_unknown_patient(self):
        assert found(train=[make_row(0, patient_id=None)]) == {"unknown_patients": (1, "train 0")}


class TestCommand:
    def test_good(self, tmp_path, capsys):
        data = save(tmp_path / "data", train=[make_row(0), make_row(1)], test=[make_row(2, answer="no")])
        assert cli.main(["data", "check", data, "--output", str(tmp_path / "report.json")]) == 0
        output = capsys.readouterr().out
        assert "train: 2 rows, 2 records, 2 patients" in output
        assert "'yes' 100.0%" in output
        assert "no errors, 0 kinds of warnings" in output
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["errors"] == report["warnings"] == {}
        assert report["splits"]["test"]["answers"]["verify"]["shares"] == {"no": 1.0}

    def test_planted_faults(self, tmp_path, capsys):
        """A leak, a missing file and an empty text."""
        rows = [make_row(0, ecg=None), make_row(1, ecg="gone.npz"), make_row(2, answer="", ecg=None)]
        data = save(tmp_path / "data", train=rows, test=[make_row(0, ecg=None)])
        arguments = ["data", "check", data, "--ecg_root", str(tmp_path), "--output", str(tmp_path / "report.json")]
        assert cli.main(arguments) == 1
        captured = capsys.readouterr()
        for text in (
            "patients in several splits (1)",
            "files of ECGs that are not there (1)",
            "chats with an empty answer (1)",
        ):
            assert f"error: {text}" in captured.out
            assert text in captured.err.splitlines()[-1]
        assert "patient 0 (test, train)" in captured.out
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["notices"] == {}
        assert report["errors"]["missing_files"] == {"count": 1, "examples": [f"train 1: {tmp_path / 'gone.npz'}"]}
        assert cli.main([*arguments, "--splits", "test"]) == 0

    @pytest.mark.parametrize(("options", "status"), [([], 0), (["--read_files"], 1)])
    def test_reads_a_sample_of_the_files(self, options, status, tmp_path, monkeypatch):
        monkeypatch.setattr("elm_ecg.training.data.check.SAMPLED_ROWS", 2)
        for number in range(4):
            np.savez(tmp_path / f"{number}.npz", array=signal(number), sampling_rate=500, lead_names=LEADS, unit="uV")
        (tmp_path / "3.npz").write_bytes(b"nothing")
        rows = [make_row(number, ecg=str(tmp_path / f"{number}.npz")) for number in range(4)]
        data = save(tmp_path / "data", train=rows)
        assert cli.main(["data", "check", data, "--ecg_root", str(tmp_path), *options]) == status

    def test_folds(self, tmp_path):
        """A patient may be in the training of one fold and in the test of another."""
        rows = [make_row(number) for number in range(2)]
        folds = {"fold1_train": rows[:1], "fold1_test": rows[1:], "fold2_train": rows[1:], "fold2_test": rows[:1]}
        data = save(tmp_path / "data", **folds)
        main(["check", data, "--fold", "2"])
        with pytest.raises(ValueError, match="choose one with --fold"):
            main(["check", data])

    def test_unknown_split(self, tmp_path):
        with pytest.raises(ValueError, match="has no split validation; it has train"):
            main(["check", save(tmp_path / "data", train=[make_row(0)]), "--splits", "validation"])
