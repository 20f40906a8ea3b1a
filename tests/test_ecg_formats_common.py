import numpy as np
import pytest

from elm_ecg.ecg_formats_common import in_millivolts, select_signals, stated, to_number


def test_stated_leaves_out_what_is_missing_at_any_depth():
    filters = {"high_pass": "0.05 Hz", "notch": "", "low_pass": None}
    facts = stated(age=0, sex="", date=None, statements=["a", "", []], filters=filters, left_out={"x": {}}, quiet=False)
    assert facts == {"age": 0, "statements": ["a"], "filters": {"high_pass": "0.05 Hz"}, "quiet": False}
    assert stated(sex="", filters={"notch": ""}) == {}


def test_signals_in_volts_at_the_rate_of_the_standard_leads():
    names, units = ["resp", "II", "V1", "pleth", "II fast"], ["Ohm", "mV", "uV", "NU", "mV"]
    rows, left_out = select_signals(names, units, [25, 500, 500, 125, 1000])
    assert rows == [1, 2]  # the fastest is of no standard lead
    assert left_out == {"resp": "unit 'Ohm'", "pleth": "unit 'NU'", "II fast": "rate 1000 Hz"}
    with pytest.raises(ValueError, match=r"holds no signal in volts, but {'resp'"):
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
