from pathlib import Path

import h5py
import numpy as np
import pytest
from ecg_files import LEADS

from elm_ecg.ecg_formats import read_file
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
        with pytest.raises(ValueError, match=r"-v7.3; save it with -v7"):
            read_file(tmp_path / "a.hdf5")
        (tmp_path / "b.csv").write_text("I,II\n0.1,0.2\n0.1,0.2\n")
        with pytest.raises(ValueError, match=r"b\.csv holds one record; leave out #5"):
            read_file(tmp_path / "b.csv#5")
