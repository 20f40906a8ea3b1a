from pathlib import Path

import numpy as np
import pytest
from ecg_files import COUNTS, LEADS

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_utils import read_ecg


class TestCSV:
    def read(self, text: str | bytes, path: Path) -> dict:
        (path / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_file(path / "a.csv")

    @pytest.mark.parametrize("delimiter", [",", ";", "\t", ", "])
    @pytest.mark.parametrize("quote", ["", '"', "'"])
    @pytest.mark.parametrize("end", ["\n", "\r\n"])
    def test_a_row_of_lead_names(self, delimiter, quote, end, tmp_path):
        rows = [[f"{quote}{name}{quote}" for name in ("I", "avr")], ["0.5", "-1e-1"], ["nan", "2"]]
        record = self.read(end.join(delimiter.join(row) for row in rows), tmp_path)
        np.testing.assert_array_equal(record["array"], [[0.5, np.nan], [-0.1, 2]])
        assert (record["lead_names"], record["sampling_rate"], record["unit"]) == (["I", "avr"], None, None)

    def test_no_names(self, tmp_path):
        rows = "\n".join(",".join(map(str, row)) for row in COUNTS.T / 1000)
        record = self.read(rows, tmp_path)
        np.testing.assert_array_equal(record["array"], COUNTS / 1000)
        assert record["lead_names"] is None
        assert read_ecg(tmp_path / "a.csv", 250).lead_names == tuple(LEADS)

    @pytest.mark.parametrize(("unit", "factor"), [("mV", 1), ("uV", 1e-3), ("µV", 1e-3), ("V", 1e3)])
    @pytest.mark.parametrize("form", ["I ({})", "I [{}]", '"I ( {} )"'])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
    def test_unit_in_the_header(self, unit, factor, form, encoding, tmp_path):
        text = f"{form.format(unit)},Resp (Ohm),II [mV]\n5,7,1\n6,8,2\n"
        record = self.read(text.encode(encoding), tmp_path)
        np.testing.assert_allclose(record["array"], [[5 * factor, 6 * factor], [1, 2]], rtol=1e-6)
        assert (record["unit"], record["lead_names"]) == ("mV", ["I", "II"])
        assert record["metadata"]["left_out"] == {"Resp": "unit 'Ohm'"}

    def test_comments(self, tmp_path):
        record = self.read("# Sampling rate: 500 Hz\n\n# unit = uV\n# Patient 7\nI,II\n5,6\n7,8\n", tmp_path)
        np.testing.assert_allclose(record["array"], [[0.005, 0.007], [0.006, 0.008]], rtol=1e-6)
        assert (record["sampling_rate"], record["unit"]) == (500, "mV")
        assert record["metadata"]["comments"] == ["Sampling rate: 500 Hz", "unit = uV", "Patient 7"]

    def test_whole_numbers_are_counts(self, tmp_path):
        self.read("I,II\n5,6\n-7,8\n", tmp_path)
        with pytest.raises(ValueError, match="digital counts say nothing about the amplitude"):
            read_ecg(tmp_path / "a.csv", 500)
        np.testing.assert_allclose(read_ecg(tmp_path / "a.csv", 500, unit="uV").array[0], [0.005, -0.007])

    @pytest.mark.parametrize(
        ("header", "unit", "rate", "digits"),
        [
            ("time", 1, 500, 3),
            ("Time (s)", 1, 360, 3),
            ("time [ms]", 1e-3, 360, 0),
            ("t", 1, 128.2, 6),
            ("time_ms", 1e-3, 250, 1),
            ("seconds", 1, 1000, 4),
        ],
    )
    def test_rate_of_the_times(self, header, unit, rate, digits, tmp_path):
        rows = [f"{3 + n / rate / unit:.{digits}f},{n / 10}" for n in range(1000)]
        record = self.read("\n".join([f"{header},V1", *rows]), tmp_path)
        assert record["sampling_rate"] == pytest.approx(rate, rel=1e-6)
        assert record["lead_names"] == ["V1"]
        assert record["array"].shape == (1, 1000)
        with pytest.raises(ValueError, match="its times are not even: steps of"):
            self.read("\n".join([f"{header},V1", *rows[:500], *rows[501:]]), tmp_path)

    def test_columns_that_only_count(self, tmp_path):
        for name in ("", "sample", "'sample #'", "Index", "Unnamed: 0"):
            record = self.read(f"{name},I,II\n0,0.5,1\n1,0.6,1\n", tmp_path)
            assert record["lead_names"] == ["I", "II"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("time,I\n0,0.1\n2,0.2\n4,0.3\n", r"its times make 0\.5 Hz; head the column 'time \(s\)' or 'time \(ms\)'"),
            ("time (min),I\n0,0.1\n2,0.2\n", "its times are in 'min'; expected s or ms"),
            ("time,I\n1,0.1\n1,0.1\n", "its times do not increase"),
            ("I,II\n0.1,0.2\n", "1 rows of numbers have 2; expected two rows at least"),
            ("time,I\n0,0.1\nnan,0.1\n", "its times do not increase"),
            ("time\n0.1\n0.2\n", "holds no column of a lead, but time"),
            ("I,II\n0.1,0.2\n0.3\n", "rows of numbers with a decimal point: the number of columns changed"),
            ("I;II\n0,1;0,2\n", "rows of numbers with a decimal point: could not convert string '0,1'"),
            ("I,II,III\n0.1,0.2\n0.1,0.2\n", "first row has 3 columns, 2 rows of numbers have 2"),
            ("Resp (Ohm)\n0.1\n0.2\n", "no signal in volts, but {'Resp': \"unit 'Ohm'\"}"),
        ],
    )
    def test_wrong_tables(self, text, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            self.read(text, tmp_path)
