"""The records that a suite's chats are about: found in folders and archives, and put into the rows of a dataset."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from elm_ecg.ecg_formats_arrays import FACTS
from elm_ecg.ecg_utils import as_record
from elm_ecg.training.data.downloads import DOWNLOADS
from elm_ecg.training.data.questions import QuestionRow, choose_questions, count_absent
from elm_ecg.training.data.sources import Records, find_records, read_metadata, read_source
from elm_ecg.training.data.tables import read_table
from elm_ecg.training.evaluation.benchmarks.chats import Chat, Turn

logger = logging.getLogger(__name__)

# of a table about the records, beside what `read_metadata` always keeps
LABEL_COLUMNS = ("superclass", "subclass", "form", "rhythm")
MESSAGES = List({"role": Value("string"), "content": Value("string")})


@dataclass
class RecordPlaces:
    """The records of all places, of which the first counts where two have one of the same name.

    Args:
        about: record -> what its source and the table say of it.
        folders: in which files about the records may lie.
    """

    records: Records
    about: dict[str, dict[str, Any]]
    folders: list[Path] = field(default_factory=list)

    def file(self, name: str) -> Path | None:
        """A file of this name beside the records; None if there is none."""
        return next((folder / name for folder in self.folders if (folder / name).is_file()), None)


def read_places(places: Sequence[str], metadata: Path | None = None) -> RecordPlaces:
    """The records of folders of public sets as they are downloaded, of other folders, and of archives; see `find_records`.

    Args:
        metadata: a table about them, with `patient_id`, and for PTB-XL's labels `strat_fold` and `LABEL_COLUMNS`.

    Raises:
        ValueError: there are no records in one of them, or the table is not about any.
    """
    found = [_records_in(Path(place)) for place in places]
    locations: dict[str, Any] = {}
    about: dict[str, dict[str, Any]] = {}
    names: dict[str, set[str]] = {}
    for one in found:
        for record, location in one.locations.items():
            locations.setdefault(record, location)
            about.setdefault(record, dict(one.about.get(record, {})))
        for name, ids in one.names.items():
            names.setdefault(name, ids)

    def alias(name: str) -> str | None:
        return next((record for one in found if (record := one.find(name)) is not None), None)

    records = Records(locations, names, alias=alias)
    if metadata is not None:
        known = read_table(metadata)[0]
        columns = [name for name in LABEL_COLUMNS if name in known]
        for record, row in read_metadata(metadata, records, columns).items():
            about[record] |= row
    files = [*map(Path, places), *([metadata] if metadata else [])]
    folders = [path if path.is_dir() else path.absolute().parent for path in files]
    folders += [one.folder for one in found if one.folder is not None]
    return RecordPlaces(records, about, folders)


def _records_in(place: Path) -> Records:
    for source, download in DOWNLOADS.items():
        if place.is_dir() and any((place / marker).exists() for marker in download.markers):
            return read_source(source, place)
    return find_records(place)


@dataclass
class Asked:
    """The rows of a suite whose records are there.

    Args:
        data: `messages`, `ecg` (paths), `record_id`, `patient_id` and `question_type` (one for each answer).
        turns, chats: every turn in the order of the rows, and the row of each.
        left_out: what was left out -> how many.
    """

    data: Dataset
    turns: list[Turn]
    chats: list[int]
    left_out: dict[str, int]


def make_rows(suite_chats: Iterable[Chat], places: RecordPlaces, folder: Path, limit: int | None, seed: int) -> Asked:
    """The chats whose records are there, as rows of a dataset.

    Args:
        folder: where records that are in no file of their own, such as those of an archive, are written to be read from.
        limit: as many chats are drawn; None: all.

    Raises:
        ValueError: none of the records is there, or one of an archive cannot be read.
    """
    rows = (QuestionRow(chat.records, [], columns={"turns": chat.turns}) for chat in suite_chats)
    chosen, absent = choose_questions(rows, places.records)
    left_out = count_absent(absent)
    if limit is not None and limit < len(chosen):
        drawn = np.random.default_rng(seed).choice(len(chosen), limit, replace=False)
        left_out["chats that were not drawn (--limit)"] = len(chosen) - limit
        chosen = [chosen[index] for index in sorted(drawn.tolist())]
    files = _files_of(sorted({record for row in chosen for record in row.records}), places.records, folder)
    turns: list[Turn] = []
    chats: list[int] = []
    columns: dict[str, list[Any]] = {
        name: [] for name in ("messages", "ecg", "record_id", "patient_id", "question_type")
    }
    for number, row in enumerate(chosen):
        of_row: tuple[Turn, ...] = row.columns["turns"]
        turns += of_row
        chats += [number] * len(of_row)
        said = chain.from_iterable((("user", turn.question), ("assistant", turn.answer)) for turn in of_row)
        columns["messages"].append([{"role": role, "content": text} for role, text in said])
        columns["ecg"].append([files[record] for record in row.records])
        columns["record_id"].append(", ".join(row.records))
        known = (places.about.get(record, {}).get("patient_id") for record in row.records)
        # whose patient is unknown counts as a patient of its own
        columns["patient_id"].append(
            [
                f"record {record}" if patient is None else str(patient)
                for record, patient in zip(row.records, known, strict=True)
            ]
        )
        columns["question_type"].append([turn.question_type for turn in of_row])
    texts = List(Value("string"))
    types = {
        "messages": MESSAGES,
        "ecg": texts,
        "record_id": Value("string"),
        "patient_id": texts,
        "question_type": texts,
    }
    return Asked(
        Dataset.from_dict(columns, Features(types)), turns, chats, {what: n for what, n in left_out.items() if n}
    )


def _files_of(names: Sequence[str], records: Records, folder: Path) -> dict[str, str]:
    """The path of each record; those in memory are written into `folder`."""
    files: dict[str, str] = {}
    for number, name in enumerate(names):
        location = records.locations[name]
        if isinstance(location, Mapping):
            try:
                as_record(location)
            except ValueError as error:
                raise ValueError(
                    f"--records: the record {name!r} of an archive: {error} The archive says it of all its records in arrays named "
                    f"{', '.join(FACTS)}."
                ) from error
            path = folder / f"{number}.npz"
            facts = {"sampling_rate": 0, "lead_names": None, "unit": None} | dict(location)
            np.savez(path, **{key: value for key, value in facts.items() if value is not None})  # type: ignore[arg-type]
            location = path
        files[name] = str(location)
    return files
