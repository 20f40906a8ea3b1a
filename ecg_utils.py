"""ECG records: lead names and order, units, gaps, files and resampling."""

import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

STANDARD_LEADS = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
# the order of the reference system's checkpoints
REFERENCE_LEADS = ("I", "II", "III", "aVL", "aVR", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")

# limb leads as sums of leads I and II (Einthoven 1912; Goldberger 1942)
LIMB_LEADS = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}

# how many of a unit make one millivolt; the micro sign and the Greek letter mu look alike
UNITS_PER_MILLIVOLT = {"mV": 1.0, "uV": 1e3, "\u00b5V": 1e3, "\u03bcV": 1e3, "V": 1e-3}

# one millimetre of ECG paper at 25 mm/s: shorter than any wave, so that filling it neither hides nor invents a beat
MAX_GAP_SECONDS = 0.04
# pacing spikes and a 16-bit recorder at 1 uV a count (32.8 mV) stay below
MAX_MILLIVOLTS = 100.0

_CANONICAL_LEADS = {name.lower(): name for name in STANDARD_LEADS}
_RECORD_KEYS = ("array", "sampling_rate", "lead_names", "unit", "metadata")


@dataclass(frozen=True, eq=False)
class ECGRecord:
    """One ECG. `as_record` makes it and checks it.

    Args:
        array: float32 [leads, samples] in millivolts, without NaN or infinity.
        sampling_rate: in hertz.
        lead_names: names of the rows, out of `STANDARD_LEADS`.
        metadata: what else the file said.
    """

    array: np.ndarray
    sampling_rate: float
    lead_names: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def canonical_lead_name(name: str) -> str:
    """The standard spelling of a lead: any case, with or without the word "lead" ("avr", "Lead II" -> "aVR", "II").

    Leads that only resemble a standard one are unknown: MLII (a monitor's modified lead II), -aVR, V4R.

    Raises:
        ValueError: the name is none of the twelve standard leads.
    """
    key = str(name).strip().lower().removeprefix("lead").strip()
    if key not in _CANONICAL_LEADS:
        raise ValueError(f"Unknown lead {name!r}; expected one of {', '.join(STANDARD_LEADS)}, in any case.")
    return _CANONICAL_LEADS[key]


def canonical_lead_names(names: Iterable[str]) -> tuple[str, ...]:
    """`canonical_lead_name` of each name.

    Raises:
        ValueError: a name is unknown or given twice, or `names` is a string or empty.
    """
    if isinstance(names, str):
        raise ValueError(
            f"lead_names is the string {names!r}; give a list of names, such as {list(STANDARD_LEADS[:3])}."
        )
    leads = tuple(canonical_lead_name(name) for name in names)
    if not leads:
        raise ValueError("lead_names is empty; name at least one lead.")
    twice = sorted({name for name in leads if leads.count(name) > 1})
    if twice:
        raise ValueError(f"Lead {', '.join(twice)} is named more than once in {list(leads)}; a lead stands once.")
    return leads


def check_sampling_rate(sampling_rate: float) -> float:
    """`sampling_rate` in hertz as a float.

    Raises:
        ValueError: it is not a positive finite number.
    """
    try:
        rate = math.nan if isinstance(sampling_rate, (str, bool, np.bool_)) else float(sampling_rate)
    except (TypeError, ValueError):
        rate = math.nan
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"sampling_rate is {sampling_rate!r}; expected a positive number of hertz, such as 500.")
    return rate


def _units_per_millivolt(unit: str) -> float:
    if unit not in UNITS_PER_MILLIVOLT:
        raise ValueError(f"Unknown unit {unit!r}; expected one of {', '.join(UNITS_PER_MILLIVOLT)}.")
    return UNITS_PER_MILLIVOLT[unit]


def as_record(
    ecg: Any,
    sampling_rate: float | None = None,
    lead_names: Sequence[str] | None = None,
    unit: str | None = None,
) -> ECGRecord:
    """Any form of one ECG as a checked `ECGRecord` in millivolts.

    Args:
        ecg: an `ECGRecord`; a dict with the keys `array`, `sampling_rate`, `lead_names`, `unit` (and `metadata`), of
            which all but `array` may be missing or None and are then taken from the other arguments; an array, tensor
            or nested list [leads, samples]; or the path of a file that `read_ecg` reads.
        sampling_rate: in hertz.
        lead_names: names of the rows; may be left out for twelve rows, which are then `STANDARD_LEADS`.
        unit: `mV` (the default for floats), `uV` or `V`. Integers need one: counts say nothing about the amplitude.

    Gaps (NaN) of at most `MAX_GAP_SECONDS` in a lead are filled linearly, at its ends with the nearest sample. Constant
    leads, and records of only such leads, are kept: they are what the machine recorded. The array shares the memory of
    the input where nothing had to be changed, and never writes to it.

    Raises:
        ValueError: the ECG is no real numeric [leads, samples] array, is empty, holds infinities or longer gaps; its
            sampling rate, unit or lead names are missing, impossible, or contradict the arguments; it exceeds
            `MAX_MILLIVOLTS`, as microvolts taken for millivolts do.
    """
    if isinstance(ecg, (str, os.PathLike)):
        return read_ecg(ecg, sampling_rate, lead_names, unit)
    # by name: the class loaded from a Hub repo and the installed one are two classes
    if type(ecg).__name__ == "ECGRecord":
        ecg = {**vars(ecg), "unit": "mV"}
    elif not isinstance(ecg, Mapping):
        ecg = {"array": ecg}
    if "array" not in ecg or not set(ecg) <= set(_RECORD_KEYS):
        raise ValueError(f"The ECG is a dict of {list(ecg)}; expected 'array' and, where known, {_RECORD_KEYS[1:]}.")

    def member(name: str, argument: Any, parse: Any) -> Any:
        values = [parse(value) for value in (ecg.get(name), argument) if value is not None]
        if len(values) == 2 and values[0] != values[1]:
            raise ValueError(f"The ECG has {name}={ecg[name]!r}, the call says {name}={argument!r}; give it once.")
        return values[0] if values else None

    rate = member("sampling_rate", sampling_rate, check_sampling_rate)
    leads = member("lead_names", lead_names, canonical_lead_names)
    scale = member("unit", unit, _units_per_millivolt)
    if rate is None:
        raise ValueError("The ECG has no sampling rate; pass sampling_rate=... in hertz.")

    array = _numeric_array(ecg["array"])
    leads = _names_of_rows(array, leads)
    if scale is None:
        if array.dtype.kind != "f":
            raise ValueError(
                f"The ECG holds integers ({array.dtype}) without a unit, and digital counts say nothing about the "
                'amplitude; pass unit="uV" if one count is one microvolt, or convert it to millivolts.'
            )
        scale = 1.0
    with np.errstate(over="ignore"):  # reported below as infinite
        array = array.astype(np.float32, copy=False)
        if scale != 1.0:
            array = array / np.float32(scale)
    if not np.isfinite(array).all():
        array = _fill_gaps(array, rate, leads)
    peak = max(array.max(), -array.min())
    if peak > MAX_MILLIVOLTS:
        raise ValueError(
            f"The ECG reaches {peak:.6g} mV, and an ECG on the skin stays far below {MAX_MILLIVOLTS:g} mV. If its numbers "
            'are microvolts, pass unit="uV"; if they are digital counts, convert them to millivolts.'
        )
    return ECGRecord(array, rate, leads, ecg.get("metadata") or {})


def _numeric_array(ecg: Any) -> np.ndarray:
    if isinstance(ecg, torch.Tensor):
        ecg = ecg.detach().cpu()
        ecg = (ecg.float() if ecg.is_floating_point() else ecg).numpy()  # NumPy has no bfloat16
    try:
        array = np.asarray(ecg)
    except ValueError as error:
        raise ValueError("The ECG's leads are not of one length; give a rectangular [leads, samples] array.") from error
    if array.dtype.kind not in "fiu":
        raise ValueError(
            f"The ECG ({type(ecg).__name__}) has dtype {array.dtype}; expected real numbers [leads, samples]."
        )
    if array.ndim != 2:
        raise ValueError(
            f"The ECG has shape {list(array.shape)}; expected [leads, samples] (one lead alone is [1, samples])."
        )
    if array.size == 0:
        raise ValueError(f"The ECG is empty: its shape is {list(array.shape)}, expected [leads, samples].")
    return array


def _names_of_rows(array: np.ndarray, leads: tuple[str, ...] | None) -> tuple[str, ...]:
    expected = len(STANDARD_LEADS) if leads is None else len(leads)
    if len(array) == expected:
        return STANDARD_LEADS if leads is None else leads
    if array.shape[1] == expected:
        raise ValueError(
            f"The ECG has shape {list(array.shape)}, which looks like [samples, leads]; transpose it to "
            "[leads, samples]."
        )
    if leads is None:
        raise ValueError(
            f"The ECG has {len(array)} leads without names, and only {expected} have a standard order; pass "
            "lead_names=[...]."
        )
    raise ValueError(f"The ECG has {len(array)} leads but {expected} lead names: {', '.join(leads)}.")


def _fill_gaps(array: np.ndarray, sampling_rate: float, lead_names: tuple[str, ...]) -> np.ndarray:
    array = array.copy()
    for name, lead in zip(lead_names, array, strict=True):
        if np.isinf(lead).any():
            raise ValueError(f"Lead {name} holds infinite values; expected finite millivolts.")
        missing = np.isnan(lead)
        if missing.all():
            raise ValueError(f"Lead {name} is NaN throughout; leave the lead out or give its signal.")
        edges = np.flatnonzero(np.diff(np.pad(missing, 1)))  # start, end, start, end, ...
        gap = np.diff(edges)[::2].max(initial=0) / sampling_rate
        if gap > MAX_GAP_SECONDS:
            raise ValueError(
                f"Lead {name} has a gap (NaN) of {gap:.3g} s; only gaps of at most {MAX_GAP_SECONDS} s are filled. "
                "Cut the record, or fill the gap before."
            )
        lead[missing] = np.interp(np.flatnonzero(missing), np.flatnonzero(~missing), lead[~missing])
    return array


def select_leads(record: ECGRecord, lead_names: Sequence[str]) -> ECGRecord:
    """The record with the leads `lead_names`, in that order; other leads are dropped.

    Missing limb leads are derived from I and II: III = II - I, aVR = -(I + II) / 2, aVL = I - II / 2, aVF = II - I / 2.

    Raises:
        ValueError: a lead is unknown, named twice, or missing and not derivable.
    """
    wanted = canonical_lead_names(lead_names)
    if wanted == record.lead_names:
        return record
    rows = dict(zip(record.lead_names, record.array, strict=True))
    if "I" in rows and "II" in rows:
        for name, (i, ii) in LIMB_LEADS.items():
            if name in wanted and name not in rows:
                rows[name] = np.float32(i) * rows["I"] + np.float32(ii) * rows["II"]
    missing = [name for name in wanted if name not in rows]
    if missing:
        raise ValueError(
            f"The ECG has no lead {', '.join(missing)}: it has {', '.join(record.lead_names)}. III, aVR, aVL "
            "and aVF can be derived where I and II are there; other leads have to be recorded."
        )
    return ECGRecord(np.stack([rows[name] for name in wanted]), record.sampling_rate, wanted, record.metadata)


def _resampling_ratio(source_rate: float, target_rate: float) -> Fraction:
    ratio = Fraction(check_sampling_rate(target_rate)) / Fraction(check_sampling_rate(source_rate))
    # by its smaller term, as the nearest fraction to 1/4000 with a small denominator is 0
    return ratio.limit_denominator(1000) if ratio > 1 else 1 / (1 / ratio).limit_denominator(1000)


@lru_cache(maxsize=16)
def _polyphase_filter(up: int, down: int) -> tuple[torch.Tensor, int]:
    """Filters [up, 1, taps] of the `up` output samples that `down` input samples make, and the samples read before."""
    half_length = 10 * max(up, down)
    n = np.arange(-half_length, half_length + 1)
    taps = np.sinc(n / max(up, down)) * np.kaiser(len(n), 5.0)
    taps *= up / taps.sum()
    # output p stands at p * down, input j at j * up, on the grid of the upsampled signal
    before = half_length // up
    after = ((up - 1) * down + half_length) // up
    offset = np.arange(up)[:, None] * down - np.arange(-before, after + 1) * up
    weight = np.where(np.abs(offset) <= half_length, taps.take(offset + half_length, mode="clip"), 0.0)
    return torch.from_numpy(weight[:, None].astype(np.float32)), before


def resample(array: np.ndarray, source_rate: float, target_rate: float) -> np.ndarray:
    """Resamples to another sampling rate, with an anti-aliasing filter and without delay.

    The polyphase FIR filter (a sinc in a Kaiser window, beta 5, over ten zero crossings on each side) is that of
    `scipy.signal.resample_poly(..., padtype="edge")`. Each lead's first sample is subtracted before and added after:
    a constant stays exactly constant, and an offset makes no ripple.

    Args:
        array: float32 [leads, samples].
        source_rate, target_rate: in hertz. Their ratio up/down is taken as a fraction whose smaller term is at most
            1000, which is exact for integer rates of which one is at most 1000 Hz, and within 0.05 % for any other.

    Returns:
        float32 [leads, ceil(samples * up / down)]; `array` itself where the rates are equal.
    """
    array = np.asarray(array, dtype=np.float32)
    ratio = _resampling_ratio(source_rate, target_rate)
    if ratio == 1:
        return array
    up, down = ratio.numerator, ratio.denominator
    weight, before = _polyphase_filter(up, down)
    num_samples = array.shape[1]
    num_outputs = math.ceil(num_samples * ratio)
    num_blocks = math.ceil(num_outputs / up)
    after = max(0, (num_blocks - 1) * down + weight.shape[2] - before - num_samples)
    offset = array[:, :1]
    signal = F.pad(torch.from_numpy(array - offset)[:, None], (before, after), mode="replicate")
    blocks = F.conv1d(signal, weight, stride=down)  # [leads, up, blocks]
    return blocks.transpose(1, 2).flatten(1)[:, :num_outputs].numpy() + offset


def read_ecg(
    path: str | os.PathLike,
    sampling_rate: float | None = None,
    lead_names: Sequence[str] | None = None,
    unit: str | None = None,
) -> ECGRecord:
    """Reads one ECG from a file; the other arguments are those of `as_record`, for what the file does not say.

    - `.npy`: an array [leads, samples].
    - `.npz`: `array` (or `ecg`) [leads, samples], and if there `sampling_rate`, `lead_names`, `unit`.

    Pickled objects are refused, as loading them runs code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged, or holds no valid ECG.
    """
    path = Path(path)
    if path.suffix.lower() not in (".npy", ".npz"):
        raise ValueError(f"Cannot read {path}: its suffix is {path.suffix!r}; expected .npy or .npz.")
    with path.open("rb") as file:
        try:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                members = {"array": content}
            else:
                members = {
                    key: content[key].tolist() for key in ("sampling_rate", "lead_names", "unit") if key in content
                }
                members["array"] = content["array" if "array" in content else "ecg"]
        except KeyError as error:
            raise ValueError(f"{path} holds {content.files}; expected the key 'array' or 'ecg'.") from error
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(
                f"Cannot read {path}: it is damaged or holds pickled objects, such as a dict in a .npy file, which are "
                "not read as loading them runs code. Save the array itself, or an .npz with array, sampling_rate, "
                f"lead_names and unit. (NumPy: {error})"
            ) from error
    try:
        return as_record(members, sampling_rate, lead_names, unit)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
