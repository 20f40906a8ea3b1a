"""Rows of records without questions, each record once, with what a report says of it: what an encoder is pretrained on."""

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, List

from elm_ecg.training.data.loading import load_parts, mix
from elm_ecg.training.data.schema import counted

if TYPE_CHECKING:
    from elm_ecg.training.arguments import DataArguments  # imports TRL, which takes seconds

logger = logging.getLogger(__name__)

ANSWERS = "messages"  # the report column of datasets whose answers are reports, as the reference's pretrain-mimic


def load_records(
    args: "DataArguments", split: str, seed: int = 0, report_column: str | None = None, num_proc: int | None = None
) -> Dataset | None:
    """The records of one split of all `args.data`, each once; None where no dataset has that split.

    Each row has `ecg`, as of `load_data`, and what there is of `record_id`, `patient_id` and the report. Several rows of one dataset
    are of one record where their `ecg` names the same file, or where it is there itself and they have the same `record_id`; the
    first of them counts.

    Args:
        report_column: a column of texts, or `messages`, whose answers are the report; None: no report is read.

    Raises:
        ValueError: as `load_parts`; rows hold several ECGs, or no dataset has that column.
    """
    parts = load_parts(args, split, "ecg", num_proc=num_proc)
    if report_column is not None:
        _check_reports(parts, args, split, report_column)
    parts = [None if part is None else each_once(part, name) for part, name in zip(parts, args.data, strict=True)]
    names = ["ecg", "num_samples", "record_id", "patient_id", report_column]
    parts = [
        None if part is None else part.select_columns([name for name in names if name in part.column_names])
        for part in parts
    ]
    return mix(parts, args, seed, weighted=split == "train")


def _check_reports(parts: list[Any], args: "DataArguments", split: str, column: str) -> None:
    there = [part for part in parts if part is not None]
    if there and not any(column in part.column_names for part in there):
        names = ", ".join(sorted({name for part in there for name in part.column_names}))
        raise ValueError(
            f"--report_column {column}: {' '.join(args.data)} ({split}) has no such column; it has {names}. `elm data build --source` or "
            "--metadata_columns keeps reports."
        )


def each_once(part: Dataset, name: str) -> Dataset:
    """The first row of each record, without rows that have no ECG."""
    if isinstance(part.features["ecg"], List):
        raise ValueError(
            f"The rows of {name} hold lists of ECGs, as questions that compare several do; expected one in each row: build it with "
            "`elm data build --no_questions`."
        )
    table = part.with_format("arrow")
    ecgs = table.select_columns(["ecg"])[:]["ecg"]
    kept = np.flatnonzero(ecgs.is_valid().to_numpy())
    # by the file that rows name, or by the name of the record
    column = ecgs if pa.types.is_string(ecgs.type) else None
    if column is None and "record_id" in part.column_names:
        column = table.select_columns(["record_id"])[:]["record_id"]
    if column is not None:
        names = column.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()[kept]
        first = np.unique(names[names >= 0], return_index=True)[1]
        # rows without a name are each of a record of their own
        kept = np.sort(np.concatenate([kept[names >= 0][first], kept[names < 0]]))
    if len(kept) == len(part):
        return part
    logger.info("%s: %s of %s", name, counted(len(kept), "record"), counted(len(part), "row"))
    return part.select(kept)


def report_of(row: dict[str, Any], column: str | None) -> str:
    """What is said of the record of a row: the text of a column, or the answers of its chat; empty where nothing is."""
    value = row.get(column) if column is not None else None
    if column == ANSWERS and value is not None:
        texts = (turn.get("content") for turn in value if turn.get("role") == "assistant")
        value = " ".join(text for text in texts if isinstance(text, str))
    if value is not None and not isinstance(value, str):
        raise ValueError(
            f"The {column} of the row {row.get('record_id', '')} is a {type(value).__name__}; expected a text: name a column of texts with "
            "--report_column."
        )
    return (value or "").strip()
