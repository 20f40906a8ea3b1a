"""ECG files that libraries of the extra `formats` read: EDF and BDF, DICOM."""

import contextlib
import io
import re
import struct
from typing import Any

import numpy as np

from .ecg_formats_binary import SCP_LEADS
from .ecg_formats_common import NOTHING_GIVEN, Given, in_millivolts, library, listed, select_signals, stated, to_sex

# EDF, EDF+ and BDF: https://www.edfplus.info/specs


def read_edf(content: bytes, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """EDF, continuous EDF+ and BDF; annotations, and signals that are not in volts, are left out."""
    edfio = library("edfio")
    is_bdf = content[:1] == b"\xff"  # the same with 24 bits a sample
    kind = content[192:197].decode("latin-1")  # "EDF+C" continuous, "EDF+D" with pauses, blank for EDF
    if kind[3:] == "+D":
        raise ValueError(f"it is discontinuous ({kind}), with pauses within; save its continuous parts one by one.")
    claimed = int(content[236:244])  # number of data records
    edf = (edfio.read_bdf if is_bdf else edfio.read_edf)(content, header_encoding="latin-1")  # fails on no byte
    if claimed not in (-1, edf.num_data_records):  # edfio reads what is there, and -1 says that nobody counted
        raise ValueError(f"it holds {edf.num_data_records} data records, its header claims {claimed}; it is cut.")
    # of signals without a range edfio gives bare counts
    signals = [
        signal
        for signal in edf.signals
        if signal.physical_min != signal.physical_max and signal.digital_min != signal.digital_max
    ]
    names = [re.sub(r"^(ECG|EKG)[\s_-]+(?=\S)", "", signal.label.strip(), flags=re.IGNORECASE) for signal in signals]
    units = [signal.physical_dimension.strip() for signal in signals]
    chosen = select_signals(names, units, [signal.sampling_frequency for signal in signals], given)
    read = [signals[row] for row in chosen.rows]
    without_range = {signal.label.strip(): "no physical range" for signal in edf.signals if signal not in signals}
    facts: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # not known, or not written as EDF+ demands
        facts["date"] = edf.startdate.isoformat()
    if kind[3:] == "+C":
        with contextlib.suppress(ValueError):
            facts |= {"patient_id": edf.patient.code, "sex": to_sex(edf.patient.sex)}
    return {
        "array": np.stack([in_millivolts(signal.data, unit) for signal, unit in zip(read, chosen.units, strict=True)]),
        "sampling_rate": read[0].sampling_frequency,
        "lead_names": chosen.lead_names,
        "unit": "mV",
        "metadata": {
            "format": kind if kind[3:] == "+C" else "BDF" if is_bdf else "EDF",
            **stated(
                **{name: fact for name, fact in facts.items() if fact not in ("X", "x")},  # not known
                filters=sorted({signal.prefiltering.strip() for signal in read} - {""}),
                left_out=chosen.left_out | without_range,
            ),
        },
    }


# DICOM waveforms: PS3.3 C.10.9, and CID 3001 for the leads

_DICOM_DTYPES = {"SB": "i1", "UB": "u1", "SS": "i2", "US": "u2", "SL": "i4", "UL": "u4"}
_DEFLATED = b"1.2.840.10008.1.2.1.99"
# of the file's meta information, and of its data set: group and number, such as (0002,0000) and (0008,0005)
_FIRST_ELEMENTS = (
    b"\2\0\0\0UL",
    b"\2\0\1\0OB",
    b"\2\0\2\0UI",
    b"\2\0\x10\0UI",
    b"\x08\0\5\0",
    b"\x08\0\x08\0",
    b"\x08\0\x16\0",
)
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # how an item of a sequence begins, little and big endian
_MAX_DICOM_ITEMS = 50_000
# value representations whose length takes four bytes, after two that are reserved (PS3.5, table 7.1-1)
_LONG_VRS = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_IMPLICIT, _BIG_ENDIAN = b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.2"
_TRANSFER_SYNTAX, _WAVEFORMS, _WAVEFORM_DATA = (0x0002, 0x0010), (0x5400, 0x0100), (0x5400, 0x1010)
_ITEM_GROUP, _UNDEFINED = 0xFFFE, 0xFFFFFFFF
_MAX_DICOM_BYTES = 4 * 2**20


def _dicom_lead(channel: Any) -> str:
    source = (channel.get("ChannelSourceSequence") or [{}])[0]  # older files have a label alone
    code, meaning = str(source.get("CodeValue", "")), str(source.get("CodeMeaning", ""))
    # SCPECG (5.6.3-9-n) and MDC (2:n, 131328 + n) number leads as SCP-ECG does
    number = re.fullmatch(r"(?:5\.6\.3-9-|2:)(\d{1,2})|131(\d{3})", code)
    if number:
        lead = SCP_LEADS.get(int(number[1] or int(number[2]) - 328))
        if lead:
            return lead
    name = re.sub(r"[(,].*", "", meaning or str(channel.get("ChannelLabel", "")))  # "Lead I (Einthoven)"
    return re.sub(r"^lead\b", "", name.strip(), flags=re.IGNORECASE).strip() or code


def is_dicom(content: bytes) -> bool:
    """With a preamble of any 128 bytes, or without, as some exporters write: then it begins with one of the first elements."""
    return content[128:132] == b"DICM" or content.startswith((b"DICM", *_FIRST_ELEMENTS))


def _waveform_bytes(content: bytes, start: int) -> int:
    """How many bytes the samples of all waveforms take, by a walk over the elements from `start` on.

    It steps into sequences and items, so that a text that looks like the beginning of a waveform counts for nothing. It ends
    early where elements are damaged, or more than `_MAX_DICOM_BYTES` are beside the samples.
    """
    found, position, ends = 0, start, [len(content)]  # ends: of the sequences and items that it is in
    order, explicit, syntax = "<", content[start + 4 : start + 6].isalpha(), b""
    while position - start - found <= _MAX_DICOM_BYTES:
        while len(ends) > 1 and position >= ends[-1]:
            ends.pop()
        if position + 8 > ends[-1]:
            break
        if syntax and content[position : position + 2] != b"\2\0":  # the meta information is over
            order, explicit, syntax = ">" if syntax == _BIG_ENDIAN else "<", syntax != _IMPLICIT, b""
        tag = struct.unpack_from(f"{order}HH", content, position)
        vr = content[position + 4 : position + 6] if explicit and tag[0] != _ITEM_GROUP else b""
        if vr and not vr.isalpha():
            break
        place, size = (8, "I") if vr in _LONG_VRS else (6, "H") if vr else (4, "I")
        if position + place + 4 > len(content):
            break
        (length,) = struct.unpack_from(order + size, content, position + place)
        position += 12 if vr in _LONG_VRS else 8
        if length == _UNDEFINED and size == "I":  # up to a mark, which is an element too
            continue
        if position + length > ends[-1]:
            break
        if vr == b"SQ" or tag[0] == _ITEM_GROUP or tag == _WAVEFORMS:
            ends.append(position + length)
            continue
        if tag == _WAVEFORM_DATA:
            found += length
        if tag == _TRANSFER_SYNTAX:
            syntax = content[position : position + length].rstrip(b"\0 ")
        position += length
    return found


def _dicom_dataset(content: bytes) -> Any:
    """The elements of a file, parsed; ValueError where it holds none of waveforms, or more than any ECG."""
    if _DEFLATED in content:  # pydicom unpacks it at one go, however large
        raise ValueError("it is deflated (transfer syntax 1.2.840.10008.1.2.1.99); save it uncompressed.")
    if (
        items := max(map(content.count, _ITEMS))
    ) > _MAX_DICOM_ITEMS:  # each takes pydicom 20 us and 2 kB, even an empty one
        raise ValueError(f"it holds {items} items; at most {_MAX_DICOM_ITEMS} are read, and an ECG has some hundreds.")
    start = 132 if content[128:132] == b"DICM" else 4 if content.startswith(b"DICM") else 0
    # a MiB of elements takes pydicom half a second
    if len(content) - start > _MAX_DICOM_BYTES + _waveform_bytes(content, start):
        raise ValueError(
            f"more than {_MAX_DICOM_BYTES // 2**20} MiB of it are no samples of waveforms; an ECG has less than one beside them."
        )
    stream = io.BytesIO(bytes(128) + b"DICM" + content[start:])
    dataset = library("pydicom").dcmread(stream)
    if not dataset.get("WaveformSequence"):
        raise ValueError(f"it holds no waveform, but {getattr(dataset.get('SOPClassUID'), 'name', 'nothing known')}.")
    return dataset


def _dicom_counts(group: Any, order: str) -> tuple[np.ndarray, Any]:
    """The samples of a group [samples, channels], and the value that stands for none."""
    num_channels, num_samples = int(group.NumberOfWaveformChannels), int(group.NumberOfWaveformSamples)
    interpretation = str(group.WaveformSampleInterpretation)
    if interpretation not in _DICOM_DTYPES:
        raise ValueError(f"its samples are {interpretation[:20]!r}; expected one of {', '.join(_DICOM_DTYPES)}.")
    dtype = np.dtype(order + _DICOM_DTYPES[interpretation])
    size, data = num_channels * num_samples * dtype.itemsize, group.WaveformData
    if group.WaveformBitsAllocated != 8 * dtype.itemsize or not size <= len(data) <= size + 1:  # padded to be even
        raise ValueError(f"it holds {len(data)} bytes; {num_channels} channels of {num_samples} samples take {size}.")
    if len(group.ChannelDefinitionSequence) != num_channels:
        described = len(group.ChannelDefinitionSequence)
        raise ValueError(f"it holds {num_channels} channels and describes {described}.")
    padding = group.get("WaveformPaddingValue")
    counts = np.frombuffer(data[:size], dtype).reshape(num_samples, num_channels)  # interleaved
    return counts, np.frombuffer(padding[: dtype.itemsize], dtype)[0] if padding else None


def _dicom_span(group: Any) -> tuple[float, int, float]:
    """Rate, number of samples and second of the start: groups that agree in these were recorded at one time."""
    return (
        float(group.SamplingFrequency),
        int(group.NumberOfWaveformSamples),
        float(group.get("MultiplexGroupTimeOffset") or 0) / 1000,  # from milliseconds
    )


def _dicom_groups(groups: list[Any]) -> tuple[list[Any], dict[str, str]]:
    """The groups of waveforms that are read, and of each other one why it is not.

    Read is the longest that was recorded, not derived, such as a median beat; and with it those recorded at the same time
    (PS3.3 A.34 lets the leads stand in several groups).
    """
    recorded = [group for group in groups if group.get("WaveformOriginality") != "DERIVED"] or groups
    longest = max(recorded, key=lambda group: _dicom_span(group)[1] / _dicom_span(group)[0])
    read, left_out = [], {}
    leads_read: set[str] = set()
    for number, group in sorted(enumerate(groups, 1), key=lambda pair: pair[1] is not longest):  # the longest first
        leads = [_dicom_lead(channel) for channel in group.get("ChannelDefinitionSequence") or []]
        is_recorded = any(group is one for one in recorded)  # == compares all samples
        if is_recorded and _dicom_span(group) == _dicom_span(longest) and leads_read.isdisjoint(leads):
            read.append(group)
            leads_read |= set(leads)
            continue
        rate, num_samples, start = _dicom_span(group)
        kind = str(group.get("WaveformOriginality") or "").lower()[:20]
        facts = [kind, f"{num_samples / rate:g} s at {rate:g} Hz", f"from {start:g} s" if start else ""]
        label = str(group.get("MultiplexGroupLabel") or "")[:40]
        left_out[f"group {number} {label}".strip()] = f"{', '.join(filter(None, facts))}: {listed(leads)}"
    return read, left_out


def _dicom_unit(channel: Any) -> str:
    if "ChannelSensitivityUnitsSequence" not in channel:  # without a sensitivity units are arbitrary
        return ""
    return str(channel.ChannelSensitivityUnitsSequence[0].CodeValue)


def read_dicom(content: bytes, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """The longest waveforms of a DICOM file that were recorded at one time."""
    dataset = _dicom_dataset(content)
    groups, left_out = _dicom_groups(list(dataset.WaveformSequence))
    order = "<" if dataset.original_encoding[1] else ">"  # little or big endian
    signals = []  # channel, its counts, the count that stands for none
    for group in groups:
        counts, padding = _dicom_counts(group, order)
        signals += [
            (channel, lead, padding) for channel, lead in zip(group.ChannelDefinitionSequence, counts.T, strict=True)
        ]
    names = [_dicom_lead(channel) for channel, *_ in signals]
    rate = _dicom_span(groups[0])[0]
    chosen = select_signals(names, [_dicom_unit(channel) for channel, *_ in signals], [rate] * len(signals), given)
    leads = []
    for row, unit in zip(chosen.rows, chosen.units, strict=True):
        channel, counts, padding = signals[row]  # the baseline is in the channel's unit, not in counts (PS3.3 C.10.9)
        gain = float(channel.get("ChannelSensitivity", 1)) * float(
            channel.get("ChannelSensitivityCorrectionFactor") or 1
        )
        lead = in_millivolts(counts * gain + float(channel.get("ChannelBaseline") or 0), unit)
        if padding is not None:
            lead[counts == padding] = np.nan  # a gap
        leads.append(lead)
    return {
        "array": np.stack(leads),
        "sampling_rate": rate,
        "lead_names": chosen.lead_names,
        "unit": "mV",
        "metadata": _dicom_metadata(dataset, signals[chosen.rows[0]][0], chosen.left_out | left_out),
    }


def _dicom_metadata(dataset: Any, channel: Any, left_out: dict[str, str]) -> dict[str, Any]:
    def text(keyword: str) -> str:
        return str(dataset.get(keyword) or "")

    age = re.fullmatch(r"(\d{3})Y", text("PatientAge"))  # DICOM's 045Y; ages in months, weeks or days are left out
    date = re.sub(r"^(\d{4})(\d\d)(\d\d)", r"\1-\2-\3", text("AcquisitionDateTime") or text("StudyDate"))
    keywords = {"high_pass": "FilterLowFrequency", "low_pass": "FilterHighFrequency", "notch": "NotchFilterFrequency"}
    filters = {name: float(channel.get(keyword) or 0) for name, keyword in keywords.items()}
    notes = dataset.get("WaveformAnnotationSequence") or []
    return {
        "format": "DICOM",
        **stated(
            patient_id=text("PatientID"),
            age=float(age[1]) if age else None,
            sex=to_sex(text("PatientSex")),
            date=re.sub(r"(?<=-\d\d)(\d\d)(\d\d)(\d\d)", r"T\1:\2:\3", date),
            device=" ".join(filter(None, (text("Manufacturer"), text("ManufacturerModelName")))),
            statements=[str(note.get("UnformattedTextValue") or "") for note in notes],
            filters={name: f"{hertz:g} Hz" for name, hertz in filters.items() if hertz},
            left_out=left_out,
        ),
    }
