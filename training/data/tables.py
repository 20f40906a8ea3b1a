"""Tables of questions and about records: CSV of whatever program wrote it, JSON and JSON Lines."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from elm_ecg.training.data.arguments import METADATA_COLUMNS

# columns that name a row's record, and that hold its chat; the first that the row has counts
RECORD_COLUMNS = ("record", "record_id", "ecg_id", "ecg_path", "path", "exam_id")
CHAT_COLUMNS = ("messages", "conversation", "conversations")
# columns of a question that have a meaning here; all others are taken over as they are
QUESTION_COLUMNS = {*RECORD_COLUMNS, *CHAT_COLUMNS, "question", "answer", "split", "patient_id", "ecg", "start_second"}
TEXT_TABLES = (".csv", ".tsv", ".txt")  # cells, separated by commas, semicolons or tabs
SPREADSHEETS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")


def identifier(value: Any) -> str:
    """An id as text; 17, 17.0 and "17.0" are one, as a table with gaps makes floats of integers."""
    return re.sub(r"^(\d+)\.0$", r"\1", str(value).strip())


def read_table(path: Path, columns: Iterable[str] = (), names: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """The rows of a CSV file with a header, of a JSON list, or of JSON Lines. Empty cells of CSV are None.

    The cells of CSV may be separated by commas, semicolons or tabs, and with the latter two its numbers may have decimal
    commas. A column of it holds numbers where all of its cells are numbers; those of ids and texts stay texts. The names in
    `QUESTION_COLUMNS` and `METADATA_COLUMNS` may be spelt in capitals too.

    Args:
        columns: that must be there.
        names: our name of a column -> its name in the file, where it is another.

    Raises:
        ValueError: the file is none of these, damaged, empty, has a column twice, or lacks one of `columns` or `names`.
    """
    names = names or {}
    try:
        text = _text_of(path)
        if path.suffix.lower() in TEXT_TABLES:
            rows = _read_csv(text, names)
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]  # `splitlines` cuts at U+2028
        if not rows or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it has no rows, or rows other than objects")
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"Cannot read {path}: {error}. Expected CSV with a header ({', '.join(TEXT_TABLES)}), or JSON or JSON Lines."
        ) from error
    if path.suffix.lower() not in TEXT_TABLES:
        demand(names.values(), rows[0], str(path))
        rows = [renamed(row, names) for row in rows]
    demand(columns, rows[0], str(path))
    return rows


def _text_of(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix.lower() in SPREADSHEETS or content.startswith(b"PK\x03\x04"):  # a zip archive, as Excel writes
        raise ValueError("it is a spreadsheet; save its sheet as CSV (in Excel: 'CSV UTF-8')")
    try:  # Excel's 'Unicode text' is UTF-16, and begins with its mark as its 'CSV UTF-8' does, where it is dropped
        return content.decode("utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error}); save it as that (in Excel: 'CSV UTF-8')") from error


def demand(columns: Iterable[str], row: Mapping[str, Any], where: str) -> None:
    """ValueError if a row lacks one of the columns."""
    missing = [name for name in columns if name not in row]
    if missing:
        raise ValueError(f"{where} has no column {', '.join(missing)}; it has {', '.join(row)}.")


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row with our names of its columns.

    Args:
        names: as of `read_table`.
    """
    others = {name: value for name, value in row.items() if name not in {*names, *names.values()}}
    return others | {ours: row.get(theirs) for ours, theirs in names.items()}


def _read_csv(text: str, names: Mapping[str, str]) -> list[dict[str, Any]]:
    text = text.lstrip("\r\n")
    if not text.strip():
        raise ValueError("it is empty")
    if told := re.match(r"sep=([,;\t])\r?\n", text):  # a first line for Excel
        text = text[told.end() :]
    heads = {separator: next(csv.reader(StringIO(text, newline=""), delimiter=separator)) for separator in ",;\t"}
    separator = told[1] if told else max(heads, key=lambda separator: len(heads[separator]))  # of equal ones the comma
    reader = csv.reader(StringIO(text, newline=""), strict=True, delimiter=separator)
    # spreadsheets leave rows of empty cells below
    header, *lines = [cells for cells in reader if any(cell.strip() for cell in cells)]
    header = [name.strip() for name in header]
    demand(names.values(), dict.fromkeys(header), "its header")
    with_meaning = {*QUESTION_COLUMNS, *METADATA_COLUMNS}
    header = [name if name in names.values() or name.lower() not in with_meaning else name.lower() for name in header]
    for number, cells in enumerate(lines, 1):
        if len(cells) != len(header):
            raise ValueError(f"row {number} has another number of cells ({len(cells)}) than the header ({len(header)})")
    by_column = [[cell.strip() or None for cell in cells] for cells in zip(*lines, strict=True)] or [[] for _ in header]
    # and columns beside them
    kept = [(name, cells) for name, cells in zip(header, by_column, strict=True) if name or any(cells)]
    if repeated := [name for name, count in Counter(name for name, _ in kept).items() if count > 1]:
        raise ValueError(f"its header says {', '.join(map(repr, repeated))} more than once")
    point = "[.]" if separator == "," else "[.,]"
    columns = renamed(dict(kept), names)
    # an answer 1 stays a text
    columns = {name: cells if name in QUESTION_COLUMNS else _numbers(cells, point) for name, cells in columns.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _numbers(cells: list[str | None], point: str) -> list[Any]:
    # "007" is an id: numbers have no leading zeros
    for number, pattern in ((int, r"-?(0|[1-9]\d*)"), (float, rf"-?(0|[1-9]\d*)({point}\d*)?([eE][+-]?\d+)?")):
        if all(cell is None or re.fullmatch(pattern, cell) for cell in cells):
            return [None if cell is None else number(cell.replace(",", ".")) for cell in cells]
    return cells
