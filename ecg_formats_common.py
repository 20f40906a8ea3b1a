"""What the readers of ECG files share: bounds, leads, units, and how they write what a file states."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_FILE_BYTES = 512 * 2**20
# what a compressed file may unpack to: twelve leads of three hours at 500 Hz
MAX_SAMPLES = 2**26
UTF8_MARK = b"\xef\xbb\xbf"

STANDARD_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# the order of the reference system's checkpoints
REFERENCE_LEADS = ("I", "II", "III", "aVL", "aVR", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
_STANDARD_NAMES = frozenset(map(str.casefold, STANDARD_LEADS))
# how many of a unit make one millivolt; the micro sign (b5) and the Greek letter mu (3bc) look alike
UNITS_PER_MILLIVOLT = {"mV": 1.0, "uV": 1e3, "\u00b5V": 1e3, "\u03bcV": 1e3, "nV": 1e6, "V": 1e-3}
PER_MILLIVOLT_IN_ANY_CASE = {unit.casefold(): number for unit, number in UNITS_PER_MILLIVOLT.items()}  # MV is mV too


def library(name: str) -> Any:
    """A module of the extra `formats`; ImportError with the way to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'This format needs the library {name}: pip install "elm-ecg[formats]".') from error


def stated(**facts: Any) -> dict[str, Any]:
    """What a file states: values that are missing or empty are left out, in lists and dicts within too."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            value = {
                name: part for name, part in ((name, kept(part)) for name, part in value.items()) if part is not None
            }
        elif isinstance(value, list):
            value = [part for part in map(kept, value) if part is not None]
        return None if value in ("", [], {}) else value  # 0 and False stay

    return kept(facts) or {}


def to_number(value: str | float) -> float | None:
    """A finite number; None for anything else."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def to_sex(text: str) -> str:
    """`male` for M, `female` for F; other words as they are."""
    return {"m": "male", "f": "female"}.get(text.lower(), text.lower())


def content_lines(content: bytes) -> list[bytes]:
    """The lines that are neither empty nor comments."""
    return [line for line in map(bytes.strip, content.splitlines()) if line and not line.startswith(b"#")]


def in_millivolts(values: np.ndarray, unit: str) -> np.ndarray:
    """Values of a known unit as float32 in millivolts."""
    return (values / PER_MILLIVOLT_IN_ANY_CASE[unit.casefold()]).astype(np.float32)


def select_signals(
    names: Sequence[str], units: Sequence[str], rates: Sequence[float]
) -> tuple[list[int], dict[str, str]]:
    """Which signals of a recording are read: those in volts, at the highest rate that a standard lead has.

    Returns:
        Their indices, and of each other signal why it is left out.

    Raises:
        ValueError: no signal is in volts.
    """
    left_out = {
        name: f"unit {unit!r}"
        for name, unit in zip(names, units, strict=True)
        if unit.casefold() not in PER_MILLIVOLT_IN_ANY_CASE
    }
    electrical = [row for row, unit in enumerate(units) if unit.casefold() in PER_MILLIVOLT_IN_ANY_CASE]
    if not electrical:
        raise ValueError(f"it holds no signal in volts, but {left_out or 'none at all'}.")
    leads = [row for row in electrical if names[row].casefold() in _STANDARD_NAMES]
    rate = max(rates[row] for row in leads or electrical)  # of any signal where no lead has a standard name
    left_out |= {names[row]: f"rate {rates[row]:g} Hz" for row in electrical if rates[row] != rate}
    return [row for row in electrical if rates[row] == rate], left_out
