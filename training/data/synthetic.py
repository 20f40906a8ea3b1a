"""Simulated 12-lead ECGs with questions that can be answered only from the signal.

The heart is a moving dipole: each wave (P, Q, R, S, ST, T) is a Gaussian in time with one amplitude for each of the
three directions, as in Sameni et al. 2007 ("Multichannel ECG and noise modeling", EURASIP J. Adv. Signal Process.
2007:043407), and the leads are its projections with the coefficients of Dower et al. 1980 (Clin. Cardiol. 3:87-92).
Directions are Frank's: x to the left, y to the feet, z to the back; amplitudes are millivolts, times are seconds.
ST elevation alone is of no dipole: see `ST_POTENTIALS`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml
from datasets import Array2D, Dataset, Features, List, NamedSplit, Value

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.training.data.schema import SPLITS
from elm_ecg.training.files import resource

Rhythm = Literal["sinus rhythm", "atrial fibrillation", "premature ventricular complexes"]
Axis = Literal["normal axis", "left axis deviation", "right axis deviation"]
Territory = Literal["anterior", "inferior", "lateral"]
RHYTHMS: tuple[Rhythm, ...] = get_args(Rhythm)
AXES: tuple[Axis, ...] = get_args(Axis)
TERRITORIES: tuple[Territory, ...] = get_args(Territory)
TERRITORY_LEADS: dict[Territory, tuple[str, ...]] = {
    "anterior": ("V2", "V3", "V4"),
    "inferior": ("II", "III", "aVF"),
    "lateral": ("I", "aVL", "V5", "V6"),
}

# leads I, II, V1-V6 on x, y, z (Dower et al. 1980)
DOWER = np.array(
    [
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
# leads I, II, V1-V6 on the electrodes RA, LA, LL, V1-V6; the chest leads are against Wilson's central terminal
ELECTRODES = np.zeros((8, 9))
ELECTRODES[:2, :3] = [[-1, 1, 0], [-1, 0, 1]]
ELECTRODES[2:, :3] = -1 / 3
ELECTRODES[2:, 3:] = np.eye(6)
# the frontal plane as the hexaxial system sees it: lead I to the left, aVF to the feet in the units of I
FRONTAL = np.array([DOWER[0], (DOWER[1] - DOWER[0] / 2) * 2 / np.sqrt(3), [0, 0, 1]])

# degrees of the frontal QRS axis, away from the borders at -30 and 90
AXIS_DEGREES: dict[Axis, tuple[float, float]] = {
    "normal axis": (10, 70),
    "left axis deviation": (-75, -45),
    "right axis deviation": (115, 150),
}
# potentials of leads I, II, V1-V6 that lift every lead of the territory by 0.6 mV or more and no lead of another by a third of that, as
# two ends between which a patient's lie. They are of no dipole: one that lifts V5 and V6 but not V4 points so far to the back that V1 and V2
# sink most, which is a posterior infarct (Fourth Universal Definition of Myocardial Infarction, Thygesen et al. 2018, Circulation 138:e618).
# Over the inferior wall III rises above II and aVL sinks as the right coronary artery is closed, less so with the circumflex (AHA/ACCF/HRS
# recommendations, part VI, Wagner et al. 2009, Circulation 119:e262). Over the lateral wall III sinks, and aVF less
ST_POTENTIALS: dict[Territory | None, np.ndarray] = {
    None: np.zeros((2, 8)),
    "anterior": np.array([[-0.1, 0.0, 0.8, 1.4, 1.5, 1.0, 0.15, 0.0], [0.1, 0.0, 1.1, 1.6, 1.5, 0.9, 0.15, 0.0]]),
    "inferior": np.array([[-0.3, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [0.15, 1.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.15]]),
    "lateral": np.array([[0.7, 0.1, 0.0, 0.0, 0.0, 0.15, 1.6, 1.6], [0.75, 0.2, 0.0, 0.0, 0.0, 0.15, 1.6, 1.6]]),
}
ST_DELAY = 0.05  # seconds from the end of the QRS to the middle of the first wave of the ST segment
# places among the waves of a patient: those of the QRS, of the ST segment and of the T wave; an ectopic beat has the last ones
QRS, ST, T, ECTOPIC = slice(2, 5), slice(5, 7), slice(7, 9), 3
# right ventricular outflow tract, right ventricular apex, left ventricular lateral wall
ECTOPIC_DIPOLES = np.array([[0.5, 1.3, 0.6], [0.9, -1.0, 0.6], [-1.2, 0.5, -0.7]])


def derive_leads(eight: np.ndarray) -> np.ndarray:
    """The 12 standard leads from I, II, V1-V6 ([8, samples] to [12, samples]) by Einthoven's and Goldberger's laws."""
    one, two = eight[:2]
    return np.stack([one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2, *eight[2:]])


@dataclass(frozen=True)
class Findings:
    """What a simulated ECG shows. Combinations are free, but premature complexes need a rate of at most 110 bpm: in a
    faster rhythm they would fall into the T wave before them.

    Args:
        heart_rate: mean ventricular rate, 40 to 150 beats per minute.
        st_elevation: leads with ST elevation of at least 0.1 mV, or None for an isoelectric ST segment, which a wide
            QRS keeps here too (in patients the ST segment of a bundle branch block is displaced).
        wide_qrs: QRS of 140-170 ms, in the form of a left bundle branch block at a normal axis, instead of 80-100 ms.
        noise: white noise of each electrode, millivolts rms.
        wander: baseline wander of each electrode, millivolts.
    """

    rhythm: Rhythm = "sinus rhythm"
    heart_rate: float = 70.0
    st_elevation: Territory | None = None
    axis: Axis = "normal axis"
    wide_qrs: bool = False
    noise: float = 0.01
    wander: float = 0.04

    def __post_init__(self) -> None:
        for name, expected in (("rhythm", RHYTHMS), ("axis", AXES), ("st_elevation", (None, *TERRITORIES))):
            if getattr(self, name) not in expected:
                raise ValueError(f"{name}={getattr(self, name)!r}; expected one of {', '.join(map(repr, expected))}.")
        if not 40 <= self.heart_rate <= 150:
            raise ValueError(f"heart_rate={self.heart_rate}; expected 40 to 150 beats per minute.")
        if self.rhythm == "premature ventricular complexes" and self.heart_rate > 110:
            raise ValueError(f"heart_rate={self.heart_rate} with {self.rhythm}; expected at most 110 beats per minute.")
        for name in ("noise", "wander"):
            if not getattr(self, name) >= 0:  # `not` refuses NaN too
                raise ValueError(f"{name}={getattr(self, name)}; expected millivolts, 0 or more.")


@dataclass(frozen=True)
class Measurements:
    """What can be measured on a simulated ECG, noise and breathing left aside.

    Args:
        heart_rate: beats per minute.
        axis: degrees of the net QRS area in the frontal plane: 0 points to the left arm, 90 to the feet.
        qrs_duration: milliseconds, of beats that are not premature.
        st_levels: territory -> millivolts 60 ms after the end of the QRS, the mean of `TERRITORY_LEADS`.
        num_premature: premature ventricular complexes in the record.
    """

    heart_rate: float
    axis: float
    qrs_duration: float
    st_levels: dict[Territory, float]
    num_premature: int


def sample_findings(rng: np.random.Generator, **fixed: Any) -> Findings:
    """Findings drawn independently of each other, the heart rate from 50 to 110 bpm, where every rhythm is possible.

    Args:
        fixed: findings that are given instead of drawn, by the names of `Findings`.
    """
    drawn: dict[str, Any] = {
        "rhythm": RHYTHMS[rng.integers(len(RHYTHMS))],
        "heart_rate": rng.uniform(50, 110),
        "st_elevation": (None, *TERRITORIES)[rng.integers(len(TERRITORIES) + 1)],
        "axis": AXES[rng.integers(len(AXES))],
        "wide_qrs": bool(rng.integers(2)),
        "noise": rng.uniform(0.005, 0.02),
        "wander": rng.uniform(0.01, 0.08),
    }
    return Findings(**{**drawn, **fixed})


def _beats(findings: Findings, rng: np.random.Generator, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Times of the R peaks, from the last one before 0 to the second one after `seconds`, and which of them are
    ectopic."""
    mean_rr = 60 / findings.heart_rate  # seconds
    count = round(seconds / mean_rr)
    num_intervals = 2 * count + 4  # more than enough to pass `seconds`
    if findings.rhythm == "atrial fibrillation":
        rr = rng.uniform(0.6, 1.6, num_intervals)  # shares of the mean, each independent: no pattern
    else:  # respiratory sinus arrhythmia
        breath = 2 * np.pi * (rng.uniform(0.2, 0.3) * mean_rr * np.arange(num_intervals) + rng.uniform())
        rr = 1 + rng.uniform(0.01, 0.05) * np.sin(breath) + 0.005 * rng.standard_normal(num_intervals)
    rr *= mean_rr / rr[:count].mean()  # the record itself has the rate, as a count of its beats shows
    peaks = np.concatenate([[0.0], np.cumsum(rr)]) - rng.uniform() * rr[0]  # 0 is at a random phase
    peaks = peaks[: np.searchsorted(peaks, seconds) + 2]
    ectopic = np.zeros(len(peaks), dtype=bool)
    if findings.rhythm == "premature ventricular complexes":
        candidates = np.flatnonzero((peaks > 1) & (peaks < seconds))[:-1]  # not the last: its pause would be cut off
        num_ectopic = min(int(rng.integers(2, 5)), (len(candidates) + 1) // 2)
        # a choice without neighbours: choose from a shorter row, then spread
        chosen = np.sort(rng.choice(len(candidates) - num_ectopic + 1, num_ectopic, replace=False))
        chosen = candidates[chosen + np.arange(num_ectopic)]
        ectopic[chosen] = True
        # early, and the next beat stays where it was: the pause compensates
        peaks[chosen] -= rng.uniform(0.32, 0.42) * (peaks[chosen] - peaks[chosen - 1])
    return peaks, ectopic


def _rotation(rng: np.random.Generator, degrees: float) -> np.ndarray:
    """A rotation about a random axis by up to `degrees`, first order (good to 0.02 at 12 degrees)."""
    x, y, z = np.radians(degrees) * rng.uniform(-1, 1, 3) / np.sqrt(3)  # by at most `degrees`, as the norm is
    return np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])


def _waves(findings: Findings, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Centres [waves] and widths [waves] in seconds from the R peak, potentials of leads I, II, V1-V6 [waves, 8]: P (2),
    QRS (3), ST (2), T (2), and those of an ectopic beat: QRS (2), T."""
    rr = 60 / findings.heart_rate
    turn = _rotation(rng, 12).T

    def vary(dipoles: list[list[float]]) -> np.ndarray:
        return np.array(dipoles) * rng.lognormal(0, 0.12, (len(dipoles), 3)) @ turn  # patients differ by about 12%

    # QRS: centres and widths are fractions of its duration
    if findings.wide_qrs:
        duration = rng.uniform(0.145, 0.17)
        centres, widths = np.array([-0.36, -0.15, 0.2]), np.array([0.07, 0.13, 0.14])
        qrs = vary([[0.05, 0.05, -0.15], [0.85, 0.55, 0.6], [0.85, 0.45, 0.6]])
    else:
        duration = rng.uniform(0.085, 0.105)
        centres, widths = np.array([-0.28, 0.0, 0.24]), np.array([0.095, 0.11, 0.11])
        qrs = vary([[-0.16, -0.05, -0.26], [0.95, 0.95, 0.22], [-0.15, -0.2, 0.58]])
    qrs *= rng.uniform(0.8, 1.2)
    # turn the net QRS area in the frontal plane to the wanted axis
    across, down, _ = FRONTAL @ (widths @ qrs)  # the area of a Gaussian goes with width times amplitude
    angle = np.radians(rng.uniform(*AXIS_DEGREES[findings.axis])) - np.arctan2(down, across)
    frontal_turn = np.eye(3)
    frontal_turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    qrs = qrs @ (np.linalg.inv(FRONTAL) @ frontal_turn @ FRONTAL).T  # turned in units of the frontal plane, then back

    (t_wave,) = vary([[0.36, 0.2, -0.17]]) * rng.uniform(0.8, 1.2)
    if findings.wide_qrs:  # secondary repolarisation: T against the QRS
        t_wave = -0.35 * (widths @ qrs) / widths.sum()
    share = rng.uniform()
    st = rng.uniform(0.17, 0.28) * ([share, 1 - share] @ ST_POTENTIALS[findings.st_elevation])  # millivolts
    p = vary([[0.04, 0.09, -0.05], [0.07, 0.07, 0.05]]) * rng.uniform(0.9, 1.3)
    if findings.rhythm == "atrial fibrillation":
        p[:] = 0  # fibrillating atria have no P; `simulate_ecg` adds their waves
    ectopic = ECTOPIC_DIPOLES[rng.integers(len(ECTOPIC_DIPOLES))] @ turn * rng.uniform(1.1, 1.4)
    ectopic_duration = rng.uniform(0.15, 0.18)

    scale = rr**0.4  # repolarisation is faster in a fast rhythm
    end = duration / 2
    p_centre = -end - rng.uniform(0.07, 0.09) - 0.04 * rr  # PR is shorter in a fast rhythm
    t_centre = 0.25 * scale
    t_width = rng.uniform(0.045, 0.055) * scale
    waves = [
        (p_centre - 0.012, 0.016, p[0]),  # right atrium
        (p_centre + 0.018, 0.018, p[1]),  # left atrium
        *zip(centres * duration, widths * duration, qrs, strict=True),
        (end + ST_DELAY, 0.035, np.zeros(3)),  # just after the J point
        (end + 0.12 * scale, 0.045 * scale, np.zeros(3)),  # holds the level up to the T wave
        (end + t_centre - 0.05 * scale, t_width, 0.3 * t_wave),  # slow rise, fast fall
        (end + t_centre, 0.85 * t_width, 0.85 * t_wave),
        (-0.15 * ectopic_duration, 0.14 * ectopic_duration, ectopic),
        (0.18 * ectopic_duration, 0.15 * ectopic_duration, 0.7 * ectopic),
        (ectopic_duration / 2 + t_centre, 1.2 * t_width, -0.3 * ectopic),
    ]
    centres, widths, dipoles = (np.array(column) for column in zip(*waves, strict=True))
    potentials = dipoles @ DOWER.T
    potentials[ST] = st
    potentials[T] += np.outer([0.3, 0.85], st)  # hyperacute: tall where the ST segment is (Thygesen et al. 2018)
    return centres, widths, potentials


def _by_lead(potential: np.ndarray) -> dict[str, float]:
    """Lead -> potential, of those of I, II, V1-V6."""
    return dict(zip(STANDARD_LEADS, derive_leads(potential[:, None])[:, 0].tolist(), strict=True))


def _measure(findings: Findings, num_premature: int, waves: tuple[np.ndarray, ...]) -> Measurements:
    """What the waves of `_waves` show of a beat that is not premature."""
    centres, widths, potentials = waves
    areas = _by_lead(widths[QRS] @ potentials[QRS])  # the area of a Gaussian goes with width times amplitude
    duration = 2 * (centres[ST][0] - ST_DELAY)  # the R peak is in the middle of the QRS
    own = slice(None, -ECTOPIC)
    shares = np.exp(-0.5 * ((duration / 2 + 0.06 - centres[own]) / widths[own]) ** 2)
    level = _by_lead(shares @ potentials[own])
    return Measurements(
        heart_rate=findings.heart_rate,
        axis=float(np.degrees(np.arctan2(areas["aVF"] * 2 / np.sqrt(3), areas["I"]))),
        qrs_duration=float(1000 * duration),
        st_levels={
            territory: float(np.mean([level[name] for name in names])) for territory, names in TERRITORY_LEADS.items()
        },
        num_premature=num_premature,
    )


def simulate_ecg(findings: Findings, rng: np.random.Generator, **kwargs: Any) -> np.ndarray:
    """The ECG alone of `simulate_measured`, which takes the same arguments."""
    return simulate_measured(findings, rng, **kwargs)[0]


def simulate_measured(
    findings: Findings, rng: np.random.Generator, *, sampling_rate: int = 250, seconds: float = 10.0
) -> tuple[np.ndarray, Measurements]:
    """A 12-lead ECG of a patient with these findings; everything the findings leave open is drawn.

    Returns:
        Millivolts, float32 [12, samples], leads in the order of `STANDARD_LEADS`; noise and wander arise at the
        electrodes, so that Einthoven's law holds for them too. And what can be measured on it.
    """
    if seconds < 5:
        raise ValueError(f"seconds={seconds}; a rhythm needs at least 5 seconds to be seen.")
    if sampling_rate < 100:
        raise ValueError(f"sampling_rate={sampling_rate} Hz; a QRS needs at least 100 Hz.")
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate  # seconds, [samples]
    peaks, ectopic = _beats(findings, rng, seconds)
    centres, widths, potentials = waves = _waves(findings, rng)
    inside = (peaks >= 0) & (peaks < seconds)
    measurements = _measure(findings, int(np.count_nonzero(ectopic & inside)), waves)

    breath = 2 * np.pi * (rng.uniform(0.2, 0.3) * peaks + rng.uniform())  # 0.2 to 0.3 Hz
    gain = ectopic[:, None] == (np.arange(len(centres)) >= len(centres) - ECTOPIC)
    gain = gain * (1 + rng.uniform(0, 0.06) * np.sin(breath))[:, None]  # breathing moves the amplitudes
    # at any time only the beat before, the one before that and the next one matter
    beat = np.searchsorted(peaks, time, side="right") - 1
    beat = np.maximum(beat + np.array([[-1], [0], [1]]), 0)  # [3, samples]
    since = (time - peaks[beat]).astype(np.float32)  # seconds from the R peak, [3, samples]
    since[0, beat[0] == beat[1]] = np.inf  # there is no beat before the first
    distance = (since - centres.astype(np.float32)[:, None, None]) / widths.astype(np.float32)[:, None, None]
    waves = gain.astype(np.float32).T[:, beat] * np.exp(-0.5 * distance**2)  # [waves, 3, samples]
    eight = potentials.T @ waves.sum(1)  # leads I, II, V1-V6, [8, samples]

    if findings.rhythm == "atrial fibrillation":
        slow = np.sin(2 * np.pi * (rng.uniform(0.4, 1, (2, 1)) * time + rng.uniform(size=(2, 1))))
        phase = 2 * np.pi * rng.uniform(5, 8) * time + 1.2 * slow[0]  # f waves, 300 to 480 per minute
        flutter = (1 + 0.4 * slow[1]) * (np.sin(phase) + 0.3 * np.sin(2 * phase))
        eight += rng.uniform(0.07, 0.12) * np.outer(DOWER @ [-0.3, 0.6, -0.75], flutter)  # largest in V1, V2

    electrode = electrode_noise(findings, rng, time)
    ecg = derive_leads(eight + ELECTRODES @ electrode).astype(np.float32)  # [8, samples] to [12, samples]
    return ecg, measurements


def electrode_noise(findings: Findings, rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """What arises at the electrodes of `ELECTRODES` beside the heart, at these seconds: millivolts [9, samples]."""
    noise = findings.noise * rng.standard_normal((9, len(time)), dtype=np.float32)
    for low, high in ((0.05, 0.15), (0.2, 0.35)):  # drift of the electrode, breathing
        swing = rng.uniform(low, high) * time + rng.uniform(size=(9, 1))
        noise += findings.wander * rng.uniform(0.3, 1, (9, 1)) * np.sin((2 * np.pi * swing).astype(np.float32))
    return noise


def simulate_no_signal(rng: np.random.Generator, *, sampling_rate: int = 250, seconds: float = 10.0) -> np.ndarray:
    """A record of electrodes that are off the patient: of each second one a flat line, of the others their noise and wander alone.

    Returns:
        Millivolts, float32 [12, samples], as of `simulate_ecg`.
    """
    time = np.arange(round(seconds * sampling_rate)) / sampling_rate
    if rng.integers(2):
        return np.zeros((len(STANDARD_LEADS), len(time)), dtype=np.float32)
    return derive_leads(ELECTRODES @ electrode_noise(sample_findings(rng), rng, time)).astype(np.float32)


# gaps at the borders, so that no rate is a matter of opinion
RATES = {"bradycardia": (40, 52), "normal rate": (65, 95), "tachycardia": (110, 150)}  # beats per minute
YES_NO = ("yes", "no")
# question type -> its answers
ANSWERS: dict[str, tuple[str, ...]] = {
    "rhythm": RHYTHMS,
    "rate": tuple(RATES),
    "axis": AXES,
    "wide_qrs": YES_NO,
    "st_elevation": YES_NO,
    "st_territory": (*TERRITORIES, "none"),
    "premature": YES_NO,
    "atrial_fibrillation": YES_NO,
}
# question type -> its wordings; those of `st_elevation` leave a place for the territory
QUESTIONS_FILE = resource("training/data/synthetic.yaml")
WORDINGS: dict[str, list[str]] = yaml.safe_load(QUESTIONS_FILE.read_text(encoding="utf-8"))
# Every record is asked about its axis, its QRS, its ST segments and its rhythm, the rhythm in one of three ways. The rate is
# asked together with atrial fibrillation, because fast rhythms have no premature complexes here.
TEXT = Value("string")
MESSAGES = List({"role": TEXT, "content": TEXT})  # the column of chats
CYCLE = 48  # records in which every answer to every question comes up equally often
ASKED = {
    "axis": range(48),
    "wide_qrs": range(48),
    "st_elevation": range(24),
    "st_territory": range(24, 48),
    "atrial_fibrillation": range(24),
    "rate": range(24),
    "rhythm": range(24, 36),
    "premature": range(36, 48),
}


def _ask(rng: np.random.Generator, position: int) -> list[tuple[str, str, str, Territory]]:
    """The questions to one record of a cycle, in random order: type, wording, answer and territory of each."""
    questions = []
    order_of_st = rng.permutation(CYCLE)  # the question about the ST segments is independent of the others
    for question_type, asked in ASKED.items():
        answers, wordings = ANSWERS[question_type], WORDINGS[question_type]
        territories = TERRITORIES if question_type == "st_elevation" else TERRITORIES[:1]
        choices = [(answer, territory) for answer in answers for territory in territories]
        wording = wordings[rng.integers(len(wordings))]  # one for all records of a cycle, as `rng` is
        slots = rng.permutation(len(asked))  # drawn even if not used: all records of a cycle draw alike
        place = order_of_st[position] if question_type.startswith("st_") else position
        if place in asked:
            answer, territory = choices[slots[place - asked.start] % len(choices)]  # divides len(asked)
            questions.append((question_type, wording, answer, territory))
    return [questions[i] for i in rng.permutation(len(questions))]


def _findings(questions: list[tuple[str, str, str, Territory]], rng: np.random.Generator) -> Findings:
    """Findings that make the answers true, and are drawn alike for all answers in everything else."""
    fixed: dict[str, Any] = {}
    not_premature = RHYTHMS[rng.integers(2)]  # sinus rhythm or atrial fibrillation
    for question_type, _, answer, territory in questions:
        if question_type == "rate":
            fixed["heart_rate"] = rng.uniform(*RATES[answer])
        elif question_type == "wide_qrs":
            fixed["wide_qrs"] = answer == "yes"
        elif question_type == "st_elevation":
            elsewhere = [other for other in (None, *TERRITORIES) if other != territory]
            fixed["st_elevation"] = territory if answer == "yes" else elsewhere[rng.integers(len(elsewhere))]
        elif question_type == "st_territory":
            fixed["st_elevation"] = None if answer == "none" else answer
        elif question_type == "premature":
            fixed["rhythm"] = "premature ventricular complexes" if answer == "yes" else not_premature
        elif question_type == "atrial_fibrillation":
            fixed["rhythm"] = "atrial fibrillation" if answer == "yes" else "sinus rhythm"
        else:  # rhythm, axis: the answer is the finding
            fixed[question_type] = answer
    return sample_findings(rng, **fixed)


def make_record(
    index: int, seed: int, split: str = "train", *, sampling_rate: int = 250, seconds: float = 10.0
) -> dict[str, Any]:
    """Record `index` of a split as a row of `make_dataset`, the same whatever was made before it.

    Its chat asks four or five questions in random order. Records come in cycles of 48, in each of which every question
    type has one wording and every answer to it comes up equally often; the answers are shuffled independently of each
    other, and the findings with them. So neither the text of a question nor the answers before it tell its answer.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; expected one of {', '.join(map(repr, SPLITS))}.")
    cycle, position = divmod(index, CYCLE)
    stream = SPLITS.index(split)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, 0, cycle)))  # 0: plan of the cycle
    questions = _ask(rng, int(rng.permutation(CYCLE)[position]))

    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(stream, 1, index)))  # 1: the record
    ecg = simulate_ecg(_findings(questions, rng), rng, sampling_rate=sampling_rate, seconds=seconds)
    messages = []
    for _, wording, answer, territory in questions:
        messages.append({"role": "user", "content": wording.format(territory=territory)})
        messages.append({"role": "assistant", "content": answer})
    return {
        "ecg": stored_ecg(ecg, sampling_rate),
        "messages": messages,
        "record_id": f"synthetic-{seed}-{split}-{index:06d}",
        "patient_id": f"synthetic-{seed}-{split}-{index:06d}",  # one record each
        "question_type": [question_type for question_type, *_ in questions],
    }


def _make_records(parts: list[range], make: Callable[..., dict[str, Any]], **kwargs: Any) -> Iterator[dict[str, Any]]:
    for part in parts:
        for index in part:
            yield make(index, **kwargs)


def generate(
    make: Callable[..., dict[str, Any]],
    num_records: int,
    columns: dict[str, Any],
    *,
    cycle: int,
    files: Iterable[Path],
    samples: int,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    **options: Any,
) -> Dataset:
    """The rows `make(index, **options)` of simulated records, on disk in the cache of `datasets`.

    Args:
        make: gives a row that depends on its arguments alone; a function of a module, for worker processes.
        columns: Arrow types of the columns after `ecg`.
        cycle: records that one worker makes in turn.
        files: what the rows are made from beside this module, as `datasets` would not see that they changed, and give back rows of
            the old ones from its cache.
        samples: of each lead.
        options: `seed` and `split`, and what else `make` takes.
    """
    if num_records < 1:
        raise ValueError(f"num_records={num_records}; expected at least 1.")
    ecg = {
        "array": Array2D((len(STANDARD_LEADS), samples), "int16"),
        "sampling_rate": Value("int32"),
        "lead_names": List(Value("string")),
        "unit": Value("string"),
    }
    # worker processes share out the parts of a list
    parts = [range(start, min(start + cycle, num_records)) for start in range(0, num_records, cycle)]
    sources = b"".join(path.read_bytes() for path in (Path(__file__), *files))
    identity = repr((make.__module__, make.__name__, parts, sorted(options.items())))
    return Dataset.from_generator(
        _make_records,
        features=Features({"ecg": ecg, **columns}),
        gen_kwargs={"parts": parts, "make": make, **options},
        split=NamedSplit(options["split"]),
        num_proc=num_proc,
        cache_dir=cache_dir,
        fingerprint=hashlib.sha256(sources + identity.encode()).hexdigest()[:32],
    )


def stored_ecg(ecg: np.ndarray, sampling_rate: int) -> dict[str, Any]:
    """The column `ecg` of a row, of millivolts [12, samples]."""
    return {
        "array": np.rint(1000 * ecg).astype(np.int16),  # microvolts; `astype` alone cuts towards 0
        "sampling_rate": sampling_rate,
        "lead_names": STANDARD_LEADS,
        "unit": "uV",
    }


def make_dataset(
    num_records: int,
    seed: int,
    split: str = "train",
    *,
    sampling_rate: int = 250,
    seconds: float = 10.0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """Simulated ECGs with four or five questions each, on disk in the cache of `datasets`.

    The answers are exactly balanced for every text when `num_records` is a multiple of 48, else up to the last cycle.

    Returns:
        Columns `ecg` ({"array": int16 microvolts [12, samples], "sampling_rate", "lead_names", "unit"}), `messages`
        (user and assistant in turn), `record_id`, `patient_id`, `question_type` (of each answer). A patient has one
        record.
    """
    return generate(
        make_record,
        num_records,
        {"messages": MESSAGES, "record_id": TEXT, "patient_id": TEXT, "question_type": List(TEXT)},
        cycle=CYCLE,
        files=[QUESTIONS_FILE],
        samples=round(seconds * sampling_rate),
        num_proc=num_proc,
        cache_dir=cache_dir,
        seed=seed,
        split=split,
        sampling_rate=sampling_rate,
        seconds=seconds,
    )
