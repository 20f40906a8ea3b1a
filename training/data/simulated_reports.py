"""Simulated ECGs with what is said of them: reports, chats whose answers reason, and questions with the answers alone.

All texts are true by construction: they say what was simulated (`Findings`) and what can be measured on it (`Measurements`).
A question asks for one to three topics, such as the rhythm and the ST segments, and its answer has a statement for each.
Records without a signal, as of electrodes that came off, teach a model to say so in place of an answer that sounds likely.
"""

import itertools
from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import yaml
from datasets import Dataset

from elm_ecg.training.data.schema import SPLITS
from elm_ecg.training.data.synthetic import (
    AXES,
    MESSAGES,
    RATES,
    RHYTHMS,
    TERRITORIES,
    TERRITORY_LEADS,
    TEXT,
    Findings,
    Measurements,
    generate,
    sample_findings,
    simulate_measured,
    simulate_no_signal,
    stored_ecg,
)
from elm_ecg.training.files import resource

Kind = Literal["reports", "reasoning", "answers"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEXTS_FILE = resource("training/data/simulated_reports.yaml")
TEXTS: dict[str, Any] = yaml.safe_load(TEXTS_FILE.read_text(encoding="utf-8"))

NO_SIGNAL = "no ECG signal"  # the answer to every question about a record without one
WIDTHS = ("narrow QRS", "wide QRS")
# topic -> its statements. The first two are never asked together: fast rhythms have no premature complexes here
STATEMENTS: dict[str, tuple[str, ...]] = {
    "rhythm": RHYTHMS,
    "rate": tuple(RATES),
    "axis": AXES,
    "qrs": WIDTHS,
    "st": ("no ST elevation", *(f"{territory} ST elevation" for territory in TERRITORIES)),
}
TOPIC_SETS = [
    topics
    for size in (1, 2, 3)
    for topics in itertools.combinations(STATEMENTS, size)
    if not {"rhythm", "rate"} <= set(topics)
]
# what a record shows: its rhythm or rate (as places in `STATEMENTS`), axis, QRS, ST segments
SHOWN = list(itertools.product(range(3), AXES, WIDTHS, STATEMENTS["st"]))
HELD_OUT = {"validation": 144, "test": 1008}  # records of each set: whole cycles
CYCLE = len(SHOWN)  # 72 records in which everything that a record shows comes up equally often


def statements(findings: Findings) -> dict[str, str]:
    """Topic -> its statement, the rate only where it lies in one of `RATES`."""
    rates = [("rate", name) for name, (low, high) in RATES.items() if low <= findings.heart_rate <= high]
    return {
        "rhythm": findings.rhythm,
        **dict(rates),
        "axis": findings.axis,
        "qrs": WIDTHS[findings.wide_qrs],
        "st": f"{findings.st_elevation or 'no'} ST elevation",
    }


def report(findings: Findings, measured: Measurements, rng: np.random.Generator) -> str:
    """A report of everything that the ECG shows, a sentence or two for each finding, in one of its wordings."""
    said = statements(findings)
    sentences = []
    for topic in ("rhythm", "axis", "qrs", "st"):
        elevated = topic == "st" and findings.st_elevation is not None
        wordings = TEXTS["report"]["ST elevation" if elevated else said[topic]]
        sentence = wordings[rng.integers(len(wordings))].format(**_values(findings, measured))
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(sentences)


def _values(findings: Findings, measured: Measurements) -> dict[str, Any]:
    """What the wordings of a report have in braces."""
    territory = findings.st_elevation
    return {
        "heart_rate": round(measured.heart_rate),
        "num_premature": measured.num_premature,
        "axis": round(measured.axis),
        "qrs_duration": round(measured.qrs_duration),
        "territory": territory,
        "st": f"{measured.st_levels[territory]:.1f}" if territory else None,
        "leads": ", ".join(TERRITORY_LEADS[territory]) if territory else None,
    }


def thought(findings: Findings, measured: Measurements, topics: Iterable[str]) -> str:
    """What is measured to answer a question about these topics, a line for each."""
    intervals, p_waves = {
        "sinus rhythm": ("regular", "P waves"),
        "atrial fibrillation": ("irregular", "no P waves"),
        "premature ventricular complexes": (f"regular but for {measured.num_premature} early wide beats", "P waves"),
    }[findings.rhythm]
    rate = f"rate {round(measured.heart_rate)} bpm"
    axis = round(measured.axis)
    lead_one, avf = ("up" if part > 0 else "down" for part in (np.cos(np.radians(axis)), np.sin(np.radians(axis))))
    levels = ", ".join(f"{territory} {level:z.2f}" for territory, level in measured.st_levels.items())
    lines = {
        "rhythm": f"{rate}, RR {intervals}, {p_waves}",
        "rate": rate,
        "axis": f"QRS {lead_one} in I, {avf} in aVF, axis {axis} degrees",
        "qrs": f"QRS {round(measured.qrs_duration)} ms",
        "st": f"ST {levels} mV",
    }
    return "\n".join(lines[topic] for topic in topics)


def _topics_in_words(topics: tuple[str, ...]) -> str:
    *most, last = (TEXTS["topics"][topic] for topic in topics)
    return f"{', '.join(most)} and {last}" if most else last


def make_row(
    index: int, *, kind: Kind, seed: int, split: str = "train", sampling_rate: int = 250, no_signal: float = 0.0
) -> dict[str, Any]:
    """Record `index` of a split of a set as a row of `make_set`, 10 seconds, the same whatever was made before it; no two sets or splits
    share a record.

    Records come in cycles of 72, in each of which all combinations of findings come up once; over 21 cycles each of them is
    asked about in each of the 21 sets of topics once. So the text of a question tells nothing of its answer.

    Args:
        no_signal: share of the records that are without a signal; all others are the same at any share.

    Raises:
        ValueError: another kind or split, a sampling rate below 100 Hz, or a share that is none.
    """
    if not 0 <= no_signal <= 1:  # `not` refuses NaN too
        raise ValueError(f"no_signal={no_signal}; expected a share of the records, 0 to 1.")
    for name, value, expected in (("kind", kind, KINDS), ("split", split, SPLITS)):
        if value not in expected:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, expected))}.")
    stream = (KINDS.index(kind) + 1, SPLITS.index(split))
    cycle, place = divmod(index, CYCLE)
    block, turn = divmod(cycle, len(TOPIC_SETS))
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*stream, 0, block)))  # 0: plan of the block
    first, axis, width, st = SHOWN[rng.permutation(CYCLE)[place]]
    topics = TOPIC_SETS[rng.permutation(len(TOPIC_SETS))[(place + turn) % len(TOPIC_SETS)]]

    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*stream, 1, index)))  # 1: the record
    if kind != "reports" and "rate" in topics:
        rate, rhythm = rng.uniform(*RATES[STATEMENTS["rate"][first]]), RHYTHMS[rng.integers(2)]
    else:
        rate, rhythm = rng.uniform(50, 110), RHYTHMS[first]
    territory = st.removesuffix(" ST elevation")
    findings = sample_findings(
        rng,
        rhythm=rhythm,
        heart_rate=rate,
        axis=axis,
        wide_qrs=width == "wide QRS",
        st_elevation=None if territory == "no" else territory,
    )
    ecg, measured = simulate_measured(findings, rng, sampling_rate=sampling_rate)
    off = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(*stream, 2, index)))  # 2: the electrodes
    has_signal = off.random() >= no_signal
    if not has_signal:
        ecg = simulate_no_signal(off, sampling_rate=sampling_rate)
    name = f"simulated-{kind}-{seed}-{split}-{index:06d}"
    row = {"ecg": stored_ecg(ecg, sampling_rate), "record_id": name, "patient_id": name}  # one record each
    if kind == "reports":
        wordings = TEXTS["no signal"]["report"]
        text = report(findings, measured, rng) if has_signal else wordings[off.integers(len(wordings))]
        return {**row, "report": text}
    if has_signal:
        said, reasons = statements(findings), thought(findings, measured, topics)
        answer = "; ".join(said[topic] for topic in topics)
    else:
        answer, reasons = NO_SIGNAL, TEXTS["no signal"]["thought"]
    answer = f"<answer>{answer}</answer>"
    if kind == "reasoning":
        answer = f"<think>\n{reasons}\n</think>\n{answer}"
    question = TEXTS["questions"][rng.integers(len(TEXTS["questions"]))].format(topics=_topics_in_words(topics))
    return {
        **row,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "question_type": f"{len(topics)} finding{'s' if len(topics) > 1 else ''}",
    }


def make_set(
    kind: Kind,
    num_records: int,
    seed: int,
    split: str = "train",
    *,
    sampling_rate: int = 250,
    no_signal: float = 0.0,
    num_proc: int | None = None,
    cache_dir: str | None = None,
) -> Dataset:
    """One split of a simulated set, on disk in the cache of `datasets`; what the arguments mean, and errors, as of `make_row`.

    Returns:
        Columns `ecg` ({"array": int16 microvolts [12, samples], "sampling_rate", "lead_names", "unit"}), `record_id`,
        `patient_id` (a patient has one record), and of `reports` a `report`, of the others `messages` (user, assistant) and
        `question_type` (how many findings are asked for).
    """
    texts = {"report": TEXT} if kind == "reports" else {"messages": MESSAGES, "question_type": TEXT}
    return generate(
        make_row,
        num_records,
        {"record_id": TEXT, "patient_id": TEXT, **texts},
        cycle=CYCLE,
        files=[TEXTS_FILE, resource("training/data/simulated_reports.py")],
        samples=10 * sampling_rate,
        num_proc=num_proc,
        cache_dir=cache_dir,
        kind=kind,
        seed=seed,
        split=split,
        sampling_rate=sampling_rate,
        no_signal=no_signal,
    )
