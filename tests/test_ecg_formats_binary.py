import binascii
import re
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from elm_ecg.ecg_formats_binary import SCP_LEADS, read_ishne, read_scp
from elm_ecg.ecg_formats_xml import read_xml
from elm_ecg.ecg_utils import STANDARD_LEADS, as_record, canonical_lead_names, select_leads

# number of code structures, then prefix bits, bits, mode, value and code of each: 0 -> "0", 16 bits after "10", and a
# switch to the other table by "11"; in the second one 0 -> "1", a switch back by "01", 16 bits after "00"
CUSTOM_TABLES = struct.pack("<H", 2) + b"".join(
    struct.pack("<H", len(codes)) + b"".join(struct.pack("<BBBhI", *code) for code in codes)
    for codes in (
        [(1, 1, 1, 0, 0b0), (2, 18, 1, 0, 0b01), (2, 2, 0, 2, 0b11)],
        [(1, 1, 1, 0, 0b1), (2, 2, 0, 1, 0b10), (2, 18, 1, 0, 0b00)],
    )
)


def section(number: int, data: bytes) -> bytes:
    data += b"\0" * (len(data) % 2)
    reserved = b"SCPECG" if number == 0 else bytes(6)
    body = struct.pack("<HIBB6s", number, 16 + len(data), 20, 20, reserved) + data
    return struct.pack("<H", binascii.crc_hqx(body, 0xFFFF)) + body


def record(sections: dict[int, bytes]) -> bytes:
    parts = {number: section(number, data) for number, data in sorted(sections.items())}
    start = 6 + 16 + 120
    pointers = b""
    for number in range(12):
        length = len(parts.get(number, b"")) if number else 136
        pointers += struct.pack("<HII", number, length, (7 if number == 0 else start + 1) if length else 0)
        start += length if number else 0
    body = section(0, pointers) + b"".join(parts.values())
    body = struct.pack("<I", len(body) + 6) + body
    return struct.pack("<H", binascii.crc_hqx(body, 0xFFFF)) + body


def reseal(content: bytes) -> bytes:
    """The record with the checksums that its bytes have, as far as its sections can be found."""
    content = bytearray(content)
    start = 6
    while start + 16 <= len(content):
        (length,) = struct.unpack_from("<I", content, start + 4)
        if not 16 <= length <= len(content) - start:
            break
        content[start : start + 2] = struct.pack("<H", binascii.crc_hqx(content[start + 2 : start + length], 0xFFFF))
        start += length
    content[2:6] = struct.pack("<I", len(content))
    content[:2] = struct.pack("<H", binascii.crc_hqx(content[2:], 0xFFFF))
    return bytes(content)


def default_code(value: int) -> str:
    """Annex C of EN 1064: -8 to 8 by a prefix, other values by 8 or 16 bits after ten bits."""
    if abs(value) <= 8:
        return "1" * abs(value) + "0" + ("" if value == 0 else "0" if value > 0 else "1")
    bits = 8 if -128 <= value < 128 else 16
    return ("1111111110" if bits == 8 else "1111111111") + f"{value & (1 << bits) - 1:0{bits}b}"


def encode(values: np.ndarray, difference: int, coding: str) -> bytes:
    values = values.astype(np.int64)
    if difference == 1:
        values = np.diff(values, prepend=0)
    elif difference == 2 and len(values) > 2:
        values = np.concatenate([values[:2], np.diff(values, 2)])
    values = values.astype(np.int16)
    if coding == "none":
        return values.astype("<i2").tobytes()
    bits = ""
    second_table = False
    for index, value in enumerate(values.tolist()):
        if coding == "default":
            bits += default_code(value)
            continue
        if index % 5 == 4:
            bits += "01" if second_table else "11"
            second_table = not second_table
        sixteen = f"{value & 0xFFFF:016b}"
        bits += ("1" if value == 0 else "00" + sixteen) if second_table else ("0" if value == 0 else "10" + sixteen)
    bits += "0" * (-len(bits) % 8)
    return int(bits or "0", 2).to_bytes(len(bits) // 8, "big")


def signals(leads: list[bytes], nanovolts: int, interval: int, difference: int, bimodal: int = 0) -> bytes:
    lengths = [len(lead) for lead in leads]
    return struct.pack(f"<HHBB{len(leads)}H", nanovolts, interval, difference, bimodal, *lengths) + b"".join(leads)


def scp(
    leads: np.ndarray,
    difference: int = 2,
    coding: str = "default",
    nanovolts: int = 1000,
    interval: int = 2000,
    first: int = 1,
    samples: int = 0,
    subtracted: bool = False,
    bimodal: bool = False,
    others: dict[int, bytes] | None = None,
) -> bytes:
    last = first + (samples or leads.shape[1]) - 1
    definition = struct.pack("<BB", len(leads), 4 | subtracted)
    definition += b"".join(struct.pack("<IIB", first, last, lead + 1) for lead in range(len(leads)))
    sections = {} if coding == "none" else {2: CUSTOM_TABLES if coding == "custom" else struct.pack("<H", 19999)}
    sections |= {3: definition} | (others or {})
    encoded = [encode(lead, difference, coding) for lead in leads]
    return record(sections | {6: signals(encoded, nanovolts, interval, difference, bimodal)})


def full_scp() -> tuple[bytes, np.ndarray]:
    """A record that uses everything: two leads with three beats, of which two are of the subtracted kind and all are
    protected from the decimation of what remains; and the microvolts that it stands for."""
    samples, reference = 160, np.round(900 * np.sin(np.arange(24) / 4) * np.array([[1], [-2]])).astype(int)
    beats = [(0, 9, 19, 32), (1, 0, 80, 0), (0, 101, 111, 124)]  # kind, first, fiducial point, last, from 1
    zones = [(9, 32), (73, 92), (101, 124)]
    stored = 16 * np.arange(samples) * np.array([[1], [-1]]) - 900  # a ramp: means of four make it exactly
    stored[:, 72:92] += 300  # the beat of its own kind
    array = stored.copy()
    for begin, end in ((8, 32), (100, 124)):
        array[:, begin:end] += reference
    compressed, start = [], 0
    for begin, end in [(begin - 1, end) for begin, end in zones] + [(samples, samples)]:
        compressed.append(stored[:, start:begin].reshape(2, -1, 4).mean(-1))
        compressed.append(stored[:, begin:end])
        start = end
    section_4 = struct.pack("<HHH", 48, 11, len(beats))
    section_4 += b"".join(struct.pack("<HIII", *beat) for beat in beats)
    section_4 += b"".join(struct.pack("<II", *zone) for zone in zones)
    section_5 = signals([encode(lead, 1, "default") for lead in reference], 2500, 2000, 1)
    content = scp(
        np.concatenate(compressed, axis=1).astype(int),
        difference=1,
        nanovolts=2500,
        interval=8000,
        samples=samples,
        subtracted=True,
        bimodal=True,
        others={4: section_4, 5: section_5},
    )
    return content, 2.5 * array


def ishne(
    samples: np.ndarray, codes: list[int], resolutions: list[int], size: int | None = None, block: bytes = b""
) -> bytes:
    """An ISHNE file of int16 [samples, leads] at 200 Hz."""
    num_leads = samples.shape[1]
    absent = [-9] * (12 - num_leads)
    header = struct.pack("<iiiih", len(block), len(samples) if size is None else size, 522, 522 + len(block), 1)
    header += struct.pack("<40s40s20shh", b"Joe", b"Doe", b"P 7\0junk", 2, 0)
    header += struct.pack("<12h", 1, 1, 1950, 22, 11, 2002, 1, 1, 2003, 9, 10, 0)
    header += struct.pack("<37h", num_leads, *codes, *absent, *[1] * num_leads, *absent, *resolutions, *absent)
    header += struct.pack("<h40sh80s80s88s", 0, b"digital", 200, b"", b"", b"") + block
    return b"ISHNE1.0" + struct.pack("<H", binascii.crc_hqx(header, 0xFFFF)) + header + samples.astype("<i2").tobytes()


def reseal_ishne(content: bytes) -> bytes:
    (start,) = struct.unpack_from("<I", content, 22)
    return content[:8] + struct.pack("<H", binascii.crc_hqx(content[10:start], 0xFFFF)) + content[10:]


def check(read, content: bytes) -> None:
    """Reads or refuses within a second."""
    start = time.process_time()
    try:
        result = read(content)
    except ValueError:
        pass
    else:
        assert result["array"].shape[0] == len(result["lead_names"])
        assert result["array"].dtype == np.float32
        assert np.isfinite(result["array"]).all()
    assert time.process_time() - start < 1


class TestSCP:
    def test_real_file(self, shared: Path):
        """The record is that of HL7's example file, where its samples stand as text."""
        read = read_scp((shared / "data/formats/scp_ecg/Example.scp").read_bytes())
        expected = read_xml((shared / "data/formats/hl7_aecg/hl7_example_aecg.xml").read_bytes())
        for key in ("sampling_rate", "unit", "lead_names"):
            assert read[key] == expected[key]
        np.testing.assert_array_equal(read["array"], expected["array"])
        assert read["array"].shape == (12, 5000)
        assert read["metadata"] == {
            "format": "SCP-ECG",
            "patient_id": "SBJ-123",
            "sex": "male",
            "date": "2002-11-22T09:10:00",
            "device": "ELI250",
        }
        leads = dict(zip(read["lead_names"], read["array"], strict=True))
        np.testing.assert_array_equal(leads["III"], leads["II"] - leads["I"])
        assert np.abs(leads["aVR"] + (leads["I"] + leads["II"]) / 2).max() <= 1.25

    def test_worked_example_of_the_standard(self):
        """EN 1064, annex C: 28 samples, by second differences and the default table."""
        expected = [
            13,
            14,
            15,
            14,
            16,
            18,
            19,
            20,
            22,
            22,
            23,
            23,
            23,
            22,
            22,
            20,
            17,
            15,
            12,
            8,
            6,
            3,
            1,
            0,
            -2,
            -2,
            -3,
            -3,
        ]
        data = bytes.fromhex("ff837fe0e6f1536559b65b964b9600")
        assert encode(np.array(expected), 2, "default") == data
        definition = struct.pack("<BBIIB", 1, 4, 1, 28, 2)
        content = record({2: struct.pack("<H", 19999), 3: definition, 6: signals([data], 5000, 2000, 2)})
        read = read_scp(content)
        np.testing.assert_array_equal(read["array"], 5 * np.array([expected]))
        assert (read["lead_names"], read["sampling_rate"]) == (["II"], 500)

    @given(
        hnp.arrays(np.int16, st.tuples(st.integers(1, 3), st.integers(1, 40))),
        st.integers(0, 2),
        st.sampled_from(["none", "default", "custom"]),
        st.integers(1, 9999),
    )
    def test_round_trip(self, leads: np.ndarray, difference: int, coding: str, first: int):
        read = read_scp(scp(leads, difference, coding, nanovolts=4880, interval=4000, first=first))
        np.testing.assert_allclose(read["array"], 4.88 * leads, rtol=1e-6)
        assert (read["sampling_rate"], read["lead_names"]) == (250, ["I", "II", "V1"][: len(leads)])

    def test_reference_beats_and_bimodal_compression(self):
        content, expected = full_scp()
        read = read_scp(content)
        assert read["sampling_rate"] == 500
        difference = np.abs(read["array"] - expected)
        assert difference[:, :2].max() <= 2.5 * 16 * 1.5  # before the first mean there is nothing to interpolate from
        assert difference[:, -2:].max() <= 2.5 * 16 * 1.5
        at_own_beat = np.r_[70:72, 92:94]  # between the ramp's last mean and the beat that was added to it
        assert difference[:, at_own_beat].max() <= 2.5 * 300
        difference[:, at_own_beat] = 0
        np.testing.assert_array_equal(difference[:, 2:-2], 0)

    def test_reference_beats_without_decimation(self):
        reference = np.array([[1, 20, 300, 20, 1]])
        rhythm = np.arange(30)[None]
        beats = struct.pack("<HHHHIIIHIII", 10, 3, 2, 0, 101, 102, 104, 0, 126, 128, 140)  # the second is cut off
        others = {4: beats, 5: signals([encode(reference[0], 2, "default")], 500, 2000, 2)}
        read = read_scp(scp(rhythm, first=101, subtracted=True, others=others))
        expected = rhythm.astype(float)
        expected[0, 0:4] += [10, 150, 10, 0.5]
        expected[0, 25:30] += [0.5, 10, 150, 10, 0.5]
        np.testing.assert_array_equal(read["array"], expected)

    def test_metadata(self):
        tags = {
            0: b"Doe\0",
            2: b"P \xe97\0",
            4: struct.pack("<HB", 18, 2),
            8: b"\2",
            14: bytes(8) + b"ELI250" + bytes(9),
            25: struct.pack("<HBB", 2002, 11, 22),
            26: bytes([25, 0, 0]),
            27: struct.pack("<H", 5),
            28: struct.pack("<H", 150),
        }
        section_1 = b"".join(struct.pack("<BH", tag, len(data)) + data for tag, data in tags.items()) + b"\xff\0\0"
        texts = [b"Sinus rhythm\0", b"Normal ECG\0"]
        section_8 = bytes(8) + b"\2" + b"".join(struct.pack("<BH", i, len(text)) + text for i, text in enumerate(texts))
        assert read_scp(scp(np.ones((1, 3)), others={1: section_1, 8: section_8}))["metadata"] == {
            "format": "SCP-ECG",
            "patient_id": "P \u00e97",
            "age": 1.5,
            "sex": "female",
            "date": "2002-11-22",
            "device": "ELI250",
            "filters": {"high_pass": "0.05 Hz", "low_pass": "150 Hz"},
            "statements": ["Sinus rhythm", "Normal ECG"],
        }

    def test_lead_names(self):
        assert set(STANDARD_LEADS) < set(SCP_LEADS.values())
        content = record(
            {3: struct.pack("<BB", 2, 4) + struct.pack("<IIB", 1, 2, 64) + struct.pack("<IIB", 1, 2, 200)}
            | {6: signals([bytes(4)] * 2, 1000, 2000, 0)}
        )
        assert read_scp(content)["lead_names"] == ["aVF", "SCP lead 200"]

    def test_errors(self):
        lead = struct.pack("<IIB", 1, 9, 1)
        rhythm = signals([bytes(18)], 1000, 2000, 0)
        tables = {
            "long": [(40, 40, 1, 0, 0)],
            "ambiguous": [(1, 1, 1, 0, 0), (2, 2, 1, 1, 2)],
            "short": [(2, 1, 1, 0, 0)],
        }
        tables |= {"wide": [(1, 40, 1, 0, 0)], "over": [(1, 1, 1, 0, 2)], "switch": [(1, 1, 0, 3, 0)], "none": []}
        tables |= {"again": [(1, 1, 0, 1, 0)]}
        table = {
            name: struct.pack("<HH", 1, len(codes)) + b"".join(struct.pack("<BBBhI", *code) for code in codes)
            for name, codes in tables.items()
        }
        leads = {3: struct.pack("<BB", 1, 4) + lead}
        huge = {3: struct.pack("<BBIIB", 1, 4, 1, 2**32 - 1, 1)}
        flagged = {3: struct.pack("<BB", 1, 5) + lead}
        beat = {4: struct.pack("<HHH", 4, 1, 0), 5: signals([bytes(4)], 1000, 2000, 0)}
        for sections, message in [
            ({}, "has the sections []; expected 3 (leads) and 6 (rhythm)"),
            (leads, "has the sections [3]"),
            ({3: b"\0\0", 6: rhythm}, "cover the samples []"),
            ({3: struct.pack("<BBIIBIIB", 2, 4, 1, 9, 1, 10, 18, 2), 6: rhythm}, "the samples [(1, 9), (10, 18)]"),
            ({3: struct.pack("<BBIIB", 1, 4, 9, 1, 1), 6: rhythm}, "1 leads of -7 samples"),
            (huge | {6: rhythm}, "1 leads of 4294967295 samples; expected 1 to 2097152"),
            ({3: b"\2\4" + lead, 6: rhythm}, "Section 3 ends after 12 bytes; expected at least 20"),
            (leads | {6: signals([bytes(16)], 1000, 2000, 0)}, "has 16 bytes; expected 9 samples of 2 bytes"),
            (leads | {6: signals([bytes(18)], 0, 2000, 0)}, "units of 0 nV"),
            (leads | {6: signals([bytes(18)], 1000, 0, 0)}, "samples of 0 us"),
            (leads | {6: signals([bytes(18)], 1000, 2000, 3)}, "differences of order 3"),
            (leads | {6: rhythm[:-4]}, "Section 6 has 22 bytes; expected 26 for its leads"),
            (leads | {2: table["long"], 6: rhythm}, "Huffman code 0 of 40 bits; expected 1 to 32"),
            (leads | {2: table["over"], 6: rhythm}, "Huffman code 2 of 1 bits"),
            (leads | {2: table["ambiguous"], 6: rhythm}, "code 01 of 2 bits starts like another"),
            (leads | {2: table["short"], 6: rhythm}, "code 00 of 1 bits starts like"),
            (leads | {2: table["wide"], 6: rhythm}, "code 0 of 40 bits starts like"),
            (leads | {2: table["none"], 6: rhythm}, "Bit 0 of a lead starts no known Huffman code"),
            (leads | {2: table["switch"], 6: rhythm}, "switch to table 3; expected 1 to 1"),
            (leads | {2: table["again"], 6: rhythm}, "expected 1 to 1, then a value"),
            (leads | {2: table["switch"][:8], 6: rhythm}, "Section 2 ends after 8 bytes"),
            (
                leads | {2: struct.pack("<H", 19999), 6: signals([b"\0"], 1, 1, 0)},
                "has 1 bytes; expected 9 samples of at",
            ),
            (
                leads | {2: struct.pack("<H", 19999), 6: signals([b"\xff\xff"], 1, 1, 0)},
                "ends after 0 samples; expected 9",
            ),
            (flagged | {6: rhythm}, "but section 4 is missing"),
            (flagged | {4: beat[4], 6: rhythm}, "but section 5 is missing"),
            (
                flagged | beat | {6: signals([bytes(18)], 1000, 3000, 0)},
                "is 3000 us, that of the reference beat 2000 us",
            ),
            (flagged | beat | {6: signals([bytes(18)], 1000, 40000, 0)}, "expected 1 to 16 times as much"),
            (leads | {1: b"\2\xff\0x\0", 6: rhythm}, "Tag 2 of section 1 has 255 bytes"),
            (leads | {6: rhythm, 8: bytes(8) + b"\1"}, "Section 8 ends after"),
        ]:
            with pytest.raises(ValueError, match=re.escape(message)):
                read_scp(record(sections))

    def test_too_large(self):
        with pytest.raises(ValueError, match="says that it has 5000000 bytes; expected at most 4194304"):
            read_scp(reseal(scp(np.ones((1, 3))).ljust(5_000_000, b"\0")))

    def test_overlapping_beats(self):
        """Thousands of subtracted beats over the whole record would take minutes to add."""
        beats = struct.pack("<HHH", 2000, 1, 4000) + struct.pack("<HIII", 0, 1, 1, 1000) * 4000
        section_5 = signals([encode(np.zeros(1000), 0, "default")], 1000, 2000, 0)
        content = scp(np.zeros((1, 1000)), subtracted=True, others={4: beats, 5: section_5})
        with pytest.raises(ValueError, match="cover more than twice the record"):
            read_scp(content)

    def test_checksums(self, shared: Path):
        content = (shared / "data/formats/scp_ecg/Example.scp").read_bytes()
        assert read_scp(content + bytes(9))["array"].shape == (12, 5000)  # padding of the storage
        rng = np.random.default_rng(0)
        for position in [0, 1, *rng.integers(22, len(content), 20)]:
            damaged = bytearray(content)
            damaged[position] ^= 1 << rng.integers(8)
            with pytest.raises(ValueError, match="the file is damaged"):
                read_scp(bytes(damaged))
        damaged = bytearray(content)
        damaged[9000] ^= 1
        damaged[:2] = struct.pack("<H", binascii.crc_hqx(damaged[2:], 0xFFFF))
        with pytest.raises(ValueError, match="Section 6 has the checksum"):
            read_scp(bytes(damaged))

    def test_truncation(self, shared: Path):
        content = (shared / "data/formats/scp_ecg/Example.scp").read_bytes()
        for length in np.random.default_rng(0).integers(0, len(content), 20):
            with pytest.raises(ValueError, match=r"is cut\.|expected b'SCPECG'"):
                read_scp(content[:length])
            check(read_scp, reseal(content[:length]))

    @pytest.mark.parametrize("content", [b"", b"\0", bytes(22), b"SCPECG" * 9, bytes(16) + b"SCPECG"])
    def test_no_scp(self, content: bytes):
        with pytest.raises(ValueError, match=r"expected b'SCPECG'|is cut\.|cut short"):
            read_scp(content)

    def test_speed(self, shared: Path):
        """12 leads of 5000 samples take some 50 ms; 2 s also on a busy machine."""
        content = (shared / "data/formats/scp_ecg/Example.scp").read_bytes()
        start = time.process_time()
        read_scp(content)
        assert time.process_time() - start < 2

    @given(st.data())
    def test_damaged_bytes_with_right_checksums(self, data: st.DataObject):
        content = bytearray(full_scp()[0])
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(6, len(content) - 1))] = data.draw(st.integers(0, 255))
        check(read_scp, reseal(bytes(content)))

    @given(st.dictionaries(st.integers(1, 11), st.binary(max_size=60), max_size=6))
    def test_random_sections(self, sections: dict[int, bytes]):
        check(read_scp, record(sections))

    @given(st.binary(max_size=200))
    def test_random_bytes(self, data: bytes):
        check(read_scp, reseal(bytes(16) + b"SCPECG" + data))


class TestLeadsCountedFromZero:
    @pytest.mark.parametrize("coding", ["none", "default"])
    @pytest.mark.parametrize("last", [20, 19])
    def test_their_last_number_may_be_the_end(self, coding: str, last: int):
        """20 samples are 0 to 20 in some writers, 0 to 19 in others; all ones fill the bits of a byte, so none is over."""
        leads = np.array([[0, 1] * 10, [1, 0] * 10])
        read = read_scp(scp(leads, 0, coding, first=0, samples=last + 1))
        np.testing.assert_array_equal(read["array"], leads)

    def test_reported_file(self, shared: Path):
        content = (shared / "data/reported/scp_leads_from_0_to_2500.scp").read_bytes()
        read = read_scp(content)
        samples = np.frombuffer(content[-40_000:], "<i2").reshape(8, 2500)
        np.testing.assert_allclose(read["array"], samples * 0.183, rtol=1e-6)
        record = select_leads(as_record(read), STANDARD_LEADS)
        assert record.array.shape == (12, 2500)
        assert record.sampling_rate == 1000


class TestISHNE:
    def test_real_file(self, shared: Path):
        read = read_ishne((shared / "data/formats/ishne/ptbxl_00017.ecg").read_bytes())
        archive = np.load(shared / "data/ptbxl/raw500.npz")
        np.testing.assert_array_equal(read["array"], archive["ecg"][archive["ecg_id"] == 17][0])
        assert (read["sampling_rate"], read["unit"], tuple(read["lead_names"])) == (500, "uV", STANDARD_LEADS)
        assert read["metadata"] == {
            "format": "ISHNE",
            "patient_id": "00017",
            "date": "2000-01-01T00:00:00",
            "device": "digital",
        }

    @given(
        hnp.arrays(np.int16, st.tuples(st.integers(1, 20), st.just(3))),
        st.lists(st.integers(1, 32767), min_size=3, max_size=3),
        st.booleans(),
        st.binary(max_size=9),
    )
    def test_round_trip(self, samples: np.ndarray, resolutions: list[int], in_all: bool, block: bytes):
        size = samples.size if in_all else len(samples)
        read = read_ishne(ishne(samples, [6, 13, 0], resolutions, size, block))
        np.testing.assert_allclose(read["array"], samples.T * np.array(resolutions)[:, None] / 1000, rtol=1e-6)
        assert (read["sampling_rate"], read["lead_names"]) == (200, ["II", "V3", "unknown 3"])
        assert read["metadata"] == {
            "format": "ISHNE",
            "patient_id": "P 7",
            "sex": "female",
            "date": "2002-11-22T09:10:00",
            "device": "digital",
        }

    def test_leads_not_available(self):
        samples = np.arange(12).reshape(3, 4)
        read = read_ishne(ishne(samples, [1, -9, 5, 6], [1000, 1000, -9, 2000]))
        assert read["lead_names"] == ["unknown 1", "II"]
        np.testing.assert_array_equal(read["array"], [[0, 4, 8], [6, 14, 22]])

    def test_all_standard_leads_have_codes(self):
        read = read_ishne(ishne(np.zeros((2, 12)), list(range(5, 17)), [1000] * 12))
        assert canonical_lead_names(read["lead_names"]) == STANDARD_LEADS

    def test_errors(self):
        content = ishne(np.arange(12).reshape(4, 3), [5, 6, 7], [1000] * 3)

        def changed(offset: int, value: int, layout: str = "<h") -> bytes:
            changed = bytearray(content)
            struct.pack_into(layout, changed, offset, value)
            return reseal_ishne(bytes(changed)) if offset != 22 else bytes(changed)

        for damaged, message in [
            (content.replace(b"ISHNE", b"ANN  "), "starts with b'ANN  1.0'; expected b'ISHNE1.0'"),
            (content[:200], "The header ends after 200 bytes"),
            (content[:-1], "holds 23 bytes of samples; expected 4 samples of 2 bytes"),
            (content[:-2], "holds 22 bytes of samples"),
            (content + b"\0\0", "holds 26 bytes of samples"),
            (content[:100] + b"x" + content[101:], "The header has the checksum"),
            (changed(22, 2**31, "<I"), "start at byte 2147483648; expected 522 to 546"),
            (changed(22, 100, "<I"), "start at byte 100"),
            (changed(14, -4, "<i"), "expected -4 samples"),
            (changed(14, 2**31 - 1, "<i"), "expected 2147483647 samples"),
            (changed(156, 0), "0 leads at 200 Hz; expected 1 to 12"),
            (changed(156, 13), "13 leads at 200 Hz"),
            (changed(272, 0), "3 leads at 0 Hz"),
            (changed(208, 0), "resolutions of [1000, 0, 1000] nV; expected above 0"),
        ]:
            with pytest.raises(ValueError, match=re.escape(message)):
                read_ishne(damaged)

    def test_truncation(self, shared: Path):
        content = (shared / "data/formats/ishne/ptbxl_00017.ecg").read_bytes()
        for length in [*range(0, 522, 40), *np.random.default_rng(0).integers(0, len(content), 20)]:
            with pytest.raises(
                ValueError, match=r"expected b'ISHNE1.0'|header ends after|start at byte|is cut\.|cut short"
            ):
                read_ishne(content[:length])

    def test_memory(self):
        """A claim of 12 leads of 2 billion samples takes no memory."""
        content = bytearray(ishne(np.zeros((2, 12)), [5] * 12, [1000] * 12))
        struct.pack_into("<i", content, 14, 2**31 - 1)
        tracemalloc.start()
        check(read_ishne, reseal_ishne(bytes(content)))
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()

    @given(st.data())
    def test_damaged_bytes_with_right_checksum(self, data: st.DataObject):
        content = bytearray(ishne(np.arange(12).reshape(4, 3), [5, 6, 7], [1000] * 3))
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        check(read_ishne, reseal_ishne(bytes(content)))

    @given(st.binary(max_size=700))
    def test_random_bytes(self, data: bytes):
        check(read_ishne, b"ISHNE1.0" + data)
