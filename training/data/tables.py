"""Tables of questions and about records: CSV of whatever program wrote it, Excel, Parquet, JSON and JSON Lines."""

import csv
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.data.arguments import METADATA_COLUMNS

# columns that name a row's record, and that hold its chat; the first that the row has counts
RECORD_COLUMNS = (
    *("record", "record_id", "ecg_id", "ecg_path", "path", "exam_id"),
    *("ecg", "objects.ecg", "image_path", "image", "time_series"),
)
CHAT_COLUMNS = ("messages", "conversation", "conversations")
# columns of a question that have a meaning here; all others are taken over as they are
QUESTION_COLUMNS = {
    *RECORD_COLUMNS,
    *CHAT_COLUMNS,
    "objects",
    "question",
    "answer",
    "split",
    "patient_id",
    "start_second",
}
TEXT_TABLES = (".csv", ".tsv", ".txt")  # cells, separated by commas, semicolons or tabs
WORKBOOKS = (".xlsx", ".xlsm")
TABLES = (*TEXT_TABLES, *WORKBOOKS, ".json", ".jsonl", ".parquet")
OTHER_SPREADSHEETS = (".xls", ".ods", ".numbers")
CHUNK = 2**20  # characters of JSON that are read at once
BATCH = 1000  # rows of Parquet that are read at once


def identifier(value: Any) -> str:
    """An id as text; 17, 17.0 and "17.0" are one, as a table with gaps makes floats of integers."""
    text = str(value).strip()
    return text[:-2] if text.endswith(".0") and text[:-2].isdecimal() else text


def read_table(
    path: Path, columns: Iterable[str] = (), names: Mapping[str, str] | None = None, elsewhere: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The rows of `iter_table`, all of them."""
    return list(iter_table(path, columns, names, elsewhere))


def iter_table(
    path: Path, columns: Iterable[str] = (), names: Mapping[str, str] | None = None, elsewhere: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file with a header, of a sheet of Excel, of a Parquet file, of a JSON list, or of JSON Lines. Empty cells are None.

    JSON and Parquet are read as the rows are asked for, so that a large file is never held as a whole.

    The cells of CSV may be separated by commas, semicolons or tabs, and with the latter two its numbers may have decimal
    commas. A column of it holds numbers where all of its cells are numbers; those of ids and texts stay texts. The names in
    `QUESTION_COLUMNS` and `METADATA_COLUMNS` may be spelt in capitals too. Of Excel the same holds: what its cells show is
    read as if the sheet had been saved as CSV, and dates are as in 2024-03-01.

    Args:
        path: of the file; of Excel it may end in `#SHEET`, the first sheet where it does not.
        columns: that must be there.
        names: our name of a column -> its name in the file, where it is another.
        elsewhere: those of our names that need not be there, as another table has them.

    Raises:
        ValueError: the file is none of these, damaged, empty, has a column twice, or lacks one of `columns` or `names`.
    """
    names = names or {}
    rows = _rows(path, names)
    first = next(rows)
    demand((theirs for ours, theirs in names.items() if ours not in elsewhere), first, str(path))
    first = renamed(first, names)
    demand(columns, first, str(path))
    yield first
    yield from (renamed(row, names) for row in rows)


def table_rows(
    table: str | Path | Iterable[Mapping[str, Any]], names: Mapping[str, str]
) -> tuple[list[dict[str, Any]], set[str]]:
    """The rows of a file as of `iter_table`, or of a list of them, under our names; and those of `names` that it has by theirs."""
    rows = list(_rows(Path(table), names) if isinstance(table, str | Path) else table)
    found = {ours for ours, theirs in names.items() if rows and theirs in rows[0]}
    return [renamed(row, names) for row in rows], found


def table_file(path: str | Path) -> tuple[Path, str | None]:
    """The file of a table, and the sheet that `FILE.xlsx#SHEET` names, None where it names none."""
    match = re.fullmatch(rf"(.+(?:{'|'.join(map(re.escape, WORKBOOKS))}))#(.+)", str(path), re.IGNORECASE | re.DOTALL)
    return (Path(match[1]), match[2]) if match and not Path(path).exists() else (Path(path), None)


def _rows(path: Path, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """The rows as the file has them, under its own names."""
    file, sheet = table_file(path)
    try:
        content: Iterable[Any]
        if file.suffix.lower() in WORKBOOKS:
            content = _from_cells(_sheet(file, sheet), names, "[.]")
        elif file.suffix.lower() == ".parquet":
            content = _parquet(file)
        else:
            content = _text_rows(file, names)
        is_empty = True
        for row in content:
            if not isinstance(row, dict):
                raise ValueError("it has rows other than objects")
            is_empty = False
            yield row
        if is_empty:
            raise ValueError("it has no rows")
    except (ValueError, RecursionError, csv.Error) as error:
        end = "" if str(error).endswith("?") else "."
        raise ValueError(
            f"Cannot read {path}: {error}{end} Expected CSV with a header ({', '.join(TEXT_TABLES)}), Excel ({WORKBOOKS[0]}), Parquet, "
            "JSON or JSON Lines."
        ) from error


def demand(columns: Iterable[str], row: Mapping[str, Any], where: str) -> None:
    """ValueError if a row lacks one of the columns; `objects.ecg` is the `ecg` in the column `objects`."""
    missing = [name for name in columns if name not in row and value_of(row, name) is None]
    if missing:
        like = {name.casefold(): name for name in row}
        same = like.get(missing[0].casefold())  # but for capitals
        hint = f" Did you mean {same}?" if same else did_you_mean(missing[0], row)
        raise ValueError(f"{where} has no column {', '.join(missing)}; it has {', '.join(row)}.{hint}")


def value_of(row: Mapping[str, Any], name: str) -> Any:
    """The value of a column, or of `INNER` in the column `OUTER` where it is called `OUTER.INNER`; None if it is not there."""
    if name in row:
        return row[name]
    outer, dot, inner = name.partition(".")
    return row[outer].get(inner) if dot and isinstance(row.get(outer), Mapping) else None


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A row with our names of its columns.

    Args:
        names: our name of a column -> its name in the row; those that the row lacks stay away.
    """
    if not names:
        return dict(row)
    ours = {name: value_of(row, theirs) for name, theirs in names.items() if theirs in row or "." in theirs}
    taken = {*ours, *(names[name] for name in ours)}
    return {name: value for name, value in row.items() if name not in taken} | ours


def _text_rows(file: Path, names: Mapping[str, str]) -> Iterator[Any]:
    with file.open("rb") as binary:
        start = binary.read(4)
    if file.suffix.lower() in OTHER_SPREADSHEETS or start == b"PK\x03\x04":  # a zip archive, as Excel writes
        raise ValueError(
            f"it is a spreadsheet, but its name does not end in {WORKBOOKS[0]}; save it as that, or its sheet as CSV (in Excel: "
            "'CSV UTF-8')"
        )
    # Excel's 'Unicode text' is UTF-16, and begins with its mark as its 'CSV UTF-8' does, where it is dropped
    encoding = "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        with file.open(encoding=encoding, newline="") as text:
            if file.suffix.lower() in TEXT_TABLES:
                yield from _csv(text, names)
            elif _JSONText(text).peek() == "[":
                text.seek(0)
                yield from _json_list(text)
            else:
                text.seek(0)
                yield from (json.loads(line) for line in text if line.strip())  # a file's lines do not end at U+2028
    except UnicodeError as error:
        raise ValueError(f"it is no UTF-8 text ({error}); save it as that (in Excel: 'CSV UTF-8')") from error


def _json_list(file: TextIO) -> Iterator[Any]:
    text, number = _JSONText(file), 0
    mark = text.take()  # the bracket
    if text.peek() == "]":
        mark = text.take()
    while mark in ("[", ","):
        number += 1
        yield text.value(f"row {number}")
        mark = text.take()
    if mark != "]":
        raise ValueError(f"after row {number} there is no comma, or its list does not end")
    if text.take():
        raise ValueError("something follows the end of its list")


class _JSONText:
    """A text of JSON, of which only a part is held: as a whole, a file of gigabytes would take a multiple of its size.

    The library ijson would do the same, but takes no NaN, which Python writes, and its memory grows with the square of the
    depth to which a file nests its lists.
    """

    def __init__(self, file: TextIO) -> None:
        self.file, self.held, self.at = file, "", 0
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while (character := self.held[self.at : self.at + 1]) in _BLANKS:
                self.at += 1
            if character or not self._read(CHUNK):
                return character

    def take(self) -> str:
        """That character, which is then behind."""
        character = self.peek()
        self.at += len(character)
        return character

    def value(self, name: str) -> Any:
        """The next value; ValueError, which calls it `name`, if it is none."""
        self.peek()
        size = CHUNK
        while True:
            try:
                value, self.at = self.decode(self.held, self.at)
                return value
            except json.JSONDecodeError as error:
                # what is cut off fails at the end of what is held, but for a string, of which the error tells the beginning
                is_cut = error.pos > len(self.held) - 16 or error.msg.startswith("Unterminated string")
                size *= 2  # so that a value of any length is read again a few times only
                if not is_cut or not self._read(size):
                    raise ValueError(f"{name} is no JSON: {error.msg}") from error

    def _read(self, size: int) -> bool:
        more = self.file.read(size)
        self.held, self.at = self.held[self.at :] + more, 0
        return bool(more)


_BLANKS = tuple(" \t\r\n")


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file.open("rb") as binary:
        try:
            table = pq.ParquetFile(binary)
            leaves = [table.schema.column(number) for number in range(len(table.schema))]
            # bytes are pictures, beside the path that names the record
            kept = [
                leaf.path for leaf in leaves if (leaf.physical_type, leaf.logical_type.type) != ("BYTE_ARRAY", "NONE")
            ]
            for batch in table.iter_batches(BATCH, columns=kept):
                yield from ({name: _plain(value) for name, value in row.items()} for row in batch.to_pylist())
        except (pa.ArrowException, OSError) as error:  # of damaged files Arrow raises the latter too
            raise ValueError(f"it is no Parquet file, or damaged ({' '.join(str(error).split())})") from error


def _plain(value: Any) -> Any:
    return _shown(value) if isinstance(value, date | time) else value


def _sheet(file: Path, sheet: str | None) -> list[list[str]]:
    """The cells of a sheet as Excel shows them, but for formats of numbers and dates."""
    try:
        from openpyxl import load_workbook
    except ImportError as error:
        raise ValueError(
            "Excel files are read with openpyxl, which is not installed: pip install 'elm-ecg[tables]', or save the sheet as CSV"
        ) from error
    with file.open("rb") as binary:
        try:
            workbook = load_workbook(binary, read_only=True, data_only=True)
            names = workbook.sheetnames
            if sheet is None or sheet in names:
                cells = workbook[sheet or names[0]].iter_rows(values_only=True)
                return [[_shown(value) for value in row] for row in cells]
        except Exception as error:  # of damaged archives openpyxl, zipfile and the XML parser raise all sorts of things
            raise ValueError(f"it is no Excel file, or damaged ({type(error).__name__}: {error})") from error
    raise ValueError(f"it has no sheet {sheet}, but {', '.join(names)}.{did_you_mean(sheet, names)}")


def _shown(value: Any) -> str:
    match value:
        case None:
            return ""
        case bool():
            return str(value).upper()
        case float() if value.is_integer():
            return str(int(value))
        case datetime() if value.time() == time():
            return value.date().isoformat()
        case date() | time():
            return value.isoformat()
    return str(value)


def _csv(file: TextIO, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    head = file.read(2**16).lstrip("\r\n")
    if told := re.match(r"sep=([,;\t])\r?\n", head):  # a first line for Excel
        head = head[told.end() :]
    heads = {mark: next(csv.reader(StringIO(head, newline=""), delimiter=mark), []) for mark in ",;\t"}
    separator = told[1] if told else max(heads, key=lambda mark: len(heads[mark]))  # of equal ones the comma
    file.seek(0)
    lines = [cells for cells in csv.reader(file, strict=True, delimiter=separator) if any(map(str.strip, cells))]
    return _from_cells(lines[1:] if told else lines, names, "[.]" if separator == "," else "[.,]")


def _from_cells(lines: Sequence[Sequence[str]], names: Mapping[str, str], point: str) -> Iterator[dict[str, Any]]:
    """Rows of a header and lines of cells.

    Args:
        point: pattern of what may stand before the decimals of a number.
    """
    lines = [cells for cells in lines if any(map(str.strip, cells))]  # spreadsheets leave rows of empty cells below
    if not lines:
        raise ValueError("it is empty")
    header, *lines = lines
    header = [name.strip() for name in header]
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
    ours = {theirs: name for name, theirs in names.items()}
    columns = {  # an answer 1 stays a text
        name: cells if ours.get(name, name) in QUESTION_COLUMNS else _numbers(cells, point) for name, cells in kept
    }
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _numbers(cells: list[str | None], point: str) -> list[Any]:
    # "007" is an id: numbers have no leading zeros
    for number, pattern in ((int, r"-?(0|[1-9]\d*)"), (float, rf"-?(0|[1-9]\d*)({point}\d*)?([eE][+-]?\d+)?")):
        if all(cell is None or re.fullmatch(pattern, cell) for cell in cells):
            return [None if cell is None else number(cell.replace(",", ".")) for cell in cells]
    return cells
