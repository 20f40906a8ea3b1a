"""ECG files of every common format: what kind a file is, by its content, and what it says.

`read_file` gives what the file holds and nothing else; `ecg_utils.read_ecg` makes a checked record of it.
"""

import contextlib
import csv
import importlib
import io
import math
import os
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from .ecg_formats_binary import read_ishne, read_scp
from .ecg_formats_xml import read_xml

MAX_FILE_BYTES = 512 * 2**20
# what a compressed file may unpack to: twelve leads of three hours at 500 Hz
MAX_SAMPLES = 2**26
SAMPLING_RATES = (1.0, 1e6)  # hertz

_STANDARD_LEADS = frozenset(["i", "ii", "iii", "avr", "avl", "avf", "v1", "v2", "v3", "v4", "v5", "v6"])
# casefold() makes the Greek letter of the micro sign
_UNITS_PER_MILLIVOLT = {"mv": 1.0, "uv": 1e3, "\u03bcv": 1e3, "nv": 1e6, "v": 1e-3}


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'This format needs the library {name}: pip install "elm-ecg[formats]".') from error


@contextlib.contextmanager
def _reading(path: Path, name: str) -> Iterator[None]:
    """One ValueError for whatever damaged content makes of the libraries: they raise, and warn, all sorts of things.

    A missing library stays an ImportError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        raise ImportError(f"Cannot read {path} as {name}: {error}") from error
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"it is damaged ({type(error).__name__}: {error})."
        raise ValueError(f"Cannot read {path} as {name}: {said}") from error


def _said(**facts: Any) -> dict[str, Any]:
    """The facts that the file states."""
    return {name: fact for name, fact in facts.items() if fact not in (None, "", [], {})}


def _number(value: str | float) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _sex(text: str) -> str:
    return {"m": "male", "f": "female"}.get(text.lower(), text.lower())


def _select_signals(
    names: Sequence[str], units: Sequence[str], rates: Sequence[float]
) -> tuple[list[int], dict[str, str]]:
    """Which signals of a recording are read: those in volts, at the highest rate that a standard lead has.

    Returns:
        Their indices, and of each other signal why it is left out.

    Raises:
        ValueError: no signal is in volts.
    """
    left_out = {
        name: f"unit {unit!r}"
        for name, unit in zip(names, units, strict=True)
        if unit.casefold() not in _UNITS_PER_MILLIVOLT
    }
    electrical = [row for row, unit in enumerate(units) if unit.casefold() in _UNITS_PER_MILLIVOLT]
    if not electrical:
        raise ValueError(f"it holds no signal in volts, but {left_out or 'none at all'}.")
    leads = [row for row in electrical if names[row].casefold() in _STANDARD_LEADS]
    rate = max(rates[row] for row in leads or electrical)
    left_out |= {names[row]: f"rate {rates[row]:g} Hz" for row in electrical if rates[row] != rate}
    return [row for row in electrical if rates[row] == rate], left_out


def _in_millivolts(values: np.ndarray, unit: str) -> np.ndarray:
    return (values / _UNITS_PER_MILLIVOLT[unit.casefold()]).astype(np.float32)


# NumPy


def _npy_header(content: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """dtype, shape, whether in Fortran order, and where the data start."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    # version 3 differs from 2 in the names of fields alone, and an ECG has none
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(stream)
    return dtype, shape, fortran_order, stream.tell()


def _npy_array(content: bytes) -> np.ndarray:
    dtype, shape, fortran_order, start = _npy_header(content)
    if dtype.hasobject:
        raise ValueError(
            "it holds pickled objects, which are not read as loading them runs code. Save the array itself, or an .npz "
            "with array, sampling_rate, lead_names and unit."
        )
    count, present = math.prod(shape), (len(content) - start) // max(1, dtype.itemsize)
    if not 0 <= count <= present:
        raise ValueError(f"it is cut: its shape is {list(shape)}, but only {present} values are there.")
    return np.frombuffer(content, dtype, count, start).reshape(shape, order="F" if fortran_order else "C")


def _read_npy(content: bytes) -> dict[str, Any]:
    dtype, shape, _, start = _npy_header(content)
    if dtype.kind == "O" and shape == ():
        return _read_reference_dict(content[start:])
    return {"array": _npy_array(content), "metadata": {"format": "NumPy"}}


@dataclass
class _Inert:
    """What stands in a pickle for one of NumPy's functions or its result; nothing is imported or called."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


_NUMPY_GLOBALS = {
    f"{module} {name}"
    for module, name in (
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
    )
}
# of one byte each, every one may make an object; the reference's dict takes about a hundred
_MAX_OPCODES = 10_000


def _load_numpy_pickle(content: bytes) -> Any:
    """What a pickle of dicts, lists, tuples, strings, numbers and NumPy arrays holds; arrays are left as `_Inert`.

    `pickle` is not used: nothing is imported or called, and no key but a string is hashed.

    Raises:
        ValueError: there is any other opcode or global, or the file is cut or makes no sense.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_marked() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def pop(count: int) -> list[Any]:
        return [stack.pop() for _ in range(count)][::-1]

    def push_global(name: str) -> None:
        if name not in _NUMPY_GLOBALS:
            raise ValueError(f"it asks for {name[:80]!r}, and only plain values and NumPy arrays are read.")
        stack.append(_Inert(name.split()[1]))

    def set_items(items: list[Any]) -> None:
        if type(stack[-1]) is not dict or any(type(key) is not str for key in items[::2]):
            raise ValueError("it holds a dict whose keys are no strings.")
        stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def extend(items: list[Any]) -> None:
        if type(stack[-1]) is not list:
            raise ValueError("it appends to what is no list.")
        stack[-1].extend(items)

    operations: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(content)
    for number, (opcode, argument, _) in enumerate(operations):
        if number > _MAX_OPCODES:
            raise ValueError(f"it holds more than {_MAX_OPCODES} opcodes.")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE" | "BINUNICODE8" | "SHORT_BINBYTES" | "BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(int(opcode.name[-1]))))
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(pop_marked()))
            case "SETITEM":
                set_items(pop(2))
            case "SETITEMS":
                set_items(pop_marked())
            case "APPEND":
                extend(pop(1))
            case "APPENDS":
                extend(pop_marked())
            case "GLOBAL":
                push_global(argument)
            case "STACK_GLOBAL":
                push_global("{} {}".format(*pop(2)))
            case "REDUCE":
                function, arguments = pop(2)
                if type(function) is not _Inert or type(arguments) is not tuple:
                    raise ValueError("it calls what is no function of NumPy.")
                stack.append(_Inert(function.name, arguments))
            case "BUILD":
                (state,) = pop(1)
                if type(stack[-1]) is not _Inert:
                    raise ValueError("it sets the state of what is no NumPy array.")
                stack[-1].state = state
            case "STOP":
                return stack.pop()
            case name:
                raise ValueError(f"it holds the opcode {name}, and only plain values and NumPy arrays are read.")


def _pickled_dtype(value: _Inert) -> np.dtype:
    code, order = value.arguments[0], value.state[1]
    if not (re.fullmatch("f[248]|[iu][1248]", code) and order in ("<", ">", "|", "=")):
        raise ValueError(f"it holds an array of dtype {code[:20]!r}; expected real numbers.")
    return np.dtype(code).newbyteorder(order)


def _pickled_array(value: Any) -> np.ndarray:
    if not (isinstance(value, _Inert) and value.name == "_reconstruct"):
        raise ValueError("its 'ecg' is no NumPy array.")
    _, shape, dtype, fortran_order, data = value.state
    return np.frombuffer(data, _pickled_dtype(dtype)).reshape(shape, order="F" if fortran_order else "C")


def _pickled_fact(value: Any) -> Any:
    """A number or a string; None for anything else."""
    if isinstance(value, _Inert) and value.name == "scalar":
        dtype, data = value.arguments
        return np.frombuffer(data, _pickled_dtype(dtype))[0].item()
    return value if isinstance(value, (int, float, str)) else None


def _read_reference_dict(content: bytes) -> dict[str, Any]:
    """The reference's `np.save(path, {"ecg": ..., "target_sf": ..., ...})`, without unpickling.

    Leads are not named: the reference writes MIMIC and CODE-15 in its own order, and all else as it comes, which is the
    standard order.
    """
    try:
        outer = _load_numpy_pickle(content)
        (facts,) = outer.state[4]
        array = _pickled_array(facts["ecg"])
        said = {name: _pickled_fact(value) for name, value in facts.items()}
    except Exception as error:
        raise ValueError(
            "it holds pickled objects other than the reference's dict of ecg, target_sf, report ..., and loading them "
            "would run code. Save the array itself, or an .npz with array, sampling_rate, lead_names and unit. "
            f"({error})"
        ) from error
    metadata = {name: said.get(name) for name in ("report", "ecg_path", "npy_path", "original_sf", "segment_len")}
    record = {"array": array, "sampling_rate": said.get("target_sf"), "unit": "mV"}
    if re.search("mimic|code[-_]?15", f"{metadata['ecg_path']} {metadata['npy_path']}", re.IGNORECASE):
        record["lead_names"] = ["I", "II", "III", "aVL", "aVR", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
        metadata["lead_order"] = "of the reference, as its ecg_path or npy_path names MIMIC or CODE-15"
    return {**record, "metadata": {"format": "NumPy, dict of the reference", **_said(**metadata)}}


def _read_npz(content: bytes) -> dict[str, Any]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        names = [info.filename.removesuffix(".npy") for info in archive.infolist()]
        several = "one record; `elm data build` reads archives of several"

        def member(key: str) -> np.ndarray:
            info = archive.infolist()[names.index(key)]
            # zipfile unpacks the others at one go, however large
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{key!r} is compressed in another way than np.savez_compressed does.")
            if info.file_size > 8 * MAX_SAMPLES:
                raise ValueError(f"{key!r} unpacks to {info.file_size} bytes; at most {8 * MAX_SAMPLES} are read.")
            return _npy_array(archive.read(info))

        array = next((key for key in ("array", "ecg") if key in names), None)
        if array is None:
            shown = f"{names[:8]}{' ...' if len(names) > 8 else ''}"
            raise ValueError(f"it holds {shown}; expected the key 'array' or 'ecg' [leads, samples] of {several}.")
        record: dict[str, Any] = {
            key: member(key).tolist() for key in ("sampling_rate", "lead_names", "unit") if key in names
        }
        record["array"] = member(array)
    if record["array"].ndim == 3:
        shape = list(record["array"].shape)
        raise ValueError(f"{array!r} has shape {shape}; expected [leads, samples] of {several}.")
    return {**record, "metadata": {"format": "NumPy"}}


# WFDB: https://wfdb.io/spec/header-files.html

_MAX_HEADER_BYTES = 2**18
# the standard says 255; wfdb's patterns take time with the square of a line
_MAX_HEADER_LINE = 1000
_BITS_PER_SAMPLE = {"8": 8, "16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12, "310": 32 / 3}
_BITS_PER_SAMPLE["311"] = _BITS_PER_SAMPLE["310"]
_FLAC_FORMATS = ("508", "516", "524")


def _header_lines(content: bytes) -> list[bytes]:
    return [line for line in map(bytes.strip, content.splitlines()) if line and not line.startswith(b"#")]


def _is_wfdb_header(content: bytes) -> bool:
    """A line `NAME[/SEGMENTS] SIGNALS [RATE ...]`, and none of numbers after it, as in a table."""
    record, signal = [*_header_lines(content[:4096]), b"", b""][:2]
    return bool(
        re.fullmatch(rb"[-\w]+(/\d+)?[ \t]+\d+([ \t][-\d.:/() \t]*)?", record)
        and not re.fullmatch(rb"[-+\d.eE \t]+", signal)
    )


def _wfdb_header(path: Path) -> Path | None:
    """The header of the WFDB record that `path` stands for: itself, its name without suffix, or one of its signals."""
    header = path.with_name(f"{path.name}.hea") if not path.exists() else path.with_suffix(".hea")
    if header == path or not header.is_file() or header.stat().st_size > _MAX_HEADER_BYTES:
        return None
    content = header.read_bytes()
    signals = [line.split()[0] for line in _header_lines(content)[1:]]
    return header if _is_wfdb_header(content) and (not path.exists() or os.fsencode(path.name) in signals) else None


def _wfdb_signals(header: Path) -> tuple[float, list[dict[str, str]]]:
    """Frames per second and the fields of the signal lines of a header, whose claims the signal files bear out."""
    with header.open("rb") as file:
        content = file.read(_MAX_HEADER_BYTES + 1)
    lines = _header_lines(content)
    if len(content) > _MAX_HEADER_BYTES or max(map(len, lines)) > _MAX_HEADER_LINE:
        raise ValueError(
            f"its header is longer than {_MAX_HEADER_BYTES} bytes, or a line of it than {_MAX_HEADER_LINE}."
        )
    if not all(line.isascii() for line in lines):  # wfdb drops the mu of "μV"
        raise ValueError("its header holds other characters than ASCII; write a unit as mV or uV.")
    if "::" in str(header.absolute()):  # fsspec, below wfdb, would take it for a chain of addresses
        raise ValueError("its path holds '::'; rename the folder.")
    patterns = _library("wfdb.io.header")
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
    frames = int(record["sig_len"] or 0)
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
        per_frame = sum(int(signal["samps_per_frame"] or 1) for signal in parts)
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


def _read_wfdb(header: Path) -> dict[str, Any]:
    frame_rate, signals = _wfdb_signals(header)
    names = [signal["sig_name"].strip() for signal in signals]
    units = [signal["units"] or "mV" for signal in signals]
    rates = [frame_rate * int(signal["samps_per_frame"] or 1) for signal in signals]
    rows, left_out = _select_signals(names, units, rates)
    record = _library("wfdb").rdrecord(str(header.absolute().with_suffix("")), channels=rows, smooth_frames=False)
    comments = [comment.strip() for comment in record.comments]
    facts = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in comments)}
    metadata = _said(
        age=_number(facts.get("age", "")),
        sex=_sex(facts.get("sex", "")),
        dx=facts.get("dx"),
        date=record.base_date and record.base_date.isoformat(),
        comments=[comment for comment in comments if comment],
        left_out=left_out,
    )
    return {
        "array": np.stack(
            [_in_millivolts(signal, units[row]) for row, signal in zip(rows, record.e_p_signal, strict=True)]
        ),
        "sampling_rate": rates[rows[0]],
        "lead_names": [names[row] for row in rows] if any(names) else None,
        "unit": "mV",
        "metadata": {"format": "WFDB", **metadata},
    }


# EDF, EDF+ and BDF: https://www.edfplus.info/specs


def _read_edf(content: bytes) -> dict[str, Any]:
    edfio = _library("edfio")
    is_bdf = content[:1] == b"\xff"
    kind = content[192:197].decode("latin-1")
    if kind[3:] == "+D":
        raise ValueError(f"it is discontinuous ({kind}), with pauses within; save its continuous parts one by one.")
    claimed = int(content[236:244])
    edf = (edfio.read_bdf if is_bdf else edfio.read_edf)(content, header_encoding="latin-1")
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
    rows, left_out = _select_signals(names, units, [signal.sampling_frequency for signal in signals])
    left_out |= {signal.label.strip(): "no physical range" for signal in edf.signals if signal not in signals}
    facts: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # not known, or not written as EDF+ demands
        facts["date"] = edf.startdate.isoformat()
    if kind[3:] == "+C":
        with contextlib.suppress(ValueError):
            facts |= {"patient_id": edf.patient.code, "sex": _sex(edf.patient.sex)}
    return {
        "array": np.stack([_in_millivolts(signals[row].data, units[row]) for row in rows]),
        "sampling_rate": signals[rows[0]].sampling_frequency,
        "lead_names": [names[row] for row in rows],
        "unit": "mV",
        "metadata": {
            "format": kind if kind[3:] == "+C" else "BDF" if is_bdf else "EDF",
            **_said(
                **{name: fact for name, fact in facts.items() if fact not in ("X", "x")},  # not known
                filters=sorted({signals[row].prefiltering.strip() for row in rows} - {""}),
                left_out=left_out,
            ),
        },
    }


# DICOM waveforms: PS3.3 C.10.9, and CID 3001 for the leads

_DICOM_DTYPES = {"SB": "i1", "UB": "u1", "SS": "i2", "US": "u2", "SL": "i4", "UL": "u4"}
# the numbers of SCP-ECG (EN 1064), on which the codes of SCPECG (5.6.3-9-n) and MDC (2:n, 131328 + n) rest
_SCP_LEADS = {1: "I", 2: "II", 3: "V1", 4: "V2", 5: "V3", 6: "V4", 7: "V5", 8: "V6"}
_SCP_LEADS |= {61: "III", 62: "aVR", 63: "aVL", 64: "aVF"}
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def _dicom_lead(channel: Any) -> str:
    source = channel.ChannelSourceSequence[0]
    code, meaning = str(source.get("CodeValue", "")), str(source.get("CodeMeaning", ""))
    number = re.fullmatch(r"(?:5\.6\.3-9-|2:)(\d{1,2})|131(\d{3})", code)
    if number:
        lead = _SCP_LEADS.get(int(number[1] or int(number[2]) - 328))
        if lead:
            return lead
    name = re.sub(r"[(,].*", "", meaning or str(channel.get("ChannelLabel", "")))
    return re.sub(r"^lead\b", "", name.strip(), flags=re.IGNORECASE).strip() or code


def _read_dicom(content: bytes) -> dict[str, Any]:
    if _DEFLATED in content:
        raise ValueError("it is deflated (transfer syntax 1.2.840.10008.1.2.1.99); save it uncompressed.")
    dataset = _library("pydicom").dcmread(io.BytesIO(content))
    if not dataset.get("WaveformSequence"):
        raise ValueError(f"it holds no waveform, but {getattr(dataset.get('SOPClassUID'), 'name', 'nothing known')}.")
    groups = list(dataset.WaveformSequence)
    # a median beat is derived
    groups = [group for group in groups if group.get("WaveformOriginality") != "DERIVED"] or groups
    group = max(groups, key=lambda group: group.NumberOfWaveformSamples / float(group.SamplingFrequency))
    num_channels, num_samples = int(group.NumberOfWaveformChannels), int(group.NumberOfWaveformSamples)
    order = "<" if dataset.original_encoding[1] else ">"
    interpretation = str(group.WaveformSampleInterpretation)
    if interpretation not in _DICOM_DTYPES:
        raise ValueError(f"its samples are {interpretation!r}; expected one of {', '.join(_DICOM_DTYPES)}.")
    dtype = np.dtype(order + _DICOM_DTYPES[interpretation])
    size, data = num_channels * num_samples * dtype.itemsize, group.WaveformData
    if group.WaveformBitsAllocated != 8 * dtype.itemsize or not size <= len(data) <= size + 1:  # padded to be even
        raise ValueError(
            f"it holds {len(data)} bytes of waveform; {num_channels} channels of {num_samples} samples take {size}."
        )
    counts = np.frombuffer(data[:size], dtype).reshape(num_samples, num_channels)
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
    rows, left_out = _select_signals(names, units, [rate] * num_channels)
    padding = group.get("WaveformPaddingValue")
    leads = []
    for row in rows:
        channel = channels[row]
        gain = float(channel.ChannelSensitivity) * float(channel.get("ChannelSensitivityCorrectionFactor") or 1)
        lead = _in_millivolts(counts[:, row] * gain + float(channel.get("ChannelBaseline") or 0), units[row])
        if padding:
            lead[counts[:, row] == np.frombuffer(padding[: dtype.itemsize], dtype)[0]] = np.nan
        leads.append(lead)

    def text(keyword: str) -> str:
        return str(dataset.get(keyword) or "")

    age = re.fullmatch(r"(\d{3})Y", text("PatientAge"))
    date = re.sub(r"^(\d{4})(\d\d)(\d\d)", r"\1-\2-\3", text("AcquisitionDateTime") or text("StudyDate"))
    frequencies = {
        "high_pass": "FilterLowFrequency",
        "low_pass": "FilterHighFrequency",
        "notch": "NotchFilterFrequency",
    }
    filters = {name: float(channels[rows[0]].get(keyword) or 0) for name, keyword in frequencies.items()}
    statements = [
        str(note.get("UnformattedTextValue") or "") for note in dataset.get("WaveformAnnotationSequence") or []
    ]
    return {
        "array": np.stack(leads),
        "sampling_rate": rate,
        "lead_names": [names[row] for row in rows],
        "unit": "mV",
        "metadata": {
            "format": "DICOM",
            **_said(
                patient_id=text("PatientID"),
                age=float(age[1]) if age else None,
                sex=_sex(text("PatientSex")),
                date=re.sub(r"(?<=-\d\d)(\d\d)(\d\d)(\d\d)", r"T\1:\2:\3", date),
                device=" ".join(filter(None, (text("Manufacturer"), text("ManufacturerModelName")))),
                statements=[statement for statement in statements if statement],
                filters={name: f"{hertz:g} Hz" for name, hertz in filters.items() if hertz},
                left_out=left_out,
            ),
        },
    }


# MATLAB 5: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
# not by scipy.io.loadmat: a single damaged byte can make it crash the process

_MAT_DTYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MAT_TEXTS = {4: "utf-16", 16: "utf-8", 17: "utf-16"}
_MAT_COMPRESSED, _MAT_MATRIX = 15, 14
_MAT_STRUCT, _MAT_CHAR = 2, 4
_MAT_NUMBERS = range(6, 16)
_MAX_MAT_FIELD_NAMES = 2**16  # bytes


def _mat_elements(content: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The type and the data of one element after the other."""
    position = 0
    while position < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, position)
        start = position + 8
        padded = size if kind == _MAT_COMPRESSED else -(-size // 8) * 8
        if kind >> 16:  # up to four bytes stand in the tag
            kind, size, start, padded = kind & 0xFFFF, kind >> 16, position + 4, 4
        if start + size > len(content):
            raise ValueError(f"it is cut: an element claims {size} bytes, and {len(content) - start} are left.")
        yield kind, content[start : start + size]
        position = start + padded


def _mat_matrix(content: memoryview, order: str) -> tuple[str, Any]:
    """Name and value of a variable: an array, a string, a dict for a struct of one element; None for all else."""
    elements = _mat_elements(content, order)
    flags, dimensions, name = (data for _, data in (next(elements), next(elements), next(elements)))
    matrix_class = int(np.frombuffer(flags, f"{order}u4")[0])
    shape = tuple(np.frombuffer(dimensions, f"{order}i4").tolist())
    value: Any = None
    if matrix_class & 0xFF in _MAT_NUMBERS and not matrix_class & 0x800:  # complex numbers are no ECG
        kind, data = next(elements)
        value = np.frombuffer(data, order + _MAT_DTYPES[kind]).reshape(shape, order="F")
    elif matrix_class & 0xFF == _MAT_CHAR:
        kind, data = next(elements)
        value = str(data, _MAT_TEXTS[kind] + ("" if kind == 16 else "-le" if order == "<" else "-be"))
    elif matrix_class & 0xFF == _MAT_STRUCT and math.prod(shape) == 1:
        (_, length), (_, names) = next(elements), next(elements)
        width = int(np.frombuffer(length, f"{order}i4")[0])
        if len(names) > _MAX_MAT_FIELD_NAMES:
            raise ValueError(f"it holds a struct with {len(names)} bytes of field names.")
        fields = [bytes(names[start : start + width]).split(b"\0")[0] for start in range(0, len(names), width)]
        value = {
            field.decode("latin-1"): _mat_matrix(data, order)[1] if len(data) else None
            for field, (_, data) in zip(fields, elements, strict=True)
        }
    return str(name, "latin-1"), value


def _read_mat(content: bytes) -> dict[str, Any]:
    order = {b"IM": "<", b"MI": ">"}[content[126:128]]
    limit = 8 * MAX_SAMPLES
    variables: dict[str, Any] = {}
    for kind, data in _mat_elements(memoryview(content)[128:], order):
        if kind == _MAT_COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(data, max(1, limit))  # 0 would be no limit
            if not unpacker.eof:
                raise ValueError(f"a variable is cut, or unpacks to more than {8 * MAX_SAMPLES} bytes.")
            limit -= len(unpacked)
            kind, data = next(_mat_elements(memoryview(unpacked), order))
        if kind == _MAT_MATRIX:
            name, value = _mat_matrix(data, order)
            variables[name] = value
    ecg = variables.get("ECG")
    if isinstance(ecg, dict) and isinstance(ecg.get("data"), np.ndarray):  # CPSC 2018
        age = ecg.get("age")
        return {
            "array": ecg["data"],
            "sampling_rate": 500,  # of the whole data set: the files do not say it
            "unit": "mV",
            "metadata": {
                "format": "MATLAB, CPSC 2018",
                **_said(
                    age=_number(age.item()) if isinstance(age, np.ndarray) and age.size == 1 else None,
                    sex=_sex(ecg["sex"]) if isinstance(ecg.get("sex"), str) else None,
                ),
            },
        }
    if isinstance(variables.get("feats"), np.ndarray):  # CODE-15
        rate = variables.get("curr_sample_rate")
        return {
            "array": variables["feats"],
            "sampling_rate": rate.item() if isinstance(rate, np.ndarray) and rate.size == 1 else None,
            "metadata": {"format": "MATLAB, CODE-15"},
        }
    if "val" in variables:
        raise ValueError(_NO_HEADER)
    raise ValueError(
        f"it holds the variables {sorted(variables)[:8]}; expected the struct ECG of CPSC 2018, or feats and "
        "curr_sample_rate."
    )


_NO_HEADER = (
    "its matrix holds counts without rate, leads and gain, which the WFDB header beside it states; put NAME.hea into the "
    "same folder."
)


def _is_mat_4(content: bytes) -> bool:
    """Five whole numbers (type, rows, columns, complex, length of the name), and a name that ends with 0."""
    if len(content) < 24:
        return False
    kind, _, _, is_complex, length = struct.unpack("<5I", content[:20])
    return kind in (0, 10, 20, 30, 40, 50) and is_complex < 2 and 1 < length <= 64 and content[19 + length] == 0


def _read_mat_4(content: bytes) -> dict[str, Any]:
    raise ValueError(_NO_HEADER)


def _read_hdf5(content: bytes) -> dict[str, Any]:
    raise ValueError("it is HDF5, as MATLAB writes with -v7.3; save it with -v7, or its array as .npz.")


# CSV

_DELIMITERS = (b",", b";", b"\t")
_UTF8_MARK = b"\xef\xbb\xbf"
_INDEX_COLUMNS = ("", "index", "sample", "sample #", "unnamed: 0")
_TIME_COLUMNS = {"time": "", "t": "", "elapsed time": "", "seconds": "s", "time_s": "s", "ms": "ms", "time_ms": "ms"}
_SECONDS = {"": 1.0, "s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "milliseconds": 1e-3}
# no ECG is sampled slower, in hertz
_MIN_CSV_RATE = 10.0


def _text(line: bytes) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError:
        return line.decode("latin-1").strip()


def _csv_cells(line: bytes) -> tuple[str, list[str]]:
    delimiter = max(_DELIMITERS, key=line.count).decode()
    (cells,) = csv.reader([_text(line)], delimiter=delimiter, skipinitialspace=True)
    return delimiter, [cell.strip().strip("'").strip() for cell in cells]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _is_csv(content: bytes) -> bool:
    """Text in whose first or second row, comments apart, stands a number."""
    head = content[:65536]
    rows = _header_lines(head.removeprefix(_UTF8_MARK))[:2]
    return b"\0" not in head and any(_is_number(cell) for row in rows for cell in _csv_cells(row)[1])


def _rate_of(times: np.ndarray, unit: str) -> float:
    """The sampling rate in hertz of evenly spaced times, whole where their rounding admits a whole number."""
    seconds = times * _SECONDS[unit]
    span, steps = seconds[-1] - seconds[0], len(seconds) - 1
    if not 0 < span < math.inf:
        raise ValueError("its times do not increase; leave the column out and pass sampling_rate=....")
    step = span / steps
    differences = np.diff(seconds)
    if not (differences.min() > 0.5 * step and differences.max() < 1.5 * step):
        raise ValueError(
            f"its times are not even: steps of {differences.min():g} to {differences.max():g} s. Resample it, or leave "
            "the column out and pass sampling_rate=...."
        )
    rate = float(1 / step)
    if rate < _MIN_CSV_RATE:
        raise ValueError(f"its times make {rate:g} Hz; head the column 'time (s)' or 'time (ms)', as it is.")
    rounding = np.abs(seconds - (seconds[0] + step * np.arange(len(seconds)))).max()
    return float(round(rate)) if abs(span - steps / round(rate)) <= 2 * rounding + 1e-9 * span else rate


def _read_csv(content: bytes) -> dict[str, Any]:
    stream = io.BytesIO(content.removeprefix(_UTF8_MARK))
    comments: list[str] = []
    while (line := stream.readline()) and (not line.strip() or line.lstrip().startswith(b"#")):
        comments.append(_text(line).lstrip("# "))
    delimiter, cells = _csv_cells(line)
    has_header = not all(map(_is_number, cells))
    if not has_header:
        stream.seek(-len(line), os.SEEK_CUR)
    try:
        table = np.loadtxt(stream, delimiter=delimiter, encoding="latin-1", ndmin=2, quotechar='"')
    except ValueError as error:
        raise ValueError(f"expected a row of lead names, and rows of numbers with a decimal point: {error}") from error
    if len(table) < 2 or (has_header and table.shape[1] != len(cells)):
        raise ValueError(
            f"its first row has {len(cells)} columns, {len(table)} rows of numbers have {table.shape[1]}; expected two "
            "rows at least, one for each sample."
        )

    facts = {
        name.strip().lower().replace(" ", "_"): fact.strip()
        for name, _, fact in (comment.replace("=", ":").partition(":") for comment in comments)
    }
    rates = [facts[name] for name in ("sampling_rate", "sample_rate", "sampling_frequency", "fs") if name in facts]
    record: dict[str, Any] = {"sampling_rate": _number(rates[0].lower().removesuffix("hz")) if rates else None}
    metadata = {"format": "CSV", **_said(comments=[comment for comment in comments if comment])}
    stated_unit = facts.get("unit") or facts.get("units") or ""
    if not has_header:
        return {**record, "array": _counts_as_integers(table.T), "unit": stated_unit or None, "metadata": metadata}

    names, units, columns = [], [], []
    for cell, column in zip(cells, table.T, strict=True):
        parts = re.fullmatch(r"([^(\[]*)[(\[]([^)\]]*)[)\]]", cell)
        name, unit = (parts[1].strip(), parts[2].strip()) if parts else (cell, "")
        if name.lower() in _TIME_COLUMNS:
            unit = unit.lower() or _TIME_COLUMNS[name.lower()]
            if unit not in _SECONDS:
                raise ValueError(f"its times are in {unit!r}; expected s or ms.")
            record["sampling_rate"] = _rate_of(column, unit)
        elif name.lower() not in _INDEX_COLUMNS:
            names.append(name)
            units.append(unit or stated_unit)
            columns.append(column)
    if not names:
        raise ValueError(f"it holds no column of a lead, but {', '.join(cells)}.")
    if not any(units):
        return {**record, "array": _counts_as_integers(np.stack(columns)), "lead_names": names, "metadata": metadata}
    rows, left_out = _select_signals(names, units, [0] * len(names))
    return {
        **record,
        "array": np.stack([_in_millivolts(columns[row], units[row]) for row in rows]),
        "lead_names": [names[row] for row in rows],
        "unit": "mV",
        "metadata": {**metadata, **_said(left_out=left_out)},
    }


def _counts_as_integers(array: np.ndarray) -> np.ndarray:
    """Whole numbers as integers, whose unit the caller has to give; all else are millivolts, as in any array."""
    is_counts = array.any() and np.abs(array).max() < 2**31 and (array == np.rint(array)).all()
    return array.astype(np.int32) if is_counts else array


def _is_xml(content: bytes) -> bool:
    head = content[:256]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head[2:]
    return head.removeprefix(_UTF8_MARK).lstrip(b" \t\r\n\0").startswith(b"<")


# name, whether content is of this kind, its reader; the first that fits
_FORMATS: list[tuple[str, Callable[[bytes], bool], Callable[[bytes], dict[str, Any]]]] = [
    ("NumPy .npy", lambda content: content.startswith(b"\x93NUMPY"), _read_npy),
    ("NumPy .npz", lambda content: content.startswith((b"PK\x03\x04", b"PK\x05\x06")), _read_npz),
    ("EDF", lambda content: content.startswith((b"0       ", b"\xffBIOSEMI")), _read_edf),
    ("DICOM", lambda content: content[128:132] == b"DICM", _read_dicom),
    ("SCP-ECG", lambda content: content[16:22] == b"SCPECG", read_scp),
    ("ISHNE", lambda content: content.startswith((b"ISHNE1.0", b"ANN  1.0")), read_ishne),
    ("MATLAB", lambda content: content.startswith(b"MATLAB 5.0 MAT-file"), _read_mat),
    ("MATLAB 7.3", lambda content: content.startswith((b"MATLAB 7.3", b"\x89HDF\r\n")), _read_hdf5),
    ("MATLAB 4", _is_mat_4, _read_mat_4),
    ("XML (HL7 aECG, GE MUSE or Philips Sierra)", _is_xml, read_xml),
    ("CSV", _is_csv, _read_csv),
]


def format_of(content: bytes) -> str | None:
    """The name of the format that a file which begins so is of, if it is a known one; last CSV, which much text may be."""
    if _is_wfdb_header(content):
        return "WFDB"
    return next((name for name, is_format, _ in _FORMATS if is_format(content)), None)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    rate = record.get("sampling_rate")
    low, high = SAMPLING_RATES
    if isinstance(rate, (int, float)) and not low <= rate <= high:  # resampled it could take any amount of memory
        raise ValueError(f"its sampling rate is {rate:g} Hz; expected {low:g} to {high:g}.")
    return record


def read_file(path: str | os.PathLike) -> dict[str, Any]:
    """What an ECG file says, whatever its format, which is told by its content.

    NumPy (`.npy`, `.npz`), WFDB (its `.hea`, one of its signal files, or its name without suffix), EDF, EDF+ and BDF,
    DICOM, HL7 aECG, GE MUSE XML, Philips Sierra XML, SCP-ECG, ISHNE, MATLAB 5 (CPSC 2018, CODE-15), and CSV.

    Nothing is executed or fetched, and no more memory is taken than a few times the file's size and `MAX_SAMPLES`.

    Returns:
        array: numbers [leads, samples].
        sampling_rate: in hertz, or None where the file does not say it.
        lead_names: as the file writes them, or None.
        unit: mV, uV, V or None.
        metadata: plain values: `format`, and what else the file says, such as patient_id, age, sex, date, device,
            statements, filters; `left_out` says why signals of the file are not in the array.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, too large, of no known format, damaged, or holds no ECG.
        ImportError: the format needs a library of the extra `formats`.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder or no regular file; give the path of one recording.")
    header = _wfdb_header(path)
    if header is None:
        size = path.stat().st_size
        if not 0 < size <= MAX_FILE_BYTES:
            raise ValueError(
                f"{path} has {size} bytes; expected a recording, of at most {MAX_FILE_BYTES / 2**20:g} MiB."
            )
        content = path.read_bytes()
        if _is_wfdb_header(content):
            header = path
    keys = dict.fromkeys(("array", "sampling_rate", "lead_names", "unit", "metadata"))
    if header is not None:
        with _reading(path, "WFDB"):
            return {**keys, **_checked(_read_wfdb(header))}
    for name, is_format, read in _FORMATS:
        if is_format(content):
            with _reading(path, name):
                return {**keys, **_checked(read(content))}
    raise ValueError(
        f"{path} is of no known format. These are: {', '.join(name for name, _, _ in _FORMATS)}, and WFDB, whose signal "
        "files need their header NAME.hea beside them."
    )
