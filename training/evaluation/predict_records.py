"""What `elm predict` asks: which records, and which questions about each of them. Nothing is read before it is needed."""

import glob
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from elm_ecg.ecg_formats import record_path
from elm_ecg.ecg_formats_wfdb import signal_files
from elm_ecg.ecg_utils import ECGRecord, as_record
from elm_ecg.training.data import records as stored_records
from elm_ecg.training.data.loading import ecgs_of, load_data, notices_of
from elm_ecg.training.data.record_rows import load_records
from elm_ecg.training.data.schema import counted
from elm_ecg.training.data.sources import Records, find_records
from elm_ecg.training.data.tables import RECORD_COLUMNS, identifier, iter_table

if TYPE_CHECKING:
    from elm_ecg.training.arguments import DataArguments  # imports TRL, which takes seconds


@dataclass(frozen=True)
class Row:
    """A chat about the ECGs of a record, and which of its turns are asked for.

    Args:
        record: the name of the record, in what is written.
        number: of the record among all.
        messages: of the chat.
        turns: places among the messages; what stands there, and behind the last, is not shown.
    """

    record: str
    number: int
    messages: list[dict[str, Any]]
    turns: list[int]


@dataclass(frozen=True)
class ReadRecord:
    """The ECGs of a record and what is to be known about them; or `error`, why it cannot be read."""

    ecgs: list[ECGRecord]
    notices: list[str]
    error: str | None = None


@dataclass(frozen=True)
class Rows:
    """All that is asked, in the order in which it is written.

    Args:
        number: of rows.
        num_records: that they are about.
        row: its number -> the row.
        ecgs: the number of a record -> its ECGs.
        facts: by which the same rows are known again; what JSON can hold.
    """

    number: int
    num_records: int
    row: Callable[[int], Row]
    ecgs: Callable[[int], list[ECGRecord]]
    facts: Any


def read_record(rows: Rows, number: int, extractor: Any, known: dict[Any, list[str]]) -> ReadRecord:
    """A record as the model can take it.

    Args:
        extractor: the model's feature extractor.
        known: what preparing says of records of a shape, kept from record to record.
    """
    try:
        records = rows.ecgs(number)
        notices = [notice for record in records for notice in notices_of(record, extractor, known)]
    except (ValueError, OSError, ImportError) as error:
        return ReadRecord([], [], " ".join(str(error).split()))
    return ReadRecord(records, list(dict.fromkeys(notices)))


def read_questions(path: Path) -> list[tuple[str | None, str]]:
    """The questions of a file, each with the name of the record that it is about, None where it is about each record.

    Raises:
        ValueError: the file has no question, or a row lacks its question or its record.
    """
    if path.suffix.lower() == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        questions: list[tuple[str | None, str]] = [(None, line.strip()) for line in lines if line.strip()]
    else:
        questions = []
        for number, row in enumerate(iter_table(path, ["question"]), start=1):
            column = next((name for name in RECORD_COLUMNS if name in row), None)
            empty = [name for name in ("question", column) if name is not None and row[name] in (None, "")]
            if empty:
                raise ValueError(f"Row {number} of {path} has an empty {empty[0]}.")
            questions.append((None if column is None else identifier(row[column]), str(row["question"])))
    if not questions:
        raise ValueError(f"--questions {path} has no question.")
    return questions


def rows_of_files(
    sources: Iterable[str], questions: list[tuple[str | None, str]], described: Mapping[str, Any]
) -> Rows:
    """Questions about the records of files, folders, archives and patterns.

    Args:
        questions: as of `read_questions`.
        described: `sampling_rate`, `unit` and `lead_names`, where the files do not say.

    Raises:
        ValueError: there is no such file, or a question is about a record that is not there.
    """
    paths = [path for source in sources for path in _paths(source)]
    groups = [_records(path) for path in paths]
    ids = [(place, record) for place, group in enumerate(groups) for record in group.locations]
    locations = [location for group in groups for location in group.locations.values()]
    times = Counter(record for _, record in ids)
    # two files of one name are told apart by their paths
    names = [
        record if times[record] == 1 else str(location) for (_, record), location in zip(ids, locations, strict=True)
    ]
    numbers = {key: number for number, key in enumerate(ids)}

    def find(name: str) -> int | None:
        keys = ((place, group.find(name)) for place, group in enumerate(groups))
        found = [numbers[place, record] for place, record in keys if record is not None]
        if len(found) > 1:
            raise ValueError(f"--questions names {name!r}, which is the name of {len(found)} records; use their paths.")
        return found[0] if found else None

    def ecgs(number: int) -> list[ECGRecord]:
        return [as_record(locations[number], **described)]

    versions = [_version(path) for path in (*paths, *locations)]
    return _asked(names, questions, find, ecgs, [names, versions, dict(described)])


def rows_of_data(args: "DataArguments", split: str, questions: list[tuple[str | None, str]]) -> Rows:
    """Questions about the records of datasets; without questions, those of their own chats.

    Raises:
        ValueError: as `load_data`; no dataset has the split, or a question is about a record that is not there.
    """
    data = load_records(args, split) if questions else load_data(args, split)
    if data is None:
        raise ValueError(f"--data {' '.join(args.data)} has no split {split!r}.")
    has_ids = "record_id" in data.column_names
    names = [str(name) for name in data["record_id"]] if has_ids else [f"row {row}" for row in range(len(data))]
    folders = [Path(name).expanduser() for name in args.data]
    versions = [stored_records.cache_of(folder) if folder.is_dir() else None for folder in folders]
    facts = [args.data, versions, split, args.fold, args.ecg_root, len(data)]

    def ecgs(number: int) -> list[ECGRecord]:
        return [as_record(ecg) for ecg in ecgs_of(data[number])]

    if questions:
        places = {name: place for place, name in enumerate(names)}
        return _asked(names, questions, lambda name: places.get(name), ecgs, facts)
    chats = data.with_format(None).select_columns(["messages"])
    return Rows(len(data), len(data), lambda row: Row(names[row], row, *_own(chats, row)), ecgs, facts)


def _own(chats: Dataset, row: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The messages of a row, and where its answers stand, or would stand behind its last question."""
    messages = chats[row]["messages"] or []
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if messages and messages[-1]["role"] == "user":
        turns.append(len(messages))
    return messages, turns


def _asked(
    names: list[str],
    questions: list[tuple[str | None, str]],
    find: Callable[[str], int | None],
    ecgs: Callable[[int], list[ECGRecord]],
    facts: Any,
) -> Rows:
    """Each question about each record, record by record; or about the record that it names."""
    facts = [facts, questions]

    def row(record: int, question: str) -> Row:
        return Row(names[record], record, [{"role": "user", "content": question}], [1])

    if all(about is None for about, _ in questions):
        each = len(questions)
        return Rows(
            len(names) * each, len(names), lambda place: row(place // each, questions[place % each][1]), ecgs, facts
        )
    found: dict[str, int | None] = {}
    for about, _ in questions:
        if about is not None and about not in found:
            found[about] = find(about)
    missing = [about for about, place in found.items() if place is None]
    if missing:
        raise ValueError(
            f"--questions names {counted(len(missing), 'record')} that {'is' if len(missing) == 1 else 'are'} not among the "
            f"{len(names):,} given, such as {missing[0]!r}; these are {', '.join(names[:3])}..."
        )
    pairs = [(found[about], question) for about, question in questions if about is not None]
    return Rows(len(pairs), len(found), lambda place: row(*pairs[place]), ecgs, facts)  # type: ignore[arg-type]


def _paths(source: str) -> list[str]:
    """A file or folder as it is; of a pattern what it stands for, sorted."""
    header = Path(f"{source}.hea")  # of WFDB, whose records are named without suffix
    if header.is_file() and not Path(source).exists():
        return [str(header)]
    if record_path(source)[0].exists():
        return [source]
    if not glob.has_magic(source):
        raise ValueError(f"There is no file or folder {source}.")
    found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise ValueError(f"No file is named as {source!r} says.")
    return found


def _records(path: str) -> Records:
    """The records of a file or folder; a file that is no archive of records is one, and reading it says what is wrong."""
    try:
        return find_records(path)
    except ValueError:
        if not Path(path).is_file():
            raise
        return Records({Path(path).stem: Path(path)})


def _version(location: Any) -> Any:
    """What tells that a file has changed; nothing of an ECG in memory, whose archive tells."""
    if not isinstance(location, str | Path):
        return None
    path = record_path(location)[0].absolute()
    files = [path]
    if path.is_file():  # of WFDB a header says what the files of the signals hold
        header = path.with_suffix(".hea")
        files += [header, *signal_files(header)]
    return [_state(file) for file in dict.fromkeys(files)]


def _state(path: Path) -> list[Any]:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # reading says what is wrong; no name of a file holds a null byte
        return [str(path)]
    return [str(path), stat.st_size, stat.st_mtime_ns]
