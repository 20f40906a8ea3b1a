import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import DatasetDict, load_dataset
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.ecg_utils import as_record
from elm_ecg.training.data.arguments import SOURCES
from elm_ecg.training.data.build import build_dataset
from elm_ecg.training.data.downloads import CODE_LABELS, DOWNLOADS, find_downloads, find_root, read_rows, snomed_names
from elm_ecg.training.data.sources import find_records, read_source
from elm_ecg.training.dataset_commands import main
from public_sets import MIMIC_LEADS, challenge, code_15, csn, mimic, ptbxl, save_table, save_wfdb, signal


@pytest.fixture(scope="module")
def downloads(tmp_path_factory) -> Path:
    """A folder with one download of each set, as `wget -r` leaves them."""
    root = tmp_path_factory.mktemp("downloads")
    ptbxl(root / "physionet.org" / "files" / "ptb-xl" / "1.0.3", {1: 15709, 17: 13619, 12345: 15709})
    mimic(root / "physionet.org" / "files" / "mimic-iv-ecg" / "1.0", {40689238: 10000032, 44458630: 10000032})
    code_15(root / "code15", {1169160: 15709, 14: 3, 2873686: 15709})
    challenge(root / "challenge-2021", "A0001", "A0002")
    csn(root / "csn", "JS00001", "JS20000")
    return root


def test_each_source_has_its_name():
    assert tuple(DOWNLOADS) == SOURCES
    assert all("doi 10." in download.attribution for download in DOWNLOADS.values())


class TestSources:
    """Records, what is said of them, and their names elsewhere."""

    def test_ptbxl(self, downloads):
        records = read_source("ptb-xl", downloads)
        assert list(records.locations) == ["1", "17", "12345"]
        about = records.about["1"]
        assert about == {
            **{"patient_id": "15709", "strat_fold": 2, "age": 56, "sex": "female"},
            "report": "sinusrhythmus, normales ekg",
            **{"codes": ["NORM", "SR"], "labels": ["normal ECG", "sinus rhythm"]},
        }
        assert records.about["12345"]["sex"] == "female"
        record = as_record(records.locations["17"])
        assert record.sampling_rate == 500
        assert np.allclose(record.array, signal(17))
        assert as_record(read_source("ptb-xl", downloads, 100).locations["17"]).sampling_rate == 100
        names = [
            "17",
            "00017",
            "records500/00000/00017_hr",
            "records500/00000/00017_hr.hea",
            "records100/00000/00017_lr.dat",
        ]
        names += ["ptb-xl/records500/00000/00017_hr-0.png", "00017_hr"]
        assert {records.find(name) for name in names} == {"17"}
        others = ["18", "00018_hr", "code15_v4/17-0.png", "files/17", "a17", "17.5", "", "17_hr_", "000_17"]
        assert {records.find(name) for name in others} == {None}

    def test_mimic(self, downloads):
        records = read_source("mimic-iv-ecg", downloads)
        about = {"patient_id": "10000032", "report": "Sinus rhythm; LVH, old"}
        assert records.about == {"40689238": about, "44458630": about}
        record = as_record(records.locations["40689238"])
        assert list(record.lead_names) == MIMIC_LEADS
        by_name = dict(zip(record.lead_names, record.array, strict=True))
        assert np.allclose(by_name["aVL"], signal(40689238)[4])
        path = "files/p1000/p10000032/s40689238/40689238"
        names = ["40689238", path, f"{path}.hea", f"mimic-iv/{path}", f"mimic_v4/{path}-0.png", "s40689238", path[:-9]]
        assert {records.find(name) for name in names} == {"40689238"}
        assert records.find("files/p1000/p10000032") is None

    def test_code_15(self, downloads):
        records = read_source("code-15", downloads)
        assert sorted(records.locations) == ["1169160", "14", "2873686"]  # not that of a part that is not there
        assert records.about["14"] == {
            **{"patient_id": "3", "age": 46, "sex": "male", "codes": ["RBBB", "AF"]},
            "labels": [CODE_LABELS["RBBB"], "atrial fibrillation"],
        }
        record = as_record(records.locations["14"])
        assert record.sampling_rate == 400
        assert np.allclose(record.array, signal(14, 400, 10.24), atol=1e-6)
        names = [
            "14",
            "code15/14",
            "code15_v4/a/14-0.png",
            "exams_part1.hdf5#14",
            "exams_part1#14",
            "x/exams_part1.hdf5#14",
        ]
        assert {records.find(name) for name in names} == {"14"}
        assert {records.find(name) for name in ("ptb-xl/14-0.png", "00014_hr", "15", "99")} == {None}

    def test_challenge(self, downloads, caplog):
        records = read_source("challenge", downloads)
        assert "1 codes of SNOMED CT have no name here, and stand as they are (in records): 123 (2)" in caplog.text
        assert list(records.locations) == ["A0001", "A0002"]
        facts = {"age": 74, "sex": "male", "codes": ["59118001", "123"], "labels": ["right bundle branch block", "123"]}
        assert records.about["A0002"] == facts
        names = ["A0002", "A0002.mat", "training/cpsc_2018/g1/A0002", "cpsc/A0002-0.png"]
        assert {records.find(name) for name in names} == {"A0002"}

    def test_csn(self, downloads, caplog):
        records = read_source("csn", downloads / "csn")
        assert caplog.text == ""
        assert list(records.locations) == ["JS00001", "JS20000"]
        assert records.about["JS20000"] == {
            **{"patient_id": "JS20000", "age": 85, "sex": "female", "codes": ["164889003", "59118001"]},
            "labels": [
                "Atrial Fibrillation",
                "right bundle branch block",
            ],  # as its own table says, else as the Challenge
        }

    def test_real_headers(self, shared, tmp_path):
        """Of the Challenge of 2021: `# Dx:`, and ages and sexes."""
        (tmp_path / "georgia").symlink_to(shared / "data" / "other_12lead" / "challenge2021_wfdb_mat")
        about = read_source("challenge", tmp_path).about
        assert about["HR06000"] == {
            **{"age": 59, "sex": "female", "codes": ["164934002", "426783006"]},
            "labels": ["abnormal T wave", "sinus rhythm"],
        }
        assert about["E07500"]["labels"] == ["left atrial enlargement", "sinus bradycardia"]

    def test_real_ptbxl(self, shared):
        records = read_source("ptb-xl", shared / "data" / "ptbxl")
        assert len(records.locations) == 22
        assert records.about["2"]["labels"] == ["normal ECG", "sinus bradycardia"]
        assert records.about["2"]["sex"] == "male"
        own_folder = find_records(shared / "data" / "ptbxl" / "wfdb_examples")
        assert own_folder.find("records500/00000/00017_hr") == own_folder.find("00017_hr-0.png") == "17"

    @given(st.text())
    def test_any_name(self, name):
        for download in DOWNLOADS.values():
            record = download.record_of(name)
            assert record is None or download.record_of(record) == record


class TestRoots:
    def test_the_root_itself_and_a_folder_above(self, downloads):
        root = downloads / "physionet.org" / "files" / "ptb-xl" / "1.0.3"
        assert find_root("ptb-xl", root) == find_root("ptb-xl", downloads) == root
        assert find_root("challenge", downloads) == downloads / "challenge-2021" / "training"
        found = find_downloads(downloads)
        assert found.roots["ptb-xl"] == root
        assert set(found.roots) == {"ptb-xl", "mimic-iv-ecg", "code-15"}
        assert set(found.headers) == {"A0001", "A0002", "JS00001", "JS20000"}

    @pytest.mark.parametrize("source", SOURCES)
    def test_not_there(self, source, tmp_path):
        marker = DOWNLOADS[source].markers[0]
        message = rf"There is no {re.escape(DOWNLOADS[source].title)} in .*holds {re.escape(marker)}.*leave out --source {source}"
        with pytest.raises(ValueError, match=message):
            read_source(source, tmp_path)
        with pytest.raises(ValueError, match="There is no"):
            read_source(source, tmp_path / "nowhere")

    def test_twice(self, tmp_path):
        for name in "ab":
            ptbxl(tmp_path / name, {1: 1})
        with pytest.raises(ValueError, match=r"PTB-XL is in .* 2 times: .*/a, .*/b\. Name one"):
            read_source("ptb-xl", tmp_path)


class TestBuild:
    def build(self, downloads: Path, output: Path, *options: str) -> DatasetDict:
        main(["build", str(downloads), "--output_dir", str(output), *options])
        return load_dataset(str(output), cache_dir=str(output.parent / "cache"))

    def test_questions_about_any_source(self, downloads, tmp_path):
        """By the names of the set's records, with its patients, and what else is asked for."""
        path = "files/p1000/p10000032/s40689238/40689238"
        rows = [{"record": path, "question": "Is it?", "answer": "yes"}]
        rows.append({"record": "44458630", "question": "Is it?", "answer": "no"})
        (tmp_path / "q.json").write_text(json.dumps(rows))
        options = ["--source", "mimic-iv-ecg", "--questions", str(tmp_path / "q.json"), "--shares", "1", "0", "0"]
        data = self.build(downloads, tmp_path / "out", *options, "--metadata_columns", "report")["train"]
        assert sorted(data["record_id"]) == ["40689238", "44458630"]
        assert {*data["patient_id"]} == {"10000032"}
        assert {*data["report"]} == {"Sinus rhythm; LVH, old"}
        card = (tmp_path / "out" / "README.md").read_text()
        assert "license: odbl" in card
        assert "Licence: `odbl`" in card
        assert "10.13026/4nqg-sb35" in card
        with pytest.raises(ValueError, match="--source mimic-iv-ecg has no column weight; it has patient_id, report"):
            self.build(downloads, tmp_path / "other", *options, "--metadata_columns", "weight")

    def test_cards_say_how_it_was_made(self, downloads, tmp_path):
        """Of questions of files, of those made of labels, and of records alone."""
        (tmp_path / "q.json").write_text(json.dumps([{"record": "JS00001", "question": "Is it?", "answer": "yes"}]))
        of_file, of_labels = (
            ["--questions", str(tmp_path / "q.json")],
            ["--make_questions", "query", "--min_records", "1"],
        )
        cards = {}
        for name, options in {
            "files": of_file,
            "labels": of_labels,
            "both": of_file + of_labels,
            "none": ["--no_questions"],
        }.items():
            self.build(downloads, tmp_path / name, "--source", "csn", "--shares", "1", "0", "0", *options)
            cards[name] = (tmp_path / name / "README.md").read_text()
        sentences = {
            "The questions are those of `q.json`.": {"files"},
            "licence of `q.json` are to be added": {"files", "both"},
            "The questions (query) were made by templates from the labels": {"labels"},
            "The questions of files are those of `q.json`.": {"both"},
            "Further questions (query) were made": {"both"},
            "at least 1 records have (seed 0)": {"labels", "both"},
            "without questions: for pretraining": {"none"},
            "Answers are as right as": {"files", "labels", "both"},
            "superclasses": set(),
            "Those of verify": set(),
            "The records are those of Chapman-Shaoxing-Ningbo, with": {*cards},
            "and of their headers age, sex and diagnoses: no names": {*cards},
        }
        for sentence, expected in sentences.items():
            assert {name for name, card in cards.items() if sentence in card} == expected, sentence

    def test_what_the_user_says_goes_first(self, downloads, tmp_path):
        table = tmp_path / "t.csv"
        save_table(table, {"record": "17", "age": 99})
        options = ["--attribution", "From our ward.", "--license", "mit", "--metadata", str(table)]
        data = self.build(downloads, tmp_path / "out", "--source", "ptb-xl", *options)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "From our ward." in card
        assert "10.13026" not in card
        assert "license: mit" in card
        rows = [row for split in data.values() for row in split]
        assert {row["record_id"]: (row["age"], row["sex"]) for row in rows} == {
            **{"1": (56, "female"), "17": (99, "female"), "12345": (56, "female")}
        }
        assert len(rows) == 3 * 5  # the five superclasses
        assert {split: {*part["strat_fold"]} for split, part in data.items()} == {"train": {2, 6, 8}}

    def test_in_python(self, downloads):
        data = build_dataset(downloads, source="ptb-xl", resample=100)
        assert {float(ecg["sampling_rate"]) for ecg in data["train"]["ecg"]} == {100}
        with pytest.raises(ValueError, match="`source` ptb-xl is a folder, and the records are a mapping"):
            build_dataset({"1": np.ones((12, 500))}, source="ptb-xl")
        with pytest.raises(ValueError, match="`source` is 'ptbxl'; expected one of ptb-xl, mimic-iv-ecg"):
            build_dataset(downloads, source="ptbxl")


class TestFaults:
    def test_a_table_is_missing(self, tmp_path):
        mimic(tmp_path, {40689238: 10000032})
        (tmp_path / "machine_measurements.csv").unlink()
        with pytest.raises(ValueError, match=r"There is no machine_measurements\.csv in "):
            read_source("mimic-iv-ecg", tmp_path)

    def test_none_of_the_files(self, tmp_path):
        code_15(tmp_path / "code", {14: 3})
        for file in (tmp_path / "code").glob("*.hdf5"):
            file.unlink()
        with pytest.raises(ValueError, match=r"CODE-15% in .* has no records"):
            read_source("code-15", tmp_path)

    def test_a_record_twice(self, tmp_path):
        for folder in ("g1", "g2"):
            save_wfdb(tmp_path / "georgia" / folder / "E00001", signal(1))
        with pytest.raises(ValueError, match=r"Two records are called E00001: .*g1/E00001\.hea and .*g2/E00001\.hea"):
            read_source("challenge", tmp_path)

    def test_codes_are_not_executed(self, tmp_path):
        ptbxl(tmp_path, {1: 1})
        table = tmp_path / "ptbxl_database.csv"
        table.write_text(table.read_text().replace("{'NORM': 100.0, 'SR': 0.0}", "__import__('os').getcwd()"))
        with pytest.raises(ValueError, match=r"scp_codes of ecg_id 1 are .*; expected a dict"):
            read_source("ptb-xl", tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a,c\n1,2\n", "it has no column b, but a, c"),
            ("", "it has no column a, b, but "),
            ("a,b\n1,2\n\n3\n", "line 4 has 1 cells, and the header 2"),
            ("a,b\n1,\xff\n", "codec can't decode"),
        ],
    )
    def test_damaged_tables(self, content, message, tmp_path):
        (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
        with pytest.raises(ValueError, match=rf"Cannot read .*t\.csv: .*{message}.*fetch it anew"):
            list(read_rows(tmp_path / "t.csv", "a", "b"))

    def test_unknown_age_and_sex(self, tmp_path):
        save_wfdb(tmp_path / "georgia" / "E00001", signal(1), comments="#Age: NaN\n#Sex: Unknown\n#Dx: Unknown\n")
        assert read_source("challenge", tmp_path).about["E00001"] == {"codes": [], "labels": []}
        ptbxl(tmp_path / "p", {1: 1})
        row = {"ecg_id": 1, "patient_id": "", "age": "", "sex": "", "report": " ", "scp_codes": "{}", "strat_fold": ""}
        save_table(tmp_path / "p" / "ptbxl_database.csv", row | {"filename_hr": "records500/00000/00001_hr"})
        assert read_source("ptb-xl", tmp_path / "p").about["1"] == {"codes": [], "labels": []}


def is_snomed(code: str) -> bool:
    """The check digit of SNOMED CT, by Verhoeff's scheme: products in the dihedral group of order 10."""

    def product(a: int, b: int) -> int:
        turned = (a % 5 + (b % 5 if a < 5 else -(b % 5))) % 5
        return turned + 5 * ((a >= 5) != (b >= 5))

    shuffle = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]
    check = 0
    for place, digit in enumerate(map(int, reversed(code))):
        for _ in range(place % 8):
            digit = shuffle[digit]
        check = product(check, digit)
    return check == 0


def test_names_of_snomed_ct():
    names = snomed_names()
    assert len(names) == len(set(names.values())) == 133
    assert [code for code in names if not is_snomed(code)] == []
    assert names["164889003"] == "atrial fibrillation"
