"""ECG files that the library ecgdatakit reads: MFER, AliveCor Kardia, Mortara ELI.

It bounds neither time nor memory, and warns of much that makes a record another one: both is seen to here.
"""

import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
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
# what all definitions together may claim; a byte of waves may take 20: ten minutes of twelve leads at 500 Hz
_MFER_LIMITS = {
    "channels": 100,
    "definitions": 20_000,
    "blocks": 100_000,
    "bytes of waves": 2**24,
    "other bytes": 2**20,
}
_MFER_FILLED = 2**20  # bytes that ecgdatakit fills a cut frame up by
_ZEROS = re.compile(rb"\0+")  # between definitions, to fill up
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
    claims = dict.fromkeys(_MFER_LIMITS, 0) | {"channels": 1}
    position, nested_end, block = 0, 0, 1
    order: Literal["little", "big"] = "big"
    while position < len(content):
        zeros = _ZEROS.match(content, position)
        tag, start, end = (_ZERO, position, zeros.end()) if zeros else _mfer_definition(content, position)
        if tag == _END:
            if position >= nested_end:
                break
            raise ValueError("it ends within a definition; it is damaged.")
        value = content[start : min(end, start + 5)]
        position = end
        claims["definitions"] += 1
        if tag == _WAVES:
            size = end - start
            claims["blocks"] += claims["channels"]
            claims["bytes of waves"] += size + min(block * claims["channels"] * 8, size + _MFER_FILLED)
        else:
            claims["other bytes"] += end - start
        if tag in (_ATTRIBUTES, _GROUP):  # what they hold is walked over next
            position, nested_end = start, max(nested_end, end)
        elif tag == _BYTE_ORDER:
            order = "little" if value == b"\1" else "big"
        elif tag == _BLOCK:
            block = max(block, int.from_bytes(value, order))  # samples of a channel in a frame
        elif tag == _CHANNELS:
            claims["channels"] = int.from_bytes(value, order)
        for name, limit in _MFER_LIMITS.items():
            if claims[name] > limit:
                raise ValueError(f"it claims {claims[name]} {name} by byte {position}; at most {limit} are read.")


def _mfer_definition(content: bytes, position: int) -> tuple[int, int, int]:
    """Tag of a definition, and where its value starts and ends."""
    tag = content[position]
    position += 1
    if tag == _ATTRIBUTES:  # with the number of a channel, in groups of seven bits
        while content[position : position + 1] >= b"\x80":
            position += 1
        position += 1
    length = int.from_bytes(content[position : position + 1])
    position += 1
    if length == 0x80 and tag != _END:
        raise ValueError("a definition leaves its length open, which is not read.")
    if length > 0x80:  # so many bytes follow, and make the length
        start, position = position, position + length - 0x80
        length = int.from_bytes(content[start:position])
    return tag, position, position + length


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
