"""What the readers of ECG files share: bounds, leads, units, and how they write what a file states."""

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_FILE_BYTES = 512 * 2**20
# what a compressed file may unpack to: twelve leads of an hour and a half at 500 Hz, or one of a day at 360 Hz
MAX_SAMPLES = 2**25
UTF8_MARK = b"\xef\xbb\xbf"

STANDARD_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# the order of the reference system's checkpoints
REFERENCE_LEADS = ("I", "II", "III", "aVL", "aVR", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
_CANONICAL_LEADS = {name.lower(): name for name in STANDARD_LEADS}
# how many of a unit make one millivolt; the micro sign (b5) and the Greek letter mu (3bc) look alike
UNITS_PER_MILLIVOLT = {"mV": 1.0, "uV": 1e3, "\u00b5V": 1e3, "\u03bcV": 1e3, "nV": 1e6, "V": 1e-3}
PER_MILLIVOLT_IN_ANY_CASE = {unit.casefold(): number for unit, number in UNITS_PER_MILLIVOLT.items()}  # MV is mV too

# of a list in a message
_SHOWN_NAMES, _SHOWN_CHARACTERS = 12, 120


@dataclass(frozen=True)
class Given:
    """What the caller says of a file, for what the file does not say itself, or says in words that mean nothing here.

    Args:
        lead_names: of all signals of the file, or of those that are read.
        unit: one of `UNITS_PER_MILLIVOLT`.
        record: which record is read of a file of several.
        microvolts: whole microvolts are wanted as such, int16 of the unit uV, where a file holds nothing else.
    """

    lead_names: Sequence[str] | None = None
    unit: str | None = None
    record: str | None = None
    microvolts: bool = False


NOTHING_GIVEN = Given()


def library(name: str) -> Any:
    """A module of the extra `formats`; ImportError with the way to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"This format needs the library {package}: `pip install {package}`.") from error


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
    return (values / PER_MILLIVOLT_IN_ANY_CASE[unit.strip().casefold()]).astype(np.float32)


def listed(names: Iterable[Any]) -> str:
    """Names with commas between, for a message: the first dozen, none of them longer than a line, and how many there are."""
    names = list(names)
    texts = [
        f"{text[:_SHOWN_CHARACTERS]}..." if len(text) > _SHOWN_CHARACTERS else text
        for text in map(str, names[:_SHOWN_NAMES])
    ]
    return ", ".join(texts) + (f" ... ({len(names):,} in all)" if len(names) > _SHOWN_NAMES else "")


def _lead_key(name: str) -> str:
    return str(name).strip().lower().removeprefix("lead").strip()


def canonical_lead_name(name: str) -> str:
    """The standard spelling of a lead: any case, with or without the word "lead" ("avr", "Lead II" -> "aVR", "II").

    Leads that only resemble a standard one are unknown: MLII (a monitor's modified lead II), -aVR, V4R.

    Raises:
        ValueError: the name is none of the twelve standard leads.
    """
    key = _lead_key(name)
    if key not in _CANONICAL_LEADS:
        raise ValueError(f"Unknown lead {name!r:.100}; expected one of {', '.join(STANDARD_LEADS)}, in any case.")
    return _CANONICAL_LEADS[key]


def canonical_lead_names(names: Iterable[str], others: bool = False) -> tuple[str, ...]:
    """`canonical_lead_name` of each name.

    Args:
        others: leave names that are no standard lead as they are.

    Raises:
        ValueError: a name is unknown and `others` is False, a standard lead is named twice, or `names` is a string or
            empty.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        kind = f"the string {names[:100]!r}" if isinstance(names, str) else f"{names!r:.100}"
        raise ValueError(f"lead_names is {kind}; give a list of names, such as ['I', 'II', 'V1'].")
    leads = tuple(
        str(name) if others and _lead_key(name) not in _CANONICAL_LEADS else canonical_lead_name(name) for name in names
    )
    if not leads:
        raise ValueError("lead_names is empty; name at least one lead.")
    twice = [name for name in STANDARD_LEADS if leads.count(name) > 1]  # other names may: their rows are left out
    if twice:
        raise ValueError(f"Lead {', '.join(twice)} is named more than once in {listed(leads)}; a lead stands once.")
    return leads


def agreed_lead_names(own: Iterable[str] | None, given: Iterable[str] | None) -> tuple[str, ...] | None:
    """The names of a record's rows: the caller's where the record has none, or one that is no standard lead, else the record's.

    Raises:
        ValueError: as `canonical_lead_names`, or both name another number of rows, or different standard leads.
    """
    names, wanted = (None if one is None else canonical_lead_names(one, others=True) for one in (own, given))
    if names is None or wanted is None:
        return wanted if names is None else names
    if len(names) != len(wanted) or any(
        name in STANDARD_LEADS and name != other for name, other in zip(names, wanted, strict=True)
    ):
        raise ValueError(contradiction("lead_names", names, wanted))
    return wanted


def agreed(record: dict[str, Any], given: Given) -> dict[str, Any]:
    """What a file says of signals of one unit, agreed with what the caller says.

    Raises:
        ValueError: as `unit_of` and `agreed_lead_names`.
    """
    unit, lead_names = unit_of(record.get("unit"), given), record.get("lead_names")
    if given.lead_names is not None:
        lead_names = agreed_lead_names(lead_names, given.lead_names)
    return {**record, "unit": unit, "lead_names": lead_names}


def is_in_volts(unit: str) -> bool:
    """Whether a unit, as a file writes it, is one of volts."""
    return unit.strip().casefold() in PER_MILLIVOLT_IN_ANY_CASE


def unit_of(own: str | None, given: Given) -> str | None:
    """The unit of a file's samples: the file's own, and where that is missing or none of volts, the caller's.

    Raises:
        ValueError: both are units of volts, and differ.
    """
    if own is None or not is_in_volts(own):
        return given.unit or own
    if given.unit is not None and not _same_unit(own, given.unit):
        raise ValueError(contradiction("unit", own, given.unit))
    return own


def _same_unit(one: str, other: str) -> bool:
    return PER_MILLIVOLT_IN_ANY_CASE[one.strip().casefold()] == PER_MILLIVOLT_IN_ANY_CASE[other.strip().casefold()]


def contradiction(name: str, own: Any, given: Any) -> str:
    """The message where a caller says something else than the file."""
    own, given = (listed(value) if isinstance(value, (list, tuple)) else repr(value)[:200] for value in (own, given))
    return f"The ECG states its {name}, {own}, and {given} is given too: leave {name} out (for a file: --{name})."


@dataclass(frozen=True)
class Selection:
    """Which signals of a recording are read.

    Args:
        rows: their indices in the file.
        lead_names, units: of each of these.
        left_out: of each other signal why it is not read.
    """

    rows: list[int]
    lead_names: list[str]
    units: list[str]
    left_out: dict[str, str]


def select_signals(
    names: Sequence[str], units: Sequence[str], rates: Sequence[float], given: Given = NOTHING_GIVEN
) -> Selection:
    """Reads the signals in volts, at the highest rate that a standard lead has.

    The caller's `unit` is that of signals without one; where no signal is in volts, of all. The caller's `lead_names` are those
    of all signals, or of those that are read.

    Raises:
        ValueError: no signal is in volts, or the caller's unit or names contradict the file's.
    """
    if given.unit is not None:
        stated_units = [unit for unit in units if is_in_volts(unit)]
        without = [not unit.strip() for unit in units]
        taken = without if any(without) or stated_units else [True] * len(units)
        if stated_units and not any(taken) and not any(_same_unit(unit, given.unit) for unit in stated_units):
            raise ValueError(contradiction("unit", stated_units[0], given.unit))
        units = [given.unit if take else unit for unit, take in zip(units, taken, strict=True)]
    known = list(names)
    of_all = given.lead_names is not None and len(given.lead_names) == len(names)
    if of_all:
        known = list(agreed_lead_names(names if any(names) else None, given.lead_names) or ())
    electrical = [row for row, unit in enumerate(units) if is_in_volts(unit)]
    left_out = {name: f"unit {unit!r}" for name, unit in zip(names, units, strict=True) if not is_in_volts(unit)}
    if not electrical:
        signals = listed(f"{name} ({why})" for name, why in left_out.items()) or "none at all"
        raise ValueError(
            f'it holds no signal in volts, but {signals}. If these are leads of an ECG, say in which unit: unit="uV" '
            "(in commands with that option: --unit uV)."
        )
    leads = [row for row in electrical if _lead_key(known[row]) in _CANONICAL_LEADS]
    rate = max(rates[row] for row in leads or electrical)  # of any signal where no lead has a standard name
    left_out |= {names[row]: f"rate {rates[row]:g} Hz" for row in electrical if rates[row] != rate}
    rows = [row for row in electrical if rates[row] == rate]
    read = [known[row] for row in rows]
    if given.lead_names is not None and not of_all:
        read = list(agreed_lead_names(read if any(read) else None, given.lead_names) or ())
    return Selection(rows, read, [units[row] for row in rows], left_out)
