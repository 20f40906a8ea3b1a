"""Datasets made of records and questions about them: `build_dataset` in memory, and the rows that `elm data build` writes."""

import logging
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from elm_ecg.ecg_utils import ZERO_CROSSINGS, as_record, cut_windows, resample, window_starts
from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.data.arguments import KEPT_COLUMNS, METADATA_COLUMNS, BuildArguments, in_python
from elm_ecg.training.data.labels import label_questions, read_labels, superclass_questions
from elm_ecg.training.data.questions import QuestionRow, choose_questions, count_absent, read_questions
from elm_ecg.training.data.schema import ECG, MESSAGES, as_list, counted
from elm_ecg.training.data.sources import PTBXL_TABLE, Records, find_records, read_metadata
from elm_ecg.training.data.splits import Metadata, default_split, split_questions, with_patients, without_patients
from elm_ecg.training.data.tables import RECORD_COLUMNS, demand, table_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

# limits of a row group, which is what a reader of a stream holds in memory at once
ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 32 * 2**20


def build_dataset(
    records: str | Path | Mapping[Any, Any], questions: str | Path | Iterable[Any] | None = None, **options: Any
) -> "DatasetDict":
    """A dataset of chats about ECGs, in memory: what `elm data build` writes into files.

    Args:
        records: a folder of ECG files, an `.npz` archive, PTB-XL's own folder, or a mapping of id -> record in any form that
            `as_record` takes (an `ECGRecord`, an array [leads, samples], a dict, the path of a file).
        questions: a CSV, Excel, Parquet, JSON or JSON Lines file, a folder of these, or a list of such paths and of dicts with
            `record`, `question` and `answer` (or `messages`), and where known `patient_id` and `split`. None is for PTB-XL's own
            folder, its five diagnostic superclasses, and for questions that `make_questions` makes of labels.
        options: the arguments of `BuildArguments`, as the options of `elm data build`: `split_by`, `resample`, `window`, ...

    Returns:
        The splits that have rows, with `ecg` (`array`: int16 microvolts [leads, samples], `sampling_rate`, `lead_names`, `unit`;
        a list of these where questions compare several), `messages`, `record_id` and what else is known. What was left out,
        and notices about the records, are logged.

    Raises:
        TypeError: there is no argument of a name.
        ValueError: records, questions or an argument are at fault, or nothing is left of them.
    """
    known = [option.name for option in fields(BuildArguments)]
    for name in options:
        if name not in known:
            raise TypeError(
                f"build_dataset has no argument {name}.{did_you_mean(name, known)} It has {', '.join(known)}."
            )
    try:
        return _build_dataset(records, questions, BuildArguments(**options))
    except ValueError as error:  # its messages are those of `elm data build`
        raise ValueError(in_python(str(error))) from error


def _build_dataset(
    records: str | Path | Mapping[Any, Any], questions: str | Path | Iterable[Any] | None, options: BuildArguments
) -> "DatasetDict":
    from datasets import Dataset, DatasetDict, NamedSplit  # seconds to import, which `elm data build` does not need

    plan = make_plan(records, questions, options)
    groups = {split: list(row_groups(plan.rows(split), plan.schema)) for split in plan.questions}  # held in memory
    splits = {
        split: Dataset(pa.concat_tables(tables), split=NamedSplit(split)) for split, tables in groups.items() if tables
    }
    plan.check_rows(bool(splits))
    for remark in plan.remarks():
        logger.warning("%s", in_python(remark))
    # arrays as NumPy: as lists of numbers they would take longer to read than to process
    return DatasetDict(splits).with_format("numpy", columns=["ecg"], output_all_columns=True)


@dataclass
class Plan:
    """What a dataset will hold. The records are read when its rows are asked for, a few at a time."""

    options: BuildArguments
    records: Records
    questions: dict[str, list[QuestionRow]]  # of each split
    metadata: Metadata
    schema: pa.Schema
    split_by: str  # the rule by which the questions were divided
    left_out: dict[str, int]  # what was left out -> how many
    absent: list[str]  # missing records, as the questions name them
    too_few: str | None  # a sentence about splits that get no patients
    not_kept: list[str]  # columns of the questions
    # filled as rows are read: record -> why it cannot be read; notice -> the records that it is about
    unreadable: dict[str, str] = field(default_factory=dict)
    notices: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    gaps: dict[str, int] = field(default_factory=dict)  # record -> its windows with a gap

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """The rows of a split; of a record cut into windows as many as it has.

        Raises:
            ValueError: a record cannot be read, and `skip_unreadable` is not set.
        """
        several = pa.types.is_list(self.schema.field("ecg").type)  # one comparing question makes it a list in all rows
        questions = in_order(self.questions[split], self.options.seed)
        read = read_records(questions, self.records, partial(read_ecgs, options=self.options), self.options.num_proc)
        for question, ecgs_of_records in tqdm(read, total=len(questions), desc=split, unit="question"):
            failed = False
            for record, ecgs in zip(question.records, ecgs_of_records, strict=True):
                if isinstance(ecgs, ValueError):  # `read_ecgs` returns errors in place of raising them
                    if not self.options.skip_unreadable:
                        raise ValueError(
                            f"Cannot read the record {record}: {ecgs} (--skip_unreadable leaves such out.)"
                        )
                    self.unreadable[record], failed = str(ecgs), True
                    continue
                for notice in ecgs.notices:
                    self.notices[notice].add(record)
                if ecgs.num_gaps:
                    self.gaps[record] = ecgs.num_gaps
            windows = [] if failed else zip(*(ecgs.windows for ecgs in ecgs_of_records), strict=True)
            for ecgs in windows:  # one row a window
                about_ecgs = [
                    {**self.metadata.get(record, {}), "record_id": record, "patient_id": patient, **ecg}
                    for record, patient, ecg in zip(question.records, question.patients, ecgs, strict=True)
                ]
                row: dict[str, Any] = {"messages": question.messages, **question.columns}
                for name in self.schema.names:
                    if name not in row:  # these two are not about single records
                        values = [about.get(name) for about in about_ecgs]
                        row[name] = values if several else values[0]
                yield row

    def check_rows(self, has_rows: bool) -> None:
        """Counts the records that could not be read, once all rows were; ValueError if no row is left."""
        if not has_rows and self.gaps:
            raise ValueError(
                f"Each window of {self.options.window:g} s has a gap (NaN); cut shorter ones with --window."
            )
        if not has_rows:
            raise ValueError(
                f"None of the {len(self.unreadable)} records can be read. The first: {next(iter(self.unreadable.values()))}"
            )
        if self.gaps:
            self.left_out[f"windows with a gap (NaN), in {counted(len(self.gaps), 'record')}"] = sum(self.gaps.values())
        if self.unreadable:
            self.left_out["records that cannot be read, and their questions"] = len(self.unreadable)

    def remarks(self) -> list[str]:
        """Sentences about what was left out, and about the records."""
        lines = [f"Cannot read {record}: {reason}" for record, reason in self.unreadable.items()]
        lines += [f"Left out: {name} ({number:,})" for name, number in self.left_out.items()]
        if self.absent:
            names = list(dict.fromkeys(self.absent))
            lines.append(f"Not there: {', '.join(names[:3])}{'...' if len(names) > 3 else ''}")
        if self.not_kept:
            lines.append(
                f"Columns of the questions that are not kept: {', '.join(self.not_kept)} (--columns NAME keeps one)"
            )
        lines += [f"{notice} (records: {len(records):,})" for notice, records in self.notices.items()]
        return lines + ([self.too_few] if self.too_few else [])


def make_plan(
    source: str | Path | Mapping[Any, Any], questions: str | Path | Iterable[Any] | None, options: BuildArguments
) -> Plan:
    """Finds records and questions and divides them into splits, without reading a signal; arguments as of `build_dataset`.

    Raises:
        ValueError: records, questions or tables are at fault, or no question is left.
    """
    table = None if isinstance(source, Mapping) else Path(source) / PTBXL_TABLE
    is_ptbxl = table is not None and table.is_file()
    tables = [path for path in (table if is_ptbxl else None, options.metadata) if path is not None]
    if options.metadata_columns and not tables:
        raise ValueError("--metadata_columns are those of a table about the records; name it with --metadata.")
    records = find_records(source, options.resample)  # PTB-XL has files of 100 and of 500 Hz
    own_table, found = ([], set()) if options.metadata is None else table_rows(options.metadata, options.names)
    # --columns may be of that table alone, where it makes something of them
    found &= {*METADATA_COLUMNS, *RECORD_COLUMNS, *options.metadata_columns, *options.label_columns}
    left_out: dict[str, int] = {}
    rows: list[Iterable[QuestionRow]] = []
    if questions is not None:
        rows.append(read_questions(questions, options.sort_answers, options.names, found))
    elif missing := {ours: theirs for ours, theirs in options.names.items() if ours not in found}:
        theirs = {options.names.get(name, name): None for name in own_table[0]} if own_table else {}
        demand(missing.values(), theirs, "The table of --metadata")
    if options.make_questions:
        labels: dict[str, dict[str, Any]] = {}
        if options.label_columns:
            labels |= read_labels(read_metadata(own_table, records, options.label_columns), options.label_columns)
        about = {record: labels.get(record, {}) for record in records.locations}
        made, of_labels = label_questions(about, options.make_questions, options.seed, options.min_records)
        rows.append(made)
        left_out |= of_labels
    elif table is not None and is_ptbxl and not rows:
        made, left_out["records of no diagnostic superclass"] = superclass_questions(table.parent)
        rows.append(made)
    if not rows:
        raise ValueError(
            "There are no questions about the records: name a file with --questions, or let --make_questions make them of labels. "
            "Only PTB-XL's own folder needs none."
        )
    chosen, absent = choose_questions(chain.from_iterable(rows), records, options.question_types)
    kept = {*KEPT_COLUMNS, *options.names}
    not_kept = [
        name for name in dict.fromkeys(name for question in chosen for name in question.columns) if name not in kept
    ]
    if not_kept:
        chosen = [replace(q, columns={name: q.columns[name] for name in q.columns if name in kept}) for q in chosen]
    left_out |= count_absent(absent)
    metadata: dict[str, dict[str, Any]] = defaultdict(dict)
    for path in tables:
        # --metadata_columns are of the last table: the user's own, or PTB-XL's where there is no other
        is_own = path is options.metadata
        columns = options.metadata_columns if path is tables[-1] else ()
        for record, row in read_metadata(own_table if is_own else path, records, columns).items():
            metadata[record] |= row  # later tables win
    chosen = with_patients(chosen, metadata)
    split_by = options.split_by or default_split(chosen, metadata)
    parts, number = split_questions(chosen, split_by, metadata, options.shares, options.seed)  # number: those left out
    if not parts:
        raise ValueError(f"No question is left: all {number} are about records of different splits.")
    left_out["questions whose records are in different splits"] = number
    too_few = without_patients(chosen, options.shares) if split_by == "patient" else None
    if options.join_questions:
        parts = {split: join_questions(part) for split, part in parts.items()}
    remaining = [question for part in parts.values() for question in part]
    several = any(len(question.records) > 1 for question in remaining)
    if options.window is not None and several:
        raise ValueError("--window cuts single records, and there are questions that compare several; leave it out.")
    schema = make_schema(remaining, metadata, several, options.window is not None)
    left_out = {name: number for name, number in left_out.items() if number}
    return Plan(options, records, parts, metadata, schema, split_by, left_out, absent, too_few, not_kept)


def join_questions(questions: list[QuestionRow]) -> list[QuestionRow]:
    """The single questions about the same records as one chat of several turns, so that their ECG is stored once.

    Each column becomes a list with a value for each answer.
    """
    groups: dict[Any, list[QuestionRow]] = {}
    for index, question in enumerate(questions):
        single = [turn["role"] for turn in question.messages] == ["user", "assistant"]  # other chats stay alone
        groups.setdefault(question.records if single else index, []).append(question)
    joined = []
    for group in groups.values():
        messages = [turn for question in group for turn in question.messages]
        answered = [q for q in group for turn in q.messages if turn["role"] == "assistant"]
        columns = {name: [q.columns.get(name) for q in answered] for question in group for name in question.columns}
        joined.append(replace(group[0], messages=messages, columns=columns))
    return joined


def in_order(questions: list[QuestionRow], seed: int) -> list[QuestionRow]:
    """The questions about a record one after the other: it is read once, and its repetitions take hardly any space.

    The records are in random order: those of one source or patient together would fill a buffer in which they are shuffled.
    """
    records = np.random.default_rng(seed).permutation(sorted({question.records[0] for question in questions})).tolist()
    rank = {record: index for index, record in enumerate(records)}
    return sorted(questions, key=lambda question: (rank[question.records[0]], question.records[1:]))


def make_schema(
    questions: Sequence[QuestionRow], metadata: Metadata, several: bool = False, windows: bool = False
) -> pa.Schema:
    """Types of the columns; those without any value are left out.

    Args:
        several: `ecg` and the columns about records are lists.
        windows: there is a `start_second`.

    Raises:
        ValueError: a column has values of different types.
    """
    names = dict.fromkeys(name for question in questions for name in question.columns)  # a dict keeps their order
    of_questions = {name: [question.columns.get(name) for question in questions] for name in names}
    rows = {record: metadata.get(record, {}) for question in questions for record in question.records}
    names = dict.fromkeys(name for row in rows.values() for name in row if name not in of_questions)
    of_records: dict[str, list[Any]] = {
        "record_id": list(rows),
        **({"start_second": [0.0]} if windows else {}),  # only its type matters here
        "patient_id": [patient for question in questions for patient in question.patients],
        **{name: [row.get(name) for row in rows.values()] for name in names if name != "patient_id"},
    }
    about_ecgs = {"ecg": ECG, **_types(of_records)}
    if several:
        about_ecgs = {name: pa.list_(kind) for name, kind in about_ecgs.items()}
    return pa.schema({"ecg": about_ecgs.pop("ecg"), "messages": MESSAGES, **about_ecgs, **_types(of_questions)})


def _types(columns: Mapping[str, list[Any]]) -> dict[str, pa.DataType]:
    types = {}
    for name, values in columns.items():
        try:
            kind = pa.array(values).type  # Arrow infers it, and refuses a mix such as text and numbers
        except pa.ArrowException as error:
            kinds = ", ".join(sorted({type(value).__name__ for value in values}))
            raise ValueError(f"The column {name!r} holds {kinds}; make all of its values of one type.") from error
        if kind not in (pa.null(), pa.list_(pa.null())):  # no row has a value
            types[name] = kind
    return types


class RecordECGs(NamedTuple):
    """What a record gives: its `ecg` and `start_second`, of each window, its notices, and how many windows have a gap."""

    windows: list[dict[str, Any]]
    notices: tuple[str, ...] = ()
    num_gaps: int = 0


def read_ecgs(location: Any, options: BuildArguments) -> RecordECGs | ValueError:
    """The ECGs that a record gives: itself, or its windows without a gap.

    An error comes in their place: such records may be left out, and exceptions of another process would stop all.
    """
    try:
        has_windows = options.window is not None
        record = as_record(location, options.sampling_rate, options.lead_names, options.unit, has_windows)
        rate = record.sampling_rate if options.resample is None else options.resample
        # filters and normalisation are the model's business: a dataset keeps what was recorded
        microvolts = np.rint(1000 * resample(record.array, record.sampling_rate, rate))  # from millivolts
        limits = np.iinfo(np.int16)  # beyond them, `astype(np.int16)` would wrap around
        if microvolts.min() < limits.min or microvolts.max() > limits.max:
            raise ValueError(
                f"It reaches {abs(microvolts).max() / 1000:.6g} mV, and 16-bit microvolts hold at most 32.767 mV; is its "
                "unit right (--unit)?"
            )
        # what is filled into a gap reaches as far as the filter of resampling
        reach = 0.0 if rate == record.sampling_rate else ZERO_CROSSINGS / min(rate, record.sampling_rate)
        gaps = [(start - reach, end + reach) for start, end in record.metadata.get("gaps", ())]
        metadata = {**record.metadata, "gaps": gaps}
        record = replace(record, array=microvolts.astype(np.int16), sampling_rate=rate, metadata=metadata)
        windows, num_gaps = [record], 0
        if options.window is not None:
            windows = cut_windows(record, options.window, options.stride)
            num_gaps = len(window_starts(record, options.window, options.stride)) - len(windows)
    except (ValueError, OSError) as error:
        return ValueError(str(error))  # of one type, which `Plan.rows` looks for
    about = {"sampling_rate": rate, "lead_names": list(record.lead_names), "unit": "uV"}
    ecgs = [
        {"ecg": {"array": window.array, **about}, "start_second": window.metadata.get("start_second", 0.0)}
        for window in windows
    ]
    return RecordECGs(ecgs, record.metadata.get("notices", ()), num_gaps)


def read_records(
    questions: list[QuestionRow], records: Records, reader: Any, num_proc: int = 1
) -> Iterator[tuple[QuestionRow, list[Any]]]:
    """Each question with what `reader` makes of its records; successive questions share what is read.

    Args:
        reader: a function of one of `records.locations`.
        num_proc: processes that read.
    """
    held: dict[str, Any] = {}  # the records of the present chunk, so that memory does not grow with the dataset
    chunk = 8 * num_proc if num_proc > 1 else 1  # questions: enough that no process waits for another
    pool = ProcessPoolExecutor(num_proc, initializer=_start_process) if num_proc > 1 else None
    with pool or nullcontext():
        read: Any = pool.map if pool else map  # both keep the order
        for start in range(0, len(questions), chunk):
            part = questions[start : start + chunk]
            needed = dict.fromkeys(record for question in part for record in question.records)
            new = [record for record in needed if record not in held]
            held = {record: held[record] for record in needed if record in held}  # read for the chunk before
            held |= zip(new, read(reader, [records.locations[record] for record in new]), strict=True)
            yield from ((question, [held[record] for record in question.records]) for question in part)


def _start_process() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of PyTorch, where a process imports it
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, and that ends this one
    Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process soon after the one that started it, which cannot do so if it was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def row_groups(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of successive rows, of at most `ROW_GROUP_ROWS` rows and about `ROW_GROUP_BYTES` of signal."""
    held: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        # Arrow takes a list of arrays, but no array of two dimensions
        ecgs = [{**ecg, "array": list(ecg["array"])} for ecg in as_list(row["ecg"])]
        held.append({**row, "ecg": ecgs if isinstance(row["ecg"], list) else ecgs[0]})
        size += sum(ecg["array"].nbytes for ecg in as_list(row["ecg"]))
        if len(held) == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield pa.Table.from_pylist(held, schema)
            held, size = [], 0
    if held:
        yield pa.Table.from_pylist(held, schema)
