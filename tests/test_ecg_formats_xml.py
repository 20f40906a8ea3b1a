import base64
import re
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import sierraecg
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sierraecg.xli import xli_decode

from elm_ecg.ecg_formats_common import Given
from elm_ecg.ecg_formats_xml import MAX_DEPTH, MAX_NODES, read_xml
from elm_ecg.ecg_utils import STANDARD_LEADS, as_record, canonical_lead_names, limb_lead_error

AECG_LEADS = ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6", "III", "aVR", "aVL", "aVF"]
FILES = [
    "hl7_aecg/fda_subject1_0.xml",
    "hl7_aecg/hl7_example_aecg.xml",
    "ge_muse_xml/braveheart_example1.xml",
    "philips_sierra_xml/129DYPRG_1_03.xml",
    "philips_sierra_xml/2020-5-18_1_04_01.xml",
]


def aecg(leads: dict[str, str], increment: str = 'value="2" unit="ms"', scale: str = 'value="2.5" unit="uV"') -> bytes:
    """An HL7 annotated ECG of the leads' digits; its first series is a representative beat."""
    sequences = "".join(
        f'<component><sequence><code code="{name}"/><value><origin value="1" unit="mV"/><scale {scale}/>'
        f"<digits>{digits}</digits></value></sequence></component>"
        for name, digits in leads.items()
    )
    time_sequence = (
        f'<component><sequence><code code="TIME_RELATIVE"/><value><head value="0" unit="s"/>'
        f"<increment {increment}/></value></sequence></component>"
    )
    sequence_set = f"<component><sequenceSet>{time_sequence}{sequences}</sequenceSet></component>"
    return (
        '<a:AnnotatedECG xmlns:a="urn:hl7-org:v3" xmlns="urn:hl7-org:v3">'
        '<component><series><code code="REPRESENTATIVE_BEAT"/></series></component>'
        f'<component><series><code code="RHYTHM"/>{sequence_set}</series></component></a:AnnotatedECG>'
    ).encode()


def muse(leads: dict[str, np.ndarray], **changes: object) -> bytes:
    """A MUSE file of int16 leads at 250 Hz; `changes` are other texts for its elements."""

    def element(tag: str, text: object) -> str:
        return f"<{tag}>{changes.get(tag, text)}</{tag}>"

    data = "".join(
        "<LeadData>"
        + element("LeadByteCountTotal", 2 * len(lead))
        + element("LeadSampleCountTotal", len(lead))
        + element("LeadAmplitudeUnitsPerBit", 4.88)
        + element("LeadAmplitudeUnits", "MICROVOLTS")
        + element("LeadID", name)
        + element("LeadSampleSize", 2)
        + element("LeadDataCRC32", zlib.crc32(lead.astype("<i2").tobytes()))
        + element("WaveFormData", base64.encodebytes(lead.astype("<i2").tobytes()).decode())
        + "</LeadData>"
        for name, lead in leads.items()
    )
    return (
        '<?xml version="1.0" encoding="ISO-8859-1"?><!DOCTYPE RestingECG SYSTEM "restecg.dtd"><RestingECG>'
        "<PatientDemographics><PatientID>J\u00f6rg 7</PatientID><PatientAge>18</PatientAge><AgeUnits>MONTHS</AgeUnits>"
        "<Gender>FEMALE</Gender></PatientDemographics><TestDemographics><AcquisitionDevice>MAC55</AcquisitionDevice>"
        "<AcquisitionTime>09:10:00</AcquisitionTime><AcquisitionDate>11-22-2002</AcquisitionDate></TestDemographics>"
        "<Diagnosis><DiagnosisStatement><StmtText>Sinus</StmtText></DiagnosisStatement><DiagnosisStatement>"
        "<StmtFlag>ENDSLINE</StmtFlag><StmtText>rhythm</StmtText></DiagnosisStatement><DiagnosisStatement>"
        "<StmtText>Normal ECG</StmtText></DiagnosisStatement></Diagnosis>"
        "<Waveform><WaveformType>Median</WaveformType></Waveform><Waveform>"
        + element("WaveformType", "Rhythm")
        + element("SampleBase", 25)
        + element("SampleExponent", 1)
        + f"<ACFilter>50</ACFilter>{data}</Waveform></RestingECG>"
    ).encode("latin-1")


def pack_lzw(data: bytes) -> bytes:
    codes = {bytes([byte]): byte for byte in range(256)}
    bits, string = "", b""
    for byte in data:
        longer = string + bytes([byte])
        if longer in codes:
            string = longer
            continue
        bits += f"{codes[string]:010b}"
        if len(codes) < 1023:
            codes[longer] = len(codes)
        string = longer[-1:]
    bits += f"{codes[string]:010b}{1023:010b}"
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def pack_xli(leads: np.ndarray) -> bytes:
    """XLI of int leads [leads, samples]: two samples, then second differences, each stored one sample later."""
    packed = b""
    for lead in leads:
        second = -np.diff(lead, 2) if len(lead) > 2 else np.zeros(0, int)
        values = np.concatenate([lead[:2], second[1:] + 64, np.zeros(1, int)])[: len(lead)].astype(np.int16)
        unsigned = values.astype(np.uint16)
        planes = (unsigned >> 8).astype(np.uint8).tobytes() + (unsigned & 255).astype(np.uint8).tobytes()
        body = pack_lzw(planes)
        first = second[:1].astype("<i2").tobytes().ljust(2, b"\0")
        packed += len(body).to_bytes(4, "little") + b"\1\0" + first + body
    return packed


def sierra(
    data: bytes, leads: str, samples: int, packing: str = 'compression="XLI"', version: str = "1.04", more: str = ""
) -> bytes:
    return (
        '<restingecgdata xmlns="http://www3.medical.philips.com"><documentinfo>'
        f"<documentversion>{version}</documentversion></documentinfo><dataacquisition><signalcharacteristics>"
        f"<samplingrate>500</samplingrate><resolution>5</resolution>{more}</signalcharacteristics></dataacquisition>"
        f'<waveforms><parsedwaveforms dataencoding="Base64" leadlabels="{leads}" numberofleads="{len(leads.split())}" '
        f'durationperchannel="{2 * samples}" {packing}>{base64.b64encode(data).decode()}</parsedwaveforms></waveforms>'
        "</restingecgdata>"
    ).encode()


def small_files() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    leads = rng.integers(-99, 99, (4, 20))
    return {
        "aecg": aecg(
            {f"MDC_ECG_LEAD_{name}": " ".join(map(str, lead)) for name, lead in zip(("I", "II"), leads, strict=False)}
        ),
        "muse": muse(dict(zip(("I", "II"), leads, strict=False))),
        "sierra": sierra(pack_xli(leads), "I II III V1", 20),
    }


def check(content: bytes) -> None:
    """Reads or refuses within a second."""
    start = time.process_time()
    try:
        read = read_xml(content)
    except ValueError:
        pass
    else:
        assert read["array"].shape[0] == len(read["lead_names"])
        assert read["sampling_rate"] > 0
        assert np.isfinite(read["array"]).all()
    assert time.process_time() - start < 1


class TestRealFiles:
    @pytest.mark.parametrize("name", FILES[:2])
    def test_hl7(self, shared: Path, name: str):
        content = (shared / "data/formats" / name).read_bytes()
        read = read_xml(content)
        assert (read["sampling_rate"], read["unit"], read["lead_names"]) == (500, "uV", AECG_LEADS)
        digits = re.findall(r"<digits>([^<]*)</digits>", content.decode())[:12]  # then 12 of the representative beat
        np.testing.assert_array_equal(read["array"], 2.5 * np.array([lead.split() for lead in digits], float))
        assert read["array"].shape == (12, 5000)
        assert {key: value for key, value in read["metadata"].items() if key != "patient_id"} == {
            "format": "HL7 aECG",
            "age": 46,
            "sex": "male",
            "date": "2002-11-22T09:10:00",
            "device": "Mortara Instrument, Inc. ELI250",
            "filters": {"low_pass": "150 Hz", "notch": "60 Hz"},
            "statements": ["Sinus Rhythm"],
        }
        assert read["metadata"]["patient_id"] in ("subject1", "SBJ-123")

    def test_muse(self, shared: Path):
        content = (shared / "data/formats" / FILES[2]).read_bytes()
        read = read_xml(content)
        data = re.findall(rb"<WaveFormData>([^<]*)<", content.partition(b">Rhythm<")[2])
        expected = 4.88 * np.stack([np.frombuffer(base64.b64decode(lead), "<i2") for lead in data])
        assert read["lead_names"] == ["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"]
        assert (read["sampling_rate"], read["unit"]) == (500, "uV")
        np.testing.assert_allclose(read["array"], expected, rtol=1e-6)
        assert read["array"].shape == (8, 5000)
        assert read["metadata"] == {
            "format": "GE MUSE XML",
            "filters": {"high_pass": "0.16 Hz", "low_pass": "150 Hz", "notch": "60 Hz"},  # 16 in the file
        }

    @pytest.mark.parametrize("name", FILES[3:])
    def test_philips(self, shared: Path, name: str):
        path = shared / "data/formats" / name
        read, expected = read_xml(path.read_bytes()), sierraecg.read_file(str(path))
        assert (read["sampling_rate"], read["unit"], tuple(read["lead_names"])) == (500, "uV", STANDARD_LEADS)
        samples = 5 * np.stack([lead.samples for lead in expected.leads]).astype(int)
        signal, mark = np.split(samples, [round(500 * read["metadata"]["calibration_start"])], axis=1)
        np.testing.assert_array_equal(read["array"], signal)
        assert (mark == mark[0]).all()
        assert np.ptp(mark) == 1000  # 1 mV
        i, ii, iii = signal[:3]
        assert np.abs(iii - ii + i).max() <= 10  # Einthoven's law
        assert i.shape[0] > 5000

    def test_philips_metadata(self, shared: Path):
        assert read_xml((shared / "data/formats" / FILES[3]).read_bytes())["metadata"] == {
            "format": "Philips Sierra XML 1.03",
            "patient_id": "1112010721168bdc",
            "age": 50,
            "sex": "male",
            "date": "2011-12-01T07:27:34",
            "device": "HeartstartMRx",
            "filters": {"high_pass": "0.05 Hz", "low_pass": "150 Hz", "notch": "60 Hz"},
            "statements": [
                "Sinus bradycardia",
                "Nonspecific intraventricular conduction delay",
                "Inferior infarct, acute (LCx)",
                ">>> Acute MI <<<",
                "ABNORMAL ECG",
            ],
            "calibration_start": 10.528,
        }

    def test_mark_of_a_file_converted_from_philips(self, shared: Path):
        content = (shared / "data/reported/philips_hl7_calibration_mark.xml").read_bytes()
        read = read_xml(content)
        digits = re.findall(r"<digits>([^<]*)</digits>", content.decode())[:12]
        samples = 5 * np.array([lead.split() for lead in digits], float)
        assert (read["sampling_rate"], read["lead_names"]) == (500, list(STANDARD_LEADS))
        np.testing.assert_array_equal(read["array"], samples[:, :5300])
        assert read["metadata"]["calibration_start"] == 10.6
        assert np.ptp(samples[:, 5300:].mean(axis=0)) == pytest.approx(1000, abs=5)
        assert limb_lead_error(as_record(read)) < 0.05

    @pytest.mark.parametrize("name", FILES)
    def test_truncation(self, shared: Path, name: str):
        content = (shared / "data/formats" / name).read_bytes()
        for length in np.random.default_rng(0).integers(0, len(content) - 16, 20):
            with pytest.raises(ValueError, match="Cannot read the XML"):
                read_xml(content[:length])

    @pytest.mark.parametrize("value", ["", ">"])
    def test_a_tag_of_a_million_attributes(self, value: str):
        """expat makes a list of them before anybody can count them."""
        attributes = " ".join(f"a{number}='{value}'" for number in range(100_000))
        content = f"<RestingECG {attributes}/>".encode()
        with pytest.raises(ValueError, match="a tag has more than 1000 attributes"):
            read_xml(content)

    def test_a_million_comments(self):
        content = b"<RestingECG>" + b"<!---->" * 1_000_000 + b"</RestingECG>"
        with pytest.raises(ValueError, match="it holds 1000002 tags and comments; at most 600000 are read"):
            read_xml(content)

    def test_list_of_attributes_is_refused(self):
        """Its default would be copied to each element: a file of 300 kB took gigabytes."""
        declaration = f'<!DOCTYPE RestingECG [<!ATTLIST a b CDATA "{"x" * 100_000}">]>'
        content = f"{declaration}<RestingECG>{'<a/>' * 50_000}</RestingECG>".encode()
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match="its DTD declares attributes"):
                read_xml(content)
            assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("name", FILES)
    def test_bit_flips(self, shared: Path, name: str):
        content = (shared / "data/formats" / name).read_bytes()
        rng = np.random.default_rng(0)
        for _ in range(3):
            damaged = bytearray(content)
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            check(bytes(damaged))


class TestHL7:
    def test_values_units_and_names(self):
        leads = {"MDC_ECG_LEAD_AVR": "1 -2\n3", "MDC_ECG_LEAD_V1": " 4 5e0 6.5 "}
        read = read_xml(aecg(leads, 'value="2500" unit="us"', 'value="0.5" unit="mV"'))
        assert (read["lead_names"], read["sampling_rate"]) == (["aVR", "V1"], 400)
        np.testing.assert_array_equal(read["array"], [[1500, 0, 2500], [3000, 3500, 4250]])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ((b'"RHYTHM"', b'"DERIVED"'), "expected one of the code 'RHYTHM'"),
            ((b'unit="ms"', b'unit="h"'), "time increment has the unit 'h'; expected one of s, ms, us"),
            ((b'value="2" ', b'value="0" '), "time increment is '0'; expected a number, at least"),
            ((b'unit="uV"', b'unit="mmHg"'), "scale of lead I has the unit 'mmHg'"),
            ((b'value="2.5"', b'value="nan"'), "scale of lead I is 'nan'"),
            ((b'<origin value="1" unit="mV"/>', b""), "<sequence> has no <value/origin>"),
            ((b"1 2 3", b"1 2"), "the same number, above 0, in each"),
            ((b"1 2 3", b"1 2 x"), "digits of lead I are not numbers"),
            ((b"1 2 3", b"1 2 1e300"), "not finite"),
            ((b"TIME_RELATIVE", b"MDC_ECG_LEAD_X"), "has no <value/scale>"),
            ((b"</series>", b"<component><sequenceSet/></component></series>"), "has 2 sequence sets"),
            ((b'value="2" unit="ms"', b'value="2" unit="us"'), None),
        ],
    )
    def test_errors(self, change: tuple[bytes, bytes], message: str | None):
        content = aecg({"MDC_ECG_LEAD_I": "1 2 3", "MDC_ECG_LEAD_II": "4 5 6"}).replace(*change)
        if message is None:
            assert read_xml(content)["sampling_rate"] == pytest.approx(500_000)
        else:
            with pytest.raises(ValueError, match=re.escape(message)):
                read_xml(content)


class TestMuse:
    def test_values_and_metadata(self):
        lead = np.array([1, -2, 32767, -32768])
        read = read_xml(muse({"I": lead, "V9": -lead.clip(-99, 99)}))
        assert (read["lead_names"], read["sampling_rate"]) == (["I", "V9"], 250)
        np.testing.assert_allclose(read["array"][0], 4.88 * lead, rtol=1e-6)
        assert read["metadata"] == {
            "format": "GE MUSE XML",
            "patient_id": "J\u00f6rg 7",
            "age": 1.5,
            "sex": "female",
            "date": "2002-11-22T09:10:00",
            "device": "MAC55",
            "filters": {"notch": "50 Hz"},
            "statements": ["Sinus rhythm", "Normal ECG"],
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"LeadSampleCountTotal": 4}, "holds 3 as its LeadSampleCountTotal, the file says 4"),
            ({"LeadByteCountTotal": "1e99"}, "LeadByteCountTotal of lead I is '1e99'; expected a number"),
            ({"LeadByteCountTotal": "6.5"}, "'6.5'; expected a whole number"),
            ({"LeadDataCRC32": 1}, "the file says 1; it is damaged"),
            ({"WaveFormData": "AAA"}, "no valid base64"),
            ({"WaveFormData": "A*AA"}, "no valid base64"),
            ({"LeadAmplitudeUnits": "INCHES"}, "has the unit 'INCHES'"),
            ({"LeadSampleSize": 4}, "samples of 4 bytes; expected 2"),
            ({"WaveformType": "Pacing"}, "of the types ['Median', 'Pacing']; expected one of the type 'Rhythm'"),
            ({"SampleBase": "-5"}, "SampleBase is '-5'"),
            ({"SampleExponent": 300}, "SampleExponent is '300'"),
        ],
    )
    def test_errors(self, changes: dict, message: str):
        with pytest.raises(ValueError, match=re.escape(message)):
            read_xml(muse({"I": np.arange(3)}, **changes))


class TestPhilips:
    @given(hnp.arrays(np.int16, st.tuples(st.integers(1, 4), st.integers(2, 60)), elements=st.integers(-2000, 2000)))
    def test_xli_is_unpacked_as_by_sierraecg(self, leads: np.ndarray):
        names = " ".join(("I", "II", "V1", "V2")[: max(2, len(leads))])
        packed = pack_xli(np.resize(leads, (len(names.split()), leads.shape[1])).astype(int))
        read = read_xml(sierra(packed, names, leads.shape[1]))
        np.testing.assert_array_equal(read["array"], 5 * np.stack(xli_decode(packed, names.split())).astype(int))
        np.testing.assert_array_equal(read["array"][: len(leads)], 5 * leads.astype(int))

    def test_recorder_arithmetic_of_16_bits(self):
        lead = np.array([0, 32767, -32768, 5, 32767, 0])
        read = read_xml(sierra(pack_xli(np.stack([lead, lead])), "I II", 6))
        np.testing.assert_array_equal(read["array"], 5 * np.stack([lead, lead]))

    def test_limb_leads_are_residuals_only_where_packed(self):
        stored = np.array([[10, 21, 7], [5, -4, 8], [1, 2, 3], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
        names = "I II III aVR aVL aVF"
        i, ii = stored[:2]
        iii = ii - i - stored[2]
        expected = [i, ii, iii, -((i + ii) // 2) - stored[3], (i - iii) // 2 - stored[4], (ii + iii) // 2 - stored[5]]
        np.testing.assert_array_equal(read_xml(sierra(pack_xli(stored), names, 3))["array"], 5 * np.stack(expected))
        plain = sierra(stored.astype("<i2").tobytes(), names, 3, packing="")
        np.testing.assert_array_equal(read_xml(plain)["array"], 5 * stored)

    @pytest.mark.parametrize("size", [-8, -(2**31), 0, 2**31 - 1, 100])
    def test_hostile_chunk_size(self, size: int):
        content = sierra(size.to_bytes(4, "little", signed=True) + bytes(12), "I II", 3)
        with pytest.raises(ValueError, match=re.escape(f"Packed lead 1 has {size} bytes; expected 1 to 8")):
            read_xml(content)

    def test_bombs(self):
        """Neither data that unpack to 600 times as much, nor a claim of a huge record, take time or memory."""
        codes = [1, *range(256, 1023)] + [1022] * 30_000  # each string is one longer than the one before
        body = int("".join(f"{code:010b}" for code in codes), 2).to_bytes(len(codes) * 10 // 8, "big")
        tracemalloc.start()
        for content, message in [
            (sierra(len(body).to_bytes(4, "little") + bytes(4) + body, "I II", 100), "expected 100 x 2"),
            (sierra(bytes(99), "I II", 10**9), "at most 16777216 in all"),
        ]:
            start = time.process_time()
            with pytest.raises(ValueError, match=message):
                read_xml(content)
            assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()

    def test_unknown_code(self):
        with pytest.raises(ValueError, match="holds the code 300, only 256 are known"):
            read_xml(sierra(b"\2\0\0\0\0\0\0\0" + (300 << 6).to_bytes(2, "big"), "I II", 3))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"version": "1.05"}, "version '1.05'; expected one of 1.03, 1.04"),
            ({"packing": 'compression="ZIP"'}, "packed by 'ZIP'; expected 'XLI'"),
            ({"packing": ""}, "expected 3 leads x 20 x 2 bytes"),
            ({"leads": "V1 V2 V3"}, "expected I and II"),
            ({"leads": ""}, "names no leads and its acquisition type is ''"),
            ({"samples": 19}, "expected 19 x 2"),
            ({"samples": 0}, "durationperchannel is '0'"),
            ({"more": "<bitspersample>12</bitspersample>"}, "'12' bits"),
        ],
    )
    def test_errors(self, arguments: dict, message: str):
        arguments = {"data": pack_xli(np.ones((3, 20), int)), "leads": "I II V1", "samples": 20} | arguments
        if arguments.get("packing") == "":
            arguments["data"] = bytes(99)
        with pytest.raises(ValueError, match=re.escape(message)):
            read_xml(sierra(**arguments))


class TestHostileXML:
    @pytest.mark.parametrize(
        "declaration",
        [
            '<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;&b;&b;">',
            '<!ENTITY a "' + "ha" * 1000 + '">',
            '<!ENTITY c SYSTEM "file:///etc/passwd">',
            '<!ENTITY c SYSTEM "http://example.com/">',
            '<!ENTITY % c SYSTEM "http://example.com/x.dtd">',
        ],
    )
    def test_entities_are_refused(self, declaration: str):
        content = f"<!DOCTYPE RestingECG [{declaration}]><RestingECG>&c;</RestingECG>"
        with pytest.raises(ValueError, match="The XML declares entities, which are not read"):
            read_xml(content.encode())

    @pytest.mark.parametrize("system", ["restecg.dtd", "file:///etc/passwd", "http://example.com/restecg.dtd"])
    def test_dtd_is_not_fetched(self, system: str, monkeypatch: pytest.MonkeyPatch):
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a DTD was fetched")

        monkeypatch.setattr("socket.socket.connect", refuse)
        monkeypatch.setattr("builtins.open", refuse)
        content = muse({"I": np.arange(3)}).replace(b"restecg.dtd", system.encode())
        assert read_xml(content)["lead_names"] == ["I"]
        with pytest.raises(ValueError, match="undefined entity"):
            read_xml(content.replace(b"<PatientID>", b"<PatientID>&xxe;"))

    def test_depth_and_size(self):
        for content in (
            b"<RestingECG>" + b"<a>" * MAX_DEPTH + b"</a>" * MAX_DEPTH + b"</RestingECG>",
            b"<a>" * 1_000,
            b"<RestingECG>" + b"<a/>" * MAX_NODES + b"</RestingECG>",
        ):
            with pytest.raises(ValueError, match="nested deeper than 100 elements or holds more than 200000 elements"):
                read_xml(content)

    @pytest.mark.parametrize("encoding", ["hex", "undefined", "rot13", "idna", "utf-7", "utf-32", "x", "shift_jis", ""])
    def test_odd_encodings(self, encoding: str):
        with pytest.raises(ValueError, match="Cannot read the XML"):
            read_xml(f'<?xml version="1.0" encoding="{encoding}"?><RestingECG>\u00e4</RestingECG>'.encode("latin-1"))

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-be", "iso-8859-1", "us-ascii", "windows-1252"])
    def test_encodings(self, encoding: str):
        text = aecg({"MDC_ECG_LEAD_I": "1 2 3"}).decode()
        content = f'<?xml version="1.0" encoding="{encoding.removesuffix("-be")}"?>{text}'.encode(encoding)
        if encoding == "utf-16-be":
            content = b"\xfe\xff" + content
        np.testing.assert_array_equal(read_xml(content)["array"], [[1002.5, 1005, 1007.5]])

    def test_unknown_root(self):
        message = "root element is <svg>; expected one of AnnotatedECG, RestingECG, restingecgdata, ECG"
        with pytest.raises(ValueError, match=message):
            read_xml(b'<svg xmlns="http://www.w3.org/2000/svg"/>')

    @pytest.mark.parametrize("content", [b"", b" ", b"\0", b"ECG", b"<", b"<RestingECG>", b"\xff\xfe"])
    def test_no_ecg(self, content: bytes):
        with pytest.raises(ValueError, match="Cannot read the XML"):
            read_xml(content)

    def test_without_defusedxml(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "defusedxml.ElementTree", None)
        with pytest.raises(ImportError, match="`pip install defusedxml`"):
            read_xml(aecg({"MDC_ECG_LEAD_I": "1 2 3"}))

    @pytest.mark.parametrize("name", ["aecg", "muse", "sierra"])
    def test_small_files_are_read(self, name: str):
        assert canonical_lead_names(read_xml(small_files()[name])["lead_names"])[:2] == ("I", "II")

    @given(st.sampled_from(sorted(small_files())), st.data())
    def test_damaged_bytes(self, name: str, data: st.DataObject):
        content = bytearray(small_files()[name])
        for _ in range(data.draw(st.integers(1, 3))):
            position = data.draw(st.integers(0, len(content) - 1))
            content[position : position + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        check(bytes(content))

    @given(
        st.sampled_from([b"<AnnotatedECG>", b"<RestingECG>", b"<restingecgdata>", b"<?xml ", b"\xff\xfe"]), st.binary()
    )
    def test_random_bytes(self, start: bytes, content: bytes):
        check(start + content)

    @given(st.binary(min_size=1, max_size=200), st.integers(1, 300))
    def test_random_xli(self, data: bytes, samples: int):
        check(sierra(len(data).to_bytes(4, "little") + bytes(4) + data, "I II", samples))


class TestMark:
    def test_only_a_mark_of_a_millivolt_in_all_leads_is_cut(self):
        rng = np.random.default_rng(0)
        heart = rng.normal(0, 300, (3, 100)).round()
        pulse = np.concatenate([np.zeros(10), np.full(20, 1000), np.zeros(10)])
        noise = rng.integers(-5, 6, (3, 40))
        ends = {"mark": pulse + noise, "half": 0.5 * pulse + noise, "flat": np.zeros((3, 40)), "none": np.zeros((3, 0))}
        ends["heart"] = pulse * np.array([[1], [-1], [1]]) + noise
        for name, end in ends.items():
            samples = np.concatenate([heart, end], axis=1).astype(int)
            leads = {
                f"MDC_ECG_LEAD_{lead}": " ".join(map(str, row))
                for lead, row in zip(("I", "II", "V1"), samples, strict=True)
            }
            read = read_xml(aecg(leads, scale='value="1" unit="uV"'))
            assert read["array"].shape[1] == (100 if name == "mark" else samples.shape[1])


class TestCaller:
    @pytest.mark.parametrize("form", ["aecg", "muse"])
    def test_unit_and_names(self, form: str):
        def content(unit: str) -> bytes:
            lead = np.array([100, -200])
            if form == "muse":
                return muse({"A": lead}, LeadAmplitudeUnits=unit, LeadAmplitudeUnitsPerBit=2)
            text = aecg({"MDC_ECG_LEAD_A": "100 -200"}, scale=f'value="2" unit="{unit}"')
            return text.replace(b'<origin value="1" unit="mV"/>', f'<origin value="0" unit="{unit}"/>'.encode())

        for unit in ("", "counts"):
            with pytest.raises(ValueError, match=f"has the unit '{unit}'"):
                read_xml(content(unit))
            for own, scale in (("uV", 1), ("mV", 1000)):
                np.testing.assert_allclose(
                    read_xml(content(unit), Given(unit=own))["array"], [[200 * scale, -400 * scale]]
                )
        read = read_xml(content("uV"), Given(["V1"], "uV"))
        np.testing.assert_allclose(read["array"], [[200, -400]])
        assert read["lead_names"] == ("V1",)
        with pytest.raises(ValueError, match="'uV', and 'mV' is given too: leave unit out"):
            read_xml(content("uV"), Given(unit="mV"))

    def test_high_pass_of_muse(self):
        """In hundredths of a hertz; other writers put hertz."""
        leads = {"I": np.array([1, 2])}
        for text, hertz in (("16", "0.16 Hz"), ("5", "0.05 Hz"), ("0.5", "0.5 Hz"), ("0", "0"), ("OFF", "OFF")):
            content = muse(leads).replace(b"<ACFilter>", f"<HighPassFilter>{text}</HighPassFilter><ACFilter>".encode())
            assert read_xml(content)["metadata"]["filters"] == {"high_pass": hertz, "notch": "50 Hz"}
