import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from elm_ecg.training import cli
from elm_ecg.training.data.build import build_dataset
from elm_ecg.training.data.loading import ecgs_of
from elm_ecg.training.data.record_rows import load_records, report_of
from elm_ecg.training.data.synthetic import make_record


def arguments(*data, **changes):
    settings = {"fold": None, "ecg_root": None, "data_weights": None, "data_subset": None, **changes}
    return SimpleNamespace(data=[str(name) for name in data], **settings)


def ecg_of(index):
    ecg = make_record(index, 0, sampling_rate=100, seconds=5.0)["ecg"]
    return {**ecg, "array": ecg["array"].tolist()}


def save(folder, rows):
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(folder)
    return folder


def test_each_record_once(tmp_path):
    """By its name, where the ECG is in the row; rows without a name are of records of their own, and rows without ECG of none."""
    names = ["a", "b", "a", None, None, "c", "b"]
    rows = [{"ecg": ecg_of(index), "record_id": name, "report": f"r{index}"} for index, name in enumerate(names)]
    rows.append({"ecg": None, "record_id": "d", "report": "no ECG"})
    found = load_records(arguments(save(tmp_path / "data", rows)), "train", report_column="report")
    assert found["report"] == ["r0", "r1", "r3", "r4", "r5"]
    (ecg,) = ecgs_of(found[1])
    assert np.array_equal(ecg["array"], np.array(ecg_of(1)["array"]))


def test_records_of_questions_are_read_once(tmp_path):
    """Of what `elm data build` writes, whose rows name records."""
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for index in range(3):
        np.savez(recordings / f"{index}.npz", **make_record(index, 0, sampling_rate=100, seconds=5.0)["ecg"])
    questions = [{"record": str(index % 3), "question": f"Is it {index}?", "answer": "no"} for index in range(12)]
    (tmp_path / "questions.json").write_text(json.dumps(questions))
    options = ["--questions", str(tmp_path / "questions.json"), "--split_by", "record", "--shares", "1", "0", "0"]
    assert cli.main(["data", "build", str(recordings), *options, "--output_dir", str(tmp_path / "data")]) == 0
    found = load_records(arguments(tmp_path / "data"), "train", report_column="messages")
    assert sorted(found["record_id"]) == ["0", "1", "2"]
    assert {report_of(row, "messages") for row in found} == {"no"}
    assert load_records(arguments(tmp_path / "data"), "test") is None


def test_several_datasets(tmp_path):
    """Each has its own names; what one of them lacks is empty."""
    one = save(tmp_path / "one", [{"ecg": ecg_of(0), "record_id": "a", "report": "x"}])
    other = save(tmp_path / "other", [{"ecg": ecg_of(1), "record_id": "a"}])
    found = load_records(arguments(one, other), "train", report_column="report")
    assert [report_of(row, "report") for row in found] == ["x", ""]
    assert len(load_records(arguments(one, other, data_subset=0.5), "train")) == 1


def test_errors(tmp_path):
    plain = save(tmp_path / "plain", [{"ecg": ecg_of(0), "record_id": "a", "age": 3}])
    with pytest.raises(
        ValueError, match=r"--report_column report: .*plain \(train\) has no such column; it has age, ecg, record_id"
    ):
        load_records(arguments(plain), "train", report_column="report")
    several = save(tmp_path / "several", [{"ecg": [ecg_of(0), ecg_of(1)], "record_id": ["a", "b"]}])
    with pytest.raises(ValueError, match=r"hold lists of ECGs.*elm data build --no_questions"):
        load_records(arguments(several), "train")
    with pytest.raises(
        ValueError, match=r"The age of the row a is a int; expected a text: name a column of texts with --report_column"
    ):
        report_of({"record_id": "a", "age": 3}, "age")


def test_what_is_said_of_a_record():
    chat = [{"role": "user", "content": "Report?"}, {"role": "assistant", "content": " Sinus. "}]
    assert report_of({"messages": chat}, "messages") == "Sinus."
    assert report_of({"report": None}, "report") == ""
    assert report_of({}, None) == ""


def test_a_dataset_in_memory_is_as_one_that_was_written(tmp_path):
    ecgs = {str(index): make_record(index, 0, sampling_rate=100, seconds=5.0)["ecg"] for index in range(4)}
    built = build_dataset(ecgs, no_questions=True, split_by="record", shares=(1.0, 0.0, 0.0))
    built.save_to_disk(tmp_path / "data")
    assert sorted(load_records(arguments(tmp_path / "data"), "train")["record_id"]) == ["0", "1", "2", "3"]
