"""Datasets of chats about ECGs."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, List, Value, concatenate_datasets, load_dataset, load_from_disk

from training.arguments import DataArguments

logger = logging.getLogger(__name__)

COLUMNS = {
    "messages": "a list of turns with 'role' and 'content', beside 'ecg'",
    "ecg": "a dict with 'array', 'sampling_rate', 'lead_names' and 'unit', the path of a file, or a list of these",
}


def load_data(args: DataArguments, split: str, seed: int = 0) -> Dataset | None:
    """The rows of one split of all `args.data`, concatenated; None where no dataset has that split.

    Each row has `messages` (a chat of `role` and `content`) and `ecg` (a dict with `array` [leads, samples],
    `sampling_rate`, `lead_names` and `unit`, the path of a file, or a list of these).

    Raises:
        ValueError: if a dataset has other columns, or cannot be found.
    """
    return _mix([_load_split(name, split, "messages") for name in args.data], args.data_subset, seed)


def load_ecgs(args: DataArguments, split: str, seed: int = 0) -> Dataset | None:
    """The column `ecg` of the rows that `load_data` gives; no other column has to be there."""
    parts = [_load_split(name, split, "ecg") for name in args.data]
    return _mix([None if part is None else part.select_columns("ecg") for part in parts], args.data_subset, seed)


def _mix(loaded: list[Dataset | None], subset: float | None, seed: int) -> Dataset | None:
    parts = [part for part in loaded if part is not None]
    if not parts:
        return None
    if any(part.features != parts[0].features for part in parts):
        parts = [_any_shape(part) for part in parts]
    data = concatenate_datasets(parts)
    if subset is not None:
        data = data.shuffle(seed=seed).select(range(max(1, round(subset * len(data)))))
    # arrays as NumPy: lists of Python numbers would take longer to make than the ECG to process
    return data.with_format("numpy", columns=["ecg"], output_all_columns=True) if "ecg" in data.column_names else data


def _load_split(name: str, split: str, column: str) -> Dataset | None:
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        loaded = load_from_disk(path)
    elif path.exists() or name.count("/") == 1:
        loaded = load_dataset(str(path) if path.exists() else name)
    else:
        raise ValueError(f"No dataset {name!r}: expected a local folder or a Hub id such as owner/name.")
    splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)
    if split not in splits:
        logger.info("%s has no split %r; it has %s", name, split, ", ".join(splits))
        return None
    if column not in splits[split].column_names:
        raise ValueError(
            f"{name} ({split}) has the columns {splits[split].column_names}; expected {column!r}, {COLUMNS[column]}."
        )
    return splits[split]


def _any_shape(part: Dataset) -> Dataset:
    """Datasets of different record lengths, rates or number types have one type here, as concatenation demands."""
    ecg = part.features.get("ecg")
    several = isinstance(ecg, List)
    fields = ecg.feature if several else ecg
    if not isinstance(fields, dict):  # paths, or no ECG
        return part
    fields = {**fields, "array": List(List(Value("float32"))), "sampling_rate": Value("float32")}
    return part.cast_column("ecg", List(fields) if several else fields)


def ecgs_of(row: dict[str, Any]) -> list[Any]:
    """The ECGs of a row: none, one or several."""
    ecg = row.get("ecg")
    # several ECGs come out of `datasets` as an array of objects
    return list(ecg) if isinstance(ecg, list | tuple | np.ndarray) else [] if ecg is None else [ecg]


def to_chat(row: dict[str, Any], system_prompt: str | None = None, with_ecg: bool = True) -> list[dict[str, Any]]:
    """The chat of a row with its ECGs in place.

    Where the messages say `{"type": "ecg"}`, the row's ECGs stand there in their order; where they do not, all stand
    before the first user message, as in the reference.

    Args:
        with_ecg: False leaves the ECGs out and keeps the words.

    Raises:
        ValueError: if the messages have more or fewer places than the row has ECGs.
    """
    ecgs = ecgs_of(row)
    chat = [{"role": message["role"], "content": _parts(message["content"])} for message in row["messages"]]
    if not chat:
        raise ValueError(f"The row {row.get('record_id', '')} has no messages.")
    if system_prompt is not None and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": _parts(system_prompt)})

    places = [part for message in chat for part in message["content"] if part["type"] == "ecg"]
    if not places:
        first_user = next((message for message in chat if message["role"] == "user"), None)
        if ecgs and first_user is None:
            raise ValueError(f"The row {row.get('record_id', '')} has no user message to put its ECG in.")
        places = [{"type": "ecg"} for _ in ecgs]
        if first_user is not None:
            first_user["content"][:0] = places
    if len(places) != len(ecgs):
        raise ValueError(f"The messages have {len(places)} places for ECGs, but the row has {len(ecgs)} ECGs.")
    for place, ecg in zip(places, ecgs, strict=True):
        place["path" if isinstance(ecg, str) else "ecg"] = ecg
    if not with_ecg:
        for message in chat:
            message["content"] = [part for part in message["content"] if part["type"] != "ecg"]
    return chat


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(part) for part in content]
