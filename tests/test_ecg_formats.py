import contextlib
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from ecg_files import COUNTS, WHOLE, npy_bytes, npz_bytes, write_wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elm_ecg import ecg_formats, ecg_formats_arrays
from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_utils import read_ecg


class TestReadFile:
    @pytest.mark.parametrize("name", WHOLE)
    def test_format_is_told_by_the_content(self, name, tmp_path):
        path = tmp_path / "record.xyz"
        path.write_bytes(WHOLE[name])
        record = read_file(path)
        assert list(record) == ["array", "sampling_rate", "lead_names", "unit", "metadata"]
        assert record["array"].shape == ({"csv": 2, "kardia": 6}.get(name, 12), 100)
        np.testing.assert_array_equal(read_ecg(path, 250 if name == "npy" else None).array.shape, record["array"].shape)

    @pytest.mark.parametrize(
        ("name", "format", "num_leads"),
        [
            ("hl7_aecg/fda_subject1_0.xml", "HL7 aECG", 12),
            ("ge_muse_xml/braveheart_example1.xml", "GE MUSE XML", 8),
            ("philips_sierra_xml/129DYPRG_1_03.xml", "Philips Sierra XML 1.03", 12),
            ("scp_ecg/Example.scp", "SCP-ECG", 12),
            ("ishne/ptbxl_00017.ecg", "ISHNE", 12),
        ],
    )
    def test_formats_of_the_other_modules(self, name, format, num_leads, shared, tmp_path):
        content = (shared / "data/formats" / name).read_bytes()
        (tmp_path / "a.npy").write_bytes(content)
        record = read_file(tmp_path / "a.npy")
        assert (record["metadata"]["format"], len(record["array"])) == (format, num_leads)
        assert read_ecg(tmp_path / "a.npy").sampling_rate == 500
        (tmp_path / "a.npy").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"Cannot read {tmp_path}/a\.npy as "):
            read_file(tmp_path / "a.npy")

    @pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
    def test_xml_in_any_encoding(self, encoding, tmp_path):
        (tmp_path / "a").write_bytes("\n <Recipe/>".encode(encoding))
        with pytest.raises(ValueError, match=r"a as XML \(HL7 aECG, GE MUSE, Philips Sierra or Mortara ELI\):"):
            read_file(tmp_path / "a")

    def test_no_file_no_content_and_no_recording(self, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"missing\.edf"):
            read_file(tmp_path / "missing.edf")
        with pytest.raises(ValueError, match=f"{tmp_path} is a folder"):
            read_file(tmp_path)
        path = tmp_path / "a.edf"
        path.touch()
        with pytest.raises(ValueError, match=r"a\.edf has 0 bytes"):
            read_file(path)
        monkeypatch.setattr(ecg_formats, "MAX_FILE_BYTES", 1000)
        path.write_bytes(WHOLE["edf"])
        with pytest.raises(ValueError, match=rf"a\.edf has {len(WHOLE['edf'])} bytes; expected a recording, at most"):
            read_file(path)

    @pytest.mark.parametrize("content", [b"no ecg", b"\x89PNG\r\n\x1a\n" + bytes(300), b"\xff" * 5000])
    def test_unknown_content(self, content, tmp_path):
        (tmp_path / "a.dcm").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.dcm is of no known format.*EDF, DICOM, SCP-ECG.*WFDB, whose signal"):
            read_file(tmp_path / "a.dcm")

    @pytest.mark.parametrize(("name", "library"), [("edf", "edfio"), ("dicom", "pydicom"), ("hea", "wfdb.io.header")])
    def test_missing_library(self, name, library, tmp_path, monkeypatch):
        path = tmp_path / "r.hea"
        write_wfdb(tmp_path, ["r 1 250 1", "r.dat 16"], r=bytes(2))
        if name in WHOLE:
            path.write_bytes(WHOLE[name])
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(
            ImportError,
            match=rf"r\.hea as .*needs the library {library.split('.')[0]}: `pip install {library.split('.')[0]}`",
        ):
            read_file(path)


class TestHostileFiles:
    @pytest.mark.parametrize("rate", [1e-9, 0, -500, 2e6])
    def test_impossible_rates(self, tmp_path: Path, rate: float):
        """Resampled to 250 Hz, 1 nHz would be more samples than any memory holds."""
        np.savez(tmp_path / "ecg.npz", array=COUNTS, unit="uV", sampling_rate=rate)
        with pytest.raises(ValueError, match=r"its sampling rate is \S+ Hz; expected 1 to"):
            read_file(tmp_path / "ecg.npz")

    @pytest.mark.parametrize("name", sorted(set(WHOLE) - {"csv"}))  # a table does not tell its length
    def test_cut(self, name, tmp_path):
        whole = WHOLE[name]
        for length in np.random.default_rng(1).integers(1, len(whole), 20):
            (tmp_path / "a").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"{tmp_path}/a"):
                read_file(tmp_path / "a")

    def test_cut_real_files(self, shared, tmp_path):
        data = shared / "data"
        waveform_end = 281_000  # of the DICOM file; its last elements, on which nothing rests, are private
        for name, end in [
            ("formats/edf/ptbxl_00017.edf", None),
            ("formats/dicom/anonymous_ecg.dcm", waveform_end),
            ("other_12lead/cpsc2018/A1980.mat", None),
            ("other_12lead/code15/code_15_1238362.mat", None),
        ]:
            whole = (data / name).read_bytes()
            for length in np.random.default_rng(2).integers(0, end or len(whole), 20):
                (tmp_path / "a").write_bytes(whole[:length])
                with pytest.raises(ValueError, match=f"{tmp_path}/a"):
                    read_file(tmp_path / "a")

    def test_cut_wfdb_records(self, shared, tmp_path):
        folder = shared / "data/ptbxl/wfdb_examples/records100/00000"
        for name in ("00017_lr.hea", "00017_lr.dat"):
            for other in ("00017_lr.hea", "00017_lr.dat"):
                (tmp_path / other).write_bytes((folder / other).read_bytes())
            # the last column of a header's last line is the name V6, and only its loss counts
            whole = (folder / name).read_bytes().rstrip()[:-2]
            for length in np.random.default_rng(3).integers(0, len(whole) - 10, 20):
                (tmp_path / name).write_bytes(whole[:length])
                with pytest.raises(ValueError, match="00017_lr"):
                    read_file(tmp_path / "00017_lr.hea")

    @pytest.mark.parametrize("name", [*WHOLE, "hea"])
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_bytes(self, name, data, tmp_path):
        """Another end after the beginning of a file, and single bytes of it changed: no other exception than ValueError."""
        if name == "hea":
            whole = b"r 2 100 50\nr.dat 16 1000(0)/mV 16 0 0 0 0 I\nr.dat 16 1000(0)/mV 16 0 0 0 0 II\n"
            (tmp_path / "r.dat").write_bytes(COUNTS[:2].tobytes())
        else:
            whole = WHOLE[name]
        content = bytearray(whole)
        if data.draw(st.booleans()):
            start = data.draw(st.integers(8, min(300, len(whole))))
            content[start:] = data.draw(st.binary(max_size=200))
        else:
            for _ in range(data.draw(st.integers(1, 4))):
                place = data.draw(st.integers(0, min(2000, len(whole)) - 1))
                content[place] = data.draw(st.integers(0, 255))
        (tmp_path / "r.hea").write_bytes(content)
        with contextlib.suppress(ValueError):
            assert read_file(tmp_path / "r.hea")["array"].nbytes <= 64 * len(whole)

    @pytest.mark.parametrize("name", ["shape", "overflow", "npz", "mat", "struct", "dicom", "edf", "pickle"])
    def test_claims_are_checked_before_memory_is_taken(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr(ecg_formats_arrays, "MAX_SAMPLES", 2**17)  # a MiB of doubles

        def npy(shape: str) -> bytes:
            text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(118)
            return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text

        def element(kind: int, data: bytes) -> bytes:
            return WHOLE["mat"][:128] + struct.pack("<II", kind, len(data)) + data

        (tmp_path / "a").write_bytes(
            {
                "shape": lambda: npy("(1152921504606846976,)"),
                "overflow": lambda: npy("(4294967296, 4294967296)"),
                "npz": lambda: npz_bytes(array=np.zeros(2**21)),
                "mat": lambda: element(15, zlib.compress(bytes(2**24))),
                "struct": lambda: element(14, struct.pack("<4I2I", 2**31, 6, 8, 2, 0, 0)),
                "dicom": lambda: WHOLE["dicom"].replace(b"UL\4\0" + struct.pack("<I", 100), b"UL\4\0\xff\xff\xff\x7f"),
                "edf": lambda: WHOLE["edf"].replace(b"50      ", b"99999999"),
                "pickle": lambda: npy_bytes({})[:128] + b"\x80\x04" + b"]" * 200_000 + b".",
            }[name]()
        )
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="Cannot read"):
                read_file(tmp_path / "a")
            assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
        finally:
            tracemalloc.stop()

    def test_pickles_that_refer_to_themselves(self, tmp_path):
        head = npy_bytes({})[:128]
        for pickled in (
            b"\x80\x04]\x94h\x00a.",  # a list of itself
            b"\x80\x04}\x94\x8c\x03ecgh\x00s.",
            b"\x80\x04cnumpy\nndarray\n\x94h\x00b.",
            b"\x80\x04h\x07.",
            b"\x80\x04cos\nsystem\n\x8c\x02ls\x85R.",
            b"\x80\x04.",
        ):
            (tmp_path / "a").write_bytes(head + pickled)
            with pytest.raises(ValueError, match="holds pickled objects"):
                read_file(tmp_path / "a")

    def test_nothing_is_printed_or_warned_of(self, shared, tmp_path, recwarn, capfd):
        whole = (shared / "data/formats/dicom/anonymous_ecg.dcm").read_bytes()
        for content in (WHOLE["edf"][:-300], whole[:-1], whole[:1000], npy_bytes({}).replace(b"|O", b"|P")):
            (tmp_path / "a").write_bytes(content)
            with contextlib.suppress(ValueError):
                read_file(tmp_path / "a")
        assert not recwarn.list
        assert capfd.readouterr() == ("", "")
