"""Where the beats of an ECG are, and how it looks between them: for explanations of what a model looks at, not for diagnosis."""

from itertools import pairwise

import numpy as np
from scipy.ndimage import uniform_filter1d
from scipy.signal import find_peaks

from elm_ecg.ecg_utils import ECGRecord, filter_ecg

QRS_BAND = (5.0, 20.0)  # hertz, in which QRS complexes stand out from P and T waves (Pan and Tompkins 1985)
SMOOTHED_SECONDS = 0.1  # about a QRS complex
REFRACTORY_SECONDS = 0.25  # no two complexes are nearer
LEAST_HEIGHT = 0.2  # of the highest complexes: premature beats and others may be lower
BEAT_FREE = (0.6, 0.8)  # share of the time from one complex to the next: behind the T wave, before the P wave


def qrs_complexes(record: ECGRecord) -> np.ndarray:
    """The samples in the middle of the QRS complexes, int [complexes], rising; none of a record without beats.

    As of Pan and Tompkins 1985 (doi 10.1109/TBME.1985.325532), of all leads together: band-pass, slope, square, mean over 0.1 s, peaks.
    """
    rate = record.sampling_rate
    high = min(QRS_BAND[1], 0.4 * rate)
    filtered = filter_ecg(record.array, rate, (min(QRS_BAND[0], high / 2), high))
    slopes = np.gradient(filtered, axis=1) if filtered.shape[1] > 1 else filtered
    energy = uniform_filter1d((slopes**2).sum(axis=0), max(1, round(SMOOTHED_SECONDS * rate)))
    least = LEAST_HEIGHT * np.percentile(energy, 98)
    if not least > 0:
        return np.zeros(0, dtype=int)
    peaks, _ = find_peaks(energy, height=least, distance=max(1, round(REFRACTORY_SECONDS * rate)))
    return peaks


def in_qrs(record: ECGRecord, seconds: float = 0.16) -> np.ndarray:
    """Which samples are within a QRS complex, bool [samples]: `seconds` round the middle of each."""
    inside = np.zeros(record.array.shape[1], dtype=bool)
    reach = round(seconds / 2 * record.sampling_rate)
    for peak in qrs_complexes(record):
        inside[max(0, peak - reach) : peak + reach + 1] = True
    return inside


def between_beats(record: ECGRecord) -> np.ndarray:
    """Which samples are between 60% and 80% of the time from one QRS complex to the next, bool [samples]: behind the T wave, before the P
    wave. All samples of a record with fewer than two complexes."""
    free = np.zeros(record.array.shape[1], dtype=bool)
    for first, second in pairwise(qrs_complexes(record)):
        start, stop = (first + round(share * (second - first)) for share in BEAT_FREE)
        free[start : max(stop, start + 1)] = True
    return free if free.any() else ~free


def level_between_beats(record: ECGRecord) -> np.ndarray:
    """The mean of each lead `between_beats`, in millivolts, float32 [leads]."""
    return record.array[:, between_beats(record)].mean(axis=1, dtype=np.float64).astype(np.float32)
