from pathlib import Path

import numpy as np
import pytest
from ecg_files import COUNTS, LEADS

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_formats_csv import read_csv
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

    def test_more_cells_than_any_recording(self):
        """An empty cell is a byte of the file and many of memory."""
        content = b"I,II,V1\n" + b"1,2,3\n" * 2 + b",,\n" * 9_000_000
        with pytest.raises(ValueError, match=r"it holds 27,000,009 cells; at most 25,165,824 are read. Cut the record"):
            read_csv(content)

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
            ("I,II\n0.1,0.2\n0.3\n", "rows of numbers: the number of columns changed"),
            ("I;II\n0,1;0,2\n", "1 rows of numbers have 2; expected two rows at least"),
            ("I;II\n1.234,5;0,2\n1.234,5;0,2\n", "rows of numbers: could not convert string '1.234.5'"),
            ("I,II\n0.1,0.2\n0.1,x\n", "rows of numbers: could not convert string 'x'"),
            ("a,b\n0.1\n0.2\n", "first row has 2 columns, 2 rows of numbers have 1"),
            ("I,II,III\n0.1,0.2\n0.1,0.2\n", "first row has 3 columns, 2 rows of numbers have 2"),
            ("Resp (Ohm)\n0.1\n0.2\n", "no signal in volts, but Resp \\(unit 'Ohm'\\)"),
        ],
    )
    def test_wrong_tables(self, text, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            self.read(text, tmp_path)

    def test_units_in_a_row_of_their_own(self, tmp_path):
        """As WFDB's rdsamp writes them, quoted, with - for a sample that is none."""
        text = "'Elapsed time','I','II','Resp'\n'seconds','mV','uV','Ohm'\n0.000,0.5,-,1\n0.002,0.6,7,1\n"
        record = self.read(text, tmp_path)
        np.testing.assert_allclose(record["array"], [[0.5, 0.6], [np.nan, 0.007]], rtol=1e-6)
        assert (record["sampling_rate"], record["lead_names"], record["unit"]) == (500, ["I", "II"], "mV")
        assert record["metadata"]["left_out"] == {"Resp": "unit 'Ohm'"}

    @pytest.mark.parametrize("delimiter", [",", ";", "\t"])
    @pytest.mark.parametrize("missing", ["", "NaN", "NA", "null", '""', "-"])
    def test_cells_without_a_value(self, delimiter, missing, tmp_path):
        rows = [["I", "II", "V1"], [missing, "1.5", "2"], ["3", missing, missing], ["4", "5", missing], ["6", "7", "8"]]
        record = self.read("\n".join(delimiter.join(row) for row in rows), tmp_path)
        nan = np.nan
        np.testing.assert_array_equal(record["array"], [[nan, 3, 4, 6], [1.5, nan, 5, 7], [2, nan, nan, 8]])

    def test_rows_that_end_with_a_delimiter(self, tmp_path):
        for header in ("I,II,", "I,II"):
            record = self.read(f"{header}\n0.5,1,\n0.6,1,\n", tmp_path)
            np.testing.assert_array_equal(record["array"], [[0.5, 0.6], [1, 1]])
            assert record["lead_names"] == ["I", "II"]

    @pytest.mark.parametrize("delimiter", [";", "\t"])
    def test_decimal_commas(self, delimiter, tmp_path):
        rows = [["t", "I", "II"], ["0,00", "0,5", "-1,25e-1"], ["0,01", "-0,5", "2"]]
        record = self.read("\n".join(delimiter.join(row) for row in rows), tmp_path)
        np.testing.assert_array_equal(record["array"], [[0.5, -0.5], [-0.125, 2]])
        assert record["sampling_rate"] == 100

    def test_blanks_between_cells(self, tmp_path):
        record = self.read("   I    II\n 0.5 -1.25\n-0.5     2\n", tmp_path)
        np.testing.assert_array_equal(record["array"], [[0.5, -0.5], [-1.25, 2]])
        assert record["lead_names"] == ["I", "II"]

    def test_utf_16_as_spreadsheets_write_text(self, tmp_path):
        record = self.read("I (\u00b5V)\tII (\u00b5V)\r\n5\t6\r\n7\t8\r\n".encode("utf-16"), tmp_path)
        np.testing.assert_allclose(record["array"], [[0.005, 0.007], [0.006, 0.008]], rtol=1e-6)

    @pytest.mark.parametrize("index", [True, False])
    def test_numbers_for_names(self, index, tmp_path):
        """As pandas writes an array: its header is no sample."""
        rows = [["", *map(str, range(12))], *([str(n), *map(str, row)] for n, row in enumerate(COUNTS.T / 1000))]
        record = self.read("\n".join(",".join(row[not index :]) for row in rows), tmp_path)
        np.testing.assert_array_equal(record["array"], COUNTS / 1000)
        assert record["lead_names"] is None

    @pytest.mark.parametrize(
        ("head", "values"),
        [
            ("Sample Rate,512 hertz\n\n\nLead,Lead I\nUnit,\u00b5V\n", "-12.5 250 30"),
            ("Sample Rate,512.000 hertz\nLead,Lead I\nUnit,microvolts\n", "-12.5 250 30"),
            ("Messrate,512 Hertz\nAbleitung,Ableitung I\nEinheit,Mikrovolt\n", "-12,5 250 30"),
            ('Messrate,"512,000 Hertz"\nAbleitung,Ableitung I\nEinheit,\u00b5V\n', "-12,5 250,0 30,0"),
            ("Fr\u00e9quence,512 Hz\nD\u00e9rivation,D\u00e9rivation I\nUnit\u00e9,microvolts\n", "-12,5 250 30"),
            ("Frecuencia,512 hercios\nDerivaci\u00f3n,Derivaci\u00f3n I\nUnidad,microvoltios\n", "-12,5 250 30"),
            ("Sample Rate;512 hertz\nLead;Lead I\nUnit;mV\n", "-0.0125 0.25 0.03"),
        ],
    )
    def test_a_watch(self, head, values, tmp_path):
        name = 'Name,Test Person\nDate of Birth,"Jan 15, 1990"\nRecorded Date,2024-01-05 09:15:00 +0100\nSymptoms,\n'
        record = self.read(name + head + "\n" + values.replace(" ", "\n") + "\n", tmp_path)
        assert (record["sampling_rate"], record["lead_names"]) == (512, ["I"])
        read = read_ecg(tmp_path / "a.csv")
        np.testing.assert_allclose(read.array, [[-0.0125, 0.25, 0.03]], rtol=1e-6)
        assert "Person" not in str(read.metadata)  # who it was, and born when, stays in the file
        assert "1990" not in str(read.metadata)

    def test_the_caller_s_unit_and_names(self, tmp_path):
        self.read("time (ms),a,b\n0,5,6\n4,-7,8\n", tmp_path)
        record = read_ecg(tmp_path / "a.csv", lead_names=["V1", "V2"], unit="uV")
        np.testing.assert_allclose(record.array, [[0.005, -0.007], [0.006, 0.008]], rtol=1e-6)
        assert record.lead_names == ("V1", "V2")
        (tmp_path / "a.csv").write_text("I (counts),II (counts)\n5,6\n7,8\n")
        np.testing.assert_allclose(read_ecg(tmp_path / "a.csv", 500, unit="uV").array[0], [0.005, 0.007], rtol=1e-6)

    def test_reported_tables(self, shared):
        folder = shared / "data/reported"
        rows = (
            (folder / "semicolon_decimal_comma.csv").read_text().replace(",", ".").split()[2:]
        )  # time (s) has a blank
        expected = np.array([row.split(";")[1:] for row in rows], float).T
        for name in ("semicolon_decimal_comma", "empty_cell", "physionet_rdsamp"):
            record = read_file(folder / f"{name}.csv")
            assert (record["sampling_rate"], record["lead_names"]) == (500, LEADS)
            gaps = np.isnan(record["array"])
            assert gaps.sum() == (2 if name == "empty_cell" else 0)
            rounding = 0.00051 if name == "physionet_rdsamp" else 1e-7
            np.testing.assert_allclose(record["array"][~gaps], expected[~gaps], rtol=0, atol=rounding)
            assert np.isfinite(read_ecg(folder / f"{name}.csv").array).all()
        assert read_file(folder / "physionet_rdsamp.csv")["unit"] == "mV"
        watch = read_ecg(folder / "apple_watch_en.csv")
        lines = (folder / "apple_watch_en.csv").read_text().split("\n")[13:]
        np.testing.assert_allclose(watch.array[0], np.array([float(line) for line in lines if line]) / 1000, rtol=1e-6)
        assert (watch.lead_names, watch.sampling_rate) == (("I",), 512)
