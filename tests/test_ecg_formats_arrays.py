import io
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from ecg_files import COUNTS, LEADS, mat_bytes, npy_bytes, npz_bytes

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_utils import REFERENCE_LEADS, read_ecg


def npz_bytes_stored(**arrays: np.ndarray) -> bytes:
    """An archive without compression, and without checksums that would be compared."""
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def reseal_zip(content: bytes) -> bytes:
    """The archive with the checksums that its members have."""
    sealed = bytearray(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            start = info.header_offset
            name, extra = struct.unpack_from("<HH", content, start + 26)
            data = content[start + 30 + name + extra :][: info.file_size]
            old, new = struct.pack("<I", info.CRC), struct.pack("<I", zlib.crc32(data))
            sealed = bytearray(bytes(sealed).replace(old, new))
    return bytes(sealed)


class TestNumPy:
    @pytest.mark.parametrize("dtype", ["f8", ">f4", "f2", "i2"])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_array(self, dtype, order, tmp_path):
        array = COUNTS.astype(dtype, order=order)
        np.save(tmp_path / "a.npy", array)
        record = read_file(tmp_path / "a.npy")
        np.testing.assert_array_equal(record["array"], array)
        assert record["array"].dtype == array.dtype
        assert (record["sampling_rate"], record["lead_names"], record["unit"]) == (None, None, None)

    @pytest.mark.parametrize("dtype", ["f8", "f4", "f2"])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("protocol", ["NumPy 1", "NumPy 2"])
    def test_dict_of_the_reference(self, dtype, order, protocol, tmp_path):
        facts = {
            "ecg": (COUNTS / 1000).astype(dtype, order=order),
            "report": "sinus rhythm",
            "ecg_path": "ptbxl/records500/00000/00001_hr",
            "original_sf": np.int64(500),
            "target_sf": 250,
            "segment_len": 2500.0,
            "npy_path": None,
        }
        content = npy_bytes(facts)
        if protocol == "NumPy 1":  # wrote protocol 3, and its own old names
            start = content.index(b"\x80\x04")
            pickled = pickle.dumps(np.array(facts, dtype=object), protocol=3)
            content = content[:start] + pickled.replace(b"numpy._core.", b"numpy.core.")
            assert b"_core" not in content
        (tmp_path / "a.npy").write_bytes(content)
        record = read_file(tmp_path / "a.npy")
        np.testing.assert_array_equal(record["array"], facts["ecg"])
        assert (record["sampling_rate"], record["lead_names"], record["unit"]) == (250, None, "mV")
        assert record["metadata"] == {
            "format": "NumPy, dict of the reference",
            "report": "sinus rhythm",
            "ecg_path": "ptbxl/records500/00000/00001_hr",
            "original_sf": 500,
            "segment_len": 2500.0,
        }

    @pytest.mark.parametrize("key", ["ecg_path", "npy_path"])
    @pytest.mark.parametrize("source", ["data/mimic/p1000/s4", "CODE-15/1.mat", "code15/2"])
    def test_order_of_the_reference(self, key, source, tmp_path):
        np.save(tmp_path / "a.npy", {"ecg": COUNTS / 1000, "target_sf": 250, key: source}, allow_pickle=True)
        record = read_file(tmp_path / "a.npy")
        assert tuple(record["lead_names"]) == REFERENCE_LEADS
        assert "MIMIC" in record["metadata"]["lead_order"]
        np.testing.assert_array_equal(read_ecg(tmp_path / "a.npy").array[3], (COUNTS[3] / 1000).astype(np.float32))

    def test_no_pickle_is_executed(self, tmp_path):
        class Bomb:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        path = tmp_path / "a.npy"
        contents = [npy_bytes({"ecg": Bomb()}), npy_bytes(Bomb()), npy_bytes({"ecg": COUNTS, "report": Bomb()})]
        contents += [npy_bytes({"ecg": [1, 2]}), npy_bytes({1: COUNTS}), npy_bytes({"ecg": np.array([None])})]
        contents += [npy_bytes({"ecg": np.array(["a"])}), npy_bytes({"report": "no ecg"})]
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"holds pickled objects.*Save the array itself"):
                read_file(path)
        path.write_bytes(npz_bytes(array=np.array([Bomb()])))
        with pytest.raises(ValueError, match="holds pickled objects"):
            read_file(path)
        assert not (tmp_path / "ran").exists()

    def test_npz_says_everything(self, tmp_path):
        np.savez(tmp_path / "a.npz", ecg=COUNTS[:2], sampling_rate=np.float32(100), lead_names=["II", "v1"], unit="uV")
        record = read_file(tmp_path / "a.npz")
        np.testing.assert_array_equal(record.pop("array"), COUNTS[:2])
        assert record == {
            "sampling_rate": 100,
            "lead_names": ["II", "v1"],
            "unit": "uV",
            "metadata": {"format": "NumPy"},
        }

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"ecg": np.zeros((3, 12, 5))}, r"'ecg' has shape \[3, 12, 5\]"),
            ({f"r{n}": COUNTS for n in range(9)}, r"it holds \['r0', .* \.\.\.; expected the key 'array' or 'ecg'"),
            ({"signal": COUNTS}, r"it holds \['signal'\]; expected the key 'array' or 'ecg'"),
        ],
    )
    def test_archives_of_several_records(self, arrays, message, tmp_path):
        (tmp_path / "a").write_bytes(npz_bytes(**arrays))
        with pytest.raises(ValueError, match=f"{message}.*`elm data build` reads archives of several"):
            read_file(tmp_path / "a")

    @pytest.mark.parametrize(
        ("facts", "message"),
        [
            ({"lead_names": "I"}, r"its 'lead_names' is an array \[\] of <U1; expected a list of texts"),
            ({"lead_names": np.array(5)}, r"its 'lead_names' is an array \[\] of int64; expected a list of texts"),
            ({"lead_names": [[1, 2]]}, r"its 'lead_names' is an array \[1, 2\] of int64"),
            ({"unit": ["uV", "mV"]}, r"its 'unit' is an array \[2\] of <U2; expected one text"),
            ({"unit": 5}, "expected one text"),
            ({"sampling_rate": "500"}, "expected one number of hertz"),
            ({"sampling_rate": [500, 250]}, "expected one number of hertz"),
        ],
    )
    def test_facts_of_another_kind(self, facts, message, tmp_path):
        np.savez(tmp_path / "a.npz", array=COUNTS[:2] / 1000, **facts)
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / "a.npz")

    def test_texts_that_hold_no_letters(self, tmp_path):
        """Four bytes of a letter may be any number, of which most are none of Unicode."""
        content = npz_bytes_stored(array=COUNTS[:1] / 1000, lead_names=np.array(["QQ"]))
        content = reseal_zip(content.replace("QQ".encode("utf-32-le"), b"\xff\xff\xff\x7f" * 2))
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match="Cannot read"):
            read_file(tmp_path / "a.npz")

    def test_unit_that_is_none(self, tmp_path):
        np.savez(tmp_path / "a.npz", array=COUNTS, sampling_rate=[500], unit="adu", lead_names=["x"] * 12)
        with pytest.raises(ValueError, match="Unknown unit 'adu'"):
            read_ecg(tmp_path / "a.npz", lead_names=LEADS)
        record = read_ecg(tmp_path / "a.npz", lead_names=LEADS, unit="uV")
        np.testing.assert_array_equal(record.array, (COUNTS / 1000).astype(np.float32))
        assert record.lead_names == tuple(LEADS)


class TestMATLAB:
    def test_cut_in_the_name_of_version_4(self, tmp_path):
        (tmp_path / "a.mat").write_bytes(
            struct.pack("<5I", 0, 1, 1, 0, 60) + b"abcd"
        )  # a name of 60 bytes, of which 4 are there
        with pytest.raises(ValueError, match="of no known format"):
            read_file(tmp_path / "a.mat")

    def test_cpsc(self, shared):
        folder = shared / "data/other_12lead/cpsc2018"
        record = read_file(folder / "A1980.mat")
        with np.load(folder / "cpsc2018_10.npz") as archive:
            np.testing.assert_allclose(
                record["array"], archive["A1980"] / 1000, rtol=0, atol=0.00051
            )  # rounded to 1 uV
        np.testing.assert_array_equal(record["array"], scipy.io.loadmat(folder / "A1980.mat")["ECG"][0, 0]["data"])
        assert (record["sampling_rate"], record["unit"]) == (500, "mV")
        assert record["metadata"] == {"format": "MATLAB, CPSC 2018", "age": 52.0, "sex": "male"}

    def test_code15(self, shared):
        folder = shared / "data/other_12lead/code15"
        with np.load(folder / "code15_10.npz") as archive:
            for name in ("code_15_1238362", "code_15_1594286"):
                record = read_file(folder / f"{name}.mat")
                np.testing.assert_array_equal(record["array"], archive[name])
                assert (record["sampling_rate"], record["unit"]) == (400, None)

    @pytest.mark.parametrize("compressed", [False, True])
    @pytest.mark.parametrize("dtype", ["f8", "f4", "i2", "u1", "i8"])
    def test_as_scipy_reads(self, compressed, dtype, tmp_path):
        feats = COUNTS.astype(dtype)
        (tmp_path / "a").write_bytes(
            mat_bytes(compressed, note="text", feats=feats, curr_sample_rate=300, more={"a": 1})
        )
        record = read_file(tmp_path / "a")
        np.testing.assert_array_equal(record["array"], feats)
        assert record["sampling_rate"] == 300

    def test_big_endian_and_mixed_compression(self, tmp_path):
        def element(kind: int, data: bytes) -> bytes:
            return struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8 if kind != 15 else 0)

        def variable(name: bytes, values: np.ndarray) -> bytes:
            shape = struct.pack(">2i", *values.shape)
            data = element(9, values.astype(">f8").tobytes("F"))
            return element(14, element(6, struct.pack(">2I", 6, 0)) + element(5, shape) + element(1, name) + data)

        header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"
        values = COUNTS[:2, :3] / 1000
        packed = zlib.compress(variable(b"curr_sample_rate", np.array([[333.25]])), 0)
        assert len(packed) % 8  # is not padded
        (tmp_path / "a").write_bytes(header + element(15, packed) + variable(b"feats", values))
        record = read_file(tmp_path / "a")
        np.testing.assert_array_equal(record["array"], values)
        assert record["sampling_rate"] == 333.25

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (mat_bytes(val=COUNTS), r"without rate, leads and gain.*put NAME\.hea"),
            (mat_bytes(x=COUNTS, y=1), r"holds the variables \['x', 'y'\]; expected the struct ECG"),
            (mat_bytes(feats=COUNTS * 1j), r"holds the variables \['feats'\]"),
            (mat_bytes(ECG={"a": 1}), r"holds the variables \['ECG'\]"),
        ],
    )
    def test_other_content(self, content, message, tmp_path):
        (tmp_path / "a.mat").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / "a.mat")
