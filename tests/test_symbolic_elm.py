import numpy as np
import pytest

from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.symbolic_elm import DISPENSABLE_LEADS, SymbolicECGs, signal_tokens
from helpers import tiny_ecg_byte


@pytest.fixture(scope="module")
def record():
    array = np.random.default_rng(0).normal(0, 0.3, (12, 500)).astype("float32")
    return ECGRecord(array, 250, STANDARD_LEADS)


@pytest.fixture(scope="module")
def symbols():
    """Their ids are far from those of ECG-Byte, and in another order."""
    ecg_byte = tiny_ecg_byte()
    names = signal_tokens(ecg_byte)
    return SymbolicECGs(ecg_byte, {name: 9000 - place for place, name in enumerate(names)}, ECGFeatureExtractor())


def test_ids_are_those_of_the_vocabulary(symbols):
    assert symbols.token_ids == [9000 - place for place in range(len(symbols.token_ids))]


def test_there_and_back(symbols, record):
    (tokens,) = symbols.encode([record])
    assert set(tokens) <= set(symbols.token_ids)
    low, high = float(record.array.min()), float(record.array.max())
    (decoded,) = symbols.decode([1, *tokens, 2], low, high, num_samples=500)
    assert decoded["array"].shape == (12, 500)
    assert np.abs(decoded["array"] - record.array).max() < (high - low) / 25


def test_smaller_records_say_their_rate(symbols, record):
    slower = [records[0] for records, _ in symbols.smaller([record], "downsample")]
    assert [one.sampling_rate for one in slower] == [125, 62.5, 31.25]
    assert [one.array.shape[1] for one in slower] == [250, 125, 63]
    assert list(symbols.smaller([record], "error")) == []


def test_leads_are_dropped_in_their_order(symbols, record):
    fewer = [records[0].lead_names for records, _ in symbols.smaller([record], "drop_leads")]
    assert [len(names) for names in fewer] == list(range(11, 0, -1))
    assert fewer[-1] == DISPENSABLE_LEADS[-1:]


def test_a_vocabulary_without_them():
    ecg_byte = tiny_ecg_byte()
    with pytest.raises(ValueError, match=r"lacks \d+ of \d+ ECG tokens, signal_"):
        SymbolicECGs(ecg_byte, {"a": 0}, ECGFeatureExtractor())
