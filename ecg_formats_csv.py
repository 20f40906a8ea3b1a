"""ECG files as tables of text: CSV and its relatives, one row for each sample."""

import csv
import io
import math
import re
from itertools import pairwise
from typing import Any

import numpy as np

from .ecg_formats_common import (
    NOTHING_GIVEN,
    PER_MILLIVOLT_IN_ANY_CASE,
    STANDARD_LEADS,
    UTF8_MARK,
    Given,
    agreed_lead_names,
    in_millivolts,
    listed,
    select_signals,
    stated,
    to_number,
    unit_of,
)

_INDEX_COLUMNS = ("", "index", "sample", "samples", "sample #", "unnamed: 0")  # of pandas and WFDB's rdsamp
# names of a column of times -> their unit, where the name says it
_TIME_COLUMNS = {
    **dict.fromkeys(("time", "t", "elapsed time", "timestamp", "zeit", "temps", "tiempo", "tempo"), ""),
    **dict.fromkeys(("seconds", "time_s", "time_sec", "time_seconds"), "s"),
    **dict.fromkeys(("ms", "time_ms", "milliseconds", "timestamp_ms"), "ms"),
}
_SECONDS = {
    **dict.fromkeys(("", "s", "sec", "second", "seconds", "sekunden"), 1.0),
    **dict.fromkeys(("ms", "msec", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("us", "\u00b5s", "\u03bcs", "microseconds"), 1e-6),
}
# no ECG is sampled slower, in hertz
_MIN_CSV_RATE = 10.0
_MAX_HEAD_LINES = 60  # before the samples: names, units, and what an app says of the recording
_MAX_LINE = 2**20
_MAX_CELLS = 3 * 2**23  # twelve leads of 70 minutes at 500 Hz; an empty cell of one byte takes 17, and 0.15 us
_MISSING = ("", "nan", "na", "n/a", "null", "none", "-")  # cells without a value
_RARE_WORDS = [b"NA", b"na", b"N/A", b"n/a", b"null", b"NULL", b"None", b"none", b"-", b'""', b'"NA"', b'"-"']
_RATE_KEYS = re.compile(r"(sampl\w*[ _]?(rate|frequency|freq)?|fs|frequency|messrate|abtastrate)( ?[(\[]hz[)\]])?")
_HERTZ = re.compile(r"([\d.,]+) ?(hz|hertz|hercios?|herc[oó]w|герц|гц|ヘルツ|赫兹|赫茲|헤르츠)")
# words of exports for units of volts, in any case -> as `UNITS_PER_MILLIVOLT` has it
_UNIT_WORDS = re.compile(r"(micro|mikro|mikró|milli|mili)?volt\w*|мкв|мв")


def _utf8(content: bytes) -> bytes:
    """The text in UTF-8; other encodings of spreadsheets are told by their marks, or by bytes that are no UTF-8."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16").encode()
    content = content.removeprefix(UTF8_MARK)
    try:
        content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1").encode()  # fails on no byte
    return content


def _cells(line: str, blanks: bool = False) -> list[str]:
    """The cells of a row; without a delimiter one, or where `blanks` separate them several."""
    if blanks and _delimiter(line) is None:
        return line.split()
    (cells,) = list(csv.reader([line], delimiter=_delimiter(line) or ",", skipinitialspace=True)) or [[]]
    return [cell.strip().strip("'").strip() for cell in cells]


def _delimiter(line: str) -> str | None:
    """What separates the cells of a row; a comma is a decimal one where something else does."""
    return next((mark for mark in ";\t," if mark in line), None)


def _is_data(line: str) -> bool:
    """Whether a line is a row of numbers, one at least, and of cells without a value."""
    cells = [cell for cell in _cells(line, blanks=True) if cell.lower() not in _MISSING]
    return bool(cells) and all(re.fullmatch(r"[-+]?[.,]?\d[\d.,]*([eE][-+]?\d+)?", cell) for cell in cells)


def _head(content: bytes) -> tuple[list[str], list[str], int]:
    """Comments, the lines before the samples, and at which byte these begin: at the first of two rows of numbers, or at the only.

    Raises:
        ValueError: there is no row of numbers near the beginning.
    """
    stream, position = io.BytesIO(content), 0
    comments: list[str] = []
    lines: list[str] = []
    rows = []  # of numbers: byte, and how many lines stand before it
    for _ in range(_MAX_HEAD_LINES):
        raw = stream.readline(_MAX_LINE)
        if len(raw) == _MAX_LINE:
            raise ValueError(f"a line is longer than {_MAX_LINE} bytes; expected a row for each sample.")
        line = raw.decode("utf-8", "replace").strip()
        if line.startswith("#"):
            comments.append(line.lstrip("# "))
        elif line:
            if _is_data(line):
                rows.append((position, len(lines)))
            if len(rows) > 1 and rows[-1][1] == rows[-2][1] + 1:
                break
            lines.append(line)
        position += len(raw)
    if not rows:
        raise ValueError("it holds no rows of numbers; expected a row of lead names, and rows of numbers.")
    pairs = [row for row, after in pairwise(rows) if after[1] == row[1] + 1]
    start, number = (pairs or rows)[0]
    return comments, lines[:number], start


def is_csv(content: bytes) -> bool:
    """Whether the content is text with a row of numbers near its beginning."""
    head = content[:65536]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        head = head[: len(head) // 2 * 2].decode("utf-16", "replace").encode()
    if b"\0" in head:
        return False
    try:
        _head(head.removeprefix(UTF8_MARK))
    except (ValueError, csv.Error):
        return False
    return True


def _rate_of(times: np.ndarray, unit: str) -> float:
    """The sampling rate in hertz of evenly spaced times, whole where their rounding admits a whole number."""
    seconds = times * _SECONDS[unit]
    span, steps = seconds[-1] - seconds[0], len(seconds) - 1
    if not 0 < span < math.inf:
        raise ValueError("its times do not increase; leave the column out, and give the rate (--sampling_rate).")
    step = span / steps  # the mean: rounding of single times averages out
    differences = np.diff(seconds)
    if not (differences.min() > 0.5 * step and differences.max() < 1.5 * step):  # a missing sample is a step of 2
        raise ValueError(
            f"its times are not even: steps of {differences.min():g} to {differences.max():g} s. Resample it, or leave "
            "the column out and give the sampling rate (--sampling_rate)."
        )
    rate = float(1 / step)
    if rate < _MIN_CSV_RATE:
        raise ValueError(f"its times make {rate:g} Hz; head the column 'time (s)' or 'time (ms)', as it is.")
    # times are often rounded, such as 0.003 for 1/300 s: of the rates that they admit a whole one is meant
    rounding = np.abs(seconds - (seconds[0] + step * np.arange(len(seconds)))).max()
    return float(round(rate)) if abs(span - steps / round(rate)) <= 2 * rounding + 1e-9 * span else rate


def _table(content: bytes, start: int, single_column: bool) -> np.ndarray:
    """The numbers [samples, columns] from a byte on; cells without a value are NaN.

    Args:
        single_column: commas are decimal ones.
    """
    rows = content[start:].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    first = rows[: rows.find(b"\n") if b"\n" in rows else None].decode("utf-8", "replace")
    delimiter = None if single_column else _delimiter(first)
    cells = len(_cells(first, blanks=not single_column)) * (rows.count(b"\n") + 1)
    if cells > _MAX_CELLS:
        raise ValueError(
            f"it holds {cells:,} cells; at most {_MAX_CELLS:,} are read. Cut the record, or save it as .npz."
        )
    if b"," in rows and delimiter != ",":
        rows = rows.replace(b",", b".")
    mark = b"" if delimiter is None else delimiter.encode()
    if mark:
        for _ in range(2):  # twice: of two empty cells one is left by the first time
            rows = rows.replace(mark * 2, mark + b"nan" + mark)
        rows = rows.replace(mark + b"\n", mark + b"nan\n").replace(b"\n" + mark, b"\nnan" + mark)
        rows = b"nan" * rows.startswith(mark) + rows + b"nan" * rows.endswith(mark)
    options: dict[str, Any] = {"delimiter": delimiter, "ndmin": 2, "quotechar": '"', "encoding": "utf-8"}
    try:
        try:
            return np.loadtxt(io.BytesIO(rows), **options)
        except ValueError:
            if not mark:
                raise
            rows = b"\n" + rows.strip(b"\n") + b"\n"  # so that each row begins and ends alike
            for word in _RARE_WORDS:  # replaced one by one, as a pattern would take memory for each place
                for before, after in ((mark, mark), (mark, mark), (mark, b"\n"), (b"\n", mark)):
                    rows = rows.replace(before + word + after, before + b"nan" + after)
            return np.loadtxt(io.BytesIO(rows), **options)
    except ValueError as error:
        raise ValueError(f"expected a row of lead names, and rows of numbers: {str(error)[:200]}") from error


def _without_numbers(table: np.ndarray) -> np.ndarray:
    """The table without the row of column numbers, and the column of row numbers, that pandas writes around an array."""
    has_index = bool(np.isnan(table[0, 0]))  # the corner is empty
    first = table[0, has_index:]
    is_numbered = len(first) > 2 and (first == np.arange(len(first))).all()
    return table[1:, has_index:] if is_numbered else table


def _facts(comments: list[str], rows: list[list[str]]) -> dict[str, str]:
    """What comments and the lines before the table say: name in small letters -> value."""
    pairs = [comment.replace("=", ":").partition(":")[::2] for comment in comments]
    pairs += [(row[0], ", ".join(row[1:])) for row in rows if row]
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _stated_rate(facts: dict[str, str]) -> float | None:
    for name, value in facts.items():
        with_unit = _HERTZ.fullmatch(value.lower())
        if with_unit or _RATE_KEYS.fullmatch(name.replace("_", " ").replace("  ", " ")):
            number = to_number((with_unit[1] if with_unit else value).replace(",", "."))
            if number is not None:
                return number
    return None


def _unit_word(text: str) -> str | None:
    """The unit of volts that a cell names, as `UNITS_PER_MILLIVOLT` spells it."""
    word = text.strip().casefold()
    if word in PER_MILLIVOLT_IN_ANY_CASE:
        return text.strip()
    if not _UNIT_WORDS.fullmatch(word):
        return None
    return "mV" if word.startswith(("mil", "мв")) else "uV" if word.startswith(("mi", "мк")) else "V"


def _stated_unit(facts: dict[str, str]) -> str | None:
    named = next((facts[name] for name in ("unit", "units") if name in facts), None)
    if named is not None:
        return _unit_word(named) or named
    return next((unit for value in facts.values() if value and (unit := _unit_word(value))), None)


def _stated_lead(facts: dict[str, str]) -> str | None:
    """The lead that the head of a single column names, as watches' exports do in many languages: `Lead,Lead I`."""
    for name, value in facts.items():
        *words, last = value.split() or [""]
        if last in STANDARD_LEADS and (name in ("lead", "leads") or (words and " ".join(words).lower() == name)):
            return last
    return None


def _columns(rows: list[list[str]], width: int) -> tuple[list[str], list[str], list[list[str]]]:
    """Names and units of the columns, from the last one or two rows before the numbers, and the rows before these."""
    if not rows or (len(rows[-1]) != width and width == 1):
        return [], [], rows  # a single column, whose lead stands in the lines before
    names, units, rest = rows[-1], [""] * width, rows[:-1]
    has_units = any(map(_unit_word, names)) and not any(name in STANDARD_LEADS for name in names)
    if has_units and rest and len(rest[-1]) == width:
        names, units, rest = rest[-1], names, rest[:-1]
    if len(names) == width - 1:  # rows that end with a delimiter
        names = [*names, ""]
    return names, units, rest


def read_csv(content: bytes, given: Given = NOTHING_GIVEN) -> dict[str, Any]:
    """A column for each lead, and one of times if there is one; a row may name them, with units in brackets or in the next row.

    Cells are separated by commas, semicolons, tabs or blanks; where it is no comma, numbers may have a decimal one. Lines that
    begin with #, or pairs of cells before the table as watches write them, may state rate, unit and lead. Whole numbers without
    a unit are taken for counts of the recorder, and stay integers.
    """
    content = _utf8(content)
    comments, lines, start = _head(content)
    rows = [_cells(line) for line in lines]
    facts = _facts(comments, rows)
    is_single = _stated_lead(facts) is not None and all(len(row) <= 2 for row in rows)  # as a watch records
    table = _table(content, start, single_column=is_single)
    if not rows:
        table = _without_numbers(table)
    if table.shape[1] > 1 and rows and len(rows[-1]) == 1:
        rows = [_cells(line, blanks=True) for line in lines]
    names, units, rest = _columns(rows, table.shape[1])
    facts = _facts(comments, rest)
    if len(table) < 2 or (names and len(names) != table.shape[1]) or (rows and not names and not is_single):
        first = rows[-1] if rows else []
        raise ValueError(
            f"its first row has {len(first) or table.shape[1]} columns, {len(table)} rows of numbers have {table.shape[1]}; "
            "expected two rows at least, one for each sample."
        )
    record: dict[str, Any] = {"sampling_rate": _stated_rate(facts)}
    about = {
        "date": facts.get("recorded date"),
        "device": facts.get("device"),
        "statements": [facts["classification"]] if "classification" in facts else [],
    }
    metadata = {"format": "CSV", **stated(comments=comments, **about)}
    unit, lead = _stated_unit(facts), _stated_lead(facts)
    if not names:
        leads = agreed_lead_names([lead] if lead else None, given.lead_names)
        return {
            **record,
            **_with_unit(table.T, unit_of(unit, given)),
            "lead_names": None if leads is None else list(leads),
            "metadata": metadata,
        }
    signals = []  # name, unit, values
    for cell, own, column in zip(names, units, table.T, strict=True):
        parts = re.fullmatch(r"([^(\[]*)[(\[]([^)\]]*)[)\]]", cell)  # NAME (UNIT) or NAME [UNIT]
        name, own = (parts[1].strip(), parts[2].strip()) if parts else (cell, own)
        if name.lower() in _TIME_COLUMNS:
            own = own.lower() or _TIME_COLUMNS[name.lower()]
            if own not in _SECONDS:
                raise ValueError(f"its times are in {own[:60]!r}; expected s or ms.")
            record["sampling_rate"] = _rate_of(column, own)  # counts more than what stands before the table
        elif name.lower() not in _INDEX_COLUMNS:
            signals.append((name, _unit_word(own) or own or unit or "", column))
    if not signals:
        raise ValueError(f"it holds no column of a lead, but {listed(names)}.")
    return {**record, **_signals(signals, given, metadata)}


def _signals(signals: list[tuple[str, str, np.ndarray]], given: Given, metadata: dict[str, Any]) -> dict[str, Any]:
    """What `read_file` gives of named columns."""
    names, units, columns = (list(parts) for parts in zip(*signals, strict=True))
    if not any(units):
        leads = names if given.lead_names is None else list(agreed_lead_names(names, given.lead_names) or ())
        return {**_with_unit(np.stack(columns), given.unit), "lead_names": leads, "metadata": metadata}
    chosen = select_signals(names, units, [0] * len(names), given)  # all columns have one rate
    return {
        "array": np.stack(
            [in_millivolts(columns[row], unit) for row, unit in zip(chosen.rows, chosen.units, strict=True)]
        ),
        "lead_names": chosen.lead_names,
        "unit": "mV",
        "metadata": {**metadata, **stated(left_out=chosen.left_out)},
    }


def _with_unit(array: np.ndarray, unit: str | None) -> dict[str, Any]:
    """Array and unit. Whole numbers without a unit become integers, so that the caller has to give one."""
    # lead by lead, which takes less memory; NaN is no whole number, and 0 is 0 in any unit
    if (
        unit is None
        and all(np.abs(lead).max() < 2**31 and (lead == np.rint(lead)).all() for lead in array)
        and array.any()
    ):
        return {"array": array.astype(np.int32), "unit": None}
    return {"array": array, "unit": unit}
