"""ECG records: lead names and order, units, gaps, files, quality, resampling, filters and windows."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from .ecg_formats import read_file
from .ecg_formats_common import REFERENCE_LEADS as REFERENCE_LEADS
from .ecg_formats_common import (
    STANDARD_LEADS,
    UNITS_PER_MILLIVOLT,
    Given,
    agreed_lead_names,
    canonical_lead_names,
    contradiction,
    listed,
)
from .ecg_formats_common import canonical_lead_name as canonical_lead_name

# limb leads as sums of leads I and II (Einthoven 1912; Goldberger 1942)
LIMB_LEADS = {"III": (-1.0, 1.0), "aVR": (-0.5, -0.5), "aVL": (1.0, -0.5), "aVF": (-0.5, 1.0)}

# one millimetre of ECG paper at 25 mm/s: shorter than any wave, so that filling it neither hides nor invents a beat
MAX_GAP_SECONDS = 0.04
# pacing spikes and a 16-bit recorder at 1 uV a count (32.8 mV) stay below
MAX_MILLIVOLTS = 100.0
# limb leads in real records are within 0.04 mV of what I and II give, and with two leads exchanged at least 0.05 mV off
MAX_LIMB_LEAD_ERROR = 0.05

# of `resample`: on each side of its filter
ZERO_CROSSINGS = 10
# of `filter_ecg`, in one direction
BUTTERWORTH_ORDER = 2
NOTCH_QUALITY = 30.0

# of `lead_quality`: seconds and millivolts
FLAT_SECONDS, FLAT_MILLIVOLTS = 1.0, 0.1
SATURATED_SECONDS, SATURATED_MILLIVOLTS = 0.2, 1.0
NOISE_BAND, NOISE_SECONDS, NOISE_MILLIVOLTS = (20.0, 150.0), 0.1, 0.015  # hertz, seconds, millivolts
DRIFT_SECONDS, DRIFT_MILLIVOLTS = 1.0, 1.0
LARGE_MILLIVOLTS = 10.0

_NO_RATE = "The ECG has no sampling rate: give sampling_rate in hertz (in commands with that option: --sampling_rate)."
_RECORD_KEYS = ("array", "sampling_rate", "lead_names", "unit", "metadata")


@dataclass(frozen=True, eq=False)  # == of arrays gives an array, no truth value
class ECGRecord:
    """One ECG. `as_record` makes it and checks it.

    Args:
        array: float32 [leads, samples] in millivolts, without NaN or infinity.
        sampling_rate: in hertz.
        lead_names: names of the rows, out of `STANDARD_LEADS`.
        metadata: what else the file states. `notices` is a tuple of sentences about what the user of the record should know,
            such as which leads were left out; `start` the second at which a model begins to read.
    """

    array: np.ndarray
    sampling_rate: float
    lead_names: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


def with_notices(record: ECGRecord, *sentences: str) -> ECGRecord:
    """The record with these sentences added to the `notices` of its metadata, each once."""
    notices = tuple(dict.fromkeys((*record.metadata.get("notices", ()), *sentences)))
    return replace(record, metadata={**record.metadata, "notices": notices})


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
    if not isinstance(unit, str) or unit not in UNITS_PER_MILLIVOLT:
        raise ValueError(f"Unknown unit {unit!r:.100}; expected one of {', '.join(UNITS_PER_MILLIVOLT)}.")
    return UNITS_PER_MILLIVOLT[unit]


def as_record(
    ecg: Any,
    sampling_rate: float | None = None,
    lead_names: Sequence[str] | None = None,
    unit: str | None = None,
    long_gaps: bool = False,
    microvolts: bool = False,
) -> ECGRecord:
    """Any form of one ECG as a checked `ECGRecord` in millivolts.

    Args:
        ecg: an `ECGRecord`; a dict with the keys `array`, `sampling_rate`, `lead_names`, `unit` (and `metadata`), of
            which all but `array` may be missing or None and are then taken from the other arguments; an array, tensor
            or nested list [leads, samples]; or the path of a file that `read_ecg` reads.
        sampling_rate: in hertz.
        lead_names: names of the rows; may be left out for twelve rows, which are then `STANDARD_LEADS`. Rows of other leads
            (Frank's VX, V4R, a monitor's MLII, respiration) are left out, with a notice.
        unit: `mV` (the default for floats), `uV` or `V`. Integers need one: counts say nothing about the amplitude.
        long_gaps: fill longer gaps too, where they would be an error. The `gaps` of the record's metadata are then the seconds
            at which each begins and ends in any lead; `cut_windows` leaves out the windows that they touch.
        microvolts: leave int16 of the unit uV as they are, which is how datasets store records, where there is such an array, or a
            file whose samples are whole microvolts. The record's array is then int16, in microvolts; else it is as ever.

    The caller's names and unit stand for what a record says in words that are no standard lead and no unit of volts.

    Gaps (NaN) of at most `MAX_GAP_SECONDS` in a lead are filled linearly, at its ends with the nearest sample. Constant
    leads, and records of only such leads, are kept: they are what the machine recorded. The array shares the memory of
    the input where nothing had to be changed, and never writes to it.

    Raises:
        ValueError: the ECG is no real numeric [leads, samples] array, is empty, holds infinities or longer gaps; its
            sampling rate, unit or lead names are missing, impossible, or contradict the arguments; it has no standard
            lead, or one twice; it exceeds `MAX_MILLIVOLTS`, as microvolts taken for millivolts do.
    """
    if isinstance(ecg, (str, os.PathLike)):
        return read_ecg(ecg, sampling_rate, lead_names, unit, long_gaps, microvolts)
    # by name: the class loaded from a Hub repo and the installed one are two classes
    if type(ecg).__name__ == "ECGRecord":
        ecg = {**vars(ecg), "unit": "mV"}
    elif not isinstance(ecg, Mapping):
        ecg = {"array": ecg}
    if "array" not in ecg or not set(ecg) <= set(_RECORD_KEYS):
        raise ValueError(
            f"The ECG is a dict of {list(ecg)!s:.300}; expected 'array' and, where known, {_RECORD_KEYS[1:]}."
        )

    def member(name: str, argument: Any, parse: Any) -> Any:
        values = [parse(value) for value in (ecg.get(name), argument) if value is not None]
        if len(values) == 2 and values[0] != values[1]:  # stated twice is no harm where both agree
            raise ValueError(contradiction(name, ecg[name], argument))
        return values[0] if values else None

    rate = member("sampling_rate", sampling_rate, check_sampling_rate)
    leads = agreed_lead_names(ecg.get("lead_names"), lead_names)
    scale = member("unit", unit, _units_per_millivolt)
    if rate is None:
        raise ValueError(_NO_RATE)

    array = _numeric_array(ecg["array"])
    names = _names_of_rows(array, leads)
    array, leads = _standard_rows(array, names)  # before the checks: rows of other signals may hold anything
    if scale is None:
        if array.dtype.kind != "f":
            raise ValueError(
                f"The ECG holds integers ({array.dtype}) without a unit, and digital counts say nothing about the "
                'amplitude: give unit="uV" (in commands with that option: --unit uV) if one count is one microvolt, or convert it to millivolts.'
            )
        scale = 1.0
    metadata = dict(ecg.get("metadata") or {})
    if not (microvolts and array.dtype == np.int16 and scale == UNITS_PER_MILLIVOLT["uV"]):
        with np.errstate(over="ignore", invalid="ignore"):  # reported below as infinite, or a gap
            array = array.astype(np.float32, copy=False)
            array = array if scale == 1.0 else array / np.float32(scale)  # not in place: the input is never written to
        if not np.isfinite(array).all():
            array, gaps = _fill_gaps(array, rate, leads, long_gaps)
            metadata |= {"gaps": gaps} if gaps else {}
        _check_peak(array)
    others = [name for name in names if name not in STANDARD_LEADS]
    notices = [f"Left out, as no standard lead has that name: {listed(others)}."] if others else []
    return with_notices(ECGRecord(array, rate, leads, metadata), *notices)


def _check_peak(array: np.ndarray) -> None:
    peak = max(array.max(), -array.min())
    if peak > MAX_MILLIVOLTS:
        raise ValueError(
            f"The ECG reaches {peak:.6g} mV, and an ECG on the skin stays far below {MAX_MILLIVOLTS:g} mV. If its numbers "
            'are microvolts, give unit="uV" (in commands with that option: --unit uV); if they are digital counts, convert them to millivolts.'
        )


def _numeric_array(ecg: Any) -> np.ndarray:
    if hasattr(ecg, "detach"):  # a tensor; torch itself need not be imported for those who have none
        ecg = ecg.detach().cpu()
        ecg = (ecg.float() if ecg.is_floating_point() else ecg).numpy()  # NumPy has no bfloat16
    try:
        array = np.asarray(ecg)
    except ValueError as error:
        raise ValueError("The ECG's leads are not of one length; give a rectangular [leads, samples] array.") from error
    if array.dtype.kind not in "fiu":  # floats, signed and unsigned: no booleans, complex numbers or objects
        raise ValueError(f"The ECG ({type(ecg).__name__}) is of {array.dtype}; expected real numbers [leads, samples].")
    if array.ndim != 2:
        raise ValueError(
            f"The ECG has shape {list(array.shape)}; expected [leads, samples] (of one lead: [1, samples])."
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
            f"The ECG has {len(array)} leads without names, and only {expected} have a standard order: give lead_names (in "
            "commands with that option: --lead_names)."
        )
    raise ValueError(f"The ECG has {len(array)} leads but {expected} lead names: {listed(leads)}.")


def _standard_rows(array: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The rows of standard leads, and their names."""
    rows = [row for row, name in enumerate(names) if name in STANDARD_LEADS]
    if len(rows) == len(names):
        return array, names
    if not rows:
        raise ValueError(
            f"The ECG has no standard lead, but {listed(names)}; expected some of {', '.join(STANDARD_LEADS)}, in any case. "
            "If these are their names, give lead_names (in commands with that option: --lead_names)."
        )
    return array[rows], tuple(names[row] for row in rows)


def _fill_gaps(
    array: np.ndarray, sampling_rate: float, lead_names: tuple[str, ...], long_gaps: bool
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """The array without NaN, and where gaps longer than `MAX_GAP_SECONDS` begin and end, in seconds."""
    array = array.copy()  # the rows below are views, which are written to
    long = np.zeros(array.shape[1], bool)  # samples that are in such a gap in any lead
    for name, lead in zip(lead_names, array, strict=True):
        if np.isinf(lead).any():
            raise ValueError(f"Lead {name} holds infinite values; expected finite millivolts.")
        missing = np.isnan(lead)
        if missing.all():
            raise ValueError(f"Lead {name} is NaN throughout; leave the lead out or give its signal.")
        edges = np.flatnonzero(np.diff(np.pad(missing, 1)))  # start, end, start, end, ...
        lengths = np.diff(edges)[::2] / sampling_rate  # every other difference lies between gaps
        gap = lengths.max(initial=0)
        if gap > MAX_GAP_SECONDS and not long_gaps:
            raise ValueError(
                f"Lead {name} has a gap (NaN) of {gap:.3g} s; only gaps of at most {MAX_GAP_SECONDS} s are filled. "
                "Cut the record (`elm data build --window` keeps the windows without a gap), or fill the gap before."
            )
        for start, end in edges.reshape(-1, 2)[lengths > MAX_GAP_SECONDS].tolist():
            long[start:end] = True
        lead[missing] = np.interp(np.flatnonzero(missing), np.flatnonzero(~missing), lead[~missing])
    edges = np.flatnonzero(np.diff(np.pad(long, 1)))
    return array, [(start / sampling_rate, end / sampling_rate) for start, end in edges.reshape(-1, 2).tolist()]


def select_leads(record: ECGRecord, lead_names: Sequence[str], allow_missing: bool = False) -> ECGRecord:
    """The record with the leads `lead_names`, in that order; other leads are dropped.

    Missing limb leads are derived from I and II: III = II - I, aVR = -(I + II) / 2, aVL = I - II / 2, aVF = II - I / 2. Notices
    tell which leads are derived and which are missing.

    Args:
        allow_missing: leave out leads that are missing and not derivable; else they are an error.

    Raises:
        ValueError: a lead is unknown, named twice, or missing and not derivable; or all are missing.
    """
    wanted = canonical_lead_names(lead_names)
    if wanted == record.lead_names:  # nothing to do, and no copy
        return record
    rows = dict(zip(record.lead_names, record.array, strict=True))
    if "I" in rows and "II" in rows:
        for name, (i, ii) in LIMB_LEADS.items():
            if name in wanted and name not in rows:
                rows[name] = np.float32(i) * rows["I"] + np.float32(ii) * rows["II"]
    missing = [name for name in wanted if name not in rows]
    if missing and not (allow_missing and len(missing) < len(wanted)):
        raise ValueError(
            f"The ECG has no lead {', '.join(missing)}: it has {', '.join(record.lead_names)}. III, aVR, aVL "
            "and aVF can be derived from I and II; other leads have to be recorded."
        )
    names = tuple(name for name in wanted if name in rows)
    derived = [name for name in names if name not in record.lead_names]
    notices = [f"Derived from I and II: {', '.join(derived)}."] if derived else []
    notices += [f"Missing: {', '.join(missing)}."] if missing else []
    selected = replace(record, array=np.stack([rows[name] for name in names]), lead_names=names)
    return with_notices(selected, *notices)


def limb_lead_error(record: ECGRecord) -> float:
    """How far the recorded III, aVR, aVL and aVF are from what I and II give (`LIMB_LEADS`), in millivolts.

    The largest over these leads of the standard deviation of the difference: an offset of a lead does no harm. Quantisation to
    microvolts makes 0.0005 mV. More than `MAX_LIMB_LEAD_ERROR` says that leads have wrong names or signs, or were not
    recorded at the same time. 0.0 where I, II or all the others are missing: there is nothing to compare.
    """
    rows = dict(zip(record.lead_names, record.array, strict=True))
    derived = [name for name in LIMB_LEADS if name in rows]
    if "I" not in rows or "II" not in rows or not derived:
        return 0.0
    limbs = np.stack([rows[name] for name in ("I", "II", *derived)]).astype(np.float32, copy=False)
    expected = np.array([LIMB_LEADS[name] for name in derived], np.float32) @ limbs[:2]
    return float((limbs[2:] - expected).std(axis=1).max())


def lead_quality(record: ECGRecord) -> dict[str, list[str]]:
    """What is wrong with the leads of a record as it was recorded, before filters and resampling.

    - `flat`: spans less than 0.1 mV, or holds one value for 1 s or longer, as after an electrode fell off.
    - `saturated`: at its highest or lowest value for 0.2 s altogether or longer, 1 mV or further from its median: the recorder
      could show no more.
    - `noisy`: more than 0.015 mV (root mean square) between 20 and 150 Hz in three quarters of all stretches of 0.1 s, as QRS
      complexes leave a quarter without them up to 200 beats a minute. Or a baseline that drifts: the medians of its seconds
      are more than 1 mV apart.
    - `large`: more than 10 mV from its median, as no heart makes it on the skin: a wrong gain, or an artefact.

    The kinds of fault, and 20 Hz as the border of muscle noise, are those of Jekova et al. 2012 (doi 10.1088/0967-3334/33/9/1463);
    the numbers are set so that few leads of PTB-XL have a flag.

    Returns:
        The flags of each lead that has any, by lead.
    """
    array, rate = record.array, record.sampling_rate
    peaks = np.stack([array.max(axis=1), array.min(axis=1)])
    middle = np.median(array, axis=1)  # an offset alone is no saturation
    held = np.stack([(array == peak[:, None]).sum(axis=1) for peak in peaks]) / rate  # seconds, [2, leads]
    flags = {
        "flat": (peaks[0] - peaks[1] < FLAT_MILLIVOLTS) | (_longest_hold(array) >= FLAT_SECONDS * rate),
        "saturated": ((held >= SATURATED_SECONDS) & (abs(peaks - middle) >= SATURATED_MILLIVOLTS)).any(axis=0),
        "noisy": (_noise(array, rate) > NOISE_MILLIVOLTS)
        | (np.ptp(np.median(_stretches(array, rate, DRIFT_SECONDS), axis=2), axis=1) > DRIFT_MILLIVOLTS),
        "large": (abs(peaks - middle) > LARGE_MILLIVOLTS).any(axis=0),
    }
    names = record.lead_names
    by_lead = {name: [flag for flag, leads in flags.items() if leads[row]] for row, name in enumerate(names)}
    return {name: own_flags for name, own_flags in by_lead.items() if own_flags}


def _longest_hold(array: np.ndarray) -> np.ndarray:
    """Samples of the longest stretch of each lead without a change."""
    changes = np.pad(np.diff(array, axis=1) != 0, ((0, 0), (1, 1)), constant_values=True)
    return np.array([np.diff(np.flatnonzero(lead)).max() for lead in changes])  # never empty: the padded ends count


def _stretches(array: np.ndarray, sampling_rate: float, seconds: float) -> np.ndarray:
    """Whole stretches of each lead [leads, stretches, samples]; the record as one where it is shorter."""
    size = min(array.shape[1], max(1, round(seconds * sampling_rate)))
    number = array.shape[1] // size
    return array[:, : number * size].reshape(len(array), number, size)


def _noise(array: np.ndarray, sampling_rate: float) -> np.ndarray:
    low, high = NOISE_BAND[0], min(NOISE_BAND[1], 0.45 * sampling_rate)  # filter_ecg wants less than half
    if low >= high:
        return np.zeros(len(array))  # sampled too slowly to show any
    stretches = _stretches(filter_ecg(array, sampling_rate, (low, high)), sampling_rate, NOISE_SECONDS)
    return np.quantile(np.sqrt(np.square(stretches).mean(axis=2)), 0.25, axis=1)  # exceeded by three quarters


def resampling_ratio(source_rate: float, target_rate: float) -> Fraction:
    """Samples that `resample` makes of one: `target_rate / source_rate` as a fraction whose smaller term is at most 1000."""
    ratio = Fraction(check_sampling_rate(target_rate)) / Fraction(check_sampling_rate(source_rate))  # exact
    # by its smaller term, as the nearest fraction to 1/4000 with a small denominator is 0
    return ratio.limit_denominator(1000) if ratio > 1 else 1 / (1 / ratio).limit_denominator(1000)


@lru_cache(maxsize=16)
def _polyphase_filter(up: int, down: int) -> tuple[np.ndarray, int]:
    """Filters [up, 1, taps] of the `up` output samples that `down` input samples make, and the samples read before."""
    half_length = ZERO_CROSSINGS * max(up, down)
    n = np.arange(-half_length, half_length + 1)
    taps = np.sinc(n / max(up, down)) * np.kaiser(len(n), 5.0)  # cuts off at the lower Nyquist frequency
    taps *= up / taps.sum()  # makes up for the zeros between the samples
    # output p stands at p * down, input j at j * up, on the grid of the upsampled signal
    before = half_length // up
    after = ((up - 1) * down + half_length) // up
    offset = np.arange(up)[:, None] * down - np.arange(-before, after + 1) * up
    weight = np.where(np.abs(offset) <= half_length, taps.take(offset + half_length, mode="clip"), 0.0)
    return weight[:, None].astype(np.float32), before


def resample(array: np.ndarray, source_rate: float, target_rate: float, offset: np.ndarray | None = None) -> np.ndarray:
    """Resamples to another sampling rate, with an anti-aliasing filter and without delay.

    The polyphase FIR filter (a sinc in a Kaiser window, beta 5, over ten zero crossings on each side) is that of
    `scipy.signal.resample_poly(..., padtype="edge")`. Each lead's `offset` is subtracted before and added after: a constant
    stays exactly constant, and an offset makes no ripple.

    Args:
        array: float32 [leads, samples].
        source_rate, target_rate: in hertz. `resampling_ratio` up/down is exact for integer rates if one is at most 1000 Hz,
            and within 0.05 % for any other.
        offset: [leads, 1], the first sample of each lead by default. A part of a record takes that of the whole.

    Returns:
        float32 [leads, ceil(samples * up / down)]; `array` itself where the rates are equal.
    """
    array = np.asarray(array, dtype=np.float32)
    ratio = resampling_ratio(source_rate, target_rate)
    if ratio == 1:
        return array
    up, down = ratio.numerator, ratio.denominator
    weight, before = _polyphase_filter(up, down)
    num_samples = array.shape[1]
    num_outputs = math.ceil(num_samples * ratio)  # exact, of a Fraction
    num_blocks = math.ceil(num_outputs / up)
    after = max(0, (num_blocks - 1) * down + weight.shape[2] - before - num_samples)
    offset = array[:, :1] if offset is None else offset
    import torch  # late: reading and checking records need not wait for it

    signal = np.pad(array - offset, ((0, 0), (before, after)), mode="edge")[:, None]  # [leads, 1, samples]
    # [leads, up, blocks]
    blocks = torch.nn.functional.conv1d(torch.from_numpy(signal), torch.from_numpy(weight), stride=down)
    return blocks.transpose(1, 2).flatten(1)[:, :num_outputs].numpy() + offset


def check_filter(sampling_rate: float, bandpass: Sequence[float] | None, notch: float | None) -> None:
    """ValueError if `filter_ecg` cannot filter so at that sampling rate."""
    nyquist = sampling_rate / 2
    if bandpass is not None and not (len(bandpass) == 2 and 0 < bandpass[0] < bandpass[1] < nyquist):
        raise ValueError(
            f"bandpass is {list(bandpass)}; expected two frequencies low < high between 0 and {nyquist:g} Hz, half of the "
            "sampling rate, such as [0.5, 40]."
        )
    if notch is not None and not 0 < notch < nyquist:
        raise ValueError(
            f"notch is {notch!r}; expected a frequency between 0 and {nyquist:g} Hz, half of the sampling rate, such as 50 or 60. "
            "At a lower sampling rate there is no mains hum to take out: leave it out."
        )


def filter_ecg(
    array: np.ndarray, sampling_rate: float, bandpass: Sequence[float] | None = None, notch: float | None = None
) -> np.ndarray:
    """Band-pass and mains filter without delay: no wave moves or becomes skew.

    The gains are those of SciPy's filters run forward and backward: `sosfiltfilt(butter(2, bandpass, "bandpass"))`, a half at the
    two frequencies, and `filtfilt(*iirnotch(notch, 30))`. They are applied to the spectrum of each lead and its mirror image,
    which has no jump at the ends. A constant stays constant, or becomes 0 with `bandpass`.

    Without delay the lower frequency may be up to 0.67 Hz for diagnosis, with adults' upper one at least 150 Hz (AHA/ACCF/HRS,
    Kligfield et al. 2007, doi 10.1161/CIRCULATIONAHA.106.180200).

    Args:
        array: float32 [leads, samples].
        sampling_rate: in hertz.
        bandpass: the low and the high frequency, in hertz.
        notch: frequency that is taken out, in hertz: 50 or 60.

    Returns:
        float32 [leads, samples]; `array` itself where there is nothing to filter.

    Raises:
        ValueError: as `check_filter`.
    """
    check_filter(sampling_rate, bandpass, notch)
    array = np.asarray(array, dtype=np.float32)
    if bandpass is None and notch is None:
        return array
    num_samples = array.shape[1]
    gain = _filter_gain(num_samples, sampling_rate, None if bandpass is None else tuple(bandpass), notch)
    offset = array[:, :1]
    mirrored = np.concatenate([array - offset, (array - offset)[:, ::-1]], axis=1)
    filtered = np.fft.irfft(np.fft.rfft(mirrored) * gain, 2 * num_samples)[:, :num_samples]
    return (filtered + offset * gain[0]).astype(np.float32, copy=False)  # gain[0] is that of a constant


def settling_seconds(bandpass: Sequence[float] | None, notch: float | None) -> float:
    """Seconds after which nothing is left, to a millionth, of what `filter_ecg` makes of an end of the record."""
    widths = [] if bandpass is None else [bandpass[0], bandpass[1] - bandpass[0]]  # hertz; the narrowest fades last
    widths += [] if notch is None else [notch / NOTCH_QUALITY]
    # it fades by exp(-k * width * seconds), and k is 2.2 to 4.4
    return 6 / min(widths, default=math.inf)


@lru_cache(maxsize=16)  # bandpass is a tuple, as the cache hashes it
def _filter_gain(
    num_samples: int, sampling_rate: float, bandpass: tuple[float, float] | None, notch: float | None
) -> np.ndarray:
    """Gains [num_samples + 1] of the spectrum of a lead and its mirror image: squares of those of one direction."""
    angle = np.pi * np.arange(num_samples + 1) / num_samples  # of the bins of rfft, in radians a sample
    gain = np.ones(num_samples + 1)
    if bandpass is not None:
        # the bilinear transform maps an angle to the tangent of its half; at 0 and pi the gain is 0
        low, high = np.tan(np.pi * np.array(bandpass) / sampling_rate)
        tangent = np.tan(angle[1:-1] / 2)
        distance = (tangent**2 - low * high) / ((high - low) * tangent)
        gain[1:-1] /= 1 + distance ** (2 * BUTTERWORTH_ORDER)
        gain[[0, -1]] = 0
    if notch is not None:
        center = 2 * np.pi * notch / sampling_rate
        width = np.tan(center / NOTCH_QUALITY / 2)  # as SciPy's iirnotch: its bandwidth is center / quality
        distance = (np.cos(angle) - np.cos(center)) ** 2
        gain *= distance / (distance + (width * np.sin(angle)) ** 2)
    return gain.astype(np.float32)


def window_starts(record: ECGRecord, seconds: float, stride: float | None = None) -> list[int]:
    """The first sample of each window of a record, gaps or not; arguments and errors as of `cut_windows`."""
    stride = seconds if stride is None else stride
    for name, length in (("seconds", seconds), ("stride", stride)):
        if not (math.isfinite(length) and length * record.sampling_rate >= 0.5):
            raise ValueError(
                f"{name} is {length!r}; expected a positive number of seconds, at least a sample of "
                f"{1 / record.sampling_rate:g} s."
            )
    size, step = round(seconds * record.sampling_rate), stride * record.sampling_rate  # a rounded step would drift
    number = max(0, record.array.shape[1] - size) / step
    return [round(index * step) for index in range(math.floor(number + 1e-9) + 1)]  # rounding may fall short


def cut_windows(record: ECGRecord, seconds: float, stride: float | None = None) -> list[ECGRecord]:
    """The windows of a long record that hold no long gap, each a record of its own that shares its memory.

    What is left at the end is dropped if it is shorter than a window; a record that is shorter is its only window. The
    `metadata` say with `start_second` where in the record a window begins.

    Args:
        record: a record with long gaps was made by `as_record` with `long_gaps`.
        seconds: length of a window.
        stride: seconds from the start of a window to that of the next; default: `seconds`.

    Raises:
        ValueError: a length is not positive, or less than a sample.
    """
    starts = window_starts(record, seconds, stride)
    rate, size = record.sampling_rate, round(seconds * record.sampling_rate)
    gaps = record.metadata.get("gaps", ())
    metadata = {name: value for name, value in record.metadata.items() if name != "gaps"}
    return [
        replace(
            record, array=record.array[:, start : start + size], metadata={**metadata, "start_second": start / rate}
        )
        for start in starts
        if not any(begin < (start + size) / rate and start / rate < end for begin, end in gaps)
    ]


def read_ecg(
    path: str | os.PathLike,
    sampling_rate: float | None = None,
    lead_names: Sequence[str] | None = None,
    unit: str | None = None,
    long_gaps: bool = False,
    microvolts: bool = False,
) -> ECGRecord:
    """Reads one ECG from a file; the other arguments are those of `as_record`, for what the file does not say.

    NumPy (`.npy`; `.npz` with the keys `array` or `ecg` [leads, samples], and where known `sampling_rate`, `lead_names` and
    `unit`), WFDB, EDF and BDF, DICOM, HL7 aECG, GE MUSE XML, Philips Sierra XML, Mortara ELI XML, SCP-ECG, ISHNE, MFER, AliveCor
    Kardia, MATLAB (CPSC 2018, CODE-15), HDF5 (CODE-15: `exams_part0.hdf5#EXAM_ID`) and CSV; `ecg_formats.read_file` tells the
    format by the content, and never executes any.

    Beside those of `as_record`, notices tell which signals of the file are not in the record, whether its limb leads
    contradict each other, and whether the file holds padding.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another kind, damaged, or holds no valid ECG.
        ImportError: the format needs a library of the extra `formats`.
    """
    if unit is not None:
        _units_per_millivolt(unit)
    if lead_names is not None:
        lead_names = canonical_lead_names(lead_names, others=True)
    members = read_file(path, Given(lead_names, unit, microvolts=microvolts))
    try:
        # what the file says is agreed with the caller's already
        record = as_record(
            members,
            sampling_rate,
            lead_names if members["lead_names"] is None else None,
            unit if members["unit"] is None else None,
            long_gaps,
            microvolts,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    signals = record.metadata.get("left_out", {})
    notices = [f"Signals left out: {listed(f'{name} ({why})' for name, why in signals.items())}."] if signals else []
    if padding := record.metadata.get("padding_seconds"):
        notices.append(
            "Zeros before and after the recording, as the data set pads it: {:.3g} and {:.3g} s.".format(*padding)
        )
    if limb_lead_error(record) > MAX_LIMB_LEAD_ERROR * (1000 if record.array.dtype == np.int16 else 1):
        notices.append(
            f"III, aVR, aVL or aVF differ by more than {MAX_LIMB_LEAD_ERROR:g} mV from what I and II give: leads may have wrong "
            "names or signs."
        )
    return with_notices(record, *notices)
