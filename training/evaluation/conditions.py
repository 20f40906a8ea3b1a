"""What an evaluation shows of the ECG: the names, words, colour and effect of each condition, in one entry of `CONDITIONS`.

A model that reads the ECG answers better in the condition `ecg` than in all others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# samples of an ECG [leads, samples] in millivolts, and the generator of what is random -> the samples that are shown
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def zeros(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Zeros in place of an ECG [leads, samples]."""
    return np.zeros_like(array)


def noise(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of 1 mV in place of an ECG [leads, samples]."""
    return rng.standard_normal(array.shape, dtype=np.float32)


@dataclass(frozen=True)
class Condition:
    """One way to ask the questions.

    Args:
        name: in options, results and predictions.
        label: in plots, reports and progress bars.
        colour: in plots.
        phrase: in the verdict, after "better than with".
        description: in help and cards, after the name.
        change: what becomes of each ECG; None keeps it.
        swapped: the ECGs are those of another patient.
        shows_ecg: False leaves the ECGs out of the chat.
        random: what is shown depends on the seed.
        asked: False where the answers are from no model.
    """

    name: str
    label: str
    colour: str
    phrase: str
    description: str
    change: Change | None = None
    swapped: bool = False
    shows_ecg: bool = True
    random: bool = False
    asked: bool = True


ECG = "ecg"  # what the others are compared with, and always asked
BASELINE = "most_frequent"
# colours of Okabe and Ito 2008, told apart by colour-blind readers too
CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition(ECG, "with its ECG", "#0072B2", "its ECG", "the ECG as recorded"),
        Condition("zeroed", "ECG zeroed", "#E69F00", "the ECG zeroed", "every sample zero", change=zeros),
        Condition(
            "noise",
            "noise for an ECG",
            "#56B4E9",
            "noise in its place",
            "Gaussian noise of 1 mV",
            change=noise,
            random=True,
        ),
        Condition(
            "swapped",
            "another patient's ECG",
            "#D55E00",
            "another patient's",
            "another patient's ECG",
            swapped=True,
            random=True,
        ),
        Condition("left_out", "ECG left out", "#999999", "none", "the question alone", shows_ecg=False),
        Condition(
            BASELINE,
            "most frequent answer",
            "#555555",
            "the most frequent answer",
            "the most frequent answer to each question in training, without any model",
            asked=False,
        ),
    )
}
ASKED = tuple(name for name, condition in CONDITIONS.items() if condition.asked)
