import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data import build as data_build
from elm_ecg.training.data import parts as data_parts
from elm_ecg.training.data import write as data_write
from elm_ecg.training.data.arguments import BuildArguments
from elm_ecg.training.data.build import build_dataset, make_plan
from elm_ecg.training.data.loading import ecgs_of, load_dataset, load_splits
from elm_ecg.training.data.schema import SPLITS
from elm_ecg.training.data.streams import load_stream
from elm_ecg.training.dataset_commands import main
from forks import Fork
from helpers import tiny_processor

ASKED = {"question": "Is it?", "answer": "yes"}
ALONE = """
import sys
from elm_ecg.training import dataset_commands

dataset_commands.make_parser()
assert not {"torch", "pyarrow", "datasets", "transformers", "trl"} & set(sys.modules)
dataset_commands.main(sys.argv[1:])
assert not {"datasets", "transformers", "trl"} & set(sys.modules)
"""


def microvolts(seed: int, num_samples: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).integers(-2000, 2000, (12, num_samples), dtype=np.int16)


def make_records(folder: Path) -> dict[Any, Any]:
    """The same kind of signal in each form that a record may have."""
    np.savez(folder / "file.npz", ecg=microvolts(3), sampling_rate=100, unit="uV")
    return {
        "record": ECGRecord(microvolts(0).astype(np.float32) / 1000, 100.0, STANDARD_LEADS),
        "dict": {"array": microvolts(1), "sampling_rate": 100, "unit": "uV"},
        17: microvolts(2),
        "path": folder / "file.npz",
    }


def make_questions(*records: Any, **columns: Any) -> list[dict[str, Any]]:
    return [{**ASKED, "record": record, "patient_id": str(record), **columns} for record in records]


@pytest.mark.parametrize("num_proc", [1, 2])
def test_records_of_every_form(num_proc, tmp_path):
    records = make_records(tmp_path)
    questions = make_questions(*records, grade=2)
    options = {"sampling_rate": 100, "unit": "uV", "shares": (0.5, 0.25, 0.25), "num_proc": num_proc}
    options["columns"] = ["grade"]
    with pytest.raises(ValueError, match=r"record record: .*unit"):  # it is in millivolts, whatever is said
        build_dataset(records, questions, **options)
    data = build_dataset({name: records[name] for name in ("dict", 17, "path")}, questions[1:], **options)
    rows = {row["record_id"]: row for split in data.values() for row in split}
    assert sum(map(len, data.values())) == 3
    for seed, name in enumerate(("dict", "17", "path"), 1):
        assert np.array_equal(rows[name]["ecg"]["array"], microvolts(seed))
        assert rows[name]["ecg"]["sampling_rate"] == 100
        assert rows[name]["messages"][1]["content"] == "yes"
        assert [rows[name]["patient_id"], rows[name]["grade"]] == [name, 2]


def test_a_record_of_millivolts(tmp_path):
    data = build_dataset({"a": make_records(tmp_path)["record"]}, make_questions("a", split="test"))
    assert list(data) == ["test"]
    assert np.array_equal(data["test"][0]["ecg"]["array"], microvolts(0))


def test_same_as_the_command(tmp_path, monkeypatch):
    """Of files, of a table about the records, cut and resampled, in several row groups."""
    monkeypatch.setattr(data_build, "TABLE_ROWS", 1)
    monkeypatch.setattr(data_build, "PART_RECORDS", 2)
    (tmp_path / "records").mkdir()
    for seed, name in enumerate("abc"):
        np.save(tmp_path / "records" / f"{name}.npy", microvolts(seed))
    metadata = [{"record": name, "patient_id": number, "site": "x"} for number, name in enumerate("abc")]
    questions = [{**ASKED, "record": name, "what": what} for name in "abc" for what in "pq"]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    (tmp_path / "m.json").write_text(json.dumps(metadata))
    paths = [tmp_path / name for name in ("records", "q.json", "out", "m.json")]
    command = "build {} --questions {} --output_dir {} --metadata {} --metadata_columns site --unit uV --seed 3".format(
        *paths
    )
    main(
        [
            *command.split(),
            *[
                "--sampling_rate",
                "100",
                "--resample",
                "50",
                "--window",
                "5",
                "--join_questions",
                "--shares",
                "0.4",
                "0.3",
                "0.3",
            ],
        ]
    )
    written = {split: load_dataset(str(tmp_path / "out"), split) for split in SPLITS}
    options = {"metadata_columns": ["site"], "seed": 3, "unit": "uV", "sampling_rate": 100, "resample": 50, "window": 5}
    options |= {"join_questions": True, "shares": [0.4, 0.3, 0.3]}
    for records, asked, table in ((paths[0], paths[1], paths[3]), (str(paths[0]), questions, metadata)):
        data = build_dataset(records, asked, metadata=table, **options)
        assert data.num_rows == {"train": 2, "validation": 2, "test": 2}
        for split, rows in data.items():
            assert rows.column_names == written[split].column_names
            for row, of_file in zip(rows, written[split], strict=True):
                (ecg,), (stored,) = ecgs_of(row), ecgs_of(of_file)
                assert np.array_equal(ecg["array"], stored["array"])
                assert [ecg["sampling_rate"], list(ecg["lead_names"])] == [50, stored["lead_names"]]
                assert {**row, "ecg": None} == {**of_file, "ecg": None}
    assert data["test"][1]["ecg"]["array"].shape == (12, 250)
    assert data["test"][1]["start_second"] == 5


def test_two_ecgs_and_a_chat(tmp_path):
    records = make_records(tmp_path)
    chat = [{"role": "user", "content": "Same?"}, {"role": "assistant", "content": "no"}]
    rows = [{"messages": chat, "record": ["dict", "path"]}, {**ASKED, "record": "dict"}]
    data = build_dataset(records, [{**row, "split": "train"} for row in rows])["train"]
    assert sorted(data["record_id"]) == [["dict"], ["dict", "path"]]
    assert sorted(row["messages"][0]["content"] for row in data) == ["Is it?", "Same?"]
    processor = tiny_processor()
    processor.feature_extractor.truncation = "start"
    batch = ELMCollator(processor)([data[0], data[1]])
    assert len(batch["ecg_values"]) == 3


def test_what_is_left_out_is_logged(tmp_path, monkeypatch, caplog):
    records = {**make_records(tmp_path), "broken": tmp_path / "nowhere.edf"}
    as_record = data_parts.as_record

    def noticed(*arguments: Any) -> ECGRecord:
        return replace(as_record(*arguments), metadata={"notices": ("Lead V4R was left out.",)})

    monkeypatch.setattr(data_parts, "as_record", noticed)
    questions = make_questions("record", "dict", "dict", "broken", "unknown", split="train")
    data = build_dataset(records, questions, skip_unreadable=True)
    assert sorted(data["train"]["record_id"]) == ["dict", "dict", "record"]
    assert "Lead V4R was left out. (records: 2)" in caplog.messages
    assert "Left out: questions whose records are not there (1)" in caplog.messages
    assert "Left out: records that cannot be read, and their questions (1)" in caplog.messages
    assert any(message.startswith("Cannot read broken: ") for message in caplog.messages)


@pytest.mark.parametrize("resample", [None, 50])
def test_windows_without_a_gap(resample, caplog):
    array = np.random.default_rng(0).normal(0, 0.3, (12, 1000))
    gappy = array.copy()
    gappy[3, 210:290] = np.nan  # within the third second
    records = {name: {"array": ecg, "sampling_rate": 100} for name, ecg in (("whole", array), ("gappy", gappy))}
    data = build_dataset(records, make_questions(*records, split="train"), window=1, resample=resample)["train"]
    starts = {
        name: [s for s, r in zip(data["start_second"], data["record_id"], strict=True) if r == name] for name in records
    }
    around = 0 if resample is None else 1  # the filter of resampling reaches into the seconds beside it
    assert starts["whole"] == list(range(10))
    assert starts["gappy"] == [s for s in range(10) if not 2 - around <= s <= 2 + around]
    assert f"Left out: windows with a gap (NaN), in 1 record ({10 - len(starts['gappy'])})" in caplog.messages
    rows = {(r, s): e["array"] for r, s, e in zip(data["record_id"], data["start_second"], data["ecg"], strict=True)}
    for start in starts["gappy"]:
        np.testing.assert_array_equal(rows["gappy", start], rows["whole", start])
    with pytest.raises(ValueError, match=r"Each window of 10 s has a gap \(NaN\); cut shorter ones with `window`"):
        build_dataset({"gappy": records["gappy"]}, make_questions("gappy", split="train"), window=10)
    with pytest.raises(ValueError, match="gap"):
        build_dataset({"gappy": records["gappy"]}, make_questions("gappy", split="train"))


def test_reported_gap_and_hdf5(shared, tmp_path, caplog):
    header = shared / "data/reported/mixedsignals/mixedsignals.hea"
    data = build_dataset({"a": header}, make_questions("a", split="train"), window=10)["train"]
    assert len(data) == 22  # of 23 windows in 230 s
    assert "Left out: windows with a gap (NaN), in 1 record (1)" in caplog.messages
    part = shared / "data/reported/code15_exams_part0_2records.hdf5"
    data = build_dataset(part, make_questions(1169160, 2873686, split="train"))["train"]
    assert sorted(data["record_id"]) == ["1169160", "2873686"]
    assert data[0]["ecg"]["sampling_rate"] == 400
    assert np.shape(data[0]["ecg"]["array"]) == (12, 4096)


@pytest.mark.parametrize(
    ("records", "questions", "options", "message"),
    [
        ({}, [{**ASKED, "record": "a"}], {}, "The mapping of records is empty"),
        ({17: 1, "17": 2}, [{**ASKED, "record": 17}], {}, "The mapping holds 2 records, but 1 different ids"),
        (
            {"a": 1},
            [{**ASKED, "record": "a"}, {**ASKED, "record": "a", "answer": " "}],
            {},
            "Question 2: What the assistant",
        ),
        ({"a": 1}, [], {}, "None of the 0 questions is about one of the 1 records"),
        ({"a": 1}, None, {}, "There are no questions about the records: name a file with `questions`"),
        ({"a": 1}, [{**ASKED, "record": "a", "split": "test"}], {}, "Cannot read the record a: "),
        (
            {"a": 1},
            [{**ASKED, "record": "a"}],
            {"split_by": "site"},
            "`split_by` is 'site'; expected one of given, fold",
        ),
        ({"a": 1}, make_questions("a"), {"shares": (0.5, 0.5)}, "`shares` is 0.5 0.5; expected three"),
        ({"a": 1}, make_questions("a"), {"metadata": []}, "The metadata has the columns ; expected one of record"),
        ({"a": 1}, make_questions("a"), {"resample": 0}, "`resample` is 0; expected a number above 0"),
    ],
)
def test_at_fault(records, questions, options, message):
    with pytest.raises(ValueError, match=message):
        build_dataset(records, questions, **options)


def test_unknown_option():
    with pytest.raises(
        TypeError, match=r"^build_dataset has no argument share\. Did you mean shares\? It has columns, "
    ):
        build_dataset({"a": 1}, make_questions("a"), share=1)


PERSONAL = {
    "Name": "Meyer",
    "Geburtsdatum": "1950-01-02",
    "email": "a@b.de",
    "Fallnummer": 7,
    "ward": {"name": "Meyer"},
}


def test_columns_are_kept_by_name_alone(caplog):
    """Those that scores go by are; of others none that is not named, and all that are not kept are told."""
    known = {"question_type": "rhythm", "template_id": 3, "age": 61}
    questions = make_questions("a", "b", split="train", site="x", **known, **PERSONAL)
    record = {"array": microvolts(0), "sampling_rate": 100, "unit": "uV"}
    records = {"a": record, "b": record}
    data = build_dataset(records, questions)["train"]
    assert {*data.column_names} == {"ecg", "messages", "record_id", "patient_id", *known}
    names = ", ".join(["site", *PERSONAL])
    assert f"Columns of the questions that are not kept: {names} (`columns` NAME keeps one)" in caplog.text
    caplog.clear()
    data = build_dataset(records, questions, columns=["site", "case=Fallnummer"])["train"]
    assert {*data.column_names} == {"ecg", "messages", "record_id", "patient_id", *known, "site", "case"}
    assert data["case"][:] == [7, 7]
    assert "site" not in caplog.text
    with pytest.raises(ValueError, match="Question 1 has no column sight; it has question, answer"):
        build_dataset(records, questions, columns=["sight"])


KILLED = """
import os, signal, sys
from pathlib import Path

from elm_ecg.training.data import build, parts, write
from elm_ecg.training.dataset_commands import main

build.PART_RECORDS = 1
moment, output = sys.argv[1:3]
read, write_text, replace = parts.read_part, write.write_text, os.replace


def kill_if(condition):
    if condition:
        os.kill(os.getpid(), signal.SIGKILL)


def second_part(part, *arguments):
    kill_if(moment in ("part", "process") and len(list(Path(output).glob(".unfinished/parts/*.json"))) >= 2)
    return read(part, *arguments)


def moving(source, target):
    kill_if(moment == "end" and Path(source).name == "data")
    replace(source, target)


write.read_part, os.replace = second_part, moving
main(sys.argv[3:])
"""


@pytest.fixture
def four(tmp_path) -> list[str]:
    """The command that builds a dataset of four records, but for its folder."""
    (tmp_path / "records").mkdir()
    for seed, name in enumerate("abcd"):
        np.savez(tmp_path / "records" / f"{name}.npz", ecg=microvolts(seed), sampling_rate=100, unit="uV")
    questions = [
        *make_questions(*"abcd", split="train"),
        {**ASKED, "record": "c", "question": "What?", "split": "train"},
    ]
    (tmp_path / "q.json").write_text(json.dumps(questions))
    return f"build {tmp_path}/records --questions {tmp_path}/q.json --name four --output_dir".split()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("moment", ["part", "process", "end"])
def test_killed_and_repeated(moment, four, tmp_path, monkeypatch):
    """What was done is not done again, and the dataset is that of a build which was not interrupted."""
    out = tmp_path / "out" / "set"
    options = ["--num_proc", "2"] if moment == "process" else []
    command = [*four, str(out), *options]
    killed = Fork(KILLED, moment, str(out), *command, cwd=tmp_path, environment={**os.environ}, project=True).finish()
    if moment == "process":
        assert (
            "A process that read records was killed, perhaps for want of memory. The same command goes on"
            in killed.stderr
        )
    else:
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = len(list(out.glob(".unfinished/parts/*.json")))
    # another process may end its part before it is told
    assert done in {"part": [2], "process": [2, 3], "end": [4]}[moment]
    with pytest.raises(ValueError, match="is not finished: repeat the `elm data build` that was interrupted"):
        load_splits(str(out))
    monkeypatch.setattr(data_build, "PART_RECORDS", 1)
    with pytest.raises(
        ValueError, match="holds the beginning of another dataset: other records, questions, tables or options"
    ):
        main([*command, "--seed", "1"])
    read = []
    as_record = data_parts.as_record
    monkeypatch.setattr(data_parts, "as_record", lambda path, *said: read.append(path) or as_record(path, *said))
    main([*four, str(out)])
    assert len(read) == 4 - done
    main([*four, str(tmp_path / "whole" / "set")])
    assert contents(out) == contents(tmp_path / "whole" / "set")
    with pytest.raises(ValueError, match="is there and not empty"):
        main(command)


@pytest.mark.parametrize("together", [False, True])
def test_shards(together, four, tmp_path, monkeypatch, capsys):
    """Each writes its parts, into the same folder or into one of its own, and all together are what one build writes."""
    monkeypatch.setattr(data_build, "PART_RECORDS", 1)
    folders = [tmp_path / ("merged" if together else f"shard{number}") / "set" for number in (1, 2, 3)]
    for number, folder in enumerate(folders, 1):
        main([*four, str(folder), "--shard", f"{number}/3"])
    merged = tmp_path / "merged" / "set"
    if not together:
        assert "1 of 4 parts are in" in capsys.readouterr().out
        for folder in folders:
            shutil.copytree(folder, merged, dirs_exist_ok=True)
        main([*four, str(merged)])
    main([*four, str(tmp_path / "whole" / "set")])
    assert contents(merged) == contents(tmp_path / "whole" / "set")


def test_shards_of_machines_that_hold_the_records_elsewhere(four, tmp_path, monkeypatch):
    monkeypatch.setattr(data_build, "PART_RECORDS", 1)
    shutil.copytree(tmp_path / "records", tmp_path / "mount" / "ecgs")
    main([*four, str(tmp_path / "one" / "set"), "--shard", "1/2"])
    elsewhere = ["build", str(tmp_path / "mount" / "ecgs"), *four[2:]]
    main([*elsewhere, str(tmp_path / "one" / "set"), "--shard", "2/2"])
    main([*four, str(tmp_path / "whole" / "set")])
    assert contents(tmp_path / "one") == contents(tmp_path / "whole")
    with pytest.raises(
        ValueError, match=r"holds a dataset\. If it is what the other shards have ended, nothing is left"
    ):
        main([*four, str(tmp_path / "one" / "set"), "--shard", "1/2"])


@pytest.mark.parametrize("moment", ["parts", "records", "data", ".unfinished"])
def test_two_shards_end_at_the_same_time(moment, four, tmp_path, monkeypatch, capsys):
    """Before one of them has read what was found, or moved something, the other does all."""
    monkeypatch.setattr(data_build, "PART_RECORDS", 1)
    out = tmp_path / "out" / "set"
    main([*four, str(out), "--shard", "1/2"])
    write_parts, replace = data_write._write_parts, os.replace

    def other() -> None:
        monkeypatch.setattr(data_write, "_write_parts", write_parts)
        monkeypatch.setattr(os, "replace", replace)
        main([*four, str(out), "--shard", "1/2"])

    def writing(*arguments: Any) -> None:
        write_parts(*arguments)
        if moment == "parts":
            other()

    def moving(source: Path, target: Path) -> None:
        if Path(source).name == moment:
            other()
        replace(source, target)

    monkeypatch.setattr(data_write, "_write_parts", writing)
    monkeypatch.setattr(os, "replace", moving)
    main([*four, str(out), "--shard", "2/2"])
    assert ("Another shard has ended the dataset in" in capsys.readouterr().out) == (moment == "parts")
    main([*four, str(tmp_path / "whole" / "set")])
    assert contents(out) == contents(tmp_path / "whole" / "set")


def test_killed_while_what_is_done_is_removed(four, tmp_path, monkeypatch):
    """The dataset is whole."""
    remove = shutil.rmtree

    def killed(folder: Path, **options: Any) -> None:
        if folder.parent == tmp_path / "out":
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        main([*four, str(tmp_path / "out")])
    assert len(load_dataset(str(tmp_path / "out"), "train")) == 5


@pytest.mark.parametrize("damage", ["missing", "cut", "other", "found"])
def test_a_part_that_is_not_whole_is_made_again(damage, four, tmp_path, monkeypatch):
    """As where it was copied while it was written, or the power failed."""
    monkeypatch.setattr(data_build, "PART_RECORDS", 1)
    out = tmp_path / "out" / "set"
    main([*four, str(out), "--shard", "1/2"])
    work = out / ".unfinished"
    one, two = sorted((work / "records").iterdir())
    if damage == "missing":
        (work / "data" / one.name).unlink()
    elif damage == "cut":
        one.write_bytes(one.read_bytes()[:-9])
    elif damage == "other":
        (work / "data" / one.name).write_bytes(b"")
    else:
        (work / "parts" / f"{two.stem}.json").write_text("")
    main([*four, str(out)])
    main([*four, str(tmp_path / "whole" / "set")])
    assert contents(out) == contents(tmp_path / "whole" / "set")


def test_skip_unreadable_goes_on_after_an_error(four, tmp_path, monkeypatch):
    """It is what the error of a record advises, after hours perhaps; and a part that lacks a record is not done without it."""
    monkeypatch.setattr(data_build, "PART_RECORDS", 1)
    out = tmp_path / "out" / "set"
    order = make_plan(four[1], Path(four[3]), BuildArguments()).orders["train"]
    file = tmp_path / "records" / f"{order[1]}.npz"
    whole = file.read_bytes()
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(
        ValueError, match=rf"Cannot read the record {order[1]}: .*\(--skip_unreadable leaves such out\.\)"
    ):
        main([*four, str(out)])
    read = []
    as_record = data_parts.as_record
    monkeypatch.setattr(data_parts, "as_record", lambda path, *said: read.append(path.stem) or as_record(path, *said))
    main([*four, str(out), "--skip_unreadable", "--shard", "2/4"])
    assert read == [order[1]]
    file.write_bytes(whole)
    main([*four, str(out)])
    assert read == [order[1], *order[1:]]
    main([*four, str(tmp_path / "whole" / "set")])
    assert contents(out) == contents(tmp_path / "whole" / "set")


def test_parts_without_rows(four, tmp_path, monkeypatch):
    """Of records that cannot be read: `datasets` reads no file without rows."""
    monkeypatch.setattr(data_build, "PART_RECORDS", 1)
    for name in "abd":
        (tmp_path / "records" / f"{name}.npz").write_bytes(b"PK\x03\x04")
    main([*four, str(tmp_path / "out"), "--skip_unreadable"])
    data = load_dataset(str(tmp_path / "out"), "train")
    assert data["record_id"][:] == ["c", "c"]
    assert len(ecgs_of(data[0])[0]["array"]) == 12
    streamed = load_stream(DataArguments(data=[str(tmp_path / "out")]), "train")
    assert [len(ecgs_of(row)[0]["array"]) for row in streamed] == [12, 12]


def test_a_folder_that_cannot_be_removed(four, tmp_path, monkeypatch):
    """As where a disk is mounted: what was wrong is told all the same."""

    def busy(folder: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(folder))

    monkeypatch.setattr(Path, "rmdir", busy)
    for file in (tmp_path / "records").iterdir():
        file.write_bytes(b"PK\x03\x04")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="Cannot read the record"):
        main([*four, str(tmp_path / "out")])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("place", "name"), [("records/out", "RECORDS"), ("questions/sub/out", "--questions")])
def test_output_among_what_is_read(place, name, four, tmp_path):
    (tmp_path / "questions").mkdir()
    shutil.copy(tmp_path / "q.json", tmp_path / "questions")
    (tmp_path / "link").symlink_to(tmp_path / place.split("/")[0])
    for out in (tmp_path / place, tmp_path / "link" / "out"):
        with pytest.raises(ValueError, match=f"out is in the folder of {name}, .* would be read as such; name another"):
            main([*four[:2], "--questions", f"{tmp_path}/questions", "--output_dir", str(out)])
        assert not out.exists()


def test_a_name_that_is_no_text(four, tmp_path):
    shutil.copy(tmp_path / "records" / "a.npz", os.fsencode(tmp_path / "records") + b"/z\xff.npz")
    message = r"The name of the record 'z\\udcff' is not in UTF-8; rename its file"
    with pytest.raises(ValueError, match=message):
        main([*four[:2], "--no_questions", "--split_by", "record", "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "a/b"])
def test_no_shard(shard, four, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*four, str(tmp_path / "out"), "--shard", shard])
    assert f"argument --shard: is '{shard}'; expected the share and their number" in capsys.readouterr().err


def test_records_without_questions(four, tmp_path):
    """For pretraining: each record is a row, with what is known of it."""
    table = [{"record": name, "patient_id": name, "age": 60, "site": "x"} for name in "abcd"]
    (tmp_path / "m.json").write_text(json.dumps(table))
    options = f"--no_questions --metadata {tmp_path}/m.json --metadata_columns site --shares 1 0 0".split()
    main(["build", str(tmp_path / "records"), "--output_dir", str(tmp_path / "out"), *options])
    data = load_dataset(str(tmp_path / "out"), "train")
    assert data.column_names == ["ecg", "record_id", "patient_id", "age", "site"]
    assert sorted(data["record_id"]) == list("abcd")
    assert ecgs_of(data[0])[0]["array"].shape == (12, 1000)
    with pytest.raises(ValueError, match="--no_questions does not go with --questions;"):
        main([*four, str(tmp_path / "both"), "--no_questions"])
    options = {"no_questions": True, "question_types": ["x"], "join_questions": True}
    with pytest.raises(ValueError, match="`no_questions` does not go with `question_types` and `join_questions`"):
        build_dataset({"a": np.ones((12, 500))}, **options)


def test_split_by_record(four, tmp_path):
    """Where nobody knows the patients."""
    main([*four, str(tmp_path / "out"), "--split_by", "record", "--shares", "0.5", "0.25", "0.25"])
    ids = [set(load_dataset(str(tmp_path / "out"), split)["record_id"]) for split in SPLITS]
    assert [len(names) for names in ids] == [2, 1, 1]
    assert set.union(*ids) == set("abcd")
    assert "No record is in two; a patient may be." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("part_records", [1, 8])
def test_a_question_needs_all_of_its_records(part_records, tmp_path, monkeypatch):
    """Wherever the one lies that cannot be read: in the same part, or in one that another process reads."""
    monkeypatch.setattr(data_build, "PART_RECORDS", part_records)
    records = {
        **{name: {"array": microvolts(0), "sampling_rate": 100, "unit": "uV"} for name in "abcd"},
        "x": tmp_path / "x.edf",
    }
    pairs = [["a", "b"], ["x", "a"], ["c", "x"], ["d", "c"]]
    questions = [{**ASKED, "record": pair, "split": "train"} for pair in pairs]
    data = build_dataset(records, questions, skip_unreadable=True)["train"]
    assert sorted(data["record_id"]) == [["a", "b"], ["d", "c"]]
    assert all(len(ecgs_of(row)) == 2 for row in data)


def test_imports_are_few(tmp_path):
    """Where a dataset is built, nobody waits for the libraries that train models."""
    np.savez(tmp_path / "a.npz", ecg=microvolts(0), sampling_rate=100, unit="uV")
    (tmp_path / "q.json").write_text(json.dumps(make_questions("a")))
    paths = [str(tmp_path / name) for name in ("a.npz", "q.json", "out")]
    arguments = ["build", paths[0], "--questions", paths[1], "--output_dir", paths[2]]
    subprocess.run([sys.executable, "-c", ALONE, *arguments], check=True)
    assert (tmp_path / "out" / "README.md").is_file()
