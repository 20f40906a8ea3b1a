"""ECG files in XML: HL7 annotated ECG, GE MUSE, Philips Sierra; and those of Mortara, handed on to a library."""

import base64
import math
import re
import zlib
from collections.abc import Iterable
from typing import Any
from xml.etree.ElementTree import Element, ParseError, TreeBuilder

import numpy as np

from .ecg_formats_common import (
    NOTHING_GIVEN,
    PER_MILLIVOLT_IN_ANY_CASE,
    STANDARD_LEADS,
    UNITS_PER_MILLIVOLT,
    Given,
    agreed_lead_names,
    library,
    stated,
    to_number,
)
from .ecg_formats_ecgdatakit import read_eli

# far beyond real files (20 levels, 4,000 elements and attributes); an element takes 30 times the memory of its text
MAX_DEPTH = 100
MAX_NODES = 200_000
MAX_TAG_BYTES, MAX_ATTRIBUTES = 2**15, 1000
# leads x samples that compressed waveforms may unpack to: 12 leads over 46 minutes at 500 Hz
MAX_UNPACKED_SAMPLES = 1 << 24

MICROVOLTS = {unit: 1e3 / number for unit, number in PER_MILLIVOLT_IN_ANY_CASE.items()}  # in one of the unit
MICROVOLTS |= {"microvolts": 1.0, "microvolt": 1.0, "millivolts": 1e3, "millivolt": 1e3}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
SEXES = {"m": "male", "male": "male", "f": "female", "female": "female"}

# how far leads may be from each other in the mark of 1 mV: no heart makes all of them as equal while they move by 1 mV
MARK_MICROVOLTS = 25.0

HL7_FILTERS = {"LOW_PASS": "low_pass", "HIGH_PASS": "high_pass", "NOTCH": "notch"}
PHILIPS_VERSIONS = ("1.03", "1.04", "1.04.01", "1.04.02")


def read_xml(content: bytes, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """Reads an HL7 annotated ECG, a GE MUSE RestingECG, a Philips Sierra or a Mortara ELI ECG, told apart by their root element.

    Args:
        content: the bytes of the file, in UTF-8, UTF-16 or the encoding that it declares.
        given: its unit stands for one that the file lacks or that is none of volts.

    Returns:
        As `ecg_formats.read_file`; the array is float32 [leads, samples] in microvolts, or millivolts of Mortara's.

    Raises:
        ValueError: the content is no such file or is damaged. Entities and lists of attributes are refused, no DTD is fetched,
            and depth and number of elements are bounded.
        ImportError: defusedxml, or for Mortara ecgdatakit, is not installed.
    """
    root = _parse(content)
    if root.tag == "ECG":
        return read_eli(content, root, given)
    if root.tag not in READERS:
        raise ValueError(f"The XML's root element is <{root.tag[:100]}>; expected one of {', '.join(READERS)}, ECG.")
    array, sampling_rate, lead_names, metadata = READERS[root.tag](root, given.unit)
    return {
        "array": array,
        "sampling_rate": sampling_rate,
        "lead_names": lead_names if given.lead_names is None else agreed_lead_names(lead_names, given.lead_names),
        "unit": "uV",
        "metadata": stated(**metadata),
    }


class _BoundedTreeBuilder(TreeBuilder):
    """Builds elements with the local names of their tags and attributes: exporters differ in their namespaces."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = 0
        self.nodes = 0

    def start(self, tag: str, attrs: dict[str, str]) -> Element:  # type: ignore[override]
        self.depth += 1
        self.nodes += 1 + len(attrs)
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise ValueError(
                f"it is nested deeper than {MAX_DEPTH} elements or holds more than {MAX_NODES} elements and "
                "attributes, as no ECG does."
            )
        return super().start(_local_name(tag), {_local_name(name): value for name, value in attrs.items()})

    def end(self, tag: str) -> Element:
        self.depth -= 1
        return super().end(_local_name(tag))


def _local_name(name: str) -> str:
    return name.rpartition("}")[2]  # ElementTree writes {namespace}name


def _parse(content: bytes) -> Element:
    if (marks := content.count(b"<")) > 3 * MAX_NODES:  # elements begin and end; comments and instructions count too
        raise ValueError(f"Cannot read the XML: it holds {marks} tags and comments; at most {3 * MAX_NODES} are read.")
    # of a million attributes expat makes a list first; a tag ends before the next <, and > may stand within its values
    for tag in re.finditer(rb"<[^<]{%d,}" % MAX_TAG_BYTES, content):
        if content.count(b"=", *tag.span()) > MAX_ATTRIBUTES:
            raise ValueError(
                f"Cannot read the XML: a tag has more than {MAX_ATTRIBUTES} attributes, as that of no ECG has."
            )
    parser_class = library("defusedxml.ElementTree").DefusedXMLParser
    # a DTD may be named, as by MUSE, but none is fetched, and any entity is refused
    parser = parser_class(target=_BoundedTreeBuilder(), forbid_dtd=False, forbid_entities=True, forbid_external=True)
    parser.parser.AttlistDeclHandler = _refuse_defaults
    try:
        parser.feed(content)  # bytes, as it finds the encoding itself
        return parser.close()
    except library("defusedxml.common").DefusedXmlException as error:
        raise ValueError(f"The XML declares entities, which are not read as they can be harmful: {error}") from error
    except (ParseError, LookupError, ValueError) as error:  # the last two from encodings, the last from the bounds too
        raise ValueError(f"Cannot read the XML: {error}") from error


def _refuse_defaults(*_: Any) -> None:
    # a default of some attribute would be copied to each element: 300 kB of text became gigabytes
    raise ValueError("its DTD declares attributes, as the files of no ECG recorder do.")


def _find(element: Element, path: str) -> Element:
    child = element.find(path)
    if child is None:
        raise ValueError(f"<{element.tag}> has no <{path}>; the file is incomplete or of another version.")
    return child


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _attribute(element: Element, path: str, name: str) -> str:
    child = element.find(path)
    return "" if child is None else child.get(name, "").strip()


def _number(text: str, what: str, minimum: float = -math.inf, maximum: float = 1e10) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan  # fails the comparison below
    if not minimum <= number <= maximum:
        raise ValueError(f"{what} is {text[:100]!r}; expected a number, at least {minimum:g} and at most {maximum:g}.")
    return number


def _positive(text: str, what: str) -> float:
    return _number(text, what, minimum=1e-9)


def _integer(text: str, what: str, minimum: int = 1) -> int:
    number = _number(text, what, minimum)
    if number != int(number):
        raise ValueError(f"{what} is {text[:100]!r}; expected a whole number.")
    return int(number)


def _microvolts(own: str, unit: str | None, what: str) -> float:
    """Microvolts in one of a lead's unit: the file's, or where that is missing or none of volts, the caller's."""
    stated_factor = MICROVOLTS.get(own.strip().casefold())
    if unit is None:
        return _factor(own, MICROVOLTS, what)
    given_factor = 1e3 / UNITS_PER_MILLIVOLT[unit]
    if stated_factor not in (None, given_factor):
        raise ValueError(
            f"{what} has the unit {own!r}, and {unit!r} is given too: leave unit out (for a file: --unit)."
        )
    return given_factor


def _factor(unit: str, units: dict[str, float], what: str) -> float:
    name = unit.strip().casefold()  # makes the Greek letter of the micro sign
    if name not in units:
        raise ValueError(f"{what} has the unit {unit[:100]!r}; expected one of {', '.join(units)}, in any case.")
    return units[name]


def _base64(text: str | None, what: str) -> bytes:
    try:
        return base64.b64decode(re.sub(r"\s+", "", text or ""), validate=True)  # else it skips stray bytes
    except ValueError as error:
        raise ValueError(f"{what} is no valid base64: {error}") from error


def _age(text: str, unit: str = "years") -> float | None:
    """In years, or None where the file gives no number."""
    years = {"": 1.0, "a": 1.0, "year": 1.0, "month": 1 / 12, "mo": 1 / 12, "week": 1 / 52.18, "wk": 1 / 52.18}
    years |= {"day": 1 / 365.25, "d": 1 / 365.25}  # a, mo, wk and d are UCUM's, as HL7 writes them
    factor = years.get(unit.lower().removesuffix("s"))
    return None if factor is None or not re.fullmatch(r"\d{1,5}(\.\d+)?", text) else round(float(text) * factor, 3)


def _hertz(text: str) -> str:
    return f"{text} Hz" if to_number(text) else text  # 0, or a word, says that the filter is off


def _sex(text: str) -> str:
    return SEXES.get(text.lower(), "")


def _stack(leads: Iterable[tuple[str, np.ndarray]]) -> tuple[np.ndarray, list[str]]:
    leads = list(leads)
    if not leads:
        raise ValueError("The file holds no leads.")
    lengths = sorted({len(lead) for _, lead in leads})
    if len(lengths) > 1 or not lengths[0]:
        raise ValueError(f"The leads have {lengths[:12]} samples; expected the same number, above 0, in each.")
    with np.errstate(over="ignore"):  # float64 beyond float32, reported below as not finite
        array = np.stack([lead for _, lead in leads]).astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError("The leads hold samples that are not finite.")
    return array, [name for name, _ in leads]


def _read_hl7(root: Element, unit: str | None) -> tuple[np.ndarray, float, list[str], dict[str, Any]]:
    """HL7 annotated ECG (Brown and Badilini, HL7 aECG Implementation Guide, 2005).

    Read is the rhythm series, not the representative beats derived from it.
    """
    series = root.findall("component/series")
    rhythm = next((member for member in series if _attribute(member, "code", "code") == "RHYTHM"), None)
    if rhythm is None:
        codes = [_attribute(member, "code", "code")[:100] for member in series[:12]]
        raise ValueError(f"The annotated ECG has series of the codes {codes}; expected one of the code 'RHYTHM'.")
    sequence_sets = [
        [(_attribute(sequence, "code", "code"), sequence) for sequence in group.findall("component/sequence")]
        for group in rhythm.findall("component/sequenceSet")
    ]
    if len(sequence_sets) != 1:
        raise ValueError(
            f"The rhythm series has {len(sequence_sets)} sequence sets; expected one with all leads, "
            "recorded at one time."
        )
    rates, leads = [], []
    for code, sequence in sequence_sets[0]:
        if code.startswith("TIME_"):  # TIME_ABSOLUTE or TIME_RELATIVE
            increment = _find(sequence, "value/increment")
            seconds = _factor(increment.get("unit", ""), SECONDS, "The time increment")
            rates.append(1 / (_positive(increment.get("value", ""), "The time increment") * seconds))
        else:
            name = code.removeprefix("MDC_ECG_LEAD_")  # ISO 11073-10101, in capitals: AVR
            leads.append((f"aV{name[2:]}" if name in ("AVR", "AVL", "AVF") else name, _hl7_lead(name, sequence, unit)))
    if len(rates) != 1:
        raise ValueError(f"The sequence set has {len(rates)} time sequences; expected one.")
    array, lead_names = _stack(leads)
    mark = _calibration_start(array)  # files converted from Philips' own format keep it

    subject = "componentOf/timepointEvent/componentOf/subjectAssignment/subject/trialSubject"
    author = "author/seriesAuthor"
    age = next(
        (
            _age(_attribute(observation, "value", "value"), _attribute(observation, "value", "unit"))
            for observation in root.iterfind("controlVariable/relatedObservation")
            if _attribute(observation, "code", "code") == "21612-7"  # LOINC: reported age
        ),
        None,
    )
    names = [_text(rhythm, f"{author}/{path}") for path in ("manufacturerOrganization/name", "*/manufacturerModelName")]
    date = _attribute(root, "effectiveTime/center", "value") or _attribute(root, "effectiveTime/low", "value")
    filters = {}
    for variable in rhythm.iterfind("controlVariable/controlVariable"):
        kind = _attribute(variable, "code", "code").removeprefix("MDC_ECG_CTL_VBL_ATTR_FILTER_")
        for part in variable.iterfind("component/controlVariable"):
            if kind in HL7_FILTERS and _attribute(part, "code", "code").endswith("_FREQ"):
                value = [_attribute(part, "value", name) for name in ("value", "unit")]
                filters[HL7_FILTERS[kind]] = " ".join(value).strip()
    statements = [
        _attribute(annotation, "value", "displayName") or _text(annotation, "value")
        for annotation in rhythm.iterfind("subjectOf/annotationSet//annotation")
        if _attribute(annotation, "code", "code").startswith(("MDC_ECG_RHY", "MDC_ECG_INTERPRETATION"))
    ]
    return (
        array[:, : mark or None],  # 0 would leave no sample
        rates[0],
        lead_names,
        {
            "format": "HL7 aECG",
            "patient_id": _attribute(root, f"{subject}/id", "extension"),
            "age": age,
            "sex": _sex(_attribute(root, f"{subject}/subjectDemographicPerson/administrativeGenderCode", "code")),
            "date": _iso_date(date),
            "device": " ".join(filter(None, names)),
            "filters": filters,
            "statements": list(dict.fromkeys(statements)),  # several annotations may hold the same
            "calibration_start": mark / rates[0] or None,
        },
    )


def _hl7_lead(name: str, sequence: Element, unit: str | None) -> np.ndarray:
    scale, origin = _find(sequence, "value/scale"), _find(sequence, "value/origin")
    what = f"The scale of lead {name[:100]}"
    microvolts = _number(scale.get("value", ""), what) * _microvolts(scale.get("unit", ""), unit, what)
    what = f"The origin of lead {name[:100]}"
    offset = _number(origin.get("value", ""), what, minimum=-1e9) * _microvolts(origin.get("unit", ""), unit, what)
    try:
        digits = np.fromstring(_text(sequence, "value/digits"), dtype=np.float64, sep=" ")
    except ValueError as error:
        raise ValueError(f"The digits of lead {name[:100]} are not numbers between blanks: {error}") from error
    with np.errstate(over="ignore", invalid="ignore"):  # reported by _stack
        return offset + microvolts * digits


def _iso_date(text: str) -> str:
    """HL7's 20021122091000.000 as 2002-11-22T09:10:00; another form as it is."""
    match = re.match(r"(\d{4})(\d\d)(\d\d)(?:(\d\d)(\d\d)(\d\d)?)?", text)
    if not match:
        return text
    date, time = "-".join(match.groups()[:3]), ":".join(filter(None, match.groups()[3:]))
    return f"{date}T{time}" if time else date


def _read_muse(root: Element, unit: str | None) -> tuple[np.ndarray, float, list[str], dict[str, Any]]:
    """GE MUSE: base64 of 16-bit integers, little endian, with a CRC-32 for each lead.

    The eight leads that are stored are returned; III, aVR, aVL and aVF follow from I and II.
    """
    waveforms = root.findall("Waveform")
    rhythm = next((waveform for waveform in waveforms if _text(waveform, "WaveformType") == "Rhythm"), None)
    if rhythm is None:
        kinds = [_text(waveform, "WaveformType")[:100] for waveform in waveforms[:12]]
        raise ValueError(f"The MUSE file has waveforms of the types {kinds}; expected one of the type 'Rhythm'.")
    base = _positive(_text(rhythm, "SampleBase"), "SampleBase")
    exponent = _number(_text(rhythm, "SampleExponent") or "0", "SampleExponent", -6, 6)
    array, lead_names = _stack(
        (_text(lead, "LeadID"), _muse_lead(lead, _text(lead, "LeadID"), unit)) for lead in rhythm.iterfind("LeadData")
    )
    patient, test = "PatientDemographics", "TestDemographics"
    date = re.sub(r"^(\d\d)-(\d\d)-(\d{4})$", r"\3-\1-\2", _text(root, f"{test}/AcquisitionDate"))  # month first
    time = _text(root, f"{test}/AcquisitionTime")
    tags = {"high_pass": "HighPassFilter", "low_pass": "LowPassFilter", "notch": "ACFilter"}
    filters = {name: _text(rhythm, tag) for name, tag in tags.items()}
    if re.fullmatch(r"[1-9]\d*", filters["high_pass"]):  # hundredths of a hertz: 16 is 0.16 Hz
        filters["high_pass"] = f"{int(filters['high_pass'][:9]) / 100:g}"
    statements, line = [], []  # a statement comes in parts, the last of which is flagged ENDSLINE
    for statement in root.iterfind("Diagnosis/DiagnosisStatement"):
        line.append(_text(statement, "StmtText"))
        if "ENDSLINE" in (flag.text for flag in statement.iterfind("StmtFlag")):
            statements.append(" ".join(filter(None, line)))
            line = []
    statements.append(" ".join(filter(None, line)))
    return (
        array,
        base * 10**exponent,
        lead_names,
        {
            "format": "GE MUSE XML",
            "patient_id": _text(root, f"{patient}/PatientID"),
            "age": _age(_text(root, f"{patient}/PatientAge"), _text(root, f"{patient}/AgeUnits")),
            "sex": _sex(_text(root, f"{patient}/Gender")),
            "date": f"{date}T{time}" if date and time else date,
            "device": _text(root, f"{test}/AcquisitionDevice"),
            "filters": {name: _hertz(value) for name, value in filters.items()},
            "statements": statements,
        },
    )


def _muse_lead(lead: Element, name: str, unit: str | None) -> np.ndarray:
    size = _text(lead, "LeadSampleSize") or "2"  # bytes
    if size != "2":
        raise ValueError(f"Lead {name[:100]} has samples of {size[:100]} bytes; expected 2.")
    what = f"The scale of lead {name[:100]}"
    scale = _positive(_text(lead, "LeadAmplitudeUnitsPerBit"), what)
    scale *= _microvolts(_text(lead, "LeadAmplitudeUnits"), unit, what)
    data = _base64(lead.findtext("WaveFormData"), f"The waveform of lead {name[:100]}")
    for tag, actual in (("LeadByteCountTotal", len(data)), ("LeadSampleCountTotal", len(data) / 2)):
        claimed = _integer(_text(lead, tag), f"{tag} of lead {name[:100]}")
        if claimed != actual:
            raise ValueError(f"Lead {name[:100]} holds {actual:g} as its {tag}, the file says {claimed}: damaged.")
    crc = _text(lead, "LeadDataCRC32")
    if crc and _integer(crc, f"LeadDataCRC32 of lead {name[:100]}", minimum=0) != zlib.crc32(data):
        raise ValueError(f"Lead {name[:100]} has the CRC-32 {zlib.crc32(data)}, the file says {crc}; it is damaged.")
    return scale * np.frombuffer(data, "<i2")  # microvolts


def _read_philips(root: Element, unit: str | None) -> tuple[np.ndarray, float, list[str], dict[str, Any]]:
    """Philips Sierra ECG 1.03 to 1.04.02, plain or packed (XLI).

    The packing is described by sierra-ecg-tools (Watford, MIT licence). Packed limb leads are residuals of what leads I
    and II make them. Packed files often hold 16 channels; those beyond the leads in use are left out. The mark of 1 mV
    that often ends them is cut off; `calibration_start` in the metadata says at which second it began.
    """
    version = _text(root, "documentinfo/documentversion")
    if version not in PHILIPS_VERSIONS:
        raise ValueError(f"The file is of version {version[:100]!r}; expected one of {', '.join(PHILIPS_VERSIONS)}.")
    signal = _find(root, "dataacquisition/signalcharacteristics")
    waveforms = _find(root, "waveforms/parsedwaveforms")
    rate = _positive(_text(signal, "samplingrate"), "The sampling rate")
    # microvolts per bit, named differently in 1.03
    scale = _positive(_text(signal, "resolution") or _text(signal, "signalresolution"), "The resolution")
    bits = _text(signal, "bitspersample") or "16"  # where the file does not state it
    offset = _text(signal, "signaloffset") or "0"
    if bits != "16" or offset != "0" or _text(signal, "signalsigned") == "False":
        raise ValueError(f"Samples have {bits[:100]!r} bits and offset {offset[:100]!r}; expected 16 bits, offset 0.")

    names = _philips_lead_names(signal, waveforms)
    duration = _positive(waveforms.get("durationperchannel", ""), "durationperchannel")  # milliseconds
    samples = _integer(str(duration * rate / 1000), "durationperchannel * samplingrate / 1000")
    encoding = waveforms.get("dataencoding", "")
    if encoding != "Base64":
        raise ValueError(f"The waveforms are encoded as {encoding[:100]!r}; expected 'Base64'.")
    data = _base64(waveforms.text, "The waveform")
    packing = waveforms.get("compressmethod") or waveforms.get("compression") or "Uncompressed"
    if waveforms.get("compressflag") == "False":
        packing = "Uncompressed"
    if packing == "XLI":
        leads = _unpack_xli(data, len(names), samples)
        _add_residuals(dict(zip(names, leads, strict=True)))  # in place
    elif packing == "Uncompressed":
        if len(data) < 2 * samples * len(names):  # more are channels that are not in use
            raise ValueError(
                f"The waveforms have {len(data)} bytes; expected {len(names)} leads x {samples} x 2 bytes."
            )
        leads = list(np.frombuffer(data, "<i2", samples * len(names)).reshape(len(names), samples))
    else:
        raise ValueError(f"The waveforms are packed by {packing[:100]!r}; expected 'XLI' or 'Uncompressed'.")
    array, lead_names = _stack(zip(names, [scale * lead for lead in leads], strict=True))
    mark = _calibration_start(array)

    patient = "patient/generalpatientdata"
    acquisition = _find(root, "dataacquisition")
    bandwidth = "reportinfo/reportbandwidth"
    filters = {"high_pass": "highpass", "low_pass": "lowpass", "notch": "notch"}
    statements = []
    for interpretation in root.iterfind("interpretations/interpretation"):
        for statement in interpretation.iterfind("statement"):
            statements.append(_text(statement, "leftstatement"))
        statements.append(_text(interpretation, "severity").strip("- "))
    return (
        array[:, : mark or None],  # 0 would leave no sample
        rate,
        lead_names,
        {
            "format": f"Philips Sierra XML {version}",
            "patient_id": _text(root, f"{patient}/patientid"),
            "age": _age(_text(root, f"{patient}/age/years")),
            "sex": _sex(_text(root, f"{patient}/sex")),
            "date": "T".join(filter(None, (acquisition.get("date"), acquisition.get("time")))),
            "device": _text(acquisition, "machine"),
            "filters": {name: _hertz(_text(root, f"{bandwidth}/{tag}filtersetting")) for name, tag in filters.items()},
            "statements": statements,
            "calibration_start": mark / rate or None,
        },
    )


def _philips_lead_names(signal: Element, waveforms: Element) -> list[str]:
    """The leads in use; files of standard acquisition types may leave their names out."""
    names = waveforms.get("leadlabels", "").split(maxsplit=99)[:99]
    if names:
        return names[: _integer(waveforms.get("numberofleads", str(len(names))), "numberofleads")]  # in use
    acquisition_type = _text(signal, "acquisitiontype")
    if acquisition_type not in ("STD-12", "10-WIRE"):
        raise ValueError(
            f"The file names no leads and its acquisition type is {acquisition_type[:100]!r}; expected leadlabels, or "
            "the types STD-12 or 10-WIRE."
        )
    return list(STANDARD_LEADS)


def _calibration_start(array: np.ndarray) -> int:
    """First sample of the calibration mark, 1 mV in all leads, that often ends a record; 0 where there is none."""
    # from the last sample on in which two leads differ, all leads are the same mark, but for the noise of filters
    differ = np.flatnonzero(np.ptp(array, axis=0) > MARK_MICROVOLTS)
    start = int(differ[-1]) + 1 if len(differ) else 0
    height = np.ptp(array[:, start:].mean(axis=0)) if start < array.shape[1] else 0.0
    return start if len(array) > 2 and abs(height - 1000) <= 2 * MARK_MICROVOLTS else 0


def _unpack_xli(data: bytes, num_leads: int, samples: int) -> list[np.ndarray]:
    """Leads, each int16 [samples]: a header of 8 bytes and LZW codes of the high, then of the low bytes of differences.

    The header gives the number of bytes (4), a flag (2) and the first second difference (2).
    """
    if num_leads * samples > MAX_UNPACKED_SAMPLES:
        raise ValueError(
            f"The waveforms are said to unpack to {num_leads} leads of {samples} samples; expected at most "
            f"{MAX_UNPACKED_SAMPLES} in all."
        )
    leads = []
    start = 0
    for number in range(1, num_leads + 1):
        size = int.from_bytes(data[start : start + 4], "little", signed=True)
        end = start + 8 + size
        if size <= 0 or end > len(data):
            raise ValueError(f"Packed lead {number} has {size} bytes; expected 1 to {max(0, len(data) - start - 8)}.")
        unpacked = _unpack_lzw(data[start + 8 : end], 2 * samples + 1)  # one more shows that it is too long
        if len(unpacked) not in (2 * samples - 1, 2 * samples):  # a last low byte of 0 may be missing
            raise ValueError(f"Packed lead {number} unpacks to {len(unpacked)} bytes; expected {samples} x 2.")
        high, low = np.frombuffer(unpacked.ljust(2 * samples, b"\0"), np.uint8).reshape(2, samples).astype(np.int64)
        values = (high << 8 | low).astype(np.uint16).astype(np.int16).astype(np.int64)
        # two samples, then differences that are one sample late: the first is in the header, the last is not used
        first = int.from_bytes(data[start + 6 : start + 8], "little", signed=True)
        second_differences = -np.concatenate([[first], values[2:-1] - 64])[: samples - 2]
        differences = np.cumsum(np.concatenate([np.diff(values[:2]), second_differences]))
        lead = np.cumsum(np.concatenate([values[:1], differences])) if samples > 1 else values
        leads.append(lead.astype(np.int16))  # 16-bit arithmetic, as the recorder's
        start = end
    return leads


def _unpack_lzw(data: bytes, limit: int) -> bytes:
    """LZW with codes of 10 bits, most significant bit first; 1023 ends. Stops beyond `limit` bytes."""
    strings = [bytes([byte]) for byte in range(256)]
    unpacked = bytearray()
    previous = b""
    buffer = held = 0
    for byte in data:
        buffer = (buffer << 8 | byte) & 0xFFFFF  # no more than 17 bits are needed
        held += 8
        if held < 10:
            continue
        held -= 10
        code = buffer >> held & 0x3FF
        if code == 0x3FF:
            break
        if code < len(strings):
            string = strings[code]
        elif code == len(strings) and previous:  # the string that this code is about to define, as in any LZW
            string = previous + previous[:1]
        else:
            raise ValueError(f"The packed waveform holds the code {code}, only {len(strings)} are known: damaged.")
        if previous and len(strings) < 0x3FF:  # later the dictionary is full and stays as it is
            strings.append(previous + string[:1])
        unpacked += string
        if len(unpacked) > limit:
            break
        previous = string
    return bytes(unpacked)


def _add_residuals(leads: dict[str, np.ndarray]) -> None:
    """Makes leads III, aVR, aVL and aVF out of what they differ from Einthoven's and Goldberger's laws, in place."""
    if "I" not in leads or "II" not in leads:
        raise ValueError(f"The packed leads are {', '.join(leads)[:100]}; expected I and II, which others rest on.")
    i, ii = leads["I"].astype(np.int64), leads["II"].astype(np.int64)  # sums of int16 would wrap
    iii = ii - i
    if "III" in leads:
        leads["III"][:] = iii = (iii - leads["III"]).astype(np.int16).astype(np.int64)
    laws = {"aVR": -((i + ii) // 2), "aVL": (i - iii) // 2, "aVF": (ii + iii) // 2}
    for name, law in laws.items():
        if name in leads:
            leads[name][:] = (law - leads[name]).astype(np.int16)


READERS = {"AnnotatedECG": _read_hl7, "RestingECG": _read_muse, "restingecgdata": _read_philips}
