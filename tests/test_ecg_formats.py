import contextlib
import datetime
import io
import pickle
import shutil
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import edfio
import numpy as np
import pydicom
import pytest
import scipy.io
import wfdb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset

from elm_ecg import ecg_formats
from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_utils import REFERENCE_LEADS, read_ecg

LEADS = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
COUNTS = np.random.default_rng(0).integers(-900, 900, (12, 100)).astype(np.int16)


def npy_bytes(array: object) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npz_bytes(**arrays: object) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def mat_bytes(compressed: bool = False, **variables: object) -> bytes:
    stream = io.BytesIO()
    scipy.io.savemat(stream, variables, do_compression=compressed)
    return stream.getvalue()


def edf_signal(label: str, unit: str = "uV", rate: int = 100, counts: np.ndarray = COUNTS[0]) -> edfio.EdfSignal:
    """One count is one unit, as in the file of PTB-XL's record 17."""
    return edfio.EdfSignal(
        counts.astype(float), rate, label=label, physical_dimension=unit, physical_range=(-32768, 32767)
    )


def edf_bytes(*signals: edfio.EdfSignal, **options: object) -> bytes:
    stream = io.BytesIO()
    edfio.Edf(signals, **options).write(stream)
    return stream.getvalue()


def code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodeMeaning = value, meaning
    return item


def dicom_group(counts: np.ndarray, leads: list[tuple[str, str]], unit: str = "uV", dtype: str = "<i2") -> Dataset:
    group = Dataset()
    group.WaveformOriginality, group.SamplingFrequency = "ORIGINAL", 250
    group.NumberOfWaveformChannels, group.NumberOfWaveformSamples = counts.shape
    group.WaveformBitsAllocated, group.WaveformSampleInterpretation = 16, "SS"
    group.ChannelDefinitionSequence = []
    for lead in leads:
        channel = Dataset()
        channel.ChannelSourceSequence, channel.ChannelSensitivityUnitsSequence = [code(*lead)], [code(unit, "")]
        channel.ChannelSensitivity, channel.ChannelSensitivityCorrectionFactor, channel.ChannelBaseline = 2.5, 2, 10
        group.ChannelDefinitionSequence.append(channel)
    group.add_new("WaveformData", "OW", counts.T.astype(dtype).tobytes())
    return group


def dicom_bytes(*groups: Dataset, little_endian: bool = True) -> bytes:
    dataset, stream = Dataset(), io.BytesIO()
    dataset.file_meta = FileMetaDataset()
    syntax = pydicom.uid.ExplicitVRLittleEndian if little_endian else pydicom.uid.ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.9.1.1"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "2.25.1"
    dataset.PatientID, dataset.PatientSex, dataset.PatientAge = "P7", "F", "042Y"
    dataset.WaveformSequence = list(groups)
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def write_wfdb(folder: Path, lines: list[str], **files: bytes) -> Path:
    """A record r with the header `lines` and the signal files NAME.dat."""
    for name, content in files.items():
        (folder / f"{name}.dat").write_bytes(content)
    (folder / "r.hea").write_text("\n".join(lines) + "\n")
    return folder / "r.hea"


# small whole files of each format
WHOLE = {
    "npy": npy_bytes(COUNTS / 1000),
    "dict": npy_bytes({"ecg": COUNTS / 1000, "target_sf": 250, "report": "sinus rhythm"}),
    "npz": npz_bytes(array=COUNTS, sampling_rate=500, lead_names=LEADS, unit="uV"),
    "edf": edf_bytes(*(edf_signal(lead) for lead in LEADS), data_record_duration=0.5),
    "dicom": dicom_bytes(dicom_group(COUNTS, [("", lead) for lead in LEADS])),
    "mat": mat_bytes(ECG={"sex": "Male", "age": 52, "data": COUNTS / 1000}),
    "compressed mat": mat_bytes(True, feats=(COUNTS / 1000).astype(np.float32), curr_sample_rate=400),
    "csv": "\n".join(["time,I,II", *(f"{n / 250:.3f},{n % 7 / 10:.3f},-0.25" for n in range(100))]).encode(),
}


@pytest.fixture(scope="module")
def record_17(shared: Path) -> np.ndarray:
    """PTB-XL record 17 at 500 Hz in microvolts."""
    with np.load(shared / "data/ptbxl/raw500.npz") as archive:
        return archive["ecg"][archive["ecg_id"].tolist().index(17)]


class TestReadFile:
    @pytest.mark.parametrize("name", WHOLE)
    def test_format_is_told_by_the_content(self, name, tmp_path):
        path = tmp_path / "record.xyz"
        path.write_bytes(WHOLE[name])
        record = read_file(path)
        assert list(record) == ["array", "sampling_rate", "lead_names", "unit", "metadata"]
        assert record["array"].shape == ((2, 100) if name == "csv" else (12, 100))
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
        with pytest.raises(ValueError, match=r"a as XML \(HL7 aECG, GE MUSE or Philips Sierra\):"):
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
        with pytest.raises(
            ValueError, match=rf"a\.edf has {len(WHOLE['edf'])} bytes; expected a recording, of at most"
        ):
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
            ImportError, match=rf'r\.hea as .*needs the library {library}: pip install "elm-ecg\[formats\]"'
        ):
            read_file(path)


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


class TestWFDB:
    def test_all_examples_of_ptbxl(self, shared):
        for rate in (100, 500):
            with np.load(shared / f"data/ptbxl/raw{rate}.npz") as archive:
                raw = dict(zip(archive["ecg_id"].tolist(), archive["ecg"], strict=True))
            headers = sorted((shared / f"data/ptbxl/wfdb_examples/records{rate}").rglob("*.hea"))
            assert len(headers) == 22
            for header in headers:
                record = read_file(header)
                np.testing.assert_array_equal(record["array"], (raw[int(header.stem[:5])] / 1000).astype(np.float32))
                assert (record["sampling_rate"], record["unit"]) == (rate, "mV")
                assert [name.lower() for name in record["lead_names"]] == [name.lower() for name in LEADS]

    @pytest.mark.parametrize("suffix", [".hea", ".dat", ".xyz", ""])
    def test_two_signal_files(self, suffix, shared):
        folder = shared / "data/other_12lead/ptb_s0010_re"
        record = read_file(folder / f"s0010_re{suffix}")
        counts = [
            np.fromfile(folder / f"s0010_re.{name}", "<i2").reshape(-1, n).T for name, n in (("dat", 12), ("xyz", 3))
        ]
        np.testing.assert_array_equal(record["array"], (np.concatenate(counts) / 2000).astype(np.float32))
        assert (record["sampling_rate"], record["lead_names"][2:4]) == (1000, ["iii", "avr"])
        assert record["lead_names"][12:] == ["vx", "vy", "vz"]
        facts = record["metadata"]
        assert (facts["age"], facts["sex"], facts["format"]) == (81, "female", "WFDB")
        assert "Smoker: no" in facts["comments"]
        assert read_ecg(folder / f"s0010_re{suffix}").lead_names == tuple(LEADS)

    @pytest.mark.parametrize("name", ["E07500", "JS20000"])
    def test_signals_in_matlab_files(self, name, shared):
        folder = shared / "data/other_12lead"
        with np.load(folder / "challenge2021_40.npz") as archive:
            counts = archive["ecg"][archive["record"].tolist().index(name)]
        for suffix in (".hea", ".mat"):
            record = read_file(folder / f"challenge2021_wfdb_mat/{name}{suffix}")
            np.testing.assert_array_equal(record["array"], (counts / 1000).astype(np.float32))
            assert record["lead_names"] == LEADS
        assert record["metadata"]["dx"].split(",")[0].isdigit()
        assert record["metadata"]["sex"] in ("male", "female")

    @pytest.mark.parametrize("format", ["16", "24", "32", "80", "212", "516"])
    def test_formats_units_and_gaps(self, format, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        counts = np.clip(COUNTS[:3, :99].T, -120, 120)  # an odd number of samples
        units, gains = ["mV", "uV", "V"], [200.0, 0.5, 1e5]
        wfdb.wrsamp(
            "r", 360, units, ["I", "II", "V1"], d_signal=counts, fmt=[format] * 3, adc_gain=gains, baseline=[0, 7, -5]
        )
        record = read_file("r.dat")
        expected = (counts - [0, 7, -5]) / gains * [1, 1e-3, 1e3]
        np.testing.assert_allclose(record["array"], expected.T, rtol=1e-6)
        assert record["sampling_rate"] == 360
        whole = Path("r.dat").read_bytes()
        for cut in (1, 2, 3, 7, len(whole) // 2, len(whole) - 1):
            Path("r.dat").write_bytes(whole[:-cut])
            with pytest.raises(ValueError, match=r"Cannot read .*r\.hea as WFDB"):
                read_file("r.hea")

    def test_invalid_samples_stay_nan(self, tmp_path):
        counts = np.array([1, -32768, 3], dtype="<i2")
        record = read_file(write_wfdb(tmp_path, ["r 1 100 3", "r.dat 16 1(0)/mV 16 0 0 0 0 II"], r=counts.tobytes()))
        np.testing.assert_array_equal(record["array"], [[1, np.nan, 3]])

    def test_signals_that_are_no_leads(self, tmp_path):
        """Frames of four samples of II, one of a pressure, two of a respiration in millivolts."""
        frames = np.arange(70, dtype="<i2").reshape(10, 7)
        lines = [
            "r 3 125 10 12:00:00 01/02/2020",
            "r.dat 16x4 10/mV 16 0 0 0 0 II",
            "r.dat 16 10/mmHg 16 0 0 0 0 ABP",
            "r.dat 16x2 10/mV 16 0 0 0 0 RESP",
            "# Age: NaN",
        ]
        record = read_file(write_wfdb(tmp_path, lines, r=frames.tobytes()))
        np.testing.assert_allclose(record["array"], frames[:, :4].reshape(1, -1) / 10)
        assert (record["sampling_rate"], record["lead_names"]) == (500, ["II"])
        assert record["metadata"]["left_out"] == {"ABP": "unit 'mmHg'", "RESP": "rate 250 Hz"}
        assert record["metadata"]["date"] == "2020-02-01"
        assert "age" not in record["metadata"]

    def test_names_and_length_may_be_missing(self, tmp_path):
        record = read_file(write_wfdb(tmp_path, ["# a comment", "r 2", "r.dat 16", "r.dat 16"], r=COUNTS[:2].tobytes()))
        assert (record["array"].shape, record["sampling_rate"], record["lead_names"]) == ((2, 100), 250, None)

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["r 1 100 5", "../r.dat 16"], r"'\.\./r\.dat 16' describes no signal; expected the plain name"),
            (["r 1 100 5", "/etc/passwd 16"], "describes no signal"),
            (["r 1 100 5", "https://example.org/r.dat 16"], "describes no signal"),
            (["r 1 100 5", "s.dat 16"], r"signal file 's\.dat' is not beside the header"),
            (["r 2 100 5", "r.dat 16"], "announces 2 signals and describes 1; it is cut"),
            (["r 1 100 101", "r.dat 16"], "it has 200 bytes, the header claims 202"),
            (["r 1 100 99999999999999", "r.dat 16"], r"r\.dat is cut"),
            (["r 1 100 50", "r.dat 16x999999999999"], r"r\.dat is cut"),
            (["r 1 100 50", "r.dat 16+102"], r"r\.dat is cut"),
            (["r 1 100 50", "r.dat 16:9999999999"], "skew of 9999999999 frames"),
            (["r 1 100 999999999", "r.dat 516"], "unpacks to 999999999 samples; expected 1 to"),
            (["r 1 100", "r.dat 516"], "unpacks to 0 samples"),
            (["r 1 100 50", "r.dat 16x0"], "Cannot read"),
            (["r 1 100 50", "r.dat 99"], "format '99', which wfdb does not read"),
            (["r 1 100 50", "r.dat 16 200/mmHg 16 0 0 0 0 ABP"], "no signal in volts, but {'ABP': \"unit 'mmHg'\"}"),
            (["r 1 100 50", "r.dat 16 200/µV 16 0 0 0 0 I"], "other characters than ASCII; write a unit as mV or uV"),
            (["r/2 1 100 100", "a 50", "b 50"], r"several segments \(a, b \.\.\.\); read them one by one"),
            (["r 3 100 5", "r.dat 16", "q.dat 16", "r.dat 16"], "one file in several places"),
            (["r 1 100 5", f"{'a' * 2000} 16"], "or a line of it than 1000"),
        ],
    )
    def test_wrong_headers(self, lines, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            read_file(write_wfdb(tmp_path, lines, r=bytes(200), q=bytes(200)))

    def test_signal_file_without_its_header(self, shared, tmp_path):
        folder = shared / "data/other_12lead/challenge2021_wfdb_mat"
        shutil.copy(folder / "E07500.mat", tmp_path)
        with pytest.raises(ValueError, match=r"without rate, leads and gain.*put NAME\.hea into the same folder"):
            read_file(tmp_path / "E07500.mat")
        # of another record
        (tmp_path / "E07500.hea").write_text((folder / "JS20000.hea").read_text())
        with pytest.raises(ValueError, match=r"put NAME\.hea"):
            read_file(tmp_path / "E07500.mat")


class TestEDF:
    def test_record_17_of_ptbxl(self, shared, record_17):
        record = read_file(shared / "data/formats/edf/ptbxl_00017.edf")
        np.testing.assert_allclose(record["array"], record_17 / 1000, rtol=0, atol=1e-6)
        assert (record["sampling_rate"], record["lead_names"], record["unit"]) == (500, LEADS, "mV")
        assert record["metadata"] == {"format": "EDF+C", "date": "2000-01-01"}

    @pytest.mark.parametrize("kind", ["Edf", "Bdf"])
    def test_labels_units_and_facts(self, kind, tmp_path):
        labels = {"EKG I": "mV", "ECG V1": "uV", "ecg-aVR": "V", "ECG": "mV", "III": "uV"}
        signal = edfio.EdfSignal if kind == "Edf" else edfio.BdfSignal
        signals = [
            signal(
                COUNTS[row] / 1.0,
                100,
                label=label,
                physical_dimension=unit,
                physical_range=(-1e3, 1e3),
                prefiltering="LP:150Hz",
            )
            for row, (label, unit) in enumerate(labels.items())
        ]
        patient = edfio.Patient(code="P7", sex="F", name="Somebody")
        recording = edfio.Recording(startdate=datetime.date(2020, 2, 1))
        annotations = [edfio.EdfAnnotation(0, None, "start")]
        getattr(edfio, kind)(signals, patient=patient, recording=recording, annotations=annotations).write(
            tmp_path / "a"
        )
        record = read_file(tmp_path / "a")
        scales = np.array([1, 1e-3, 1e3, 1, 1e-3])[:, None]
        np.testing.assert_allclose(record["array"] / scales, COUNTS[:5], atol=0.02)  # of 16 bits
        assert record["lead_names"] == ["I", "V1", "aVR", "ECG", "III"]
        assert record["metadata"] == {
            "format": f"{kind.upper()}+C",
            "patient_id": "P7",
            "sex": "female",
            "date": "2020-02-01",
            "filters": ["LP:150Hz"],
        }

    def test_signals_that_are_no_leads(self, tmp_path):
        twice = np.repeat(COUNTS[0], 2)
        signals = [edf_signal("ECG II"), edf_signal("SpO2", "%"), edf_signal("EMG chin", "uV", 200, twice)]
        content = bytearray(edf_bytes(*signals, edf_signal("V1")))
        (tmp_path / "a.edf").write_bytes(content)
        record = read_file(tmp_path / "a.edf")
        assert (record["sampling_rate"], record["lead_names"]) == (100, ["II", "V1"])
        np.testing.assert_allclose(record["array"], COUNTS[[0, 0]] / 1000, atol=1e-6)
        assert record["metadata"]["left_out"] == {"SpO2": "unit '%'", "EMG chin": "rate 200 Hz"}

        # no range: physical minimum and maximum of the last signal, the fields of 8 bytes after 4 x (16 + 80 + 8)
        start = 256 + 4 * (16 + 80 + 8)
        content[start + 24 : start + 32] = content[start + 56 : start + 64] = b"0       "
        (tmp_path / "a.edf").write_bytes(content)
        record = read_file(tmp_path / "a.edf")
        assert record["lead_names"] == ["II"]
        assert record["metadata"]["left_out"]["V1"] == "no physical range"

    def test_fewer_data_records_than_the_header_claims(self, tmp_path):
        content = WHOLE["edf"]
        assert content[236:244] == b"2       "
        for wrong in (content[:-1], content[:-1200], content.replace(b"2       0.5", b"3       0.5")):
            (tmp_path / "a.edf").write_bytes(wrong)
            with pytest.raises(ValueError, match=r"it holds \d data records, its header claims \d; it is cut"):
                read_file(tmp_path / "a.edf")
        (tmp_path / "a.edf").write_bytes(content.replace(b"2       0.5", b"-1      0.5"))  # not counted while recording
        assert read_file(tmp_path / "a.edf")["array"].shape == (12, 100)

    def test_discontinuous(self, tmp_path):
        content = edf_bytes(edf_signal("I"), annotations=[edfio.EdfAnnotation(0, None, "start")])
        (tmp_path / "a.edf").write_bytes(content.replace(b"EDF+C", b"EDF+D"))
        with pytest.raises(ValueError, match=r"discontinuous \(EDF\+D\), with pauses within"):
            read_file(tmp_path / "a.edf")


class TestDICOM:
    def test_rhythm_group_of_a_real_file(self, shared):
        path = shared / "data/formats/dicom/anonymous_ecg.dcm"
        record = read_file(path)
        content = path.read_bytes()
        start = content.index(bytes.fromhex("00541010") + b"OW") + 12  # (5400,1010), VR, 2 bytes, length
        assert struct.unpack_from("<I", content, start - 4) == (240000,)
        counts = np.frombuffer(content, "<i2", 120000, start).reshape(-1, 12).T
        np.testing.assert_array_equal(record["array"], (counts * 1.25 / 1000).astype(np.float32))
        assert (record["sampling_rate"], record["lead_names"], record["unit"]) == (1000, LEADS, "mV")
        assert record["metadata"] == {
            "format": "DICOM",
            "patient_id": "ANON",
            "age": 42.0,
            "sex": "female",
            "date": "2013-01-25T10:59:19",
            "device": "Mortara Instrument, Inc. el250",
            "statements": ["RITMO SINUSALE", "ECG NORMALE"],
            "filters": {"high_pass": "0.05 Hz", "low_pass": "300 Hz"},
        }

    @pytest.mark.parametrize(
        "leads",
        [
            [("5.6.3-9-1", "Lead I (Einthoven)"), ("5.6.3-9-62", ""), ("5.6.3-9-3", "?")],
            [("2:1", ""), ("2:62", "aVR, augmented voltage, right"), ("2:3", "")],
            [("131329", ""), ("131390", ""), ("131331", "")],
            [("", "Lead I (Einthoven)"), ("", "aVR, augmented voltage, right"), ("X", "lead V1")],
        ],
    )
    @pytest.mark.parametrize(("unit", "scale"), [("uV", 1e-3), ("mV", 1.0)])
    @pytest.mark.parametrize("little_endian", [True, False])
    def test_leads_and_units(self, leads, unit, scale, little_endian, tmp_path):
        group = dicom_group(COUNTS[:3], leads, unit, "<i2" if little_endian else ">i2")
        (tmp_path / "a").write_bytes(dicom_bytes(group, little_endian=little_endian))
        record = read_file(tmp_path / "a")
        assert (record["lead_names"], record["sampling_rate"]) == (["I", "aVR", "V1"], 250)
        np.testing.assert_allclose(record["array"], (COUNTS[:3] * 5.0 + 10) * scale, rtol=1e-6)
        assert record["metadata"] == {"format": "DICOM", "patient_id": "P7", "age": 42, "sex": "female"}

    def test_longest_original_group(self, tmp_path):
        groups = [dicom_group(COUNTS[:2, :n], [("2:1", ""), ("2:2", "")]) for n in (60, 80, 100)]
        groups[2].WaveformOriginality = "DERIVED"
        (tmp_path / "a").write_bytes(dicom_bytes(*groups))
        assert read_file(tmp_path / "a")["array"].shape == (2, 80)

    def test_padding_and_channels_without_a_sensitivity(self, tmp_path):
        group = dicom_group(COUNTS[:3], [("2:1", ""), ("2:2", ""), ("", "Pacing")])
        del group.ChannelDefinitionSequence[2].ChannelSensitivityUnitsSequence
        group.add_new("WaveformPaddingValue", "OW", COUNTS[0, 7].tobytes())
        (tmp_path / "a").write_bytes(dicom_bytes(group))
        record = read_file(tmp_path / "a")
        np.testing.assert_array_equal(np.isnan(record["array"]), COUNTS[:2] == COUNTS[0, 7])
        assert record["metadata"]["left_out"] == {"Pacing": "unit ''"}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                lambda group: group.add_new("WaveformData", "OW", bytes(2398)),
                "2398 bytes of waveform; 12 channels of 100",
            ),
            (lambda group: setattr(group, "NumberOfWaveformSamples", 2**31), "2147483648 samples take 51539607552"),
            (
                lambda group: setattr(group, "WaveformSampleInterpretation", "MB"),
                "its samples are 'MB'; expected one of SB",
            ),
            (lambda group: group.ChannelDefinitionSequence.pop(), "12 channels and describes 11"),
            (lambda group: setattr(group, "SamplingFrequency", 0), "it is damaged"),
        ],
    )
    def test_wrong_groups(self, change, message, tmp_path):
        group = dicom_group(COUNTS, [("", lead) for lead in LEADS])
        change(group)
        (tmp_path / "a").write_bytes(dicom_bytes(group))
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / "a")

    def test_no_waveform_and_deflated(self, tmp_path):
        (tmp_path / "a").write_bytes(dicom_bytes())
        with pytest.raises(ValueError, match="it holds no waveform, but 12-lead ECG Waveform Storage"):
            read_file(tmp_path / "a")
        content = WHOLE["dicom"].replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match="it is deflated"):
            read_file(tmp_path / "a")


class TestMATLAB:
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
            (b"MATLAB 7.3 MAT-file".ljust(512), "HDF5, as MATLAB writes with -v7.3; save it with -v7"),
            (b"\x89HDF\r\n\x1a\n".ljust(512), "HDF5"),
        ],
    )
    def test_other_content(self, content, message, tmp_path):
        (tmp_path / "a.mat").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_file(tmp_path / "a.mat")


class TestCSV:
    def read(self, text: str | bytes, path: Path) -> dict:
        (path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_file(path / "a.csv")

    @pytest.mark.parametrize("delimiter", [",", ";", "\t", ", "])
    @pytest.mark.parametrize("quote", ["", '"', "'"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_a_row_of_lead_names(self, delimiter, quote, end, tmp_path):
        rows = [[f"{quote}{name}{quote}" for name in ("I", "avr")], ["0.5", "-1e-1"], ["nan", "2"]]
        record = self.read(end.join(delimiter.join(row) for row in rows), tmp_path)
        np.testing.assert_array_equal(record["array"], [[0.5, np.nan], [-0.1, 2]])
        assert (record["lead_names"], record["sampling_rate"], record["unit"]) == (["I", "avr"], None, None)

    def test_no_names(self, tmp_path):
        rows = "\n".join(",".join(map(str, row)) for row in COUNTS.T / 1000)
        record = self.read(rows, tmp_path)
        np.testing.assert_array_equal(record["array"], COUNTS / 1000)
        assert record["lead_names"] is None
        assert read_ecg(tmp_path / "a.csv", 250).lead_names == tuple(LEADS)

    @pytest.mark.parametrize(("unit", "factor"), [("mV", 1), ("uV", 1e-3), ("µV", 1e-3), ("V", 1e3)])
    @pytest.mark.parametrize("form", ["I ({})", "I [{}]", '"I ( {} )"'])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
    def test_unit_in_the_header(self, unit, factor, form, encoding, tmp_path):
        text = f"{form.format(unit)},Resp (Ohm),II [mV]\n5,7,1\n6,8,2\n"
        record = self.read(text.encode(encoding), tmp_path)
        np.testing.assert_allclose(record["array"], [[5 * factor, 6 * factor], [1, 2]], rtol=1e-6)
        assert (record["unit"], record["lead_names"]) == ("mV", ["I", "II"])
        assert record["metadata"]["left_out"] == {"Resp": "unit 'Ohm'"}

    def test_comments(self, tmp_path):
        record = self.read("# Sampling rate: 500 Hz\n\n# unit = uV\n# Patient 7\nI,II\n5,6\n7,8\n", tmp_path)
        np.testing.assert_allclose(record["array"], [[0.005, 0.007], [0.006, 0.008]], rtol=1e-6)
        assert (record["sampling_rate"], record["unit"]) == (500, "mV")
        assert record["metadata"]["comments"] == ["Sampling rate: 500 Hz", "unit = uV", "Patient 7"]

    def test_whole_numbers_are_counts(self, tmp_path):
        self.read("I,II\n5,6\n-7,8\n", tmp_path)
        with pytest.raises(ValueError, match="digital counts say nothing about the amplitude"):
            read_ecg(tmp_path / "a.csv", 500)
        np.testing.assert_allclose(read_ecg(tmp_path / "a.csv", 500, unit="uV").array[0], [0.005, -0.007])

    @pytest.mark.parametrize(
        ("header", "unit", "rate", "digits"),
        [
            ("time", 1, 500, 3),
            ("Time (s)", 1, 360, 3),
            ("time [ms]", 1e-3, 360, 0),
            ("t", 1, 128.2, 6),
            ("time_ms", 1e-3, 250, 1),
            ("seconds", 1, 1000, 4),
        ],
    )
    def test_rate_of_the_times(self, header, unit, rate, digits, tmp_path):
        rows = [f"{3 + n / rate / unit:.{digits}f},{n / 10}" for n in range(1000)]
        record = self.read("\n".join([f"{header},V1", *rows]), tmp_path)
        assert record["sampling_rate"] == pytest.approx(rate, rel=1e-6)
        assert record["lead_names"] == ["V1"]
        assert record["array"].shape == (1, 1000)
        with pytest.raises(ValueError, match="its times are not even: steps of"):
            self.read("\n".join([f"{header},V1", *rows[:500], *rows[501:]]), tmp_path)

    def test_columns_that_only_count(self, tmp_path):
        for name in ("", "sample", "'sample #'", "Index", "Unnamed: 0"):
            record = self.read(f"{name},I,II\n0,0.5,1\n1,0.6,1\n", tmp_path)
            assert record["lead_names"] == ["I", "II"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("time,I\n0,0.1\n2,0.2\n4,0.3\n", r"its times make 0\.5 Hz; head the column 'time \(s\)' or 'time \(ms\)'"),
            ("time (min),I\n0,0.1\n2,0.2\n", "its times are in 'min'; expected s or ms"),
            ("time,I\n1,0.1\n1,0.1\n", "its times do not increase"),
            ("I,II\n0.1,0.2\n", "1 rows of numbers have 2; expected two rows at least"),
            ("time,I\n0,0.1\nnan,0.1\n", "its times do not increase"),
            ("time\n0.1\n0.2\n", "holds no column of a lead, but time"),
            ("I,II\n0.1,0.2\n0.3\n", "rows of numbers with a decimal point: the number of columns changed"),
            ("I;II\n0,1;0,2\n", "rows of numbers with a decimal point: could not convert string '0,1'"),
            ("I,II,III\n0.1,0.2\n0.1,0.2\n", "first row has 3 columns, 2 rows of numbers have 2"),
            ("Resp (Ohm)\n0.1\n0.2\n", "no signal in volts, but {'Resp': \"unit 'Ohm'\"}"),
        ],
    )
    def test_wrong_tables(self, text, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            self.read(text, tmp_path)


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
        monkeypatch.setattr(ecg_formats, "MAX_SAMPLES", 2**17)  # a MiB of doubles

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
