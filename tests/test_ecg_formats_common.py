from functools import partial

import numpy as np
import pytest

from elm_ecg.ecg_formats_common import (
    Given,
    agreed_lead_names,
    canonical_lead_names,
    in_millivolts,
    listed,
    select_signals,
    stated,
    to_number,
)
from elm_ecg.ecg_utils import as_record


def test_stated_leaves_out_what_is_missing_at_any_depth():
    filters = {"high_pass": "0.05 Hz", "notch": "", "low_pass": None}
    facts = stated(age=0, sex="", date=None, statements=["a", "", []], filters=filters, left_out={"x": {}}, quiet=False)
    assert facts == {"age": 0, "statements": ["a"], "filters": {"high_pass": "0.05 Hz"}, "quiet": False}
    assert stated(sex="", filters={"notch": ""}) == {}


def test_signals_in_volts_at_the_rate_of_the_standard_leads():
    names, units = ["resp", "II", "V1", "pleth", "II fast"], ["Ohm", "mV", "uV", "NU", "mV"]
    chosen = select_signals(names, units, [25, 500, 500, 125, 1000])
    assert chosen.rows == [1, 2]  # the fastest is of no standard lead
    assert (chosen.lead_names, chosen.units) == (["II", "V1"], ["mV", "uV"])
    assert chosen.left_out == {"resp": "unit 'Ohm'", "pleth": "unit 'NU'", "II fast": "rate 1000 Hz"}
    with pytest.raises(
        ValueError, match=r"holds no signal in volts, but resp \(unit 'Ohm'\). If these are .*--unit uV"
    ):
        select_signals(names[:1], units[:1], [25])


@pytest.mark.parametrize(
    ("unit", "scale"), [("mV", 1), ("UV", 1e-3), ("µV", 1e-3), ("μV", 1e-3), ("nV", 1e-6), ("V", 1e3)]
)
def test_units(unit, scale):
    values = in_millivolts(np.array([1, -2]), unit)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.array([1, -2]) * scale, rtol=1e-6)


def test_numbers_are_finite():
    assert [to_number(text) for text in ("1e3", "nan", "inf", "", "a")] == [1000, None, None, None, None]


def test_the_caller_s_unit_is_that_of_signals_without_one():
    names, rates = ["I", "II", "resp"], [500] * 3
    chosen = select_signals(names, ["", " ", "Ohm"], rates, Given(unit="uV"))
    assert (chosen.rows, chosen.units, chosen.left_out) == ([0, 1], ["uV", "uV"], {"resp": "unit 'Ohm'"})
    assert select_signals(names, ["adu"] * 3, rates, Given(unit="uV")).rows == [0, 1, 2]  # none is in volts
    assert select_signals(names, ["mV", "", "Ohm"], rates, Given(unit="uV")).units == ["mV", "uV"]
    assert select_signals(names, ["uV", "uV", "Ohm"], rates, Given(unit="\u00b5V")).units == ["uV", "uV"]
    with pytest.raises(ValueError, match=r"states its unit, 'uV', and 'mV' is given too: leave unit out"):
        select_signals(names, ["uV", "uV", "Ohm"], rates, Given(unit="mV"))


def test_the_caller_s_names_are_of_all_signals_or_of_those_that_are_read():
    names, units, rates = ["I-Ref", "II-Ref", "EMG"], ["mV", "mV", "mV"], [500, 500, 2000]
    assert select_signals(names, units, rates).lead_names == ["EMG"]  # the fastest, as no name is standard
    for given in (["I", "II", "EMG"], ["Lead I", "ii", "chin"]):
        chosen = select_signals(names, units, rates, Given(lead_names=given))
        assert (chosen.lead_names, chosen.left_out) == (["I", "II"], {"EMG": "rate 2000 Hz"})
    rates = [500, 500, 25]
    assert select_signals(names, units, rates, Given(lead_names=["V1", "V2"])).lead_names == ["V1", "V2"]
    with pytest.raises(ValueError, match="states its lead_names, I, II, and II, I is given too"):
        select_signals(["I", "II"], units[:2], rates[:2], Given(lead_names=["II", "I"]))


def test_agreed_lead_names():
    assert agreed_lead_names(None, None) is None
    assert agreed_lead_names(["i", "V1-Ref"], None) == ("I", "V1-Ref")
    assert agreed_lead_names(["i", "V1-Ref"], ["I", "V1"]) == ("I", "V1")
    for given in (["V1", "I"], ["I"]):
        with pytest.raises(ValueError, match="leave lead_names out"):
            agreed_lead_names(["I", "V1-Ref"], given)


def test_many_names_make_a_short_message():
    names = [f"lead {number}" for number in range(100_000)]
    assert listed(names) == f"{', '.join(names[:12])} ... (100,000 in all)"
    assert len(listed(["a" * 10**6] * 2)) < 300
    for check in (canonical_lead_names, partial(as_record, np.zeros((1, 5)), 500)):
        with pytest.raises(ValueError, match=r"^.{0,400}$"):
            check(names)
    with pytest.raises(ValueError, match=r"^.{0,400}$"):
        canonical_lead_names([*names, "I", "I"], others=True)
