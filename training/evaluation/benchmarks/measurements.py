"""What can be measured on an ECG without a model: rate, axis and intervals, on its mean beat; for `--describe`.

Plain signal processing, no diagnosis: R peaks by the energy of the slopes (`r_peaks`), the mean beat by
the median over the beats that are like each other, and its waves by thresholds on it. A number that cannot be told reliably is None.
"""

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import uniform_filter1d

from elm_ecg.ecg_utils import ECGRecord, filter_ecg, resample
from elm_ecg.training.evaluation.beats import r_peaks

RATE = 500.0  # hertz, at which all is measured
MIN_BEATS = 3
BEFORE, AFTER = 0.35, 0.6  # seconds of the mean beat before and after the R peak
MIN_LIKENESS = 0.8  # correlation of a beat with the median beat
# of the RR intervals: mean absolute step from one to the next, as a share of the mean interval; of PTB-XL's records in sinus rhythm nine
# of ten are below 0.07, and of those in atrial fibrillation nine of ten above 0.12
IRREGULAR = 0.1


@dataclass(frozen=True)
class Measurements:
    """Rate in beats/min, axis in degrees, intervals in milliseconds; None for what cannot be told.

    Args:
        regular: whether the RR intervals differ little from each other.
        st_levels: lead -> level of the ST segment 60 ms after the QRS complex, in millivolts.
    """

    num_beats: int
    rate: float | None = None
    regular: bool | None = None
    axis: float | None = None
    qrs: float | None = None
    pr: float | None = None
    qt: float | None = None
    qtc: float | None = None
    st_levels: dict[str, float] | None = None


def measure(record: ECGRecord) -> Measurements:
    """Measures a record of any leads and length."""
    array = resample(record.array.astype(np.float32), record.sampling_rate, RATE)
    signal = ECGRecord(array, RATE, record.lead_names)
    peaks = r_peaks(signal)
    if len(peaks) < MIN_BEATS:
        return Measurements(len(peaks))
    intervals = np.diff(peaks) / RATE
    rate = 60 / float(np.mean(intervals))
    variation = float(np.abs(np.diff(intervals)).mean() / intervals.mean())
    found = Measurements(len(peaks), rate, variation < IRREGULAR)
    beat = mean_beat(filter_ecg(array.astype(np.float64), RATE, bandpass=(0.5, 40.0)), peaks)
    return found if beat is None else _of_beat(found, beat, record.lead_names, rate)


def mean_beat(array: np.ndarray, peaks: np.ndarray) -> np.ndarray | None:
    """The median of the beats that are like each other, [leads, samples] from `BEFORE` to `AFTER`; None of too few such beats."""
    before, after = round(BEFORE * RATE), round(AFTER * RATE)
    whole = [array[:, peak - before : peak + after] for peak in peaks if before <= peak <= array.shape[1] - after]
    if len(whole) < MIN_BEATS:
        return None
    beats = np.stack(whole)
    median = np.median(beats, axis=0)
    flat = beats.reshape(len(beats), -1)
    likeness = [np.corrcoef(beat, median.ravel())[0, 1] for beat in flat]
    alike = beats[np.array(likeness) > MIN_LIKENESS]
    return np.median(alike, axis=0) if len(alike) >= MIN_BEATS else None


def _of_beat(found: Measurements, beat: np.ndarray, leads: tuple[str, ...], rate: float) -> Measurements:
    peak = round(BEFORE * RATE)
    onset, end = _qrs(beat, peak)
    baseline = np.median(
        beat[:, max(0, onset - round(0.04 * RATE)) : onset - round(0.01 * RATE)], axis=1, keepdims=True
    )
    level = beat - baseline
    qrs = (end - onset) / RATE * 1000
    values = {
        "qrs": qrs if 50 < qrs < 220 else None,
        "axis": _axis(level[:, onset:end], leads),
        "st_levels": {
            name: float(row[min(end + round(0.06 * RATE), len(row) - 1)])
            for name, row in zip(leads, level, strict=True)
        },
    }
    power = np.sqrt((level**2).mean(axis=0))
    p_onset = _p_onset(power, onset)
    values["pr"] = None if p_onset is None or not found.regular else (onset - p_onset) / RATE * 1000
    t_end = _t_end(power, end, rate)
    if t_end is not None:
        values["qt"] = (t_end - onset) / RATE * 1000
        values["qtc"] = values["qt"] * (rate / 60) ** 0.5  # Bazett
    return Measurements(**{**vars(found), **values})


def _qrs(beat: np.ndarray, peak: int) -> tuple[int, int]:
    """Where the QRS complex begins and ends: where the slopes round the R peak rise over and fall under a tenth of their highest."""
    slopes = uniform_filter1d(np.sqrt((np.gradient(beat, axis=1) ** 2).mean(axis=0)), 5)
    reach = round(0.12 * RATE)
    top = slopes[peak - reach : peak + reach].max()
    quiet = slopes < 0.12 * top
    gap = round(0.012 * RATE)  # as long as it stays quiet
    onset = peak - round(0.01 * RATE)
    while onset > peak - reach and not quiet[onset - gap : onset].all():
        onset -= 1
    end = peak + round(0.01 * RATE)
    while end < peak + reach and not quiet[end : end + gap].all():
        end += 1
    return onset, end


def _axis(qrs: np.ndarray, leads: tuple[str, ...]) -> float | None:
    """Of the areas of QRS in I and aVF, in degrees from -180 to 180."""
    areas = dict(zip(leads, qrs.sum(axis=1).tolist(), strict=True))
    if "I" not in areas or "aVF" not in areas:
        return None
    along, down = areas["I"], 2 / 3**0.5 * areas["aVF"]
    return float(np.degrees(np.arctan2(down, along))) if abs(along) + abs(down) > 0 else None


def _p_onset(power: np.ndarray, onset: int) -> int | None:
    """Where the P wave begins, in the 280 ms before QRS; None where there is none that stands out."""
    start, stop = max(0, onset - round(0.28 * RATE)), onset - round(0.03 * RATE)
    if stop - start < round(0.08 * RATE):
        return None
    part = uniform_filter1d(power[start:stop], 9)
    top = int(np.argmax(part))
    floor = float(np.quantile(part, 0.2))
    if part[top] < max(2 * floor, 0.02) or top in (0, len(part) - 1):
        return None
    limit = floor + 0.2 * (part[top] - floor)
    while top > 0 and part[top] > limit:
        top -= 1
    return start + top if top > 0 else None


def _t_end(power: np.ndarray, end: int, rate: float) -> int | None:
    """Where the T wave ends: where its fall is at a tenth of its height; None where there is none that stands out."""
    start = end + round(0.08 * RATE)
    stop = min(len(power), end + round(min(0.5, 0.65 * 60 / rate) * RATE))
    if stop - start < round(0.1 * RATE):
        return None
    part = uniform_filter1d(power[start:stop], 9)
    top = int(np.argmax(part))
    floor = float(part[top:].min())
    if part[top] < max(2 * floor, 0.04):
        return None
    limit = floor + 0.1 * (part[top] - floor)
    place = top
    while place < len(part) - 1 and part[place] > limit:
        place += 1
    return start + place if place < len(part) - 1 else None


def in_words(found: Measurements) -> str:
    """The measurements as sentences, rounded as they are read on paper."""
    if found.rate is None:
        return "no beats can be told apart."
    regular = "regular" if found.regular else "irregular"
    parts = [f"heart rate {found.rate:.0f} beats per minute, RR intervals {regular}"]
    parts.append("axis cannot be told" if found.axis is None else f"axis {found.axis:.0f} degrees")
    named = {
        "PR interval": found.pr,
        "QRS duration": found.qrs,
        "QT interval": found.qt,
        "corrected QT interval": found.qtc,
    }
    parts += [f"{name} {'cannot be told' if value is None else f'{value:.0f} ms'}" for name, value in named.items()]
    levels = found.st_levels or {}
    raised = [f"{name} {level:+.2f} mV" for name, level in levels.items() if abs(level) >= 0.1]
    parts.append(f"ST levels of at least 0.1 mV: {', '.join(raised) or 'none'}")
    return "; ".join(parts) + "."
