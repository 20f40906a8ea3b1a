"""ECG files that the library ecgdatakit reads: MFER, AliveCor Kardia, Mortara ELI.

It bounds neither time nor memory, and warns of much that makes a record another one: both is seen to here.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from .ecg_formats_common import NOTHING_GIVEN, UTF8_MARK, Given, in_millivolts, library, select_signals, stated, to_sex

# of its warnings those of facts beside the signals, and of what is judged here; any other refuses the file
_HARMLESS = (
    r"MFER: (no sampling interval|invalid (birth date|measurement time))"  # without an interval the standard's: 1000 Hz
    r"|Kardia (recordedAt|data\.enhanced|data\.raw (lead \S+ has missing samples|has no amplitudeResolution))"
    r"|Mortara TYPICAL_CYCLE"
)

# MFER: ISO 22077-1, https://www.mfer.org/en/document.htm
_MAX_MFER_BYTES = 2**26
_MAX_MFER_SAMPLES = 2**24  # or bytes of them, each of which may take 20: ten minutes of twelve leads at 500 Hz
_MAX_MFER_DEFINITIONS, _MAX_MFER_OTHERS = 20_000, 2**20  # bytes of what are no samples
_MAX_MFER_CHANNELS, _MAX_MFER_BLOCKS = 100, 100_000  # the latter: channels of all frames together
# tags
_ZERO, _BYTE_ORDER, _BLOCK, _CHANNELS = 0x00, 0x01, 0x04, 0x05
_WAVES, _ATTRIBUTES, _GROUP, _END = 0x1E, 0x3F, 0x67, 0x80

# five minutes of six leads take 6 MB, with some dozens of arrays and objects
_MAX_KARDIA_BYTES, _MAX_KARDIA_PARTS = 2**24, 1000
# ten seconds of twelve leads take 0.3 MB, with some hundreds of elements
_MAX_ELI_BYTES, _MAX_ELI_ELEMENTS, _MAX_ELI_CHANNELS = 2**21, 5000, 100


def is_mfer(content: bytes) -> bool:
    """Whether it begins with the preamble MWF_PRE, which the standard recommends and without which nothing marks such files."""
    return content[:1] == b"\x40" and content[2:6] == b"MFR "


def read_mfer(content: bytes, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """MFER, the waveforms of Japanese recorders; samples that are marked as missing are gaps."""
    _check_mfer(content)
    return _read("mfer.MFERParser", content, given, "MFER", lambda record: record.raw_metadata["sampling_rates"])


def _check_mfer(content: bytes) -> None:
    """ValueError where the definitions of a file claim more than any ECG does; a walk over all of them, nested ones too."""
    if len(content) > _MAX_MFER_BYTES:
        raise ValueError(f"it has {len(content)} bytes; at most {_MAX_MFER_BYTES} are read.")
    position = nested_end = definitions = others = blocks = samples = 0
    order, channels, block = "big", 1, 1
    while position < len(content):
        tag = content[position]
        position += 1
        if tag == _ZERO:
            continue
        if tag == _END:
            if position > nested_end:
                break
            raise ValueError("it ends within a definition; it is damaged.")
        while tag == _ATTRIBUTES and content[position : position + 1] >= b"\x80":  # a channel of more than seven bits
            position += 1
        position += tag == _ATTRIBUTES
        length = int.from_bytes(content[position : position + 1])
        if length == 0x80:
            raise ValueError("a definition leaves its length open, which is not read.")
        if length > 0x80:  # so many bytes follow, and make the length
            position, length = (
                position + length - 0x80,
                int.from_bytes(content[position + 1 : position + length - 0x7F]),
            )
        position += 1
        value = content[position : position + min(length, 5)]
        definitions += 1
        if tag in (_ATTRIBUTES, _GROUP):  # what they hold is walked over next
            nested_end = max(nested_end, position + length)
            continue
        position += length
        if tag == _BYTE_ORDER:
            order = "little" if value == b"\1" else "big"
        elif tag == _BLOCK:
            block = max(block, int.from_bytes(value, order))
        elif tag == _CHANNELS:
            channels = int.from_bytes(value, order)
        if tag == _WAVES:
            blocks += channels
            samples += length + min(
                block * channels * 8, length + 2**20
            )  # the latter: what a cut frame is filled up to
        else:
            others += length
        if (
            definitions > _MAX_MFER_DEFINITIONS
            or others > _MAX_MFER_OTHERS
            or channels > _MAX_MFER_CHANNELS
            or blocks > _MAX_MFER_BLOCKS
            or samples > _MAX_MFER_SAMPLES
        ):
            raise ValueError(
                f"it claims {channels} channels, {samples} samples, and {others} bytes of {definitions} definitions by byte "
                f"{position}; at most {_MAX_MFER_CHANNELS}, {_MAX_MFER_SAMPLES}, {_MAX_MFER_OTHERS} and {_MAX_MFER_DEFINITIONS} "
                "are read."
            )


def is_kardia(content: bytes) -> bool:
    """Whether it is a JSON object with the name that each recording has."""
    return content.removeprefix(UTF8_MARK).lstrip().startswith(b"{") and b'"recordedAt"' in content


def read_kardia(content: bytes, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """A recording as AliveCor's Kardia API gives it (https://developers.kardia.com), not filtered; null is a gap."""
    parts = max(content.count(b"["), content.count(b"{"))
    if len(content) > _MAX_KARDIA_BYTES or parts > _MAX_KARDIA_PARTS:
        raise ValueError(
            f"it has {len(content)} bytes and {parts} lists or objects; at most {_MAX_KARDIA_BYTES} and {_MAX_KARDIA_PARTS} are read."
        )

    def rates(record: Any) -> list[float]:
        return [float(record.raw_metadata["raw"]["frequency"])] * len(record.leads)

    return _read("alivecor_kardia.AliveCorKardiaParser", content, given, "AliveCor Kardia", rates)


def read_eli(content: bytes, root: Element, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """XML of Mortara's ELI recorders.

    Args:
        root: its elements, parsed within the bounds of XML.
    """
    channels, elements = root.findall("CHANNEL"), sum(1 for _ in root.iter())
    if len(content) > _MAX_ELI_BYTES or elements > _MAX_ELI_ELEMENTS or len(channels) > _MAX_ELI_CHANNELS:
        raise ValueError(
            f"it has {len(content)} bytes, {elements} elements and {len(channels)} channels; at most {_MAX_ELI_BYTES}, "
            f"{_MAX_ELI_ELEMENTS} and {_MAX_ELI_CHANNELS} are read."
        )

    def rates(_: Any) -> list[float]:
        return [float(channel.get("SAMPLE_FREQ", "")) for channel in channels]

    return _read("mortara_el250.MortaraEL250Parser", content, given, "Mortara ELI XML", rates)


def _read(name: str, content: bytes, given: Given, form: str, rates: Callable[[Any], list[float]]) -> dict[str, Any]:
    """What ecgdatakit's parser `name` makes of a file.

    Args:
        rates: those of the leads of its record as the file states them, which itself has them rounded to whole hertz.
    """
    module, _, parser = name.partition(".")
    read = getattr(library(f"ecgdatakit.parsing.parsers.{module}"), parser)
    refused = library("ecgdatakit.exceptions").ECGDataKitError
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        path = Path(folder) / "record"  # it reads paths alone
        path.write_bytes(content)
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", _HARMLESS)
        try:
            record = read().parse(path)
        except (refused, UserWarning) as error:
            raise ValueError(f"{str(error).replace(str(path), 'it').rstrip('.')}.") from error
    names = [lead.label for lead in record.leads]
    units = [lead.resolution_unit or lead.adc_resolution_unit for lead in record.leads]
    lead_rates = rates(record)
    chosen = select_signals(names, units, lead_rates, given)
    leads = [record.leads[row] for row in chosen.rows]
    if len({len(lead.samples) for lead in leads}) > 1:
        lengths = ", ".join(f"{lead.label} {len(lead.samples)}" for lead in leads[:12])
        raise ValueError(f"its leads have different numbers of samples: {lengths}.")
    return {
        "array": np.stack(
            [
                in_millivolts(lead.samples * lead.resolution + lead.offset, unit)
                for lead, unit in zip(leads, chosen.units, strict=True)
            ]
        ),
        "sampling_rate": lead_rates[chosen.rows[0]],
        "lead_names": chosen.lead_names,
        "unit": "mV",
        "metadata": {"format": form, **_metadata(record, chosen.left_out)},
    }


def _metadata(record: Any, left_out: dict[str, str]) -> dict[str, Any]:
    patient, recording = record.patient, record.recording
    filters = recording.acquisition.filters
    hertz = {"high_pass": filters.highpass, "low_pass": filters.lowpass, "notch": filters.notch}
    return stated(
        patient_id=patient.patient_id,
        age=None if patient.age is None else float(patient.age),
        sex=to_sex(patient.sex if patient.sex in ("M", "F") else ""),
        date=recording.date.isoformat() if recording.date else None,
        device=" ".join(filter(None, (recording.device.manufacturer, recording.device.model))),
        filters={name: f"{value:g} Hz" for name, value in hertz.items() if value},
        statements=[" ".join(filter(None, statement)) for statement in record.interpretation.statements],
        left_out=left_out,
    )
