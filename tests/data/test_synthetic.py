import itertools
from collections import Counter

import numpy as np
import pytest
from ecg_measuring import RATE, mean_beat, r_peaks
from scipy.stats import chi2_contingency

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.training.data.synthetic import (
    ANSWERS,
    AXES,
    AXIS_DEGREES,
    CYCLE,
    RATES,
    RHYTHMS,
    SPLITS,
    TERRITORIES,
    TERRITORY_LEADS,
    WORDINGS,
    Findings,
    make_dataset,
    make_record,
    sample_findings,
    simulate_ecg,
    simulate_measured,
)

SEEDS = range(12)


def simulate(seed: int, **findings) -> dict[str, np.ndarray]:
    """A record without noise or wander, by lead."""
    ecg = simulate_ecg(Findings(noise=0, wander=0, **findings), np.random.default_rng(seed))
    return dict(zip(STANDARD_LEADS, ecg, strict=True))


@pytest.mark.parametrize("rhythm", RHYTHMS)
def test_limb_leads_obey_einthoven(rhythm):
    ecg = simulate_ecg(
        Findings(rhythm, 90, "lateral", noise=0.05, wander=0.2), np.random.default_rng(0), sampling_rate=500
    )
    assert ecg.dtype == np.float32
    assert ecg.shape == (12, 5000)
    leads = dict(zip(STANDARD_LEADS, ecg, strict=True))
    np.testing.assert_allclose(leads["III"], leads["II"] - leads["I"], atol=1e-6)
    np.testing.assert_allclose(leads["aVR"], -(leads["I"] + leads["II"]) / 2, atol=1e-6)
    np.testing.assert_allclose(leads["aVL"], leads["I"] - leads["II"] / 2, atol=1e-6)
    np.testing.assert_allclose(leads["aVF"], leads["II"] - leads["I"] / 2, atol=1e-6)


def test_normal_ecg_has_normal_amplitudes():
    upright_t = Counter()
    for seed in SEEDS:
        leads = simulate(seed)
        beats, onset, end = mean_beat(leads, r_peaks(leads))
        r = {name: beat[onset:end].max() for name, beat in beats.items()}
        s = {name: -beat[onset:end].min() for name, beat in beats.items()}
        assert 0.5 < r["II"] < 2
        assert 0.08 < beats["II"][onset - 45 : onset - 10].max() < 0.3  # P
        assert s["V1"] > r["V1"] > 0.1  # rS
        assert r["V1"] < r["V3"] < r["V4"]  # R grows to the left
        assert s["V6"] < s["V3"]
        assert 0.7 < r["V5"] < 3.5
        assert r["aVR"] < s["aVR"]
        upright_t.update(name for name, beat in beats.items() if beat[end + 15 :].sum() > 0)
    for name in ("I", "II", "V2", "V3", "V4", "V5", "V6"):
        assert upright_t[name] == len(SEEDS)
    assert upright_t["aVR"] == 0


@pytest.mark.parametrize(("wide_qrs", "shortest", "longest"), [(False, 72, 112), (True, 140, 188)])
def test_qrs_width(wide_qrs, shortest, longest):
    for axis in AXES:
        for seed in SEEDS:
            leads = simulate(seed, wide_qrs=wide_qrs, axis=axis)
            _, onset, end = mean_beat(leads, r_peaks(leads))
            assert shortest <= 1000 * (end - onset) / RATE <= longest


@pytest.mark.parametrize("wide_qrs", [False, True])
@pytest.mark.parametrize("axis", AXES)
def test_axis_from_the_net_areas_of_i_and_avf(axis, wide_qrs):
    lowest, highest = AXIS_DEGREES[axis]
    for seed in SEEDS:
        leads = simulate(seed, axis=axis, wide_qrs=wide_qrs)
        beats, onset, end = mean_beat(leads, r_peaks(leads))
        one, avf = beats["I"][onset:end].sum(), beats["aVF"][onset:end].sum()
        degrees = np.degrees(np.arctan2(2 / np.sqrt(3) * avf, one))
        assert lowest - 5 <= degrees <= highest + 5


@pytest.mark.parametrize("wide_qrs", [False, True])
@pytest.mark.parametrize("st_elevation", [None, *TERRITORIES])
def test_st_elevation_60_ms_after_j(st_elevation, wide_qrs):
    for seed in SEEDS:
        # the same patient with an isoelectric ST segment shows where the QRS ends
        isoelectric = simulate(seed, wide_qrs=wide_qrs)
        peaks = r_peaks(isoelectric)
        _, onset, end = mean_beat(isoelectric, peaks)
        beats, _, _ = mean_beat(simulate(seed, wide_qrs=wide_qrs, st_elevation=st_elevation), peaks)
        level = {name: beat[end + 15] - beat[onset - 5 : onset].mean() for name, beat in beats.items()}
        for territory, names in TERRITORY_LEADS.items():
            if territory == st_elevation:
                assert min(level[name] for name in names) >= 0.1
            else:
                assert max(level[name] for name in names) < 0.1


@pytest.mark.parametrize("st_elevation", ["inferior", "lateral"])
def test_st_elevation_has_reciprocal_depression(st_elevation):
    peaks = r_peaks(simulate(0))
    _, _, end = mean_beat(simulate(0), peaks)
    beats, _, _ = mean_beat(simulate(0, st_elevation=st_elevation), peaks)
    assert beats[{"inferior": "aVL", "lateral": "III"}[st_elevation]][end + 15] < -0.1


def change_of_st(seed: int, st_elevation: str) -> tuple[dict[str, float], dict[str, float]]:
    """How much higher the ST segment 60 ms after the QRS and the T wave are than of the same patient without elevation, by lead."""
    isoelectric, elevated = (simulate(seed, st_elevation=territory) for territory in (None, st_elevation))
    peaks = r_peaks(isoelectric)
    (before, _, end), (after, _, _) = mean_beat(isoelectric, peaks), mean_beat(elevated, peaks)
    st = {lead: after[lead][end + 15] - before[lead][end + 15] for lead in STANDARD_LEADS}
    return st, {lead: after[lead][end + 25 :].max() - before[lead][end + 25 :].max() for lead in STANDARD_LEADS}


def test_lateral_elevation_is_not_posterior():
    """The inferior leads are depressed, III most, and V1 and V2 are as of the same patient without."""
    for seed in SEEDS:
        change, _ = change_of_st(seed, "lateral")
        assert change["III"] < change["aVF"] < -0.03
        assert change["III"] < -0.1
        assert max(abs(change[lead]) for lead in ("V1", "V2", "V3")) < 0.02


@pytest.mark.parametrize("st_elevation", TERRITORIES)
def test_t_waves_are_tall_where_the_st_segment_is_elevated(st_elevation):
    for seed in SEEDS:
        _, taller = change_of_st(seed, st_elevation)
        assert min(taller[lead] for lead in TERRITORY_LEADS[st_elevation]) > 0.1


@pytest.mark.parametrize("heart_rate", [40, 51, 75, 110, 150])
@pytest.mark.parametrize("rhythm", RHYTHMS[:2])
def test_heart_rate_by_counting(rhythm, heart_rate):
    for seed in SEEDS:
        peaks = r_peaks(simulate(seed, rhythm=rhythm, heart_rate=heart_rate))
        assert abs(len(peaks) - heart_rate / 6) < 2


def test_rr_intervals_are_irregular_in_atrial_fibrillation_only():
    def irregularity(seed, **findings):
        rr = np.diff(r_peaks(simulate(seed, **findings)))
        return rr.std() / rr.mean()

    for seed in SEEDS:
        assert irregularity(seed) < 0.08
        assert irregularity(seed, rhythm="atrial fibrillation") > 0.1


def test_atrial_fibrillation_has_waves_of_4_to_9_hz_and_no_p():
    for seed in SEEDS:
        leads = simulate(seed, rhythm="atrial fibrillation", heart_rate=40)
        # before each QRS: the isoelectric line in sinus rhythm, apart from P
        quiet = np.concatenate([leads["V1"][p - 75 : p - 20] for p in r_peaks(leads) if p > 75])
        assert 0.03 < quiet.std() < 0.15
        rr = max(zip(r_peaks(leads)[:-1], r_peaks(leads)[1:], strict=True), key=lambda pair: pair[1] - pair[0])
        pause = leads["V1"][rr[0] + 125 : rr[1] - 20]
        crossings = np.count_nonzero(np.diff(np.sign(pause - pause.mean())))
        assert 3 <= crossings / 2 / (len(pause) / RATE) <= 10


def test_premature_complexes_are_early_wide_and_followed_by_a_pause():
    for seed in SEEDS:
        findings = Findings("premature ventricular complexes", 70, noise=0, wander=0)
        ecg, measured = simulate_measured(findings, np.random.default_rng(seed))
        leads = dict(zip(STANDARD_LEADS, ecg, strict=True))
        peaks = r_peaks(leads, height=0.2)  # wide complexes move less fast
        rr = np.diff(peaks) / np.median(np.diff(peaks))
        early = [i + 1 for i in range(len(rr) - 1) if rr[i] < 0.8 and rr[i + 1] > 1.2]
        assert 2 <= len(early) <= 4
        assert len(early) == measured.num_premature
        # samples above half of the greatest deflection, near the peak
        strength = np.sqrt(sum(lead**2 for lead in leads.values()))
        around = [strength[peak - 25 : peak + 25] for peak in peaks if 25 <= peak < len(strength) - 25]
        widths = sorted(np.count_nonzero(beat > beat.max() / 2) for beat in around)
        assert widths[-len(early)] > 1.5 * widths[0]
        assert sum(width > 1.5 * widths[0] for width in widths) == len(early)


@pytest.mark.parametrize(
    ("findings", "message"),
    [
        ({"rhythm": "flutter"}, r"rhythm='flutter'; expected one of 'sinus rhythm'"),
        ({"axis": "left"}, r"axis='left'; expected one of 'normal axis'"),
        ({"st_elevation": "septal"}, r"st_elevation='septal'; expected one of None, 'anterior'"),
        ({"heart_rate": 200}, r"heart_rate=200; expected 40 to 150"),
        ({"heart_rate": float("nan")}, r"heart_rate=nan; expected 40 to 150"),
        ({"rhythm": "premature ventricular complexes", "heart_rate": 120}, r"expected at most 110"),
        ({"noise": -0.1}, r"noise=-0.1; expected millivolts"),
        ({"wander": float("nan")}, r"wander=nan; expected millivolts"),
    ],
)
def test_impossible_findings_are_refused(findings, message):
    with pytest.raises(ValueError, match=message):
        Findings(**findings)


def test_impossible_records_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="seconds=2; a rhythm needs at least 5"):
        simulate_ecg(Findings(), rng, seconds=2)
    with pytest.raises(ValueError, match="sampling_rate=50 Hz; a QRS needs at least 100"):
        simulate_ecg(Findings(), rng, sampling_rate=50)
    with pytest.raises(ValueError, match="split='dev'; expected one of 'train'"):
        make_record(0, 0, "dev")
    with pytest.raises(ValueError, match="num_records=0; expected at least 1"):
        make_dataset(0, 0)


@pytest.mark.parametrize("seconds", [5.0, 10.0])
@pytest.mark.parametrize("heart_rate", [40, 110])
def test_premature_complexes_fit_in_short_and_slow_records(heart_rate, seconds):
    for seed in range(50):
        findings = Findings("premature ventricular complexes", heart_rate)
        ecg = simulate_ecg(findings, np.random.default_rng(seed), seconds=seconds)
        assert np.isfinite(ecg).all()


def test_sampled_findings_are_free_of_each_other():
    rng = np.random.default_rng(0)
    findings = [sample_findings(rng) for _ in range(600)]
    seen = {(f.rhythm, f.st_elevation, f.axis, f.wide_qrs) for f in findings}
    assert len(seen) == 3 * 4 * 3 * 2
    assert sample_findings(rng, axis="left axis deviation", heart_rate=44).heart_rate == 44


# the text of a question needs no ECG: make_record without the simulation
@pytest.fixture
def questions(monkeypatch):
    """For each record of 40 cycles its questions (type, text, answer) and what it shows."""
    drawn = []
    monkeypatch.setattr(
        "elm_ecg.training.data.synthetic.simulate_ecg", lambda f, rng, **_: drawn.append(f) or np.zeros((12, 1))
    )
    rows = [make_record(index, 5) for index in range(40 * CYCLE)]
    chats = []
    for row in rows:
        texts = [message["content"] for message in row["messages"]]
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * len(row["question_type"])
        chats.append(list(zip(row["question_type"], texts[::2], texts[1::2], strict=True)))
    return list(zip(chats, drawn, strict=True))


def test_the_text_of_a_question_tells_nothing(questions):
    counts = Counter(question for chat, _ in questions for question in chat)
    texts = {(kind, text) for kind, text, _ in counts}
    assert len(texts) == sum(len(wordings) for wordings in WORDINGS.values()) + 2 * 4  # three territories
    for kind, text in texts:
        assert len({counts[kind, text, answer] for answer in ANSWERS[kind]}) == 1
    assert {answer for _, _, answer in counts} == {answer for answers in ANSWERS.values() for answer in answers}


def test_the_answers_before_tell_nothing(questions):
    pairs: dict[tuple[str, str], Counter] = {}
    for chat, _ in questions:
        for (one, _, answer), (other, _, later) in itertools.combinations(sorted(chat), 2):
            pairs.setdefault((one, other), Counter())[answer, later] += 1
    assert len(pairs) == 22
    for (one, other), counts in pairs.items():
        table = [[counts[answer, later] for later in ANSWERS[other]] for answer in ANSWERS[one]]
        assert chi2_contingency(table).pvalue > 1e-3 / len(pairs), (one, other)
    first = Counter(chat[0][0] for chat, _ in questions)  # and no question is always the first
    assert set(first) == set(ANSWERS)


def test_the_answer_is_what_the_ecg_shows(questions):
    for chat, shown in questions[: 4 * CYCLE]:
        for kind, text, answer in chat:
            truth = {
                "rhythm": shown.rhythm,
                "rate": next((name for name, (low, high) in RATES.items() if low <= shown.heart_rate <= high), None),
                "axis": shown.axis,
                "wide_qrs": shown.wide_qrs,
                "st_elevation": shown.st_elevation is not None and shown.st_elevation in text,
                "st_territory": shown.st_elevation or "none",
                "premature": shown.rhythm == "premature ventricular complexes",
                "atrial_fibrillation": shown.rhythm == "atrial fibrillation",
            }[kind]
            assert answer == ({True: "yes", False: "no"}[truth] if isinstance(truth, bool) else truth)


def test_other_findings_do_not_give_the_answer_away(questions):
    for kind in ("axis", "wide_qrs", "premature", "atrial_fibrillation", "st_elevation"):
        rates: dict[str, list[float]] = {}
        for chat, shown in questions:
            for asked, _, answer in chat:
                if asked == kind:
                    rates.setdefault(answer, []).append(shown.heart_rate)
        means = [np.mean(values) for values in rates.values()]
        assert max(means) - min(means) < 8  # the standard error is 1.6 bpm or less
    for answer in RATES:
        rhythms = {
            shown.rhythm for chat, shown in questions for kind, _, given in chat if (kind, given) == ("rate", answer)
        }
        assert rhythms == set(RHYTHMS[:2])


def test_records_depend_on_seed_split_and_index_alone():
    def same(one, other):
        return one["messages"] == other["messages"] and np.array_equal(one["ecg"]["array"], other["ecg"]["array"])

    backwards = {index: make_record(index, 0) for index in (7, 3, 100)}
    for index in (3, 7, 100):
        assert same(make_record(index, 0), backwards[index])
    assert not np.array_equal(make_record(3, 1)["ecg"]["array"], backwards[3]["ecg"]["array"])
    for split in SPLITS[1:]:
        assert not np.array_equal(make_record(3, 0, split)["ecg"]["array"], backwards[3]["ecg"]["array"])
    assert not np.array_equal(backwards[7]["ecg"]["array"], backwards[3]["ecg"]["array"])


def test_dataset_has_our_form_whatever_the_number_of_workers(tmp_path):
    one = make_dataset(CYCLE + 20, 0, cache_dir=str(tmp_path / "one"))
    two = make_dataset(CYCLE + 20, 0, num_proc=2, cache_dir=str(tmp_path / "two"))
    assert one.column_names == ["ecg", "messages", "record_id", "patient_id", "question_type"]
    assert len(one) == CYCLE + 20
    assert one.split == "train"
    assert one[:] == two[:]
    for index in (0, CYCLE + 19):
        row, expected = one[index], make_record(index, 0)
        np.testing.assert_array_equal(row["ecg"].pop("array"), expected["ecg"].pop("array"))
        assert row == {**expected, "ecg": {**expected["ecg"], "lead_names": list(STANDARD_LEADS)}}
        assert row["ecg"]["unit"] == "uV"
    assert one.features["ecg"]["array"].dtype == "int16"
    assert one.features["ecg"]["array"].shape == (12, 2500)


def test_patients_are_never_shared(tmp_path):
    patients = [
        make_dataset(4, 0, split, sampling_rate=100, seconds=5, cache_dir=str(tmp_path))["patient_id"][:]
        for split in SPLITS
    ]
    assert len(set().union(*patients)) == 12


def test_microvolts_are_the_millivolts_of_the_simulation():
    ecg = make_record(0, 0)["ecg"]["array"]
    assert ecg.dtype == np.int16
    assert 300 < np.abs(ecg).max() < 6000
    assert np.abs(ecg[2] - (ecg[1] - ecg[0])).max() <= 1
