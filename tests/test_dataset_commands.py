import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from transformers import AutoTokenizer

from elm_ecg.training import cli
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.data import simulated_reports
from elm_ecg.training.data.loading import ecgs_of, load_data
from elm_ecg.training.data.record_rows import load_records, report_of
from elm_ecg.training.data.reference import DATASETS
from elm_ecg.training.dataset_commands import main
from helpers import environment_of
from loopback_hub import LoopbackHub, run_on_hub

ROWS = [
    {"record": "a", "question": "Is it?", "answer": "yes", "split": "train"},
    {"record": "b", "question": "Is it?", "answer": "no", "split": "test"},
]

PUSH = """
from elm_ecg.training.dataset_commands import main

for _ in range(2):
    main(["push", {data!r}, "--repo_id", "user/ecgs"])
main(["push", {data!r}, "--repo_id", "user/ecgs", "--revision", "first"])
"""
LOAD = """
import importlib.util, json
from datasets import load_dataset

assert not any(map(importlib.util.find_spec, ("training", "ecg_utils", "torch")))
loaded = load_dataset("user/ecgs", revision="first")
print(json.dumps({split: list(rows) for split, rows in loaded.items()}))
"""


JOIN = """
import json
from elm_ecg import ecgs_of, load_dataset
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.data.streams import load_stream

whole = load_dataset("user/ecgs", "train", revision="first")
stream = load_stream(DataArguments(data=["user/ecgs"]), "train")
print(json.dumps([ecgs_of(next(iter(rows)))[0]["array"].tolist() for rows in (whole, stream)]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A dataset of two rows in `data`, the same without licence in `unlicensed`."""
    folder = tmp_path_factory.mktemp("push")
    (folder / "records").mkdir()
    for seed, name in enumerate("ab"):
        array = np.random.default_rng(seed).normal(0, 0.1, (12, 200))
        np.savez(folder / "records" / f"{name}.npz", ecg=array, sampling_rate=100)
    (folder / "questions.json").write_text(json.dumps(ROWS))
    arguments = ["build", str(folder / "records"), "--questions", str(folder / "questions.json"), "--output_dir"]
    main([*arguments, str(folder / "data"), "--license", "cc0-1.0"])
    main([*arguments, str(folder / "unlicensed")])
    return folder


def test_list(capsys):
    assert cli.main(["data", "list"]) == 0
    output = capsys.readouterr().out
    assert all(f"{key} " in output and text in output for key, text in DATASETS.items())


@pytest.mark.slow
def test_push_and_load(folder, tmp_path):
    """What is pushed is loaded by its id, where there is nothing but `datasets`; what did not change makes no commit."""
    with LoopbackHub() as hub:
        said = run_on_hub(PUSH.format(data=str(folder / "data")), hub, tmp_path)
        rows = run_on_hub(LOAD, hub, tmp_path, environment_of(["datasets"], tmp_path / "stranger"))
        joined = run_on_hub(JOIN, hub, tmp_path)
        pushed = hub.files("user/ecgs", repo_type="dataset")
        commits = {name for name in hub.repos["datasets/user/ecgs"] if len(name) == 40}
    assert said.count(f"5 files in {hub.url}/datasets/user/ecgs\n") == 1
    assert said.count(f"{hub.url}/datasets/user/ecgs holds all of it already; nothing was sent.") == 2
    card = pushed.pop("README.md").decode()
    assert card in hub.cards  # the Hub has validated it
    (tag,) = (name for name in hub.repos["datasets/user/ecgs"] if name.startswith("elm-"))
    assert f'load_dataset("user/ecgs", "train", revision="{tag}")' in card
    assert f"howpublished = {{{hub.url}/datasets/user/ecgs}}" in card
    files = [file for part in ("data", "records") for file in (folder / "data" / part).glob("*.parquet")]
    assert pushed == {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files}
    assert len(commits) == 2  # the empty one of a new repository, and one
    local = load_dataset(str(folder / "data"), cache_dir=str(tmp_path))
    assert json.loads(rows) == {split: list(part) for split, part in local.items()}
    microvolts = np.rint(1000 * np.load(folder / "records" / "a.npz")["ecg"]).astype(int).tolist()
    assert json.loads(joined) == [microvolts] * 2


def test_simulate(tmp_path, monkeypatch, capsys):
    """All sets load as `--data`, and the language model has a token for each of their words."""
    monkeypatch.setattr(simulated_reports, "HELD_OUT", {"validation": 1, "test": 2})
    folder = tmp_path / "ecgs"
    main(["simulate", str(folder), "--num_records", "3", "4", "5", "--sampling_rate", "100", "--num_proc", "1"])
    said = capsys.readouterr().out
    assert all(
        f"{kind}: {number} records" in said for kind, number in zip(simulated_reports.KINDS, (3, 4, 5), strict=True)
    )
    assert {path.name for path in folder.iterdir()} == {"reports", "reasoning", "answers", "llm"}
    for kind, number in zip(simulated_reports.KINDS, (3, 4, 5), strict=True):
        args = DataArguments(data=[str(folder / kind)])
        for split, size in {"train": number, "validation": 1, "test": 2}.items():
            rows = load_records(args, split, report_column="report") if kind == "reports" else load_data(args, split)
            assert len(rows) == size
            assert ecgs_of(rows[0])[0]["array"].shape == (12, 1000)
        if kind == "reports":
            assert report_of(rows[0], "report").endswith(".")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    text = load_data(DataArguments(data=[str(folder / "reasoning")]), "test")[0]["messages"][1]["content"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    with pytest.raises(ValueError, match="is there and not empty"):
        main(["simulate", str(folder)])


@pytest.mark.parametrize("options", [["--num_records", "1", "2"], ["--num_records", "0", "1", "1"], ["--seed", "x"]])
def test_simulate_refuses(options, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main(["simulate", str(tmp_path / "ecgs"), *options])


def test_simulate_leaves_nothing_of_what_cannot_be_made(tmp_path):
    with pytest.raises(ValueError, match=r"--sampling_rate 50: .*at least 100"):
        main(["simulate", str(tmp_path / "ecgs"), "--sampling_rate", "50"])
    with pytest.raises(ValueError, match="--seed is -1; it must be at least 0"):
        main(["simulate", str(tmp_path / "ecgs"), "--seed", "-1"])
    with pytest.raises(
        ValueError, match=r"--no_signal is 1\.0; expected a share of the records, from 0 to less than 1"
    ):
        main(["simulate", str(tmp_path / "ecgs"), "--no_signal", "1"])
    assert list(tmp_path.iterdir()) == []


def without_card(data: Path) -> None:
    (data / "README.md").unlink()


def with_another_file(data: Path) -> None:
    (data / "patients.csv").write_text("name")


def with_a_deep_file(data: Path) -> None:
    (data / "data" / "old").mkdir()
    (data / "data" / "old" / "train.parquet").write_bytes(b"")


def with_unknown_licence(data: Path) -> None:
    card = data / "README.md"
    card.write_text(card.read_text().replace("license: cc0-1.0", "license: unknown"))


def without_data(data: Path) -> None:
    shutil.rmtree(data / "data")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_card, "has no card"),
        (
            with_another_file,
            r"holds patients\.csv; only README\.md, data/\*\.parquet and records/\*\.parquet are pushed",
        ),
        (with_a_deep_file, r"holds data/old/train\.parquet; only"),
        (with_unknown_licence, "names no licence"),
        (without_data, "holds no dataset"),
    ],
)
def test_refuses(change, message, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "any")
    data = shutil.copytree(folder / "data", tmp_path / "data")
    change(data)
    with pytest.raises(ValueError, match=message):
        main(["push", str(data), "--repo_id", "user/ecgs"])


def test_shows_what_it_would_send(folder, monkeypatch, capsys):
    """Without a login, and without the Hub."""
    monkeypatch.setattr("elm_ecg.training.sharing.push.get_token", lambda: None)
    assert cli.main(["data", "push", str(folder / "data"), "--repo_id", "user/ecgs", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "README.md, data/test-00000-of-00001.parquet, data/train-00000-of-00001.parquet, records/test-" in said
    assert "train-00000-of-00001.parquet: 1 row of ecg, messages, record_id" in said
    assert "'content': 'Is it?'" in said
    assert "Nothing was sent" in said


def test_columns_that_were_kept_by_name_are_allowed_by_name(folder, tmp_path, capsys):
    (tmp_path / "q.json").write_text(json.dumps([{**row, "ward": "B2"} for row in ROWS]))
    arguments = ["--questions", str(tmp_path / "q.json"), "--output_dir", str(tmp_path / "data"), "--license", "mit"]
    main(["build", str(folder / "records"), *arguments, "--columns", "ward"])
    push = ["push", str(tmp_path / "data"), "--repo_id", "user/ecgs", "--dry_run"]
    with pytest.raises(ValueError, match=r"ward is no column .*: --allow ward$"):
        main(push)
    main([*push, "--allow", "ward"])
    assert "Nothing was sent" in capsys.readouterr().out


def test_refuses_without_login(folder, monkeypatch, capsys):
    monkeypatch.setattr("elm_ecg.training.sharing.push.get_token", lambda: None)
    assert cli.main(["data", "push", str(folder / "data"), "--repo_id", "user/ecgs"]) == 1
    assert "elm data: Nobody is logged in to the Hub" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["build", "x"], ["build", "x", "--output_dir", "y", "--num_proc", "0"]])
def test_usage(argv):
    with pytest.raises(SystemExit, match="2"):
        main(argv)
