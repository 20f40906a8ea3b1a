"""Datasets made of records and questions about them: `build_dataset` in memory, and the plan of what `elm data build` writes."""

import gc
import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.data.arguments import KEPT_COLUMNS, METADATA_COLUMNS, BuildArguments, in_python
from elm_ecg.training.data.labels import KIND, label_questions, labelled, read_labels, superclass_questions
from elm_ecg.training.data.parts import PART_RECORDS, Block, Found, Part, in_processes, part_name, read_part
from elm_ecg.training.data.questions import QuestionRow, choose_questions, count_absent, read_questions
from elm_ecg.training.data.schema import ECG, MESSAGES, STORED_ARRAY, as_list, counted
from elm_ecg.training.data.sources import PTBXL_TABLE, Records, find_records, read_metadata, read_source
from elm_ecg.training.data.splits import Metadata, default_split, split_questions, with_patients, without_patients
from elm_ecg.training.data.tables import RECORD_COLUMNS, demand, table_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)

TABLE_ROWS = 100  # of the tables of which a dataset in memory consists


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
    blocks: dict[str, list[Block]] = {}
    names = [name for split in plan.questions for name in plan.part_names(split)]
    with plan.progress(names, names) as bar:
        for part, (found, of_part) in in_processes(
            partial(_read_blocks, options=options), plan.parts(), options.num_proc, bar.update
        ):
            plan.found[part.split].add(found)
            blocks[part.name] = of_part
    plan.check_rows()
    splits = {}
    for split in plan.questions:
        of_split = [block for name in plan.part_names(split) for block in blocks[name]]
        if tables := list(_joined(of_split, plan)):
            splits[split] = Dataset(pa.concat_tables(tables), split=NamedSplit(split))
    for remark in plan.remarks():
        logger.warning("%s", in_python(remark))
    # arrays as NumPy: as lists of numbers they would take longer to read than to process
    return DatasetDict(splits).with_format("numpy", columns=["ecg"], output_all_columns=True)


def _read_blocks(part: Part, options: BuildArguments) -> tuple[Found, list[Block]]:
    found = Found()
    return found, list(read_part(part, options, found))


def _joined(blocks: list[Block], plan: "Plan") -> Iterator[pa.Table]:
    """The rows of a split with the ECGs themselves in them."""
    schema = plan.row_schema
    position = schema.get_field_index("ecg")
    schema = schema.set(position, pa.field("ecg", pa.list_(ECG) if plan.several else ECG))
    names = [member.name for member in ECG]
    # Arrow takes a list of arrays, but no array of two dimensions
    ecgs = {
        ecg["id"]: {name: list(ecg[name]) if name == "array" else ecg[name] for name in names}
        for block in blocks
        for ecg in block.ecgs
    }
    rows = [row for block in blocks for row in block.rows]
    for start in range(0, len(rows), TABLE_ROWS):
        table = []
        for row in rows[start : start + TABLE_ROWS]:
            of_row = [ecgs[name.split("#", 1)[1]] for name in as_list(row["ecg"])]
            table.append({**row, "ecg": of_row if plan.several else of_row[0]})
        yield pa.Table.from_pylist(table, schema)


@dataclass
class Plan:
    """What a dataset will hold. The records are read part by part."""

    options: BuildArguments
    records: Records
    questions: dict[str, list[QuestionRow]]  # of each split
    about: Metadata  # record -> what is stored beside it
    in_rows: tuple[str, ...]  # which of this the rows have too
    row_schema: pa.Schema
    ecg_schema: pa.Schema
    several: bool  # a question compares ECGs, which makes them lists in all rows
    source: str | None  # the public set that the records are of, as --source names it or its table tells
    split_by: str  # the rule by which the questions were divided
    left_out: dict[str, int]  # what was left out -> how many
    absent: list[str]  # missing records, as the questions name them
    too_few: str | None  # a sentence about splits that get no patients
    not_kept: list[str]  # columns of the questions
    # of each split, filled as parts are read
    found: dict[str, Found] = field(default_factory=lambda: defaultdict(Found))

    def __post_init__(self) -> None:
        # split -> its records in random order: those of one source or patient together would fill a buffer in which they are shuffled
        self.orders: dict[str, list[str]] = {}
        for split, questions in self.questions.items():
            names = np.array(sorted({record for question in questions for record in question.records}), object)
            self.orders[split] = np.random.default_rng(self.options.seed).permutation(names).tolist()

    def part_names(self, split: str) -> list[str]:
        """The names of the parts of a split."""
        number = -(-len(self.orders[split]) // PART_RECORDS)
        return [part_name(split, index, number) for index in range(number)]

    def parts(self, names: Iterable[str] | None = None) -> Iterator[Part]:
        """The parts of these names; of None all."""
        wanted = None if names is None else set(names)
        for split, questions in self.questions.items():
            records, part_names = self.orders[split], self.part_names(split)
            part_of = {record: index // PART_RECORDS for index, record in enumerate(records)}
            of_part = defaultdict(list)
            for question in questions:
                of_part[part_of[question.records[0]]].append(question)
            for index, name in enumerate(part_names):
                if wanted is None or name in wanted:
                    own = records[index * PART_RECORDS : (index + 1) * PART_RECORDS]
                    asked = of_part[index]
                    others = {
                        record for question in asked for record in question.records[1:] if part_of[record] != index
                    }
                    yield Part(
                        split,
                        index,
                        len(part_names),
                        {record: self.records.locations[record] for record in own},
                        asked,
                        {record: self.about.get(record, {}) for record in (*own, *others)},
                        self.in_rows,
                        self.several,
                        {record: (part_names[part_of[record]], self.records.locations[record]) for record in others},
                    )

    def progress(self, names: list[str], todo: list[str]) -> Any:
        """A bar of the records of these parts, of which some are done."""
        sizes: dict[str, int] = {}
        for split in self.questions:
            total, of_split = len(self.orders[split]), self.part_names(split)
            sizes |= {name: min(PART_RECORDS, total - index * PART_RECORDS) for index, name in enumerate(of_split)}
        total = sum(sizes[name] for name in names)
        return tqdm(total=total, initial=total - sum(sizes[name] for name in todo), desc="records", unit="record")

    def fingerprint(self) -> str:
        """A digest of all that decides what is written, but of the samples of the records: a build that was interrupted goes on from
        parts of the same plan alone."""
        digest = hashlib.sha256()
        # parts without a record that cannot be read are alike with and without --skip_unreadable, unless questions compare
        others = ("num_proc", "metadata", *(() if self.several else ("skip_unreadable",)))
        said = {name: value for name, value in vars(self.options).items() if name not in others}
        for what in (said, self.row_schema, self.ecg_schema, self.split_by):
            digest.update(repr(what).encode())
        for split, questions in self.questions.items():
            digest.update(split.encode())
            for question in questions:
                digest.update(repr(question).encode())
            for record in self.orders[split]:
                digest.update(f"{record} {self._place(record)} {self.about.get(record)}".encode())
        return digest.hexdigest()

    def _place(self, record: str) -> str:
        """Where a record is in its folder, which other machines may have elsewhere."""
        location, folder = self.records.locations[record], self.records.folder
        if not isinstance(location, str | Path):  # of an archive, which is one file and not changed in between
            return type(location).__name__
        return Path(location).name if folder is None else str(location).removeprefix(str(folder))

    def check_rows(self) -> None:
        """Counts what could not be read, once all parts were; ValueError if no row is left."""
        found = Found()
        for of_split in self.found.values():
            found.add(of_split)
        if not found.rows and found.gaps:
            raise ValueError(
                f"Each window of {self.options.window:g} s has a gap (NaN); cut shorter ones with --window."
            )
        if not found.rows:
            raise ValueError(
                f"None of the {len(found.unreadable)} records can be read. The first: {next(iter(found.unreadable.values()))}"
            )
        if found.gaps:
            name = f"windows with a gap (NaN), in {counted(len(found.gaps), 'record')}"
            self.left_out[name] = sum(found.gaps.values())
        if found.unreadable:
            self.left_out["records that cannot be read, and their questions"] = len(found.unreadable)

    def num_records(self, split: str) -> int:
        """How many records of a split are stored, whole or in windows."""
        return len(self.orders[split]) - len(self.found[split].without)

    def num_patients(self, split: str) -> int | None:
        """How many patients these are of; None if that of one is unknown."""
        without = set(self.found[split].without)
        patients = {self.about[record].get("patient_id") for record in self.orders[split] if record not in without}
        return None if None in patients else len(patients)

    def remarks(self) -> list[str]:
        """Sentences about what was left out, and about the records."""
        found = list(self.found.values())
        lines = [f"Cannot read {record}: {why}" for of_split in found for record, why in of_split.unreadable.items()]
        lines += [f"Left out: {name} ({number:,})" for name, number in self.left_out.items()]
        if self.absent:
            names = list(dict.fromkeys(self.absent))
            lines.append(f"Not there: {', '.join(names[:3])}{'...' if len(names) > 3 else ''}")
        if self.not_kept:
            lines.append(
                f"Columns of the questions that are not kept: {', '.join(self.not_kept)} (--columns NAME keeps one)"
            )
        notices = sum((of_split.notices for of_split in found), Counter())
        lines += [f"{notice} (records: {number:,})" for notice, number in notices.items()]
        return lines + ([self.too_few] if self.too_few else [])


@contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage is not looked for meanwhile: a plan is of millions of objects, none of which is any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collection()
def make_plan(
    source: str | Path | Mapping[Any, Any], questions: str | Path | Iterable[Any] | None, options: BuildArguments
) -> Plan:
    """Finds records and questions and divides them into splits, without reading a signal; arguments as of `build_dataset`.

    Raises:
        ValueError: records, questions or tables are at fault, or no question is left.
    """
    records = _records_of(source, options)
    # PTB-XL's own folder, found without --source
    table = None if options.source or isinstance(source, Mapping) else Path(source) / PTBXL_TABLE
    tables: list[Any] = [table] if table is not None and table.is_file() else []
    own_rows, found = ([], set()) if options.metadata is None else table_rows(options.metadata, options.names)
    if options.metadata is not None:
        tables.append(own_rows)
    if options.metadata_columns and not tables and options.source is None:
        raise ValueError("--metadata_columns are those of a table about the records; name it with --metadata.")
    left_out: dict[str, int] = {}
    known = options.source or ("ptb-xl" if tables and tables[0] is table else None)
    folder = records.folder if options.source else table.parent if table else None
    asked, labels = _asked(questions, records, tables, found, options, left_out, folder if known == "ptb-xl" else None)
    chosen, absent = choose_questions(asked, records, options.question_types)
    kept = {*KEPT_COLUMNS, *options.names}
    not_kept = [
        name for name in dict.fromkeys(name for question in chosen for name in question.columns) if name not in kept
    ]
    if not_kept:
        chosen = [replace(q, columns={name: q.columns[name] for name in q.columns if name in kept}) for q in chosen]
    left_out |= count_absent(absent)
    about = _about(chosen, records, tables, options)
    chosen = with_patients(chosen, about)
    split_by = options.split_by or default_split(chosen, about)
    splits, number = split_questions(chosen, split_by, about, options.shares, options.seed)  # number: those left out
    if not splits:
        raise ValueError(f"No question is left: all {number} are about records of different splits.")
    left_out["questions whose records are in different splits"] = number
    too_few = without_patients(chosen, options.shares) if split_by == "patient" else None
    del chosen  # rows that `_with_made` takes away, perhaps millions
    splits, of_labels = _with_made(splits, labels, options)
    left_out |= of_labels
    if options.join_questions:
        splits = {split: join_questions(part) for split, part in splits.items()}
    remaining = [question for part in splits.values() for question in part]
    several = any(len(question.records) > 1 for question in remaining)
    if options.window is not None and several:
        raise ValueError("--window cuts single records, and there are questions that compare several; leave it out.")
    for question in remaining:
        for record, patient in zip(question.records, question.patients, strict=True):
            about[record]["patient_id"] = patient
    stored = {record: about[record] for question in remaining for record in question.records}
    for record in stored:
        if not _is_text(record):
            raise ValueError(f"The name of the record {record!a} is not in UTF-8; rename its file.")
    in_rows = tuple(dict.fromkeys(["patient_id", *METADATA_COLUMNS, *options.metadata_columns]))
    if options.no_questions:  # nothing else would say it beside the ECG
        in_rows = tuple(dict.fromkeys([*in_rows, *(name for row in stored.values() for name in row)]))
    schemas = make_schemas(remaining, stored, in_rows, several, options.window is not None)
    left_out = {name: number for name, number in left_out.items() if number}
    return Plan(
        options,
        records,
        splits,
        stored,
        in_rows,
        *schemas,
        several,
        known,
        split_by,
        left_out,
        absent,
        too_few,
        not_kept,
    )


def _is_text(name: str) -> bool:
    """Whether a name can be stored: that of a file may hold any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _records_of(source: str | Path | Mapping[Any, Any], options: BuildArguments) -> Records:
    if options.source is None:
        return find_records(source, options.resample)  # PTB-XL has files of 100 and of 500 Hz
    if isinstance(source, Mapping):
        raise ValueError(f"--source {options.source} is a folder, and the records are a mapping; leave it out.")
    records = read_source(options.source, source, options.resample)
    if options.metadata is None:  # else the columns are that table's
        known = dict.fromkeys(name for facts in records.about.values() for name in facts)
        demand(options.metadata_columns, known, f"--source {options.source}")
    return records


def _asked(
    questions: Any,
    records: Records,
    tables: list[Any],
    found: set[str],
    options: BuildArguments,
    left_out: dict[str, int],
    ptbxl: Path | None,
) -> tuple[Iterable[QuestionRow], Metadata]:
    """The questions that are asked: those of files, those to be made of labels, or those that PTB-XL has of its own.

    Args:
        tables: about the records, the user's own last.
        found: the names of `options.names` that the user's own table has.
        left_out: where it is counted what no questions are made of.
        ptbxl: the folder of PTB-XL, if the records are its.

    Returns:
        The questions, and what `label_questions` makes more of. That is done by `_with_made` once the splits are known; until then a
        row without a chat stands for the questions of a kind about a record.
    """
    if options.no_questions:
        about_questions = {
            name: getattr(options, name)
            for name in ("make_questions", "question_types", "join_questions", "sort_answers")
        }
        if others := [f"--{name}" for name, value in {"questions": questions, **about_questions}.items() if value]:
            raise ValueError(f"--no_questions does not go with {' and '.join(others)}; leave it or the others out.")
        return (QuestionRow((record,), []) for record in records.locations), {}
    labels: Metadata = {}
    rows: list[Iterable[QuestionRow]] = []
    # --columns may be of the table about records alone, where it makes something of them
    found = found & {*METADATA_COLUMNS, *RECORD_COLUMNS, *options.metadata_columns, *options.label_columns}
    if questions is not None:
        rows.append(read_questions(questions, options.sort_answers, options.names, found))
    elif missing := {ours: theirs for ours, theirs in options.names.items() if ours not in found}:
        own_rows = tables[-1] if options.metadata is not None else []
        known = {options.names.get(name, name): None for name in own_rows[0]} if own_rows else {}
        demand(missing.values(), known, "The table of --metadata")
    if options.make_questions:
        about: Mapping[str, Mapping[str, Any]] = records.about
        if options.label_columns:
            about = read_labels(read_metadata(tables[-1], records, options.label_columns), options.label_columns)
        labels = {record: about.get(record, {}) for record in records.locations}
        kinds = [{"question_type": KIND + kind} for kind in dict.fromkeys(options.make_questions)]
        rows.append(QuestionRow((record,), [], columns=kind) for record in labelled(labels) for kind in kinds)
    elif not rows and ptbxl is not None:
        made, left_out["records of no diagnostic superclass"] = superclass_questions(ptbxl)
        rows.append(made)
    if not rows:
        raise ValueError(
            "There are no questions about the records: name a file with --questions, let --make_questions make them of labels, or say "
            "--no_questions if there are to be none. Only PTB-XL has some of its own."
        )
    return chain.from_iterable(rows), labels


def _with_made(
    splits: dict[str, list[QuestionRow]], labels: Metadata, options: BuildArguments
) -> tuple[dict[str, list[QuestionRow]], dict[str, int]]:
    """The questions of each split, with those made of labels in place of the rows that stand for them; and what was left out -> how
    many. Their answers are balanced in each split, and which split a record is in does not depend on the kinds of questions."""
    waiting = {
        question.records: (split, question.patients)
        for split, part in splits.items()
        for question in part
        if labels and not question.messages
    }
    if not waiting:
        return splits, {}
    kinds = {q.columns["question_type"].removeprefix(KIND) for part in splits.values() for q in part if not q.messages}
    split_of = {record: split for (record,), (split, _) in waiting.items()}
    made, left_out = label_questions(labels, kinds, options.seed, options.min_records, split_of)
    parts = {split: [question for question in part if question.messages] for split, part in splits.items()}
    made.reverse()
    while made:  # one is gone before the next is copied
        question = made.pop()
        split, patients = waiting[question.records]
        parts[split].append(replace(question, patients=patients))
    return {split: part for split, part in parts.items() if part}, left_out


def _about(
    questions: list[QuestionRow], records: Records, tables: list[Any], options: BuildArguments
) -> dict[str, dict[str, Any]]:
    """What the source and the tables say of each record; later tables win."""
    about: dict[str, dict[str, Any]] = defaultdict(dict)
    for record in {record for question in questions for record in question.records} & records.about.keys():
        about[record] |= records.about[record]
    for table in tables:
        # --metadata_columns are of the last table: the user's own, or PTB-XL's where there is no other
        for record, row in read_metadata(
            table, records, options.metadata_columns if table is tables[-1] else ()
        ).items():
            about[record] |= row
    return about


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


def make_schemas(
    questions: Sequence[QuestionRow], about: Metadata, in_rows: Sequence[str], several: bool, windows: bool
) -> tuple[pa.Schema, pa.Schema]:
    """Types of the columns of the rows, and of the records that are stored; those without any value are left out.

    Args:
        in_rows: which of `about` the rows have too.
        several: rows have lists of ECGs, and so of what is about these.
        windows: there is a `start_second`.

    Raises:
        ValueError: a column has values of different types.
    """
    names = dict.fromkeys(name for question in questions for name in question.columns)  # a dict keeps their order
    of_questions = _types({name: [question.columns.get(name) for question in questions] for name in names})
    names = dict.fromkeys(name for values in about.values() for name in values)
    of_records = _types({name: [values.get(name) for values in about.values()] for name in names})
    start = {"start_second": pa.float64()} if windows else {}
    about_ecgs = {"ecg": pa.string(), "record_id": pa.string(), **start}
    about_ecgs |= {name: of_records[name] for name in in_rows if name in of_records and name not in of_questions}
    if several:
        about_ecgs = {name: pa.list_(kind) for name, kind in about_ecgs.items()}
    chats = {"messages": MESSAGES} if any(question.messages for question in questions) else {}
    rows = {"ecg": about_ecgs.pop("ecg"), **chats, **about_ecgs, **of_questions}
    members = {member.name: member.type for member in ECG}
    stored = pa.schema({"id": pa.string(), **start, **members, **of_records})
    return pa.schema(rows), stored.set(stored.get_field_index("array"), STORED_ARRAY)


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
