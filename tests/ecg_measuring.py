"""Measures simulated ECGs from their samples alone, by other means than the simulator."""

import numpy as np
from scipy.signal import find_peaks

RATE = 250  # hertz


def r_peaks(leads: dict[str, np.ndarray], height: float = 0.35) -> np.ndarray:
    """Samples of the QRS complexes: where the leads move fastest, all together."""
    speed = np.sqrt(sum(np.gradient(lead) ** 2 for lead in leads.values()))
    speed = np.convolve(speed, np.hanning(45), mode="same")
    return find_peaks(speed, height=height * speed.max(), distance=RATE // 5)[0]


def mean_beat(leads: dict[str, np.ndarray], peaks: np.ndarray) -> tuple[dict[str, np.ndarray], int, int]:
    """The mean beat from 0.4 s before to 0.4 s after the QRS; onset and end of the QRS, where the leads are still (3%)."""
    half = int(0.4 * RATE)
    peaks = peaks[(peaks >= half) & (peaks < len(leads["I"]) - half)]
    beats = {name: np.mean([lead[peak - half : peak + half] for peak in peaks], axis=0) for name, lead in leads.items()}
    strength = np.sqrt(sum(beat**2 for beat in beats.values()))
    inside = strength > 0.03 * strength.max()
    return beats, half - int(np.argmin(inside[half::-1])), half + int(np.argmin(inside[half:]))
