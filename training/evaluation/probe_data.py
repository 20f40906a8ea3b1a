"""The labelled records of a dataset for a probe: each record once, with its patient, and the draws of training patients."""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.data.labels import FLAGS, read_labels, tidied
from elm_ecg.training.data.loading import check_fold, ecgs_of, load_split, load_splits, with_arrays
from elm_ecg.training.data.schema import SPLITS, as_list, counted
from elm_ecg.training.evaluation.probe_results import UNKNOWN
from elm_ecg.training.evaluation.questions import list_questions, num_ecgs_of, patients_of

logger = logging.getLogger(__name__)

LABELS_COLUMN = "labels"  # as `elm data build --no_questions --source` writes it


@dataclass
class Records:
    """The labelled records of a split.

    Args:
        parts: the datasets that they are rows of.
        places: [records, 2], the part and the row of each.
        record_ids, patients: a name of each.
        labels: int8 [records, labels], 1 where a record has a label, 0 where it has not, `UNKNOWN` where nobody knows.
    """

    parts: list[Dataset]
    places: np.ndarray
    record_ids: list[str]
    patients: list[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def ecgs(self, start: int, stop: int) -> list[Any]:
        """The ECGs of some records, in any form that `as_record` takes."""
        rows = (self.parts[part][int(row)] for part, row in self.places[start:stop])
        return [ecgs_of(row)[0] for row in rows]


@dataclass
class ProbeData:
    """The splits of a probe, and their labels.

    Args:
        labels: names, in the order of the columns of `Records.labels`.
        left_out: what was left out -> how many, or which.
    """

    splits: dict[str, Records]
    labels: list[str]
    left_out: dict[str, str] = field(default_factory=dict)


def load_records(
    names: Sequence[str],
    label_columns: Sequence[str] | None = None,
    min_records: int = 10,
    fold: int | None = None,
    ecg_root: str | None = None,
) -> ProbeData:
    """The labelled records of datasets with the splits train, validation and test.

    The labels are in `label_columns`, as `read_labels` takes them; in the column `labels`, where none are named; or where there is
    no such column, they are what questions with the answers yes and no ask for (`attribute` of a row, else its `question_type`).

    Args:
        min_records: that a label needs in the training split, with it and without it.

    Raises:
        ValueError: as `load_split`; a split or column is not there; no record has labels, or no label enough records; the training
            split is of one patient.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"--data {' '.join(names)} names one twice.")
    stored = {name: load_splits(name) for name in names}
    check_fold(fold, stored)
    left_out: dict[str, int] = defaultdict(int)
    parts = {
        split: [
            with_arrays(part)
            for name in names
            if (part := load_split(name, split, "ecg", fold, ecg_root, stored[name])) is not None
        ]
        for split in SPLITS
    }
    for split, of_split in parts.items():
        if not of_split:
            raise ValueError(
                f"--data {' '.join(names)} has no split {split!r}. A probe learns from train, chooses on validation and is scored on test: "
                "`elm data build --shares 0.8 0.1 0.1` makes all three."
            )
    in_columns = label_columns is not None or all(
        LABELS_COLUMN in part.column_names for of_split in parts.values() for part in of_split
    )
    if in_columns:
        found = _of_columns(parts, label_columns or [LABELS_COLUMN], left_out)
    else:
        _demand_questions(parts)
        found = {split: _of_questions(of_split) for split, of_split in parts.items()}
    # a column says of every record whether it has a label; questions are asked about some
    otherwise = 0 if in_columns else UNKNOWN
    kept = {split: _one_each(split, parts[split], found[split], left_out) for split in SPLITS}
    names_of_labels = sorted({label for rows in kept.values() for _, _, of_record in rows for label in of_record})
    splits = {split: _as_records(parts[split], kept[split], names_of_labels, otherwise) for split in SPLITS}
    data = ProbeData(splits, names_of_labels, {what: f"{number:,}" for what, number in left_out.items() if number})
    for split, records in splits.items():
        if not len(records):
            raise ValueError(f"No record of the split {split!r} has labels; name the columns with --label_columns.")
    if (count := len(set(splits["train"].patients))) < 2:
        raise ValueError(f"The split 'train' has {count} patient; expected at least two, of whom shares are drawn.")
    for split in ("validation", "test"):
        if both := {*splits["train"].patients} & {*splits[split].patients}:
            logger.warning(
                "%s are in the split 'train' and in %r: what is learnt of them is not new there. `elm data check` lists them.",
                counted(len(both), "patient"),
                split,
            )
    return _enough(data, min_records)


Known = dict[str, bool]  # label -> whether a record has it


def _demand_questions(parts: dict[str, list[Dataset]]) -> None:
    """ValueError unless all datasets have questions of named types."""
    for part in (part for of_split in parts.values() for part in of_split):
        if not {"messages", "question_type"} <= set(part.column_names):
            raise ValueError(
                f"--data has no column {LABELS_COLUMN!r}, and no questions with a question_type; name the columns that say what each "
                f"record has with --label_columns. There are {', '.join(part.column_names)}."
            )


def _of_columns(
    parts: dict[str, list[Dataset]], columns: Sequence[str], left_out: dict[str, int]
) -> dict[str, dict[tuple[int, int], Known]]:
    cells: dict[Any, dict[str, Any]] = {}
    for split, of_split in parts.items():
        for number, part in enumerate(of_split):
            for column in columns:
                if column not in part.column_names:
                    raise ValueError(
                        f"--label_columns {column}: the split {split!r} of --data has no such column."
                        f"{did_you_mean(column, part.column_names)} It has {', '.join(part.column_names)}."
                    )
            rows = part.select_columns(list(columns)).with_format(None)
            cells |= {(split, number, index): row for index, row in enumerate(rows)}
    found: dict[str, dict[tuple[int, int], Known]] = {split: {} for split in parts}
    # the columns of all splits at once: whether a column holds 0 and 1 has to be the same in each
    labels: Mapping[Any, Any] = read_labels(cells, columns)
    for (split, number, index), row in labels.items():
        if row["labels"] is None:
            left_out["rows without labels"] += 1
            continue
        found[split][number, index] = dict.fromkeys(tidied(row["labels"]), True)
    return found


def _of_questions(parts: list[Dataset]) -> dict[tuple[int, int], Known]:
    """What the answers yes and no say; a label about which one row says both is unknown."""
    found: dict[tuple[int, int], Known] = {}
    for number, part in enumerate(parts):
        attributes = part.with_format(None)["attribute"][:] if "attribute" in part.column_names else [None] * len(part)
        answers_before: Counter[int] = Counter()  # of each row
        for question in list_questions(part):
            asked = attributes[question.row]
            if isinstance(asked, list) and asked and isinstance(asked[0], list | None):  # one for each answer
                asked = asked[answers_before[question.row]]
            answers_before[question.row] += 1
            answer = question.answer.strip().rstrip(".").lower()
            if answer in ("yes", "no"):
                label = asked[0] if isinstance(asked, list) and len(asked) == 1 else question.question_type
                _add(found.setdefault((number, question.row), {}), {str(label): FLAGS[answer]})
    return found


def _add(known: dict[str, Any], more: dict[str, Any]) -> None:
    """Takes over what is known more; None of a label of which both yes and no were said."""
    for label, has in more.items():
        known[label] = has if known.get(label, has) is has else None


def _one_each(
    split: str, parts: list[Dataset], found: dict[tuple[int, int], Known], left_out: dict[str, int]
) -> list[tuple[tuple[int, int], tuple[str, str], dict[str, Any]]]:
    """The place, the names of record and patient, and the labels of each record; of rows about one record the first stands for all."""
    records: dict[Any, tuple[tuple[int, int], tuple[str, str], dict[str, Any]]] = {}
    for number, part in enumerate(parts):
        num_ecgs = num_ecgs_of(part)
        for row, (name, patients) in enumerate(zip(_names_of(part), patients_of(part), strict=True)):
            if (known := found.get((number, row))) is None:
                continue
            if num_ecgs[row] != 1:
                left_out["rows with other than one ECG"] += 1
                continue
            # a record of nobody knows whom is of a patient of its own
            patient = f"{split} {number} {patients[0]}" if patients[0] == f"row {row}" else patients[0]
            key = (number, name or row)
            records.setdefault(key, ((number, row), (str(name[0] if name else row), patient), {}))
            _add(records[key][2], known)
    return list(records.values())


def _names_of(part: Dataset) -> Iterator[tuple[Any, ...] | None]:
    """What tells the record of each row from others: `record_id`, and of a window `start_second`; None where it has no name."""
    columns = [name for name in ("record_id", "start_second") if name in part.column_names]
    if "record_id" not in columns:
        yield from [None] * len(part)
        return
    for row in part.select_columns(columns).with_format(None):
        record = as_list(row["record_id"])
        yield None if record == [None] else (*map(str, record), row.get("start_second"))


def _as_records(parts: list[Dataset], rows: list[Any], labels: list[str], otherwise: int) -> Records:
    column_of = {label: column for column, label in enumerate(labels)}
    matrix = np.full((len(rows), len(labels)), otherwise, dtype=np.int8)
    for index, (_, _, known) in enumerate(rows):
        for label, has in known.items():
            matrix[index, column_of[label]] = UNKNOWN if has is None else has
    places = np.array([place for place, _, _ in rows], dtype=np.int64).reshape(-1, 2)
    return Records(parts, places, [names[0] for _, names, _ in rows], [names[1] for _, names, _ in rows], matrix)


def _enough(data: ProbeData, min_records: int) -> ProbeData:
    """The data without the labels of which a split shows too little."""
    kept, rare, one_sided = [], [], []
    for column, label in enumerate(data.labels):
        counts = {split: _counts(records.labels[:, column]) for split, records in data.splits.items()}
        if min(counts["train"]) < min_records:
            rare.append(label)
        elif min(counts["test"]) < 1 or min(counts["validation"]) < 1:
            one_sided.append(label)
        else:
            kept.append(column)
    if not kept:
        raise ValueError(
            f"None of the {len(data.labels)} labels can be probed ({', '.join(data.labels[:5])}): each needs {min_records} training records "
            "with it and as many without (--min_records), and one of each in validation and test."
        )
    left_out = dict(data.left_out)
    for what, names in (
        (f"labels of fewer than {min_records} training records with or without them (--min_records)", rare),
        ("labels that all or no records of validation or test have", one_sided),
    ):
        if names:
            left_out[what] = ", ".join(names)
    for records in data.splits.values():
        records.labels = records.labels[:, kept]
    return ProbeData(data.splits, [data.labels[column] for column in kept], left_out)


def _counts(labels: np.ndarray) -> tuple[int, int]:
    return int((labels == 0).sum()), int((labels == 1).sum())


def draw_patients(
    patients: Sequence[str], shares: Sequence[float], num_draws: int, seed: int
) -> dict[float, list[np.ndarray]]:
    """For each share of the patients the records of `num_draws` random draws, as rising indices; of all patients one draw.

    Each draw is one random order of the patients, of which a share is the beginning: a larger share holds the smaller ones.

    Raises:
        ValueError: a share is of no patient.
    """
    unique, numbers = np.unique(np.array(patients, dtype=str), return_inverse=True)
    orders = [np.random.default_rng([seed, draw]).permutation(len(unique)) for draw in range(num_draws)]
    drawn = {}
    for share in shares:
        number = round(share * len(unique))
        if number < 1:
            raise ValueError(
                f"--shares {share:g} of {len(unique)} training patients is none; the least share is {1 / len(unique):.2g}."
            )
        chosen = orders[: 1 if number == len(unique) else None]
        drawn[share] = [np.flatnonzero(np.isin(numbers, order[:number])) for order in chosen]
    return drawn
