import json
import math
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from elm_ecg import feature_extraction_elm
from elm_ecg.ecg_utils import REFERENCE_LEADS, STANDARD_LEADS, as_record, filter_ecg, resample
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from helpers import run_isolated


@pytest.fixture(scope="module")
def counts(shared: Path) -> dict[int, np.ndarray]:
    """PTB-XL records at 100 and 500 Hz, int16 [8, 12, samples] in microvolts."""
    return {rate: np.load(shared / f"data/ptbxl/raw{rate}.npz")["ecg"][:8] for rate in (100, 500)}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small(**kwargs) -> ECGFeatureExtractor:
    return ECGFeatureExtractor(**{"sampling_rate": 100, "num_samples": 50} | kwargs)


ECGS = hnp.arrays(np.float32, st.tuples(st.just(12), st.integers(1, 60)), elements=st.floats(-20, 20, width=32))
NORMALIZATIONS = st.sampled_from(["none", "zscore", "minmax"])


class TestOutput:
    @pytest.mark.parametrize("rate", [100, 500])
    def test_real_records(self, rate, counts):
        values = ECGFeatureExtractor()(counts[rate], rate, unit="uV").ecg_values
        assert values.shape == (8, 12, 2500)
        assert values.dtype == np.float32
        np.testing.assert_allclose(values[3], resample(counts[rate][3] / 1000, rate, 250), atol=1e-6)

    def test_both_rates_of_a_record_agree(self, counts):
        """But for the last 0.2 s, where PTB-XL's own 100 Hz files ring."""
        fast, slow = (ECGFeatureExtractor()(counts[rate], rate, unit="uV").ecg_values for rate in (500, 100))
        for a, b in zip(fast, slow, strict=True):
            assert np.corrcoef(a[:, :2450].ravel(), b[:, :2450].ravel())[0, 1] > 0.98

    def test_tensors(self, counts):
        features = ECGFeatureExtractor()(counts[100][0], 100, unit="uV", return_tensors="pt")
        assert list(features) == ECGFeatureExtractor().model_input_names == ["ecg_values"]
        assert features.ecg_values.dtype == torch.float32
        assert features.ecg_values.shape == (1, 12, 2500)

    def test_forms_of_a_batch(self, tmp_path):
        array = noise(3, 12, 50)
        np.save(tmp_path / "a.npy", array[2])
        forms = [
            array,
            torch.from_numpy(array),
            array.tolist(),
            list(array),
            tuple(torch.from_numpy(array)),
            [[list(lead) for lead in ecg] for ecg in array],
            [as_record(array[0], 100), {"array": array[1], "sampling_rate": 100}, tmp_path / "a.npy"],
        ]
        for form in forms:
            np.testing.assert_array_equal(small()(form, 100).ecg_values, array)

    def test_forms_of_one_ecg(self, tmp_path):
        array = noise(12, 50)
        np.save(tmp_path / "a.npy", array)
        forms = [array, array.tolist(), list(array), tuple(torch.from_numpy(array)), {"array": array}]
        for form in [*forms, as_record(array, 100), tmp_path / "a.npy", str(tmp_path / "a.npy")]:
            np.testing.assert_array_equal(small()(form, 100).ecg_values, array[None])

    def test_mixed_rates_and_units(self, counts):
        fast, slow = counts[500][0], counts[100][1]
        ecgs = [
            {"array": fast / 1000, "sampling_rate": 500, "unit": "mV"},
            {"array": slow, "sampling_rate": 100, "unit": "uV"},
        ]
        values = ECGFeatureExtractor()(ecgs).ecg_values
        np.testing.assert_allclose(values[0], ECGFeatureExtractor()(fast, 500, unit="uV").ecg_values[0], atol=1e-6)
        np.testing.assert_allclose(values[1], ECGFeatureExtractor()(slow, 100, unit="uV").ecg_values[0], atol=1e-6)

    def test_input_is_left_alone(self):
        for normalization in ("none", "zscore", "minmax"):
            array = noise(12, 50)
            values = small(normalization=normalization)(array, 100).ecg_values
            values += 1
            np.testing.assert_array_equal(array, noise(12, 50))

    @given(ECGS, st.permutations(STANDARD_LEADS), NORMALIZATIONS)
    def test_lead_order_of_the_input_does_not_matter(self, array, order, normalization):
        extractor = small(num_samples=60, normalization=normalization)
        shuffled = array[[STANDARD_LEADS.index(name) for name in order]]
        np.testing.assert_array_equal(
            extractor(shuffled, 100, lead_names=order).ecg_values, extractor(array, 100).ecg_values
        )

    def test_other_leads(self):
        array = noise(12, 50)
        reference = small(lead_names=REFERENCE_LEADS)(array, 100).ecg_values[0]
        np.testing.assert_array_equal(reference[[3, 4]], array[[4, 3]])
        np.testing.assert_array_equal(small(lead_names=["v1", "II"])(array, 100).ecg_values[0], array[[6, 1]])
        derived = small(lead_names=["III"])(array[:2], 100, lead_names=["I", "II"]).ecg_values[0, 0]
        np.testing.assert_allclose(derived, array[1] - array[0], atol=1e-6)

    @given(ECGS, NORMALIZATIONS)
    def test_unit_does_not_matter(self, array, normalization):
        extractor = small(num_samples=60, sampling_rate=125, normalization=normalization)
        microvolts = np.rint(array * 1000).astype(np.int32)
        a = extractor(microvolts, 100, unit="uV", truncation="start").ecg_values
        b = extractor(microvolts / 1000, 100, truncation="start").ecg_values
        c = extractor(microvolts / 1e6, 100, unit="V", truncation="start").ecg_values
        np.testing.assert_allclose(a, b, atol=1e-4)
        np.testing.assert_allclose(a, c, atol=1e-2 if normalization == "zscore" else 1e-3)


class TestNormalization:
    def test_minmax_is_the_reference_s(self, shared):
        """Value by value the formula, and so exactly the reference's symbols."""
        ecgs = np.load(shared / "golden/ecg_byte_signals.npz")["ecg"]
        values = ECGFeatureExtractor(normalization="minmax")(ecgs, 250).ecg_values
        for ecg, value in zip(ecgs, values, strict=True):
            np.testing.assert_allclose(
                value, np.clip((ecg - ecg.min()) / (np.ptp(ecg.astype(np.float64)) + 1e-6), 0, 1), atol=1e-6
            )
        symbols = np.minimum(np.floor(values * 26), 25).astype(np.uint8) + ord("a")
        expected = json.loads((shared / "golden/ecg_byte_expected.json").read_text())["symbols_crc32"]
        assert [zlib.crc32(symbol.tobytes()) for symbol in symbols] == expected

    @given(ECGS)
    def test_minmax_range(self, array):
        values = small(sampling_rate=250, num_samples=150, normalization="minmax")(array, 100).ecg_values
        assert values.min() == 0
        assert values.max() <= 1

    def test_zscore_of_real_records(self, counts):
        values = ECGFeatureExtractor(normalization="zscore")(counts[500], 500, unit="uV").ecg_values
        np.testing.assert_allclose(values.mean(axis=(1, 2)), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(axis=(1, 2)), 1, atol=1e-4)

    @given(st.floats(-90, 90, width=32), st.sampled_from([100, 250, 360, 500]), NORMALIZATIONS)
    def test_constant_records(self, value, rate, normalization):
        """A flat line stays flat at every rate; nothing is blown up by the division by its range."""
        values = small(normalization=normalization)(np.full((12, rate // 2), value), rate).ecg_values
        assert (values == (np.float32(value) if normalization == "none" else 0)).all()

    def test_one_flat_lead(self):
        array = noise(12, 50)
        array[6] = 0
        for normalization in ("none", "zscore", "minmax"):
            values = small(normalization=normalization)(array, 100).ecg_values[0]
            assert np.ptp(values[6]) == 0
            assert np.isfinite(values).all()

    @pytest.mark.parametrize("value", [0, 1e-3])
    def test_of_all_leads_at_once(self, value):
        """The proportions of the leads are kept, and a microvolt is no wave: the small number in the formulas is 1e-6."""
        array = np.full((12, 50), value, np.float32)
        array[0, :25] = 2e-3
        array[6] = 4e-3
        values = array.astype(np.float64)
        scaled = {
            "zscore": (values - values.mean()) / (values.std() + 1e-6),
            "minmax": (values - values.min()) / (np.ptp(values) + 1e-6),
        }
        for normalization, expected in scaled.items():
            result = small(normalization=normalization)(array, 100).ecg_values[0]
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


class TestLength:
    @pytest.mark.parametrize("normalization", ["none", "zscore", "minmax"])
    def test_short_ecgs_are_padded_after_normalisation(self, normalization):
        array = noise(12, 30) + 5
        values = small(normalization=normalization)(array, 100).ecg_values[0]
        alone = small(normalization=normalization, num_samples=30)(array, 100).ecg_values[0]
        np.testing.assert_array_equal(values[:, :30], alone)
        assert (values[:, 30:] == 0).all()

    def test_long_ecgs(self):
        array = noise(12, 81)
        message = r"0\.81 s long \(81 samples at 100 Hz\), the model takes 0\.5 s \(50 samples\), 0\.31 s less: .*truncation=.*--start SECOND"
        with pytest.raises(ValueError, match=message):
            small()(array, 100)
        for truncation, start in {"start": 0, "center": 15, "end": 31}.items():
            expected = array[None, :, start : start + 50]
            np.testing.assert_array_equal(small(truncation=truncation)(array, 100).ecg_values, expected)
            np.testing.assert_array_equal(small()(array, 100, truncation=truncation).ecg_values, expected)
        with pytest.raises(ValueError, match=r"0\.31 s less"):
            small(truncation="center")(array, 100, truncation=False)

    def test_only_what_is_kept_is_normalised(self):
        array = noise(12, 80)
        array[0, 0] = 90
        kept = small(normalization="minmax", truncation="end")(array, 100).ecg_values
        np.testing.assert_array_equal(kept, small(normalization="minmax")(array[:, 30:], 100).ecg_values)

    @pytest.mark.parametrize(("rate", "length"), [(500, 5001), (360, 3601), (1000, 10003)])
    def test_less_than_a_sample_is_rounding(self, rate, length):
        assert ECGFeatureExtractor()(noise(12, length), rate).ecg_values.shape == (1, 12, 2500)

    @pytest.mark.parametrize(("rate", "length"), [(250, 2501), (500, 5002), (100, 1001), (1000, 10004)])
    def test_a_sample_is_too_long(self, rate, length):
        with pytest.raises(ValueError, match="the model takes 10 s"):
            ECGFeatureExtractor()(noise(12, length), rate)

    def test_a_rate_in_kilohertz_is_told_before_resampling(self):
        with pytest.raises(ValueError, match=r"The ECG is 1e\+04 s long"):
            ECGFeatureExtractor()(noise(12, 5000), 0.5)

    def test_holter_excerpts(self, shared):
        archive = np.load(shared / "data/other_12lead/cpsc2018/cpsc2018_10.npz")
        ecgs = [archive[name] for name in archive.files]
        assert max(ecg.shape[1] for ecg in ecgs) > 5001
        values = ECGFeatureExtractor(truncation="center")(ecgs, 500, unit="uV").ecg_values
        assert values.shape == (10, 12, 2500)


class TestFilters:
    def test_come_after_resampling_and_before_cutting(self, counts):
        """What is kept has no trace of where it was cut."""
        extractor = ECGFeatureExtractor(
            num_samples=500, bandpass=[0.5, 40], notch=50, truncation="end", normalization="zscore"
        )
        values = extractor(counts[500][0], 500, unit="uV").ecg_values[0]
        whole = filter_ecg(resample(counts[500][0] / 1000, 500, 250), 250, (0.5, 40), 50)[:, -500:]
        np.testing.assert_allclose(values, (whole - whole.mean()) / (whole.std() + 1e-6), atol=1e-5)

    def test_of_every_rate_alike(self, counts):
        extractor = ECGFeatureExtractor(bandpass=[0.5, 15])
        fast, slow = (extractor(counts[rate], rate, unit="uV").ecg_values for rate in (500, 100))
        for a, b in zip(fast, slow, strict=True):
            assert np.corrcoef(a[:, 500:2000].ravel(), b[:, 500:2000].ravel())[0, 1] > 0.997

    def test_none(self):
        array = noise(12, 50)
        np.testing.assert_array_equal(small()(array, 100).ecg_values[0], array)
        assert abs(small(bandpass=(1, 30))(array, 100).ecg_values[0] - array).max() > 0.1


class TestPrepare:
    """The one way from a record to what a model reads."""

    @pytest.mark.parametrize("normalization", ["none", "zscore", "minmax"])
    def test_is_what_the_call_gives_without_padding(self, normalization):
        extractor = small(normalization=normalization, missing_leads="zeros", bandpass=[1, 30])
        record = as_record(noise(2, 100), 250, ["V1", "I"])
        prepared = extractor.prepare(record)
        assert (prepared.lead_names, prepared.sampling_rate, prepared.array.shape) == (("I", "V1"), 100, (2, 40))
        values = extractor(record, padding=False).ecg_values[0]
        np.testing.assert_array_equal(prepared.array, values[[0, 6]])
        millivolts = small(missing_leads="zeros", bandpass=[1, 30]).prepare(record).array
        np.testing.assert_array_equal(extractor.prepare(record, normalize=False).array, millivolts)

    FILTERS = ({}, {"bandpass": [0.5, 40], "notch": 50}, {"bandpass": [2, 3]}, {"notch": 60})

    @pytest.mark.parametrize("filters", FILTERS)
    @pytest.mark.parametrize("rate", [125, 360])
    def test_cuts_after_filtering(self, rate, filters):
        """Wherever it begins, of minutes of wandering leads with hum: a part has no trace of where it was cut."""
        array = 0.1 * noise(2, 120 * rate).cumsum(axis=1) + np.sin(2 * np.pi * 50 / rate * np.arange(120 * rate))
        array -= array.mean()
        array *= np.float32(5 / abs(array).max())
        whole = filter_ecg(resample(array, rate, 250), 250, filters.get("bandpass"), filters.get("notch"))
        record = as_record(array, rate, ["I", "II"])
        extractor = ECGFeatureExtractor(num_samples=1000, lead_names=["I", "II"], truncation="center", **filters)
        for start, first in ((None, 14500), (0, 0), (0.1, 25), (40.3, 10075), (118, 29500)):
            prepared = extractor.prepare(record, start=start)
            np.testing.assert_allclose(prepared.array, whole[:, first : first + 1000], atol=2e-5)
            assert prepared.metadata["start_second"] == first / 250
            expected = replace(record, metadata={"start": start})
            np.testing.assert_array_equal(extractor(expected, padding=False).ecg_values[0], prepared.array)

    def test_zero_is_no_truncation(self):
        """0 equals False, so it is taken as False: a longer record is an error, not cut in silence."""
        with pytest.raises(ValueError, match="the model"):
            small().prepare(noise(12, 5000), 500, truncation=0)

    def test_only_what_matters_is_resampled(self, monkeypatch):
        """The memory that a record takes depends on the part of it that is read."""
        sizes = []

        def watched(array, *rates, **offset):
            sizes.append(array.shape[1])
            return resample(array, *rates, **offset)

        monkeypatch.setattr(feature_extraction_elm, "resample", watched)
        extractor = ECGFeatureExtractor(truncation="start", bandpass=[0.5, 40])
        extractor.prepare(np.zeros((12, 20_000), np.float32), 1)
        extractor.prepare(np.zeros((12, 500_000), np.float32), 500, start=500)
        assert sizes == [32, 17_040]

    def test_start(self):
        array = noise(12, 80)
        record = as_record({"array": array, "metadata": {"start": 0.2, "age": 60}}, 100)
        for prepared in (small().prepare(record), small(truncation="end").prepare(array, 100, start=0.2)):
            np.testing.assert_array_equal(prepared.array, array[:, 20:70])
        np.testing.assert_array_equal(small().prepare(record, start=0.5).array, array[:, 50:])
        again = small().prepare(small().prepare(record))
        np.testing.assert_array_equal(again.array, array[:, 20:70])  # what was begun once begins there
        assert again.metadata["age"] == 60
        for start in (-0.1, 0.8, math.nan):
            with pytest.raises(ValueError, match=rf"start is {start:g} s; .* of the ECG, which has 0\.8 s"):
                small().prepare(record, start=start)
        for start in ("2", True, [0.1], 1j):
            with pytest.raises(ValueError, match=r"^start is .*; expected a number of seconds, such as 2\.5"):
                small().prepare(record, start=start)
        np.testing.assert_array_equal(small().prepare(record, start=np.float32(0.5)).array, array[:, 50:])

    def test_notices(self):
        limb = small(lead_names=["I", "aVF", "V1"], missing_leads="zeros")
        record = as_record(noise(4, 80), 100, ["II", "I", "V5", "vx"])
        for _ in range(2):  # each time anew
            assert limb.prepare(record, start=0.5).metadata["notices"] == (
                "Left out, as no standard lead has that name: vx.",
                "Derived from I and II: aVF.",
                "Missing: V1.",
                "Not read: II, V5.",
                "Longer than the 0.5 s that the model reads: a part of it is cut off.",
                "Shorter than the 0.5 s that the model reads.",
            )
        for num_samples in (49, 50):
            assert small().prepare(noise(12, num_samples), 100).metadata["notices"] == ()
        hours = small().prepare(np.zeros((12, 86_400)), 1, start=40_000.25)
        assert hours.metadata["notices"] == ("Longer than the 0.5 s that the model reads: a part of it is cut off.",)
        assert hours.metadata["start_second"] == 40_000.25


class TestMissingLeads:
    """Some leads, and the others of the output are zeros."""

    SETS = {
        "one": (["II"], "II"),
        "two": (["I", "II"], "I II III aVR aVL aVF"),
        "three": (["V1", "I", "V5"], "I V1 V5"),
        "six": (["I", "II", "III", "aVR", "aVL", "aVF"], "I II III aVR aVL aVF"),
        "eight": (["I", "II", "V1", "V2", "V3", "V4", "V5", "V6"], " ".join(STANDARD_LEADS)),
    }

    @pytest.mark.parametrize("normalization", ["none", "zscore", "minmax"])
    @pytest.mark.parametrize("name", SETS)
    def test_any_subset(self, name, normalization):
        leads, expected = self.SETS[name]
        there = [lead in expected.split() for lead in STANDARD_LEADS]
        array = noise(len(leads), 40) + 3
        features = small(normalization=normalization, missing_leads="zeros")(array, 100, lead_names=leads)
        assert features.ecg_lead_mask.dtype == bool
        assert features.ecg_lead_mask.tolist() == [there]
        values = features.ecg_values[0]
        assert not values[~np.array(there)].any()
        alone = small(normalization=normalization, lead_names=expected.split())(array, 100, lead_names=leads)
        np.testing.assert_array_equal(values[there], alone.ecg_values[0])

    def test_batch(self):
        extractor = small(missing_leads="zeros")
        array = noise(12, 50)
        ecgs = [
            {"array": array, "sampling_rate": 100},
            {"array": array[6:7], "sampling_rate": 100, "lead_names": ["V1"]},
        ]
        features = extractor(ecgs, return_tensors="pt")
        assert list(features) == extractor.model_input_names == ["ecg_values", "ecg_lead_mask"]
        assert features.ecg_lead_mask.dtype == torch.bool
        assert features.ecg_lead_mask.sum(1).tolist() == [12, 1]
        np.testing.assert_array_equal(features.ecg_values[0], array)
        short = extractor([array[:, :30], array[:, :20]], 100, padding=False)
        assert [values.shape for values in short.ecg_values] == [(12, 30), (12, 20)]
        assert short.ecg_lead_mask.all()

    def test_recorded_zeros_are_there(self):
        """A lead that is flat is no missing one."""
        features = small(missing_leads="zeros")(np.zeros((12, 50)), 100)
        assert features.ecg_lead_mask.all()

    def test_none_is_there(self):
        with pytest.raises(ValueError, match="has no lead I, II: it has V1"):
            small(lead_names=["I", "II"], missing_leads="zeros")(noise(1, 50), 100, lead_names=["V1"])

    def test_other_leads_of_a_recording(self):
        """Fifteen of a PTB record, three of them Frank's."""
        names = [*STANDARD_LEADS, "vx", "vy", "vz"]
        array = noise(15, 50)
        np.testing.assert_array_equal(small()(array, 100, lead_names=names).ecg_values[0], array[:12])


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"sampling_rate": 0}, "sampling_rate is 0; expected a positive number"),
            ({"sampling_rate": math.inf}, "sampling_rate is inf"),
            ({"num_samples": 0}, "num_samples is 0; expected a whole number of at least 1"),
            ({"num_samples": 2500.0}, r"num_samples is 2500\.0; expected a whole number"),
            ({"lead_names": []}, "lead_names is empty"),
            ({"lead_names": ["I", "i"]}, "Lead I is named more than once"),
            ({"lead_names": ["I", "X"]}, "Unknown lead 'X'"),
            ({"lead_names": "II"}, "lead_names is the string 'II'"),
            (
                {"normalization": "min-max"},
                r"normalization is 'min-max'; expected one of \('none', 'zscore', 'minmax'\)",
            ),
            ({"normalization": None}, "normalization is None"),
            (
                {"bandpass": [0.5, 125]},
                r"bandpass is \[0\.5, 125\]; expected two frequencies low < high between 0 and 125 Hz",
            ),
            ({"notch": 60, "sampling_rate": 100}, "notch is 60; expected a frequency between 0 and 50 Hz"),
            ({"missing_leads": "nan"}, r"missing_leads is 'nan'; expected one of \('error', 'zeros'\)"),
            ({"truncation": True}, r"truncation is True; expected one of \(False, 'start', 'center', 'end'\)"),
        ],
    )
    def test_configuration(self, kwargs, message):
        with pytest.raises(ValueError, match=message):
            ECGFeatureExtractor(**kwargs)

    def test_misspelt_argument(self):
        with pytest.raises(TypeError, match="no argument normalisation"):
            ECGFeatureExtractor(normalisation="zscore")

    def test_misspelt_truncation_of_a_call(self):
        with pytest.raises(ValueError, match="truncation is 'left'"):
            small()(noise(12, 50), 100, truncation="left")

    @pytest.mark.parametrize("ecgs", [[], (), noise(0, 12, 50)])
    def test_no_ecg(self, ecgs):
        with pytest.raises(ValueError, match="There is no ECG; give at least one"):
            small()(ecgs, 100)

    @pytest.mark.parametrize(
        ("ecg", "message"),
        [
            (noise(50), r"shape \[50\]"),
            (noise(1, 2, 12, 50), r"shape \[1, 2, 12, 50\]"),
            (noise(50, 12), "looks like"),
            ([1.0, 2.0], r"ECG 0 of 2, counted from 0: The ECG has shape \[\]"),
            ([[], []], r"its shape is \[2, 0\]"),
            (None, "NoneType"),
            ([noise(12, 50), noise(3, 50)], "ECG 1 of 2, counted from 0: The ECG has 3 leads without names"),
            ([noise(12, 50), noise(12, 51)], r"ECG 1 of 2, counted from 0: The ECG is 0\.51 s long"),
        ],
    )
    def test_input(self, ecg, message):
        with pytest.raises(ValueError, match=message):
            small()(ecg, 100)

    def test_missing_lead(self):
        with pytest.raises(ValueError, match="has no lead II, III, aVR, aVL, aVF, V2, V3, V4, V5, V6: it has I, V1"):
            small()(noise(2, 50), 100, lead_names=["I", "V1"])

    def test_missing_sampling_rate(self):
        with pytest.raises(ValueError, match="has no sampling rate"):
            small()(noise(12, 50))


CONFIG = {
    "sampling_rate": 200.0,
    "num_samples": 400,
    "lead_names": list(REFERENCE_LEADS),
    "normalization": "zscore",
    "truncation": "center",
    "bandpass": [0.5, 40.0],
    "notch": 50.0,
    "missing_leads": "zeros",
}


class TestSaving:
    def test_round_trip(self, tmp_path):
        ECGFeatureExtractor(**CONFIG).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert config == CONFIG | {
            "feature_extractor_type": "ECGFeatureExtractor",
            "auto_map": {"AutoFeatureExtractor": "feature_extraction_elm.ECGFeatureExtractor"},
        }
        loaded = ECGFeatureExtractor.from_pretrained(tmp_path)
        assert {key: getattr(loaded, key) for key in CONFIG} == CONFIG
        loaded.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again/preprocessor_config.json").read_text()) == config
        assert ECGFeatureExtractor.from_pretrained(tmp_path, num_samples=7).num_samples == 7

    def test_own_class_of_a_script_names_no_code(self, tmp_path, monkeypatch):
        class Own(ECGFeatureExtractor):
            pass

        monkeypatch.setattr(Own, "__module__", "__main__")  # whose code transformers does not save
        Own(**CONFIG).save_pretrained(tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "preprocessor_config.json").read_text())

    def test_saved_before_there_were_filters(self, tmp_path):
        ECGFeatureExtractor(**CONFIG).save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        config = json.loads(path.read_text())
        path.write_text(
            json.dumps({key: config[key] for key in config.keys() - {"bandpass", "notch", "missing_leads"}})
        )
        loaded = ECGFeatureExtractor.from_pretrained(tmp_path)
        assert (loaded.bandpass, loaded.notch, loaded.missing_leads) == (None, None, "error")

    def test_fresh_process_without_the_project(self, tmp_path):
        extractor = ECGFeatureExtractor(**CONFIG)
        extractor.save_pretrained(tmp_path / "saved")
        ecg = noise(12, 1500)
        np.save(tmp_path / "ecg.npy", ecg)
        printed = run_isolated(
            "import numpy as np\n"
            "from transformers import AutoFeatureExtractor\n"
            "extractor = AutoFeatureExtractor.from_pretrained('saved', trust_remote_code=True)\n"
            "np.save('values.npy', extractor('ecg.npy', sampling_rate=500).ecg_values)\n"
            "print(type(extractor).__name__)\n",
            tmp_path,
        )
        assert printed.split() == ["ECGFeatureExtractor"]
        np.testing.assert_array_equal(np.load(tmp_path / "values.npy"), extractor(ecg, 500).ecg_values)

    @pytest.fixture
    def modules_cache(self, tmp_path, monkeypatch):
        """A cache of its own for modules of Hub repositories, whatever another test has imported from its cache."""

        def taken() -> dict:
            names = [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]
            return {name: sys.modules.pop(name) for name in names}

        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(tmp_path / "modules")
        others = taken()
        yield
        taken()
        sys.modules.update(others)

    @pytest.mark.usefixtures("modules_cache")
    def test_records_of_the_installed_module_reach_the_loaded_one(self, tmp_path):
        small().save_pretrained(tmp_path / "saved")
        name = "feature_extraction_elm.ECGFeatureExtractor"  # not by the Auto class, which may know the installed one
        loaded = get_class_from_dynamic_module(name, tmp_path / "saved").from_pretrained(tmp_path / "saved")
        assert type(loaded) is not ECGFeatureExtractor
        array = noise(12, 50)
        np.testing.assert_array_equal(loaded(as_record(array, 100)).ecg_values[0], array)
