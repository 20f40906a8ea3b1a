"""ECG files of every common format: the content tells the format.

`read_file` gives what the file holds and nothing else; `ecg_utils.read_ecg` makes a checked record of it.
"""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from .ecg_formats_arrays import is_mat_4, read_mat, read_mat_4, read_npy, read_npz
from .ecg_formats_binary import read_ishne, read_scp
from .ecg_formats_common import MAX_FILE_BYTES, NOTHING_GIVEN, UTF8_MARK, Given, agreed
from .ecg_formats_csv import is_csv, read_csv
from .ecg_formats_ecgdatakit import is_kardia, is_mfer, read_kardia, read_mfer
from .ecg_formats_hdf5 import is_hdf5, read_hdf5
from .ecg_formats_libraries import is_dicom, read_dicom, read_edf
from .ecg_formats_wfdb import header_fault, is_wfdb_header, read_wfdb, wfdb_header
from .ecg_formats_xml import read_xml

# in hertz; a record of any other rate could take any amount of memory when it is resampled
SAMPLING_RATES = (1.0, 1e6)


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
        reason = str(error) if isinstance(error, ValueError) else f"it is damaged ({type(error).__name__}: {error})."
        raise ValueError(f"Cannot read {path} as {name}: {reason}") from error


def _is_xml(content: bytes) -> bool:
    head = content[:256]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # byte order marks of UTF-16
        head = head[2:]
    return head.removeprefix(UTF8_MARK).lstrip(b" \t\r\n\0").startswith(b"<")  # \0: half of a letter in UTF-16


def _without_caller(read: Callable[[bytes], dict[str, Any]]) -> Callable[[bytes, Given], dict[str, Any]]:
    """A reader of a format in which all signals have one unit: what the file says is agreed with the caller's afterwards."""
    return lambda content, given: agreed(read(content), given)


# name, whether content is of this kind, its reader; the first that fits
_FORMATS: list[tuple[str, Callable[[bytes], bool], Callable[[bytes, Given], dict[str, Any]]]] = [
    ("NumPy .npy", lambda content: content.startswith(b"\x93NUMPY"), _without_caller(read_npy)),
    # PK 5 6: empty
    ("NumPy .npz", lambda content: content.startswith((b"PK\x03\x04", b"PK\x05\x06")), _without_caller(read_npz)),
    ("EDF", lambda content: content.startswith((b"0       ", b"\xffBIOSEMI")), read_edf),
    ("DICOM", is_dicom, read_dicom),
    ("SCP-ECG", lambda content: content[16:22] == b"SCPECG", _without_caller(read_scp)),
    # ANN: refused by the reader
    ("ISHNE", lambda content: content.startswith((b"ISHNE1.0", b"ANN  1.0")), _without_caller(read_ishne)),
    ("MATLAB", lambda content: content.startswith(b"MATLAB 5.0 MAT-file"), read_mat),
    ("MATLAB 4", is_mat_4, _without_caller(read_mat_4)),
    ("MFER", is_mfer, read_mfer),
    ("AliveCor Kardia", is_kardia, read_kardia),
    ("XML (HL7 aECG, GE MUSE, Philips Sierra or Mortara ELI)", _is_xml, read_xml),
    ("CSV", is_csv, read_csv),
]


def format_of(content: bytes) -> str | None:
    """The format of a file that begins with `content`, None if unknown. CSV comes last, as much text looks like it."""
    if is_wfdb_header(content):
        return "WFDB"
    if is_hdf5(content):
        return "HDF5"
    return next((name for name, is_format, _ in _FORMATS if is_format(content)), None)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    rate = record.get("sampling_rate")
    low, high = SAMPLING_RATES
    if isinstance(rate, (int, float)) and not low <= rate <= high:  # as_record judges anything else
        raise ValueError(f"its sampling rate is {rate:g} Hz; expected {low:g} to {high:g}.")
    return record


def record_path(path: str | os.PathLike) -> tuple[Path, str | None]:
    """The file that a path means, and which of its records: `exams_part0.hdf5#1169160` names one of a file of several."""
    file, mark, record = str(path).rpartition("#")
    if mark and not os.path.exists(path) and os.path.isfile(file):  # a name may well hold a #
        return Path(file), record
    return Path(path), None


def read_file(path: str | os.PathLike, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """What an ECG file states, in any known format.

    NumPy (`.npy`, `.npz`), WFDB (its `.hea`, one of its signal files, or its name without suffix), EDF, EDF+ and BDF,
    DICOM, HL7 aECG, GE MUSE XML, Philips Sierra XML, Mortara ELI XML, SCP-ECG, ISHNE, MFER, AliveCor Kardia JSON, MATLAB 5 to
    7.3 (CPSC 2018, CODE-15), HDF5 (CODE-15: the path with `#` and the record's `exam_id`), and CSV.

    Nothing is executed or fetched, and no more memory is taken than a few times the file's size and `MAX_SAMPLES`.

    Args:
        given: what the caller says of what the file does not say.

    Returns:
        array: numbers [leads, samples].
        sampling_rate: in hertz, or None where the file does not say it.
        lead_names: as the file writes them, or None; where the caller gives any, these agreed with the file's.
        unit: mV, uV, V or None.
        metadata: plain values: `format`, and what else the file says, such as patient_id, age, sex, date, device,
            statements, filters; `left_out` says why signals of the file are not in the array.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, empty, too large, of no known format, damaged, or holds no ECG.
        ImportError: the format needs a library of the extra `formats`.
    """
    path, record = record_path(path)
    if path.exists() and not path.is_file():  # one that is not there may name a WFDB record
        raise ValueError(f"{path} is a folder or no regular file; give the path of one recording.")
    record_keys = dict.fromkeys(
        ("array", "sampling_rate", "lead_names", "unit", "metadata")
    )  # whatever its reader gives
    name, read = _reader(path, replace(given, record=record))
    with _reading(path, name):
        return {**record_keys, **_checked(read())}


def _reader(path: Path, given: Given) -> tuple[str, Callable[[], dict[str, Any]]]:
    """The name of a file's format, and what reads it."""
    header = wfdb_header(path)  # before the content: signal files have no mark, or that of MATLAB 4
    if header is not None:
        return "WFDB", partial(read_wfdb, header, given)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    with path.open("rb") as file:
        if is_hdf5(file.read(1024)):  # before its size is judged: such files are read record by record
            return "HDF5", partial(read_hdf5, path, given)
    if given.record is not None:
        raise ValueError(
            f"{path} holds one record; leave out #{given.record}, which names one of a HDF5 file of several."
        )
    size = path.stat().st_size
    if not 0 < size <= MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size} bytes; expected a recording, at most {MAX_FILE_BYTES / 2**20:g} MiB.")
    content = path.read_bytes()
    if is_wfdb_header(content):  # a header by itself, or with another suffix
        return "WFDB", partial(read_wfdb, path, given)
    name, reader = next(((name, read) for name, is_format, read in _FORMATS if is_format(content)), (None, None))
    fault = header_fault(path)
    if fault and name in (None, "MATLAB 4"):  # signals that cannot be read without their header
        raise ValueError(f"Cannot read {path} by its WFDB header: {fault}")
    if name is None or reader is None:
        raise ValueError(
            f"{path} is of no known format. These are: {', '.join(name for name, _, _ in _FORMATS)}, HDF5, and WFDB, whose "
            "signal files need their header NAME.hea beside them."
        )
    return name, partial(reader, content, given)
