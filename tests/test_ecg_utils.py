import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.signal import butter, filtfilt, iirnotch, resample_poly, sosfiltfilt

from elm_ecg.ecg_utils import (
    MAX_GAP_SECONDS,
    MAX_LIMB_LEAD_ERROR,
    REFERENCE_LEADS,
    STANDARD_LEADS,
    ECGRecord,
    as_record,
    canonical_lead_name,
    cut_windows,
    filter_ecg,
    lead_quality,
    limb_lead_error,
    read_ecg,
    resample,
    select_leads,
    window_starts,
)


@pytest.fixture(scope="module")
def ptbxl(shared: Path) -> dict[int, np.ndarray]:
    """The first PTB-XL records at 100 and 500 Hz, int16 [40, 12, samples] in microvolts."""
    arrays = {rate: np.load(shared / f"data/ptbxl/raw{rate}.npz") for rate in (100, 500)}
    assert (arrays[100]["ecg_id"][:40] == arrays[500]["ecg_id"][:40]).all()
    return {rate: archive["ecg"][:40] for rate, archive in arrays.items()}


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestLeadNames:
    @pytest.mark.parametrize("lead", STANDARD_LEADS)
    def test_any_case_and_the_word_lead(self, lead):
        for name in (lead, lead.lower(), lead.upper(), f"Lead {lead}", f" lead {lead.lower()} "):
            assert canonical_lead_name(name) == lead

    @pytest.mark.parametrize("name", ["MLII", "-aVR", "V7", "V4R", "IV", "", "lead", "vx", 1])
    def test_unknown(self, name):
        with pytest.raises(ValueError, match=f"Unknown lead {name!r}; expected one of I, II"):
            canonical_lead_name(name)

    def test_orders(self):
        assert len(STANDARD_LEADS) == 12
        assert sorted(REFERENCE_LEADS) == sorted(STANDARD_LEADS)
        assert REFERENCE_LEADS[3:5] == ("aVL", "aVR")


class TestAsRecord:
    def test_every_form_gives_the_same_record(self, tmp_path):
        array = noise(12, 50)
        np.save(tmp_path / "a.npy", array)
        np.savez(tmp_path / "a.npz", ecg=array, sampling_rate=500, lead_names=STANDARD_LEADS, unit="mV")
        record = as_record(array, 500)
        forms = [
            as_record(array.tolist(), 500),
            as_record(torch.from_numpy(array), 500),
            as_record(torch.from_numpy(array).double().requires_grad_(), np.int64(500)),
            as_record({"array": array, "sampling_rate": 500, "lead_names": None}),
            as_record({"array": array.tolist(), "unit": "mV"}, 500, [name.lower() for name in STANDARD_LEADS]),
            as_record({"array": array, "sampling_rate": 500}, 500.0, STANDARD_LEADS, "mV"),
            as_record(record),
            as_record(record, 500, STANDARD_LEADS, "mV"),
            as_record(tmp_path / "a.npz"),
            as_record(str(tmp_path / "a.npz"), 500),
            as_record(tmp_path / "a.npy", 500),
        ]
        for form in (record, *forms):
            np.testing.assert_array_equal(form.array, array)
            assert form.array.dtype == np.float32
            assert (form.sampling_rate, form.lead_names) == (500, STANDARD_LEADS)
            assert form.metadata.keys() <= {"notices", "format"}

    def test_bfloat16_tensor(self):
        tensor = torch.ones(12, 3, dtype=torch.bfloat16) / 2
        np.testing.assert_array_equal(as_record(tensor, 500).array, np.full((12, 3), 0.5))

    def test_float32_millivolts_are_not_copied_and_never_written_to(self):
        array = noise(12, 500)
        assert as_record(array, 500).array is array
        array[3, 7] = np.nan
        assert not np.isnan(as_record(array, 500).array).any()
        assert np.isnan(array[3, 7])

    def test_metadata_travels(self):
        record = as_record({"array": noise(12, 5), "metadata": {"age": 60}}, 500)
        assert select_leads(as_record(record), ["V1"]).metadata == {"age": 60, "notices": ()}

    def test_record_of_another_copy_of_the_module(self):
        other = type("ECGRecord", (), {})()
        vars(other).update(array=noise(1, 5), sampling_rate=500.0, lead_names=("II",), metadata={})
        assert as_record(other).lead_names == ("II",)

    @pytest.mark.parametrize(
        ("unit", "factor"), [("mV", 1), ("uV", 1e3), ("\u00b5V", 1e3), ("\u03bcV", 1e3), ("V", 1e-3)]
    )
    def test_units(self, unit, factor):
        array = noise(12, 50)
        np.testing.assert_allclose(as_record(array * factor, 500, unit=unit).array, array, rtol=1e-6)

    def test_real_counts_are_exact_millivolts(self, ptbxl):
        counts = ptbxl[500][0]
        np.testing.assert_array_equal(as_record(counts, 500, unit="uV").array, (counts / 1000).astype(np.float32))
        with pytest.raises(
            ValueError,
            match=r'holds integers \(int16\) without a unit.*give unit="uV" \(in commands with that option: --unit uV\)',
        ):
            as_record(counts, 500)

    @pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "500", True, [500], 1 + 1j])
    def test_bad_sampling_rate(self, value):
        with pytest.raises(ValueError, match=re.escape(f"sampling_rate is {value!r}; expected a positive number")):
            as_record(noise(12, 5), value)

    def test_missing_sampling_rate(self):
        with pytest.raises(
            ValueError,
            match=r"has no sampling rate: give sampling_rate in hertz \(in commands with that option: --sampling_rate\)",
        ):
            as_record(noise(12, 5))

    @pytest.mark.parametrize(
        ("ecg", "message"),
        [
            (noise(5), r"shape \[5\]; expected \[leads, samples\]"),
            (noise(2, 12, 5), r"shape \[2, 12, 5\]; expected \[leads, samples\]"),
            (3.0, r"shape \[\]; expected"),
            (noise(500, 12), r"shape \[500, 12\], which looks like \[samples, leads\]; transpose"),
            (noise(12, 0), r"is empty: its shape is \[12, 0\]"),
            (noise(0, 12), r"is empty"),
            (
                noise(3, 50),
                r"3 leads without names, and only 12 have a standard order: give lead_names \(in commands with that option: --lead_names\)",
            ),
            (noise(12, 5) + 1j, "is of complex64; expected real numbers"),
            (np.full((12, 5), "x"), "is of <U1; expected real numbers"),
            (np.ones((12, 5), bool), "is of bool; expected real numbers"),
            (np.full((12, 5), None), "is of object; expected real numbers"),
            (None, r"\(NoneType\) is of object; expected real numbers"),
            ([[1.0, 2.0], [1.0]], "not of one length"),
            ({"sampling_rate": 500}, r"is a dict of \['sampling_rate'\]; expected 'array'"),
            ({"array": noise(12, 5), "leads": ["I"]}, r"dict of \['array', 'leads'\]; expected"),
            (np.full((12, 5), np.inf), "Lead I holds infinite values"),
            (np.full((12, 5), 1e300), "Lead I holds infinite values"),
        ],
    )
    def test_bad_array(self, ecg, message):
        with pytest.raises(ValueError, match=message):
            as_record(ecg, 500)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["I", "II"], "has 3 leads but 2 lead names: I, II"),
            (["VX", "V7", "resp"], "has no standard lead, but VX, V7, resp; expected some of I, II, III"),
            (["I", "II", "ii"], "Lead II is named more than once"),
            (["II", "MLII", "ii"], "Lead II is named more than once"),
            ("III", "lead_names is the string 'III'; give a list"),
            ([], "lead_names is empty"),
            (["I", "II", "III", "V1", "V2"], r"looks like \[samples, leads\]"),
        ],
    )
    def test_bad_lead_names(self, names, message):
        with pytest.raises(ValueError, match=message):
            as_record(noise(3, 5), 500, names)

    def test_the_units_of_files(self):
        """One table for arrays and files: nanovolts, which EDF files have, are a unit of arrays too."""
        array = 1e6 * noise(12, 5)
        np.testing.assert_allclose(as_record(array, 500, unit="nV").array, noise(12, 5), rtol=1e-6)

    def test_texts_of_other_types(self):
        for unit in (["uV"], 5, np.array(["uV", "mV"])):
            with pytest.raises(ValueError, match="Unknown unit"):
                as_record(noise(12, 5), 500, unit=unit)
        for names in (5, np.float64(1)):
            with pytest.raises(ValueError, match="give a list of names"):
                as_record(noise(12, 5), 500, names)

    @pytest.mark.parametrize("unit", ["kV", "MV", "", "microvolt"])
    def test_bad_unit(self, unit):
        with pytest.raises(ValueError, match=f"Unknown unit '{unit}'; expected one of mV, uV"):
            as_record(noise(12, 5), 500, unit=unit)

    @pytest.mark.parametrize(
        ("name", "own", "argument"),
        [("sampling_rate", 500, 250), ("lead_names", STANDARD_LEADS, REFERENCE_LEADS), ("unit", "uV", "mV")],
    )
    def test_contradiction(self, name, own, argument):
        ecg = {"array": noise(12, 5), "sampling_rate": 500, name: own}
        with pytest.raises(
            ValueError, match=rf"states its {name}, .*, and .* is given too: leave {name} out \(for a file: --{name}\)"
        ):
            as_record(ecg, **{name: argument})

    def test_record_is_in_millivolts(self):
        with pytest.raises(ValueError, match="states its unit, 'mV', and 'uV' is given too"):
            as_record(as_record(noise(12, 5), 500), unit="uV")


class TestOtherLeads:
    def test_are_left_out_with_a_notice(self):
        """Of every record anew."""
        array = noise(5, 50)
        array[0], array[3] = np.nan, np.inf  # nobody asks what was in them
        for names in (["vx", "aVF", "ii", "V4R", "V1"], ["vx", "AVF", "Lead II", "V4R", "v1"]):
            record = as_record(array, 500, names)
            assert record.lead_names == ("aVF", "II", "V1")
            np.testing.assert_array_equal(record.array, array[[1, 2, 4]])
            assert record.metadata["notices"] == ("Left out, as no standard lead has that name: vx, V4R.",)
            assert as_record(record).metadata == record.metadata

    def test_may_share_a_name(self):
        assert as_record(noise(3, 50), 500, ["resp", "I", "resp"]).lead_names == ("I",)

    def test_file_that_names_them_and_call_agree(self):
        ecg = {"array": noise(2, 50), "sampling_rate": 500, "lead_names": ["i", "VX"]}
        assert as_record(ecg, lead_names=["I", "VX"]).lead_names == ("I",)
        with pytest.raises(ValueError, match="leave lead_names out"):
            as_record(ecg, lead_names=["II", "VX"])
        assert as_record(ecg, lead_names=["I", "V1"]).lead_names == ("I", "V1")  # VX was none of the standard leads


class TestGaps:
    @pytest.mark.parametrize("rate", [100, 250, 500, 1000])
    def test_longest_gap_filled(self, rate):
        longest = round(MAX_GAP_SECONDS * rate)
        ramp = np.tile(np.arange(rate, dtype=np.float32) / rate, (12, 1))
        gappy = ramp.copy()
        gappy[2, 10 : 10 + longest] = np.nan
        gappy[2, 70] = np.nan
        np.testing.assert_allclose(as_record(gappy, rate).array, ramp, atol=1e-6)
        gappy[2, 10 + longest] = np.nan
        seconds = f"{(longest + 1) / rate:.3g}"
        with pytest.raises(
            ValueError, match=f"Lead III has a gap \\(NaN\\) of {seconds} s; only gaps of at most 0.04 s"
        ):
            as_record(gappy, rate)

    def test_ends_hold_the_nearest_sample(self):
        array = noise(12, 100)
        gappy = array.copy()
        gappy[0, :3] = gappy[0, -2:] = np.nan
        filled = as_record(gappy, 500).array
        assert (filled[0, :3] == array[0, 3]).all()
        assert (filled[0, -2:] == array[0, -3]).all()
        np.testing.assert_array_equal(filled[1:], array[1:])

    def test_long_gaps_are_filled_only_where_they_are_asked_for(self):
        array = noise(2, 1000)
        array[0, 100:200] = array[1, 150:300] = array[1, 600:700] = array[0, 800] = np.nan
        with pytest.raises(ValueError, match=r"gap \(NaN\) of 0\.2 s.*elm data build --window"):
            as_record(array, 500, ["I", "II"])
        record = as_record(array, 500, ["I", "II"], long_gaps=True)
        assert record.metadata["gaps"] == [(0.2, 0.6), (1.2, 1.4)]
        assert np.isfinite(record.array).all()

    def test_lead_of_nothing(self):
        array = noise(12, 5)
        array[7] = np.nan
        with pytest.raises(ValueError, match="Lead V2 is NaN throughout"):
            as_record(array, 500)

    def test_microvolts_are_left_where_they_are_asked_for(self):
        counts = np.array([[0, 40, -70], [3, 5, 9]], np.int16)
        record = as_record(counts, 500, ["I", "V1"], "uV", microvolts=True)
        assert record.array is counts
        for ecg, unit in ((counts, "mV"), (counts.astype(np.int32), "uV"), (counts / 1000, "mV")):
            other = as_record(ecg, 500, ["I", "V1"], unit, microvolts=True)
            np.testing.assert_array_equal(other.array, as_record(ecg, 500, ["I", "V1"], unit).array)
            assert other.array.dtype == np.float32

    def test_constant_records_are_kept(self):
        for value in (0.0, -0.3):
            assert (as_record(np.full((12, 5), value), 500).array == np.float32(value)).all()


class TestSelectLeads:
    def test_limb_leads_of_real_records(self, ptbxl):
        """The derived leads are what the machines stored, to the rounding of a microvolt."""
        for counts in ptbxl[500]:
            record = as_record(counts, 500, unit="uV")
            without = select_leads(record, ("V1", "II", "I"))
            derived = select_leads(without, ("aVF", "aVL", "aVR", "III", "V1"))
            expected = select_leads(record, ("aVF", "aVL", "aVR", "III", "V1"))
            np.testing.assert_allclose(derived.array, expected.array, atol=2.1e-3)
            assert derived.lead_names == expected.lead_names

    @given(hnp.arrays(np.float32, (2, 7), elements=st.floats(-5, 5, width=32)))
    def test_einthoven_and_goldberger(self, limb):
        i, ii, iii, avr, avl, avf = select_leads(as_record(limb, 500, ["I", "II"]), STANDARD_LEADS[:6]).array
        np.testing.assert_allclose(i + iii, ii, atol=1e-5)
        np.testing.assert_allclose(avr + avl + avf, 0, atol=1e-5)
        np.testing.assert_allclose(avf, (ii + iii) / 2, atol=1e-5)
        np.testing.assert_allclose(avl, (i - iii) / 2, atol=1e-5)

    @given(st.permutations(STANDARD_LEADS), st.permutations(STANDARD_LEADS))
    def test_order_by_name(self, given_order, wanted):
        values = {name: float(index) for index, name in enumerate(STANDARD_LEADS)}
        record = as_record([[values[name]] for name in given_order], 500, given_order)
        selected = select_leads(record, wanted)
        assert selected.lead_names == tuple(wanted)
        assert selected.array[:, 0].tolist() == [values[name] for name in wanted]

    def test_recorded_leads_are_not_derived(self):
        record = as_record(noise(12, 5), 500)
        assert select_leads(record, STANDARD_LEADS) is record
        np.testing.assert_array_equal(select_leads(record, ["avf"]).array[0], record.array[5])

    def test_missing(self):
        record = as_record(noise(2, 5), 500, ["I", "V1"])
        with pytest.raises(ValueError, match=r"has no lead II, aVF, V2: it has I, V1\. .* from I and II"):
            select_leads(record, ["I", "II", "aVF", "V1", "V2"])
        with pytest.raises(ValueError, match="Lead I is named more than once"):
            select_leads(record, ["I", "i"])

    def test_missing_may_be_allowed(self):
        array = noise(3, 5)
        record = select_leads(as_record(array, 500, ["V1", "II", "I"]), ["I", "aVF", "V2", "V1"], allow_missing=True)
        assert record.lead_names == ("I", "aVF", "V1")
        assert record.metadata["notices"] == ("Derived from I and II: aVF.", "Missing: V2.")
        np.testing.assert_allclose(record.array, [array[2], array[1] - array[2] / 2, array[0]], atol=1e-6)
        with pytest.raises(ValueError, match="has no lead III, V5: it has I, V1"):
            select_leads(as_record(array[:2], 500, ["I", "V1"]), ["III", "V5"], allow_missing=True)


def swapped(record: ECGRecord, one: str, other: str) -> ECGRecord:
    """The record with two names exchanged."""
    names = {one: other, other: one}
    return replace(record, lead_names=tuple(names.get(name, name) for name in record.lead_names))


class TestLimbLeads:
    @pytest.mark.parametrize("rate", [100, 500])
    def test_real_records(self, rate, ptbxl):
        """A microvolt of rounding; what names of other leads make is far above the threshold."""
        for counts in ptbxl[rate]:
            record = as_record(counts, rate, unit="uV")
            assert limb_lead_error(record) < 0.001
            for pair in (("aVR", "aVL"), ("aVL", "aVF"), ("I", "II"), ("II", "III")):
                assert limb_lead_error(swapped(record, *pair)) > MAX_LIMB_LEAD_ERROR, pair

    def test_other_sources(self, shared):
        for name, key, rate in (("challenge2021_40", "ecg", 500), ("cpsc2018/cpsc2018_10", None, 500)):
            archive = np.load(shared / f"data/other_12lead/{name}.npz")
            ecgs = archive[key] if key else [archive[name] for name in archive.files]
            assert max(limb_lead_error(as_record(ecg, rate, unit="uV")) for ecg in ecgs) < 0.002

    def test_size(self):
        """The largest deviation of one lead, without its offset."""
        array = noise(2, 1000)
        record = select_leads(as_record(array, 500, ["I", "II"]), STANDARD_LEADS[:6])
        assert limb_lead_error(record) < 1e-6
        record.array[3] += np.tile([0.3, -0.3], 500).astype(np.float32) + 5
        record.array[4] += np.tile([0.1, -0.1], 500).astype(np.float32)
        assert limb_lead_error(record) == pytest.approx(0.3, rel=1e-3)

    @pytest.mark.parametrize(
        "names", [["I", "II", "V1"], ["II", "III", "aVF"], ["I", "III", "aVL"], ["V1", "V2", "V3"]]
    )
    def test_nothing_to_compare(self, names):
        assert limb_lead_error(as_record(noise(3, 50), 500, names)) == 0

    def test_files_are_checked(self, tmp_path):
        limb = select_leads(as_record(noise(2, 50), 500, ["I", "II"]), STANDARD_LEADS[:6]).array
        np.savez(tmp_path / "a.npz", array=np.concatenate([limb, noise(6, 50)]), sampling_rate=100)
        for lead_names in (None, STANDARD_LEADS):
            assert read_ecg(tmp_path / "a.npz", lead_names=lead_names).metadata["notices"] == ()
        microvolts = (1000 * np.concatenate([limb, noise(6, 50)])).astype(np.int16)
        np.savez(tmp_path / "b.npz", array=microvolts, sampling_rate=100, unit="uV")
        assert read_ecg(tmp_path / "b.npz", microvolts=True).metadata["notices"] == ()
        for name in ("a", "b"):
            read = read_ecg(tmp_path / f"{name}.npz", lead_names=REFERENCE_LEADS, microvolts=True)
            (notice,) = read.metadata["notices"]
            assert notice.startswith("III, aVR, aVL or aVF differ by more than 0.05 mV from what I and II give")


class TestLeadQuality:
    """A lead of beats with one fault at a time, just below and above what the rules say."""

    RATE = 250

    def quality(self, fault: Callable[[np.ndarray], np.ndarray]) -> list[str]:
        seconds = np.arange(10 * self.RATE) / self.RATE
        beats = 1.5 * np.exp(-(((seconds % 0.8 - 0.4) / 0.02) ** 2)) + 0.01 * np.sin(2 * np.pi * 7 * seconds)
        record = as_record(np.stack([fault(beats), beats]), self.RATE, ["V1", "I"])
        quality = lead_quality(record)
        assert "I" not in quality
        return quality.get("V1", [])

    def test_flat(self):
        def hold(samples: int) -> Callable[[np.ndarray], np.ndarray]:
            return lambda lead: np.concatenate([lead[:550], np.full(samples, lead[550]), lead[550 + samples :]])

        assert self.quality(hold(self.RATE - 1)) == []
        assert self.quality(hold(self.RATE)) == ["flat"]
        assert self.quality(lambda lead: lead * 0.06) == ["flat"]
        assert self.quality(lambda lead: lead * 0.07) == []
        assert self.quality(np.zeros_like) == ["flat"]

    def test_saturated(self):
        """Tips of beats that are cut off; a plateau elsewhere, or near the baseline, is none."""
        assert self.quality(lambda lead: lead.clip(max=1.4)) == []
        assert self.quality(lambda lead: lead.clip(max=1.1)) == ["saturated"]
        assert self.quality(lambda lead: -lead.clip(max=1.1)) == ["saturated"]
        assert self.quality(lambda lead: lead.clip(max=0.9)) == []

    @pytest.mark.parametrize(("frequency", "noisy"), [(10, False), (35, True), (50, True)])
    def test_noise(self, frequency, noisy):
        hum = np.sin(2 * np.pi * frequency * np.arange(10 * self.RATE) / self.RATE)
        assert self.quality(lambda lead: lead + 0.02 * hum) == []  # 0.014 mV root mean square
        assert self.quality(lambda lead: lead + 0.025 * hum) == ["noisy"] * noisy
        burst = hum * (np.arange(len(hum)) % self.RATE < 0.6 * self.RATE)
        assert self.quality(lambda lead: lead + 0.1 * burst) == []  # quiet for more than a quarter of the time
        beats = np.arange(10 * self.RATE) % (self.RATE * 60 // 200) == 20  # at 200 a minute
        wave = np.array([0, 0.7, 1.5, 0.7, -0.4, 0])
        assert self.quality(lambda lead: np.convolve(beats, wave, "same")) == []

    def test_drift(self):
        slope = np.linspace(0, 1, 10 * self.RATE)
        assert self.quality(lambda lead: lead + 1.05 * slope) == []
        assert self.quality(lambda lead: lead + 1.2 * slope) == ["noisy"]

    def test_large(self):
        """Of a gain that is ten times too high; an offset alone is none."""
        assert self.quality(lambda lead: 6 * lead) == []
        assert self.quality(lambda lead: 7 * lead) == ["large"]
        assert self.quality(lambda lead: lead - 20) == []

    def test_real_records(self, ptbxl, shared):
        """Leads that were off in the files themselves, and few others."""
        flags = [lead_quality(as_record(counts, 500, unit="uV")) for counts in ptbxl[500]]
        assert {flag for quality in flags for own in quality.values() for flag in own} == {"noisy"}
        assert sum(len(quality) for quality in flags) < 0.1 * 12 * len(flags)
        archive = np.load(shared / "data/other_12lead/challenge2021_40.npz")
        records = {
            name: as_record(ecg, 500, unit="uV") for name, ecg in zip(archive["record"], archive["ecg"], strict=True)
        }
        flat = {
            name: [lead for lead, own in lead_quality(record).items() if "flat" in own]
            for name, record in records.items()
        }
        assert {name: leads for name, leads in flat.items() if leads} == {
            "JS20004": ["V2", "V4", "V6"],
            "JS20008": ["V2", "V4", "V6"],
        }

    @pytest.mark.parametrize(("rate", "length"), [(500, 1), (30, 40), (0.5, 3)])
    def test_records_shorter_or_slower_than_the_rules(self, rate, length):
        assert (
            lead_quality(as_record(np.arange(2 * length).reshape(2, length) % 3 * 0.5, rate, ["I", "V1"])) is not None
        )


RATES = [(500, 250), (100, 250), (1000, 250), (400, 250), (360, 250), (257, 250), (977, 250), (250, 500), (128, 250)]


class TestResample:
    @pytest.mark.parametrize(("source", "target"), RATES)
    @pytest.mark.parametrize("length", [1, 2, 37, 1000, 5000])
    def test_scipy_parity(self, source, target, length, ptbxl):
        signal = (ptbxl[500][length % 40, :, :length] / 1000).astype(np.float32)
        offset = signal[:, :1].astype(np.float64)
        divisor = math.gcd(source, target)
        up, down = target // divisor, source // divisor
        expected = resample_poly(signal - offset, up, down, axis=1, window=("kaiser", 5.0), padtype="edge") + offset
        result = resample(signal, source, target)
        assert result.dtype == np.float32
        assert result.shape == (12, math.ceil(length * up / down)) == expected.shape
        np.testing.assert_allclose(result, expected, atol=5e-6)

    @pytest.mark.parametrize(("source", "target"), RATES)
    def test_sines(self, source, target):
        """Below both Nyquist rates a sine keeps amplitude and phase; above the target's it is gone."""
        nyquist = min(source, target) / 2
        seconds = 4
        before, after = np.arange(seconds * source) / source, np.arange(seconds * target) / target
        inner = slice(target, -target)
        for frequency in (1.0, 0.8 * nyquist):
            result = resample(np.sin(2 * np.pi * frequency * before)[None], source, target)[0, : len(after)]
            np.testing.assert_allclose(result[inner], np.sin(2 * np.pi * frequency * after)[inner], atol=5e-3)
        if source > 2.5 * target:
            result = resample(np.sin(2 * np.pi * 1.2 * nyquist * before)[None], source, target)[0]
            assert np.abs(result[inner]).max() < 5e-3

    @given(st.sampled_from(RATES), st.floats(-300, 300, width=32), st.integers(1, 200))
    def test_constant_stays_constant(self, rates, value, length):
        assert (resample(np.full((1, length), value, np.float32), *rates) == np.float32(value)).all()

    @given(st.sampled_from(RATES), st.floats(-3, 3), st.integers(0, 100))
    def test_linear(self, rates, factor, seed):
        a, b = noise(2, 3, 150, seed=seed)
        combined = resample(a + np.float32(factor) * b, *rates)
        np.testing.assert_allclose(combined, resample(a, *rates) + factor * resample(b, *rates), atol=2e-5)

    def test_equal_rates(self):
        array = noise(12, 50)
        assert resample(array, 250, 250.0) is array
        assert resample(array, 250.01, 250) is array

    @pytest.mark.parametrize(
        ("source", "length"), [(499.98, 2500), (1e6, 2), (976.5625, 1280), (0.25, 5_000_000), (250.25, 4996)]
    )
    def test_odd_rates(self, source, length):
        result = resample(np.zeros((1, 5000), np.float32), source, 250)
        assert abs(result.shape[1] - length) <= 0.0005 * length + 1

    def test_rates_are_checked(self):
        for rates in ((0, 250), (500, math.nan)):
            with pytest.raises(ValueError, match="sampling_rate is"):
                resample(noise(1, 5), *rates)

    def test_real_records_of_both_rates_agree(self, ptbxl):
        """PTB-XL's own 100 Hz files have less of the fast waves, stand about 1 ms early and ring in the last 0.2 s."""
        for fast, slow in zip(ptbxl[500], ptbxl[100], strict=True):
            a, b = resample(fast / 1000, 500, 250), resample(slow / 1000, 100, 250)
            assert a.shape == b.shape == (12, 2500)
            # shifted by -3 to 3 samples of 4 ms
            correlations = [
                np.corrcoef(a[:, 5:2445].ravel(), b[:, 5 + k : 2445 + k].ravel())[0, 1] for k in range(-3, 4)
            ]
            assert correlations[3] > 0.95
            assert np.argmax(correlations) in (2, 3)


class TestFilter:
    @pytest.mark.parametrize("rate", [100, 500])
    @pytest.mark.parametrize(("bandpass", "notch"), [((0.5, 40), None), (None, 30), ((0.67, 45), 20), ((5, 15), None)])
    def test_scipy_parity(self, rate, bandpass, notch, ptbxl):
        """Forward and backward over the lead and its mirror images."""
        lead = (ptbxl[rate][1] / 1000).astype(np.float32)
        length = lead.shape[1]
        expected = np.pad(lead.astype(np.float64) - lead[:, :1], ((0, 0), (length, length)), mode="symmetric")
        if bandpass is not None:
            sections = butter(2, bandpass, "bandpass", fs=rate, output="sos")
            expected = sosfiltfilt(sections, expected, padlen=0)
        if notch is not None:
            expected = filtfilt(*iirnotch(notch, 30, fs=rate), expected, padlen=0)
        expected = expected[:, length:-length] + (lead[:, :1] if bandpass is None else 0)
        filtered = filter_ecg(lead, rate, bandpass, notch)
        assert filtered.dtype == np.float32
        np.testing.assert_allclose(filtered, expected, atol=1e-5)

    def test_sines(self):
        seconds = np.arange(0.5, 5000) / 500  # cosines, which their mirror images continue
        for frequency, gain in ((1.0, 0.94), (0.5, 0.5), (0.05, 0.0), (10.0, 1.0), (40.0, 0.5), (120.0, 0.0)):
            wave = np.cos(2 * np.pi * frequency * seconds).astype(np.float32)[None]
            np.testing.assert_allclose(filter_ecg(wave, 500, (0.5, 40)), gain * wave, atol=1e-2)
        hum = np.cos(2 * np.pi * 50 * seconds).astype(np.float32)[None]
        wave = np.cos(2 * np.pi * 8 * seconds).astype(np.float32)[None]
        np.testing.assert_allclose(filter_ecg(wave + hum, 500, notch=50), wave, atol=1e-3)

    def test_no_direction(self, ptbxl):
        lead = (ptbxl[100][0] / 1000).astype(np.float32)
        backward = filter_ecg(lead[:, ::-1], 100, (0.5, 40), 25)[:, ::-1]
        np.testing.assert_allclose(filter_ecg(lead, 100, (0.5, 40), 25), backward, atol=1e-5)

    @given(st.floats(-90, 90, width=32), st.integers(1, 50))
    def test_constant(self, value, length):
        constant = np.full((2, length), value, np.float32)
        assert (filter_ecg(constant, 500, notch=50) == np.float32(value)).all()
        assert not filter_ecg(constant, 500, (0.5, 40)).any()

    def test_nothing_to_filter(self):
        array = noise(2, 50)
        assert filter_ecg(array, 500) is array

    @pytest.mark.parametrize("bandpass", [(0, 40), (40, 0.5), (5, 5), (0.5, 125), (0.5,), (1, 2, 3), (math.nan, 40)])
    def test_impossible_bands(self, bandpass):
        with pytest.raises(
            ValueError, match=r"bandpass is \[.*\]; expected two frequencies low < high between 0 and 125 Hz"
        ):
            filter_ecg(noise(1, 50), 250, bandpass)

    @pytest.mark.parametrize("notch", [0, -50, 50, 60, math.nan])
    def test_impossible_notch(self, notch):
        with pytest.raises(
            ValueError, match=f"notch is {notch}; expected a frequency between 0 and 50 Hz.* leave it out"
        ):
            filter_ecg(noise(1, 50), 100, notch=notch)


class TestWindows:
    @pytest.mark.parametrize(
        ("length", "seconds", "stride", "starts"),
        [
            (1000, 4, None, [0, 4]),
            (1200, 4, None, [0, 4, 8]),
            (1199, 4, None, [0, 4]),
            (1000, 4, 2, [0, 2, 4, 6]),
            (1000, 2, 4, [0, 4, 8]),
            (1000, 10, None, [0]),
            (250, 4, 1, [0]),
            (100, 0.3, 0.1, [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ],
    )
    def test_starts(self, length, seconds, stride, starts):
        record = as_record({"array": noise(2, length), "metadata": {"age": 60}}, 100, ["I", "V1"])
        windows = cut_windows(record, seconds, stride)
        expected = [{"age": 60, "notices": (), "start_second": start} for start in starts]
        assert [window.metadata for window in windows] == expected
        for window, start in zip(windows, starts, strict=True):
            first = round(100 * start)
            np.testing.assert_array_equal(window.array, record.array[:, first : first + round(100 * seconds)])
            assert np.shares_memory(window.array, record.array)
            assert (window.sampling_rate, window.lead_names) == (100, ("I", "V1"))

    def test_gaps(self):
        array = noise(2, 1000)
        array[0, 100:110] = array[1, 499:510] = np.nan
        record = as_record(array, 100, ["I", "V1"], long_gaps=True)
        windows = cut_windows(record, 1)
        assert [window.metadata["start_second"] for window in windows] == [0, 2, 3, 6, 7, 8, 9]
        assert len(window_starts(record, 1)) == 10
        assert all("gaps" not in window.metadata for window in windows)
        assert cut_windows(record, 9) == []

    @pytest.mark.parametrize("seconds", [0, -1, 0.001, math.nan, math.inf])
    def test_impossible_lengths(self, seconds):
        record = as_record(noise(1, 50), 100, ["I"])
        with pytest.raises(ValueError, match=f"seconds is {seconds}; expected a positive number of seconds, .* 0.01 s"):
            cut_windows(record, seconds)
        with pytest.raises(ValueError, match=f"stride is {seconds};"):
            cut_windows(record, 0.1, seconds)


class TestReadECG:
    def test_npz_says_everything(self, tmp_path):
        counts = np.arange(24, dtype=np.int16).reshape(2, 12)
        np.savez_compressed(
            tmp_path / "a.NPZ.npz", array=counts, sampling_rate=100.0, lead_names=["II", "v1"], unit="uV"
        )
        record = read_ecg(tmp_path / "a.NPZ.npz")
        assert isinstance(record, ECGRecord)
        assert (record.sampling_rate, record.lead_names) == (100, ("II", "V1"))
        np.testing.assert_allclose(record.array, counts / 1000)

    def test_npy_needs_the_arguments(self, tmp_path):
        np.save(tmp_path / "a.npy", noise(1, 12))
        with pytest.raises(ValueError, match=r"a\.npy: The ECG has no sampling rate"):
            read_ecg(tmp_path / "a.npy")
        assert read_ecg(tmp_path / "a.npy", 500, ["V5"]).lead_names == ("V5",)

    def test_contradicted_file(self, tmp_path):
        np.savez(tmp_path / "a.npz", array=noise(12, 5), sampling_rate=100)
        with pytest.raises(ValueError, match=r"a\.npz: The ECG states its sampling_rate, 100, and 500 is given"):
            read_ecg(tmp_path / "a.npz", 500)

    @pytest.mark.parametrize("name", ["a.npy", "a.npz"])
    def test_damaged(self, name, tmp_path):
        save = np.save if name.endswith("npy") else np.savez_compressed
        save(tmp_path / name, noise(12, 500))
        whole = (tmp_path / name).read_bytes()
        for content in (b"", b"no array", whole[:-200], whole[:60]):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=name):
                read_ecg(tmp_path / name, 500)

    def test_no_file(self, tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            read_ecg(tmp_path / "missing.npy", 500)
        assert str(error.value) == f"There is no file {tmp_path / 'missing.npy'}."


def test_microvolts_taken_for_millivolts_are_an_error():
    counts = np.full((12, 50), 1234.0)
    with pytest.raises(ValueError, match=r'reaches 1234 mV.*unit="uV"'):
        as_record(counts, 250)
    assert as_record(counts, 250, unit="uV").array.max() == pytest.approx(1.234)
