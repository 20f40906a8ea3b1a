import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import find_peaks

from ecg_utils import STANDARD_LEADS
from training.synthetic import (
    AXES,
    AXIS_DEGREES,
    CYCLE,
    QUESTIONS,
    RATES,
    RHYTHMS,
    SPLITS,
    TERRITORIES,
    TERRITORY_LEADS,
    Findings,
    make_dataset,
    make_record,
    sample_findings,
    simulate_ecg,
)

RATE = 250
SEEDS = range(12)


def simulate(seed: int, **findings) -> dict[str, np.ndarray]:
    """A record without noise or wander, by lead."""
    ecg = simulate_ecg(Findings(noise=0, wander=0, **findings), np.random.default_rng(seed))
    return dict(zip(STANDARD_LEADS, ecg, strict=True))


def r_peaks(leads: dict[str, np.ndarray]) -> np.ndarray:
    """Samples of the QRS complexes: where the leads move fastest, all together."""
    speed = np.sqrt(sum(np.gradient(lead) ** 2 for lead in leads.values()))
    speed = np.convolve(speed, np.hanning(25), mode="same")
    return find_peaks(speed, height=0.35 * speed.max(), distance=RATE // 5)[0]


