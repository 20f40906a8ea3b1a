import numpy as np
import pytest

from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord, read_ecg
from elm_ecg.training.data.synthetic import sample_findings, simulate_ecg
from elm_ecg.training.evaluation.beats import in_qrs, level_between_beats, r_peaks


def simulated(heart_rate: float, seed: int = 0, rate: int = 250, **findings) -> ECGRecord:
    rng = np.random.default_rng(seed)
    found = sample_findings(rng, heart_rate=heart_rate, rhythm="sinus rhythm", wander=0.01, **findings)
    return ECGRecord(simulate_ecg(found, rng, sampling_rate=rate), rate, STANDARD_LEADS)


@pytest.mark.parametrize("heart_rate", [45, 75, 140])
@pytest.mark.parametrize("rate", [100, 125, 500])
def test_complexes_come_as_often_as_the_heart_beats(heart_rate, rate):
    for seed in range(3):
        peaks = r_peaks(simulated(heart_rate, seed, rate))
        assert 60 / np.median(np.diff(peaks) / rate) == pytest.approx(heart_rate, rel=0.08)
        assert len(peaks) == pytest.approx(heart_rate / 6, abs=1.5)


@pytest.mark.parametrize("heart_rate", [100, 125])
def test_wide_complexes_of_a_fast_rhythm_are_no_noise(heart_rate):
    for seed in range(8):
        assert len(r_peaks(simulated(heart_rate, seed, wide_qrs=True))) == pytest.approx(heart_rate / 6, abs=1.5)


@pytest.mark.parametrize("leads", [2, 3, 12])
def test_noise_has_no_beats(leads):
    for seed in range(8):
        array = np.random.default_rng(seed).normal(0, 0.1, (leads, 2500)).astype(np.float32)
        assert len(r_peaks(ECGRecord(array, 250, STANDARD_LEADS[:leads]))) == 0


def test_the_level_is_not_lifted_by_the_st_segment():
    """With an ST elevation of 1 mV and a lead that stands 2 mV above zero, at a rate at which nothing overlaps."""
    for seed in range(5):
        record = simulated(60, seed, st_elevation="anterior")
        record.array[:] += 2.0
        level = level_between_beats(record)
        assert np.abs(level - 2.0).max() < 0.25


def test_records_without_beats():
    flat = ECGRecord(np.full((2, 500), 0.3, np.float32), 100, ("I", "II"))
    assert len(r_peaks(flat)) == 0
    assert not in_qrs(flat).any()
    np.testing.assert_allclose(level_between_beats(flat), [0.3, 0.3])
    one = ECGRecord(np.zeros((1, 1), np.float32), 100, ("I",))
    assert level_between_beats(one).tolist() == [0.0]


def test_complexes_of_real_recordings(shared):
    """As many as at the rate that a person at rest has; they are a small share of the time."""
    files = sorted((shared / "data/ptbxl/wfdb_examples/records100").rglob("*.hea"))
    assert files
    for record in map(read_ecg, files):
        assert 6 <= len(r_peaks(record)) <= 25
        assert 0.08 < in_qrs(record).mean() < 0.45
