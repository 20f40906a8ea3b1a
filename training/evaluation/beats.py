"""Where the beats of an ECG are, and how it looks between them: for explanations of what a model looks at, not for diagnosis."""

from itertools import pairwise

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks

from elm_ecg.ecg_utils import ECGRecord, filter_ecg

QRS_BAND = (5.0, 20.0)  # hertz, in which QRS complexes stand out from P and T waves
REFRACTORY = 0.25  # seconds in which no other QRS complex follows
# share of the height of a beat below which the energy falls between two of them. Of simulated beats, wide ones at 150 a minute among them,
# it fell to 0.65 (two leads) and 0.64 (twelve), of white noise to 0.49 and 1.38; between three leads and five both come near to 0.75
QUIET_OF_TWO, QUIET = 0.5, 0.75
ROUNDING_MILLIVOLTS = 1e-6  # what a filter may leave of a flat lead
BEAT_FREE = (0.6, 0.8)  # share of the time from one complex to the next: behind the T wave, before the P wave


def r_peaks(record: ECGRecord) -> np.ndarray:
    """The samples of the R peaks, int [beats], rising; none in a record that has no beats, such as noise or zeros.

    Of a single lead noise cannot be told from beats. By the energy of the slopes of all leads, after Pan and Tompkins 1985 (doi 10.1109/TBME.1985.325532).
    """
    rate, samples = record.sampling_rate, record.array.shape[1]
    if samples < 2:  # no slope
        return np.array([], dtype=int)
    high = min(QRS_BAND[1], 0.45 * rate)
    quick = filter_ecg(record.array.astype(np.float64), rate, bandpass=(min(QRS_BAND[0], high / 2), high))
    slopes = np.gradient(quick, axis=1) ** 2
    scale = slopes.mean(axis=1, keepdims=True)
    energy = uniform_filter1d((slopes / np.where(scale > 0, scale, 1)).mean(axis=0), max(1, round(0.12 * rate)))
    if not energy.any():
        return np.array([], dtype=int)
    # the height of a beat: what the highest point of each second has at least in most of them
    seconds = np.array_split(energy, max(1, round(len(energy) / rate)))
    height = max(0.35 * np.median([part.max() for part in seconds]), 0.02 * energy.max())
    peaks, _ = find_peaks(energy, height=height, distance=max(1, round(REFRACTORY * rate)))
    # noise has no beats: between these there is a moment at which little changes. In the mean of many leads noise has no such moment
    quiet = QUIET_OF_TWO if len(record.array) < 3 else QUIET
    if len(peaks) > 1 and np.median([energy[first:second].min() for first, second in pairwise(peaks)]) > quiet * height:
        return np.array([], dtype=int)
    strength = np.abs(quick).sum(axis=0)
    reach = round(0.08 * rate)
    return np.array([_highest(strength, peak, reach) for peak in peaks], dtype=int)


def _highest(values: np.ndarray, around: int, reach: int) -> int:
    start = max(0, around - reach)
    return start + int(np.argmax(values[start : around + reach + 1]))


def in_qrs(record: ECGRecord, seconds: float = 0.16) -> np.ndarray:
    """Which samples are within a QRS complex, bool [samples]: `seconds` round each R peak."""
    inside = np.zeros(record.array.shape[1], dtype=bool)
    reach = round(seconds / 2 * record.sampling_rate)
    for peak in r_peaks(record):
        inside[max(0, peak - reach) : peak + reach + 1] = True
    return inside


def between_beats(record: ECGRecord) -> np.ndarray:
    """Which samples are between 60% and 80% of the time from one QRS complex to the next, bool [samples]: behind the T wave, before the P
    wave. All samples of a record with fewer than two complexes."""
    free = np.zeros(record.array.shape[1], dtype=bool)
    for first, second in pairwise(r_peaks(record)):
        start, stop = (first + round(share * (second - first)) for share in BEAT_FREE)
        free[start : max(stop, start + 1)] = True
    return free if free.any() else ~free


def level_between_beats(record: ECGRecord) -> np.ndarray:
    """The mean of each lead `between_beats`, in millivolts, float32 [leads]."""
    return record.array[:, between_beats(record)].mean(axis=1, dtype=np.float64).astype(np.float32)


def is_flat(record: ECGRecord) -> bool:
    """Whether each lead of a record stands at its level throughout, so that there is nothing to take away."""
    return bool(np.ptp(record.array, axis=1).max() < ROUNDING_MILLIVOLTS)
