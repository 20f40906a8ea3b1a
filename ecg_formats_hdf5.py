"""ECG files in HDF5, many records in one: CODE-15% and the other sets of the CODE study."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

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
# deflate, shuffle, checksum, LZF: any other filter may be a library that HDF5 would load
_FILTERS = {1, 2, 3, 32000}


def is_hdf5(content: bytes) -> bool:
    """Whether the content is HDF5, or MATLAB's 7.3, which puts a text of its own before it."""
    return content.startswith((b"\x89HDF\r\n", b"MATLAB 7.3"))


@contextmanager
def _datasets(path: Path) -> Iterator[tuple[Any, np.ndarray]]:
    """`tracings` [records, samples, 12], not read yet, and the name of each record: its `exam_id`, else its number from 0."""
    with path.open("rb") as file:
        if file.read(10) == b"MATLAB 7.3":
            raise ValueError("it is HDF5, as MATLAB writes with -v7.3; save it with -v7, or its array as .npz.")
    h5py = library("h5py")
    with h5py.File(path, "r") as file:
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
        names = np.arange(num_records)
        if "exam_id" in file:
            ids = _own_data(file, "exam_id", "iuS")
            if ids.shape != (num_records,):
                raise ValueError(f"it holds {list(ids.shape)} exam_id for {num_records} tracings.")
            names = ids[:]
        yield tracings, names.astype(str)


def _own_data(file: Any, name: str, kinds: str) -> Any:
    """A dataset whose numbers are in the file itself, without a filter that would have to be loaded."""
    h5py = library("h5py")
    link, data = file.get(name, getlink=True), file[name]
    if not isinstance(link, h5py.HardLink) or not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
        raise ValueError(f"its {name} is no dataset of its own; what other files hold is not read.")
    if data.dtype.kind not in kinds:
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
        with _datasets(path) as (_, names):
            return names[: -1 if len(names) > 1 and names[-1] == "0" else None].tolist()
    except ImportError:
        raise
    except Exception as error:  # of a damaged file h5py raises all sorts of things
        raise ValueError(f"Cannot read {path} as HDF5: {error}") from error


def read_hdf5(path: Path, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """One record of a file of CODE-15% or of the test set of CODE: at 400 Hz, the standard leads, as stored.

    Its amplitude is taken for millivolts, as that of any floats, where the caller gives no unit: the data set does not say it.
    Records that are shorter than the array have zeros at both ends, which stay; `padding_seconds` of the metadata says how long.
    """
    with _datasets(path) as (tracings, names):
        (rows,) = np.nonzero(names == given.record) if given.record is not None else (np.arange(len(names)),)
        if len(rows) != 1:
            whose = "without a choice" if given.record is None else f"of the name {given.record!r}"
            raise ValueError(
                f"it holds {len(rows)} records {whose}; name one of {listed(names)}: {path.name}#{names[0] if len(names) else 'ID'}."
            )
        array = tracings[rows[0]].T
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
            **stated(record=str(names[rows[0]]), padding_seconds=padding if any(padding) else None),
        },
    }
