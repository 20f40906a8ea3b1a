import re

import numpy as np

from elm_ecg.training.evaluation.conditions import ASKED, BASELINE, CONDITIONS, ECG


def test_each_condition_is_told_apart():
    """By name, label, colour and words; each is known by its name."""
    assert all(name == condition.name for name, condition in CONDITIONS.items())
    for field in ("label", "colour", "phrase", "description"):
        assert len({getattr(condition, field) for condition in CONDITIONS.values()}) == len(CONDITIONS)
    assert all(re.fullmatch("#[0-9A-F]{6}", condition.colour) for condition in CONDITIONS.values())
    assert ASKED[0] == ECG
    assert set(CONDITIONS) - set(ASKED) == {BASELINE}


def test_each_condition_but_one_takes_the_ecg_away():
    array = np.ones((2, 500), np.float32)
    for condition in CONDITIONS.values():
        if condition.change is not None:
            changed = condition.change(array, np.random.default_rng(0))
            assert changed.shape == array.shape
            assert changed.dtype == array.dtype
            assert not np.array_equal(changed, array)
            again = [condition.change(array, np.random.default_rng(seed)) for seed in (0, 1)]
            assert np.array_equal(changed, again[0])
            assert np.array_equal(*again) != condition.random
    assert 0.9 < CONDITIONS["noise"].change(array, np.random.default_rng(0)).std() < 1.1  # mV
    kept = [c.name for c in CONDITIONS.values() if c.asked and c.shows_ecg and not c.swapped and c.change is None]
    assert kept == [ECG]
