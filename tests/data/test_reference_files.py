import json
import pickle
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import wfdb
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import interp1d

from elm_ecg.ecg_utils import STANDARD_LEADS, as_record
from elm_ecg.training import cli
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data import reference_files
from elm_ecg.training.data.check import Checker
from elm_ecg.training.data.loading import ecgs_of, load_data, load_ecgs, to_chat
from elm_ecg.training.data.paths import confined, file_of, segment_location, split_segment
from elm_ecg.training.data.reference_files import ReferenceFiles, Segment
from elm_ecg.training.data.streams import load_stream
from elm_ecg.training.evaluation.questions import fingerprint_of, list_questions
from elm_ecg.training.tokenizer import read_records
from helpers import tiny_processor
from public_sets import MIMIC_LEADS, challenge, code_15, csn, mimic, ptbxl, save_table, save_wfdb, signal

# the leads in the order into which the reference brings those of MIMIC-IV-ECG and CODE-15%
REFERENCE_LEADS = ["I", "II", "III", "aVL", "aVR", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
QUESTION = json.dumps(["single-verify", "Is there atrial fibrillation?", ["no"]])


def ecg_path(name_of_set: str, name: str, index: int = 0, num_samples: int = 2500) -> str:
    return f"data/{name_of_set}/preprocessed_{num_samples}/{name}_{index}.npy"


def mimic_name(study: int, patient: int) -> str:
    return f"files_p{str(patient)[:4]}_p{patient}_s{study}_{study}"


def preprocess(array: np.ndarray, rate: float, leads: list[str] | None = None) -> np.ndarray:
    """What the reference makes of a record, written from its description: [leads, samples] at 250 Hz.

    Args:
        array: [samples, leads] in millivolts.
        leads: of the array, where the reference brings them into its own order.
    """
    if leads is not None:
        names = [lead.lower() for lead in leads]
        array = array[:, [names.index(lead.lower()) for lead in REFERENCE_LEADS]]
    seconds = len(array) / rate
    spline = interp1d(np.linspace(0, seconds, len(array)), array, kind="cubic", axis=0)
    return spline(np.linspace(0, seconds, int(len(array) * 250 / rate))).T


def save_npy(root: Path, path: str, array: np.ndarray) -> None:
    """As the reference saves a segment: a pickled dict."""
    name, _, index = Path(path).stem.rpartition("_")
    size = int(Path(path).parent.name.removeprefix("preprocessed_"))
    part = array[:, int(index) * size : (int(index) + 1) * size]
    facts = {
        "ecg": part,
        "report": "",
        "ecg_path": f"{path.split('/')[1]}/{name}",
        "original_sf": 500,
        "target_sf": 250,
    }
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    np.save(root / path, facts | {"segment_len": size, "npy_path": path}, allow_pickle=True)


def save_rows(folder: Path, **splits: list[str]) -> Path:
    """A dataset of the reference with a row for each path."""
    folder.mkdir(exist_ok=True)
    for split, paths in splits.items():
        rows = [{"ecg_path": path, "text": QUESTION, "name": "ecg-qa"} for path in paths]
        Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    return folder


def load(folder: Path, root: Path | None, split: str = "train") -> Dataset:
    return load_data(DataArguments(data=[str(folder)], ecg_root=root and str(root)), split)


def assert_same(ecg: Any, expected: np.ndarray, leads: list[str]) -> None:
    """As a record, lead by lead."""
    record = as_record(ecg)
    assert record.sampling_rate == 250
    rows = dict(zip(record.lead_names, record.array, strict=True))
    assert set(rows) == {*STANDARD_LEADS}
    for lead, row in zip(leads, expected, strict=True):
        assert rows[lead].shape == row.shape
        assert np.corrcoef(rows[lead], row)[0, 1] > 0.999, lead
        assert np.allclose(rows[lead], row, atol=2e-6), lead


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """--ecg_root with a download of each set."""
    root = tmp_path_factory.mktemp("root")
    ptbxl(root / "ptb-xl", {1: 15709, 17: 13619})
    mimic(root / "mimic-iv-ecg", {40689238: 10000032})
    code_15(root / "code15", {1169160: 15709, 14: 3})
    challenge(root / "challenge-2021", "A0001")
    csn(root / "csn", "JS00001")
    return root


# path, patient, leads of the record, the record
SETS = [
    (ecg_path("ptb_xl", "records500_00000_00001_hr"), "15709", None, signal(1), 500),
    (ecg_path("ptb_xl", "records100_00000_00017_lr", 1, 1250), "13619", None, signal(17, 100), 100),
    (
        ecg_path("mimic_iv", mimic_name(40689238, 10000032), 3, 500),
        "10000032",
        list(STANDARD_LEADS),
        signal(40689238),
        500,
    ),
    (ecg_path("code15", "14"), "CODE-15 3", list(STANDARD_LEADS), signal(14, 400, 10.24), 400),
    (ecg_path("cpsc", "A0001", 1, 1250), None, None, signal(1), 500),
    (ecg_path("csn", "JS00001"), "JS00001", None, signal(1), 500),
]


@pytest.mark.parametrize("saved", [False, True], ids=["download", "npy"])
def test_every_set(saved, root, tmp_path):
    """From the download, and from the `.npy` file, which wins where it is there, patient and samples are the same."""
    if saved:
        root = Path(shutil.copytree(root, tmp_path / "root"))
        for path, _, leads, array, rate in SETS:
            save_npy(root, path, preprocess(array.T, rate, leads))
    rows = load(save_rows(tmp_path / "data", train=[path for path, *_ in SETS]), root)
    assert rows["patient_id"][:] == [patient for _, patient, *_ in SETS]
    assert rows["record_id"][:] == [path for path, *_ in SETS]
    for row, (path, _, leads, array, rate) in zip(rows, SETS, strict=True):
        assert row["ecg"].endswith(".npy") == saved
        (ecg,) = ecgs_of(row)
        index, size = int(path[-5]), int(path.split("_")[path.count("_", 0, path.rindex("/"))].split("/")[0])
        expected = preprocess(array.T, rate, leads)[:, index * size : (index + 1) * size]
        assert_same(ecg, expected, REFERENCE_LEADS if leads else list(STANDARD_LEADS))


def test_a_root_from_where_one_stands(root, tmp_path, monkeypatch):
    """`--ecg_root root` finds downloads as its whole path does."""
    monkeypatch.chdir(root.parent)
    data = save_rows(tmp_path / "data", train=[path for path, *_ in SETS])
    for row in load(data, Path(root.name)):
        assert as_record(ecgs_of(row)[0]).array.any()


class TestRealRecords:
    """The raw files against what the reference makes of them."""

    def test_ptbxl(self, shared, tmp_path):
        root = shared / "data" / "ptbxl"
        names = {rate: f"records{rate}_00000_00017_{suffix}" for rate, suffix in ((500, "hr"), (100, "lr"))}
        rows = load(save_rows(tmp_path / "data", train=[ecg_path("ptb_xl", name) for name in names.values()]), root)
        for row, (rate, name) in zip(rows, names.items(), strict=True):
            record = wfdb.rdrecord(root / "wfdb_examples" / name.replace("_", "/", 2))
            assert_same(ecgs_of(row)[0], preprocess(record.p_signal, rate), list(STANDARD_LEADS))
            assert row["patient_id"] == "13619"

    def test_csn(self, shared, tmp_path):
        root = shared / "data" / "other_12lead"
        rows = load(save_rows(tmp_path / "data", train=[ecg_path("csn", "JS20000", 4, 500)]), root)
        record = wfdb.rdrecord(root / "challenge2021_wfdb_mat" / "JS20000")
        assert_same(ecgs_of(rows[0])[0], preprocess(record.p_signal, 500)[:, 2000:], list(STANDARD_LEADS))

    def test_cpsc(self, shared, tmp_path):
        """A record of 10 s and one of 43 s."""
        with np.load(shared / "data" / "other_12lead" / "cpsc2018" / "cpsc2018_10.npz") as archive:
            arrays = {name: archive[name] / 1000 for name in ("A1980", "A1986")}
        for name, array in arrays.items():
            save_wfdb(tmp_path / "root" / "cpsc_2018" / "g1" / name, array)
        paths = [ecg_path("cpsc", "A1980"), ecg_path("cpsc", "A1986", 3)]
        rows = load(save_rows(tmp_path / "data", train=paths), tmp_path / "root")
        assert_same(ecgs_of(rows[0])[0], preprocess(arrays["A1980"].T, 500), list(STANDARD_LEADS))
        expected = preprocess(arrays["A1986"].T, 500)[:, 7500:10000]
        assert_same(ecgs_of(rows[1])[0], expected, list(STANDARD_LEADS))

    def test_code_15(self, shared, tmp_path):
        shutil.copy(shared / "data" / "reported" / "code15_exams_part0_2records.hdf5", tmp_path / "exams_part0.hdf5")
        with h5py.File(tmp_path / "exams_part0.hdf5") as file:
            exams, tracings = file["exam_id"][:], file["tracings"][:]
        rows = [{"exam_id": exam, "patient_id": exam + 1, "trace_file": "exams_part0.hdf5"} for exam in exams]
        save_table(tmp_path / "exams.csv", *rows)
        paths = [ecg_path("code15", str(exam)) for exam in exams]
        rows = load(save_rows(tmp_path / "data", train=paths), tmp_path)
        for row, tracing in zip(rows, tracings, strict=True):
            expected = preprocess(tracing, 400, list(STANDARD_LEADS))[:, :2500]
            assert_same(ecgs_of(row)[0], expected, REFERENCE_LEADS)

    def test_mimic(self, shared, tmp_path):
        """Records of PTB-XL in the layout of MIMIC-IV-ECG, with aVF before aVL."""
        record = wfdb.rdrecord(shared / "data" / "ptbxl" / "wfdb_examples" / "records500" / "00000" / "00002_hr")
        mimic(tmp_path / "root", {40689238: 10000032})
        array = record.p_signal.T[[STANDARD_LEADS.index(lead) for lead in MIMIC_LEADS]]
        file = tmp_path / "root" / "files" / "p1000" / "p10000032" / "s40689238" / "40689238"
        save_wfdb(file, array, leads=MIMIC_LEADS)
        folder = save_rows(tmp_path / "data", train=[ecg_path("mimic_iv", mimic_name(40689238, 10000032))])
        expected = preprocess(array.T, 500, MIMIC_LEADS)
        assert_same(ecgs_of(load(folder, tmp_path / "root")[0])[0], expected, REFERENCE_LEADS)


class TestSegments:
    @given(st.text(min_size=1), st.integers(0, 10**6), st.integers(1, 10**6))
    def test_locations(self, path, index, num_samples):
        assert split_segment(segment_location(path, index, num_samples)) == (path, index, num_samples)
        assert split_segment(path) is None or "#segment=" in path

    def test_past_the_end(self, root):
        location = segment_location(str(root / "csn" / "WFDBRecords" / "01" / "010" / "JS00001.hea"), 2, 1250)
        message = (
            r"JS00001\.hea has 2500 samples at 250 Hz, and the row names segment 2, counted from 0, of 1250 samples"
        )
        with pytest.raises(ValueError, match=message):
            as_record(Segment(location))

    def test_gaps(self, tmp_path):
        """Short ones are filled, long ones an error, as in any other record."""
        array = signal(1)
        array[3, 100:110] = np.nan
        save_wfdb(tmp_path / "short", array)
        array[3, 100:400] = np.nan
        save_wfdb(tmp_path / "long", array)
        filled = as_record(Segment(segment_location(f"{tmp_path}/short.hea", 0, 2500)))
        assert np.isfinite(filled.array).all()
        with pytest.raises(ValueError, match=r"long\.hea: Lead aVR has a gap \(NaN\) of 0\.6 s"):
            as_record(Segment(segment_location(f"{tmp_path}/long.hea", 0, 2500)))

    def test_read_when_looked_into(self, tmp_path):
        row = {"ecg": segment_location(str(tmp_path / "gone.hea"), 0, 500), "messages": [], "record_id": "17"}
        (segment,) = ecgs_of(row)
        assert segment == ecgs_of(row)[0] != Segment("other")
        assert {segment: 1}[ecgs_of(row)[0]] == 1
        assert str(segment) == row["ecg"]
        chat = to_chat(row | {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]})
        assert chat[0]["content"][0]["ecg"] is not None
        with pytest.raises(FileNotFoundError, match=r"gone\.hea"):
            as_record(segment)

    def test_of_many_in_one_file(self, root):
        file = root / "code15" / "exams_part0.hdf5"
        assert file_of(segment_location(f"{file}#1169160", 0, 500)) == str(file)
        assert file_of(f"{file}#1169160") == file_of(str(file)) == str(file)

    def test_no_other_files(self, root, tmp_path):
        """A link in the folder, of which a row of any dataset names a segment or record."""
        (tmp_path / "link.hea").symlink_to(root / "ptb-xl" / "records500" / "00000" / "00001_hr.hea")
        (tmp_path / "link.hdf5").symlink_to(root / "code15" / "exams_part0.hdf5")
        for path in ("link.hea#segment=0,500", "link.hdf5#1169160", "link.hdf5#1169160#segment=0,500"):
            with pytest.raises(ValueError, match=r"which leads to .*, outside of"):
                confined(path, str(tmp_path))


class TestLoading:
    def test_streamed_and_mixed(self, root, tmp_path):
        """Beside rows that hold their ECG, and through the collator."""
        paths = [path for path, *_ in SETS]
        folder = save_rows(tmp_path / "data", train=paths)
        args = DataArguments(data=[str(folder)], ecg_root=str(root))
        whole = load(folder, root)
        streamed = list(load_stream(args, "train"))
        assert [{name: value for name, value in row.items() if name != "epoch"} for row in streamed] == list(whole)
        assert load_ecgs(args, "train")["ecg"][:].tolist() == whole["ecg"][:].tolist()
        (tmp_path / "arrays").mkdir()
        ecg = {"array": signal(1, 100).tolist(), "sampling_rate": 100, "unit": "mV"}
        Dataset.from_list([{"messages": whole[0]["messages"], "ecg": ecg}]).to_parquet(
            tmp_path / "arrays" / "train.parquet"
        )
        names = [str(folder), str(tmp_path / "arrays")]
        mixed = load_data(DataArguments(data=names, ecg_root=str(root)), "train")
        assert [str(ecgs_of(row)[0]) for row in mixed][: len(paths)] == whole["ecg"][:].tolist()
        batch = ELMCollator(tiny_processor(truncation="start"))([mixed[0], mixed[3], mixed[6]])
        assert batch["ecg_values"].shape == (3, 12, 500)

    def test_a_file_that_comes_later(self, root, tmp_path):
        """Rows that `datasets` has made before are made anew where other files are there."""
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "ptb-xl").mkdir()
        folder = save_rows(tmp_path / "data", train=[SETS[0][0]])
        save_npy(tmp_path / "root", SETS[0][0], preprocess(signal(1).T, 500))
        assert load(folder, tmp_path / "root")["patient_id"][:] == [None]
        shutil.copytree(root / "ptb-xl", tmp_path / "root" / "ptb-xl", dirs_exist_ok=True)
        assert load(folder, tmp_path / "root")["patient_id"][:] == ["15709"]
        (tmp_path / "root" / SETS[0][0]).unlink()
        assert split_segment(load(folder, tmp_path / "root")["ecg"][0])

    def test_processes(self, root, tmp_path):
        paths = [path for path, *_ in SETS]
        folder = save_rows(tmp_path / "data", train=paths)
        one = load(folder, root)
        args = DataArguments(data=[str(folder)], ecg_root=str(root))
        assert list(load_data(args, "train", num_proc=2)) == list(one)
        files = ReferenceFiles(str(root))
        files.check("data", [(path, 1) for path in paths])
        again = pickle.loads(pickle.dumps(files))
        assert again.digest == files.digest != ""
        assert [again.locate(path) for path in paths] == [files.locate(path) for path in paths]

    def test_a_segment_of_many_rows_is_read_once(self, root, tmp_path, monkeypatch):
        read: list[str] = []
        as_it_is = reference_files.read_ecg
        monkeypatch.setattr(reference_files, "read_ecg", lambda path: read.append(path) or as_it_is(path))
        rows = load(save_rows(tmp_path / "data", train=[SETS[0][0]] * 3 + [SETS[2][0]]), root)
        assert len(list(read_records(rows, None, None))) == len(read) == 2
        fingerprint_of(rows, list_questions(rows))
        assert len(read) == 4
        checker = Checker()
        for index, row in enumerate(rows):
            checker.add(row, "train", index)
        assert len(read) == 6

    @pytest.mark.parametrize(
        ("path", "wanted"),
        [
            (ecg_path("ptb_xl", "records500_00000_00018_hr"), r"nor records500/00000/00018_hr\.hea in .*/ptb-xl"),
            (
                ecg_path("mimic_iv", mimic_name(40689239, 10000032)),
                r"nor files/p1000/.*/40689239\.hea in .*/mimic-iv-ecg",
            ),
            (ecg_path("code15", "99"), "nor exam_id 99 in an exams.csv of CODE-15%"),
            (ecg_path("cpsc", "A0002"), r"nor A0002\.hea in a folder below"),
            (ecg_path("csn", "JS00002"), r"nor JS00002\.hea in a folder below"),
            (ecg_path("ptb_xl", "other"), ""),
            (ecg_path("mimic_iv", "files_p1000_p../x_s1_1"), ""),
            (ecg_path("other", "A0001"), ""),
        ],
    )
    def test_names_no_record(self, path, wanted, root, tmp_path):
        folder = save_rows(tmp_path / "data", train=[SETS[0][0], path, path, "noise"])
        message = rf"has the ECG '{path}', but there is no such file under --ecg_root .*{wanted}.*2 of the 4 rows"
        with pytest.raises(FileNotFoundError, match=message):
            load(folder, root)
        # a stream is not looked through before it is read
        stream = load_stream(DataArguments(data=[str(folder)], ecg_root=str(root)), "train")
        with pytest.raises(FileNotFoundError, match=r"Row 1: It has the ECG|There is no file"):
            list(map(as_record, chain.from_iterable(map(ecgs_of, stream))))

    @pytest.mark.parametrize(("path", "marker"), [(SETS[0][0], "ptbxl_database.csv"), (SETS[2][0], "record_list.csv")])
    def test_no_download(self, path, marker, tmp_path):
        folder = save_rows(tmp_path / "data", train=[path])
        (tmp_path / "root").mkdir()
        args = DataArguments(data=[str(folder)], ecg_root=str(tmp_path / "root"))
        for read in (load_data, load_stream):
            with pytest.raises(FileNotFoundError, match=rf"nor a folder with {marker} of .*1 of the 1 rows"):
                read(args, "train")

    def test_links_are_not_followed(self, root, tmp_path):
        folder = save_rows(tmp_path / "data", train=[SETS[0][0]])
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "ptb-xl").symlink_to(root / "ptb-xl")
        with pytest.raises(FileNotFoundError, match="links that lead out of it are not followed"):
            load(folder, tmp_path / "root")
        shutil.copytree(root / "ptb-xl", tmp_path / "root" / "copy")
        record = tmp_path / "root" / "copy" / "records500" / "00000" / "00001_hr.hea"
        record.unlink()
        record.symlink_to(root / "ptb-xl" / "records500" / "00000" / "00001_hr.hea")
        with pytest.raises(ValueError, match=r"Row 0: .*which leads to .*, outside of"):
            load(folder, tmp_path / "root")

    def test_a_damaged_table(self, root, tmp_path):
        shutil.copytree(root / "ptb-xl", tmp_path / "root")
        (tmp_path / "root" / "ptbxl_database.csv").write_text("ecg_id,patient\n1,2\n")
        folder = save_rows(tmp_path / "data", train=[SETS[0][0]])
        with pytest.raises(ValueError, match=r"Row 0: Cannot read .*ptbxl_database\.csv: it has no column patient_id"):
            load(folder, tmp_path / "root")


def test_check_counts_the_patients_in_both_splits(root, tmp_path, capsys):
    """The splits of the reference are by record, and its segments and patients are in both of them."""
    mimic(tmp_path / "mimic", {40000000 + n: 10000000 + n // 2 for n in range(8)})
    names = [mimic_name(40000000 + n, 10000000 + n // 2) for n in range(8)]
    train = [ecg_path("mimic_iv", name) for name in names[::2]]
    test = [ecg_path("mimic_iv", name) for name in names[1:6:2]]
    folder = save_rows(tmp_path / "data", train=train, test=test)
    assert cli.main(["data", "check", str(folder), "--ecg_root", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "error: patients in several splits (3)\n    10000000 (test, train)" in captured.out
    assert "patients in several splits (3)" in captured.err
    assert "train: 4 rows, 4 records, 4 patients" in captured.out
    assert "4 ECGs of 250 Hz" in captured.out
    assert "missing" not in captured.out
