import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from elm_ecg.ecg_utils import as_record
from elm_ecg.training import dataset_commands
from elm_ecg.training.data.build import build_dataset
from elm_ecg.training.evaluation.probe_data import UNKNOWN, load_records
from helpers import write_rows

ECG = {"array": np.ones((12, 20), dtype=np.int16).tolist(), "sampling_rate": 100.0, "unit": "uV"}
ECG["lead_names"] = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]


def save(folder, rows, **changes):
    """The same rows as train, validation and test; `changes` are of single splits."""
    splits = {split: changes.get(split, rows) for split in ("train", "validation", "test")}
    DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items() if rows}).save_to_disk(folder)
    return [str(folder)]


def row(number: int, **columns) -> dict:
    return {"ecg": ECG, "record_id": f"r{number}", "patient_id": f"p{number}", **columns}


def known(records) -> dict[str, list[int]]:
    return dict(zip(records.record_ids, records.labels.tolist(), strict=True))


def test_the_column_labels(tmp_path):
    rows = [
        row(0, labels=["b", "a"]),
        row(1, labels=["a"]),
        row(2, labels=[]),
        row(3, labels=None),
        row(4, labels=["none"]),
    ]
    data = load_records(save(tmp_path, rows), min_records=1)
    assert data.labels == ["a", "b"]
    assert known(data.splits["test"]) == {"r0": [1, 1], "r1": [1, 0], "r2": [0, 0], "r4": [0, 0]}
    assert data.left_out == {"rows without labels": "3"}  # one of each split


def test_columns_of_several_forms(tmp_path):
    rows = [
        row(0, flag=1, text="x; y"),
        row(1, flag=0, text="x"),
        row(2, flag=0, text="none"),
        row(3, flag=None, text="x"),
    ]
    data = load_records(save(tmp_path, rows), ["flag", "text"], min_records=1)
    assert data.labels == ["flag", "x", "y"]
    assert known(data.splits["train"]) == {"r0": [1, 1, 1], "r1": [0, 1, 0], "r2": [0, 0, 0]}


def test_each_record_once(tmp_path):
    rows = [row(0, labels=["a"]), row(1, labels=[]), row(0, labels=["a"])]
    assert len(load_records(save(tmp_path / "rows", rows), min_records=1).splits["train"]) == 2
    windows = [row(number % 2, labels=["a"] * (number % 2), start_second=float(number // 2)) for number in range(4)]
    assert len(load_records(save(tmp_path / "windows", windows), min_records=1).splits["train"]) == 4
    named = [{**one, "record_id": None} for one in rows]
    assert len(load_records(save(tmp_path / "unnamed", named), min_records=1).splits["train"]) == 3


def turns(*pairs: str) -> list[dict]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(pairs)]


def test_questions_with_yes_and_no(tmp_path):
    rows = [
        row(0, question_type="MI", messages=turns("MI?", "yes")),
        row(0, question_type="CD", messages=turns("CD?", "No.")),
        row(1, question_type="MI", messages=turns("MI?", "no")),
        row(1, question_type="rate", messages=turns("How fast?", "72")),
        row(2, question_type="CD", messages=turns("CD?", "yes")),
        row(3, question_type="CD", messages=turns("CD?", "yes")),
        row(3, question_type="CD", messages=turns("CD?", "no")),
    ]
    data = load_records(save(tmp_path, rows), min_records=1)
    assert data.labels == ["CD", "MI"]
    assert known(data.splits["test"]) == {"r0": [0, 1], "r1": [UNKNOWN, 0], "r2": [1, UNKNOWN], "r3": [UNKNOWN] * 2}


@pytest.mark.parametrize("joined", [False, True])
def test_questions_made_of_labels(joined, tmp_path):
    """Those of `elm data build --make_questions` name the label in the column `attribute`."""
    rng = np.random.default_rng(0)
    ecgs = {
        f"{split}{number}": rng.normal(0, 0.2, (12, 100)).astype(np.float32) for split in "abc" for number in range(8)
    }
    names = {record: ["MI"] * (int(record[1:]) % 2) + ["CD"] * (int(record[1:]) // 4) for record in ecgs}
    metadata = [{"record": record, "patient_id": record, "names": ";".join(names[record]) or "none"} for record in ecgs]
    built = build_dataset(
        {record: {"array": array, "sampling_rate": 100} for record, array in ecgs.items()},
        metadata=metadata,
        make_questions=["verify", "query"],
        label_columns=["names"],
        min_records=1,
        shares=(0.4, 0.3, 0.3),
        join_questions=joined,
    )
    built.save_to_disk(tmp_path)
    data = load_records([str(tmp_path)], min_records=1)
    assert data.labels == ["CD", "MI"]
    for records in data.splits.values():
        for record, row_of_labels in known(records).items():
            for label, has in zip(data.labels, row_of_labels, strict=True):
                assert has in (UNKNOWN, int(label in names[record]))
    assert (data.splits["train"].labels != UNKNOWN).any()


def test_ecgs_of_records(tmp_path):
    loud = {**ECG, "array": (5 * np.ones((12, 20), dtype=np.int16)).tolist()}
    rows = [row(0, labels=[]), row(0, labels=[]), {**row(1, labels=["a"]), "ecg": loud}]
    records = load_records(save(tmp_path, rows), min_records=1).splits["train"]
    assert [float(as_record(ecg).array[0, 0]) for ecg in records.ecgs(0, 2)] == pytest.approx([0.001, 0.005])


def test_records_that_a_dataset_stores_once(tmp_path):
    """As `elm data build` writes them, of a table about the records."""
    (tmp_path / "ecgs").mkdir()
    for number in range(6):
        np.savez(
            tmp_path / "ecgs" / f"{number}.npz", **{**ECG, "array": np.full((12, 100), number + 1, dtype=np.int16)}
        )
    folds = (1, 1, 9, 9, 10, 10)
    table = [{"record": n, "patient_id": f"p{n}", "strat_fold": fold, "odd": n % 2} for n, fold in enumerate(folds)]
    metadata = write_rows(tmp_path / "records.csv", *table)
    argv = ["build", str(tmp_path / "ecgs"), "--no_questions", "--metadata", str(metadata), "--metadata_columns", "odd"]
    dataset_commands.main([*argv, "--output_dir", str(tmp_path / "data")])
    data = load_records([str(tmp_path / "data")], ["odd"], min_records=1)
    test = data.splits["test"]
    assert known(test) == {"4": [0], "5": [1]}
    millivolts = {
        name: float(as_record(ecg).array[0, 0]) for name, ecg in zip(test.record_ids, test.ecgs(0, 2), strict=True)
    }
    assert millivolts == pytest.approx({"4": 0.005, "5": 0.006})


def test_a_patient_of_two_splits_is_told(tmp_path, caplog):
    load_records(save(tmp_path, GOOD), min_records=1)
    assert "2 patients are in the split 'train' and in 'test'" in caplog.text
    nameless = [{**one, "patient_id": None} for one in GOOD]
    caplog.clear()
    load_records(save(tmp_path / "nameless", nameless), min_records=1)
    assert not caplog.text


def test_rows_that_compare_ecgs_are_left_out(tmp_path):
    rows = [{**row(number, labels=["a"] * (number % 2)), "ecg": [ECG] * (1 + (number == 4))} for number in range(5)]
    data = load_records(save(tmp_path, rows), min_records=1)
    assert data.splits["train"].record_ids == ["r0", "r1", "r2", "r3"]
    assert data.left_out == {"rows with other than one ECG": "3"}


def test_rare_labels_are_left_out(tmp_path):
    rows = [row(number, labels=["a"] * (number % 2) + ["b"] * (number == 0)) for number in range(8)]
    with_c = [{**one, "labels": one["labels"] + ["c"] * (number < 4)} for number, one in enumerate(rows)]
    data = load_records(save(tmp_path, rows, train=with_c), min_records=2)
    assert data.labels == ["a"]
    assert data.left_out["labels of fewer than 2 training records with or without them (--min_records)"] == "b"
    assert data.left_out["labels that all or no records of validation or test have"] == "c"


GOOD = [row(0, labels=["a"]), row(1, labels=[])]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"validation": []}, {}, "has no split 'validation'. A probe learns from train"),
        (
            {},
            {"label_columns": ["lables"]},
            "--label_columns lables: the split 'train' of --data has no such column. Did you mean labels",
        ),
        (
            {"train": [GOOD[0], {**GOOD[1], "patient_id": "p0"}]},
            {},
            "The split 'train' has 1 patient; expected at least two",
        ),
        (
            {"test": [row(0, labels=None, x=1), row(1, labels=None, x=1)]},
            {},
            "No record of the split 'test' has labels",
        ),
        ({}, {"fold": 3}, "--fold 3 with data without folds"),
        ({}, {"min_records": 3}, r"None of the 1 labels can be probed \(a\)"),
    ],
)
def test_bad_data(changes, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_records(save(tmp_path, GOOD, **changes), **{"min_records": 1} | options)


def test_neither_labels_nor_questions(tmp_path):
    names = save(tmp_path, [row(0), row(1)])
    with pytest.raises(ValueError, match="no column 'labels', and no questions with a question_type; name the columns"):
        load_records(names)
    with pytest.raises(ValueError, match="names one twice"):
        load_records(names * 2)
