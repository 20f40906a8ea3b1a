import logging
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from elm_ecg.training.data.loading import ecgs_of, load_split
from elm_ecg.training.data.report_rows import as_reports, load_reports
from elm_ecg.training.data.streams import load_stream
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


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def reports(data):
    assert all(row["messages"][0] == {"role": "user", "content": ""} for row in data)
    assert all([turn["role"] for turn in row["messages"]] == ["user", "assistant"] for row in data)
    return [row["messages"][1]["content"] for row in data]


@pytest.fixture
def with_reports(tmp_path):
    """Questions about three records, one without a report; a record of two questions has its report once."""
    rows = [("a", " AF. "), ("b", None), ("a", " AF. "), ("c", "Sinus rhythm."), ("d", " ")]
    return save(
        tmp_path / "reports",
        [
            {"ecg": ecg_of(index), "record_id": name, "report": report, "messages": chat("Is it AF?", "yes")}
            for index, (name, report) in enumerate(rows)
        ],
    )


def test_a_column_of_reports(with_reports, caplog):
    with caplog.at_level(logging.WARNING):
        data = load_reports(arguments(with_reports), "train")
    assert reports(data) == ["AF.", "Sinus rhythm."]
    assert data["record_id"][:] == ["a", "c"]
    (ecg,) = ecgs_of(data[1])
    assert np.array_equal(ecg["array"], np.array(ecg_of(3)["array"]))
    assert "2 of 4 rows are left out, as they have no report" in caplog.text
    assert load_reports(arguments(with_reports), "test") is None


def test_a_stream_has_the_report_of_each_row(with_reports):
    args = arguments(with_reports)
    stream = load_stream(args, "train", column="ecg", change=lambda part, name: as_reports(part, name))
    rows = list(stream)
    assert reports(rows) == ["AF.", "AF.", "Sinus rhythm."]
    assert np.array_equal(ecgs_of(rows[2])[0]["array"], np.array(ecg_of(3)["array"]))
    assert stream.left_out == 2


def test_bare_texts_and_other_columns(tmp_path):
    """As the reference's, which are the answer to an ECG without words; a column `text`; one that is named."""
    bare = save(tmp_path / "bare", [{"ecg": ecg_of(0), "messages": chat("", f"r{index}")} for index in range(2)])
    text = save(tmp_path / "text", [{"ecg": ecg_of(0), "text": "one", "diagnosis": "other", "age": 3}])
    assert reports(load_reports(arguments(bare), "train")) == [
        "r0",
        "r1",
    ]  # each row, as nothing says which record it is of
    assert reports(load_reports(arguments(text), "train")) == ["one"]
    assert reports(load_reports(arguments(bare, text), "train")) == ["r0", "r1", "one"]
    assert reports(load_reports(arguments(text), "train", report_column="diagnosis")) == ["other"]
    with pytest.raises(ValueError, match=r"The age of the row .* is a int; expected a text"):
        load_reports(arguments(text), "train", report_column="age")


def test_chats_that_ask(tmp_path):
    """What is answered to a question is a report only where the user says so."""
    asks = save(tmp_path / "asks", [{"ecg": ecg_of(0), "messages": chat("Write a report.", "AF.")}])
    with pytest.raises(ValueError, match=r"Row 0 of .*asks asks 'Write a report.'.* --report_column messages"):
        load_reports(arguments(asks), "train")
    assert reports(load_reports(arguments(asks), "train", report_column="messages")) == ["AF."]
    stream = load_stream(
        arguments(asks), "train", column="ecg", change=lambda part, name: as_reports(part, name, "messages")
    )
    assert reports(list(stream)) == ["AF."]


def test_errors(with_reports, tmp_path):
    with pytest.raises(ValueError, match=r"has the columns .*; expected reports in one of report, text, messages"):
        load_reports(arguments(with_reports), "train", report_column="finding")
    none = save(tmp_path / "none", [{"ecg": ecg_of(0), "report": ""}])
    with pytest.raises(ValueError, match="all of its 1 rows have no report"):
        load_reports(arguments(none), "train")


def test_ecgs_are_not_written_anew(with_reports):
    """The table of a dataset stays where it is."""
    part = load_split(str(with_reports), "train", "ecg")
    data = as_reports(part, "reports")
    assert {file["filename"] for file in part.cache_files} <= {file["filename"] for file in data.cache_files}
