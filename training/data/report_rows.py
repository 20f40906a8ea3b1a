"""Rows of an ECG and its report, as chats in which nobody asks: what `elm sft --train_phase pretrain` learns."""

from typing import TYPE_CHECKING, Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset

from elm_ecg.training.data.loading import load_parts, mix, without_empty
from elm_ecg.training.data.record_rows import ANSWERS, each_once, report_of
from elm_ecg.training.data.reference import PLACEHOLDER
from elm_ecg.training.data.schema import MESSAGES

if TYPE_CHECKING:
    from elm_ecg.training.arguments import ELMArguments  # imports TRL, which takes seconds

COLUMNS = ("report", "text", ANSWERS)  # that may hold the reports, the first that is there
KEPT = ("ecg", "num_samples", "record_id", "patient_id")  # beside the report


def load_reports(
    args: "ELMArguments", split: str, seed: int = 0, num_proc: int | None = None, report_column: str | None = None
) -> Dataset | None:
    """The records of one split of all `args.data` with their reports; None where no dataset has that split.

    Each row has `ecg`, as of `load_data`, and `messages`: a user without words, and the report as the answer. Rows without a report
    are left out, and counted in the log.

    Args:
        report_column: as of `as_reports`.

    Raises:
        ValueError: as `load_parts` and `as_reports`.
    """
    parts = load_parts(args, split, "ecg", num_proc=num_proc)
    parts = [
        None if part is None else as_reports(part, name, report_column)
        for part, name in zip(parts, args.data, strict=True)
    ]
    return mix(parts, args, seed, weighted=split == "train")


def as_reports(part: Any, name: str, column: str | None = None) -> Any:
    """A dataset, whole or streamed, as rows of an ECG and its report.

    Args:
        column: a column of texts, of which each record has one report, that of its first row, but in a stream that of each row; or
            `messages`, whose answers are the report of each row. None: the first of `COLUMNS` that is there, where the chats of
            `messages` may have no questions, as those of bare texts.

    Raises:
        ValueError: there is no such column, it holds no texts, no row has a report, or a chat asks something.
    """
    names = part.column_names or []
    found = column or next((one for one in COLUMNS if one in names), None)
    if found not in names:
        raise ValueError(
            f"{name} has the columns {', '.join(names)}; expected reports in one of {', '.join(COLUMNS)}, or in the column that "
            "--report_column names. `elm data build --source` or --metadata_columns keeps reports."
        )
    kept = [one for one in KEPT if one in names]
    features = Features.from_arrow_schema(pa.schema({ANSWERS: MESSAGES}))
    options: dict[str, Any] = {
        "batched": True,
        "with_indices": True,
        "fn_kwargs": {"name": name, "column": found, "asks": column is not None},
        "remove_columns": [one for one in (found,) if one != ANSWERS],
    }
    if isinstance(part, IterableDataset):
        part = part.select_columns([*kept, found])
        if part.features is not None:  # JSON may not say
            features = Features({one: part.features[one] for one in kept} | features)
        return part.with_format("arrow").map(_with_chats, features=features, **options).with_format(None)
    # the texts alone are written anew: ECGs may be many gigabytes
    words = part.select_columns([found]).with_format("arrow").map(_with_chats, features=features, **options)
    part = datasets.concatenate_datasets([part.select_columns(kept), words.with_format(None)], axis=1)
    return without_empty(part if found == ANSWERS else each_once(part, name), name, "no report")


def _with_chats(table: pa.Table, indices: list[int], name: str, column: str, asks: bool) -> pa.Table:
    """Rows with their report as a chat, in place of its `column`; `asks`: whether a chat may have questions."""
    rows = table.select([column]).to_pylist()
    for row, index in zip(rows, indices, strict=True):
        if column == ANSWERS and not asks and (question := _question_in(row[ANSWERS])):
            raise ValueError(
                f"Row {index} of {name} asks {question[:60]!r}: an answer to a question is no report of the ECG. Name the column of "
                "reports with --report_column, or with --report_column messages take what is answered to all questions for reports."
            )
    chats = [
        [{"role": "user", "content": ""}, {"role": "assistant", "content": report_of(row, column)}] for row in rows
    ]
    return table.drop_columns([column]).append_column(ANSWERS, pa.array(chats, MESSAGES))


def _question_in(messages: Any) -> str:
    """The words of the user of a chat; none of a bare text."""
    contents = [turn.get("content") for turn in messages or () if turn.get("role") == "user"]
    parts = [part for content in contents for part in ([content] if isinstance(content, str) else content or ())]
    text = " ".join(part if isinstance(part, str) else part.get("text") or "" for part in parts)
    return PLACEHOLDER.sub("", text).strip()
