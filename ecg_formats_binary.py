"""ECG files in the binary formats SCP-ECG and ISHNE Holter."""

import binascii
import struct
from bisect import bisect_right
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import numpy as np

from .ecg_formats_common import stated

SEXES = {1: "male", 2: "female"}  # the codes of both formats

# a record of ten seconds has 30 kB
MAX_SCP_BYTES = 1 << 22
# leads x samples of a whole SCP-ECG record: 12 leads over 5 minutes at 500 Hz; decoding takes a microsecond for each
MAX_SCP_SAMPLES = 1 << 21
# samples that a decimated one may stand for; the standard's method makes it 4
MAX_SCP_DECIMATION = 16
SCP_DEFAULT_TABLE = 19999
# codes of ISO 11073-91064, table of lead identifications; others are named "SCP lead 27"
SCP_LEADS = {
    **{1: "I", 2: "II", 3: "V1", 4: "V2", 5: "V3", 6: "V4", 7: "V5", 8: "V6", 9: "V7", 10: "V2R"},
    **{11: "V3R", 12: "V4R", 13: "V5R", 14: "V6R", 15: "V7R", 16: "X", 17: "Y", 18: "Z"},
    **{61: "III", 62: "aVR", 63: "aVL", 64: "aVF", 65: "-aVR", 66: "V8", 67: "V9", 68: "V8R", 69: "V9R"},
}
SCP_YEARS = {1: 1.0, 2: 1 / 12, 3: 1 / 52.18, 4: 1 / 365.25, 5: 1 / 8766}  # in a year, a month, a week, a day, an hour
# prefix (in the order its bits are sent), bits with those of a number that follows, value: EN 1064, annex C
SCP_DEFAULT_CODES = [
    ("0", 1, 0),
    *(("1" * n + "0" + sign, n + 2, n if sign == "0" else -n) for n in range(1, 9) for sign in "01"),
    ("1111111110", 18, 0),
    ("1111111111", 26, 0),
]

# Badilini, The ISHNE Holter standard output file format, 1998, table 1
ISHNE_LEADS = {
    **{2: "X", 3: "Y", 4: "Z", 5: "I", 6: "II", 7: "III", 8: "aVR", 9: "aVL", 10: "aVF"},
    **{11: "V1", 12: "V2", 13: "V3", 14: "V4", 15: "V5", 16: "V6", 17: "ES", 18: "AS", 19: "AI"},
}


def read_scp(content: bytes) -> dict[str, Any]:
    """Reads the rhythm data of an SCP-ECG record (EN 1064, ISO 11073-91064, up to version 2).

    Differences, Huffman coding by the default or by the file's own tables, reference beat subtraction and bimodal
    compression are undone. Samples between QRS complexes that bimodal compression replaced by means of (mostly) four
    are interpolated between these.

    Returns:
        As `ecg_formats.read_file`; the array is float32 [leads, samples] in microvolts.

    Raises:
        ValueError: the content is no such record, is damaged (checksums, lengths, codes), or has leads that were not
            recorded at one time.
    """
    sections = _scp_sections(content)
    for number in (3, 6):
        if number not in sections:
            raise ValueError(f"The record has the sections {sorted(sections)}; expected 3 (leads) and 6 (rhythm).")
    lead_names, first_sample, num_samples, subtracted = _scp_leads(sections[3])
    try:
        array, interval = _scp_rhythm(sections, len(lead_names), first_sample, num_samples, subtracted)
    except ValueError:
        if first_sample > 0:  # as the standard counts
            raise
        # some writers count from 0, and their last number is that of no sample any more
        array, interval = _scp_rhythm(sections, len(lead_names), first_sample, num_samples - 1, subtracted)
    return {
        "array": array,
        "sampling_rate": 1e6 / interval,  # microseconds
        "lead_names": lead_names,
        "unit": "uV",
        "metadata": {"format": "SCP-ECG", **_scp_header(sections), **_scp_statements(sections)},
    }


def _scp_rhythm(
    sections: dict[int, bytes], num_leads: int, first_sample: int, num_samples: int, subtracted: bool
) -> tuple[np.ndarray, int]:
    """float32 [leads, samples] in microvolts, and the microseconds between samples."""
    tables = _scp_tables(sections[2]) if 2 in sections else None  # without it nothing is Huffman coded
    nanovolts, interval, difference, bimodal, encoded = _scp_signals(sections[6], 6, num_leads)
    index = np.arange(num_samples)
    group = index  # of each sample the stored value that it went into: its own, where nothing is decimated
    if subtracted or bimodal:
        for number in (4, 5):
            if number not in sections:
                raise ValueError(f"The rhythm lacks QRS complexes or is decimated, but section {number} is missing.")
        beats, protected, beat_milliseconds, fiducial = _scp_beats(sections[4])
        beat_nanovolts, beat_interval, beat_difference, _, beat_encoded = _scp_signals(sections[5], 5, num_leads)
        decimation, remainder = divmod(interval, beat_interval)  # the rhythm's is that after decimation
        if remainder or not 1 <= decimation <= MAX_SCP_DECIMATION:
            raise ValueError(
                f"The sample interval of the rhythm is {interval} us, that of the reference beat {beat_interval} us; "
                f"expected 1 to {MAX_SCP_DECIMATION} times as much."
            )
        interval = beat_interval  # from here on that of the record as it was
        group = _scp_groups(num_samples, decimation, protected - first_sample if bimodal else protected[:0])

    times = np.bincount(group, weights=index) / np.bincount(group)  # mean place of what each stored value stands for
    array = np.empty((num_leads, num_samples), np.float32)
    for row, data in zip(array, encoded, strict=True):
        stored = _scp_decode(data, len(times), difference, tables) * (nanovolts / 1000)
        row[:] = stored if len(times) == num_samples else np.interp(index, times, stored)
    if subtracted:
        beat_samples = beat_milliseconds * 1000 // beat_interval
        reference = np.stack([_scp_decode(data, beat_samples, beat_difference, tables) for data in beat_encoded])
        _scp_add_beats(array, reference * (beat_nanovolts / 1000), beats - first_sample, fiducial - 1)  # counted from 1
    return array, interval


def _unpack(layout: str, data: bytes, offset: int, what: str) -> tuple:
    size = struct.calcsize(layout)
    if offset + size > len(data):
        raise ValueError(f"{what} ends after {len(data)} bytes; expected at least {offset + size}. The file is cut.")
    return struct.unpack_from(layout, data, offset)


def _check_crc(data: bytes, crc: int, what: str) -> None:
    actual = binascii.crc_hqx(data, 0xFFFF)  # CRC-CCITT, in both formats
    if actual != crc:
        raise ValueError(f"{what} has the checksum {actual:#06x}, and the file says {crc:#06x}; the file is damaged.")


def _date(date: Sequence[int], time: Sequence[int] | None) -> str | None:
    """Year, month, day and hour, minute, second as 2002-11-22T09:10:00; without the time, or None, where impossible."""
    day = "{:04}-{:02}-{:02}".format(*date)
    moments = [day + "T{:02}:{:02}:{:02}".format(*time), day] if time else [day]
    for moment in moments:
        try:
            datetime.fromisoformat(moment)
        except ValueError:
            continue
        return moment
    return None


def _string(data: bytes) -> str:
    return "".join(filter(str.isprintable, data.split(b"\0")[0].decode("latin-1"))).strip()


def _scp_sections(content: bytes) -> dict[int, bytes]:
    """The data of each section, without its header, by number."""
    if content[16:22] != b"SCPECG":
        raise ValueError(f"Bytes 16 to 21 are {content[16:22]!r}; expected b'SCPECG', as in any SCP-ECG record.")
    crc, size = _unpack("<HI", content, 0, "The record")
    if size > MAX_SCP_BYTES:
        raise ValueError(f"The record says that it has {size} bytes; expected at most {MAX_SCP_BYTES}, as of any ECG.")
    if not 22 <= size <= len(content):
        raise ValueError(f"The record says that it has {size} bytes, and there are {len(content)}. The file is cut.")
    _check_crc(content[2:size], crc, "The record")

    def section(start: int, number: int) -> bytes:
        crc, actual, length = _unpack("<HHI", content, start, "The record")
        if actual != number or length < 16 or start + length > size:
            raise ValueError(
                f"At byte {start} stands section {actual} of {length} bytes; expected section {number}, of 16 to "
                f"{size - start} bytes."
            )
        _check_crc(content[start + 2 : start + length], crc, f"Section {number}")
        return content[start + 16 : start + length]

    pointers = section(6, 0)  # behind the record's checksum and size
    sections = {}
    for offset in range(0, len(pointers) - 9, 10):
        number, length, start = _unpack("<HII", pointers, offset, "Section 0")
        if 0 < number < 12 and length and start:  # length 0: not there; higher numbers are reserved, or the maker's
            sections[number] = section(start - 1, number)  # the file counts bytes from 1
    return sections


def _scp_leads(section: bytes) -> tuple[list[str], int, int, bool]:
    """Names, number of the first sample, number of samples, and whether reference beats were subtracted."""
    num_leads, flags = _unpack("<BB", section, 0, "Section 3")
    leads = [_unpack("<IIB", section, 2 + 9 * lead, "Section 3") for lead in range(num_leads)]
    spans = sorted({(first, last) for first, last, _ in leads})
    if len(spans) != 1:
        raise ValueError(f"The leads cover the samples {spans[:12]}; expected the same samples of one or more leads.")
    first, last = spans[0]
    num_samples = last - first + 1
    if num_samples < 1 or num_samples * num_leads > MAX_SCP_SAMPLES:
        raise ValueError(f"The record has {num_leads} leads of {num_samples} samples; expected 1 to {MAX_SCP_SAMPLES}.")
    return [SCP_LEADS.get(lead, f"SCP lead {lead}") for *_, lead in leads], first, num_samples, bool(flags & 1)


def _scp_signals(section: bytes, number: int, num_leads: int) -> tuple[int, int, int, bool, list[bytes]]:
    """Nanovolts of a unit, microseconds of a sample, order of the differences, bimodal or not, each lead's bytes."""
    what = f"Section {number}"
    nanovolts, interval, difference, flags = _unpack("<HHBB", section, 0, what)
    if not nanovolts or not interval or difference > 2:
        raise ValueError(
            f"{what} has units of {nanovolts} nV, samples of {interval} us and differences of order {difference}; "
            "expected above 0, above 0, and 0 to 2."
        )
    lengths = _unpack(f"<{num_leads}H", section, 6, what)
    ends = np.cumsum([6 + 2 * num_leads, *lengths]).tolist()
    if ends[-1] > len(section):
        raise ValueError(f"{what} has {len(section)} bytes; expected {ends[-1]} for its leads.")
    return (nanovolts, interval, difference, bool(flags & 1), [section[a:b] for a, b in pairwise(ends)])


def _scp_beats(section: bytes) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Section 4, in sample numbers that start at 1.

    Returns:
        int64 [beats, 3], first and last sample and fiducial point of the beats that were subtracted; int64 [zones, 2],
        first and last sample of the zones that were not decimated; the reference beat's milliseconds and fiducial
        point.
    """
    milliseconds, fiducial, num_beats = _unpack("<HHH", section, 0, "Section 4")
    beats = [_unpack("<HIII", section, 6 + 14 * beat, "Section 4") for beat in range(num_beats)]
    offset = 6 + 14 * num_beats  # of each: type, first sample, fiducial point, last sample
    protected = []
    if offset + 8 * num_beats <= len(section):
        protected = [_unpack("<II", section, offset + 8 * beat, "Section 4") for beat in range(num_beats)]
    subtracted = [(first, last, point) for kind, first, point, last in beats if kind == 0]  # type 0: like the reference
    return (
        np.array(subtracted, np.int64).reshape(-1, 3),
        np.array(protected, np.int64).reshape(-1, 2),
        milliseconds,
        fiducial,
    )


def _scp_groups(num_samples: int, decimation: int, protected: np.ndarray) -> np.ndarray:
    """The stored value that each sample went into, int64 [samples].

    Protected samples are stored as they are, those between in groups of `decimation`; the last of a run may be shorter.
    """
    index = np.arange(num_samples)
    own = np.zeros(num_samples, bool)
    for first, last in protected.tolist():
        own[max(first, 0) : max(last + 1, 0)] = True  # a negative index would count from the end
    run_start = np.maximum.accumulate(np.where(np.diff(own, prepend=own[0]), index, 0))  # index of the last change
    return np.cumsum(own | ((index - run_start) % decimation == 0)) - 1


def _scp_add_beats(array: np.ndarray, reference: np.ndarray, beats: np.ndarray, fiducial: int) -> None:
    """Adds the reference beat [leads, samples] to the array at each beat, aligned by the fiducial points, in place."""
    num_samples, beat_samples = array.shape[1], reference.shape[1]
    zones = []
    for first, last, point in beats.tolist():
        shift = fiducial - point  # from a sample of the array to that of the reference
        begin, end = max(first, 0, -shift), min(last + 1, num_samples, beat_samples - shift)
        if begin < end:
            zones.append((begin, end, shift))
    if sum(end - begin for begin, end, _ in zones) > 2 * num_samples:
        raise ValueError("The subtracted beats cover more than twice the record; section 4 is damaged.")
    for begin, end, shift in zones:
        array[:, begin:end] += reference[:, begin + shift : end + shift]


class _HuffmanTable:
    """Prefix codes as intervals of the next 32 bits: `starts`, and in `codes` end, bits, further bits, switch, value.

    Args:
        codes: prefix as a string of 0 and 1, number of bits in all, whether it switches to the table `value`, value.
    """

    def __init__(self, codes: list[tuple[str, int, bool, int]]) -> None:
        self.starts: list[int] = []
        self.codes: list[tuple[int, int, int, bool, int]] = []
        end = 0
        for prefix, bits, switch, value in sorted(codes):  # as text in the order of their intervals
            start, further = int(prefix.ljust(32, "0"), 2), bits - len(prefix)
            if start < end or not 0 <= further <= 16:
                raise ValueError(f"Huffman code {prefix} of {bits} bits starts like another, or is too short or long.")
            end = start + (1 << 32 - len(prefix))
            self.starts.append(start)
            self.codes.append((end, bits, further, switch, value))


def _scp_tables(section: bytes) -> list[_HuffmanTable] | None:
    """The Huffman tables of section 2, or None where the data are not Huffman coded."""
    (num_tables,) = _unpack("<H", section, 0, "Section 2")
    if num_tables == SCP_DEFAULT_TABLE:
        return [_HuffmanTable([(prefix, bits, False, value) for prefix, bits, value in SCP_DEFAULT_CODES])]
    tables = []
    offset = 2
    for _ in range(num_tables):
        (num_codes,) = _unpack("<H", section, offset, "Section 2")
        offset += 2
        codes = []
        for _ in range(num_codes):
            prefix_bits, bits, mode, value, code = _unpack("<BBBhI", section, offset, "Section 2")
            offset += 9
            if not 1 <= prefix_bits <= 32 or code >> prefix_bits:
                raise ValueError(f"Section 2 has the Huffman code {code} of {prefix_bits} bits; expected 1 to 32 bits.")
            # stored with the bit that is sent first as the lowest one
            codes.append((f"{code:0{prefix_bits}b}"[::-1], bits, mode == 0, value))
        tables.append(_HuffmanTable(codes))
    return tables or None


def _scp_decode(data: bytes, num_samples: int, difference: int, tables: list[_HuffmanTable] | None) -> np.ndarray:
    """One lead, int16 [samples]."""
    if tables is not None:
        values = _huffman_decode(data, num_samples, tables)
    elif 2 * num_samples <= len(data):
        values = np.frombuffer(data, "<i2", num_samples).astype(np.int64)
    else:
        raise ValueError(f"A lead has {len(data)} bytes; expected {num_samples} samples of 2 bytes.")
    if difference == 2 and num_samples > 1:
        values[1] -= values[0]  # the first two are samples, the others second differences
        values[1:] = np.cumsum(values[1:])
    if difference:
        values = np.cumsum(values)
    return values.astype(np.int16)  # 16-bit arithmetic, as the recorder's


def _huffman_decode(data: bytes, num_samples: int, tables: list[_HuffmanTable]) -> np.ndarray:
    """int64 [samples]. A code stands for a value, for the signed number that its further bits make, or for a table."""
    num_bits = 8 * len(data)
    if num_samples > num_bits:
        raise ValueError(f"A lead has {len(data)} bytes; expected {num_samples} samples of at least one bit.")
    padded = data + bytes(8)  # of the last window
    values: list[int] = []
    position = 0
    table, switched = tables[0], False
    while len(values) < num_samples:
        start = position >> 3
        # the next 64 bits, of which the first 32 choose the code
        window = int.from_bytes(padded[start : start + 8], "big") << (position & 7) & 0xFFFFFFFFFFFFFFFF
        code = bisect_right(table.starts, window >> 32) - 1
        if code < 0 or window >> 32 >= table.codes[code][0]:
            raise ValueError(f"Bit {position} of a lead starts no known Huffman code; the file is damaged.")
        _, bits, further, switch, value = table.codes[code]
        position += bits
        if position > num_bits:
            raise ValueError(f"A lead ends after {len(values)} samples; expected {num_samples}.")
        if switch:
            if switched or not 1 <= value <= len(tables):
                raise ValueError(f"Huffman codes switch to table {value}; expected 1 to {len(tables)}, then a value.")
            table, switched = tables[value - 1], True  # for all that follows, until the next switch
            continue
        if further:  # prefix and these are 48 bits at most, and the window has 57 at least
            value = window >> (64 - bits) & ((1 << further) - 1)
            value -= (value >> (further - 1)) << further  # two's complement
        values.append(value)
        switched = False
    return np.array(values, np.int64)


def _scp_header(sections: dict[int, bytes]) -> dict[str, Any]:
    """What section 1 says of the patient and the recording."""
    section = sections.get(1, b"")
    tags: dict[int, bytes] = {}
    offset = 0
    while offset < len(section) and section[offset] != 255:  # tag 255 ends the section
        tag, length = _unpack("<BH", section, offset, "Section 1")
        if offset + 3 + length > len(section):
            raise ValueError(f"Tag {tag} of section 1 has {length} bytes, beyond the section's end.")
        tags[tag] = section[offset + 3 : offset + 3 + length]
        offset += 3 + length

    def fields(tag: int, layout: str) -> tuple | None:
        data = tags.get(tag, b"")
        return struct.unpack(layout, data) if len(data) == struct.calcsize(layout) else None

    metadata: dict[str, Any] = {"patient_id": _string(tags.get(2, b""))}
    # tags of EN 1064: 4 age, 8 sex, 25 and 26 date and time, 14 device, 27 and 28 filters
    if (age := fields(4, "<HB")) and age[1] in SCP_YEARS:
        metadata["age"] = round(age[0] * SCP_YEARS[age[1]], 3)
    if sex := fields(8, "<B"):
        metadata["sex"] = SEXES.get(sex[0])
    if day := fields(25, "<HBB"):
        metadata["date"] = _date(day, fields(26, "<BBB"))
    metadata["device"] = _string(tags.get(14, b"")[8:14])  # the model within the description
    (high_pass,), (low_pass,) = fields(27, "<H") or (0,), fields(28, "<H") or (0,)
    filters = {"high_pass": f"{high_pass / 100:g} Hz", "low_pass": f"{low_pass} Hz"}  # high-pass in 0.01 Hz
    metadata["filters"] = {name: value for name, value in filters.items() if value != "0 Hz"}
    return stated(**metadata)


def _scp_statements(sections: dict[int, bytes]) -> dict[str, Any]:
    """The interpretation as text, section 8."""
    section = sections.get(8, b"")
    statements = []
    offset = 9  # behind status, date and time, and the number of statements
    for _ in range(section[8] if len(section) > 8 else 0):
        _, length = _unpack("<BH", section, offset, "Section 8")
        statements.append(_string(section[offset + 3 : offset + 3 + length]))
        offset += 3 + length
    return stated(statements=statements)


def read_ishne(content: bytes) -> dict[str, Any]:
    """Reads an ISHNE Holter file, version 1.0 (Badilini, 1998).

    Leads that the header marks as not available are left out; those without a name are called "unknown 1" and so on, by
    their place.

    Returns:
        As `ecg_formats.read_file`; the array is float32 [leads, samples] in microvolts.

    Raises:
        ValueError: the content is no such file, is damaged (checksum, length), or its header holds impossible values.
    """
    if content[:8] != b"ISHNE1.0":
        raise ValueError(f"The file starts with {content[:8]!r}; expected b'ISHNE1.0'.")
    # the offsets are those of table 1 of the standard
    crc, _, size, _, start = _unpack("<HiiiI", content, 8, "The header")
    patient_id, sex = _unpack("<20sh", content, 108, "The header")
    day, month, year = _unpack("<hhh", content, 138, "The header")
    time = _unpack("<hhh", content, 150, "The header")
    (num_leads,) = _unpack("<h", content, 156, "The header")
    codes, _, resolutions = np.array(_unpack("<36h", content, 158, "The header")).reshape(3, 12)  # _: quality
    recorder, rate = _unpack("<40sh", content, 232, "The header")
    if not 522 <= start <= len(content):
        raise ValueError(f"The samples are said to start at byte {start}; expected 522 to {len(content)}.")
    _check_crc(content[10:start], crc, "The header")  # behind the magic number and the checksum itself
    if not 1 <= num_leads <= 12 or rate < 1:
        raise ValueError(f"The header says {num_leads} leads at {rate} Hz; expected 1 to 12 leads at 1 Hz or more.")

    # the standard leaves open whether the size counts the samples of one or of all leads
    num_values, remainder = divmod(len(content) - start, 2)
    if remainder or size < 1 or num_values not in (size * num_leads, size) or num_values % num_leads:
        raise ValueError(
            f"The file holds {len(content) - start} bytes of samples; expected {size} samples of 2 bytes, in all or "
            f"for each of {num_leads} leads. It is damaged or cut short."
        )
    available = [lead for lead in range(num_leads) if codes[lead] != -9 and resolutions[lead] != -9]  # -9: not there
    if not available or resolutions[available].min() < 1:
        raise ValueError(f"The leads have resolutions of {resolutions[:num_leads].tolist()} nV; expected above 0.")
    samples = np.frombuffer(content, "<i2", num_values, start).reshape(-1, num_leads).T[available]  # interleaved
    metadata = stated(
        format="ISHNE",
        patient_id=_string(patient_id),
        sex=SEXES.get(sex),
        date=_date((year, month, day), time),
        device=_string(recorder),
    )
    return {
        "array": samples * (resolutions[available, None] / 1000).astype(np.float32),
        "sampling_rate": float(rate),
        "lead_names": [ISHNE_LEADS.get(codes[lead], f"unknown {lead + 1}") for lead in available],
        "unit": "uV",
        "metadata": metadata,
    }
