"""ECG files as tables of text: CSV, one row for each sample."""

import csv
import io
import math
import os
import re
from typing import Any

import numpy as np

from .ecg_formats_common import UTF8_MARK, content_lines, in_millivolts, select_signals, stated, to_number

_DELIMITERS = (b",", b";", b"\t")
_INDEX_COLUMNS = ("", "index", "sample", "sample #", "unnamed: 0")  # of pandas and WFDB's rdsamp
_TIME_COLUMNS = {"time": "", "t": "", "elapsed time": "", "seconds": "s", "time_s": "s", "ms": "ms", "time_ms": "ms"}
_SECONDS = {"": 1.0, "s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "msec": 1e-3, "milliseconds": 1e-3}
# no ECG is sampled slower, in hertz
_MIN_CSV_RATE = 10.0


def _text(line: bytes) -> str:
    try:
        return line.decode().strip()
    except UnicodeDecodeError:
        return line.decode("latin-1").strip()  # fails on no byte


def _csv_cells(line: bytes) -> tuple[str, list[str]]:
    delimiter = max(_DELIMITERS, key=line.count).decode()  # the commonest
    (cells,) = csv.reader([_text(line)], delimiter=delimiter, skipinitialspace=True)
    return delimiter, [cell.strip().strip("'").strip() for cell in cells]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def is_csv(content: bytes) -> bool:
    """Whether the content is text with a number in its first or second row, comments apart."""
    head = content[:65536]
    rows = content_lines(head.removeprefix(UTF8_MARK))[:2]
    return b"\0" not in head and any(_is_number(cell) for row in rows for cell in _csv_cells(row)[1])


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


def read_csv(content: bytes) -> dict[str, Any]:
    """A column for each lead, and one of times if there is one; the first row may name them, with units in brackets.

    Lines that begin with # may state `sampling_rate` (or `fs`) and `unit`. Whole numbers without a unit are taken for
    counts of the recorder, and stay integers.
    """
    stream = io.BytesIO(content.removeprefix(UTF8_MARK))
    comments: list[str] = []
    while (line := stream.readline()) and (not line.strip() or line.lstrip().startswith(b"#")):
        comments.append(_text(line).lstrip("# "))
    delimiter, cells = _csv_cells(line)
    has_header = not all(map(_is_number, cells))
    if not has_header:
        stream.seek(-len(line), os.SEEK_CUR)  # the first row is data too
    try:
        table = np.loadtxt(stream, delimiter=delimiter, encoding="latin-1", ndmin=2, quotechar='"')
    except ValueError as error:
        raise ValueError(f"expected a row of lead names, and rows of numbers with a decimal point: {error}") from error
    if len(table) < 2 or (has_header and table.shape[1] != len(cells)):
        raise ValueError(
            f"its first row has {len(cells)} columns, {len(table)} rows of numbers have {table.shape[1]}; expected two "
            "rows at least, one for each sample."
        )

    facts = {
        name.strip().lower().replace(" ", "_"): fact.strip()
        for name, _, fact in (comment.replace("=", ":").partition(":") for comment in comments)
    }
    rates = [facts[name] for name in ("sampling_rate", "sample_rate", "sampling_frequency", "fs") if name in facts]
    record: dict[str, Any] = {"sampling_rate": to_number(rates[0].lower().removesuffix("hz")) if rates else None}
    metadata = {"format": "CSV", **stated(comments=comments)}
    stated_unit = facts.get("unit") or facts.get("units") or ""
    if not has_header:
        return {**record, "array": _counts_as_integers(table.T), "unit": stated_unit or None, "metadata": metadata}

    names, units, columns = [], [], []
    for cell, column in zip(cells, table.T, strict=True):
        parts = re.fullmatch(r"([^(\[]*)[(\[]([^)\]]*)[)\]]", cell)  # NAME (UNIT) or NAME [UNIT]
        name, unit = (parts[1].strip(), parts[2].strip()) if parts else (cell, "")
        if name.lower() in _TIME_COLUMNS:
            unit = unit.lower() or _TIME_COLUMNS[name.lower()]
            if unit not in _SECONDS:
                raise ValueError(f"its times are in {unit!r}; expected s or ms.")
            record["sampling_rate"] = _rate_of(column, unit)  # counts more than that of a comment
        elif name.lower() not in _INDEX_COLUMNS:
            names.append(name)
            units.append(unit or stated_unit)
            columns.append(column)
    if not names:
        raise ValueError(f"it holds no column of a lead, but {', '.join(cells)}.")
    if not any(units):
        return {**record, "array": _counts_as_integers(np.stack(columns)), "lead_names": names, "metadata": metadata}
    rows, left_out = select_signals(names, units, [0] * len(names))  # all columns have one rate
    return {
        **record,
        "array": np.stack([in_millivolts(columns[row], units[row]) for row in rows]),
        "lead_names": [names[row] for row in rows],
        "unit": "mV",
        "metadata": {**metadata, **stated(left_out=left_out)},
    }


def _counts_as_integers(array: np.ndarray) -> np.ndarray:
    """Whole numbers as integers, so that the caller has to give a unit; others are millivolts, as in any array."""
    is_counts = array.any() and np.abs(array).max() < 2**31 and (array == np.rint(array)).all()  # 0 is 0 in any unit
    return array.astype(np.int32) if is_counts else array
