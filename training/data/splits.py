"""Which split each question belongs to: as its file says, by PTB-XL's fold, or by patient."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from elm_ecg.training.data.arguments import SPLIT_RULES
from elm_ecg.training.data.questions import QuestionRow
from elm_ecg.training.data.schema import SPLITS
from elm_ecg.training.data.tables import identifier

Metadata = Mapping[str, Mapping[str, Any]]  # id of a record -> column -> value

# PTB-XL: fold 9 is for choosing, 10 for testing; the folds keep the records of a patient together
FOLDS = {**dict.fromkeys(range(1, 9), "train"), 9: "validation", 10: "test"}


def with_patients(questions: list[QuestionRow], metadata: Metadata) -> list[QuestionRow]:
    """The questions with the patient of each record, whether the questions or the metadata name it.

    Raises:
        ValueError: a record has two patients.
    """
    in_metadata = {record: row.get("patient_id") for record, row in metadata.items()}
    patients = {record: identifier(patient) for record, patient in in_metadata.items() if patient is not None}
    for question in questions:
        for record, patient in zip(question.records, question.patients, strict=True):
            if patient is not None and patients.setdefault(record, patient) != patient:
                raise ValueError(
                    f"The record {record} is of the patients {patients[record]} and {patient}; expected one."
                )
    return [replace(question, patients=tuple(map(patients.get, question.records))) for question in questions]


def default_split(questions: list[QuestionRow], metadata: Metadata) -> str:
    """`given` where each question has a split, else `fold` where each record has one, else `patient`."""
    if all(question.split is not None for question in questions):
        return "given"
    records = {record for question in questions for record in question.records}
    return "fold" if all(metadata.get(record, {}).get("strat_fold") for record in records) else "patient"


def split_questions(
    questions: list[QuestionRow], split_by: str, metadata: Metadata, shares: Sequence[float], seed: int
) -> tuple[dict[str, list[QuestionRow]], int]:
    """The questions of each split; and how many are left out, as their records are in different ones.

    Args:
        split_by: one of `SPLIT_RULES`.
        shares: of the patients, for `patient`.

    Raises:
        ValueError: a split, fold or patient is unknown, or a patient is in several of the given splits or folds.
    """
    if split_by not in SPLIT_RULES:
        raise ValueError(f"--split_by is {split_by!r}; expected one of {', '.join(SPLIT_RULES)}.")
    if split_by == "given":
        check_given(questions)
        splits: list[set[str | None]] = [{question.split} for question in questions]
    else:
        patients = dict(pair for q in questions for pair in zip(q.records, q.patients, strict=True))
        if split_by == "record":
            patients = dict(zip(patients, patients, strict=True))
        split_of = by_fold(patients, metadata) if split_by == "fold" else by_patient(patients, shares, seed)
        if split_by == "fold":
            check_apart(
                ((f"patient {patients[record]}", split) for record, split in split_of.items() if patients[record]),
                "folds",
            )
        splits = [{split_of[record] for record in question.records} for question in questions]
    # a question whose records are in different splits is in none
    parts = {
        split: [question for question, among in zip(questions, splits, strict=True) if among == {split}]
        for split in SPLITS
    }
    return {split: part for split, part in parts.items() if part}, len(questions) - sum(map(len, parts.values()))


def check_given(questions: list[QuestionRow]) -> None:
    """ValueError if a question has no split, or a patient (or record, where the patient is unknown) is in several."""
    without = next((question for question in questions if question.split is None), None)
    if without is not None:
        raise ValueError(
            f"A question about the record {without.records[0]} has no split; give each of them one in a column 'split', "
            "or choose --split_by patient or fold."
        )
    check_apart(
        (
            (f"record {record}" if patient is None else f"patient {patient}", str(question.split))
            for question in questions
            for record, patient in zip(question.records, question.patients, strict=True)
        ),
        "given splits",
    )


def check_apart(places: Iterable[tuple[str, str]], what: str) -> None:
    """ValueError if a patient or record is in several splits.

    Args:
        places: the patient or record, and its split.
        what: divides them.
    """
    splits = defaultdict(set)
    for name, split in places:
        splits[name].add(split)
    shared = [f"{name} ({', '.join(sorted(among))})" for name, among in splits.items() if len(among) > 1]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(splits)} are in several splits by the {what}: {', '.join(shared[:3])}. The test would be about "
            f"patients seen in training: choose --split_by patient or record, or correct the {what}."
        )


def by_fold(records: Iterable[str], metadata: Metadata) -> dict[str, str]:
    """Record -> split, by PTB-XL's `strat_fold`."""
    folds = {record: metadata.get(record, {}).get("strat_fold") for record in records}
    for record, fold in folds.items():
        if fold not in FOLDS:  # 9.0 is found as 9: equal numbers have equal hashes
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
    if abs(sum(shares) - 1) > 1e-6:  # 0.7 + 0.2 + 0.1 < 1
        raise ValueError(f"--shares is {' '.join(f'{share:g}' for share in shares)}; expected three that sum to 1.")
    unknown = [record for record, patient in patients.items() if patient is None]
    if unknown:
        raise ValueError(
            f"The patient of {len(unknown)} of {len(patients)} records is unknown, such as {', '.join(unknown[:3])}; "
            "--split_by patient expects a column patient_id in the questions or in the table of --metadata; --source knows the patients of "
            "public sets that name them. --split_by record divides records as if each were of another patient."
        )
    names = np.random.default_rng(seed).permutation(sorted({str(patient) for patient in patients.values()})).tolist()
    ends = np.cumsum(share_out(len(names), shares))  # where each split ends among the names
    split_of = {name: SPLITS[np.searchsorted(ends, index, side="right")] for index, name in enumerate(names)}
    return {record: split_of[str(patient)] for record, patient in patients.items()}


def share_out(num_patients: int, shares: Sequence[float]) -> list[int]:
    """How many of the patients each split has; few may leave one with none."""
    ends = [round(end * num_patients) for end in np.cumsum(shares)]  # ends are rounded, so that the parts sum to all
    return np.diff(ends, prepend=0).tolist()


def without_patients(questions: list[QuestionRow], shares: Sequence[float]) -> str | None:
    """A sentence about the splits that get no patients, though they have a share; None if there are no such splits."""
    patients = {patient for question in questions for patient in question.patients}
    numbers = share_out(len(patients), shares)
    empty = [split for split, share, number in zip(SPLITS, shares, numbers, strict=True) if share > 0 and number == 0]
    if not empty:
        return None
    wanted = " ".join(f"{share:g}" for share in shares)
    return f"No patients for {', '.join(empty)}: {len(patients)} patients are too few for --shares {wanted}."
