"""What datasets are built from: records in folders and archives, questions about them, tables about them."""

import ast
import csv
import json
import re
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

from elm_ecg.training.data.reference import to_messages

SPLITS = ("train", "validation", "test")
# as the questions' files and folders spell them
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# columns of a record's name, and of a chat; the first that is there counts
RECORD_COLUMNS = ("record", "record_id", "ecg_id", "ecg_path", "path")
CHAT_COLUMNS = ("messages", "conversation", "conversations")
# those of a question's row that are no metadata
QUESTION_COLUMNS = {*RECORD_COLUMNS, *CHAT_COLUMNS, "question", "answer", "split", "patient_id", "ecg", "start_second"}
# taken from a table about the records if they are there
METADATA_COLUMNS = ("patient_id", "strat_fold", "age", "sex")
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
class Question:
    """A chat about one record or several.

    Args:
        records: their ids.
        split: None where it is not said.
        patients: of the records; None where unknown.
        columns: what else the file says.
    """

    records: tuple[str, ...]
    messages: list[dict[str, str]]
    split: str | None = None
    patients: tuple[str | None, ...] = (None,)
    columns: Mapping[str, Any] = field(default_factory=dict)


class Records:
    """The records of a folder or an archive, by their ids. Files are not read before they are needed.

    Args:
        locations: id -> what `as_record` reads: a file, or an ECG of an archive.
        names: other names of a record -> the ids that it may mean.
        folder: that may stand in front of a name, as a path or by its own name.
    """

    def __init__(
        self, locations: Mapping[str, Any], names: Mapping[str, set[str]] | None = None, folder: Path | None = None
    ) -> None:
        self.locations = locations
        self.names = names or {}
        paths = (folder, folder.absolute(), folder.resolve(), Path(folder.absolute().name)) if folder else ()
        self.fronts = [f"{path.as_posix()}/" for path in paths]

    def find(self, name: str) -> str | None:
        """The id of a record; None where there is none of that name.

        Raises:
            ValueError: several records have that name.
        """
        name = name.removeprefix("./")
        inside = [name.removeprefix(front) for front in self.fronts if name.startswith(front)]
        for known in (name, *inside):
            if known in self.locations:
                return known
            ids = sorted(self.names.get(known, ()))
            if len(ids) > 1:
                raise ValueError(
                    f"{name!r} is the name of {len(ids)} records: {', '.join(ids[:3])}. Name one of these."
                )
            if ids:
                return ids[0]
        return None


def find_records(path: Path, sampling_rate: float | None = None) -> Records:
    """The records at `path`.

    - A folder: each file is a record, whose id is its path in the folder without suffix. Where several differ in their
      suffix alone, a WFDB header stands for them, else the suffix is part of the id. Other names of a record are its path
      with suffix and its file's name, with or without suffix and leading zeros, where only one has that name. The folder
      may stand in front of them.
    - A folder with `ptbxl_database.csv`, by `ecg_id`: its files of 100 Hz if that is `sampling_rate`, else those of 500 Hz.
    - An `.npz` archive, which is held in memory: `ecg` [records, leads, samples] and an array of as many ids, and if there
      `sampling_rate`, `lead_names` and `unit`; or one array [leads, samples] for each record.
    - Any other file: one record.

    Raises:
        ValueError: there is nothing at `path`, or an archive of another layout.
    """
    if path.is_file():
        archive = _archive(path) if path.suffix.lower() == ".npz" else None
        return Records(archive or {path.stem: path})
    if not path.is_dir():
        raise ValueError(f"No records at {path}: expected a folder of ECG files, or an .npz archive.")
    if (path / PTBXL_TABLE).is_file():
        column = "filename_lr" if sampling_rate == 100 else "filename_hr"
        rows = read_table(path / PTBXL_TABLE, {"ecg_id", column})
        return Records({identifier(row["ecg_id"]): path / f"{row[column]}.hea" for row in rows})
    return _folder(path)


def _folder(folder: Path) -> Records:
    files = defaultdict(list)
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            files[inside.with_suffix("").as_posix()].append(inside)
    locations, names = {}, defaultdict(set)
    for stem, alike in files.items():
        records = [file for file in alike if file.suffix == ".hea"] or alike
        for file in records:
            record = stem if len(records) == 1 else file.as_posix()
            locations[record] = folder / file
            for name in (file.as_posix(), stem, file.name, file.stem, file.stem.lstrip("0")):
                names[name].add(record)
    if not locations:
        raise ValueError(f"The folder {folder} holds no files; expected those of ECGs.")
    return Records(locations, names, folder)


def _archive(path: Path) -> dict[str, Any] | None:
    """The ECGs of an archive; None where it holds one alone."""
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Cannot read {path}: it is damaged or holds pickled objects, which are not read ({error})."
        ) from error
    said = {name: arrays.pop(name).tolist() for name in ("sampling_rate", "lead_names", "unit") if name in arrays}
    ecgs = next((arrays[name] for name in ("ecg", "array") if name in arrays), None)
    if ecgs is None:
        return {name: {"array": array, **said} for name, array in arrays.items()}
    if ecgs.ndim == 2:
        return None
    ids = [array.tolist() for array in arrays.values() if array.ndim == 1 and len(array) == len(ecgs)]
    if ecgs.ndim != 3 or len(ids) != 1:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(
            f"{path} holds {shapes}; expected ecg [records, leads, samples] and one array of as many ids, or one array "
            "[leads, samples] for each record."
        )
    records = {identifier(name): {"array": ecg, **said} for name, ecg in zip(ids[0], ecgs, strict=True)}
    if len(records) < len(ecgs):
        raise ValueError(f"{path} holds {len(ecgs)} records, but {len(records)} different ids; expected one for each.")
    return records


def identifier(value: Any) -> str:
    """An id as text; 17, 17.0 and "17.0" are one, as a table with gaps makes floats of integers."""
    return re.sub(r"^(\d+)\.0$", r"\1", str(value).strip())


def read_table(path: Path, columns: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, of a JSON list, or of JSON Lines. Empty cells of CSV are None.

    A column of CSV holds numbers where all of its cells are such, other than those of ids and texts. The columns that
    are known here may be spelt there in capitals too.

    Args:
        columns: that must be there.

    Raises:
        ValueError: the file is none of these, damaged, empty, has a column twice, or lacks one of `columns`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            rows = _read_csv(text)
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"Cannot read {path}: {error}. Expected .csv with a header, or JSON or JSON Lines.") from error
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{path} has no rows, or others than objects; expected .csv with a header, or JSON or JSON Lines."
        )
    _demand(columns, rows[0], path)
    return rows


def _demand(columns: Iterable[str], row: Mapping[str, Any], path: Path) -> None:
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(row)}.")


def _read_csv(text: str) -> list[dict[str, Any]]:
    first = text.lstrip("\r\n").partition("\n")[0]
    if not first.strip():
        raise ValueError("it is empty")
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if separator in first and "," not in first:
            raise ValueError(f"its cells are separated by {name}, and commas are expected")
    header, *lines = [cells for cells in csv.reader(StringIO(text, newline=""), strict=True) if cells]
    known = {*QUESTION_COLUMNS, *METADATA_COLUMNS}
    header = [lower if (lower := name.strip().lower()) in known else name for name in header]
    if repeated := [name for name, count in Counter(header).items() if count > 1]:
        raise ValueError(f"its header says {', '.join(map(repr, repeated))} more than once")
    for number, cells in enumerate(lines, 1):
        if len(cells) != len(header):
            raise ValueError(f"row {number} has {len(cells)} cells, the header {len(header)}")
    columns: dict[str, list[Any]] = {}
    for name, *cells in zip(header, *lines, strict=True):
        texts = [cell.strip() or None for cell in cells]
        columns[name] = texts if name in QUESTION_COLUMNS else _numbers(texts)
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _numbers(cells: list[str | None]) -> list[Any]:
    for number, pattern in ((int, r"-?(0|[1-9]\d*)"), (float, r"-?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?")):
        if all(cell is None or re.fullmatch(pattern, cell) for cell in cells):
            return [None if cell is None else number(cell) for cell in cells]
    return cells


def read_questions(path: Path, sort_answers: bool = False) -> Iterator[Question]:
    """The questions of a file, or of all `.csv`, `.json` and `.jsonl` files of a folder.

    A row names the record, or a list of them, in one of `RECORD_COLUMNS`; has a `question` and an `answer`, of which a list
    is joined with "; ", or a chat in `messages` (turns of `role` and `content`) or `conversation` (of `from` and `value`);
    and may have `patient_id` and `split`. The split may also be the name of the file, or of the folder inside `path` that
    it is in. So are the files of ECG-QA (Oh et al. 2023, https://arxiv.org/abs/2306.15681).

    Args:
        sort_answers: sort the items of an answer that is a list. ECG-QA has them in any order, for equal questions too.

    Raises:
        ValueError: a row lacks its record or a text, or has another split.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in (".csv", ".json", ".jsonl"))
    if not files or not files[0].is_file():
        raise ValueError(f"No questions at {path}: expected a .csv, .json or .jsonl file, or a folder of these.")
    for file in files:
        names = (file.stem, file.relative_to(path).parent.name)  # where `path` itself lies says nothing
        split = next((name for name in names if name.lower() in SPLIT_NAMES), None)
        for number, row in enumerate(read_table(file), 1):
            try:
                yield _question(row, split, sort_answers)
            except ValueError as error:
                raise ValueError(f"{file}, row {number}: {error}") from error


def _question(row: Mapping[str, Any], split: str | None, sort_answers: bool) -> Question:
    record = next((row[name] for name in RECORD_COLUMNS if row.get(name) is not None), None)
    if record is None:
        raise ValueError(
            f"It has the columns {', '.join(row)}; expected its record in one of {', '.join(RECORD_COLUMNS)}."
        )
    records, patients = _listed(record), _listed(row.get("patient_id"))
    if len(patients) not in (1, len(records)):
        raise ValueError(f"It has {len(patients)} patients and {len(records)} records; expected a patient for each.")
    split = row.get("split") or split
    if split is not None and str(split).lower() not in SPLIT_NAMES:
        raise ValueError(f"Its split is {split!r}; expected {', '.join(SPLITS)}.")
    known = tuple(None if patient is None else identifier(patient) for patient in patients)
    return Question(
        records=tuple(map(identifier, records)),
        messages=_messages(row, sort_answers),
        split=None if split is None else SPLIT_NAMES[str(split).lower()],
        patients=known if len(known) == len(records) else known * len(records),
        columns={name: value for name, value in row.items() if name not in QUESTION_COLUMNS},
    )


def _listed(cell: Any) -> list[Any]:
    """A value as a list; in CSV, lists are written as JSON."""
    if isinstance(cell, str) and cell.startswith("["):
        cell = json.loads(cell)
    return cell if isinstance(cell, list) and cell else [cell]


def _messages(row: Mapping[str, Any], sort_answers: bool = False) -> list[dict[str, str]]:
    column = next((name for name in CHAT_COLUMNS if row.get(name) is not None), None)
    turns: list[Any]
    if column == "messages":
        turns = _listed(row[column])
    elif column is not None:
        turns = to_messages(json.dumps(_listed(row[column])))[0]
    else:
        answer = row.get("answer")
        if isinstance(answer, list):
            items = list(map(str, answer))
            answer = "; ".join(sorted(items) if sort_answers else items)
        turns = [{"role": "user", "content": row.get("question")}, {"role": "assistant", "content": answer}]
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"{turn!r} is no turn; expected a role (system, user or assistant) and its content.")
        content = turn.get("content")
        if isinstance(content, bool) or not isinstance(content, str | int | float) or not str(content).strip():
            raise ValueError(f"What the {turn['role']} says is {content!r}; expected a text.")
    if not {"user", "assistant"} <= {turn["role"] for turn in turns}:
        raise ValueError("Its messages lack a question or an answer; expected turns of user and assistant.")
    return [{"role": turn["role"], "content": str(turn["content"]).strip()} for turn in turns]


def superclass_questions(folder: Path) -> tuple[list[Question], int]:
    """Yes/no questions about the five diagnostic superclasses of PTB-XL's records, and how many records have none of these.

    A record is of a superclass if its `scp_codes` name a diagnostic statement of it, however likely: a likelihood of 0 means
    that it is unknown, and PTB-XL's benchmark counts them all (Strodthoff et al. 2020, https://arxiv.org/abs/2004.13701).
    Records of no superclass are left out, as "no" to all five would be said of what nobody has judged.

    Raises:
        ValueError: a table lacks a column, or `scp_codes` are no dict.
    """
    # the codes' column has no name
    statements = read_table(folder / "scp_statements.csv", ("", "diagnostic", "diagnostic_class"))
    classes = {row[""]: row["diagnostic_class"] for row in statements if row["diagnostic"]}
    questions, without = [], 0
    for row in read_table(folder / PTBXL_TABLE, ("ecg_id", "scp_codes")):
        try:
            codes = dict(ast.literal_eval(row["scp_codes"]))
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"The scp_codes of ecg_id {row['ecg_id']} are {row['scp_codes']!r}; expected a dict."
            ) from error
        found = {classes[code] for code in codes if code in classes}
        without += not found
        for superclass, question in SUPERCLASSES.items() if found else ():
            turns = _messages({"question": question, "answer": "yes" if superclass in found else "no"})
            questions.append(Question((identifier(row["ecg_id"]),), turns, columns={"question_type": superclass}))
    return questions, without


def read_metadata(path: Path, records: Records, columns: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Id of a record -> what a table says of it: those of `METADATA_COLUMNS` that it has, and `columns`.

    Raises:
        ValueError: the table has no column of `RECORD_COLUMNS`, lacks one of `columns`, or contradicts itself.
    """
    rows = read_table(path)
    key = next((name for name in RECORD_COLUMNS if name in rows[0]), None)
    if key is None:
        raise ValueError(f"{path} has the columns {', '.join(rows[0])}; expected one of {', '.join(RECORD_COLUMNS)}.")
    _demand(columns, rows[0], path)
    chosen = [name for name in (*METADATA_COLUMNS, *columns) if name in rows[0]]
    metadata: dict[str, dict[str, Any]] = {}
    for row in rows:
        record = records.find(identifier(row[key]))
        said = {name: row.get(name) for name in chosen}
        if record is not None and metadata.setdefault(record, said) != said:
            raise ValueError(
                f"{path} says {metadata[record]} and {said} of the record {record}; expected one row for each."
            )
    return metadata
