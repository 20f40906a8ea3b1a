"""ECG files that libraries of the extra `formats` read: WFDB, EDF and BDF, DICOM."""

import contextlib
import io
import math
import os
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .ecg_formats_binary import SCP_LEADS
from .ecg_formats_common import (
    MAX_FILE_BYTES,
    MAX_SAMPLES,
    content_lines,
    in_millivolts,
    library,
    select_signals,
    stated,
    to_number,
    to_sex,
)

# WFDB: https://wfdb.io/spec/header-files.html

_MAX_HEADER_BYTES = 2**18
# the standard says 255; wfdb's patterns take time with the square of a line
_MAX_HEADER_LINE = 1000
# by format; 212 packs two samples into three bytes, 310 and 311 three into four
_BITS_PER_SAMPLE = {"8": 8, "16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12, "310": 32 / 3}
_BITS_PER_SAMPLE["311"] = _BITS_PER_SAMPLE["310"]
_FLAC_FORMATS = ("508", "516", "524")  # compressed: their size says nothing about the number of samples


def is_wfdb_header(content: bytes) -> bool:
    """A line `NAME[/SEGMENTS] SIGNALS [RATE ...]`, and none of numbers after it, as in a table."""
    record, signal = [*content_lines(content[:4096]), b"", b""][:2]
    return bool(
        re.fullmatch(rb"[-\w]+(/\d+)?[ \t]+\d+([ \t][-\d.:/() \t]*)?", record)
        and not re.fullmatch(rb"[-+\d.eE \t]+", signal)
    )


def wfdb_header(path: Path) -> Path | None:
    """The header of the WFDB record that `path` stands for: itself, its name without suffix, or one of its signals."""
    header = path.with_name(f"{path.name}.hea") if not path.exists() else path.with_suffix(".hea")
    if header == path or not header.is_file() or header.stat().st_size > _MAX_HEADER_BYTES:
        return None  # a header itself is told by its content
    content = header.read_bytes()
    signals = [line.split()[0] for line in content_lines(content)[1:]]  # the name of its file stands first
    return header if is_wfdb_header(content) and (not path.exists() or os.fsencode(path.name) in signals) else None


def _wfdb_signals(header: Path) -> tuple[float, list[dict[str, str]]]:
    """Frames per second and the fields of a header's signal lines, checked against the signal files."""
    with header.open("rb") as file:
        content = file.read(_MAX_HEADER_BYTES + 1)  # one more shows that it is longer
    lines = content_lines(content)
    if len(content) > _MAX_HEADER_BYTES or max(map(len, lines)) > _MAX_HEADER_LINE:
        raise ValueError(f"its header is longer than {_MAX_HEADER_BYTES} bytes, or a line than {_MAX_HEADER_LINE}.")
    if not all(line.isascii() for line in lines):  # wfdb drops the mu of "μV"
        raise ValueError("its header holds other characters than ASCII; write a unit as mV or uV.")
    if "::" in str(header.absolute()):  # fsspec, below wfdb, would take it for a chain of addresses
        raise ValueError("its path holds '::'; rename the folder.")
    patterns = library("wfdb.io.header")  # wfdb's own, so that it reads what was checked here
    record = patterns.rx_record.match(lines[0].decode())
    if record["n_seg"]:
        segments = [line.split()[0].decode() for line in lines[1:6]]
        raise ValueError(f"it is a record of several segments ({', '.join(segments)} ...); read them one by one.")
    signals = []
    for line in map(bytes.decode, lines[1:]):
        match = patterns.rx_signal.match(line)
        if match is None:
            raise ValueError(
                f"its line {line[:80]!r} describes no signal; expected the plain name of a file in the header's folder, a "
                "format, and what follows."
            )
        signals.append(match.groupdict())
    if len(signals) != int(record["n_sig"]) or not signals:
        raise ValueError(f"its header announces {record['n_sig']} signals and describes {len(signals)}; it is cut.")
    if not content.endswith(b"\n") and len(lines[-1].split()) < len(lines[1].split()):
        raise ValueError("its header is cut in the last line.")
    frames = int(record["sig_len"] or 0)  # 0: not stated
    groups = [(name, list(parts)) for name, parts in groupby(signals, key=lambda signal: signal["file_name"])]
    if len({name for name, _ in groups}) < len(groups):  # wfdb would take one signal for another
        raise ValueError("its header describes the signals of one file in several places.")
    for name, parts in groups:
        file = header.parent / name
        if not file.is_file():
            raise ValueError(f"its signal file {name!r} is not beside the header; fetch it too.")
        size, wfdb_format = file.stat().st_size, parts[0]["fmt"]
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{name} has {size} bytes; expected at most {MAX_FILE_BYTES / 2**20:g} MiB.")
        per_frame = sum(int(signal["samps_per_frame"] or 1) for signal in parts)  # a fast signal has several
        skew = max(int(signal["skew"] or 0) for signal in parts)
        if wfdb_format in _BITS_PER_SAMPLE:
            required = math.ceil(frames * per_frame * _BITS_PER_SAMPLE[wfdb_format] / 8)
            required += int(parts[0]["byte_offset"] or 0)
            if required > size:
                raise ValueError(f"{name} is cut: it has {size} bytes, the header claims {required}.")
        elif wfdb_format not in _FLAC_FORMATS:
            raise ValueError(f"{name} is of format {wfdb_format!r}, which wfdb does not read.")
        elif not 0 < frames * per_frame <= MAX_SAMPLES:
            raise ValueError(f"{name} unpacks to {frames * per_frame} samples; expected 1 to {MAX_SAMPLES}.")
        if skew * per_frame > max(size, frames * per_frame):
            raise ValueError(f"{name} has a skew of {skew} frames, more than it holds.")
    return float(record["fs"] or 250), signals  # the standard's default


def read_wfdb(header: Path) -> dict[str, Any]:
    """A WFDB record; its header is checked before the library wfdb reads the signal files."""
    frame_rate, signals = _wfdb_signals(header)
    names = [signal["sig_name"].strip() for signal in signals]
    units = [signal["units"] or "mV" for signal in signals]  # the standard's default
    rates = [frame_rate * int(signal["samps_per_frame"] or 1) for signal in signals]
    rows, left_out = select_signals(names, units, rates)
    record = library("wfdb").rdrecord(str(header.absolute().with_suffix("")), channels=rows, smooth_frames=False)
    comments = [comment.strip() for comment in record.comments]
    facts = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in comments)}
    metadata = stated(
        age=to_number(facts.get("age", "")),
        sex=to_sex(facts.get("sex", "")),
        dx=facts.get("dx"),
        date=record.base_date and record.base_date.isoformat(),
        comments=comments,
        left_out=left_out,
    )
    return {
        "array": np.stack(
            [in_millivolts(signal, units[row]) for row, signal in zip(rows, record.e_p_signal, strict=True)]
        ),
        "sampling_rate": rates[rows[0]],
        "lead_names": [names[row] for row in rows] if any(names) else None,
        "unit": "mV",
        "metadata": {"format": "WFDB", **metadata},
    }


# EDF, EDF+ and BDF: https://www.edfplus.info/specs


def read_edf(content: bytes) -> dict[str, Any]:
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
    rows, left_out = select_signals(names, units, [signal.sampling_frequency for signal in signals])
    left_out |= {signal.label.strip(): "no physical range" for signal in edf.signals if signal not in signals}
    facts: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # not known, or not written as EDF+ demands
        facts["date"] = edf.startdate.isoformat()
    if kind[3:] == "+C":
        with contextlib.suppress(ValueError):
            facts |= {"patient_id": edf.patient.code, "sex": to_sex(edf.patient.sex)}
    return {
        "array": np.stack([in_millivolts(signals[row].data, units[row]) for row in rows]),
        "sampling_rate": signals[rows[0]].sampling_frequency,
        "lead_names": [names[row] for row in rows],
        "unit": "mV",
        "metadata": {
            "format": kind if kind[3:] == "+C" else "BDF" if is_bdf else "EDF",
            **stated(
                **{name: fact for name, fact in facts.items() if fact not in ("X", "x")},  # not known
                filters=sorted({signals[row].prefiltering.strip() for row in rows} - {""}),
                left_out=left_out,
            ),
        },
    }


# DICOM waveforms: PS3.3 C.10.9, and CID 3001 for the leads

_DICOM_DTYPES = {"SB": "i1", "UB": "u1", "SS": "i2", "US": "u2", "SL": "i4", "UL": "u4"}
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def _dicom_lead(channel: Any) -> str:
    source = channel.ChannelSourceSequence[0]
    code, meaning = str(source.get("CodeValue", "")), str(source.get("CodeMeaning", ""))
    # SCPECG (5.6.3-9-n) and MDC (2:n, 131328 + n) number leads as SCP-ECG does
    number = re.fullmatch(r"(?:5\.6\.3-9-|2:)(\d{1,2})|131(\d{3})", code)
    if number:
        lead = SCP_LEADS.get(int(number[1] or int(number[2]) - 328))
        if lead:
            return lead
    name = re.sub(r"[(,].*", "", meaning or str(channel.get("ChannelLabel", "")))  # "Lead I (Einthoven)"
    return re.sub(r"^lead\b", "", name.strip(), flags=re.IGNORECASE).strip() or code


def read_dicom(content: bytes) -> dict[str, Any]:
    """The longest group of waveforms of a DICOM file that was recorded, not derived, such as a median beat."""
    if _DEFLATED in content:  # pydicom unpacks it at one go, however large
        raise ValueError("it is deflated (transfer syntax 1.2.840.10008.1.2.1.99); save it uncompressed.")
    dataset = library("pydicom").dcmread(io.BytesIO(content))
    if not dataset.get("WaveformSequence"):
        raise ValueError(f"it holds no waveform, but {getattr(dataset.get('SOPClassUID'), 'name', 'nothing known')}.")
    groups = list(dataset.WaveformSequence)
    groups = [group for group in groups if group.get("WaveformOriginality") != "DERIVED"] or groups
    group = max(groups, key=lambda group: group.NumberOfWaveformSamples / float(group.SamplingFrequency))
    num_channels, num_samples = int(group.NumberOfWaveformChannels), int(group.NumberOfWaveformSamples)
    order = "<" if dataset.original_encoding[1] else ">"  # little or big endian
    interpretation = str(group.WaveformSampleInterpretation)
    if interpretation not in _DICOM_DTYPES:
        raise ValueError(f"its samples are {interpretation!r}; expected one of {', '.join(_DICOM_DTYPES)}.")
    dtype = np.dtype(order + _DICOM_DTYPES[interpretation])
    size, data = num_channels * num_samples * dtype.itemsize, group.WaveformData
    if group.WaveformBitsAllocated != 8 * dtype.itemsize or not size <= len(data) <= size + 1:  # padded to be even
        raise ValueError(f"it holds {len(data)} bytes; {num_channels} channels of {num_samples} samples take {size}.")
    counts = np.frombuffer(data[:size], dtype).reshape(num_samples, num_channels)  # interleaved
    channels = list(group.ChannelDefinitionSequence)
    if len(channels) != num_channels:
        raise ValueError(f"it holds {num_channels} channels and describes {len(channels)}.")
    # a channel without sensitivity has arbitrary units
    units = [
        str(channel.ChannelSensitivityUnitsSequence[0].CodeValue)
        if "ChannelSensitivityUnitsSequence" in channel
        else ""
        for channel in channels
    ]
    names = [_dicom_lead(channel) for channel in channels]
    rate = float(group.SamplingFrequency)
    rows, left_out = select_signals(names, units, [rate] * num_channels)
    padding = group.get("WaveformPaddingValue")
    leads = []
    for row in rows:
        channel = channels[row]  # the baseline is in the channel's unit, not in counts (PS3.3 C.10.9)
        gain = float(channel.ChannelSensitivity) * float(channel.get("ChannelSensitivityCorrectionFactor") or 1)
        lead = in_millivolts(counts[:, row] * gain + float(channel.get("ChannelBaseline") or 0), units[row])
        if padding:
            lead[counts[:, row] == np.frombuffer(padding[: dtype.itemsize], dtype)[0]] = np.nan  # a gap
        leads.append(lead)

    def text(keyword: str) -> str:
        return str(dataset.get(keyword) or "")

    age = re.fullmatch(r"(\d{3})Y", text("PatientAge"))  # DICOM's 045Y; ages in months, weeks or days are left out
    date = re.sub(r"^(\d{4})(\d\d)(\d\d)", r"\1-\2-\3", text("AcquisitionDateTime") or text("StudyDate"))
    keywords = {"high_pass": "FilterLowFrequency", "low_pass": "FilterHighFrequency", "notch": "NotchFilterFrequency"}
    filters = {name: float(channels[rows[0]].get(keyword) or 0) for name, keyword in keywords.items()}
    notes = dataset.get("WaveformAnnotationSequence") or []
    return {
        "array": np.stack(leads),
        "sampling_rate": rate,
        "lead_names": [names[row] for row in rows],
        "unit": "mV",
        "metadata": {
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
        },
    }
