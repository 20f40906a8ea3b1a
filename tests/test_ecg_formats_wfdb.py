import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import wfdb
from ecg_files import COUNTS, LEADS, mat_73_bytes, mat_bytes, write_wfdb
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.ecg_formats import read_file
from elm_ecg.ecg_formats_common import Given
from elm_ecg.ecg_formats_wfdb import signal_files
from elm_ecg.ecg_utils import read_ecg


class TestWFDB:
    def test_all_examples_of_ptbxl(self, shared):
        for rate in (100, 500):
            with np.load(shared / f"data/ptbxl/raw{rate}.npz") as archive:
                raw = dict(zip(archive["ecg_id"].tolist(), archive["ecg"], strict=True))
            headers = sorted((shared / f"data/ptbxl/wfdb_examples/records{rate}").rglob("*.hea"))
            assert len(headers) == 22
            for header in headers:
                record = read_file(header)
                np.testing.assert_array_equal(record["array"], (raw[int(header.stem[:5])] / 1000).astype(np.float32))
                assert (record["sampling_rate"], record["unit"]) == (rate, "mV")
                assert [name.lower() for name in record["lead_names"]] == [name.lower() for name in LEADS]

    @pytest.mark.parametrize("suffix", [".hea", ".dat", ".xyz", ""])
    def test_two_signal_files(self, suffix, shared):
        folder = shared / "data/other_12lead/ptb_s0010_re"
        record = read_file(folder / f"s0010_re{suffix}")
        counts = [
            np.fromfile(folder / f"s0010_re.{name}", "<i2").reshape(-1, n).T for name, n in (("dat", 12), ("xyz", 3))
        ]
        np.testing.assert_array_equal(record["array"], (np.concatenate(counts) / 2000).astype(np.float32))
        assert (record["sampling_rate"], record["lead_names"][2:4]) == (1000, ["iii", "avr"])
        assert record["lead_names"][12:] == ["vx", "vy", "vz"]
        facts = record["metadata"]
        assert (facts["age"], facts["sex"], facts["format"]) == (81, "female", "WFDB")
        assert "Smoker: no" in facts["comments"]
        assert read_ecg(folder / f"s0010_re{suffix}").lead_names == tuple(LEADS)

    @pytest.mark.parametrize("name", ["E07500", "JS20000"])
    def test_signals_in_matlab_files(self, name, shared):
        folder = shared / "data/other_12lead"
        with np.load(folder / "challenge2021_40.npz") as archive:
            counts = archive["ecg"][archive["record"].tolist().index(name)]
        for suffix in (".hea", ".mat"):
            record = read_file(folder / f"challenge2021_wfdb_mat/{name}{suffix}")
            np.testing.assert_array_equal(record["array"], (counts / 1000).astype(np.float32))
            assert record["lead_names"] == LEADS
        assert record["metadata"]["dx"].split(",")[0].isdigit()
        assert record["metadata"]["sex"] in ("male", "female")

    @pytest.mark.parametrize("format", ["16", "24", "32", "80", "212", "516"])
    def test_formats_units_and_gaps(self, format, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        counts = np.clip(COUNTS[:3, :99].T, -120, 120)  # an odd number of samples
        units, gains = ["mV", "uV", "V"], [200.0, 0.5, 1e5]
        wfdb.wrsamp(
            "r", 360, units, ["I", "II", "V1"], d_signal=counts, fmt=[format] * 3, adc_gain=gains, baseline=[0, 7, -5]
        )
        record = read_file("r.dat")
        expected = (counts - [0, 7, -5]) / gains * [1, 1e-3, 1e3]
        np.testing.assert_allclose(record["array"], expected.T, rtol=1e-6)
        assert record["sampling_rate"] == 360
        whole = Path("r.dat").read_bytes()
        for cut in (1, 2, 3, 7, len(whole) // 2, len(whole) - 1):
            Path("r.dat").write_bytes(whole[:-cut])
            with pytest.raises(ValueError, match=r"Cannot read .*r\.hea as WFDB"):
                read_file("r.hea")

    @given(st.data())
    def test_format_16_as_wfdb_reads_it(self, tmp_path_factory, data):
        """It is read without wfdb, which takes ten times as long."""
        folder = tmp_path_factory.mktemp("wfdb")
        frames, lines = data.draw(st.integers(1, 9)), []
        for file in ("a", "b")[: data.draw(st.integers(1, 2))]:
            sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
            offset = data.draw(st.sampled_from([0, 0, 24]))
            counts = data.draw(
                st.lists(
                    st.integers(-(2**15), 2**15 - 1), min_size=frames * sum(sizes), max_size=frames * sum(sizes) + 2
                )
            )
            (folder / f"{file}.dat").write_bytes(bytes(offset) + np.array(counts, "<i2").tobytes())
            for size in sizes:
                gain = data.draw(
                    st.sampled_from(["", " 200", " 0", " 1000.5/uV", " 200(-7)/mV", " -3.5e2(12)/mV", " 5/V 16 9"])
                )
                lines.append(f"{file}.dat 16{f'x{size}' if size > 1 else ''}{f'+{offset}' if offset else ''}{gain}")
        stated = data.draw(st.booleans()) or len({line[0] for line in lines}) > 1
        (folder / "r.hea").write_text("\n".join([f"r {len(lines)} 100{f' {frames}' if stated else ''}", *lines]) + "\n")
        read = read_file(folder / "r.hea")
        record = wfdb.rdrecord(str(folder / "r"), smooth_frames=False)
        highest = max(record.samps_per_frame)
        expected = [
            signal / {"mV": 1, "uV": 1000, "V": 0.001}[unit]
            for signal, unit, size in zip(record.e_p_signal, record.units, record.samps_per_frame, strict=True)
            if size == highest
        ]
        np.testing.assert_array_equal(read["array"], np.array(expected, np.float32))
        assert read["sampling_rate"] == 100 * highest

    @given(st.lists(st.integers(-(2**15) + 1, 2**15 - 1), min_size=9, max_size=9), st.data())
    def test_whole_microvolts(self, tmp_path_factory, counts, data):
        """They are what the millivolts of the same file round to; and stay millivolts where a count is no whole number of them."""
        gains = data.draw(
            st.lists(
                st.sampled_from(["200/mV", "1000(7)/mV", "-2.5e2/mV", "1(-40000)/uV", "0/mV", "1e6/V", "2/uV", "1/mV"]),
                min_size=3,
                max_size=3,
            )
        )
        lines = [f"r.dat 16 {gain} 16 0 0 0 0 {lead}" for gain, lead in zip(gains, ["I", "II", "III"], strict=True)]
        folder = tmp_path_factory.mktemp("wfdb")
        path = write_wfdb(folder, ["r 3 100 3", *lines], r=np.array(counts, "<i2").tobytes())
        microvolts = read_file(path, Given(microvolts=True))
        millivolts = read_file(path)["array"]
        rounded = np.rint(1000 * millivolts)
        if microvolts["unit"] == "uV":
            assert microvolts["array"].dtype == np.int16
            np.testing.assert_array_equal(microvolts["array"], rounded)
        else:
            np.testing.assert_array_equal(microvolts["array"], millivolts)
            assert "2/uV" in gains or rounded.max() > 32767 or rounded.min() < -32768

    @pytest.mark.parametrize(
        ("counts", "gain", "expected"),
        [
            ([1, -32768, 3], "1000/mV", [0.001, np.nan, 0.003]),  # a gap
            ([0, 0, 0], "1e-297/mV", [0, 0, 0]),
            ([1, 2, 3], f"1e999({10**300})/mV", [0, 0, 0]),
            ([1, 2, 3], "3/mV", np.float32([1 / 3, 2 / 3, 1])),
        ],
    )
    def test_no_whole_microvolts(self, counts, gain, expected, tmp_path):
        content = np.array(counts, "<i2").tobytes()
        path = write_wfdb(tmp_path, ["r 1 100 3", f"r.dat 16 {gain} 16 0 0 0 0 II"], r=content)
        read = read_file(path, Given(microvolts=True))
        assert read["unit"] == "mV"
        np.testing.assert_array_equal(read["array"], np.float32([expected]))

    @pytest.mark.parametrize("length", ["", " 0", " 3"])
    def test_no_samples(self, length, tmp_path):
        path = write_wfdb(tmp_path, [f"r 1 100{length}", "r.dat 16 1000/mV 16 0 0 0 0 II"], r=b"")
        with pytest.raises(
            ValueError, match=r"r\.dat is cut: it has 0 bytes" if length == " 3" else r"r\.dat holds no samples"
        ):
            read_file(path)

    def test_invalid_samples_stay_nan(self, tmp_path):
        counts = np.array([1, -32768, 3], dtype="<i2")
        record = read_file(write_wfdb(tmp_path, ["r 1 100 3", "r.dat 16 1(0)/mV 16 0 0 0 0 II"], r=counts.tobytes()))
        np.testing.assert_array_equal(record["array"], [[1, np.nan, 3]])

    def test_signals_that_are_no_leads(self, tmp_path):
        """Frames of four samples of II, one of a pressure, two of a respiration in millivolts."""
        frames = np.arange(70, dtype="<i2").reshape(10, 7)
        lines = [
            "r 3 125 10 12:00:00 01/02/2020",
            "r.dat 16x4 10/mV 16 0 0 0 0 II",
            "r.dat 16 10/mmHg 16 0 0 0 0 ABP",
            "r.dat 16x2 10/mV 16 0 0 0 0 RESP",
            "# Age: NaN",
        ]
        record = read_file(write_wfdb(tmp_path, lines, r=frames.tobytes()))
        np.testing.assert_allclose(record["array"], frames[:, :4].reshape(1, -1) / 10)
        assert (record["sampling_rate"], record["lead_names"]) == (500, ["II"])
        assert record["metadata"]["left_out"] == {"ABP": "unit 'mmHg'", "RESP": "rate 250 Hz"}
        assert record["metadata"]["date"] == "2020-02-01"
        assert "age" not in record["metadata"]

    def test_names_and_length_may_be_missing(self, tmp_path):
        record = read_file(write_wfdb(tmp_path, ["# a comment", "r 2", "r.dat 16", "r.dat 16"], r=COUNTS[:2].tobytes()))
        assert (record["array"].shape, record["sampling_rate"], record["lead_names"]) == ((2, 100), 250, None)

    @pytest.mark.parametrize(
        ("lines", "message"),
        [
            (["r 1 100 5", "../r.dat 16"], r"'\.\./r\.dat 16' describes no signal; expected the plain name"),
            (["r 1 100 5", "/etc/passwd 16"], "describes no signal"),
            (["r 1 100 5", "https://example.org/r.dat 16"], "describes no signal"),
            (["r 1 100 5", "r.dat 16y"], "describes no signal"),
            (["r 1 100 5", "r.dat 16 1_000(0)/mV"], r"describes no signal; .* a gain such as 1000\(0\)/mV"),
            (["r 1 100 5", "r.dat 16 1000(1e3)/mV"], "describes no signal"),
            (["r 1 100 5", "s.dat 16"], r"signal file 's\.dat' is not beside the header"),
            (["r 2 100 5", "r.dat 16"], "announces 2 signals and describes 1; it is cut"),
            (["r 1 100 101", "r.dat 16"], "it has 200 bytes, the header claims 202"),
            (["r 1 100 99999999999999", "r.dat 16"], r"r\.dat is cut"),
            (["r 1 100 50", "r.dat 16x999999999999"], r"r\.dat is cut"),
            (["r 1 100 50", "r.dat 16+102"], r"r\.dat is cut"),
            (["r 1 100 50", "r.dat 16:9999999999"], "skew of 9999999999 frames"),
            (["r 1 100 999999999", "r.dat 516"], "unpacks to 999999999 samples; expected 1 to"),
            (["r 1 100", "r.dat 516"], "unpacks to 0 samples"),
            (["r 1 100 50", "r.dat 16x0"], r"r\.dat has 0 samples of a signal in each frame"),
            (["r 2 100", "r.dat 16", "q.dat 16x2"], r"q\.dat is cut: it holds 100 samples, expected 200"),
            (["r 1 100 50", "r.dat 99"], "format '99', which wfdb does not read"),
            (["r 1 100 50", "r.dat 16 200/mmHg 16 0 0 0 0 ABP"], r"no signal in volts, but ABP \(unit 'mmHg'\)"),
            (["r 1 100 50", "r.dat 16 200/µV 16 0 0 0 0 I"], "other characters than ASCII; write a unit as mV or uV"),
            (["r/2 1 100 100", "a 50", "b 50"], r"several segments \(a, b \.\.\.\); read them one by one"),
            (["r 3 100 5", "r.dat 16", "q.dat 16", "r.dat 16"], "one file in several places"),
            (["r 1 100 5", f"{'a' * 2000} 16"], "or a line than 1000"),
        ],
    )
    def test_wrong_headers(self, lines, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            read_file(write_wfdb(tmp_path, lines, r=bytes(200), q=bytes(200)))

    def test_signal_file_without_its_header(self, shared, tmp_path):
        folder = shared / "data/other_12lead/challenge2021_wfdb_mat"
        shutil.copy(folder / "E07500.mat", tmp_path)
        with pytest.raises(ValueError, match=r"without rate, leads and gain.*put NAME\.hea into the same folder"):
            read_file(tmp_path / "E07500.mat")
        # of another record
        (tmp_path / "E07500.hea").write_text((folder / "JS20000.hea").read_text())
        with pytest.raises(ValueError, match=r"E07500\.hea describes the signals of JS20000\.mat, not of E07500\.mat"):
            read_file(tmp_path / "E07500.mat")

    @pytest.mark.parametrize("content", [mat_bytes(val=COUNTS), mat_73_bytes(val=COUNTS)])
    def test_another_matlab_than_the_header_describes(self, content, tmp_path):
        """Its bytes would be taken for samples."""
        (tmp_path / "r.mat").write_bytes(content)
        (tmp_path / "r.hea").write_text("r 1 100 50\nr.mat 16+24 1000/mV 16 0 0 0 0 I\n")
        for name in ("r.mat", "r.hea", "r"):
            with pytest.raises(
                ValueError, match=r"r\.mat is of MATLAB [57]\.., and headers describe MATLAB 4; save it with -v4"
            ):
                read_file(tmp_path / name)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"no header at all\n", r"r\.hea begins with 'no header at all'; expected NAME SIGNALS RATE LENGTH"),
            (b"", "r.hea begins with ''; expected NAME"),
            (b"r 1 100 5\ns.dat 16\n", r"r\.hea describes the signals of s\.dat, not of r\.(mat|dat)"),
            (b"r 1 100 5\n" + b"#" * 2**19, "r.hea has 524298 bytes; expected at most 262144"),
        ],
    )
    @pytest.mark.parametrize("suffix", ["mat", "dat"])
    def test_header_that_cannot_be_read(self, content, message, suffix, tmp_path):
        mat_4 = struct.pack("<5I", 30, 1, 5, 0, 4) + b"val\0" + bytes(10)
        (tmp_path / f"r.{suffix}").write_bytes(mat_4 if suffix == "mat" else b"\xff" * 20)
        (tmp_path / "r.hea").write_bytes(content)
        with pytest.raises(ValueError, match=f"Cannot read .*r.{suffix} by its WFDB header: {message}"):
            read_file(tmp_path / f"r.{suffix}")

    @pytest.mark.parametrize(
        "moment", ["12-May-2020 12:33:59", "2020-05-12", "25:61:00", "12:00:00 00/00/0000", "12:00:00"]
    )
    def test_dates_of_any_form(self, moment, tmp_path):
        lines = [f"r 2 100 100 {moment}", "r.dat 16 1000/mV 16 0 0 0 0 I", "q.dat 16 1000/mV 16 0 0 0 0 II"]
        for name in ("r.hea", "r.dat", "r"):
            write_wfdb(tmp_path, lines, r=COUNTS[:1].tobytes(), q=COUNTS[1:2].tobytes())
            record = read_file(tmp_path / name)
            np.testing.assert_array_equal(record["array"], (COUNTS[:2] / 1000).astype(np.float32))
            assert record["metadata"] == {"format": "WFDB"}

    def test_reported_date(self, shared):
        expected = read_file(shared / "data/other_12lead/challenge2021_wfdb_mat/E07500.hea")
        for suffix in (".hea", ".mat", ""):
            record = read_file(shared / f"data/reported/challenge2020_date/E07500{suffix}")
            np.testing.assert_array_equal(record["array"], expected["array"])
            assert {**record, "array": None} == {**expected, "array": None}

    def test_reported_gap(self, shared):
        header = shared / "data/reported/mixedsignals/mixedsignals.hea"
        record = read_file(header)
        signal = wfdb.rdrecord(str(header.with_suffix("")), smooth_frames=False).e_p_signal[0]
        np.testing.assert_allclose(record["array"][0], signal, rtol=1e-6)
        assert np.isnan(signal).sum() == 1024
        assert set(record["metadata"]["left_out"]) == {"ABP", "Pleth", "Resp"}

    def test_checksums(self, tmp_path):
        counts = COUNTS[:2].T.astype("<i2")
        sums = [int(column.sum()) % 2**16 for column in counts.T]
        lines = ["r 2 100 100", *(f"r.dat 16 1000/mV 16 0 {counts[0, n]} {sums[n]} 0 {LEADS[n]}" for n in (0, 1))]
        read_file(write_wfdb(tmp_path, lines, r=counts.tobytes()))
        signed = [line.replace(f" {sums[n]} ", f" {sums[n] - 2**16} ") for n, line in enumerate(lines[1:])]
        read_file(write_wfdb(tmp_path, [lines[0], *signed]))  # some write it with a sign
        damaged = counts.copy()
        damaged[7, 1] ^= 1 << 14  # a bit that moves a sample by 16 mV
        (tmp_path / "r.dat").write_bytes(damaged.tobytes())
        with pytest.raises(
            ValueError, match=rf"samples of 'II' have the checksum \d+, its header says {sums[1]}: .*damaged"
        ):
            read_file(write_wfdb(tmp_path, lines))
        unsealed = [line.replace(f" {sums[n]} ", " 0 ") for n, line in enumerate(lines[1:])]
        read_file(write_wfdb(tmp_path, [lines[0], *unsealed]))  # none was written
        damaged[0, 0] += 1
        (tmp_path / "r.dat").write_bytes(damaged.tobytes())
        with pytest.raises(ValueError, match=f"'I' begins with {damaged[0, 0]}, its header says {counts[0, 0]}"):
            read_file(write_wfdb(tmp_path, [lines[0], *unsealed]))

    def test_checksums_of_all_real_records(self, shared):
        headers = [*(shared / "data/other_12lead").rglob("*.hea"), *(shared / "data/reported").rglob("*.hea")]
        assert len(headers) == 6
        for header in headers:
            read_file(header)

    def test_the_caller_s_unit_and_names(self, tmp_path):
        lines = ["r 2 100 100", "r.dat 16 1000/adu 16 0 0 0 0 ecg_1", "r.dat 16 1000/adu 16 0 0 0 0 ecg_2"]
        header = write_wfdb(tmp_path, lines, r=COUNTS[:2].T.tobytes())
        with pytest.raises(ValueError, match=r"ecg_1 \(unit 'adu'\).*--unit uV"):
            read_ecg(header)
        record = read_ecg(header, unit="mV", lead_names=["V1", "V2"])
        assert record.lead_names == ("V1", "V2")
        np.testing.assert_array_equal(record.array, (COUNTS[:2] / 1000).astype(np.float32))


def test_signal_files_of_what_cannot_be_read(tmp_path, monkeypatch):
    """Nothing is known of them, which is no error: reading the record says why."""
    header = write_wfdb(tmp_path, ["r 2 100 5", *(f"{name}.dat 16 1000/mV 16 0 0 0 0 {name}" for name in "ab")])
    assert signal_files(header) == [tmp_path / "a.dat", tmp_path / "b.dat"]
    assert signal_files(tmp_path) == signal_files(tmp_path / "not_there.hea") == []

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert signal_files(header) == []
