import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.training.evaluation import bootstrap as bootstrap_module
from elm_ecg.training.evaluation.bootstrap import (
    Difference,
    Estimate,
    balanced_accuracy,
    class_counts,
    clusters,
    difference,
    estimate,
    holm,
    macro_f1,
    p_in_words,
    resampled_auroc,
    resampled_sums,
)
from intervals import bootstrap, bootstrap_auroc, paired_auroc_difference, paired_difference


def repeated(num_patients: int, times: int) -> list[str]:
    return [f"p{patient}" for patient in range(num_patients) for _ in range(times)]


def test_clusters():
    numbers, num_patients = clusters(["b", ("a", "b"), ["c"], "a", "b"])
    assert (numbers.tolist(), num_patients) == ([1, 0, 2, 0, 1], 3)
    assert clusters(np.array([7, 30, 7]))[0].tolist() == clusters(["7", "30", "7"])[0].tolist()


@pytest.mark.parametrize(
    ("patients", "message"),
    [([], "no questions"), (["a", None], "Question 1, counted from 0, has no patient"), (["a", ()], "Question 1")],
)
def test_questions_without_patients(patients, message):
    with pytest.raises(ValueError, match=message):
        clusters(patients)


@pytest.fixture
def few_patients(monkeypatch):
    """Intervals of as few patients as can be told by hand, which else have none."""
    monkeypatch.setattr(bootstrap_module, "MIN_PATIENTS", 2)


@pytest.mark.usefixtures("few_patients")
def test_two_patients_by_hand():
    """A quarter of the resamples hold one patient twice, so the interval goes from one's mean to the other's."""
    samples, patients = [1, 1, 1, 0], ["a", "a", "a", "b"]
    assert bootstrap(samples, patients, num_resamples=200) == (0.75, 0.0, 1.0)
    sums = resampled_sums(np.column_stack([samples, np.ones(4)]), patients, num_resamples=200)
    assert set(map(tuple, sums.tolist())) == {(6.0, 6.0), (3.0, 4.0), (0.0, 2.0)}
    assert 0.15 < np.mean(sums[:, 0] == 6) < 0.35


@pytest.mark.usefixtures("few_patients")
def test_resamples_draw_whole_patients_as_often_as_there_are():
    patients = ["b", "a", "b", "c", "a", "b"]
    drawn = resampled_sums(np.eye(6), patients, num_resamples=500, seed=3)
    assert (drawn[:, [0, 0, 1]] == drawn[:, [2, 5, 4]]).all()
    assert (drawn[:, [0, 1, 3]].sum(axis=1) == 3).all()
    assert drawn.mean(axis=0) == pytest.approx(np.ones(6), abs=0.15)


def test_draws_depend_on_patients_resamples_and_seed_alone(monkeypatch):
    rng = np.random.default_rng(0)
    patients = [f"p{number}" for number in rng.integers(0, 30, 100)]
    samples = rng.random((100, 3)) * [1, 1000, 1e-3]  # not of whole numbers: sums are the same to the last bit
    sums = resampled_sums(samples, patients, 300, seed=1)
    assert sums == pytest.approx(resampled_sums(np.eye(100), patients, 300, seed=1) @ samples, rel=1e-9)
    order = rng.permutation(100)
    assert np.array_equal(sums, resampled_sums(samples[order], [patients[i] for i in order], 300, seed=1))
    assert np.array_equal(sums[:, 1:2], resampled_sums(samples[:, 1], patients, 300, seed=1))
    assert not np.array_equal(sums, resampled_sums(samples, patients, 300, seed=2))
    scores, labels = rng.random(100), rng.random(100) < 0.5
    aurocs = resampled_auroc(scores, labels, patients, 300, seed=1)[1]
    monkeypatch.setattr(bootstrap_module, "CHUNK_SIZE", 210)  # seven resamples at a time, or two
    assert np.array_equal(sums, resampled_sums(samples, patients, 300, seed=1))
    assert np.array_equal(aurocs, resampled_auroc(scores, labels, patients, 300, seed=1)[1])


def test_mean_against_scipy():
    """Of one question a patient, and of patients as pairs of their sum and their number of questions."""
    rng = np.random.default_rng(0)
    options = {"method": "percentile", "n_resamples": 20_000, "rng": np.random.default_rng(1), "vectorized": True}
    values = rng.exponential(size=80)
    theirs = scipy.stats.bootstrap((values,), np.mean, **options).confidence_interval
    ours = bootstrap(values, range(80), num_resamples=20_000)
    assert ours == pytest.approx((values.mean(), *theirs), abs=0.01)

    patients = rng.integers(0, 40, 300)
    values = rng.random(300) + 0.02 * patients
    sums, counts = np.bincount(patients, weights=values), np.bincount(patients)

    def ratio(sums: np.ndarray, counts: np.ndarray, axis: int) -> np.ndarray:
        return sums.sum(axis) / counts.sum(axis)

    theirs = scipy.stats.bootstrap((sums, counts), ratio, paired=True, **options).confidence_interval
    ours = bootstrap(values, patients, num_resamples=20_000)
    assert ours == pytest.approx((values.mean(), *theirs), abs=0.004)
    assert ours.high - ours.low > 0.05


def test_statistic_of_sums():
    """A ratio that is no mean over the questions, as BLEU is of its n-grams."""
    rng = np.random.default_rng(0)
    samples, patients = rng.integers(1, 9, (60, 2)), repeated(20, 3)
    ours = bootstrap(samples, patients, lambda sums: np.log(sums[..., 0] / sums[..., 1]), 400, seed=2)
    drawn = resampled_sums(np.eye(60), patients, 400, seed=2)
    replicates = [math.log(weights @ samples[:, 0] / (weights @ samples[:, 1])) for weights in drawn]
    low, high = np.quantile(replicates, [0.025, 0.975])
    assert ours == pytest.approx((math.log(samples[:, 0].sum() / samples[:, 1].sum()), low, high))


def test_p_value_by_hand():
    """Of nine resamples two are not above zero: with the data themselves 3 of 10, on both sides 0.6."""
    replicates = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0, -0.1])
    assert difference(0.3, replicates).p_value == pytest.approx(0.6)
    assert difference(-0.3, -replicates).p_value == pytest.approx(0.6)
    assert difference(0.3, replicates[:7]).p_value == pytest.approx(2 / 8)
    assert difference(0.0, np.zeros(9)).p_value == 1


def test_paired_difference():
    rng = np.random.default_rng(0)
    patients = repeated(50, 4)
    a = rng.random(200)
    b = a - 0.1 - 0.01 * rng.random(200)
    found = paired_difference(a, b, patients, num_resamples=500)
    assert found.value == pytest.approx((a - b).mean())
    assert 0.1 < found.low < found.value < found.high < 0.11  # though each score varies far more
    assert found.p_value == pytest.approx(2 / 501)
    assert found[:3] == pytest.approx(bootstrap(a - b, patients, num_resamples=500))
    swapped = paired_difference(b, a, patients, num_resamples=500)
    assert swapped[:4] == pytest.approx((-found.value, -found.high, -found.low, found.p_value))
    assert found.to_dict() == {
        "difference": found.value,
        "interval_95": [found.low, found.high],
        "p_value": found.p_value,
        "p_value_at_floor": True,
    }


def test_equal_scores_are_no_difference():
    rng = np.random.default_rng(0)
    patients = repeated(30, 3)
    a = rng.random(90)
    assert paired_difference(a, a, patients) == (0, 0, 0, 1, False)
    # the same sum of each patient, but for the rounding
    b = a.reshape(30, 3)[:, ::-1].ravel()
    assert paired_difference(a, b, patients).p_value == 1


def test_paired_difference_of_a_statistic():
    rng = np.random.default_rng(0)
    classes, patients = ["x", "y", "z"], repeated(40, 3)
    references = rng.choice(classes, 120)
    good = np.where(rng.random(120) < 0.9, references, "x")
    a, b = (class_counts(references, given, classes) for given in (good, rng.choice(classes, 120)))
    found = paired_difference(a, b, patients, macro_f1, 300)
    assert found.value == pytest.approx(macro_f1(a.sum(axis=0)) - macro_f1(b.sum(axis=0)))
    assert 0 < found.low < found.value < found.high
    assert found.p_value == pytest.approx(2 / 301)


def test_class_scores_by_hand():
    """Recalls 2/3 and 0, F1 2*2/(3+2) and 0: "maybe" is no class, "other" is neither asked nor said."""
    counts = class_counts(["yes", "yes", "yes", "no"], ["yes", "yes", "maybe", ""], ["yes", "no", "other"])
    assert counts[0].tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0]
    assert counts.sum(axis=0).tolist() == [3, 1, 0, 2, 0, 0, 2, 0, 0]
    assert balanced_accuracy(counts.sum(axis=0)) == pytest.approx((2 / 3 + 0) / 2)
    assert macro_f1(counts.sum(axis=0)) == pytest.approx((2 * 2 / 5 + 0) / 2)
    both = np.stack([counts.sum(axis=0), counts[:2].sum(axis=0)])
    assert balanced_accuracy(both) == pytest.approx([1 / 3, 1])
    assert macro_f1(both) == pytest.approx([0.4, 1])


def test_class_counts_of_other_classes():
    with pytest.raises(ValueError, match="'perhaps' is none of the classes yes, no"):
        class_counts(["yes", "perhaps"], ["yes", "no"], ["yes", "no"])
    with pytest.raises(ValueError, match="2 references and 1 predictions"):
        class_counts(["yes", "no"], ["yes"], ["yes", "no"])


def test_auroc_by_hand():
    """Positives 3, 1 against negatives 2, 1: wins 1, 1, 0 and half for the tie."""
    assert bootstrap_auroc([3, 1, 2, 1], [1, 1, 0, 0], ["a", "b", "c", "d"]).value == 2.5 / 4
    assert bootstrap_auroc([-math.inf, 0], [0, 1], ["a", "b"]).value == 1


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auroc_against_scipy(pairs):
    scores, labels = np.array(pairs, dtype=float).T
    labels = labels.astype(bool)
    value = bootstrap_auroc(scores, labels, range(len(pairs)), num_resamples=3).value
    if labels.all() or not labels.any():
        assert value is None
    else:
        wins = scipy.stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
        assert value == pytest.approx(wins / labels.sum() / (~labels).sum())


def test_resampled_auroc_against_scipy():
    """Each resample written out, on the draws of `resampled_sums`."""
    rng = np.random.default_rng(0)
    patients = repeated(20, 3)
    scores, labels = rng.integers(0, 8, (60, 2)), rng.random((60, 2)) < 0.4
    value, replicates = resampled_auroc(scores, labels, patients, 50, seed=4)
    drawn = resampled_sums(np.eye(60), patients, 50, seed=4).astype(int)
    for weights, row in zip([np.ones(60, dtype=int), *drawn], [value, *replicates], strict=True):
        written = np.repeat(np.arange(60), weights)
        for column in range(2):
            chosen = labels[written, column]
            positives, negatives = scores[written, column][chosen], scores[written, column][~chosen]
            wins = scipy.stats.mannwhitneyu(positives, negatives).statistic
            assert row[column] == pytest.approx(wins / len(positives) / len(negatives))
    found = bootstrap_auroc(scores, labels, patients, 50, seed=4)
    assert found == pytest.approx((value.mean(), *np.quantile(replicates.mean(axis=1), [0.025, 0.975])))


def test_paired_auroc_difference():
    rng = np.random.default_rng(0)
    patients, labels = repeated(60, 2), np.repeat(rng.random(60) < 0.5, 2)
    good = labels + 0.5 * rng.random(120)
    poor = rng.random(120)
    found = paired_auroc_difference(good, poor, labels, patients, 300)
    assert found.value == pytest.approx(1 - bootstrap_auroc(poor, labels, patients, 10).value)
    assert 0 < found.low < found.value < found.high
    assert found.p_value == pytest.approx(2 / 301)
    assert paired_auroc_difference(good, 3 * good, labels, patients, 300) == (0, 0, 0, 1, False)


def test_one_patient_has_no_interval():
    patients = ["a"] * 4
    assert bootstrap([1, 0, 1, 1], patients) == (0.75, None, None)
    assert paired_difference([1, 0, 1, 1], [0, 0, 1, 1], patients) == (0.25, None, None, None, False)
    assert bootstrap_auroc([1, 2, 3, 4], [0, 1, 0, 1], patients) == (0.75, None, None)
    assert Estimate(0.75, None, None).to_dict() == {"value": 0.75, "interval_95": None}


def test_few_patients_have_no_interval():
    """Two patients would give p at the least that the resamples can show, of whatever difference."""
    right, wrong = [1] * 20, [0] * 20
    for num_patients, known in ((2, False), (9, False), (10, True)):
        patients = [f"p{row % num_patients}" for row in range(20)]
        found = paired_difference(right, wrong, patients)
        assert (found.low is not None) == (found.p_value is not None) == known
        scores = np.arange(20) // num_patients + np.arange(20)
        assert (bootstrap_auroc(scores, np.arange(20) % 2, patients).low is not None) == known


def test_p_at_the_floor_of_the_resamples_says_so():
    found = paired_difference([1] * 20, [0] * 20, range(20), num_resamples=2000)
    assert found.to_dict()["p_value_at_floor"] is True
    assert p_in_words(found.p_value, found.at_floor) == "< 0.001"
    assert [p_in_words(p, True) for p in (2 / 101, 0.02, 1.0)] == ["< 0.020", "< 0.021", "< 1.000"]
    assert "p_value_at_floor" not in paired_difference([1, 0] * 10, [0, 1] * 10, range(20)).to_dict()
    assert [p_in_words(p) for p in (None, 0.03104, 1.0, 0.00001)] == ["none", "0.031", "1.000", "< 0.001"]


def test_one_class_has_no_auroc():
    patients = ["a", "b", "c"]
    assert bootstrap_auroc([1, 2, 3], [1, 1, 1], patients) == (None, None, None)
    assert paired_auroc_difference([1, 2, 3], [3, 2, 1], [0, 0, 0], patients) == (*(None,) * 4, False)
    # nor have several, of which one is alone: their mean would be that of other classes
    assert bootstrap_auroc([[1, 1], [2, 2], [3, 3]], [[1, 1], [0, 1], [0, 1]], patients) == (None, None, None)


@pytest.mark.parametrize(("num_positives", "known"), [(1, False), (4, True)])
def test_interval_of_few_positives(num_positives, known):
    """Of one patient with the class 37% of the resamples lack it, of four 2%."""
    labels = np.arange(60) < num_positives
    found = bootstrap_auroc(np.arange(60) % 7, labels, range(60))
    assert (found.low is not None) == (found.high is not None) == known
    json.dumps(found.to_dict(), allow_nan=False)


def test_undefined_resamples_are_left_out():
    replicates = np.concatenate([np.linspace(0, 1, 95), [np.nan] * 5])
    assert estimate(0.5, replicates) == pytest.approx((0.5, 0.025, 0.975))
    assert estimate(0.5, np.append(replicates, [np.nan] * 6)) == (0.5, None, None)
    assert estimate(math.nan, replicates) == (None, None, None)
    assert difference(0.5, np.append(replicates, [np.nan] * 6)) == Difference(0.5, None, None, None)


def test_a_statistic_that_is_undefined():
    def share(sums: np.ndarray) -> np.ndarray:
        return sums[..., 0] / sums[..., 1]

    assert bootstrap([[0, 0], [0, 0]], ["a", "b"], share).to_dict() == {"value": None, "interval_95": None}
    assert paired_difference([[0, 0]] * 2, [[1, 1]] * 2, ["a", "b"], share) == (None, None, None, None, False)


def test_holm_by_hand():
    """Holm 1979: 0.005 x 4, 0.01 x 3, 0.03 x 2, and 0.04 not below the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_of_no_p_values():
    for p_values in ([0.5, -0.1], [1.2], [math.nan]):
        with pytest.raises(ValueError, match="expected numbers from 0 to 1"):
            holm(p_values)


@pytest.mark.parametrize(
    ("samples", "patients", "message"),
    [
        ([1, 0], ["a"], r"\(2,\); expected a row for each of the 1 questions"),
        ([[[1]]], ["a"], r"\(1, 1, 1\)"),
        ([1, math.nan], ["a", "b"], "Sample 1, counted from 0, is .nan."),
        ([[1, 2], [math.inf, 0]], ["a", "b"], r"Sample 1, counted from 0, is \[inf, 0.0\]"),
        ([], [], "no questions"),
    ],
)
def test_bad_samples(samples, patients, message):
    with pytest.raises(ValueError, match=message):
        resampled_sums(samples, patients)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2], [1, 0], "a row for each of the 3 questions"),
        ([1, 2, 3], [[1], [0], [1]], "expected both alike"),
        ([1, math.nan, 3], [1, 0, 1], "1 of 3 are NaN"),
        ([1, 2, 3], [1, 0, 2], "A label is 2"),
    ],
)
def test_bad_scores(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        resampled_auroc(scores, labels, ["a", "b", "c"])


def test_bad_settings():
    with pytest.raises(ValueError, match="num_resamples is 0"):
        resampled_sums([1, 0], ["a", "b"], num_resamples=0)
    with pytest.raises(ValueError, match="num_resamples is -1"):
        resampled_auroc([1, 0], [1, 0], ["a", "b"], num_resamples=-1)


SIMULATIONS, PATIENTS, QUESTIONS = 500, 80, 6


def covered(truth: float, interval: Estimate | Difference) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.slow
def test_coverage_of_means_and_differences():
    """Patients whose questions are alike: intervals by patient hold the truth, those by question do not; and where there
    is no difference, few p-values are below 0.05."""
    rng = np.random.default_rng(0)
    patients, alone = repeated(PATIENTS, QUESTIONS), range(PATIENTS * QUESTIONS)
    hits = np.zeros(4)
    for seed in range(SIMULATIONS):
        chance = rng.beta(1.2, 0.8, PATIENTS)  # that a patient's question is answered well
        a = (rng.random((PATIENTS, QUESTIONS)) < chance[:, None]).astype(float).ravel()
        gain = np.repeat(rng.normal(0.1, 0.3, PATIENTS), QUESTIONS) + rng.normal(0, 0.3, a.size)
        hits += [
            covered(0.6, bootstrap(a, patients, None, 400, seed)),
            covered(0.6, bootstrap(a, alone, None, 400, seed)),
            covered(0.1, paired_difference(a + gain, a, patients, None, 400, seed)),
            paired_difference(a + gain - 0.1, a, patients, None, 400, seed).p_value < 0.05,
        ]
    mean, by_question, gained, false_findings = hits / SIMULATIONS
    assert 0.92 <= mean <= 0.98
    assert by_question < 0.85
    assert 0.92 <= gained <= 0.98
    assert 0.02 <= false_findings <= 0.08


@pytest.mark.slow
def test_coverage_of_auroc():
    """A class that a patient has or has not, and scores of which most is the patient's own."""
    rng = np.random.default_rng(0)
    patients, alone = repeated(PATIENTS, QUESTIONS), range(PATIENTS * QUESTIONS)
    truth = NormalDist().cdf(1 / math.sqrt(2 * (1 + 0.5**2)))  # of two normal scores that are 1 apart
    hits = np.zeros(2)
    for seed in range(SIMULATIONS):
        label = rng.random(PATIENTS) < 0.4
        scores = np.repeat(label + rng.normal(0, 1, PATIENTS), QUESTIONS) + rng.normal(0, 0.5, PATIENTS * QUESTIONS)
        labels = np.repeat(label, QUESTIONS)
        hits += [covered(truth, bootstrap_auroc(scores, labels, who, 300, seed)) for who in (patients, alone)]
    by_patient, by_question = hits / SIMULATIONS
    assert 0.92 <= by_patient <= 0.98
    assert by_question < 0.85
