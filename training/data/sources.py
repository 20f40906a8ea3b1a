"""What datasets are built from: records in folders and archives, questions about them, tables about them."""

import ast
import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from elm_ecg.ecg_formats_arrays import FACTS, as_fact
from elm_ecg.ecg_formats_common import listed
from elm_ecg.ecg_formats_hdf5 import hdf5_records
from elm_ecg.training.data.arguments import METADATA_COLUMNS
from elm_ecg.training.data.downloads import DOWNLOADS, find_root
from elm_ecg.training.data.reference import ROLE_NAMES, to_messages
from elm_ecg.training.data.schema import SPLITS, as_list
from elm_ecg.training.data.tables import (
    CHAT_COLUMNS,
    QUESTION_COLUMNS,
    RECORD_COLUMNS,
    TEXT_TABLES,
    demand,
    identifier,
    read_table,
    renamed,
)

# as the questions' files and folders spell them
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
HDF5_SUFFIXES = (".hdf5", ".h5")  # files of many records
PTBXL_TABLE = "ptbxl_database.csv"
# superclass of PTB-XL's SCP-ECG statements -> what is asked
SUPERCLASSES = {
    "NORM": "Is this a normal ECG?",
    "MI": "Does this ECG show myocardial infarction?",
    "STTC": "Does this ECG show ST or T wave changes?",
    "CD": "Does this ECG show a conduction disturbance?",
    "HYP": "Does this ECG show hypertrophy?",
}


@dataclass(frozen=True)
class QuestionRow:
    """A chat about one record or several, from which the rows of a dataset are built."""

    records: tuple[str, ...]  # their names in the questions' file; after `choose_questions` their ids
    messages: list[dict[str, str]]
    split: str | None = None
    patients: tuple[str | None, ...] = (None,)  # of each record, None where unknown
    columns: Mapping[str, Any] = field(default_factory=dict)  # further ones of the file


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


def read_questions(
    source: str | Path | Iterable[Any], sort_answers: bool = False, names: Mapping[str, str] | None = None
) -> Iterator[QuestionRow]:
    """The questions of a file, of all CSV, JSON and JSON Lines files of a folder, or of a list of rows (dicts) and paths.

    A row names the record, or a list of them, in one of `RECORD_COLUMNS`; has a `question` and an `answer`, of which a list
    is joined with "; ", or a chat in `messages` (turns of `role` and `content`) or `conversation` (of `from` and `value`);
    and may have `patient_id` and `split`. The split may also be the name of the file, or of the folder inside the path that
    it is in. The files of ECG-QA have this form (Oh et al. 2023, https://arxiv.org/abs/2306.15681).

    Args:
        sort_answers: sort the items of an answer that is a list. ECG-QA has them in any order, for equal questions too.
        names: our name of a column -> its name in the source, where it is another.

    Raises:
        ValueError: a row lacks its record or a text, or has another split.
    """
    for where, row, split in _question_rows(source, names or {}):
        try:
            yield _question(row, split, sort_answers)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _question_rows(
    source: str | Path | Iterable[Any], names: Mapping[str, str]
) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Where each row stands, the row, and the split that the name of its file or folder says."""
    if not isinstance(source, str | Path):
        for number, part in enumerate(source, 1):
            if isinstance(part, Mapping):
                demand(names.values(), part, f"Question {number}")
                yield f"Question {number}", renamed(part, names), None
            else:
                yield from _question_rows(part, names)
        return
    path = Path(source)
    suffixes = (*TEXT_TABLES, ".json", ".jsonl")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    if not files or not files[0].is_file():
        raise ValueError(f"No questions at {path}: expected a file ({', '.join(suffixes)}), or a folder of these.")
    for file in files:
        stems = (file.stem, file.relative_to(path).parent.name)  # folders above `path` say nothing about the split
        split = next((name for name in stems if name.lower() in SPLIT_NAMES), None)
        for number, row in enumerate(read_table(file, names=names), 1):
            yield f"{file}, row {number}", row, split


def _question(row: Mapping[str, Any], split: str | None, sort_answers: bool) -> QuestionRow:
    record = next((row[name] for name in RECORD_COLUMNS if row.get(name) is not None), None)
    if record is None:
        raise ValueError(
            f"It has the columns {', '.join(row)}; expected its record in one of {', '.join(RECORD_COLUMNS)}. --columns record=NAME "
            "says that it is in another."
        )
    records, patients = _listed(record), _listed(row.get("patient_id"))
    if len(patients) not in (1, len(records)):  # one patient may stand for all of its records
        raise ValueError(f"It has {len(patients)} patients and {len(records)} records; expected a patient for each.")
    split = row.get("split") or split
    if split is not None and str(split).lower() not in SPLIT_NAMES:
        raise ValueError(f"Its split is {split!r}; expected {', '.join(SPLITS)}.")
    patient_ids = tuple(None if patient is None else identifier(patient) for patient in patients)
    return QuestionRow(
        records=tuple(map(identifier, records)),
        messages=_messages(row, sort_answers),
        split=None if split is None else SPLIT_NAMES[str(split).lower()],
        patients=patient_ids if len(patient_ids) == len(records) else patient_ids * len(records),  # one for all
        columns={name: value for name, value in row.items() if name not in QUESTION_COLUMNS},
    )


def _listed(cell: Any) -> list[Any]:
    """A value as a list; in CSV, lists are written as JSON."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = json.loads(cell)
        except RecursionError as error:
            raise ValueError(f"a cell that begins with {cell[:20]!r} is nested too deeply") from error
    return as_list(cell) or [cell]


def _messages(row: Mapping[str, Any], sort_answers: bool = False) -> list[dict[str, str]]:
    column = next((name for name in CHAT_COLUMNS if row.get(name) is not None), None)
    turns: list[Any]
    if column == "messages":
        turns = _listed(row[column])
    elif column is not None:
        turns = to_messages(json.dumps(_listed(row[column])))[0]  # in the reference's own form
    else:
        if missing := [name for name in ("question", "answer") if name not in row]:
            raise ValueError(
                f"It has the columns {', '.join(row)}, but no {' and no '.join(missing)}. --columns {missing[0]}=NAME says which of "
                "them that is."
            )
        answer = row["answer"]
        if isinstance(answer, list):
            items = list(map(str, answer))
            answer = "; ".join(sorted(items) if sort_answers else items)
        turns = [{"role": "user", "content": row.get("question")}, {"role": "assistant", "content": answer}]
    roles = []
    for turn in turns:
        if not isinstance(turn, dict) or str(turn.get("role")).lower() not in ROLE_NAMES:
            raise ValueError(f"{turn!r} is no turn; expected a role ({', '.join(ROLE_NAMES)}) and its content.")
        roles.append(ROLE_NAMES[turn["role"].lower()])
        content = turn.get("content")  # numbers may be answers, JSON's true and false not
        if isinstance(content, bool) or not isinstance(content, str | int | float) or not str(content).strip():
            raise ValueError(f"What the {turn['role']} says is {content!r}; expected a text.")
    if not {"user", "assistant"} <= {*roles}:
        raise ValueError("Its messages lack a question or an answer; expected turns of user and assistant.")
    return [{"role": role, "content": str(turn["content"]).strip()} for role, turn in zip(roles, turns, strict=True)]


def superclass_questions(folder: Path) -> tuple[list[QuestionRow], int]:
    """Yes/no questions about the five diagnostic superclasses of PTB-XL's records, and how many records have none of these.

    A record is of a superclass if its `scp_codes` name a diagnostic statement of it, however likely: a likelihood of 0 means
    that it is unknown, and PTB-XL's benchmark counts them all (Strodthoff et al. 2020, https://arxiv.org/abs/2004.13701).
    Records of no superclass are left out: nobody has judged them, so "no" to all five might be wrong.

    Raises:
        ValueError: a table lacks a column, or `scp_codes` are no dict.
    """
    # the column of the codes has an empty name
    statements = read_table(folder / "scp_statements.csv", ("", "diagnostic", "diagnostic_class"))
    classes = {row[""]: row["diagnostic_class"] for row in statements if row["diagnostic"]}  # not of form or rhythm
    questions, without = [], 0
    for row in read_table(folder / PTBXL_TABLE, ("ecg_id", "scp_codes")):
        try:
            codes = dict(ast.literal_eval(row["scp_codes"]))  # written by Python with single quotes, so no JSON
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"The scp_codes of ecg_id {row['ecg_id']} are {row['scp_codes']!r}; expected a dict."
            ) from error
        superclasses = {classes[code] for code in codes if code in classes}
        without += not superclasses
        for superclass, question in SUPERCLASSES.items() if superclasses else ():
            turns = _messages({"question": question, "answer": "yes" if superclass in superclasses else "no"})
            questions.append(QuestionRow((identifier(row["ecg_id"]),), turns, columns={"question_type": superclass}))
    return questions, without


def read_metadata(
    table: str | Path | Iterable[Mapping[str, Any]], records: Records, columns: Iterable[str] = ()
) -> dict[str, dict[str, Any]]:
    """Id of a record -> its row of a table: those of `METADATA_COLUMNS` that it has, and `columns`.

    Args:
        table: a file as of `read_table`, or its rows.

    Raises:
        ValueError: the table has no column of `RECORD_COLUMNS`, lacks one of `columns`, or contradicts itself.
    """
    if isinstance(table, str | Path):
        where, rows = str(table), read_table(Path(table))
    else:
        where, rows = "The metadata", [dict(row) for row in table]
    first = rows[0] if rows else {}
    key = next((name for name in RECORD_COLUMNS if name in first), None)
    if key is None:
        raise ValueError(f"{where} has the columns {', '.join(first)}; expected one of {', '.join(RECORD_COLUMNS)}.")
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
    return metadata
