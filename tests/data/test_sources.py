import csv
import json
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from elm_ecg.ecg_utils import as_record
from elm_ecg.training.data.sources import find_records, read_metadata


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(json.dumps(rows))
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


class TestRecords:
    def test_names_in_a_folder(self, tmp_path):
        folder = touch(
            tmp_path, "00017.edf", "2024/b.hea", "2024/b.dat", "2024/b.xyz", "c.xml", "c.csv", ".hidden/d.edf"
        )
        records = find_records(folder)
        assert sorted(records.locations) == ["00017", "2024/b", "c.csv", "c.xml"]
        assert records.locations["2024/b"] == folder / "2024" / "b.hea"
        for name in ("00017", "17", "00017.edf", "./00017"):
            assert records.find(name) == "00017"
        for name in ("b", "b.hea", "b.dat", "2024/b", "2024/b.hea", "2024/b.dat", "2024/b.xyz"):
            assert records.find(name) == "2024/b"
        assert records.find("c.xml") == "c.xml"
        assert records.find("d") is None

    def test_a_name_of_several(self, tmp_path):
        records = find_records(touch(tmp_path, "one/a.edf", "two/a.edf", "c.xml", "c.csv"))
        assert records.find("one/a") == "one/a"
        with pytest.raises(ValueError, match="'a' is the name of 2 records: one/a, two/a"):
            records.find("a")
        with pytest.raises(ValueError, match=r"'c' is the name of 2 records: c\.csv, c\.xml"):
            records.find("c")

    def test_names_with_the_folder_in_front(self, tmp_path, monkeypatch):
        touch(tmp_path, "ecgs/records/2024/b.edf", "elsewhere/2024/b.edf")
        monkeypatch.chdir(tmp_path)
        records = find_records(Path("ecgs/records"))
        for front in ("records", "ecgs/records", tmp_path / "ecgs" / "records"):
            assert records.find(f"{front}/2024/b.edf") == records.find(f"{front}/2024/b") == "2024/b"
        assert records.find(str(tmp_path / "elsewhere" / "2024" / "b.edf")) is None

    def test_archive_with_ids(self, tmp_path):
        ecg = np.arange(2 * 12 * 5, dtype=np.int16).reshape(2, 12, 5)
        np.savez(tmp_path / "all.npz", ecg_id=np.array([7, 9]), ecg=ecg, sampling_rate=100, unit="uV")
        records = find_records(tmp_path / "all.npz")
        assert list(records.locations) == ["7", "9"]
        record = as_record(records.locations["9"])
        assert record.sampling_rate == 100
        assert np.allclose(1000 * record.array, ecg[1])

    def test_archive_of_one_array_each(self, tmp_path):
        arrays = {"a": np.ones((12, 5), np.int16), "b": np.ones((12, 7), np.int16)}
        np.savez(tmp_path / "all.npz", **arrays)
        locations = find_records(tmp_path / "all.npz").locations
        assert {name: ecg["array"].shape for name, ecg in locations.items()} == {"a": (12, 5), "b": (12, 7)}

    def test_a_single_file(self, tmp_path):
        np.savez(tmp_path / "one.npz", ecg=np.ones((12, 5)))
        assert find_records(tmp_path / "one.npz").locations == {"one": tmp_path / "one.npz"}
        touch(tmp_path, "two.edf")
        assert find_records(tmp_path / "two.edf").locations == {"two": tmp_path / "two.edf"}

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"ecg": np.ones((2, 12, 5))}, r"ecg \[2, 12, 5\]; expected ecg \[records, leads, samples\]"),
            ({"ecg": np.ones((2, 12, 5)), "id": np.array([3, 3])}, "2 records, but 1 different ids"),
            ({"ecg": np.ones((2, 12, 5)), "id": np.array([{}, {}])}, "pickled objects"),
            (
                {"ecg": np.ones((2, 12, 5)), "id": [1, 2], "unit": ["uV", "mV"]},
                "its 'unit' is an array .*expected one text",
            ),
            ({"ecg": np.ones((2, 12, 5)), "id": [1, 2], "lead_names": "I"}, "its 'lead_names' is an array"),
        ],
    )
    def test_archive_at_fault(self, arrays, message, tmp_path):
        np.savez(tmp_path / "all.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            find_records(tmp_path / "all.npz")

    def test_archive_with_a_file_that_is_no_array(self, tmp_path):
        np.savez(tmp_path / "all.npz", ecg=np.ones((2, 12, 5)), id=[1, 2])
        with zipfile.ZipFile(tmp_path / "all.npz", "a") as archive:
            archive.writestr("unit", "uV")
        with pytest.raises(ValueError, match=r"Cannot read .*unit is no array"):
            find_records(tmp_path / "all.npz")
        content = bytearray((tmp_path / "all.npz").read_bytes())
        content[content.index(b"PK\1\2") + 6] = 173  # a version of the format that there is not
        (tmp_path / "all.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"Cannot read .*zip file version 17\.3"):
            find_records(tmp_path / "all.npz")

    def test_hdf5_files_of_many_records(self, tmp_path):
        """As CODE-15% is published: a table, and parts of which each exam stands in one."""
        for part, ids in enumerate(([11, 12, 0], [21, 0])):
            with h5py.File(tmp_path / f"exams_part{part}.hdf5", "w") as file:
                file["exam_id"] = ids
                file["tracings"] = np.full((len(ids), 40, 12), 0.5 + part, np.float32)
        records = find_records(tmp_path)
        assert list(records.locations) == ["exams_part0#11", "exams_part0#12", "exams_part1#21"]
        assert records.find("21") == records.find("exams_part1#21") == "exams_part1#21"
        assert (as_record(records.locations["exams_part1#21"]).array == 1.5).all()
        single = find_records(tmp_path / "exams_part0.hdf5")
        assert list(single.locations) == ["11", "12"]
        assert as_record(single.locations["12"]).array.shape == (12, 40)
        write(tmp_path / "exams.jsonl", {"exam_id": 21, "age": 60, "patient_id": 7})
        assert read_metadata(tmp_path / "exams.jsonl", records) == {"exams_part1#21": {"patient_id": 7, "age": 60}}

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="No records at"):
            find_records(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="holds no files"):
            find_records(tmp_path)

    def test_ptbxl(self, shared):
        folder = shared / "data" / "ptbxl" / "wfdb_examples"
        assert find_records(folder).locations["17"] == folder / "records500/00000/00017_hr.hea"
        assert find_records(folder, 100).locations["17"] == folder / "records100/00000/00017_lr.hea"


class TestMetadata:
    def test_columns(self, tmp_path):
        records = find_records(touch(tmp_path / "records", "00001.edf", "2.edf"))
        rows = [{"ecg_id": i, "age": 50 + i, "site": "x", "strat_fold": i} for i in (1, 2, 3)]
        table = write(tmp_path / "t.csv", *rows)
        assert read_metadata(table, records, ["site"]) == {
            "00001": {"strat_fold": 1, "age": 51, "site": "x"},
            "2": {"strat_fold": 2, "age": 52, "site": "x"},
        }

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"name": "a"}], "expected one of record, record_id"),
            ([{"record": "a", "age": 1}], "has no column site"),
            (
                [{"record": "b", "site": 1}],
                "is about none of the 1 records: its column record names b, and the records are a",
            ),
            ([{"record": "a", "site": 1}, {"record": "a.edf", "site": 2}], "of the record a; expected one row"),
        ],
    )
    def test_at_fault(self, rows, message, tmp_path):
        records = find_records(touch(tmp_path / "records", "a.edf"))
        with pytest.raises(ValueError, match=message):
            read_metadata(write(tmp_path / "t.csv", *rows), records, ["site"])
