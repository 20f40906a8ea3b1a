"""Records that a dataset stores once: written by `elm data build`, read by row groups or from `datasets`' own files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.data import build as data_build
from elm_ecg.training.data import parts as data_parts
from elm_ecg.training.data import records
from elm_ecg.training.data.loading import ecgs_of, load_data, load_dataset
from elm_ecg.training.data.streams import load_stream
from elm_ecg.training.dataset_commands import main
from elm_ecg.training.evaluation.questions import fingerprint_of, list_questions
from elm_ecg.training.resume import fingerprint
from forks import Fork

NAMES = [f"rec {number}#{number % 2}" for number in range(7)]  # of any form


def signal(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(-2000, 2000, (12, 100 + number), dtype=np.int16)


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """Seven records of different lengths in three parts of two row groups, three questions about each."""
    monkeypatch.setattr(data_build, "PART_RECORDS", 3)
    monkeypatch.setattr(data_parts, "ROW_GROUP_RECORDS", 2)
    (tmp_path / "records").mkdir()
    for number, name in enumerate(NAMES):
        np.savez(tmp_path / "records" / f"{name}.npz", ecg=signal(number), sampling_rate=100, unit="uV")
    rows = [
        {"record": name, "question": f"Is it {what}?", "answer": "yes", "split": "train"}
        for name in NAMES
        for what in "xyz"
    ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    main(["build", f"{tmp_path}/records", "--questions", f"{tmp_path}/q.json", "--output_dir", f"{tmp_path}/set"])
    return tmp_path / "set"


def check(rows: Any) -> None:
    seen = []
    for row in rows:
        (ecg,) = ecgs_of(row)
        assert np.array_equal(ecg["array"], signal(NAMES.index(row["record_id"])))
        assert ecg["array"].dtype == np.int16
        assert [ecg["sampling_rate"], ecg["unit"], ecg["lead_names"]] == [100, "uV", list(STANDARD_LEADS)]
        seen.append((row["record_id"], row["messages"][0]["content"]))
    assert sorted(seen) == sorted((name, f"Is it {what}?") for name in NAMES for what in "xyz")


def test_whole(stored, monkeypatch):
    """From memory-mapped files, whatever the order."""
    monkeypatch.setattr(records, "_row_group", None)  # not by row groups
    data = load_dataset(str(stored), "train")
    check(data)
    check(data.shuffle(seed=3))
    check(load_data(DataArguments(data=[str(stored)]), "train"))


def test_in_a_stream(stored, monkeypatch):
    """By row groups, of which few are held; nothing is made beside them."""
    monkeypatch.setattr(records, "HELD_BYTES", 3000)
    read = []
    row_group = records.pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        records.pq.ParquetFile, "read_row_group", lambda *args: read.append(args[1:]) or row_group(*args)
    )
    check(load_stream(DataArguments(data=[str(stored)]), "train"))
    assert (
        sum("array" in columns for _, columns in read) == 5
    )  # each row group once, as rows come in the order of records
    stream = iter(load_stream(DataArguments(data=[str(stored)]), "train", shuffle_buffer=5))
    check([next(stream) for _ in range(21)])
    assert sum(table.nbytes for table in records._held.values()) <= 6000


def replace_column(file: Path, name: str, values: pa.Array) -> None:
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, values), file, row_group_size=2)


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
@pytest.mark.parametrize("nested", [True, False])
def test_as_written_before(stored, kind, nested):
    """With a list for each lead, or lists and values that may be missing."""
    for file in (stored / "records").iterdir():
        arrays = pq.read_table(file)["array"].to_pylist()
        if nested:
            arrays = [np.reshape(flat, (12, -1)).tolist() for flat in arrays]
        replace_column(file, "array", pa.array(arrays, kind(kind(pa.int16()) if nested else pa.int16())))
    check(load_stream(DataArguments(data=[str(stored)]), "train"))
    check(load_dataset(str(stored), "train"))


@pytest.mark.parametrize("leads", [["I"] * 7, []])
def test_amplitudes_that_do_not_fit_the_leads(stored, leads):
    for file in (stored / "records").iterdir():
        replace_column(file, "lead_names", pa.array([leads] * pq.read_metadata(file).num_rows, pa.list_(pa.string())))
    with pytest.raises(ValueError, match=rf"amplitudes for {len(leads)} leads"):
        check(load_dataset(str(stored), "train"))


def test_mixed_with_arrays_and_files(stored, tmp_path):
    """Datasets of other forms beside it."""
    np.savez(tmp_path / "other.npz", ecg=signal(0), sampling_rate=100, unit="uV")
    (tmp_path / "files").mkdir()
    row = {"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "b"}], "ecg": "other.npz"}
    (tmp_path / "files" / "train.jsonl").write_text(json.dumps(row))
    data = load_data(DataArguments(data=[str(stored), str(tmp_path / "files")], ecg_root=str(tmp_path)), "train")
    assert len(data) == 22
    check(row for row in data if row["record_id"])
    assert ecgs_of(data[21])[0] == str(tmp_path / "other.npz")


def test_in_another_process(stored):
    code = """
import sys
from elm_ecg.training.data.loading import ecgs_of, load_dataset
data = load_dataset(sys.argv[1], "train")
print(sum(int(ecgs_of(row)[0]["array"].sum()) for row in data))
"""
    run = Fork(code, str(stored), cwd=stored.parent, environment={**os.environ}, project=True).finish()
    assert int(run.stdout) == 3 * sum(int(signal(number).sum()) for number in range(7)), run.stderr


def test_another_dataset_in_its_place(stored, tmp_path):
    """As where it is built again while a notebook is open: a stream gives what is there now."""

    def sums() -> list[int]:
        rows = load_stream(DataArguments(data=[str(stored)]), "train")
        return [int(ecgs_of(row)[0]["array"].sum(dtype=int)) for row in rows]

    before = sums()
    for number, name in enumerate(NAMES):
        np.savez(tmp_path / "records" / f"{name}.npz", ecg=signal(number) + 1, sampling_rate=100, unit="uV")
    shutil.rmtree(stored)
    main(["build", f"{tmp_path}/records", "--questions", f"{tmp_path}/q.json", "--output_dir", f"{tmp_path}/set"])
    assert not {*sums()} & {*before}


def test_rows_that_were_taken_from_a_dataset(stored, tmp_path):
    """Saved by `datasets`, with names of records that lie elsewhere."""
    load_dataset(str(stored), "train").filter(lambda row: row["record_id"] == NAMES[0]).save_to_disk(tmp_path / "ours")
    rows = datasets.load_dataset(str(stored), split="train")
    rows.filter(lambda row: row["record_id"] == NAMES[0]).save_to_disk(tmp_path / "plain")
    for folder in (tmp_path / "ours", tmp_path / "plain"):
        data = load_dataset(str(folder), "train", ecg_root=str(stored))
        assert len(data) == 3
        assert np.array_equal(ecgs_of(data[0])[0]["array"], signal(0))
        streamed = load_stream(DataArguments(data=[str(folder)], ecg_root=str(stored)), "train")
        assert np.array_equal(ecgs_of(next(iter(streamed)))[0]["array"], signal(0))
        with pytest.raises(ValueError, match=r"there is no folder records in .*; name that dataset's .* --ecg_root"):
            load_dataset(str(folder), "train")


def test_a_record_that_is_not_there(stored):
    path = f"{stored}/records/train-00000-of-00003.parquet#"
    with pytest.raises(
        ValueError, match=r"train-00000-of-00003\.parquet has no record 'nobody', which a row of the dataset"
    ):
        records.read(path + "nobody")
    load_dataset(str(stored), "train")
    with pytest.raises(ValueError, match="has no record 'nobody'"):
        records.read(path + "nobody")


def test_digests_do_not_depend_on_the_place(stored, tmp_path):
    """A dataset that was moved is the same; one with another sample is not."""
    questions = list_questions(load_dataset(str(stored), "train"))

    def digests(folder: Path) -> list[Any]:
        data = load_dataset(str(folder), "train")
        return [fingerprint(data), fingerprint_of(data, questions)]

    first = digests(stored)
    moved = stored.rename(tmp_path / "elsewhere")
    assert digests(moved) == first
    np.savez(tmp_path / "records" / f"{NAMES[0]}.npz", ecg=signal(0) + 1, sampling_rate=100, unit="uV")
    options = ["--questions", f"{tmp_path}/q.json", "--output_dir", f"{tmp_path}/third"]
    main(["build", f"{tmp_path}/records", *options])
    assert not {*map(str, digests(tmp_path / "third"))} & {*map(str, first)}
