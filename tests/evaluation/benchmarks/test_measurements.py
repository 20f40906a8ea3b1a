import csv

import numpy as np
import pytest

from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord, as_record
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.evaluation.benchmarks.measurements import in_words, measure, r_peaks


def beats(
    rate: float, pr: float = 0.16, qrs: float = 0.1, qt: float = 0.38, axis: float = 60.0, seconds: float = 10.0
) -> ECGRecord:
    """A made-up ECG of waves whose places are known, at 500 Hz."""
    time = np.arange(round(seconds * 500)) / 500
    angles = {"I": 0, "II": 60, "III": 120, "aVR": -150, "aVL": -30, "aVF": 90}
    array = np.zeros((12, len(time)))

    def bump(center: float, width: float) -> np.ndarray:
        inside = np.abs(time - center) < width / 2
        return inside * (1 + np.cos(2 * np.pi * (time - center) / width)) / 2

    for start in np.arange(0.5, seconds - 0.6, 60 / rate):
        p, r = bump(start - pr + 0.05, 0.1), bump(start + qrs / 2, qrs)
        t = bump(start + qt - 0.09, 0.18)
        for row, lead in enumerate(STANDARD_LEADS):
            height = np.cos(np.radians(angles.get(lead, axis) - axis))
            array[row] += 0.15 * p + 1.2 * height * r + 0.3 * t
    return ECGRecord(array.astype(np.float32), 500.0, tuple(STANDARD_LEADS))


@pytest.mark.parametrize("rate", [45, 72, 110, 150])
@pytest.mark.parametrize("axis", [-60, 0, 60, 100])
def test_a_made_up_ecg(rate, axis):
    found = measure(beats(rate, axis=axis, qt=0.3, pr=0.14))
    assert found.rate == pytest.approx(rate, abs=1)
    assert found.regular
    assert found.axis == pytest.approx(axis, abs=6)
    assert found.qrs == pytest.approx(100, abs=30)
    if rate < 120:  # else the P wave may meet the T wave
        assert found.pr == pytest.approx(140, abs=30)
        assert found.qt == pytest.approx(300, abs=45)
        assert found.qtc == pytest.approx(found.qt * (rate / 60) ** 0.5, abs=1)


def test_longer_waves_measure_longer():
    short, long = measure(beats(60, pr=0.14)), measure(beats(60, pr=0.26, qrs=0.16, qt=0.46))
    assert long.pr - short.pr > 70
    assert long.qrs - short.qrs > 30
    assert long.qt - short.qt > 50


@pytest.mark.parametrize("rate", [100.0, 250.0, 1000.0])
def test_at_other_rates(rate):
    record = beats(72)
    step = 500 / rate
    places = np.arange(0, record.array.shape[1] - 1, step)
    array = np.stack([np.interp(places, np.arange(record.array.shape[1]), row) for row in record.array])
    found = measure(ECGRecord(array.astype(np.float32), rate, record.lead_names))
    assert found.rate == pytest.approx(72, abs=1)
    assert found.axis == pytest.approx(60, abs=6)


@pytest.mark.parametrize("kind", ["zeros", "noise", "one spike", "short"])
def test_what_has_no_beats(kind):
    array = np.zeros((12, 500 if kind == "short" else 5000), np.float32)
    if kind == "noise":
        array = np.random.default_rng(0).standard_normal(array.shape).astype(np.float32)
    if kind == "one spike":
        array[:, 2500] = 1
    found = measure(ECGRecord(array, 500.0, tuple(STANDARD_LEADS)))
    assert found.rate is None
    assert in_words(found) == "no beats can be told apart."


def test_simulated_records_have_the_rate_that_their_chat_says():
    for index in range(6):
        row = make_record(index, 0, sampling_rate=250)
        record = as_record(row["ecg"])
        rates = [message["content"] for message in row["messages"] if message["content"].rstrip(" bpm.").isdecimal()]
        found = measure(record)
        assert found.rate is not None
        for rate in rates:
            assert found.rate == pytest.approx(float(rate.rstrip(" bpm.")), abs=3)


def test_real_records(shared):
    folder = shared / "data" / "ptbxl"
    with (folder / "records.csv").open(newline="") as file:
        about = {int(row["ecg_id"]): row for row in csv.DictReader(file)}
    archive = np.load(folder / "raw100.npz")
    rhythms: dict[str, list[float]] = {"SBRAD": [], "STACH": [], "SR": []}
    axes: dict[str, list[float]] = {"LAD": [], "RAD": []}
    wide: dict[str, list[float]] = {"CLBBB": [], "CRBBB": [], "NORM": []}
    for number, array in zip(archive["ecg_id"][:300].tolist(), archive["ecg"][:300], strict=True):
        row = about[number]
        named = {
            **dict.fromkeys(row["rhythm"].split(), rhythms),
            **dict.fromkeys(row["subclass"].split(), wide),
            row["heart_axis"]: axes,
        }
        wanted = [name for name, groups in named.items() if name in groups]
        if not any(name in wanted and len(named[name][name]) < 8 for name in wanted):
            continue
        found = measure(as_record(array, 100, unit="uV"))
        for name in wanted:
            value = {id(rhythms): found.rate, id(axes): found.axis, id(wide): found.qrs}[id(named[name])]
            if value is not None:
                named[name][name].append(value)
    assert max(rhythms["SBRAD"]) < 62
    assert min(rhythms["STACH"]) > 95
    assert 55 < np.median(rhythms["SR"]) < 95
    assert np.median(axes["LAD"]) < 0 < 80 < np.median(axes["RAD"])
    blocks = [*wide["CLBBB"], *wide["CRBBB"]]
    assert np.median(blocks) > np.median(wide["NORM"]) + 25


def test_r_peaks_stand_on_the_peaks():
    record = beats(60)
    peaks = r_peaks(record)
    assert np.abs(peaks - (0.5 + 0.05 + np.arange(len(peaks))) * 500).max() <= 15


def test_in_words():
    text = in_words(measure(beats(72)))
    assert text.startswith("heart rate 72 beats per minute, RR intervals regular; axis ")
    assert "QRS duration" in text
    assert text.endswith("ST levels of at least 0.1 mV: none.")
