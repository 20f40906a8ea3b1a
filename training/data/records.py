"""Reads what datasets store once: a record of `records/*.parquet`, by the name that rows have for it.

Of a dataset that is loaded as a whole, `datasets` keeps the records as Arrow files, of which only what is read is in memory. Of one
that is streamed they are read by row groups, here or on the Hub: rows that follow each other are about records that do.
"""

import hashlib
import os
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from elm_ecg.training.data.paths import LazyECG
from elm_ecg.training.data.schema import ECG, RECORDS, STORED

# of the row groups of a stream, in each process: enough that a buffer of shuffled rows does not read one again and again
HELD_BYTES = 256 * 2**20
MEMBERS = [member.name for member in ECG]


def keep(folder: str) -> None:
    """Makes Arrow files of a dataset's records, unless `datasets` has made them before; shows how far it is.

    Args:
        folder: of the dataset, on this machine.
    """
    _builder(folder).download_and_prepare()


def forget() -> None:
    """Lets go of all that was read."""
    _kept.cache_clear()
    _places.cache_clear()
    _held.clear()


def read(path: str) -> dict[str, Any]:
    """A stored record: `array` [leads, samples], `sampling_rate`, `lead_names` and `unit`.

    Args:
        path: `FOLDER/records/FILE.parquet#ID`; the folder may be an address that `fsspec` reads, such as of the Hub.

    Raises:
        ValueError: there is no such record.
        OSError: the file cannot be read.
    """
    match = STORED.search(path)
    assert match is not None  # else `is_stored` was not asked
    folder, file, record = path[: match.start()], match["file"], match["id"]
    if (kept := _kept(folder)) is not None:
        table, rows = kept
        if (row := rows.get(record)) is not None:
            return _as_ecg(table.fast_slice(row, 1))
    elif (place := _places(folder + file, os.getpid())[1].get(record)) is not None:
        group, row = place
        return _as_ecg(_row_group(folder + file, group).slice(row, 1))
    raise ValueError(
        f"{folder}{file} has no record {record!r}, which a row of the dataset names; it is damaged, or not whole."
    )


class StoredECG(LazyECG):
    """A record that is stored once; `location` is the path that `read` takes."""

    def read(self) -> dict[str, Any]:
        """The record."""
        return read(self.location)


def is_stored(ecg: Any) -> bool:
    """Whether an ECG is the name of a stored record."""
    return isinstance(ecg, str) and STORED.search(ecg) is not None


def _as_ecg(row: pa.Table) -> dict[str, Any]:
    """The only row of a table; its samples stay where they are."""
    about = {name: row[name][0].as_py() for name in MEMBERS[1:]}
    samples, num_leads = row["array"][0].values, len(about["lead_names"])
    if pa.types.is_nested(samples.type):  # a list for each lead, as datasets were written before
        num_leads, samples = len(samples), samples.flatten()
    if not num_leads or len(samples) % num_leads:
        raise ValueError(
            f"A stored record has {len(samples)} amplitudes for {num_leads} leads ({about['lead_names']})."
        )
    return {"array": samples.to_numpy().reshape(num_leads, -1), **about}


def _builder(folder: str) -> Any:
    place = Path(folder) / RECORDS
    files = sorted(str(file) for file in place.glob("*.parquet"))
    return datasets.load_dataset_builder("parquet", data_files={RECORDS: files}, cache_dir=cache_of(place))


def cache_of(path: Path) -> str:
    """A cache for these files and no others: `datasets` tells folders whose cards have `configs` apart only by name, and would give the
    rows of another folder of that name, or of one that has changed."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    stats = [(str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    digest = hashlib.sha256(repr(stats).encode()).hexdigest()[:32]  # no contents, which would take long to read
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "local" / digest)


@lru_cache
def _kept(folder: str) -> tuple[Any, dict[str, int]] | None:
    """The records of a dataset as one table in files, with the row of each; None where `keep` has not made them."""
    if "://" in folder or not Path(folder).is_dir():
        return None
    builder = _builder(folder)
    if not (Path(builder.cache_dir) / datasets.config.DATASET_INFO_FILENAME).is_file():
        return None
    table = builder.as_dataset(split=RECORDS).data
    return table, {record: row for row, record in enumerate(table.column("id").to_pylist())}


@lru_cache(maxsize=64)
def _places(path: str, process: int) -> tuple[pq.ParquetFile, dict[str, tuple[int, int]]]:
    """A file of records, and the row group and row of each. A forked process opens it anew: the place where a file is read is shared."""
    file = pq.ParquetFile(fsspec.open(path).open()) if "://" in path else pq.ParquetFile(path, memory_map=True)
    places: dict[str, tuple[int, int]] = {}
    for group in range(file.num_row_groups):
        ids = file.read_row_group(group, ["id"])["id"].to_pylist()
        places |= {record: (group, row) for row, record in enumerate(ids)}
    return file, places


_held: OrderedDict[tuple[str, int], pa.Table] = OrderedDict()  # those that were read last


def _row_group(path: str, group: int) -> pa.Table:
    if (path, group) not in _held:
        file, _ = _places(path, os.getpid())
        _held[path, group] = file.read_row_group(group, MEMBERS).combine_chunks()
        while len(_held) > 1 and sum(table.nbytes for table in _held.values()) > HELD_BYTES:
            _held.popitem(last=False)
    _held.move_to_end((path, group))
    return _held[path, group]
