"""What is not shared with a dataset: columns that nobody asked for, and what may tell who a patient is, wherever it stands."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from elm_ecg.training.data.arguments import KEPT_COLUMNS, METADATA_COLUMNS
from elm_ecg.training.data.schema import ECG, RECORDS, counted
from elm_ecg.training.markdown import CARD
from elm_ecg.training.sharing.disclosure import DATES, NAMES, check_secrets

DATASET_FOLDERS = ("data", RECORDS)
DATASET_FILES = rf"README\.md|({'|'.join(DATASET_FOLDERS)})/[^/]+\.parquet"
ALLOW_HELP = (
    "columns of a dataset to share though they are none that `elm data build` keeps by itself, or seem to be personal"
)
# the leaves of the columns that `elm data build` writes, and of chats whose contents are parts
KNOWN = {"record_id", "patient_id", "start_second", *KEPT_COLUMNS, *METADATA_COLUMNS, "ecg", "ecg.path"}
KNOWN |= {f"ecg.{member.name}" for member in ECG} | {"id", *(member.name for member in ECG)}
KNOWN |= {"messages.role", "messages.content", "messages.content.type", "messages.content.text"}
_LETTER, _CAPITAL = r"[^\W\d_]", r"[^\W\d_a-zß-öø-ÿ]"  # of any alphabet
PERSONAL_TEXT = re.compile(
    r"(?P<address>[\w.+-]+@[\w-]+(?:\.[\w-]+)+)"
    # telephone numbers: +49 761 270-0, (555) 010-1234, Tel. 0761/2700
    r"|(?P<number>(?<![\w.])\+\d{1,3}[ ()./-]{0,2}\d(?:[ ()./-]{0,2}\d){6,12}(?!\w)"
    r"|(?<![\w.-])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?![\w-])"
    r"|\b(?i:tel|telefon|telephone|phone|mobile|handy|fax)\b[.:]*\s*(?:no\.?|nr\.?)?\s*[:=]?\s*[(+]?\d[\d ()/.-]{4,}\d)"
    # Mr. Smith, Pt. John Smith; titles in any case, names with capitals
    rf"|(?P<name>\b(?i:mr|mrs|ms|herr|frau|dr|prof)\b\.? {_CAPITAL}{_LETTER}+"
    rf"|\b(?i:pt|pat|patient|patientin)\b[.:]? {_CAPITAL}{_LETTER}+,? {_CAPITAL}{_LETTER}+)"
)
_LEVELS = {"list", "element", "item", "array_element"}  # of Parquet's paths, that are no names of members


def check_dataset(folder: Path, allowed: Collection[str] = ()) -> None:
    """Reads the whole dataset of a folder: its columns, texts, metadata and card.

    Args:
        allowed: columns, members such as `ecg.device`, or README.md that are shared whatever they hold, but for tokens and folders
            of this machine.

    Raises:
        ValueError: there is anything else but parquet files and the card, a column that is neither known nor allowed, or something
            that names somebody, is a date or an address, a token or a folder of this machine. All of these are listed.
    """
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    others = [path.as_posix() for path in files if not re.fullmatch(DATASET_FILES, path.as_posix())]
    if others:
        raise ValueError(
            f"{folder} holds {', '.join(others[:5])}{'...' if len(others) > 5 else ''}; only {CARD}, data/*.parquet and {RECORDS}/*.parquet are "
            "pushed. Move the others away, or nobody knows what is shared."
        )
    found: dict[str, str] = {}  # column or file -> what is wrong with it, of the first place where it is
    if (folder / CARD).is_file():
        _look(found, CARD, (folder / CARD).read_text(encoding="utf-8"), folder / CARD, dates=False)
    for path in (folder / path for path in files if path.suffix == ".parquet"):
        _check_table(path, found)
    refused = {name: what for name, what in found.items() if name not in allowed and name.split(".")[0] not in allowed}
    if refused:
        raise ValueError(
            f"{folder} is not shared: {'; '.join(f'{name} {what}' for name, what in refused.items())}. Build it without these, or if they "
            f"tell nobody who a patient is, say so: --allow {' '.join(refused)}"
        )


def _check_table(path: Path, found: dict[str, str]) -> None:
    """Adds what is wrong with a table to `found`."""
    try:
        table = pq.ParquetFile(path)  # of its end alone: the schema and where the rows are
        schema = table.schema_arrow
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no parquet file, or damaged: {error}") from error
    # what pandas, `datasets` and others write beside the schema, and Arrow beside fields
    for place, metadata in (("metadata", table.metadata.metadata), *_metadata_of(schema)):
        for key, value in (metadata or {}).items():
            if key != b"ARROW:schema":  # the schema itself, encoded
                _look(found, place, f"{key.decode(errors='replace')}: {value.decode(errors='replace')}", path)
    texts = {}  # Parquet's path -> ours, without the levels of lists
    for leaf in (table.schema.column(index) for index in range(len(table.schema))):
        column, *members = leaf.path.split(".")
        name = ".".join([column, *(member for member in members if member not in _LEVELS)])
        if name not in KNOWN:
            found.setdefault(name, "is no column that is kept unless it is named")
        if any(kind in str(leaf.logical_type) for kind in ("Date", "Time")) or leaf.physical_type == "INT96":
            found.setdefault(name, "holds dates or times")
        if leaf.physical_type.endswith("BYTE_ARRAY"):
            texts[leaf.path] = name, leaf.logical_type.type == "NONE"
    for parquet_path, (name, is_bytes) in texts.items():  # one at a time, so that what is found has its column
        for batch in table.iter_batches(columns=[parquet_path]):
            _look(found, name, "\n".join(_texts(batch.to_pylist())), path)
        if is_bytes:  # in UTF-16, or compressed, no name would be found
            found.setdefault(name, "holds bytes, in which nobody can look for names")


def _look(found: dict[str, str], name: str, text: str, path: Path, dates: bool = True) -> None:
    """Adds what in a text may tell who somebody is; ValueError of tokens and folders, which nobody can allow."""
    check_secrets(path, text)
    if match := PERSONAL_TEXT.search(text):
        kind = {"address": "an address", "number": "a telephone number", "name": "a name"}[str(match.lastgroup)]
        found.setdefault(name, f"has {match[0]!r}, which looks like {kind}")
    elif match := NAMES.search(text):
        found.setdefault(name, f"has {match[0]!r}, which may be of a patient")
    elif match := DATES.search(text) if dates else None:
        found.setdefault(name, f"has {match[0]!r}, which looks like a date")


def _texts(value: Any) -> Iterator[str]:
    """All texts within rows of whatever depth; bytes as far as they are text."""
    if isinstance(value, bytes):
        yield value.decode(errors="replace")
    elif isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _metadata_of(schema: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The metadata of the fields of a schema or type, of all depths, and where they stand."""
    for field in schema:
        place = f"{name}{field.name}"
        yield place, field.metadata
        kind = field.type
        while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        if pa.types.is_struct(kind):
            yield from _metadata_of(kind, f"{place}.")


def describe_dataset(folder: Path) -> str:
    """What a dataset shows to others: its splits, columns, and the first row without its signals."""
    lines = []
    for part in DATASET_FOLDERS:
        first = True
        for path in sorted((folder / part).glob("*.parquet")):
            table = pq.ParquetFile(path)
            number = counted(table.metadata.num_rows, "record" if part == RECORDS else "row")
            lines.append(f"{part}/{path.name}: {number} of {', '.join(table.schema_arrow.names)}")
            if first and table.metadata.num_rows:
                (row,) = next(table.iter_batches(1)).to_pylist()
                shown = {
                    name: value
                    for name, value in row.items()
                    if (name == "ecg" and isinstance(value, str)) or name not in ("ecg", "array")
                }
                lines += ["The first of them:", *(f"  {name}: {value}" for name, value in shown.items())]
            first = False
    return "\n".join(lines)
