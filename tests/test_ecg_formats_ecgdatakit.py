"""MFER, AliveCor Kardia and Mortara ELI; their files are made here from the formats' descriptions."""

import base64
import json
import re
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest
from ecg_files import COUNTS, eli_bytes, kardia_bytes, mfer_bytes, mfer_definition
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_formats_common import Given
from elm_ecg.ecg_formats_ecgdatakit import read_kardia, read_mfer
from elm_ecg.ecg_formats_xml import read_xml
from elm_ecg.ecg_utils import read_ecg

LEADS = COUNTS[:2]


class TestWholeFiles:
    @pytest.mark.parametrize(
        ("content", "scale", "rate", "metadata"),
        [
            (
                mfer_bytes(),
                0.0025,
                250,
                {
                    "format": "MFER",
                    "patient_id": "P7",
                    "age": 42,
                    "sex": "female",
                    "date": "2022-11-22T09:10:00",
                    "device": "Maker ECG-1",
                    "filters": {"high_pass": "0.05 Hz", "low_pass": "150 Hz"},
                },
            ),
            (
                kardia_bytes(),
                0.0005,
                300,
                {
                    "format": "AliveCor Kardia",
                    "patient_id": "P7",
                    "date": "2022-11-22T09:10:00+00:00",
                    "device": "AliveCor triangle",
                    "statements": ["normal"],
                },
            ),
            (
                eli_bytes(),
                0.0025,
                250,
                {
                    "format": "Mortara ELI XML",
                    "patient_id": "P7",
                    "age": 42,
                    "sex": "female",
                    "date": "2022-11-22T09:10:00",
                    "device": "Mortara ELI250",
                    "filters": {"low_pass": "150 Hz"},
                    "statements": ["SINUS RHYTHM"],
                },
            ),
        ],
        ids=["mfer", "kardia", "eli"],
    )
    def test_values_and_metadata(self, content, scale, rate, metadata, tmp_path):
        (tmp_path / "a").write_bytes(content)
        record = read_file(tmp_path / "a")
        np.testing.assert_allclose(record["array"], LEADS * scale, rtol=1e-6)
        assert (record["sampling_rate"], record["lead_names"], record["unit"]) == (rate, ["I", "II"], "mV")
        assert record["metadata"] == metadata
        assert read_ecg(tmp_path / "a").lead_names == ("I", "II")

    def test_rates_are_not_rounded(self):
        interval = mfer_definition(0x0B, struct.pack("<BbH", 1, -4, 30))  # 3 ms
        assert read_mfer(mfer_bytes(more=interval))["sampling_rate"] == pytest.approx(1000 / 3)
        assert read_kardia(kardia_bytes(frequency=127.6))["sampling_rate"] == 127.6
        assert read_xml(eli_bytes(SAMPLE_FREQ="127.6"))["sampling_rate"] == 127.6

    @pytest.mark.parametrize("read", [read_mfer, read_kardia, read_xml])
    def test_without_ecgdatakit(self, read, monkeypatch):
        monkeypatch.setitem(sys.modules, "ecgdatakit.parsing", None)
        for name in [name for name in sys.modules if name.startswith("ecgdatakit.parsing.")]:
            monkeypatch.setitem(sys.modules, name, None)
        content = {read_mfer: mfer_bytes, read_kardia: kardia_bytes, read_xml: eli_bytes}[read]()
        with pytest.raises(ImportError, match="`pip install ecgdatakit`"):
            read(content)


class TestGapsAndUnits:
    def test_missing_samples_are_gaps(self):
        counts = LEADS.copy()
        counts[1, 7] = -32768  # what MWF_NUL says
        expected = np.where(counts == -32768, np.nan, counts)
        np.testing.assert_allclose(read_mfer(mfer_bytes(counts))["array"], expected * 0.0025, rtol=1e-6)
        leads = {"leadI": LEADS[0].tolist(), "leadII": [*LEADS[1, :7].tolist(), None, *LEADS[1, 8:].tolist()]}
        np.testing.assert_allclose(read_kardia(kardia_bytes(samples=leads))["array"], expected * 0.0005, rtol=1e-6)

    def test_other_signals_are_left_out(self):
        pressure = mfer_definition(0x3F, mfer_definition(0x0C, struct.pack("<BbH", 1, 0, 1)), 1)
        record = read_mfer(mfer_bytes(lead_codes=(2, 143), more=pressure))
        assert record["lead_names"] == ["II"]
        assert record["metadata"]["left_out"] == {"Blood pressure": "unit 'mmHg'"}

    @pytest.mark.parametrize(
        ("read", "content"),
        [
            (read_mfer, mfer_bytes(more=mfer_definition(0x0C, b""))),  # resets the sensitivity
            (read_kardia, kardia_bytes(amplitudeResolution=None)),
            (read_xml, eli_bytes(UNITS_PER_MV="")),
        ],
    )
    def test_counts_without_a_unit(self, read, content):
        with pytest.raises(ValueError, match=r"no signal in volts, but I \(unit ''\).*--unit uV"):
            read(content)
        np.testing.assert_allclose(read(content, Given(unit="uV"))["array"], LEADS / 1000, rtol=1e-6)

    def test_the_caller_s_names(self):
        assert read_mfer(mfer_bytes(lead_codes=()), Given(["V1", "V2"]))["lead_names"] == ["V1", "V2"]
        with pytest.raises(ValueError, match="The ECG states its lead_names"):
            read_kardia(kardia_bytes(), Given(["V1", "V2"]))


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (mfer_bytes()[:-100], "declares 400 bytes, only"),
            (mfer_bytes(more=mfer_definition(0x06, b"\2")), "1 sequence(s) with no waveform data"),
            (mfer_bytes(more=mfer_definition(0x04, b"\x65\0\0\0")), "2 missing sample(s)"),
            (
                mfer_bytes(more=mfer_definition(0x1E, LEADS.tobytes()) + mfer_definition(0x07, b"\x90\1")),
                "without a gap",
            ),
            (mfer_bytes(more=mfer_definition(0x0E, b"\1\0")), "compressed content"),
            (mfer_bytes(more=b"\x3f\x00\x80\0\0"), "leaves its length open"),
            (mfer_bytes(more=mfer_definition(0x67, b"\x80\0")), "ends within a definition"),
            (mfer_bytes(more=mfer_definition(0x05, b"\xff\xff")), "it claims 65535 channels"),
            (mfer_bytes(more=mfer_definition(0x16, b"x" * 2**21)), "other bytes by byte 2097"),
            (mfer_bytes(more=mfer_definition(0x16, b"") * 30_000), "it claims 20001 definitions"),
            (mfer_bytes(more=mfer_definition(0x1E, bytes(2**25))), "bytes of waves by byte"),
            (mfer_bytes(more=b"\x3f\0\0" * 30_000), "it claims 20001 definitions"),
            (mfer_bytes(more=bytes(2**21)), "other bytes by byte"),
            (b"\x40\x06MFR  \0", "no waveform data"),
        ],
    )
    def test_mfer(self, content, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_mfer(content)

    @pytest.mark.parametrize("kind", ["frames", "groups"])
    def test_mfer_takes_little(self, kind):
        """Frames of two bytes that claim a million samples each would be filled up, and each group within another be copied."""
        if kind == "frames":
            frames = mfer_definition(0x0A, b"\3") + mfer_definition(0x04, struct.pack("<I", 2**19))
            content = mfer_bytes(more=frames + mfer_definition(0x1E, bytes(2)) * 1000)
        else:
            waves = mfer_definition(0x1E, bytes(2**22))
            groups = b"".join(b"\x67\x84" + struct.pack(">I", 6 * level + len(waves)) for level in range(500, -1, -1))
            content = mfer_bytes(more=groups + waves)
        tracemalloc.start()
        start = time.process_time()
        with pytest.raises(ValueError, match="bytes of waves by byte" if kind == "frames" else "other bytes by byte"):
            read_mfer(content)
        assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()

    @given(
        st.lists(
            st.builds(
                mfer_definition,
                st.sampled_from([*range(0x13), 0x1E, 0x3F, 0x67, 0x80, 0x85]),
                st.binary(max_size=6) | st.just(LEADS.tobytes()),
                st.none() | st.integers(0, 255),
            ),
            max_size=12,
        )
    )
    def test_any_definitions_of_mfer(self, tmp_path_factory, definitions):
        path = tmp_path_factory.getbasetemp() / "a"
        path.write_bytes(mfer_bytes(more=b"".join(definitions)))
        start = time.process_time()
        try:
            record = read_file(path)
        except ValueError:
            pass
        else:
            assert len(record["array"]) == len(record["lead_names"])
        assert time.process_time() - start < 1

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (kardia_bytes()[:-9], "Malformed Kardia JSON"),
            (kardia_bytes(frequency=0), "frequency is missing or invalid (0)"),
            (kardia_bytes(numLeads=6), "numLeads is 6 but 2 leads are stored"),
            (kardia_bytes(samples={"leadI": [1, 2], "leadII": [1]}), "different numbers of samples: I 2, II 1"),
            (kardia_bytes(samples={}), "no samples in data.raw"),
            (json.dumps({"recordedAt": "", "data12L": {}}).encode(), "Kardia 12L recordings are not supported"),
            (kardia_bytes(tags=[[]] * 1000), "and 1005 lists or objects; at most 16777216 and 1000 are read"),
            (b'{"recordedAt": ' + b" " * 2**24, "it has 16777231 bytes"),
        ],
    )
    def test_kardia(self, content, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_kardia(content)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"DATA": "AAA"}, "invalid Base64"),
            ({"DATA": base64.b64encode(bytes(198)).decode()}, "DURATION=100 but DATA holds 99 samples"),
            ({"OFFSET": 5}, "OFFSET is non-zero for ['I', 'II']"),
            ({"BITS": 12}, "only 16-bit signed Base64 data is supported"),
            ({"SAMPLE_FREQ": 0}, "invalid SAMPLE_FREQ '0'"),
        ],
    )
    def test_eli(self, changes, message):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read_xml(eli_bytes(**changes))
        assert "/record" not in str(error.value)  # its path is that of a copy

    def test_eli_of_no_end(self):
        with pytest.raises(ValueError, match="and 200 channels; at most"):
            read_xml(eli_bytes({str(number): COUNTS[0] for number in range(200)}))
        with pytest.raises(ValueError, match="declares entities"):
            read_xml(eli_bytes().replace(b"<ECG", b'<!DOCTYPE ECG [<!ENTITY a "b">]><ECG'))
