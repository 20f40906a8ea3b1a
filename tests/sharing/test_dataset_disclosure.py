import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elm_ecg.training.sharing.dataset_disclosure import PERSONAL_TEXT, check_dataset, describe_dataset

ROW = {
    "messages": [{"role": "user", "content": "Is the QRS wide?"}, {"role": "assistant", "content": "no; 80 ms"}],
    "ecg": {"array": [[1, 2]], "sampling_rate": 500.0, "lead_names": ["I"], "unit": "uV"},
    "record_id": "2024/0001",
    "patient_id": "p17",
    "question_type": "rhythm",
    "age": 61,
}


def save(folder: Path, metadata: dict[str, str] | None = None, **columns: Any) -> Path:
    """A dataset of one row, with these columns beside or in place of those of `ROW`."""
    (folder / "data").mkdir(exist_ok=True)
    values = {
        name: value if isinstance(value, pa.Array) else pa.array([value]) for name, value in (ROW | columns).items()
    }
    table = pa.table(values)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **(metadata or {})})
    pq.write_table(table, folder / "data" / "train.parquet")
    return folder


def said(role_of_user: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": role_of_user}, ROW["messages"][1]]


def test_a_plain_dataset(tmp_path):
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    for hidden in (".gitattributes", ".cache/huggingface/x"):
        (tmp_path / hidden).write_text("x")
    (tmp_path / "README.md").write_text("# ECGs\n\nReleased in May 2024.\n")
    check_dataset(save(tmp_path))
    check_dataset(save(tmp_path, ecg="records/1.hea"))


@pytest.mark.parametrize(
    ("columns", "name", "words"),
    [
        ({"email": "a"}, "email", "is no column that is kept unless it is named"),
        ({"site": 3}, "site", "is no column"),
        ({"record_id": "John".encode("utf-16")}, "record_id", "holds bytes, in which nobody can look for names"),
        ({"ecg": {**ROW["ecg"], "device": {"serial": 7}}}, "ecg.device.serial", "is no column"),
        ({"messages": said("ECG of 22.11.2002?")}, "messages.content", "'22.11.2002', which looks like a date"),
        ({"messages": said("Reach him at +49 761 270-0123.")}, "messages.content", "a telephone number"),
        ({"messages": said("Ask jane.doe@clinic.example.")}, "messages.content", "'jane.doe@clinic.example'"),
        (
            {"messages": said("Pt. John Smith, rhythm?")},
            "messages.content",
            "'Pt. John Smith', which looks like a name",
        ),
        ({"messages": said("Patient name: Jane Doe")}, "messages.content", "which may be of a patient"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Frau Meyer"}]}]},
            "messages.content.text",
            "name",
        ),
        ({"record_id": pa.array([["1", "Mr. Smith"]])}, "record_id", "'Mr. Smith'"),
        ({"record_id": pa.array(["Mr. Smith"], pa.large_string())}, "record_id", "'Mr. Smith'"),
        ({"record_id": pa.array(["Mr. Smith"]).dictionary_encode()}, "record_id", "'Mr. Smith'"),
        ({"record_id": pa.array([b"Mr. Smith"])}, "record_id", "'Mr. Smith'"),
        (
            {"question_type": pa.array([[("a", "Mr. Smith")]], pa.map_(pa.string(), pa.string()))},
            "question_type.key_value.value",
            "is no column",
        ),
        ({"age": datetime.date(1950, 1, 2)}, "age", "holds dates or times"),
        ({"start_second": datetime.datetime(1950, 1, 2)}, "start_second", "holds dates or times"),
        ({"metadata": {"patient_name": "Meyer"}}, "metadata", "may be of a patient"),
        ({"metadata": {"made": "1950-01-02"}}, "metadata", "looks like a date"),
    ],
)
def test_what_may_tell_who_somebody_is(columns, name, words, tmp_path):
    """It is refused wherever it stands, and shared if that is said of the column, or of the member of one."""
    folder = save(tmp_path, **columns)
    with pytest.raises(ValueError, match="is not shared") as refused:
        check_dataset(folder)
    message = str(refused.value)
    assert f"{name} " in message
    assert words in message
    allow = message.partition("--allow ")[2].split()
    assert name in allow
    check_dataset(folder, allow)
    with pytest.raises(ValueError, match="is not shared"):
        check_dataset(folder, [name for name in allow if name != allow[0]])


def test_metadata_of_fields(tmp_path):
    within = pa.list_(pa.struct([pa.field("of", pa.int64(), metadata={"by": "Mr. Smith"})]))
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"age": pa.array([[{"of": 5}]], within)}), tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"age\.of has 'Mr\. Smith'"):
        check_dataset(tmp_path)


def test_all_that_is_found_is_listed(tmp_path):
    save(tmp_path, email="x", messages=said("Pt. John Smith"))
    (tmp_path / "README.md").write_text("Ask jane@clinic.example.")
    with pytest.raises(ValueError, match=r"--allow README\.md email messages\.content$"):
        check_dataset(tmp_path)
    check_dataset(tmp_path, ["README.md", "email", "messages"])


@pytest.mark.parametrize(
    ("text", "message"), [("/home/jane/hospital/DOE.dcm", "a folder of this machine"), (f"hf_{'a' * 30}", "token")]
)
def test_what_nobody_can_allow(text, message, tmp_path):
    for folder in (save(tmp_path, ecg=text), save(tmp_path, metadata={"from": text})):
        with pytest.raises(ValueError, match=message):
            check_dataset(folder, ["ecg", "metadata"])


@pytest.mark.parametrize(
    "text",
    [
        "PR 160 ms, QRS 090 ms, QT 400/430 ms, axis -30 +60 +90",
        "rates 060 080 100; V1-V6; 1.5 x 10^3",
        "Patient has sinus rhythm. Patient with atrial fibrillation",
        "pt with AV block, dr to review",
        "heart rate @ 75/min, 12@leads",
        "phase 2 mobile 12",
        "[66, 6184] 40689238 100-200",
    ],
)
def test_texts_of_ecgs(text, tmp_path):
    assert not PERSONAL_TEXT.search(text)
    check_dataset(save(tmp_path, messages=said(text)))


def test_questions_of_public_datasets(shared, tmp_path):
    """No false alarm in ECG-QA; and PTB-XL's reports do hold a date."""
    questions, reports = (
        (shared / "data" / name).read_text()
        for name in ("ecg_qa/ecgqa_ptbxl_matched.jsonl", "ecgbench_pulse/ptb_test_report_500.jsonl")
    )
    check_dataset(save(tmp_path, messages=said(questions)))
    assert not PERSONAL_TEXT.search(reports)
    with pytest.raises(ValueError, match="'28/7/92', which looks like a date"):
        check_dataset(save(tmp_path, messages=said(reports)))


def test_damaged_dataset(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is no parquet file, or damaged"):
        check_dataset(tmp_path)


def test_description(tmp_path):
    lines = describe_dataset(save(tmp_path)).splitlines()
    assert lines[:2] == [
        "data/train.parquet: 1 row of messages, ecg, record_id, patient_id, question_type, age",
        "The first of them:",
    ]
    assert "Is the QRS wide?" in lines[2]
    assert "  patient_id: p17" in lines
    assert not any("array" in line for line in lines)
