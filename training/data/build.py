"""Datasets made of records and questions about them: `elm data build`."""

import argparse
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, List, Value
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm import tqdm

from elm_ecg.ecg_utils import as_record, cut_windows, resample
from elm_ecg.training.data.sources import (
    PTBXL_TABLE,
    SPLITS,
    Question,
    Records,
    find_records,
    identifier,
    read_metadata,
    read_questions,
    superclass_questions,
)
from elm_ecg.training.files import new_folder, resource
from elm_ecg.training.sharing.cards import citation, use_of

Metadata = Mapping[str, Mapping[str, Any]]  # id of a record -> column -> value

# PTB-XL: fold 9 is for choosing, 10 for testing; the folds keep the records of a patient together
FOLDS = {**dict.fromkeys(range(1, 9), "train"), 9: "validation", 10: "test"}
ECG = {
    "array": List(List(Value("int16"))),
    "sampling_rate": Value("float32"),
    "lead_names": List(Value("string")),
    "unit": Value("string"),
}
# column -> what the card says of it
COLUMNS = {
    "ecg": "the signal; several are in the order in which the question speaks of them",
    "messages": "the chat",
    "record_id": "the record's name",
    "patient_id": "who was recorded",
    "start_second": "where in the record the ECG begins",
    "question_type": "the kind of question",
}
SPLIT_RULES = {
    "given": "The splits are those that come with the questions.",
    "fold": "The splits are PTB-XL's folds 1-8, 9 and 10.",
    "patient": "The patients were divided at random, {shares} (seed {seed}).",
}
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
# what a reader of a stream holds at once
ROW_GROUP_ROWS = 100
ROW_GROUP_BYTES = 32 * 2**20
SHARD_BYTES = 500 * 10**6


def choose_questions(
    questions: Iterable[Question], records: Records, question_types: Sequence[str] | None = None
) -> tuple[list[Question], list[str]]:
    """The questions whose records are there, by the ids of these; and for each other one the name of a record that is not.

    Args:
        question_types: patterns of the `question_type` that are kept; None for all.

    Raises:
        ValueError: no question is left, or a name means several records.
    """
    if question_types is not None:
        by_type = defaultdict(list)
        for question in questions:
            by_type[str(question.columns.get("question_type"))].append(question)
        chosen = [name for name in by_type if any(fnmatchcase(name, pattern) for pattern in question_types)]
        if not chosen:
            raise ValueError(f"--question_types {' '.join(question_types)} fits none of {', '.join(sorted(by_type))}.")
        questions = [question for name in chosen for question in by_type[name]]
    found, absent = [], []
    for question in questions:
        ids = [records.find(name) for name in question.records]
        if None in ids:
            absent.append(question.records[ids.index(None)])
        else:
            found.append(replace(question, records=tuple(map(str, ids))))
    if not found:
        raise ValueError(
            f"No record that the {len(absent)} questions name is there, such as {', '.join(absent[:3])}; the {len(records.locations)} "
            f"records are {', '.join(list(records.locations)[:3])}... Records are named by their path in the folder, with or "
            "without suffix, or by their id in the archive."
        )
    return found, absent


def with_patients(questions: list[Question], metadata: Metadata) -> list[Question]:
    """The questions with the patient of each record, whether the questions or the metadata say it.

    Raises:
        ValueError: a record has two patients.
    """
    said = {record: row.get("patient_id") for record, row in metadata.items()}
    patients = {record: identifier(patient) for record, patient in said.items() if patient is not None}
    for question in questions:
        for record, patient in zip(question.records, question.patients, strict=True):
            if patient is not None and patients.setdefault(record, patient) != patient:
                raise ValueError(
                    f"The record {record} is of the patients {patients[record]} and {patient}; expected one."
                )
    return [replace(question, patients=tuple(map(patients.get, question.records))) for question in questions]


def default_split(questions: list[Question], metadata: Metadata) -> str:
    """`given` where each question has a split, else `fold` where each record has one, else `patient`."""
    if all(question.split is not None for question in questions):
        return "given"
    records = {record for question in questions for record in question.records}
    return "fold" if all(metadata.get(record, {}).get("strat_fold") for record in records) else "patient"


def split_questions(
    questions: list[Question], split_by: str, metadata: Metadata, shares: Sequence[float], seed: int
) -> tuple[dict[str, list[Question]], int]:
    """The questions of each split; and how many are left out, as their records are in different ones.

    Args:
        split_by: `given`, `fold` or `patient`.
        shares: of the patients, for `patient`.

    Raises:
        ValueError: a split, fold or patient is unknown, or a patient is in several of the given splits.
    """
    parts: dict[str, list[Question]] = {split: [] for split in SPLITS}
    if split_by == "given":
        check_given(questions)
        for question in questions:
            parts[str(question.split)].append(question)
    else:
        patients = {
            record: patient
            for question in questions
            for record, patient in zip(question.records, question.patients, strict=True)
        }
        split_of = by_fold(patients, metadata) if split_by == "fold" else by_patient(patients, shares, seed)
        for question in questions:
            splits = {split_of[record] for record in question.records}
            if len(splits) == 1:
                parts[splits.pop()].append(question)
    return {split: part for split, part in parts.items() if part}, len(questions) - sum(map(len, parts.values()))


def check_given(questions: list[Question]) -> None:
    """ValueError if a question has no split, or a patient (or record, where it is unknown who the patient is) is in several."""
    splits = defaultdict(set)
    for question in questions:
        if question.split is None:
            raise ValueError(
                f"A question about the record {question.records[0]} has no split; give each of them one in a column 'split', "
                "or choose --split_by patient or fold."
            )
        for record, patient in zip(question.records, question.patients, strict=True):
            splits[f"record {record}" if patient is None else f"patient {patient}"].add(question.split)
    shared = [f"{name} ({', '.join(sorted(found))})" for name, found in splits.items() if len(found) > 1]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(splits)} are in several of the given splits: {', '.join(shared[:3])}. The test would be "
            "about whom the training has seen: choose --split_by patient or fold, or correct the splits."
        )


def by_fold(records: Iterable[str], metadata: Metadata) -> dict[str, str]:
    """Record -> split, by PTB-XL's `strat_fold`."""
    folds = {record: metadata.get(record, {}).get("strat_fold") for record in records}
    for record, fold in folds.items():
        if fold not in FOLDS:
            raise ValueError(
                f"The record {record} has strat_fold {fold}; --split_by fold expects 1-8 (train), 9 (validation) or 10 (test) "
                "in the table of --metadata."
            )
    return {record: FOLDS[int(fold)] for record, fold in folds.items() if fold is not None}


def by_patient(patients: Mapping[str, str | None], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Record -> split, all records of a patient in the same.

    Args:
        patients: record -> patient.
    """
    if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"--shares is {' '.join(f'{share:g}' for share in shares)}; expected three that sum to 1.")
    unknown = [record for record, patient in patients.items() if patient is None]
    if unknown:
        raise ValueError(
            f"The patient of {len(unknown)} of {len(patients)} records is unknown, such as {', '.join(unknown[:3])}; "
            "--split_by patient expects a column patient_id in the questions or in the table of --metadata. Where no patient "
            "has two records, it may repeat their names."
        )
    names = np.random.default_rng(seed).permutation(sorted({str(patient) for patient in patients.values()})).tolist()
    ends = np.cumsum(share_out(len(names), shares))
    split_of = {name: SPLITS[np.searchsorted(ends, index, side="right")] for index, name in enumerate(names)}
    return {record: split_of[str(patient)] for record, patient in patients.items()}


def share_out(num_patients: int, shares: Sequence[float]) -> list[int]:
    """How many of the patients each split has; few may leave one with none."""
    ends = [round(end * num_patients) for end in np.cumsum(shares)]
    return np.diff(ends, prepend=0).tolist()


def join_questions(questions: list[Question]) -> list[Question]:
    """The single questions about the same records as one chat of several turns, so that their ECG is stored once.

    Each column becomes a list with a value for each answer.
    """
    groups: dict[Any, list[Question]] = {}
    for index, question in enumerate(questions):
        single = [turn["role"] for turn in question.messages] == ["user", "assistant"]
        groups.setdefault(question.records if single else index, []).append(question)
    joined = []
    for group in groups.values():
        messages = [turn for question in group for turn in question.messages]
        answered = [q for q in group for turn in q.messages if turn["role"] == "assistant"]
        columns = {name: [q.columns.get(name) for q in answered] for question in group for name in question.columns}
        joined.append(replace(group[0], messages=messages, columns=columns))
    return joined


def in_order(questions: list[Question], seed: int) -> list[Question]:
    """The questions about a record one after the other: it is read once, and its repetitions take hardly any space.

    The records are in random order: those of one source or patient together would fill a buffer in which they are shuffled.
    """
    records = np.random.default_rng(seed).permutation(sorted({question.records[0] for question in questions})).tolist()
    rank = {record: index for index, record in enumerate(records)}
    return sorted(questions, key=lambda question: (rank[question.records[0]], question.records[1:]))


@dataclass(frozen=True)
class Reader:
    """Reads a record and makes of it the ECGs of rows: it, or its windows.

    Args:
        sampling_rate_of_files, unit, lead_names: where the files do not say.
        sampling_rate: to which it is resampled, in hertz; None for its own.
        window, stride: as of `cut_windows`, in seconds; None for the whole record.
    """

    sampling_rate_of_files: float | None = None
    unit: str | None = None
    lead_names: Sequence[str] | None = None
    sampling_rate: float | None = None
    window: float | None = None
    stride: float | None = None

    def __call__(self, location: Any) -> list[dict[str, Any]] | ValueError:
        """ECGs with their `start_second`; the error in their place, as it may be that such records are left out."""
        try:
            record = as_record(location, self.sampling_rate_of_files, self.lead_names, self.unit)
            rate = record.sampling_rate if self.sampling_rate is None else self.sampling_rate
            microvolts = np.rint(1000 * resample(record.array, record.sampling_rate, rate))
            limits = np.iinfo(np.int16)
            if microvolts.min() < limits.min or microvolts.max() > limits.max:
                raise ValueError(
                    f"It reaches {abs(microvolts).max() / 1000:.6g} mV, and 16-bit microvolts hold at most 32.767 mV; is its "
                    "unit right?"
                )
            record = replace(record, array=microvolts.astype(np.int16), sampling_rate=rate)
            windows = [record] if self.window is None else cut_windows(record, self.window, self.stride)
        except (ValueError, OSError) as error:
            return ValueError(str(error))
        return [
            {
                "start_second": window.metadata.get("start_second", 0.0),
                "ecg": {
                    "array": window.array,
                    "sampling_rate": rate,
                    "lead_names": list(window.lead_names),
                    "unit": "uV",
                },
            }
            for window in windows
        ]


def read_records(
    questions: list[Question], records: Records, reader: Reader, num_proc: int = 1
) -> Iterator[tuple[Question, list[Any]]]:
    """Each question with what `reader` makes of its records; successive questions share what is read.

    Args:
        num_proc: processes that read.
    """
    held: dict[str, Any] = {}
    chunk = 8 * num_proc if num_proc > 1 else 1
    with ExitStack() as stack:
        read: Any = map
        if num_proc > 1:
            read = stack.enter_context(ProcessPoolExecutor(num_proc, initializer=_start_process)).map
        for start in range(0, len(questions), chunk):
            part = questions[start : start + chunk]
            needed = dict.fromkeys(record for question in part for record in question.records)
            new = [record for record in needed if record not in held]
            held = {record: held[record] for record in needed if record in held}
            held |= zip(new, read(reader, [records.locations[record] for record in new]), strict=True)
            yield from ((question, [held[record] for record in question.records]) for question in part)


def _start_process() -> None:
    torch.set_num_threads(1)  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the main process, and that ends this one


def make_features(
    questions: Sequence[Question], metadata: Metadata, several: bool = False, windows: bool = False
) -> Features:
    """Types of the columns; those without any value are left out.

    Args:
        several: `ecg` and the columns about records are lists.
        windows: there is a `start_second`.

    Raises:
        ValueError: a column has values of different types.
    """
    names = {name: None for question in questions for name in question.columns}
    of_questions = {name: [question.columns.get(name) for question in questions] for name in names}
    records = {record: metadata.get(record, {}) for question in questions for record in question.records}
    names = {name: None for row in records.values() for name in row if name not in of_questions}
    of_records: dict[str, list[Any]] = {
        "record_id": list(records),
        **({"start_second": [0.0]} if windows else {}),
        "patient_id": [patient for question in questions for patient in question.patients],
        **{name: [row.get(name) for row in records.values()] for name in names if name != "patient_id"},
    }
    features = {"ecg": ECG, **_types(of_records)}
    if several:
        features = {name: List(kind) for name, kind in features.items()}
    messages = List({"role": Value("string"), "content": Value("string")})
    return Features({"ecg": features.pop("ecg"), "messages": messages, **features, **_types(of_questions)})


def _types(columns: Mapping[str, list[Any]]) -> dict[str, Any]:
    fields = {}
    for name, values in columns.items():
        try:
            kind = pa.array(values).type
        except pa.ArrowException as error:
            found = ", ".join(sorted({type(value).__name__ for value in values}))
            raise ValueError(f"The column {name!r} holds {found}; make all of its values of one type.") from error
        if kind not in (pa.null(), pa.list_(pa.null())):
            fields[name] = kind
    return dict(Features.from_arrow_schema(pa.schema(fields)))


def make_rows(
    questions: Iterable[tuple[Question, list[Any]]],
    metadata: Metadata,
    features: Features,
    unreadable: dict[str, str] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of questions that `read_records` gives.

    Args:
        unreadable: takes the records that cannot be read, and why; their questions are left out. None makes them an error.
    """
    several = isinstance(features["ecg"], List)
    for question, read in questions:
        failed = {record: str(e) for record, e in zip(question.records, read, strict=True) if isinstance(e, ValueError)}
        if failed and unreadable is None:
            record, reason = failed.popitem()
            raise ValueError(f"Cannot read the record {record}: {reason} (--skip_unreadable leaves such out.)")
        if unreadable is not None:
            unreadable |= failed
        for windows in zip(*read, strict=True) if not failed else ():
            about_records = [
                {**metadata.get(record, {}), "record_id": record, "patient_id": patient, **window}
                for record, patient, window in zip(question.records, question.patients, windows, strict=True)
            ]
            row: dict[str, Any] = {"messages": question.messages, **question.columns}
            for name in features:
                if name not in row and several:
                    row[name] = [about.get(name) for about in about_records]
                elif name not in row:
                    row[name] = about_records[0].get(name)
            yield row


def write_split(folder: Path, split: str, rows: Iterable[dict[str, Any]], features: Features) -> None:
    """Writes rows into `SPLIT-00000-of-0000N.parquet`, as many files as it takes.

    The bytes of the amplitudes are separated before they are compressed, which makes files a quarter smaller; Arrow reads
    that from version 17 on.
    """
    schema = features.arrow_schema
    ecg = "ecg.list.element" if isinstance(features["ecg"], List) else "ecg"
    options: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": 3,
        "use_dictionary": False,
        "column_encoding": {f"{ecg}.array.list.element.list.element": "BYTE_STREAM_SPLIT"},
        "data_page_size": ROW_GROUP_BYTES,  # compression sees the repetitions of a page
    }
    groups = _row_groups(rows, schema)
    group = next(groups, None)
    paths: list[Path] = []
    while group is not None:
        paths.append(folder / f"{split}-{len(paths):05d}.parquet")
        with pq.ParquetWriter(paths[-1], schema, **options) as writer:
            while group is not None and paths[-1].stat().st_size < SHARD_BYTES:
                writer.write_table(group)
                group = next(groups, None)
    for path in paths:
        path.rename(path.with_stem(f"{path.stem}-of-{len(paths):05d}"))


def _row_groups(rows: Iterable[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    held: list[dict[str, Any]] = []
    size = 0
    for row in rows:
        ecgs = [{**ecg, "array": list(ecg["array"])} for ecg in _ecgs(row)]
        held.append({**row, "ecg": ecgs if isinstance(row["ecg"], list) else ecgs[0]})
        size += sum(ecg["array"].nbytes for ecg in _ecgs(row))
        if len(held) == ROW_GROUP_ROWS or size >= ROW_GROUP_BYTES:
            yield pa.Table.from_pylist(held, schema)
            held, size = [], 0
    if held:
        yield pa.Table.from_pylist(held, schema)


def _ecgs(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return row["ecg"] if isinstance(row["ecg"], list) else [row["ecg"]]


@dataclass
class Summary:
    """What a split holds."""

    rows: int = 0
    records: set[str] = field(default_factory=set)
    patients: set[str | None] = field(default_factory=set)
    # of the ECGs of all rows
    rates: Counter[str] = field(default_factory=Counter)
    leads: Counter[str] = field(default_factory=Counter)
    seconds: set[float] = field(default_factory=set)

    def watch(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for row in rows:
            self.rows += 1
            ids, patients = row["record_id"], row.get("patient_id")
            self.records.update(ids if isinstance(ids, list) else [ids])
            self.patients.update(patients if isinstance(patients, list) else [patients])
            for ecg in _ecgs(row):
                self.rates[f"{ecg['sampling_rate']:g} Hz"] += 1
                self.leads[" ".join(ecg["lead_names"])] += 1
                self.seconds.add(ecg["array"].shape[1] / ecg["sampling_rate"])
            yield row

    @property
    def num_patients(self) -> str:
        return "unknown" if None in self.patients else f"{len(self.patients):,}"


def write_card(
    path: Path,
    args: argparse.Namespace,
    features: Features,
    parts: Mapping[str, Summary],
    split_by: str,
    made: list[str],
) -> None:
    """The card of a dataset.

    Args:
        args: those of `build`.
        made: sentences about how it was made.
    """
    name = args.output_dir.resolve().name
    num_rows = sum(part.rows for part in parts.values())
    shares = ", ".join(f"{share:.0%} {split}" for split, share in zip(SPLITS, args.shares, strict=True))
    rule = SPLIT_RULES[split_by].format(shares=shares, seed=args.seed)
    known = all(None not in part.patients for part in parts.values())
    alone = "No patient is in two of them." if known else "No record is in two; a patient may be, as not all are known."
    seconds = set.union(*(part.seconds for part in parts.values()))
    lengths = [f"{length:g}" for length in sorted({min(seconds), max(seconds)})]
    licence = (
        f"Licence: `{args.license}`." if args.license else "Licence: unknown; ask the sources before you share it."
    )
    # no `configs`: files have the names of their splits, and with it `datasets` takes folders of one name for the same data
    card = DatasetCard.from_template(
        DatasetCardData(
            pretty_name=args.name,
            license=args.license,
            task_categories=["question-answering"],
            tags=["ecg", "electrocardiogram", "medical", "elm"],
            size_categories=next((size for limit, size in SIZES.items() if num_rows < limit), "n>10M"),
        ),
        template_path=str(resource("model_cards/dataset.md")),
        title=args.name or name,
        use=use_of("dataset", name, split=next(iter(parts))),
        citation=citation(args.name or name, "dataset"),
        splits="\n".join(
            f"| {split} | {part.rows:,} | {len(part.records):,} | {part.num_patients} |"
            for split, part in parts.items()
        ),
        split_rule=f"{rule} {alone}",
        rates=_shares(part.rates for part in parts.values()),
        leads=_shares(part.leads for part in parts.values()),
        lengths=f"{' to '.join(lengths)} s",
        columns="\n".join(
            f"| `{column}` | {_type(kind)} | {COLUMNS.get(column, 'as its source says')} |"
            for column, kind in features.items()
        ),
        sources="\n\n".join([*args.source, licence]),
        made=" ".join(made),
    )
    card.save(path)


def _shares(counts: Iterable[Counter[str]]) -> str:
    total = sum(counts, Counter())
    if len(total) == 1:
        return next(iter(total))
    return ", ".join(f"{name} ({count / total.total():.1%})" for name, count in total.most_common(10))


def _type(feature: Any) -> str:
    if isinstance(feature, List):
        return f"list of {_type(feature.feature)}"
    return f"{{{', '.join(feature)}}}" if isinstance(feature, dict) else feature.dtype


def _too_few(questions: list[Question], shares: Sequence[float]) -> str | None:
    """A sentence about the splits that get no patients, though they have a share."""
    patients = {patient for question in questions for patient in question.patients}
    numbers = share_out(len(patients), shares)
    empty = [split for split, share, number in zip(SPLITS, shares, numbers, strict=True) if share > 0 and number == 0]
    if not empty:
        return None
    said = " ".join(f"{share:g}" for share in shares)
    return f"No patients for {', '.join(empty)}: {len(patients)} patients are too few for --shares {said}."


def build(args: argparse.Namespace) -> None:
    """Makes a dataset of records and questions, with its card, in a new folder."""
    for option in ("sampling_rate", "sampling_rate_of_files", "window", "stride"):
        value = getattr(args, option)
        if value is not None and not 0 < value < np.inf:
            raise ValueError(f"--{option} is {value:g}; expected a number above 0.")
    table = args.records / PTBXL_TABLE
    is_ptbxl = table.is_file()
    if args.metadata_columns and args.metadata is None and not is_ptbxl:
        raise ValueError("--metadata_columns are those of a table about the records; name it with --metadata.")
    if args.stride is not None and args.window is None:
        raise ValueError("--stride is from one window to the next; say with --window how long they are.")
    records = find_records(args.records, args.sampling_rate)
    left_out: dict[str, int] = {}
    found: Iterable[Question]
    if args.questions:
        found = (question for path in args.questions for question in read_questions(path, args.sort_answers))
        made = [f"The questions are those of {', '.join(f'`{path.name}`' for path in args.questions)}."]
        if args.sort_answers:
            made.append("Answers of several items are in alphabetical order.")
    elif is_ptbxl:
        found, left_out["records of no diagnostic superclass"] = superclass_questions(args.records)
        made = [
            "The questions are about PTB-XL's five diagnostic superclasses, by all diagnostic statements, however likely."
        ]
    else:
        raise ValueError(
            "What is asked about the records? Name a file with --questions; PTB-XL's own folder alone needs none."
        )
    questions, absent = choose_questions(found, records, args.question_types)
    left_out["questions whose records are not there"] = len(absent)
    if args.window is not None and any(len(question.records) > 1 for question in questions):
        raise ValueError("--window cuts single records, and there are questions that compare several; leave it out.")
    metadata: dict[str, dict[str, Any]] = defaultdict(dict)
    tables = [path for path in (table if is_ptbxl else None, args.metadata) if path is not None]
    for path in tables:
        for record, row in read_metadata(path, records, args.metadata_columns if path == tables[-1] else ()).items():
            metadata[record] |= row
    questions = with_patients(questions, metadata)
    split_by = args.split_by or default_split(questions, metadata)
    parts, number = split_questions(questions, split_by, metadata, args.shares, args.seed)
    if not parts:
        raise ValueError(f"No question is left: all {number} are about records of different splits.")
    left_out["questions whose records are in different splits"] = number
    too_few = _too_few(questions, args.shares) if split_by == "patient" else None
    if too_few:
        made.append(too_few)
    if args.join_questions:
        parts = {split: join_questions(part) for split, part in parts.items()}
        made.append("All questions about a record are one chat.")

    every = [question for part in parts.values() for question in part]
    several = any(len(question.records) > 1 for question in every)
    features = make_features(every, metadata, several, args.window is not None)
    reader = Reader(
        args.sampling_rate_of_files, args.unit, args.lead_names, args.sampling_rate, args.window, args.stride
    )
    unreadable: dict[str, str] = {}
    summaries = {split: Summary() for split in parts}
    with new_folder(args.output_dir) as folder:
        data = folder / "data"
        data.mkdir()
        for split, part in parts.items():
            read = read_records(in_order(part, args.seed), records, reader, args.num_proc)
            progress = tqdm(read, total=len(part), desc=split, unit="question")
            rows = make_rows(progress, metadata, features, unreadable if args.skip_unreadable else None)
            write_split(data, split, summaries[split].watch(rows), features)
        summaries = {split: summary for split, summary in summaries.items() if summary.rows}
        if not summaries:
            raise ValueError(
                f"None of the {len(unreadable)} records can be read. The first: {next(iter(unreadable.values()))}"
            )
        left_out["records that cannot be read, and their questions"] = len(unreadable)
        left_out = {name: number for name, number in left_out.items() if number}
        made += [f"Left out: {name} ({number:,})." for name, number in left_out.items()]
        if args.sampling_rate is not None:
            made.append(f"Records of other rates were resampled to {args.sampling_rate:g} Hz.")
        if args.window is not None:
            made.append(
                f"Each row is about {args.window:g} s of a record, of which one begins each "
                f"{args.window if args.stride is None else args.stride:g} s."
            )
        made.append(f"With elm-ecg {version('elm-ecg')} and datasets {version('datasets')}.")
        write_card(folder / "README.md", args, features, summaries, split_by, made)
        size = sum(file.stat().st_size for file in data.iterdir())
    for record, reason in unreadable.items():
        print(f"Cannot read {record}: {reason}")
    for name, number in left_out.items():
        print(f"Left out: {name} ({number:,})")
    if absent:
        names = list(dict.fromkeys(absent))
        print(f"Not there: {', '.join(names[:3])}{'...' if len(names) > 3 else ''}")
    for split, summary in summaries.items():
        print(
            f"{split:<11}{summary.rows:>10,} rows {len(summary.records):>9,} records {summary.num_patients:>9} patients"
        )
    if too_few:
        print(too_few)
    print(f"Split by {split_by}, {size / 1e6:,.1f} MB: dataset and card in {args.output_dir.resolve()}", flush=True)
