"""The questions of an evaluation: each assistant turn, its patient, its candidate answers, and the ECG swapped in."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, List
from tqdm import tqdm

from elm_ecg.ecg_utils import as_record
from elm_ecg.training.data.loading import ecgs_of
from elm_ecg.training.data.paths import LazyECG
from elm_ecg.training.data.reference import PLACEHOLDER
from elm_ecg.training.data.schema import counted
from elm_ecg.training.evaluation.thinking import scored_answer

MAX_CANDIDATES = 50  # each is read by the model after every question


@dataclass
class Question:
    """One assistant turn of a row.

    Args:
        turn: its place among the messages of the row.
        question: the message before it.
        answer: the right one, which is what the assistant says.
        template: what the question is an instance of: the `template_id` of the row, else its words.
    """

    row: int
    turn: int
    question: str
    answer: str
    question_type: str
    patient_id: str
    template: str = ""


def list_questions(data: Dataset) -> list[Question]:
    """Every assistant turn of the data.

    `question_type` of a row is one string or a list with one for each of its answers; a row without `patient_id` counts
    as a patient of its own, and one about the ECGs of several patients as of the first of them.

    Raises:
        ValueError: a row has no messages, or an answer is empty.
    """
    # without the ECGs, which take longest to read
    columns = [name for name in ("messages", "question_type", "template_id") if name in data.column_names]
    patients = patients_of(data)
    questions = []
    for index, row in enumerate(data.with_format(None).select_columns(columns)):  # lists, not arrays
        kinds = row.get("question_type") or "all"
        kinds = kinds if isinstance(kinds, list) else [kinds]
        if not row["messages"]:
            raise ValueError(f"Row {index} has no messages.")
        answered = sum(message["role"] == "assistant" for message in row["messages"])
        types = iter(kinds if len(kinds) == answered else kinds[:1] * answered)  # one for each answer, or for all
        template = row.get("template_id")
        chat = [{**message, "content": _text(message["content"])} for message in row["messages"]]
        for turn, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            asked = (
                PLACEHOLDER.sub("", chat[turn - 1]["content"]) if turn else ""
            )  # of ECGs, which are not among the words
            answer = message["content"].strip()
            if not answer:
                raise ValueError(
                    f"Row {index} has an empty answer to {asked!r}, which no model could give; leave the row out."
                )
            named = asked if template is None else f"template {template}"
            questions.append(Question(index, turn, asked, answer, str(next(types)), patients[index][0], named))
    return questions


def without_thinking(questions: list[Question]) -> list[Question]:
    """The questions with what scores of their right answers, see `scored_answer`.

    Raises:
        ValueError: nothing does.
    """
    scored = [replace(one, answer=scored_answer(one.answer, one.answer)) for one in questions]
    for question, one in zip(questions, scored, strict=True):
        if not one.answer:
            raise ValueError(
                f"Row {one.row} has nothing to score in the answer {question.answer[-60:]!r} to {one.question!r}; leave the row out."
            )
    return scored


def digest(facts: Any) -> str:
    """SHA-256 of what can be written as JSON."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def digest_of_questions(questions: list[Question]) -> str:
    """A digest by which the same questions, with the same right answers, are known again."""
    return digest([list(vars(question).values()) for question in questions])  # a new field changes all digests


def fingerprint_of(data: Dataset, questions: list[Question]) -> str:
    """A digest of all that a model is shown of the data, and of what it is compared with: the questions, their right answers, all
    messages, the patients, and of every ECG its samples in millivolts, sampling rate and leads. Files count by what is read from
    them, not by their place; one that cannot be read counts as such.
    """
    of_rows: list[Any] = []
    known: dict[str | LazyECG, str] = {}  # path -> digest: a record may have many questions
    for row in tqdm(data, desc="Digest of the data", unit="row", disable=len(data) < 1000):
        of_ecgs = []
        for ecg in ecgs_of(row):
            if not isinstance(ecg, str | LazyECG):
                of_ecgs.append(digest_of_ecg(ecg))
                continue
            if ecg not in known:
                known[ecg] = digest_of_ecg(ecg)
            of_ecgs.append(known[ecg])
        turns = [[message["role"], _text(message["content"])] for message in row["messages"]]
        of_rows.append([turns, [_kinds(message["content"]) for message in row["messages"]], of_ecgs])
    return digest([digest_of_questions(questions), patients_of(data), of_rows])


def digest_of_ecg(ecg: Any) -> str:
    """A digest of the samples, sampling rate and leads of an ECG in any form; `unreadable` of one that cannot be read."""
    try:
        record = as_record(ecg)
    except (ValueError, OSError):  # asking says what is wrong; a model that reads no ECG is asked all the same
        return "unreadable"
    samples = hashlib.sha256(record.array.tobytes())
    samples.update(json.dumps([record.array.shape, float(record.sampling_rate), list(record.lead_names)]).encode())
    return samples.hexdigest()


def _kinds(content: Any) -> list[str]:
    """The types of the parts of a message: where its ECGs stand."""
    return [] if isinstance(content, str) else [part["type"] for part in content]


def _text(content: str | Sequence[dict[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def most_frequent_answers(questions: list[Question], training: list[Question]) -> list[str]:
    """For each question the answer that its template had most often in training; a template that was never asked
    takes that of its question type, or of all questions. Of equally frequent answers the first in the alphabet counts."""
    counts: dict[Any, Counter[str]] = defaultdict(Counter)
    for question in training:
        for key in ((question.question_type, question.template), question.question_type, None):
            counts[key][question.answer] += 1
    best = {key: min(answers, key=lambda answer: (-answers[answer], answer)) for key, answers in counts.items()}
    keys = [((q.question_type, q.template), q.question_type, None) for q in questions]
    return [next(best[key] for key in from_narrow_to_wide if key in best) for from_narrow_to_wide in keys]


def candidate_answers(
    questions: list[Question], training: list[Question], for_all: Sequence[str] | None, prefix: str = ""
) -> list[list[str]]:
    """The answers among which each question is to be decided, sorted.

    Args:
        training: their answers are candidates too, for the questions of the same type.
        for_all: candidates for every question instead.
        prefix: of options in messages; none, of arguments.

    Raises:
        ValueError: there is one candidate alone, more than `MAX_CANDIDATES`, or `for_all` lacks a right answer.
    """
    if for_all:
        candidates = sorted(set(for_all))
        if len(candidates) < 2:
            raise ValueError(f"{prefix}candidates {' '.join(for_all)}: expected at least two different answers.")
        for question in questions:
            if question.answer not in candidates:
                raise ValueError(
                    f"The right answer {question.answer!r} to {question.question!r} is none of the {prefix}candidates {', '.join(candidates)}."
                )
        return [candidates] * len(questions)
    by_type: dict[str, set[str]] = defaultdict(set)
    for question in [*training, *questions]:
        by_type[question.question_type].add(question.answer)
    asked = {question.question_type for question in questions}
    for kind in sorted(asked):
        if not 2 <= len(by_type[kind]) <= MAX_CANDIDATES:
            raise ValueError(
                f"Questions of the type {kind!r} have {counted(len(by_type[kind]), 'different answer')}; {prefix}score likelihood "
                f"decides among 2 to {MAX_CANDIDATES}. Give them as {prefix}candidates, or use {prefix}score generation."
            )
    of_type = {kind: sorted(by_type[kind]) for kind in asked}
    return [of_type[question.question_type] for question in questions]


def first_rows_of_records(data: Dataset | Sequence[Mapping[str, Any]]) -> list[int]:
    """For each row the first one about the same record, by `record_id`; a row that names none is by itself."""
    if isinstance(data, Dataset):
        names = data["record_id"] if "record_id" in data.column_names else [None] * len(data)
    else:
        names = [row.get("record_id") for row in data]
    first: dict[str, int] = {}
    return [first.setdefault(str(name), row) if name else row for row, name in enumerate(names)]


def patients_of(data: Dataset) -> list[tuple[str, ...]]:
    """The patients of each row's ECGs."""
    patients = data["patient_id"] if "patient_id" in data.column_names else [None] * len(data)
    groups = [patient if isinstance(patient, list) else [patient] for patient in patients]
    names = [tuple(str(patient) for patient in group if patient not in (None, "")) for group in groups]
    return [of_row or (f"row {row}",) for row, of_row in enumerate(names)]


def other_patients(patients: list[tuple[str, ...]], seed: int) -> np.ndarray:
    """For each row, with the patients of its ECGs, the index of a row of other patients, each used about as often as any other.

    Raises:
        ValueError: a row has no such other.
    """
    order = np.random.default_rng(seed).permutation(len(patients))
    others = np.empty(len(patients), dtype=int)
    for place, row in enumerate(order):  # the next of other patients, round a random circle
        following = (order[(place + step) % len(order)] for step in range(1, len(order)))  # round to the start
        other = next((other for other in following if not set(patients[other]) & set(patients[row])), None)
        if other is None:
            named = ", ".join(patients[row])
            raise ValueError(
                "There is one row alone, and so no other ECG to swap in."
                if len(patients) == 1
                else f"All {len(patients)} rows have an ECG of {counted(len(patients[row]), 'patient').split()[1]} {named}: no other "
                "ECG to swap in."
            )
        others[row] = other
    return others


def rows_to_swap(data: Dataset, seed: int) -> np.ndarray:
    """For each row the row that it takes ECGs from: of other patients, and as many ECGs. A row without ECG takes its own.

    Raises:
        ValueError: a row has no such other.
    """
    others = np.arange(len(data))
    patients, num_ecgs = patients_of(data), num_ecgs_of(data)
    for number in set(num_ecgs.tolist()) - {0}:  # rows without ECGs keep their own index
        rows = np.flatnonzero(num_ecgs == number)
        others[rows] = rows[other_patients([patients[row] for row in rows], seed)]
    return others


def num_ecgs_of(data: Dataset) -> np.ndarray:
    """How many ECGs each row has, [rows], without reading any."""
    if "ecg" not in data.column_names:
        return np.zeros(len(data), dtype=int)
    tables = data.select_columns("ecg").with_format("arrow").iter(1000)  # as Arrow, no signal is decoded
    columns = [table["ecg"] for table in tables]
    if isinstance(data.features["ecg"], List):
        return np.concatenate([pc.list_value_length(column).fill_null(0) for column in columns])
    return np.concatenate([pc.is_valid(column) for column in columns]).astype(int)
