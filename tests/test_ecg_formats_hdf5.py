import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from ecg_files import COUNTS, LEADS, mat_73_bytes, mat_bytes

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_formats_common import Given
from elm_ecg.ecg_formats_hdf5 import hdf5_records
from elm_ecg.ecg_utils import read_ecg

TRACINGS = np.random.default_rng(0).normal(0, 0.3, (3, 400, 12)).astype(np.float32)


def write_code(path: Path, tracings: np.ndarray = TRACINGS, ids: list | None = None, **options: object) -> Path:
    """A file as CODE-15% publishes it."""
    with h5py.File(path, "w") as file:
        if ids is not None:
            file["exam_id"] = ids
        file.create_dataset("tracings", data=tracings, **options)
    return path


class TestCODE15:
    @pytest.mark.parametrize("options", [{}, {"compression": "gzip", "shuffle": True}, {"compression": "lzf"}])
    def test_records_by_exam_id(self, options, tmp_path):
        path = write_code(tmp_path / "exams_part0.hdf5", ids=[1169160, 7, 0], **options)
        assert hdf5_records(path) == ["1169160", "7"]  # the last row is filled with zeros
        record = read_file(f"{path}#7")
        np.testing.assert_array_equal(record["array"], TRACINGS[1].T)
        assert (record["sampling_rate"], record["lead_names"], record["unit"]) == (400, LEADS, None)
        assert record["metadata"] == {"format": "HDF5, CODE", "record": "7"}
        with pytest.raises(
            ValueError, match=r"holds 3 records without a choice; name one of 1169160, 7, 0: exams_part0.hdf5#1169160"
        ):
            read_file(path)
        with pytest.raises(ValueError, match="holds 0 records of the name '8'; name one of 1169160"):
            read_file(f"{path}#8")
        with pytest.raises(FileNotFoundError, match=r"There is no file .*exams_part1\.hdf5#7"):
            read_file(tmp_path / "exams_part1.hdf5#7")

    def test_test_set_of_code(self, tmp_path):
        """It has no ids; its records are numbered."""
        path = write_code(tmp_path / "ecg_tracings.hdf5")
        assert hdf5_records(path) == ["0", "1", "2"]
        np.testing.assert_array_equal(read_ecg(f"{path}#2", unit="mV").array, TRACINGS[2].T)
        single = write_code(tmp_path / "one.hdf5", TRACINGS[:1], [5])
        np.testing.assert_array_equal(read_ecg(single).array, TRACINGS[0].T)

    def test_padding_stays_and_is_told(self, tmp_path):
        padded = np.pad(TRACINGS, ((0, 0), (40, 80), (0, 0)))
        record = read_ecg(f"{write_code(tmp_path / 'a.hdf5', padded, [1, 2, 3])}#1")
        np.testing.assert_array_equal(record.array, padded[0].T)
        assert record.metadata["padding_seconds"] == [0.1, 0.2]
        assert record.metadata["notices"][0].endswith("as the data set pads it: 0.1 and 0.2 s.")

    def test_reported_file(self, shared):
        path = shared / "data/reported/code15_exams_part0_2records.hdf5"
        names = hdf5_records(path)
        assert len(names) == 2
        with h5py.File(path) as file:
            for name, tracing in zip(names, file["tracings"][:], strict=True):
                record = read_ecg(f"{path}#{name}")
                np.testing.assert_array_equal(record.array, tracing.T)
                assert (record.sampling_rate, record.lead_names) == (400, tuple(LEADS))

    @pytest.mark.parametrize(
        ("tracings", "ids", "message"),
        [
            (TRACINGS[0], None, r"tracings have the shape \[400, 12\]; expected \[records, samples, 12\]"),
            (TRACINGS[..., :8], None, r"the shape \[3, 400, 8\]"),
            (TRACINGS, [1, 2], r"holds \[2\] exam_id for 3 tracings"),
            (TRACINGS, [5, 5, 6], "holds 2 records of the name '5'"),
            (TRACINGS, [0.5, 5, 6], "its exam_id holds float64"),
            (TRACINGS, np.array([b"5" * 99] * 3), r"its exam_id holds \|S99"),
            (TRACINGS, [50, 55, 15], "holds 0 records of the name '5'"),
            (TRACINGS.astype("S8"), None, r"its tracings holds \|S8; expected numbers"),
        ],
    )
    def test_other_layouts(self, tracings, ids, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            read_file(f"{write_code(tmp_path / 'a.hdf5', tracings, ids)}#5")

    def test_other_files_are_not_read(self, tmp_path):
        """Links, external storage and virtual datasets would read any file that they name."""
        write_code(tmp_path / "other.hdf5", ids=[1, 2, 3])
        (tmp_path / "raw").write_bytes(TRACINGS.tobytes())
        layout = h5py.VirtualLayout(TRACINGS.shape, TRACINGS.dtype)
        layout[:] = h5py.VirtualSource(tmp_path / "other.hdf5", "tracings", TRACINGS.shape)
        for number in range(3):
            path = tmp_path / f"{number}.hdf5"
            with h5py.File(path, "w") as file:
                if number == 0:
                    file["tracings"] = h5py.ExternalLink(str(tmp_path / "other.hdf5"), "tracings")
                elif number == 1:
                    file.create_dataset(
                        "tracings", TRACINGS.shape, "f4", external=[(str(tmp_path / "raw"), 0, TRACINGS.nbytes)]
                    )
                else:
                    file.create_virtual_dataset("tracings", layout)
            with pytest.raises(ValueError, match="its tracings is no dataset of its own"):
                read_file(f"{path}#1")

    def test_claims_are_checked(self, tmp_path):
        with h5py.File(tmp_path / "a.hdf5", "w") as file:  # nothing is stored, as all values are the default
            file.create_dataset("tracings", (2**21, 4, 12), "f4", chunks=(1, 4, 12))
        with pytest.raises(ValueError, match="claims 2097152 records"):
            read_file(tmp_path / "a.hdf5#1")
        with h5py.File(tmp_path / "b.hdf5", "w") as file:
            file.create_dataset("tracings", (2**16, 2**12, 12), "f4", chunks=(2**14, 2**12, 12), compression="gzip")
        with pytest.raises(ValueError, match=r"has chunks of .* at most"):
            read_file(tmp_path / "b.hdf5#1")

    def test_damaged_and_other(self, tmp_path):
        whole = write_code(tmp_path / "a.hdf5", ids=[1, 2, 3], compression="gzip").read_bytes()
        contents = [whole[:length] for length in (8, 100, 600, len(whole) // 2)]
        contents += [b"\x89HDF\r\n\x1a\n".ljust(512), b"MATLAB 7.3 MAT-file".ljust(512)]
        for content in contents:
            (tmp_path / "a.hdf5").write_bytes(content)
            with pytest.raises(ValueError, match=r"Cannot read .*a\.hdf5 as HDF5"):
                read_file(f"{tmp_path}/a.hdf5#1")
            with pytest.raises(ValueError, match=r"Cannot read .*a\.hdf5 as HDF5"):
                hdf5_records(tmp_path / "a.hdf5")
        (tmp_path / "b.csv").write_text("I,II\n0.1,0.2\n0.1,0.2\n")
        with pytest.raises(ValueError, match=r"b\.csv holds one record; leave out #5"):
            read_file(tmp_path / "b.csv#5")

    def test_a_file_that_changes(self, tmp_path):
        """The ids of a file are kept, not the file: who writes to it later is not kept from it, and is read."""
        path = write_code(tmp_path / "a.hdf5", ids=[1, 2, 3])
        read_file(f"{path}#3")
        write_code(path, TRACINGS[:2], ids=[3, 4])
        os.utime(path, ns=(0, 0))
        np.testing.assert_array_equal(read_file(f"{path}#3")["array"], TRACINGS[0].T)
        assert hdf5_records(path) == ["3", "4"]

    def test_one_record_is_read_at_a_time(self, tmp_path, monkeypatch):
        """Of a file of gigabytes, only the rows asked for; its ids once."""
        path = write_code(tmp_path / "a.hdf5", ids=[30, 10, 20], chunks=(1, 400, 12), compression="gzip")
        asked, read = [], h5py.Dataset.__getitem__
        monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda data, args: asked.append(args) or read(data, args))
        for name, row in (("10", 1), ("20", 2), ("30", 0)):
            np.testing.assert_array_equal(read_file(f"{path}#{name}")["array"], TRACINGS[row].T)
        assert asked == [slice(None), 1, 2, 0]


class TestMATLAB73:
    @pytest.mark.parametrize("compression", [None, "gzip"])
    def test_as_in_the_older_format(self, compression, tmp_path):
        cpsc = {"ECG": {"sex": "Female", "age": 52.0, "data": COUNTS / 1000}}
        code = {"feats": (COUNTS / 1000).astype(np.float32), "curr_sample_rate": 400.0}
        for variables in (cpsc, code, {"val": COUNTS}):
            given = Given(unit="uV" if "val" in variables else None)
            (tmp_path / "old.mat").write_bytes(mat_bytes(**variables))
            (tmp_path / "new.mat").write_bytes(mat_73_bytes(compression, **variables))
            expected, record = read_file(tmp_path / "old.mat", given), read_file(tmp_path / "new.mat", given)
            np.testing.assert_array_equal(record["array"], expected["array"])
            assert {**record, "array": None} == {**expected, "array": None}
        assert read_file(tmp_path / "new.mat", Given(unit="uV", lead_names=LEADS))["lead_names"] == tuple(LEADS)

    def test_counts_alone(self, tmp_path):
        (tmp_path / "a.mat").write_bytes(mat_73_bytes(val=COUNTS))
        with pytest.raises(ValueError, match=r"put NAME\.hea into the same folder, or give unit and sampling_rate"):
            read_ecg(tmp_path / "a.mat")
        record = read_ecg(tmp_path / "a.mat", sampling_rate=500, unit="uV")
        np.testing.assert_array_equal(record.array, (COUNTS / np.float32(1000)))

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"x": COUNTS}, r"holds the variables \['x'\]; expected the struct ECG"),
            ({"ECG": {"leads": COUNTS}}, r"holds the variables \['ECG'\]; expected the struct ECG"),
            ({"val": "text" * 300}, "its val claims 1200 numbers"),
        ],
    )
    def test_other_content(self, variables, message, tmp_path):
        (tmp_path / "a.mat").write_bytes(mat_73_bytes(**variables))
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / "a.mat", Given(unit="uV"))
        with pytest.raises(ValueError, match="holds one record; leave out #5"):
            read_file(f"{tmp_path / 'a.mat'}#5")

    def test_claims_are_checked(self, tmp_path):
        path = tmp_path / "a.mat"
        path.write_bytes(mat_73_bytes(x=COUNTS))
        with h5py.File(path, "a") as file:
            file.create_dataset("val", (12, 2**40), "i2", chunks=(12, 100))
        with pytest.raises(ValueError, match="its val claims 13194139533312 numbers"):
            read_file(path, Given(unit="uV"))

    def test_other_files_are_not_read(self, tmp_path):
        (tmp_path / "other.mat").write_bytes(mat_73_bytes(ECG={"data": COUNTS / 1000}))
        for name, inner in (("ECG", "ECG"), ("feats", "ECG/data")):
            path = tmp_path / f"{name}.mat"
            path.write_bytes(mat_73_bytes(x=COUNTS))
            with h5py.File(path, "a") as file:
                file[name] = h5py.ExternalLink(str(tmp_path / "other.mat"), inner)
            with pytest.raises(ValueError, match=r"no dataset of its own|holds the variables \['ECG', 'x'\]"):
                read_file(path)
