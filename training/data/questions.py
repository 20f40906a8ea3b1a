"""Questions about records: those of a table, or of a text set as its authors publish it; and the records that they mean."""

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elm_ecg.training.data.reference import PLACEHOLDER, ROLE_NAMES
from elm_ecg.training.data.schema import SPLITS, as_list
from elm_ecg.training.data.sources import Records
from elm_ecg.training.data.tables import (
    CHAT_COLUMNS,
    QUESTION_COLUMNS,
    RECORD_COLUMNS,
    TABLES,
    demand,
    identifier,
    iter_table,
    renamed,
    table_file,
    value_of,
)

# as the questions' files and folders spell them
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# set -> how texts name a record of it, up to the end of the name or its first dash or dot, and how files do; the groups are
# other names of the record, the most specific first
PUBLISHED = {
    name: re.compile(rf"(?:^|/)(?:{pattern})(?:[-.][^/]*)?$")
    for name, pattern in {
        "PTB-XL": r"((?:records[15]00/\d+/)?(0*(\d+)_[hl]r))",
        "MIMIC-IV-ECG": r"(?:mimic[^/]*/(?:.*/)?)?(files/p\d+/p\d+/s\d+/(\d+))|mimic[^/]*/(?:.*/)?(\d{8})",
        "CODE-15%": r"code[-_]?15[^/]*/(?:.*/)?(\d+)|exams_part\d+(?:\.hdf5)?#(\d+)",
        "the PhysioNet Challenges": r"((?:A|Q|I|S|HR|E|JS)\d{4,5})",  # CPSC, CSN, Georgia and others
    }.items()
}
SAME_NUMBERS = ("PTB-XL", "CODE-15%")  # sets whose records share their numbers, from 1 on
NAMED_BEGINNINGS = 5  # of the records that are not there, by which they are counted
IMAGE_COLUMNS = ("image_path", "image")
_IMAGE = re.compile(r"\b(?:(?:ecg|ekg|electrocardiogram)\s+)?image(s?)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """A chat about one record or several, from which the rows of a dataset are built; rows may share their values."""

    records: tuple[str, ...]  # their names in the questions' file; after `choose_questions` their ids
    messages: list[dict[str, str]]
    split: str | None = None
    patients: tuple[str | None, ...] = (None,)  # of each record, None where unknown
    columns: Mapping[str, Any] = field(default_factory=dict)  # further ones of the file


def read_questions(
    source: str | Path | Iterable[Any],
    sort_answers: bool = False,
    names: Mapping[str, str] | None = None,
    elsewhere: Iterable[str] = (),
) -> Iterator[QuestionRow]:
    """The questions of a file, of all tables in a folder, or of a list of rows (dicts) and paths.

    A row names the record, or a list of them, in one of `RECORD_COLUMNS`; has a `question` and an `answer`, of which a list
    is joined with "; ", or a chat in one of `CHAT_COLUMNS`, whose turns are of `role` and `content` or of `from` and `value`;
    and may have `patient_id` and `split`. The split may also be the name of the file, or of the folder inside the path that
    it is in. Placeholders such as `<ecg>` and `<image>` are taken out. Where a row has its ECG as a picture too, in `image` or
    `image_path`, the word image becomes ECG, as that is what a model is shown here.

    The files of these have such rows: ECG-QA (Oh et al. 2023, https://arxiv.org/abs/2306.15681), ECG-Chat, PULSE (ECGInstruct
    and ECGBench), GEM (ECG-Grounding), ECG-R1, and OpenTSLM's ECG-QA with chains of thought.

    Args:
        sort_answers: sort the items of an answer that is a list. ECG-QA has them in any order, for equal questions too.
        names: our name of a column -> its name in the source, where it is another.
        elsewhere: those of our names that need not be there, as another table has them.

    Raises:
        ValueError: a row lacks its record or a text, or has another split.
    """
    for where, row, split in _question_rows(source, names or {}, frozenset(elsewhere)):
        try:
            yield _question(row, split, sort_answers)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _question_rows(
    source: str | Path | Iterable[Any], names: Mapping[str, str], elsewhere: frozenset[str]
) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
    """Where each row stands, the row, and the split that the name of its file or folder says."""
    if not isinstance(source, str | Path):
        for number, part in enumerate(source, 1):
            if isinstance(part, Mapping):
                demand((theirs for ours, theirs in names.items() if ours not in elsewhere), part, f"Question {number}")
                yield f"Question {number}", renamed(part, names), None
            else:
                yield from _question_rows(part, names, elsewhere)
        return
    path = Path(source)
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in TABLES and file.name[0] not in ".~")
    if not files or not table_file(files[0])[0].is_file():
        raise ValueError(f"No questions at {path}: expected a file ({', '.join(TABLES)}), or a folder of these.")
    for file in files:
        # folders above `path` say nothing about the split
        stems = (table_file(file)[0].stem, file.relative_to(path).parent.name)
        split = next((name for name in stems if name.lower() in SPLIT_NAMES), None)
        for number, row in enumerate(iter_table(file, names=names, elsewhere=elsewhere), 1):
            yield f"{file}, row {number}", row, split


def _question(row: Mapping[str, Any], split: str | None, sort_answers: bool) -> QuestionRow:
    records, patients = _records_of(row), listed_cell(row.get("patient_id"))
    if len(patients) not in (1, len(records)):  # one patient may stand for all of its records
        raise ValueError(f"It has {len(patients)} patients and {len(records)} records; expected a patient for each.")
    split = row.get("split") or split
    if split is not None and str(split).lower() not in SPLIT_NAMES:
        raise ValueError(f"Its split is {split!r}; expected {', '.join(SPLITS)}.")
    patient_ids = tuple(None if patient is None else identifier(patient) for patient in patients)
    # names of columns and types of questions repeat in millions of rows: `intern` keeps one of each
    columns = {
        sys.intern(name): sys.intern(value) if isinstance(value, str) else value
        for name, value in row.items()
        if name not in QUESTION_COLUMNS
    }
    return QuestionRow(
        records=records,
        messages=_messages(row, sort_answers),
        split=None if split is None else SPLIT_NAMES[str(split).lower()],
        patients=patient_ids if len(patient_ids) == len(records) else patient_ids * len(records),  # one for all
        columns=columns,
    )


def _records_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    for name in RECORD_COLUMNS:
        if value_of(row, name) is None:
            continue
        parts = [part.get("path") if isinstance(part, Mapping) else part for part in listed_cell(value_of(row, name))]
        if all(isinstance(part, str | int | float) and str(part).strip() for part in parts):  # no arrays or bytes
            return tuple(map(identifier, parts))
    unnamed = next((name for name in RECORD_COLUMNS if value_of(row, name) is not None), None)
    if unnamed is not None:
        raise ValueError(
            f"Its {unnamed} is {str(value_of(row, unnamed))[:60]!r}, which names no record; expected the name, number or path of one. "
            "--columns record=NAME says that it is in another column."
        )
    raise ValueError(
        f"It has the columns {', '.join(row)}; expected its record in one of {', '.join(RECORD_COLUMNS)}. --columns record=NAME "
        "says that it is in another."
    )


def listed_cell(cell: Any) -> list[Any]:
    """A value as a list; in CSV, lists are written as JSON, or as Python prints them."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = json.loads(cell)
        except RecursionError as error:
            raise ValueError(f"a cell that begins with {cell[:20]!r} is nested too deeply") from error
        except ValueError as error:
            try:
                cell = ast.literal_eval(cell)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                raise ValueError(f"a cell that begins with {cell[:20]!r} is no list in JSON ({error})") from error
    return as_list(cell) or [cell]


def _messages(row: Mapping[str, Any], sort_answers: bool = False) -> list[dict[str, str]]:
    column = next((name for name in CHAT_COLUMNS if row.get(name) is not None), None)
    if column is not None:
        turns = listed_cell(row[column])
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
    has_image = any(row.get(name) is not None for name in IMAGE_COLUMNS)
    messages = [_turn(turn, has_image) for turn in turns]
    if not {"user", "assistant"} <= {turn["role"] for turn in messages}:
        raise ValueError("Its messages lack a question or an answer; expected turns of user and assistant.")
    return messages


def _turn(turn: Any, has_image: bool) -> dict[str, str]:
    said = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    role = ROLE_NAMES.get(str(said).lower())
    if role is None:
        raise ValueError(
            f"{turn!r} is no turn; expected a role ({', '.join(ROLE_NAMES)}) and its content, or these in 'from' and 'value'."
        )
    content = turn.get("content", turn.get("value"))
    # patterns take their time on long texts, of which most have nothing to be replaced
    text = "" if content is None else str(content)
    text = PLACEHOLDER.sub("", text).strip() if "<" in text else text.strip()
    # numbers may be answers, JSON's true and false not; of what the user says, the ECG alone may be left
    if (
        isinstance(content, bool)
        or not isinstance(content, str | int | float)
        or not (text or (role == "user" and str(content).strip()))
    ):
        raise ValueError(f"What the {said} says is {content!r}; expected a text.")
    if has_image and "image" in text.lower():
        text = _IMAGE.sub(r"ECG\1", text)
    return {"role": role, "content": text}


def candidates(name: str) -> list[str]:
    """The names by which a record may be found that a text calls `name`, the most specific first.

    Published texts name files that others made of the records, or lay their folders elsewhere: `mimic_v4/files/p1000/p10000032/
    s40689238/40689238-0.png` is also `files/p1000/p10000032/s40689238/40689238` and `40689238`, `ptb-xl/.../00017_hr-0.png` also
    `00017_hr` and `17`, `code15/99` also `99`.
    """
    matches = (pattern.search(name) for pattern in PUBLISHED.values())
    groups = next((match.groups() for match in matches if match), ())
    return list(dict.fromkeys([name, *filter(None, groups)]))


def set_of(name: str) -> str | None:
    """The set of recordings that the name of a record, or the path of its file, is of; None where it does not tell."""
    return next((source for source, pattern in PUBLISHED.items() if pattern.search(name)), None)


class _Finder:
    """Finds records by the names that texts give them."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.by_number: dict[str, str] = {}  # set -> a name of it of which the number alone was found

    def find(self, name: str) -> str | None:
        """The id of a record; None where it is not there.

        Raises:
            ValueError: several records have that name, or records of two sets would be the same.
        """
        if (record := self.records.find(name)) is not None:
            return record
        for candidate in candidates(name)[1:]:
            record = self.records.find(candidate)
            if record is None:
                continue
            location, source = self.records.locations[record], set_of(name)
            found = set_of(str(location)) if isinstance(location, str | Path) else None
            if found is None and source in SAME_NUMBERS and candidate.isdigit():
                self.by_number.setdefault(source, name)
                if len(self.by_number) > 1:
                    listed = " and ".join(f"{name} of {source}" for source, name in self.by_number.items())
                    raise ValueError(
                        f"The questions name {listed}: records of two sets, of which the numbers alone are found. Name the "
                        "folder of one of them as it is published, or give only the questions about one."
                    )
            if found in (None, source):
                return record
        return None


def choose_questions(
    questions: Iterable[QuestionRow], records: Records, question_types: Sequence[str] | None = None
) -> tuple[list[QuestionRow], list[str]]:
    """The questions whose records exist, with the ids of these; and for each other question the name of a missing record.

    Args:
        question_types: patterns of the `question_type` that are kept; None for all.

    Raises:
        ValueError: no question is left, or a name means several records.
    """
    finder = _Finder(records)
    fits: dict[str, bool] = {}  # type -> whether it is kept
    chosen, absent = [], []
    for question in questions:
        kind = str(question.columns.get("question_type"))  # "None" where it has none
        if kind not in fits:
            fits[kind] = question_types is None or any(fnmatchcase(kind, pattern) for pattern in question_types)
        if not fits[kind]:
            continue
        ids = [finder.find(name) for name in question.records]
        if None in ids:
            absent.append(question.records[ids.index(None)])
        else:
            # a copy only where the id is another name: there may be millions
            same = ids == list(question.records)
            chosen.append(question if same else replace(question, records=tuple(map(str, ids))))
    if question_types is not None and not any(fits.values()):
        raise ValueError(f"--question_types {' '.join(question_types)} fits none of {', '.join(sorted(fits))}.")
    if not chosen:
        raise ValueError(
            f"None of the {len(absent)} questions is about one of the {len(records.locations)} records: the questions name "
            f"{', '.join(absent[:3])}, and the records are {', '.join(list(records.locations)[:3])}... Records are named by their "
            "path in the folder, with or without suffix, or by their id in the archive."
        )
    return chosen, absent


def count_absent(names: Iterable[str]) -> dict[str, int]:
    """What is left out of the questions whose records are not there -> how many, by the folder with which the records' names begin."""
    counts = Counter(name.lstrip("./").partition("/")[0] if "/" in name else "" for name in names)
    most = dict(counts.most_common(NAMED_BEGINNINGS if len(counts) > NAMED_BEGINNINGS else None))
    text = "questions whose records are not there"
    left_out = {f"{text}, named {front}/..." if front else text: number for front, number in most.items()}
    if rest := counts.total() - sum(most.values()):
        left_out[f"{text}, with other names"] = rest
    return left_out
