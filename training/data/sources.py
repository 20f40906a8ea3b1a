"""What datasets are built from: records in folders and archives, and tables about them."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from elm_ecg.ecg_formats_arrays import FACTS, as_fact
from elm_ecg.ecg_formats_common import listed
from elm_ecg.ecg_formats_hdf5 import hdf5_records
from elm_ecg.training.data.arguments import METADATA_COLUMNS
from elm_ecg.training.data.downloads import DOWNLOADS, find_root
from elm_ecg.training.data.tables import RECORD_COLUMNS, demand, identifier, read_table

HDF5_SUFFIXES = (".hdf5", ".h5")  # files of many records
PTBXL_TABLE = "ptbxl_database.csv"


class Records:
    """The records of a folder, an archive or a mapping, by their ids. Files are not read before they are needed.

    Args:
        locations: id -> what `as_record` reads: a file, or an ECG in memory.
        names: other names of a record -> the ids that it may mean.
        folder: that may stand in front of a name, as a path or by its own name.
        about: id -> what the source of the records says of it, as of `Listing`; of other records nothing is known.
        alias: tells from another name of a record its id; None where it cannot.
    """

    def __init__(
        self,
        locations: Mapping[str, Any],
        names: Mapping[str, set[str]] | None = None,
        folder: Path | None = None,
        about: Mapping[str, Mapping[str, Any]] | None = None,
        alias: Callable[[str], str | None] = str,
    ) -> None:
        self.locations = locations
        self.names = names or {}
        self.folder = folder
        self.about = about or {}
        self.alias = alias
        paths = (folder, folder.absolute(), folder.resolve(), Path(folder.absolute().name)) if folder else ()
        self.fronts = [f"{path.as_posix()}/" for path in paths]

    def find(self, name: str) -> str | None:
        """The id of a record; None where there is none of that name.

        Raises:
            ValueError: several records have that name.
        """
        name = name.removeprefix("./")
        inside = [name.removeprefix(front) for front in self.fronts if name.startswith(front)]
        for candidate in (name, *inside):
            if candidate in self.locations:
                return candidate
            ids = sorted(self.names.get(candidate, ()))
            if len(ids) > 1:
                raise ValueError(
                    f"{name!r} is the name of {len(ids)} records: {', '.join(ids[:3])}. Name one of these."
                )
            if ids:
                return ids[0]
        record = self.alias(name)
        return record if record in self.locations else None


def read_source(source: str, folder: str | Path, resample: float | None = None) -> Records:
    """The records of a public set, with what its tables and headers say of them; its root is the folder, or one below it.

    Args:
        source: one of `DOWNLOADS`.
        resample: the sampling rate that is wanted; of PTB-XL the files of 100 Hz are taken for 100, else those of 500 Hz.

    Raises:
        ValueError: the folder holds no such set, none of its records, or a table that is damaged.
    """
    download = DOWNLOADS[source]
    root = find_root(source, Path(folder))
    listing = download.listing(root, resample)
    if not listing.locations:
        raise ValueError(
            f"{download.title} in {root} has no records: its tables are empty, or none of its files is there."
        )
    return Records(listing.locations, folder=root, about=listing.about, alias=download.record_of)


def find_records(source: str | Path | Mapping[Any, Any], resample: float | None = None) -> Records:
    """The records of a path or a mapping.

    - A mapping: id -> record, in any form that `as_record` takes: an `ECGRecord`, an array, a dict, the path of a file.
    - A folder: each file is a record, whose id is its path in the folder without suffix. Where several differ in their
      suffix alone, a WFDB header stands for them, else the suffix is part of the id. Other names of a record are its path
      with suffix and its file's name, with or without suffix and leading zeros, where only one has that name. The folder
      may stand in front of them.
    - A folder with `ptbxl_database.csv`, by `ecg_id`: its files of 100 Hz if that is `resample`, else those of 500 Hz.
    - An `.npz` archive, which is held in memory: `ecg` [records, leads, samples] and an array of as many ids, and if there
      `sampling_rate`, `lead_names` and `unit`; or one array [leads, samples] for each record.
    - HDF5 files as of CODE-15%, `.hdf5` or `.h5`: a record for each `exam_id`, which is its name; in a folder its id is `FILE#EXAM_ID`.
    - Any other file: one record.

    Raises:
        ValueError: there are no records, two have one id, or an archive has another layout.
    """
    if isinstance(source, Mapping):
        if not source:
            raise ValueError("The mapping of records is empty; expected id -> record.")
        return Records(_by_id(source, source.values(), "The mapping"))
    path = Path(source)
    if path.is_file():
        if path.suffix.lower() in HDF5_SUFFIXES:
            names = hdf5_records(path)
            return Records(_by_id(names, [Path(f"{path}#{name}") for name in names], str(path)))
        archive = _archive(path) if path.suffix.lower() == ".npz" else None
        return Records(archive or {path.stem: path})  # None: a single record, read when it is needed
    if not path.is_dir():
        raise ValueError(f"No records at {path}: expected a folder of ECG files, or an .npz archive.")
    if (path / PTBXL_TABLE).is_file():
        column = "filename_lr" if resample == 100 else "filename_hr"  # PTB-XL's low and high rate, 100 and 500 Hz
        rows = read_table(path / PTBXL_TABLE, {"ecg_id", column})
        locations = {identifier(row["ecg_id"]): path / f"{row[column]}.hea" for row in rows}  # names have no suffix
        return Records(locations, folder=path, alias=DOWNLOADS["ptb-xl"].record_of)
    return _folder(path)


def _by_id(names: Collection[Any], ecgs: Iterable[Any], where: str) -> dict[str, Any]:
    records = {identifier(name): ecg for name, ecg in zip(names, ecgs, strict=True)}
    if len(records) < len(names):
        raise ValueError(
            f"{where} holds {len(names)} records, but {len(records)} different ids; expected one for each."
        )
    return records


def _folder(folder: Path) -> Records:
    files = defaultdict(list)
    for file in sorted(folder.rglob("*")):  # sorted, as the order of the disk differs by machine
        inside = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            files[inside.with_suffix("").as_posix()].append(inside)
    locations, names = {}, defaultdict(set)
    for stem, of_stem in files.items():
        records = [file for file in of_stem if file.suffix == ".hea"] or of_stem
        for file in records:
            record = stem if len(records) == 1 else file.as_posix()
            if file.suffix.lower() in HDF5_SUFFIXES:
                for name in hdf5_records(folder / file):
                    locations[f"{record}#{name}"] = folder / f"{file}#{name}"
                    names[name].add(f"{record}#{name}")
                continue
            locations[record] = folder / file
            of_record = of_stem if len(records) == 1 else [file]  # the signal files of a header too
            for name in (
                stem,
                file.stem,
                file.stem.lstrip("0"),
                *map(Path.as_posix, of_record),
                *(f.name for f in of_record),
            ):
                names[name].add(record)  # tables say 17 for 00017
    if not locations:
        raise ValueError(f"The folder {folder} holds no files; expected those of ECGs.")
    return Records(locations, names, folder)


def _archive(path: Path) -> dict[str, Any] | None:
    """The ECGs of an archive; None if it holds a single record."""
    try:
        with np.load(path, allow_pickle=False) as content:  # pickles can run code
            arrays = {name: content[name] for name in content.files}
        if others := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
            raise ValueError(f"{listed(others)} is no array")
        shared = {name: as_fact(name, arrays.pop(name)) for name in FACTS if name in arrays}
    except Exception as error:  # of damaged archives zipfile and NumPy raise all sorts of things
        raise ValueError(
            f"Cannot read {path}: it is damaged or holds pickled objects, which are not read ({error})."
        ) from error
    ecgs = next((arrays[name] for name in ("ecg", "array") if name in arrays), None)
    if ecgs is None:
        return {name: {"array": array, **shared} for name, array in arrays.items()}
    if ecgs.ndim == 2:  # [leads, samples]
        return None
    ids = [array.tolist() for array in arrays.values() if array.ndim == 1 and len(array) == len(ecgs)]
    if ecgs.ndim != 3 or len(ids) != 1:
        shapes = listed(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(
            f"{path} holds {shapes}; expected ecg [records, leads, samples] and one array of as many ids, or one array "
            "[leads, samples] for each record."
        )
    return _by_id(ids[0], [{"array": ecg, **shared} for ecg in ecgs], str(path))


def read_metadata(
    table: str | Path | Iterable[Mapping[str, Any]], records: Records, columns: Iterable[str] = ()
) -> dict[str, dict[str, Any]]:
    """Id of a record -> its row of a table: those of `METADATA_COLUMNS` that it has, and `columns`.

    Args:
        table: a file as of `read_table`, or its rows.

    Raises:
        ValueError: the table has no column of `RECORD_COLUMNS`, lacks one of `columns`, is about none of the
            records, or contradicts itself.
    """
    if isinstance(table, str | Path):
        where, rows = str(table), read_table(Path(table))
    else:
        where, rows = "The metadata", [dict(row) for row in table]
    first = rows[0] if rows else {}
    key = next((name for name in RECORD_COLUMNS if name in first), None)
    if key is None:
        raise ValueError(
            f"{where} has the columns {', '.join(first)}; expected one of {', '.join(RECORD_COLUMNS)}. --columns record=NAME says that "
            "the record is in another."
        )
    demand(columns, first, where)
    names = [name for name in (*METADATA_COLUMNS, *columns) if name in first]
    metadata: dict[str, dict[str, Any]] = {}
    for row in rows:
        record = records.find(identifier(row[key]))  # the table may have rows of records that are not there
        values = {name: row.get(name) for name in names}
        if record is not None and metadata.setdefault(record, values) != values:
            raise ValueError(
                f"{where} says {metadata[record]} and {values} of the record {record}; expected one row for each."
            )
    if not metadata:
        raise ValueError(
            f"{where} is about none of the {len(records.locations)} records: its column {key} names "
            f"{', '.join(identifier(row[key]) for row in rows[:3])}, and the records are {', '.join(list(records.locations)[:3])}..."
        )
    return metadata
