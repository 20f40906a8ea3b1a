"""ECG files in HDF5: CODE-15% and the other sets of the CODE study, with many records in one, and MATLAB 7.3."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from .ecg_formats_arrays import MAT_ARRAYS, MAT_FIELDS, mat_record
from .ecg_formats_common import (
    MAX_SAMPLES,
    NOTHING_GIVEN,
    STANDARD_LEADS,
    Given,
    agreed_lead_names,
    library,
    listed,
    stated,
    unit_of,
)

CODE_RATE = 400.0  # hertz; of all sets of the study (Ribeiro et al. 2020, doi 10.1038/s41467-020-15432-4)
_MAX_RECORDS = 2**20
_MAX_ITEM_BYTES = 64  # of a number, or of a name
_MAX_TEXT = 1000  # letters of a text of MATLAB
# deflate, shuffle, checksum, LZF: any other filter may be a library that HDF5 would load
_FILTERS = {1, 2, 3, 32000}


def is_hdf5(content: bytes) -> bool:
    """Whether the content is HDF5, or MATLAB's 7.3, which puts a text of its own before it."""
    return content.startswith((b"\x89HDF\r\n", b"MATLAB 7.3"))


@contextmanager
def _tracings(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open file, and in it `tracings` [records, samples, 12], not read yet."""
    with library("h5py").File(path, "r") as file:
        if "tracings" not in file:
            raise ValueError(
                f"it holds {listed(file)}; expected exam_id [records] and tracings [records, samples, 12]."
            )
        tracings = _own_data(file, "tracings", "f")
        if tracings.ndim != 3 or tracings.shape[2] != len(STANDARD_LEADS):
            raise ValueError(f"its tracings have the shape {list(tracings.shape)}; expected [records, samples, 12].")
        num_records, *size = tracings.shape
        if num_records > _MAX_RECORDS or np.prod(size, dtype=object) > MAX_SAMPLES:
            raise ValueError(f"it claims {num_records} records of {size} numbers; more than any file of its kind has.")
        yield file, tracings


# not the open files: h5py could not write to them meanwhile, and opening one takes a tenth of the time of a record
@lru_cache(maxsize=32)  # CODE-15% has 18 files, whose records may be read in any order; each takes a MB
def _names_of(path: Path, size: int, changed: int) -> tuple[np.ndarray, np.ndarray]:
    """The name of each record as bytes, its `exam_id` or else its number from 0; and the order that sorts them.

    Args:
        size, changed: those of the file now, so that it is read anew after a change.
    """
    with _tracings(path) as (file, tracings):
        num_records = len(tracings)
        names = np.arange(num_records)
        if "exam_id" in file:
            ids = _own_data(file, "exam_id", "iuS")
            if ids.shape != (num_records,):
                raise ValueError(f"it holds {list(ids.shape)} exam_id for {num_records} tracings.")
            names = ids[:]
    names = names.astype("S")
    return names, np.argsort(names, kind="stable")


def _names(path: Path) -> tuple[np.ndarray, np.ndarray]:
    state = path.stat()
    return _names_of(path.absolute(), state.st_size, state.st_mtime_ns)


def _own_data(file: Any, name: str, kinds: str) -> Any:
    """A dataset whose numbers are in the file itself, without a filter that would have to be loaded."""
    h5py = library("h5py")
    data = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
    if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
        raise ValueError(f"its {name} is no dataset of its own; what other files hold is not read.")
    if data.dtype.kind not in kinds or data.dtype.itemsize > _MAX_ITEM_BYTES:
        raise ValueError(f"its {name} holds {data.dtype}; expected numbers.")
    settings = data.id.get_create_plist()
    filters = {settings.get_filter(index)[0] for index in range(settings.get_nfilters())}
    if not filters <= _FILTERS:
        raise ValueError(f"its {name} is packed by the HDF5 filters {sorted(filters)}; only deflate and LZF are read.")
    if data.chunks is not None and np.prod(data.chunks, dtype=object) > MAX_SAMPLES:  # a chunk is unpacked as a whole
        raise ValueError(f"its {name} has chunks of {list(data.chunks)} numbers; at most {MAX_SAMPLES} are unpacked.")
    return data


def hdf5_records(path: Path) -> list[str]:
    """The names of the records of a file, by which `read_hdf5` reads them; CODE-15% fills its last row with the exam_id 0."""
    try:
        names = _names(path)[0].astype(str)
        return names[: -1 if len(names) > 1 and names[-1] == "0" else None].tolist()
    except ImportError:
        raise
    except Exception as error:  # of a damaged file h5py raises all sorts of things
        raise ValueError(f"Cannot read {path} as HDF5: {error}") from error


def read_hdf5(path: Path, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """One record of a file of CODE-15% or of the test set of CODE: at 400 Hz, the standard leads, as stored; or MATLAB 7.3.

    The amplitude of CODE is taken for millivolts, as that of any floats, where the caller gives no unit: the data set does not
    say it. Records that are shorter than the array have zeros at both ends, which stay; `padding_seconds` of the metadata says
    how long.
    """
    with path.open("rb") as file:
        if file.read(10) == b"MATLAB 7.3":
            return _read_mat_73(path, given)
    names, rows = _names(path)
    if given.record is not None:
        ends = [np.searchsorted(names, given.record.encode(), side, sorter=rows) for side in ("left", "right")]
        rows = rows[slice(*ends)]
    if len(rows) != 1:
        whose = "without a choice" if given.record is None else f"of the name {given.record!r}"
        example = names[0].decode() if len(names) else "ID"
        raise ValueError(
            f"it holds {len(rows)} records {whose}; name one of {listed(names.astype(str))}: {path.name}#{example}."
        )
    row = int(rows[0])
    with _tracings(path) as (_, tracings):
        array = tracings[row].T
    present = np.flatnonzero(array.any(axis=0))
    first, last = (present[0], present[-1] + 1) if len(present) else (0, array.shape[1])
    padding = [float(first) / CODE_RATE, float(array.shape[1] - last) / CODE_RATE]
    return {
        "array": array,
        "sampling_rate": CODE_RATE,
        "lead_names": list(agreed_lead_names(STANDARD_LEADS, given.lead_names) or ()),
        "unit": unit_of(None, given),
        "metadata": {
            "format": "HDF5, CODE",
            **stated(record=names[row].decode(), padding_seconds=padding if any(padding) else None),
        },
    }


def _read_mat_73(path: Path, given: Given) -> dict[str, Any]:
    """A file of MATLAB's -v7.3: HDF5 with the dimensions in reverse, and a struct as a group."""
    if given.record is not None:
        raise ValueError(f"it holds one record; leave out #{given.record}, which names one of a HDF5 file of several.")
    h5py = library("h5py")
    with h5py.File(path, "r") as file:
        variables: dict[str, Any] = dict.fromkeys(islice(file, 10))
        variables |= {name: _mat_value(file, name) for name in MAT_ARRAYS if name in file}
        if isinstance(file.get("ECG", getlink=True), h5py.HardLink) and isinstance(file["ECG"], h5py.Group):
            variables["ECG"] = {name: _mat_value(file["ECG"], name) for name in MAT_FIELDS if name in file["ECG"]}
    return mat_record(variables, given)


def _mat_value(group: Any, name: str) -> Any:
    """An array, or a text."""
    data = _own_data(group, name, "fiu")
    is_text = data.attrs.get("MATLAB_class") == b"char"
    if data.size > (_MAX_TEXT if is_text else MAX_SAMPLES):
        raise ValueError(f"its {name} claims {data.size} numbers; more than that of any ECG has.")
    array = data[()].T
    return array.astype("<u2").tobytes("F").decode("utf-16-le") if is_text else array
