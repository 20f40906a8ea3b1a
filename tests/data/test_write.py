import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, List, Value, load_dataset
from huggingface_hub import DatasetCard

from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data import build as data_build
from elm_ecg.training.data import parts as data_parts
from elm_ecg.training.data.loading import ecgs_of, load_split, load_splits, to_chat
from elm_ecg.training.data.splits import FOLDS
from elm_ecg.training.dataset_commands import main
from helpers import tiny_processor

ASKED = {"question": "Is it?", "answer": "yes"}


def microvolts(seed: int, num_samples: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).integers(-2000, 2000, (12, num_samples), dtype=np.int16)


def save_records(folder: Path, *names: str, sampling_rate: int = 100, num_samples: int = 200) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        np.savez(folder / f"{name}.npz", ecg=microvolts(number, num_samples), sampling_rate=sampling_rate, unit="uV")
    return folder


def save_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def build(records: Path, output_dir: Path, *options: Any) -> dict[str, Dataset]:
    main(["build", str(records), "--output_dir", str(output_dir), *map(str, options)])
    return {split: load_split(str(output_dir), split, "ecg") for split in load_splits(str(output_dir))}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, Path]:
    """Five records of four patients, and two questions about each."""
    folder = tmp_path_factory.mktemp("small")
    records = save_records(folder / "records", *"abcde")
    rows = [
        {
            "record": name,
            "question": f"Is it {what}?",
            "answer": answer,
            "patient_id": name.replace("e", "a"),
            "what": what,
        }
        for name in "abcde"
        for what, answer in (("fast", "yes"), ("slow", "no"))
    ]
    return records, save_rows(folder / "questions.jsonl", *rows)


class TestRealData:
    @pytest.fixture(scope="class")
    def compared(self, shared, tmp_path_factory) -> tuple[dict[str, Dataset], Path, list[dict[str, Any]]]:
        """Sixty of ECG-QA's comparisons, at 100 Hz."""
        folder = tmp_path_factory.mktemp("ecg_qa")
        with (shared / "data" / "ecg_qa" / "ecgqa_ptbxl_matched.jsonl").open() as file:
            entries = [entry for entry in map(json.loads, file) if len(entry["ecg_id"]) == 2]
        entries = [entry for split in ("train", "valid", "test") for entry in entries if entry["split"] == split][::50]
        ptbxl = shared / "data" / "ptbxl"
        options = ["--metadata", ptbxl / "records.csv", "--metadata_columns", "device", "--sampling_rate", 100]
        data = build(
            ptbxl / "raw100.npz",
            folder / "compared",
            *(
                "--questions",
                save_rows(folder / "q.jsonl", *entries),
                "--unit",
                "uV",
                "--license",
                "cc-by-4.0",
                *options,
            ),
        )
        return data, folder / "compared", entries

    def test_rows_are_those_of_ecg_qa(self, compared, shared):
        data, _, entries = compared
        raw = np.load(shared / "data" / "ptbxl" / "raw100.npz")
        signals = dict(zip(raw["ecg_id"].tolist(), raw["ecg"], strict=True))
        with (shared / "data" / "ptbxl" / "records.csv").open(newline="") as file:
            table = {row["ecg_id"]: row for row in csv.DictReader(file)}
        expected = {entry["sample_id"]: entry for entry in entries if set(entry["ecg_id"]) <= set(signals)}
        seen = set()
        for split, name in (("train", "train"), ("validation", "valid"), ("test", "test")):
            for row in data[split]:
                entry = expected[row["sample_id"]]
                seen.add(row["sample_id"])
                assert entry["split"] == name
                assert row["record_id"] == [str(ecg_id) for ecg_id in entry["ecg_id"]]
                assert row["patient_id"] == [table[ecg_id]["patient_id"] for ecg_id in row["record_id"]]
                assert row["device"] == [table[ecg_id]["device"].strip() or None for ecg_id in row["record_id"]]
                assert [turn["content"] for turn in row["messages"]] == [entry["question"], "; ".join(entry["answer"])]
                for ecg, ecg_id in zip(ecgs_of(row), entry["ecg_id"], strict=True):
                    assert np.array_equal(ecg["array"], signals[ecg_id])
                assert len(to_chat(row)[0]["content"]) == 3  # two ECGs and the question
        assert seen == set(expected)
        assert len(seen) > 50

    def test_features(self, compared):
        data, folder, _ = compared
        features = data["train"].features
        assert features["ecg"] == List(Value("string"))
        assert features["messages"] == List({"role": Value("string"), "content": Value("string")})
        assert features["patient_id"] == features["record_id"] == List(Value("string"))
        assert features["question_type"] == Value("string")
        assert features["strat_fold"] == List(Value("int64"))
        streamed = load_dataset(str(folder), split="train", streaming=True)
        assert streamed.features == features
        first = data["train"][0]
        assert next(iter(streamed)) == {**first, "ecg": [name.removeprefix(f"{folder}/") for name in first["ecg"]]}
        stored = load_dataset("parquet", data_files=str(folder / "records" / "train-*.parquet"), split="train")
        assert stored.features == {
            "id": Value("string"),
            "array": List(Value("int16")),
            "sampling_rate": Value("float32"),
            "lead_names": List(Value("string")),
            "unit": Value("string"),
            "patient_id": Value("string"),
            "strat_fold": Value("int64"),
            "age": Value("float64"),
            "sex": Value("int64"),
            "device": Value("string"),
        }
        assert len(stored) == len({name for names in data["train"]["record_id"] for name in names})  # each once

    def test_card(self, compared):
        data, folder, _ = compared
        card = DatasetCard.load(folder / "README.md")
        assert card.data.license == "cc-by-4.0"
        for text in (
            "not a medical device",
            f"| train | {len(data['train'])} |",
            "100 Hz",
            "No patient is in two of them.",
            "`question_type`",
            "elm sft --data compared",
            "Licence: `cc-by-4.0`.",
        ):
            assert text in card.text
        assert "{{" not in card.text
        assert "unknown" not in card.text
        assert str(folder.parent) not in card.text

    def test_ptbxl_folder(self, shared, tmp_path):
        """Its own superclasses, folds and files."""
        folder = shared / "data" / "ptbxl" / "wfdb_examples"
        data = build(folder, tmp_path / "out", "--resample", 100, "--num_proc", 2)
        assert {split: set(rows["strat_fold"]) for split, rows in data.items()} == {
            split: {
                int(row["strat_fold"])
                for row in csv.DictReader((folder / "ptbxl_database.csv").open(newline=""))
                if FOLDS[int(row["strat_fold"])] == split
            }
            for split in data
        }
        raw = np.load(shared / "data" / "ptbxl" / "raw100.npz")
        signals = dict(zip(raw["ecg_id"].tolist(), raw["ecg"], strict=True))
        rows = data["train"]
        for row in rows:
            (ecg,) = ecgs_of(row)
            assert np.array_equal(ecg["array"], signals[int(row["record_id"])])
            assert ecg["lead_names"] == list(STANDARD_LEADS)
        assert sorted(set(rows["question_type"])) == ["CD", "HYP", "MI", "NORM", "STTC"]
        assert all("." not in patient for patient in rows["patient_id"])

        card = (tmp_path / "out" / "README.md").read_text()
        assert "license: cc-by-4.0" in card
        assert "10.13026/kfzx-aw45" in card
        assert "five diagnostic superclasses" in card

    def test_formats_and_windows(self, shared, tmp_path):
        """A folder of several formats, rates and lead orders, cut into windows and resampled."""
        for name in ("edf/ptbxl_00017.edf", "hl7_aecg/fda_subject1_0.xml", "ge_muse_xml/braveheart_example1.xml"):
            (tmp_path / "records" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "records" / name).write_bytes((shared / "data" / "formats" / name).read_bytes())
        for file in (shared / "data" / "other_12lead" / "ptb_s0010_re").iterdir():
            (tmp_path / "records" / file.name).write_bytes(file.read_bytes())
        names = ("ptbxl_00017", "fda_subject1_0", "braveheart_example1", "s0010_re")
        questions = save_rows(tmp_path / "q.jsonl", *({**ASKED, "record": name, "split": "train"} for name in names))
        options = ["--window", 5, "--stride", 4, "--resample", 250]
        data = build(tmp_path / "records", tmp_path / "out", "--questions", questions, *options)["train"]
        starts = {name: [] for name in data["record_id"]}
        for row in data:
            starts[row["record_id"]].append(row["start_second"])
            (ecg,) = ecgs_of(row)
            assert ecg["array"].shape[1] == 1250
            assert ecg["sampling_rate"] == 250
        assert starts["edf/ptbxl_00017"] == [0, 4]
        assert starts["s0010_re"] == [4 * index for index in range(9)]  # 38.4 s
        assert "start_second" in (tmp_path / "out" / "README.md").read_text()

    def test_trains(self, compared):
        """What the collator makes of two ECGs a row."""
        rows = [compared[0]["train"][index] for index in (0, 1)]
        processor = tiny_processor()
        processor.feature_extractor.truncation = "start"
        batch = ELMCollator(processor)(rows)
        assert len(batch["ecg_values"]) == 4


def test_twice_the_same(small, tmp_path):
    records, questions = small
    options = ["--questions", questions, "--shares", 0.5, 0.25, 0.25]
    build(records, tmp_path / "one" / "data", *options)
    build(records, tmp_path / "two" / "data", *options, "--num_proc", 2)
    assert digests(tmp_path / "one" / "data") == digests(tmp_path / "two" / "data")
    build(records, tmp_path / "three" / "data", *options, "--seed", 1)
    assert digests(tmp_path / "three" / "data") != digests(tmp_path / "one" / "data")


def test_questions_of_a_record_are_neighbours_and_it_is_read_once(small, tmp_path, monkeypatch):
    read = []
    as_record = data_parts.as_record
    monkeypatch.setattr(data_parts, "as_record", lambda path, *said: read.append(path.stem) or as_record(path, *said))
    records, questions = small
    data = build(records, tmp_path / "out", "--questions", questions, "--shares", 1, 0, 0)
    ids = data["train"]["record_id"]
    assert sorted(read) == list("abcde")
    assert [ids[index] for index in range(0, 10, 2)] == [ids[index] for index in range(1, 10, 2)] == read
    assert read != sorted(read)


def test_joined_questions(small, tmp_path):
    records, questions = small
    options = ["--questions", questions, "--shares", 1, 0, 0, "--join_questions", "--columns", "what"]
    data = build(records, tmp_path / "out", *options)["train"]
    assert sorted(data["record_id"]) == list("abcde")
    for row in data:
        assert [turn["content"] for turn in row["messages"]] == ["Is it fast?", "yes", "Is it slow?", "no"]
        assert row["what"] == ["fast", "slow"]


def test_one_and_two_ecgs(small, tmp_path):
    rows = [{**ASKED, "record": "a"}, {**ASKED, "record": ["b", "a"]}]
    questions = save_rows(tmp_path / "train.jsonl", *rows)
    data = build(small[0], tmp_path / "out", "--questions", questions)["train"]
    assert sorted(data["record_id"]) == [["a"], ["b", "a"]]
    assert sorted(map(len, data["ecg"])) == [1, 2]
    assert "patient_id" not in data.features
    assert "| train | 2 | 2 | unknown |" in (tmp_path / "out" / "README.md").read_text()


def test_too_few_patients(small, tmp_path, capsys):
    said = "No patients for validation, test: 4 patients are too few for --shares 0.9 0.05 0.05."
    options = ["--questions", small[1], "--shares"]
    assert set(build(small[0], tmp_path / "few", *options, 0.9, 0.05, 0.05)) == {"train"}
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "few" / "README.md").read_text()
    build(small[0], tmp_path / "all", *options, 0.5, 0.5, 0)  # none are wanted for the test
    assert "too few" not in capsys.readouterr().out


def test_parts_and_row_groups(small, tmp_path, monkeypatch):
    """A row group of records has the same place as that of the rows about them."""
    monkeypatch.setattr(data_parts, "ROW_GROUP_RECORDS", 2)
    monkeypatch.setattr(data_build, "PART_RECORDS", 3)
    records, questions = small
    data = build(records, tmp_path / "out", "--questions", questions, "--shares", 1, 0, 0)
    for folder, sizes in (("records", [[2, 1], [2]]), ("data", [[4, 2], [4]])):
        files = sorted((tmp_path / "out" / folder).iterdir())
        assert [file.name for file in files] == [f"train-0000{index}-of-00002.parquet" for index in range(2)]
        groups = [pq.ParquetFile(file).metadata for file in files]
        assert [[g.row_group(i).num_rows for i in range(g.num_row_groups)] for g in groups] == sizes
    assert len(data["train"]) == 10
    expected = {name: microvolts(number) for number, name in enumerate("abcde")}
    for row in data["train"]:
        assert np.array_equal(ecgs_of(row)[0]["array"], expected[row["record_id"]])


def test_long_records_fill_row_groups_sooner(small, tmp_path, monkeypatch):
    monkeypatch.setattr(data_parts, "ROW_GROUP_BYTES", 3 * microvolts(0).nbytes)
    build(small[0], tmp_path / "out", "--questions", small[1], "--shares", 1, 0, 0)
    (file,) = (tmp_path / "out" / "records").iterdir()
    content = pq.ParquetFile(file).metadata
    assert [content.row_group(index).num_rows for index in range(content.num_row_groups)] == [3, 2]


def test_repetitions_take_hardly_any_space(tmp_path):
    walks = np.random.default_rng(0).normal(0, 20, (3, 12, 2000)).cumsum(axis=2).astype(np.int16)
    np.savez(tmp_path / "all.npz", **dict(zip("abc", walks, strict=True)))
    sizes = []
    for number in (1, 10):
        rows = [{**ASKED, "record": name, "n": n} for name in "abc" for n in range(number)]
        questions = save_rows(tmp_path / "train.jsonl", *rows)
        options = ["--questions", questions, "--sampling_rate", 500, "--unit", "uV"]
        build(tmp_path / "all.npz", tmp_path / f"out{number}", *options)
        sizes.append(sum(file.stat().st_size for file in (tmp_path / f"out{number}").rglob("*.parquet")))
    assert sizes[0] < walks.nbytes
    assert sizes[1] < 1.2 * sizes[0]


def test_floats_are_rounded_to_microvolts(tmp_path):
    millivolts = np.linspace(-32.768, 32.767, 1200).reshape(12, 100)
    np.savez(tmp_path / "a.npz", ecg=millivolts, sampling_rate=100)
    questions = save_rows(tmp_path / "train.jsonl", {**ASKED, "record": "a"})
    (ecg,) = ecgs_of(build(tmp_path / "a.npz", tmp_path / "out", "--questions", questions)["train"][0])
    assert np.array_equal(ecg["array"], np.rint(1000 * millivolts.astype(np.float32)))
    assert ecg["unit"] == "uV"


def test_datasets_of_one_name_are_not_mixed_up(small, tmp_path):
    """`datasets` caches what it loads."""
    for number in (1, 2):
        questions = save_rows(tmp_path / f"{number}.jsonl", {**ASKED, "record": "ab"[number - 1], "split": "train"})
        main(
            [
                "build",
                str(small[0]),
                "--questions",
                str(questions),
                "--output_dir",
                str(tmp_path / str(number) / "data"),
            ]
        )
    loaded = [load_dataset(str(tmp_path / number / "data"), cache_dir=str(tmp_path / "cache")) for number in "12"]
    assert [data["train"]["record_id"][:] for data in loaded] == [["a"], ["b"]]


class TestUnreadable:
    @pytest.fixture
    def records(self, tmp_path) -> Path:
        folder = save_records(tmp_path / "records", "a")
        (folder / "broken.npz").write_bytes(b"PK\x03\x04 and nothing else")
        np.savez(folder / "huge.npz", ecg=np.full((12, 100), 40.0), sampling_rate=100)
        return folder

    def build(self, records: Path, *names: str, options: Any = ()) -> dict[str, Dataset]:
        rows = ({**ASKED, "record": name} for name in names)
        questions = save_rows(records.parent / "train.jsonl", *rows)
        return build(records, records.parent / "out", "--questions", questions, *options)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("broken", r"Cannot read the record broken: .*broken\.npz"),
            ("huge", "Cannot read the record huge: It reaches 40 mV, and 16-bit microvolts hold at most 32.767 mV"),
        ],
    )
    @pytest.mark.parametrize("options", [(), ("--num_proc", 2)])
    def test_is_an_error(self, records, name, message, options):
        with pytest.raises(ValueError, match=f"{message}.*--skip_unreadable"):
            self.build(records, "a", name, options=options)
        assert [path.name for path in sorted(records.parent.iterdir())] == ["records", "train.jsonl"]

    def test_is_left_out_and_listed(self, records, capsys):
        data = self.build(records, "a", "broken", "huge", "broken", options=["--skip_unreadable"])
        assert data["train"]["record_id"][:] == ["a"]
        output = capsys.readouterr().out
        assert "Left out: records that cannot be read, and their questions (2)" in output
        assert "Cannot read huge: It reaches 40 mV" in output
        assert (
            "Left out: records that cannot be read, and their questions (2)"
            in (records.parent / "out" / "README.md").read_text()
        )

    def test_none_is_left(self, records):
        with pytest.raises(ValueError, match="None of the 1 records can be read"):
            self.build(records, "broken", options=["--skip_unreadable"])


class TestInputAtFault:
    @pytest.mark.parametrize(
        ("rows", "options", "message"),
        [
            (
                [{**ASKED, "record": "z"}],
                [],
                r"None of the 1 questions is about one of the 5 records: the questions name z, and .* a, b, c\.\.\.",
            ),
            ([{**ASKED, "record": ["a", "b"]}], ["--window", 1], "--window cuts single records"),
            ([{**ASKED, "record": "a"}], ["--split_by", "patient"], "patient of 1 of 1 records is unknown"),
            ([{**ASKED, "record": "a"}], ["--metadata_columns", "site"], "name it with --metadata"),
            ([{**ASKED, "record": "a", "question_type": "x"}], ["--question_types", "y*"], r"y\* fits none of x"),
            (
                [{**ASKED, "record": "a", "n": 1}, {**ASKED, "record": "a", "n": "b"}],
                ["--columns", "n"],
                "column 'n' holds int, str",
            ),
            ([{**ASKED, "record": "a"}], ["--sampling_rate", 500], "Cannot read the record a: .*sampling_rate"),
        ],
    )
    def test_says_what(self, rows, options, message, small, tmp_path):
        questions = save_rows(tmp_path / "train.jsonl", *rows)
        with pytest.raises(ValueError, match=message):
            build(small[0], tmp_path / "out", "--questions", questions, *options)
        assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]

    def test_no_questions(self, small, tmp_path):
        with pytest.raises(ValueError, match="There are no questions about the records: name a file with --questions"):
            build(small[0], tmp_path / "out")

    def test_all_fall_between_the_splits(self, small, tmp_path):
        rows = [{**ASKED, "record": ["a", "b"], "patient_id": ["1", "2"]}]
        options = ["--questions", save_rows(tmp_path / "q.jsonl", *rows), "--shares", 0.5, 0, 0.5]
        with pytest.raises(ValueError, match="No question is left: all 1 are about records of different splits"):
            build(small[0], tmp_path / "out", *options)

    def test_folder_is_not_empty(self, small, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(ValueError, match="is there and not empty"):
            build(small[0], tmp_path, "--questions", small[1])
        assert (tmp_path / "mine.txt").read_text() == "mine"

    def test_output_dir_cannot_be_written(self, small, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ValueError, match=r"--output_dir .*/file/out cannot be written"):
            build(small[0], tmp_path / "file" / "out", "--questions", small[1])

    def test_missing_records_are_counted_and_named(self, small, tmp_path, capsys):
        rows = [{**ASKED, "record": "a", "question_type": "x"}, {**ASKED, "record": "z", "question_type": "x"}]
        rows.append({**ASKED, "record": "b", "question_type": "y"})
        questions = save_rows(tmp_path / "train.jsonl", *rows)
        data = build(small[0], tmp_path / "out", "--questions", questions, "--question_types", "x")
        assert data["train"]["record_id"][:] == ["a"]
        assert "Left out: questions whose records are not there (1)\nNot there: z\n" in capsys.readouterr().out


def test_notices_are_told_once(small, tmp_path, monkeypatch, capsys):
    """Each with the number of the records that it is about, however many questions there are about these."""
    as_record = data_parts.as_record

    def noticed(path: Path, *arguments: Any) -> Any:
        notices = ("Lead V4R was left out.", *(["It is short."] if path.stem == "a" else []))
        return replace(as_record(path, *arguments), metadata={"notices": notices})

    monkeypatch.setattr(data_parts, "as_record", noticed)
    build(small[0], tmp_path / "out", "--questions", small[1], "--shares", 0.5, 0.5, 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "V4R" in line] == ["Lead V4R was left out. (records: 5)"]
    assert [line for line in lines if "short" in line] == ["It is short. (records: 1)"]


def test_unknown_licence_is_said(small, tmp_path):
    options = ["--attribution", "Recorded in our ward.", "--name", "Our ECGs", "--columns", "what"]
    build(small[0], tmp_path / "out", "--questions", small[1], *options)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert "| `ecg` | string | which of the records below" in card.text
    assert "| `array` | list of int16 | lead after lead" in card.text
    assert "| `what` | string | as its source says |" in card.text
    assert "| length | 2 s |" in card.text
    assert card.data.license is None
    assert "# Our ECGs" in card.text
    assert "Recorded in our ward.\n\nLicence: unknown" in card.text
    assert "80% train, 10% validation, 10% test (seed 0)" in card.text
