import itertools
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from ecg_measuring import RATE, mean_beat, r_peaks
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.training.data import simulated_reports
from elm_ecg.training.data.simulated_reports import (
    CYCLE,
    KINDS,
    STATEMENTS,
    TEXTS,
    TOPIC_SETS,
    make_row,
    make_set,
    report,
    statements,
    thought,
)
from elm_ecg.training.data.synthetic import (
    AXES,
    RATES,
    RHYTHMS,
    SPLITS,
    TERRITORIES,
    TERRITORY_LEADS,
    Findings,
    Measurements,
    Rhythm,
    simulate_measured,
)

# any patient, without noise
ANY = st.builds(
    lambda rhythm, rate, st_elevation, axis, wide: Findings(
        rhythm,
        min(rate, 110) if rhythm == "premature ventricular complexes" else rate,
        st_elevation,
        axis,
        wide,
        noise=0,
        wander=0,
    ),
    st.sampled_from(RHYTHMS),
    st.floats(40, 150),
    st.sampled_from([None, *TERRITORIES]),
    st.sampled_from(AXES),
    st.booleans(),
)
SEEDS = st.integers(0, 2**32)


def simulate(findings: Findings, seed: int) -> tuple[dict[str, np.ndarray], Measurements]:
    ecg, measured = simulate_measured(findings, np.random.default_rng(seed), sampling_rate=RATE)
    return dict(zip(STANDARD_LEADS, ecg, strict=True)), measured


@given(rhythm=st.sampled_from(RHYTHMS[:2]), rate=st.floats(40, 150), seed=SEEDS)
def test_the_rate_is_that_of_the_record(rhythm: Rhythm, rate: float, seed: int) -> None:
    leads, measured = simulate(Findings(rhythm, rate, noise=0, wander=0), seed)
    assert measured.heart_rate == rate
    assert abs(len(r_peaks(leads)) - rate / 6) < 2
    assert measured.num_premature == 0


@given(findings=ANY, seed=SEEDS)
def test_axis_qrs_and_st_are_those_of_the_samples(findings: Findings, seed: int) -> None:
    findings = Findings(**{**vars(findings), "rhythm": "sinus rhythm", "heart_rate": min(findings.heart_rate, 110)})
    leads, measured = simulate(findings, seed)
    isoelectric, _ = simulate(Findings(**{**vars(findings), "st_elevation": None}), seed)  # it shows where the QRS ends
    peaks = r_peaks(isoelectric)
    beats, onset, end = mean_beat(isoelectric, peaks)
    assert abs(1000 * (end - onset) / RATE - measured.qrs_duration) < 25
    one, avf = beats["I"][onset:end].sum(), beats["aVF"][onset:end].sum()
    assert abs(np.degrees(np.arctan2(2 / np.sqrt(3) * avf, one)) - measured.axis) < 6
    beats, _, _ = mean_beat(leads, peaks)
    for territory, names in TERRITORY_LEADS.items():
        level = np.mean([beats[name][end + 15] - beats[name][onset - 5 : onset].mean() for name in names])
        assert abs(level - measured.st_levels[territory]) < 0.08
        assert (level >= 0.1) == (territory == findings.st_elevation)


def conclude(text: str) -> dict[str, str]:
    """What the measured values of a thought mean, by the textbook's limits."""
    said: dict[str, str] = {}
    if found := re.search(r"rate (\d+) bpm", text):
        said |= dict.fromkeys(
            ["rate"], next((name for name, (low, high) in RATES.items() if low <= int(found[1]) <= high), "none")
        )
    if "irregular, no P waves" in text:
        said["rhythm"] = "atrial fibrillation"
    elif "regular, P waves" in text:
        said["rhythm"] = "sinus rhythm"
    elif re.search(r"regular but for [2-9] early wide beats, P waves", text):
        said["rhythm"] = "premature ventricular complexes"
    if found := re.search(r"QRS (up|down) in I, (up|down) in aVF, axis (-?\d+) degrees", text):
        degrees = int(found[3])
        quadrant = {("up", "up"): (0, 90), ("up", "down"): (-90, 0), ("down", "up"): (90, 180)}[found[1], found[2]]
        assert quadrant[0] <= degrees <= quadrant[1]
        said["axis"] = AXES[0] if -30 <= degrees <= 90 else AXES[1] if degrees < -30 else AXES[2]
    if found := re.search(r"^QRS (\d+) ms$", text, re.MULTILINE):
        said["qrs"] = "wide QRS" if int(found[1]) >= 120 else "narrow QRS"
    if found := re.search(r"^ST anterior (\S+), inferior (\S+), lateral (\S+) mV$", text, re.MULTILINE):
        raised = [name for name, level in zip(TERRITORIES, found.groups(), strict=True) if float(level) >= 0.1]
        said["st"] = f"{raised[0] if raised else 'no'} ST elevation"
        assert len(raised) <= 1
    return said


# what a report of each finding says, and of no other of its topic
KEYWORDS = {
    "rhythm": {RHYTHMS[0]: "sinus", RHYTHMS[1]: "fibrillation", RHYTHMS[2]: "premature"},
    "axis": dict(zip(AXES, ("normal", "left", "right"), strict=True)),
    "qrs": {"narrow QRS": "narrow", "wide QRS": "wide"},
    "st": {"no ST elevation": "no st elevation", **{f"{name} ST elevation": name for name in TERRITORIES}},
}


@given(findings=ANY, seed=SEEDS)
def test_a_thought_says_what_is_so_and_a_report_too(findings: Findings, seed: int) -> None:
    _, measured = simulate(findings, seed)
    true = statements(findings)
    said = conclude(thought(findings, measured, true))
    if "rate" not in true:  # but lies between two classes
        del said["rate"]
    assert said == true

    text = report(findings, measured, np.random.default_rng(seed))
    if "premature" in text:  # complexes in a sinus rhythm
        text = text.replace("sinus rhythm", "").replace("Sinus rhythm", "")
    for topic, words in KEYWORDS.items():
        assert [name for name, word in words.items() if word in text.lower()] == [true[topic]]
    if true["rhythm"] == RHYTHMS[2]:
        assert f"{measured.num_premature} premature" in text
    for value in (measured.heart_rate, measured.axis, measured.qrs_duration):
        assert re.search(rf"(?<![\d-]){round(value)}(?!\d)", text)
    if findings.st_elevation:
        assert f"{measured.st_levels[findings.st_elevation]:.1f} mV in" in text
        assert ", ".join(TERRITORY_LEADS[findings.st_elevation]) in text


@given(index=st.integers(0, 10**6), seed=st.integers(0, 10**6), split=st.sampled_from(SPLITS))
def test_the_thought_leads_to_the_answer(index: int, seed: int, split: str) -> None:
    row = make_row(index, kind="reasoning", seed=seed, split=split, sampling_rate=100)
    question, answer = (turn["content"] for turn in row["messages"])
    found = re.fullmatch(r"<think>\n(.+)\n</think>\n<answer>(.+)</answer>", answer, re.DOTALL)
    said, concluded = found[2].split("; "), conclude(found[1])
    asked = [topic for topic, words in TEXTS["topics"].items() if words in question]
    assert said == [concluded[topic] for topic in asked]
    assert row["question_type"].split()[0] == str(len(said))


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch):
    """Rows without their ECGs."""
    measured = Measurements(70, 20, 90, dict.fromkeys(TERRITORIES, 0.0), 2)
    monkeypatch.setattr(simulated_reports, "simulate_measured", lambda *_, **__: (np.zeros((12, 1)), measured))

    def rows(number: int, kind: str, **kwargs) -> list[tuple[str, str]]:
        made = [make_row(index, kind=kind, seed=3, **kwargs)["messages"] for index in range(number)]
        return [(question["content"], answer["content"]) for question, answer in made]

    return rows


def test_no_question_tells_its_answer(texts) -> None:
    rows = texts(CYCLE * len(TOPIC_SETS), "answers")
    counts: dict[tuple[str, ...], Counter] = {}
    worded: dict[str, Counter] = {}
    for question, answer in rows:
        asked = tuple(topic for topic, words in TEXTS["topics"].items() if words in question)
        counts.setdefault(asked, Counter())[answer] += 1
        worded.setdefault(question.split()[0], Counter())[answer] += 1
    assert set(counts) == set(TOPIC_SETS)
    for asked, answers in counts.items():
        said = ["; ".join(chosen) for chosen in itertools.product(*(STATEMENTS[topic] for topic in asked))]
        assert answers == dict.fromkeys((f"<answer>{text}</answer>" for text in said), CYCLE // len(said))
    every = sorted(set().union(*worded.values()), key=lambda text: -sum(c[text] for c in worded.values()))[:20]
    assert chi2_contingency([[c[text] for text in every] for c in worded.values()]).pvalue > 1e-3


def test_each_cycle_asks_for_every_finding_equally_often(texts) -> None:
    said = Counter(name for _, answer in texts(CYCLE, "answers") for name in re.split(r"; |<.+?>", answer))
    for topic in ("axis", "qrs", "st"):
        numbers = [said[name] for name in STATEMENTS[topic]]
        assert min(numbers) > 0
        assert max(numbers) < 3 * min(numbers)


def beats(row: dict[str, Any]) -> np.ndarray:
    """The largest value of each lead, microvolts."""
    return np.abs(row["ecg"]["array"]).max(1)


def test_records_without_a_signal_say_so() -> None:
    """All others are as without them; the questions, which tell nothing, are of the same kinds."""
    options = {"seed": 0, "sampling_rate": 100}
    flat = noisy = 0
    for index in range(60):
        row = make_row(index, kind="reasoning", no_signal=0.4, **options)
        plain = make_row(index, kind="reasoning", **options)
        report_row = make_row(index, kind="reports", no_signal=0.4, **options)
        assert row["question_type"] == plain["question_type"]
        question, answer = (turn["content"] for turn in row["messages"])
        if answer == "<think>\nno QRS complexes in any lead\n</think>\n<answer>no ECG signal</answer>":
            flat += beats(row).max() == 0
            noisy += 0 < beats(row).max() < 400  # of noise and wander, where the smallest beats have 500
            assert beats(plain).max() > 500
            assert question == plain["messages"][0]["content"]
        else:
            np.testing.assert_array_equal(row["ecg"].pop("array"), plain["ecg"].pop("array"))
            assert row == plain
        assert ("no ecg signal" in report_row["report"].lower()) == (beats(report_row).max() < 400)
    assert flat > 5
    assert noisy > 5
    assert flat + noisy < 36


def test_sets_and_splits_share_no_record() -> None:
    rows = [
        make_row(4, kind=kind, seed=seed, split=split, sampling_rate=100)
        for kind in KINDS
        for split in SPLITS
        for seed in (0, 1)
    ]
    assert len({row["record_id"] for row in rows}) == len({row["patient_id"] for row in rows}) == len(rows)
    assert len({row["ecg"]["array"].tobytes() for row in rows}) == len(rows)


def test_a_set_depends_on_its_arguments_alone(tmp_path) -> None:
    options = {"sampling_rate": 100}
    one = make_set("reasoning", CYCLE + 9, 0, "test", cache_dir=str(tmp_path / "one"), **options)
    two = make_set("reasoning", CYCLE + 9, 0, "test", cache_dir=str(tmp_path / "two"), num_proc=2, **options)
    assert one.column_names == ["ecg", "record_id", "patient_id", "messages", "question_type"]
    assert one.split == "test"
    assert one[:] == two[:]
    expected = make_row(CYCLE + 8, kind="reasoning", seed=0, split="test", **options)
    row = one[CYCLE + 8]
    np.testing.assert_array_equal(row["ecg"].pop("array"), expected["ecg"].pop("array"))
    assert row["messages"] == expected["messages"]
    assert row["record_id"] == expected["record_id"]
    reports = make_set("reports", 2, 0, cache_dir=str(tmp_path), **options)
    assert reports.column_names == ["ecg", "record_id", "patient_id", "report"]
    assert reports[1]["report"] == make_row(1, kind="reports", seed=0, **options)["report"]


def test_every_wording_is_used() -> None:
    measured = Measurements(70, 20, 90, dict.fromkeys(TERRITORIES, 0.3), 2)
    rng = np.random.default_rng(0)
    heads = {text.split("{")[0].lower() for wordings in TEXTS["report"].values() for text in wordings} - {""}
    said = " ".join(
        report(Findings(rhythm, 70, territory, axis, wide), measured, rng).lower()
        for rhythm, territory, axis, wide in itertools.product(RHYTHMS, (None, *TERRITORIES), AXES, (False, True))
        for _ in range(4)
    )
    assert [head for head in heads if head not in said] == []
    assert set(TEXTS["topics"]) == set(STATEMENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "report"}, r"kind='report'; expected one of 'reports', 'reasoning', 'answers'"),
        ({"split": "dev"}, r"split='dev'; expected one of 'train'"),
        ({"no_signal": float("nan")}, "no_signal=nan; expected a share of the records, 0 to 1"),
        ({"sampling_rate": 50}, "sampling_rate=50 Hz; a QRS needs at least 100"),
    ],
)
def test_refuses(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_row(0, **{"kind": "answers", "seed": 0, **options})


def test_refuses_an_empty_set() -> None:
    with pytest.raises(ValueError, match="num_records=0; expected at least 1"):
        make_set("answers", 0, 0)
