"""Datasets of chats about ECGs, from the Hub or local folders, whole or streamed."""

import logging
import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, IterableDatasetDict, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.formatting import NumpyFormatter, _register_formatter
from huggingface_hub import snapshot_download

from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord, as_record
from elm_ecg.training.data import records
from elm_ecg.training.data.paths import confined_rows, split_segment
from elm_ecg.training.data.reference import OWNER, PLACEHOLDER, from_reference, is_key, is_reference
from elm_ecg.training.data.reference_files import SAMPLING_RATE, Segment
from elm_ecg.training.data.schema import ECG, LITERALS, MESSAGES, RECORDS, ROLES, WORK, as_list

if TYPE_CHECKING:
    from elm_ecg.training.arguments import DataArguments  # imports TRL, which takes seconds

logger = logging.getLogger(__name__)

COLUMNS = {
    "messages": "a list of turns with 'role' and 'content', beside 'ecg'",
    "ecg": "a dict with 'array', 'sampling_rate', 'lead_names' and 'unit', the path of a file, or a list of these",
}
# datasets whose columns differ in type get these columns and types before they are mixed; ECGs are lists of `_ECG`, which
# holds either the path of a file or an array, whose values float32 takes exactly
_ECG = pa.struct(
    {**{member.name: member.type for member in ECG}, "array": pa.list_(pa.list_(pa.float32())), "path": pa.string()}
)
_FORMS = pa.schema(
    {
        "ecg": pa.list_(_ECG),
        "messages": MESSAGES,
        **dict.fromkeys(("patient_id", "record_id", "question_type"), pa.list_(pa.string())),
        "report": pa.string(),
        "num_samples": pa.int32(),  # of the reference's ECGs that are no files
    }
)
OBJECTS = "objects"  # column of what the messages of ECG-R1 and others name by placeholders
FOLD_SPLIT = re.compile(r"fold(\d+)_(\w+)")  # names of the splits of datasets with folds
STREAMED_ROWS = 100  # that are read at once; as many as `elm data build` writes into a row group


class ArrayFormatter(NumpyFormatter):
    """Rows with arrays as `datasets` makes them in the format `numpy`, of the type in which they are stored.

    That format looks for torchvision's videos in each lead, which takes more than half of the time to read a record.
    """

    def _tensorize(self, value: Any) -> Any:
        return value if isinstance(value, str | bytes | np.number) or value is None else np.asarray(value)


_register_formatter(ArrayFormatter, "elm_ecg_arrays")  # private: `datasets` has no public way to add a format


def with_arrays(data: Dataset) -> Dataset:
    """The dataset with the ECGs of its rows as NumPy arrays; as lists they take longer to make than to process."""
    if "ecg" not in data.column_names:
        return data
    return data.with_format("elm_ecg_arrays", columns=["ecg"], output_all_columns=True)


def load_data(args: "DataArguments", split: str, seed: int = 0, num_proc: int | None = None) -> Dataset | None:
    """The rows of one split of all `args.data`; None where no dataset has that split.

    Each row has `messages` (a chat of `role` and `content`) and `ecg` (a dict with `array` [leads, samples],
    `sampling_rate`, `lead_names` and `unit`, the path of a file, or a list of these). Rows with an empty answer, from which
    nothing could be learnt but to say nothing, are left out, and counted in the log.

    Raises:
        ValueError: a dataset has other columns, cannot be found, has folds and `args.fold` names none, or names files that
            are neither under `args.ecg_root` nor in its own folder.
    """
    return mix(load_parts(args, split, "messages", num_proc=num_proc), args, seed, weighted=split == "train")


def load_dataset(
    name: str, split: str, *, ecg_root: str | None = None, fold: int | None = None, revision: str | None = None
) -> Dataset:
    """The rows of one split of a dataset, for Python: what `elm sft --data NAME` trains on, with a column `ecg` that `ecgs_of` reads.

    Args:
        name: a local folder, a Hub id, or a key of the reference's datasets.
        ecg_root: the folder of the ECG files that the rows name; default: the dataset's own.
        fold: of a dataset that has folds.
        revision: of the Hub: a tag, branch or commit.

    Raises:
        ValueError: as `load_data`; or there is no such split.
    """
    data = load_split(name, split, "ecg", fold, ecg_root, load_splits(name, revision=revision), revision=revision)
    if data is None:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, load_splits(name)))}.")
    return with_arrays(data)


def load_ecgs(args: "DataArguments", split: str, seed: int = 0) -> Dataset | None:
    """The column `ecg` of the rows that `load_data` gives; no other column has to be there."""
    parts = load_parts(args, split, "ecg")
    ecgs = [
        # `num_samples` belongs to the reference's ECGs that are no files
        None if part is None else part.select_columns([c for c in ("ecg", "num_samples") if c in part.column_names])
        for part in parts
    ]
    return mix(ecgs, args, seed, weighted=split == "train")


def load_parts(args: "DataArguments", split: str, column: str, streaming: bool = False, **kwargs: Any) -> list[Any]:
    """The split of each of `args.data`, None where it has none.

    Raises:
        ValueError: as `load_split`; or there is a fold, and no dataset has any.
    """
    stored = {name: load_splits(name, streaming) for name in args.data}
    check_fold(args.fold, stored)
    parts = []
    for name in args.data:  # the same may be there twice
        part = load_split(name, split, column, args.fold, args.ecg_root, stored[name], **kwargs)
        parts.append(part if streaming else without_empty(part, name))
    return parts


def check_fold(fold: int | None, stored: dict[str, Any]) -> None:
    """Refuses (ValueError) a fold where none of the datasets, by their names, has folds."""
    if fold is not None and not any(map(folds_of, stored.values())):
        names = "; ".join(f"{name} has {', '.join(map(str, splits))}" for name, splits in stored.items())
        raise ValueError(f"--fold {fold} with data without folds; leave it out. Splits: {names}.")


def folds_of(splits: Any) -> list[str]:
    """The numbers of the folds that a dataset's splits are of, such as fold1_train; none of most datasets."""
    return sorted({match[1] for key in splits if (match := FOLD_SPLIT.fullmatch(str(key)))}, key=int)


def mix(loaded: list[Dataset | None], args: "DataArguments", seed: int, weighted: bool) -> Dataset | None:
    """The datasets as one. Where a column has another type in one of them, all get the columns and types of `_FORMS`."""
    parts = [part for part in loaded if part is not None]
    if not parts:
        return None
    types: dict[str, Any] = {}
    if any(types.setdefault(name, kind) != kind for part in parts for name, kind in part.features.items()):
        parts = [_any_form(part) for part in parts]
    if args.data_weights is None or not weighted:
        data = datasets.concatenate_datasets(parts)
    else:
        weights = weights_of(args, [part is not None for part in loaded])
        data = datasets.interleave_datasets(parts, weights, seed, stopping_strategy="all_exhausted")  # no row is lost
    if args.data_subset is not None:  # a share of the rows, in (0, 1]
        data = data.shuffle(seed=seed).select(range(max(1, round(args.data_subset * len(data)))))
    return with_arrays(data)


def is_answered(messages: Any) -> bool:
    """Whether no answer of a chat is empty. What is no chat at all is told where it is read, and counts as answered here."""
    turns = messages if isinstance(messages, list) else []
    answers = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "assistant"]
    return all(_has_words(answer) for answer in answers)


def _has_words(content: Any) -> bool:
    if isinstance(content, list):
        return any(_has_words(part.get("text") if isinstance(part, dict) else part) for part in content)
    return bool(content.strip()) if isinstance(content, str) else content is not None


def without_empty(data: Dataset | None, name: str, fault: str = "an empty answer") -> Dataset | None:
    """A dataset without the rows that have an empty answer, counted in the log as having that `fault`; ValueError if all have it."""
    if data is None or "messages" not in data.column_names:
        return data
    batches = data.select_columns("messages").iter(1000)  # faster than row by row
    kept = [is_answered(messages) for batch in batches for messages in batch["messages"]]
    if all(kept):
        return data
    if not any(kept):
        raise ValueError(f"{name}: all of its {len(kept):,} rows have {fault}, so that there is nothing to learn.")
    logger.warning("%s: %s of %s rows are left out, as they have %s", name, kept.count(False), len(kept), fault)
    return data.select(np.flatnonzero(kept))


def weights_of(args: "DataArguments", have_split: list[bool]) -> list[float]:
    """The shares of `args.data_weights` of the datasets that have a split; they sum to 1."""
    weights = [weight for weight, has_split in zip(args.data_weights or [], have_split, strict=True) if has_split]
    return [weight / sum(weights) for weight in weights]


def load_splits(name: str, streaming: bool = False, revision: str | None = None) -> DatasetDict | IterableDatasetDict:
    """All splits of a dataset as stored: a local folder (of `save_to_disk`, or of parquet, JSON Lines or CSV files), a Hub id, or
    a key of the reference's datasets.

    Raises:
        ValueError: `name` is none of these, is damaged, or names files of other places.
        OSError: a file cannot be read.
    """
    try:
        return _load_splits(name, streaming, revision)
    except (ValueError, OSError):
        raise
    except Exception as error:  # what damaged files bring about is of any kind
        cause = error.__cause__ or error  # of an error while tables are written, what was wrong with them
        text = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise ValueError(f"The dataset {name} cannot be read, or is damaged: {text[:300]}") from error


def _load_splits(name: str, streaming: bool, revision: str | None) -> DatasetDict | IterableDatasetDict:
    path = Path(name).expanduser()
    if (path / WORK).is_dir():
        raise ValueError(
            f"{name} is not finished: repeat the `elm data build` that was interrupted, or run its other shards and then the same "
            "command without --shard."
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # of `save_to_disk`
        try:
            loaded = datasets.load_from_disk(path)
        except IndexError as error:  # of `datasets`, where no shard was saved
            raise ValueError(f"{name} holds an empty split, which `datasets` cannot read; save it without.") from error
        parts = loaded.values() if isinstance(loaded, DatasetDict) else [loaded]
        _check_own(name, [file["filename"] for part in parts for file in part.cache_files])
        splits = loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded)  # as `load_dataset` names it
        if not streaming:
            return splits
        shards = {split: max(1, len(data) // STREAMED_ROWS) for split, data in splits.items()}
        plain = splits.with_format(
            None
        )  # `datasets` streams none that was saved in a format, as of `load_dataset` below
        return IterableDatasetDict({split: data.to_iterable_dataset(shards[split]) for split, data in plain.items()})
    if path.is_file():
        raise ValueError(
            f"--data {name} is a file; give the folder that holds it, in which train.parquet or the like is a split."
        )
    if path.exists():
        return _built(datasets.load_dataset_builder(str(path), cache_dir=records.cache_of(path)), name, streaming)
    if is_key(name):  # after folders: a local one of that name goes first
        name = f"{OWNER}/{name}"
    if name.count("/") != 1:
        raise ValueError(
            f"No dataset {name!r}: expected a local folder, a Hub id such as owner/name, or a key that `elm data list` shows."
        )
    return _built(datasets.load_dataset_builder(name, revision=revision), name, streaming)


def _built(builder: Any, name: str, streaming: bool) -> DatasetDict | IterableDatasetDict:
    """As of `load_dataset`, unless the card of the dataset sends it to files of other places."""
    _check_own(name, [file for files in (builder.config.data_files or {}).values() for file in files])
    if streaming:
        return builder.as_streaming_dataset()
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:  # of `datasets`: files with other columns, or that it cannot read
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(
            f"{name} is no dataset that can be read: {reason:.300}... Give a folder in which all files of a split have the same columns, "
            "such as `elm data build` makes."
        ) from error
    return builder.as_dataset(in_memory=datasets.utils.info_utils.is_small_dataset(builder.info.dataset_size))


def _check_own(name: str, files: list[str]) -> None:
    """ValueError unless the files that a dataset consists of are in its folder, or on the Hub: its card or state may name any."""
    path = Path(name).expanduser()
    roots = {os.path.abspath(path), os.path.realpath(path)}
    for file in files:
        place = str(file).rsplit("::", 1)[-1]  # of an archive: where it lies
        own = any(Path(os.path.abspath(place)).is_relative_to(root) for root in roots)
        if not (own if path.exists() else place.startswith("hf://")):
            raise ValueError(
                f"The dataset {name} names the file {place}, which is not part of it (in README.md, state.json or dataset_dict.json): no "
                "other files are read. Put the file into its folder."
            )


def load_split(
    name: str,
    split: str,
    column: str,
    fold: int | None = None,
    ecg_root: str | None = None,
    splits: Any = None,
    num_proc: int | None = None,
    revision: str | None = None,
) -> Any:
    """One split of one dataset, a `Dataset`, or of streamed ones an `IterableDataset`, or None where it has no such split.

    Args:
        column: that it has to have, one of `COLUMNS`.
        fold, ecg_root: as of `DataArguments`. Paths of files are under `ecg_root`, without it under the folder of a local dataset.
        splits: of `load_splits`, where they are loaded already.
    """
    splits = load_splits(name) if splits is None else splits
    folds = folds_of(splits)
    if folds and fold is None:
        raise ValueError(f"{name} has the folds {', '.join(folds)}; choose one with --fold.")
    if folds and str(fold) not in folds:
        raise ValueError(f"--fold {fold}, but {name} has the folds {', '.join(folds)}.")
    key = f"fold{fold}_{split}" if folds else split
    if key not in splits:
        logger.info("%s has no split %r; it has %s", name, key, ", ".join(map(str, splits)))
        return None  # another of --data may have it
    data = _plain_types(_without_media(splits[key]))
    if is_reference(data):
        return from_reference(data, name, ecg_root, num_proc)
    if OBJECTS in data.column_names and "ecg" not in data.column_names:
        data = _from_objects(data)
    if column not in data.column_names:
        raise ValueError(f"{name} ({key}) has the columns {data.column_names}; expected {column!r}, {COLUMNS[column]}.")
    if column == "messages" and not isinstance(data.features["messages"], List):
        raise ValueError(f"The messages of {name} ({key}) are {data.features['messages']}; expected {COLUMNS[column]}.")
    if _names_files(data.features.get("ecg")):
        folder = Path(name).expanduser()
        root = ecg_root or (str(folder.absolute()) if folder.exists() else None)  # None: of the Hub
        stored = _stored_at(name, data, ecg_root, revision) if records.is_stored(_first_ecg(data)) else None
        tables = data.with_format("arrow")
        options: dict[str, Any] = {
            "batched": True,
            "with_indices": True,
            "fn_kwargs": {"root": root, "stored": stored},
            "features": data.features,
        }
        data = tables.map(confined_rows, **options).with_format(None)
    return data


def _from_objects(data: Any) -> Any:
    """Rows as those of ECG-R1, with their ECGs, which `objects.ecg` names, in a column `ecg`."""
    features = None
    if data.features is not None:  # JSON may not say
        objects = data.features[OBJECTS]
        if not (isinstance(objects, dict) and "ecg" in objects):
            return data
        features = Features(
            {name: kind for name, kind in data.features.items() if name != OBJECTS} | {"ecg": objects["ecg"]}
        )
    return (
        data.with_format("arrow")
        .map(_named_ecgs, batched=True, remove_columns=[OBJECTS], features=features)
        .with_format(None)
    )


def _named_ecgs(table: pa.Table) -> pa.Table:
    return table.drop_columns([OBJECTS]).append_column("ecg", pc.struct_field(table[OBJECTS], "ecg"))


def _first_ecg(data: Any) -> Any:
    """An ECG of the first row that has one."""
    ecgs = (ecg for row in data.select_columns("ecg") for ecg in as_list(row["ecg"]))
    return next((ecg for ecg in ecgs if ecg is not None), None)


def _stored_at(name: str, data: Any, ecg_root: str | None, revision: str | None) -> str:
    """Where the folder `records` of a dataset is, which is made ready for rows in any order unless the dataset is streamed.

    Raises:
        ValueError: it is not there, as rows alone were copied.
    """
    records.forget()  # there may be another dataset in the place of one that was read
    folder = Path(name).expanduser()
    streaming = not isinstance(data, Dataset)
    if not folder.exists() and streaming:
        pinned = "" if revision is None else f"@{quote(revision, safe='')}"
        return f"hf://datasets/{name}{pinned}/"
    if not folder.exists():
        folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=f"{RECORDS}/*"))
    if not (folder / RECORDS).is_dir() and ecg_root is not None:  # rows that were taken from another dataset
        folder = Path(ecg_root)
    if not (folder / RECORDS).is_dir():
        raise ValueError(
            f"The rows of {name} name records of a dataset, and there is no folder {RECORDS} in {folder}; name that dataset's folder with "
            "--ecg_root."
        )
    place = f"{folder.absolute()}/"
    if not streaming:
        records.keep(place)
    return place


def _without_media(data: Any) -> Any:
    """The dataset without pictures, sounds and the like, which `datasets` reads from the files that rows name, or fetches."""

    def is_media(kind: Any) -> bool:
        parts = kind.values() if isinstance(kind, dict) else [kind.feature] if hasattr(kind, "feature") else []
        stored = getattr(kind, "pa_type", None)  # of all of them bytes and a path
        return (stored is not None and pa.types.is_struct(stored)) or any(map(is_media, parts))

    columns = data.features or {}
    kept = [name for name, kind in columns.items() if not is_media(kind)]
    # of a stream, `remove_columns` would take each row apart and guess the types of a few rows anew, null among them
    return data if len(kept) == len(columns) else data.select_columns(kept)


def _names_files(ecg: Any) -> bool:
    """Whether a column of this type may hold paths: texts, or dicts with a `path`, or lists of these."""
    ecg = ecg.feature if isinstance(ecg, List) else ecg
    return ecg == Value("string") or (isinstance(ecg, dict) and "path" in ecg)


def _plain_types(data: Any) -> Any:
    """Arrow's large strings and lists, as Polars writes them, as plain ones."""
    if data.features is None:  # of a stream, not known before it is read
        return data

    def plain(feature: Any) -> Any:
        if isinstance(feature, dict):
            return {name: plain(value) for name, value in feature.items()}
        if isinstance(feature, List | datasets.LargeList):
            return List(plain(feature.feature), length=getattr(feature, "length", -1))  # -1: any length
        return Value("string") if feature == Value("large_string") else feature

    features = Features({name: plain(feature) for name, feature in data.features.items()})
    return data if features == data.features else data.cast(features)  # a cast writes all rows anew


def _any_form(part: Dataset) -> Dataset:
    """A dataset with the columns of `_FORMS` that it has, in the types there."""
    part = part.select_columns([name for name in _FORMS.names if name in part.column_names])
    forms = Features.from_arrow_schema(_FORMS)
    if part.features.get("messages", forms["messages"]) != forms["messages"]:
        raise ValueError(
            f"The messages have the type {part.features['messages']}, and those of another of --data have another; to mix them, "
            "make them lists of 'role' and 'content', both strings."
        )
    features = Features({name: forms[name] for name in part.column_names})
    return part.with_format("arrow").map(_in_forms, batched=True, features=features).with_format(None)


def _in_forms(table: pa.Table) -> pa.Table:
    return pa.table({name: _in_form(table[name], name) for name in table.column_names})


def _in_form(column: pa.ChunkedArray, name: str) -> pa.Array:
    """A column as lists of one type: of a value, or list of values, or null, in each row."""
    values = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if name in ("messages", "num_samples", "report"):
        return values.cast(_FORMS.field(name).type)
    if pa.types.is_list(values.type):
        counts, values = values.value_lengths().fill_null(0).to_numpy(), values.flatten()
    else:
        counts, values = values.is_valid().to_numpy(zero_copy_only=False), values.drop_null()  # null: an empty list
    if name == "ecg":
        is_path = pa.types.is_string(values.type)  # else all are structs with an array
        members = {"path": values} if is_path else dict(zip(values.type.names, values.flatten(), strict=True))
        arrays = [members.get(member.name, pa.nulls(len(values))).cast(member.type) for member in _ECG]
        values = pa.StructArray.from_arrays(arrays, fields=list(_ECG))
    else:
        values = values.cast(pa.string())
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)  # where each list begins, and the last one ends
    return pa.ListArray.from_arrays(offsets, values)


def notices_of(record: ECGRecord, extractor: Any, known: dict[Any, list[str]]) -> list[str]:
    """Sentences about a record: what reading found, and what `extractor.prepare` adds, which is about leads, rate and length
    alone: `known` holds it for those that were there before."""
    read = list(record.metadata.get("notices", ()))
    shape = (record.lead_names, record.sampling_rate, record.array.shape[1])
    if shape not in known:  # an extractor saved before there was `prepare` adds nothing
        prepared = getattr(extractor, "prepare", as_record)(record)
        known[shape] = [notice for notice in prepared.metadata.get("notices", ()) if notice not in read]
    return read + known[shape]


def ecgs_of(row: dict[str, Any]) -> list[Any]:
    """The ECGs of a row: none, one or several, each a dict or the path of a file. A dict of what the dataset stores once, or of a
    segment of a recording, is read when it is looked into."""
    ecg = row.get("ecg")
    ecgs = [] if ecg is None else as_list(ecg)  # several come out of `datasets` as an array of objects
    if any(one is None for one in ecgs):
        raise ValueError(f"{_name(row)} lists {len(ecgs)} ECGs, one of which is null; leave it out.")
    return [_resolved(one, row) for one in ecgs]


def _name(row: dict[str, Any]) -> str:
    return f"The row {row.get('record_id', '')}"


def _resolved(ecg: Any, row: dict[str, Any]) -> Any:
    """The ECG of a mixed dataset as a path or a dict; `noise` and `flatline` as signals; segments as dicts that are read when they
    are looked into."""
    if isinstance(ecg, dict) and "path" in ecg:  # of `_ECG`
        ecg = ecg["path"] if ecg["path"] is not None else {key: value for key, value in ecg.items() if key != "path"}
    if records.is_stored(ecg):
        return records.StoredECG(ecg)
    if isinstance(ecg, str) and split_segment(ecg):
        return Segment(ecg)
    if not (isinstance(ecg, str) and ecg in LITERALS):
        return ecg
    shape = (len(STANDARD_LEADS), int(row.get("num_samples") or 2500))  # 10 s at the reference's 250 Hz
    rng = np.random.default_rng(zlib.crc32(str(row.get("record_id")).encode()))  # same at each reading
    array = rng.standard_normal(shape, np.float32) if ecg == "noise" else np.zeros(shape, np.float32)
    return {"array": array, "sampling_rate": SAMPLING_RATE, "lead_names": list(STANDARD_LEADS), "unit": "mV"}


def to_chat(row: dict[str, Any], with_ecg: bool = True) -> list[dict[str, Any]]:
    """The chat of a row with its ECGs in place.

    Where the messages say `{"type": "ecg"}`, or a user's text says `<ecg>` or `<image>`, the row's ECGs stand there in their order;
    where they do not, all stand before the first user message, as in the reference.

    Args:
        with_ecg: False leaves the ECGs out and keeps the words.

    Raises:
        ValueError: if the messages have more or fewer places than the row has ECGs.
    """
    ecgs = ecgs_of(row)
    messages = row["messages"]
    if messages is None or isinstance(messages, str) or not len(messages):  # `len`: the truth of an array is ambiguous
        raise ValueError(f"{_name(row)} has no messages, but {messages!r}.")
    for message in messages:
        turn = message if isinstance(message, dict) else {}
        if turn.get("role") not in ROLES or not isinstance(turn.get("content"), str | list | tuple | np.ndarray):
            raise ValueError(
                f"{_name(row)} has the message {message}; expected a role of {', '.join(ROLES)} and a content that is text or a "
                "list of parts."
            )
    chat = [{"role": message["role"], "content": _parts(message["content"], row)} for message in messages]
    for message in chat:
        if message["role"] == "user":
            message["content"] = [part for whole in message["content"] for part in _places_in(whole)]

    places = [part for message in chat for part in message["content"] if part["type"] == "ecg"]
    if not places:
        first_user = next((message for message in chat if message["role"] == "user"), None)
        if ecgs and first_user is None:
            raise ValueError(f"{_name(row)} has no user message to put its ECG in.")
        places = [{"type": "ecg"} for _ in ecgs]  # a dict for each, which the ECG is put into below
        if first_user is not None:
            first_user["content"][:0] = places
    if len(places) != len(ecgs):
        raise ValueError(f"The messages have {len(places)} places for ECGs, but the row has {len(ecgs)} ECGs.")
    for place, ecg in zip(places, ecgs, strict=True):
        place["path" if isinstance(ecg, str) else "ecg"] = ecg  # the keys that `ELMProcessor` looks for
    if not with_ecg:
        for message in chat:
            message["content"] = [part for part in message["content"] if part["type"] != "ecg"]
    return chat


def _parts(content: str | list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a message, without members beside their texts: a path or address among them would be read."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "ecg":
            parts.append({"type": "ecg"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(
                f"{_name(row)} has the part {str(part)[:200]} in a message; expected {{'type': 'text', 'text': ...}} or {{'type': 'ecg'}}, "
                "whose ECG stands in the column ecg."
            )
    return parts


def _places_in(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A part of a user's message, of a text with placeholders as texts and places of ECGs."""
    if part["type"] != "text":
        return [part]
    first, *others = PLACEHOLDER.split(part["text"])
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first or not others else []
    for text in others:
        parts += [{"type": "ecg"}] + [{"type": "text", "text": text}] * bool(text)
    return parts
