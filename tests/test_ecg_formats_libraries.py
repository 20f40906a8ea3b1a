import datetime
import shutil
import struct
from pathlib import Path

import edfio
import numpy as np
import pytest
import wfdb
from ecg_files import COUNTS, LEADS, WHOLE, dicom_bytes, dicom_group, edf_bytes, edf_signal, write_wfdb

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_utils import read_ecg


@pytest.fixture(scope="module")
def record_17(shared: Path) -> np.ndarray:
    """PTB-XL record 17 at 500 Hz in microvolts."""
    with np.load(shared / "data/ptbxl/raw500.npz") as archive:
        return archive["ecg"][archive["ecg_id"].tolist().index(17)]


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
            (["r 1 100 5", f"{'a' * 2000} 16"], "or a line than 1000"),
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
            (lambda group: group.add_new("WaveformData", "OW", bytes(2398)), "2398 bytes; 12 channels of 100"),
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
