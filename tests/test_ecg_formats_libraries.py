import datetime
import struct
from pathlib import Path

import edfio
import numpy as np
import pytest
from ecg_files import COUNTS, LEADS, WHOLE, dicom_bytes, dicom_group, edf_bytes, edf_signal

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_utils import read_ecg


@pytest.fixture(scope="module")
def record_17(shared: Path) -> np.ndarray:
    """PTB-XL record 17 at 500 Hz in microvolts."""
    with np.load(shared / "data/ptbxl/raw500.npz") as archive:
        return archive["ecg"][archive["ecg_id"].tolist().index(17)]


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

    def test_the_caller_s_unit_and_names(self, tmp_path):
        signals = [edf_signal(f"{lead}-Ref", "", counts=counts) for lead, counts in zip(LEADS, COUNTS, strict=True)]
        (tmp_path / "a.edf").write_bytes(edf_bytes(*signals))
        with pytest.raises(ValueError, match=r"no signal in volts.*--unit uV"):
            read_ecg(tmp_path / "a.edf")
        with pytest.raises(ValueError, match=r"I-Ref.*give lead_names \(in commands with that option: --lead_names\)"):
            read_ecg(tmp_path / "a.edf", unit="uV")
        record = read_ecg(tmp_path / "a.edf", unit="uV", lead_names=LEADS)
        np.testing.assert_allclose(record.array, COUNTS / 1000, atol=1e-6)

    def test_reported_files(self, shared):
        folder = shared / "data"
        expected = read_ecg(folder / "formats/edf/ptbxl_00017.edf")
        for name, given in {"label_X-Ref": {"lead_names": LEADS}, "no_units": {"unit": "uV"}}.items():
            with pytest.raises(ValueError, match=f"--{next(iter(given))}"):
                read_ecg(folder / f"reported/{name}.edf")
            record = read_ecg(folder / f"reported/{name}.edf", **given)
            np.testing.assert_array_equal(record.array, expected.array)
            assert (record.lead_names, record.sampling_rate) == (expected.lead_names, expected.sampling_rate)


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
            "left_out": {"group 2 MEDIAN BEAT": f"derived, 1.2 s at 1000 Hz: {', '.join(LEADS)}"},
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
        record = read_file(tmp_path / "a")
        assert record["array"].shape == (2, 80)
        assert record["metadata"]["left_out"] == {
            "group 1": "original, 0.24 s at 250 Hz: I, II",
            "group 3": "derived, 0.4 s at 250 Hz: I, II",
        }

    def test_groups_of_one_time(self, tmp_path):
        """Leads in two groups, a third that begins later, and a fourth with leads that are there already."""
        leads = [("2:1", ""), ("2:2", ""), ("2:61", ""), ("2:62", "")]
        groups = [dicom_group(COUNTS[:2], leads[:2]), dicom_group(COUNTS[2:4], leads[2:])]
        groups += [dicom_group(COUNTS[4:5], [("2:3", "")]), dicom_group(COUNTS[:2], leads[:2])]
        groups[2].MultiplexGroupTimeOffset = 400
        (tmp_path / "a").write_bytes(dicom_bytes(*groups))
        record = read_file(tmp_path / "a")
        np.testing.assert_allclose(record["array"], (COUNTS[:4] * 5.0 + 10) / 1000, rtol=1e-6)
        assert record["lead_names"] == ["I", "II", "III", "aVR"]
        assert record["metadata"]["left_out"] == {
            "group 3": "original, 0.4 s at 250 Hz, from 0.4 s: V1",
            "group 4": "original, 0.4 s at 250 Hz: I, II",
        }
        assert "group 3 (original, 0.4 s" in read_ecg(tmp_path / "a").metadata["notices"][0]

    def test_labels_where_no_source_stands(self, tmp_path):
        group = dicom_group(COUNTS[:2], [("", "x")] * 2)
        for channel, label in zip(group.ChannelDefinitionSequence, ("Lead I", "V5"), strict=True):
            del channel.ChannelSourceSequence
            channel.ChannelLabel = label
        (tmp_path / "a").write_bytes(dicom_bytes(group))
        assert read_file(tmp_path / "a")["lead_names"] == ["I", "V5"]

    def test_no_preamble(self, tmp_path):
        whole = WHOLE["dicom"]
        start = whole.index(b"\x08\0\x16\0")  # where the file's meta information ends
        for content in (whole[128:], whole[132:], whole[start:]):
            (tmp_path / "a").write_bytes(content)
            np.testing.assert_array_equal(
                read_file(tmp_path / "a")["array"][:, 0], (COUNTS[:, 0] * 5 + 10) / np.float32(1000)
            )

    def test_the_caller_s_unit_and_names(self, tmp_path):
        group = dicom_group(COUNTS[:2], [("", "A"), ("", "B")], unit="1")
        (tmp_path / "a").write_bytes(dicom_bytes(group))
        record = read_ecg(tmp_path / "a", unit="uV", lead_names=["V1", "V2"])
        assert record.lead_names == ("V1", "V2")
        np.testing.assert_allclose(record.array, (COUNTS[:2] * 5.0 + 10) / 1000, rtol=1e-6)

    def test_reported_files(self, shared):
        whole = read_file(shared / "data/formats/dicom/anonymous_ecg.dcm")
        for name in ("two_groups_same_time", "no_preamble"):
            record = read_file(shared / f"data/reported/{name}.dcm")
            assert (record["sampling_rate"], record["lead_names"]) == (1000, LEADS)
            np.testing.assert_array_equal(record["array"], whole["array"][:, :1500])
            assert "left_out" not in record["metadata"]

    def test_a_million_empty_items(self, tmp_path):
        sequence = b"\x08\0\x15\x11SQ\0\0\xff\xff\xff\xff"
        items = b"\xfe\xff\x00\xe0\0\0\0\0" * 1_000_000
        start = WHOLE["dicom"].index(b"\x10\0\x20\0LO")
        (tmp_path / "a").write_bytes(WHOLE["dicom"][:start] + sequence + items + WHOLE["dicom"][start:])
        with pytest.raises(ValueError, match=r"it holds 10000\d\d items; at most 50000 are read"):
            read_file(tmp_path / "a")

    @pytest.mark.parametrize("little_endian", [True, False])
    def test_large_samples_are_read_and_large_elements_not(self, little_endian, tmp_path):
        """A text that looks like the beginning of a waveform stands for none."""
        counts = np.tile(COUNTS, 2000)  # 4.6 MiB
        leads = [("", lead) for lead in LEADS]
        group = dicom_group(counts, leads, dtype="<i2" if little_endian else ">i2")
        content = dicom_bytes(group, little_endian=little_endian)
        (tmp_path / "a").write_bytes(content)
        assert read_file(tmp_path / "a")["array"].shape == counts.shape
        start = content.index(b"\x10\0\x20\0LO" if little_endian else b"\0\x10\0\x20LO")
        order = "<" if little_endian else ">"
        element = struct.pack(f"{order}HH2sH", 0x0009, 0x1001, b"LO", 0)
        claim = struct.pack(f"{order}HH2sHI", 0x5400, 0x1010, b"OW", 0, 2**23)
        text = struct.pack(f"{order}HH2sH", 0x0009, 0x1001, b"LO", len(claim)) + claim
        (tmp_path / "a").write_bytes(content[:start] + text + element * (5 * 2**17) + content[start:])
        with pytest.raises(ValueError, match="more than 4 MiB of it are no samples of waveforms"):
            read_file(tmp_path / "a")

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
