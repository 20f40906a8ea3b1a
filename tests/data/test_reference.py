import json
import time
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.loading import ecgs_of, load_data, load_ecgs
from elm_ecg.training.data.reference import DATASETS, clean, is_key, to_messages
from elm_ecg.training.data.streams import load_stream
from helpers import tiny_processor
from loopback_hub import LoopbackHub, run_on_hub

TURNS = [{"from": "human", "value": "<ecg>\nIs this image normal?"}, {"from": "gpt", "value": "Assistant: yes"}]
ROLES = [{"role": "user", "content": "Rhythm?"}, {"role": "assistant", "content": "sinus"}]
TRIPLE = ["single-verify", "Is there atrial fibrillation?", ["no", "not sure"]]
# of each form: what `text` holds, the ECG
ROWS = [(TURNS, "a/1.npz"), (ROLES, "a/2.npz"), (TRIPLE, "noise"), ("sinus rhythm", "flatline")]


@pytest.fixture(scope="module")
def ecgs(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ecgs")
    (root / "a").mkdir()
    for number in (1, 2):
        np.savez(root / "a" / f"{number}.npz", array=np.full((12, 500), float(number)), sampling_rate=250)
    return root


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """The files of a Hub dataset of the reference, two folds of train and test."""
    folder = tmp_path_factory.mktemp("hub") / "ecg-qa-ptbxl-250-500"
    (folder / "data").mkdir(parents=True)
    for fold in (1, 2):
        for split, rows in (("train", ROWS), ("test", ROWS[:fold])):
            table = [{"ecg_path": ecg, "text": json.dumps(text), "name": "ecg-qa"} for text, ecg in rows]
            Dataset.from_list(table).to_parquet(folder / "data" / f"fold{fold}_{split}-00000-of-00001.parquet")
    return folder


def arguments(parquet: Path, ecgs: Path | None, **options) -> DataArguments:
    return DataArguments(data=[str(parquet)], ecg_root=ecgs and str(ecgs), **options)


def test_four_forms_of_text(parquet, ecgs):
    rows = load_data(arguments(parquet, ecgs, fold=1), "train")
    said = [[(turn["role"], turn["content"]) for turn in messages] for messages in rows["messages"]]
    assert said == [
        [("user", "Is this signal normal?"), ("assistant", "yes")],
        [("user", "Rhythm?"), ("assistant", "sinus")],
        [("user", "Is there atrial fibrillation?"), ("assistant", "no; not sure")],
        [("user", ""), ("assistant", "sinus rhythm")],
    ]
    assert rows["question_type"][:] == ["ecg-qa", "ecg-qa", "single-verify", "ecg-qa"]


def test_files_noise_and_flatlines(parquet, ecgs):
    rows = load_data(arguments(parquet, ecgs, fold=1), "train")
    batch = ELMCollator(tiny_processor())(list(rows))
    values = batch["ecg_values"].numpy()
    assert (values[0] == 1).all()
    assert (values[1] == 2).all()
    assert values[2].std() == pytest.approx(1, abs=0.05)
    assert (values[3] == 0).all()
    noise = ecgs_of(rows[2])[0]
    assert noise["array"].shape == (12, 500)  # as the key says
    assert np.array_equal(noise["array"], ecgs_of(rows[2])[0]["array"])
    assert ecgs_of(load_ecgs(arguments(parquet, ecgs, fold=1), "train")[3])[0]["array"].shape == (12, 500)


def test_folds(parquet, ecgs):
    assert [len(load_data(arguments(parquet, ecgs, fold=fold), "test")) for fold in (1, 2)] == [1, 2]
    assert load_data(arguments(parquet, ecgs, fold=1), "validation") is None
    with pytest.raises(ValueError, match=r"has the folds 1, 2; choose one with --fold"):
        load_data(arguments(parquet, ecgs), "train")
    with pytest.raises(ValueError, match=r"--fold 3, but .* has the folds 1, 2"):
        load_data(arguments(parquet, ecgs, fold=3), "train")


def test_streamed_rows_are_those_of_the_whole_dataset(parquet, ecgs):
    args = arguments(parquet, ecgs, fold=2)
    whole = load_data(args, "train")
    streamed = list(load_stream(args, "train"))
    assert [row["messages"] for row in streamed] == whole["messages"][:]
    assert [row["ecg"] for row in streamed] == whole["ecg"][:].tolist()


def test_missing_files(parquet, ecgs, tmp_path):
    with pytest.raises(ValueError, match=r"such as 'a/1.npz'; say under which folder they are with --ecg_root"):
        load_data(arguments(parquet, None, fold=1), "train")
    with pytest.raises(FileNotFoundError, match=r"the ECG 'a/1.npz', but there is no such file under --ecg_root"):
        load_data(arguments(parquet, tmp_path, fold=1), "train")


@pytest.mark.parametrize("missing", ["ecg_path", "text"])
def test_rows_without_a_path_or_text(missing, ecgs, tmp_path):
    rows = [{"ecg_path": path, "text": json.dumps(text), "name": "ecg-qa"} for text, path in ROWS]
    rows[1][missing] = None
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"Row 1: It has no ecg_path or no text"):
        load_data(arguments(tmp_path, ecgs), "train")


def test_mixed_with_another_form(parquet, ecgs, tmp_path):
    """Paths and arrays in one dataset, in weighted turns."""
    ecg = {"array": [[0.5] * 500] * 12, "sampling_rate": 250, "unit": "mV"}
    Dataset.from_list([{"messages": ROLES, "ecg": ecg}] * 40).to_parquet(tmp_path / "train.parquet")
    names = [str(parquet), str(tmp_path)]
    mixed = load_data(DataArguments(data=names, ecg_root=str(ecgs), fold=1), "train")
    batch = ELMCollator(tiny_processor())([mixed[0], mixed[1], mixed[2], mixed[43]])
    assert batch["ecg_values"][:, 0, 0].tolist()[:2] == [1, 2]
    assert batch["ecg_values"][3, 0, 0] == 0.5
    weighted = load_data(DataArguments(data=names, ecg_root=str(ecgs), fold=1, data_weights=[1, 3]), "train", 5)
    of_reference = [row is not None for row in weighted["record_id"]]
    assert 0.15 < np.mean(of_reference) < 0.35
    assert of_reference != sorted(of_reference)
    assert len(weighted) - sum(of_reference) >= 40
    again = load_data(DataArguments(data=names, ecg_root=str(ecgs), fold=1, data_weights=[1, 3]), "train", 5)
    assert again["record_id"][:] == weighted["record_id"][:]


def test_key_on_the_hub(parquet, ecgs, tmp_path):
    """The key alone, its owner's id, and another owner's copy."""
    with LoopbackHub() as hub:
        for owner in ("willxxy", "ELM-Research"):
            repo = f"datasets/{owner}/{parquet.name}"
            hub.repos[repo] = {}
            files = {str(file.relative_to(parquet)): file.read_bytes() for file in parquet.rglob("*.parquet")}
            hub.commit(repo, "main", files)
        code = f"""
from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.data.streams import load_stream
for name in ("{parquet.name}", "willxxy/{parquet.name}", "ELM-Research/{parquet.name}"):
    args = DataArguments(data=[name], fold=2, ecg_root={str(ecgs)!r})
    print(len(load_data(args, "train")), load_data(args, "test")[1]["messages"][1]["content"])
print(len(list(load_stream(args, "train"))))
try:
    load_data(DataArguments(data=["ecg-qa-cot"], fold=1), "train")
except OSError as error:
    print(type(error).__name__, "willxxy/ecg-qa-cot" in str(error))
"""
        printed = run_on_hub(code, hub, tmp_path).splitlines()
    assert [line for line in printed if not line.startswith("Generating")] == [
        *["4 sinus"] * 3,
        "4",
        "DatasetNotFoundError True",
    ]


# a line for each part of the rule by which the reference cleans its texts
CLEANED = [
    ("<image>\n\n Is it?", "Is it?"),  # a tag goes with the white space after it
    ("Is it?\n<image>", "Is it?\n"),  # and not with that before it
    ("Compare < image > with <ECG>\tthis.", "Compare with this."),
    (" Is it?\n", " Is it?\n"),  # white space round the text stays
    ("user: Is it?", "Is it?"),
    ("User : Is it?", "Is it?"),
    ("human: user: Q: Is it?", "Is it?"),  # as often as there are any
    ("model: yes", "yes"),
    ("SYSTEM: Be brief.", "Be brief."),
    ("gpt: assistant:\nyes", "yes"),
    (": yes", "yes"),
    ("A: sinus rhythm", "sinus rhythm"),
    ("<image>\nuser: Is it?", "Is it?"),
    ("Does this Image or that image show it?", "Does this Signal or that signal show it?"),
    ("THE IMAGE, iMAGE", "THE Signal, signal"),
    ("images, IMAGES, imagery, imaging", "images, IMAGES, imagery, imaging"),  # no plural
    ("an image's edge: image-based", "an signal's edge: signal-based"),
    ("Query: A: no", "Query: A: no"),  # only at the beginning, and only roles
    ("The model: a user: no", "The model: a user: no"),
    ("AV block", "AV block"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), CLEANED)
def test_clean(text, expected):
    assert clean(text) == expected


def test_cleaning_takes_time_with_the_length_of_a_text():
    start = time.process_time()
    assert clean(f"{' ' * 40_000}x").strip() == "x"  # 4 s with its square
    assert time.process_time() - start < 1


def test_a_text_of_lists_in_lists():
    with pytest.raises(ValueError, match="is no chat"):
        to_messages("[" * 100_000)


@pytest.mark.parametrize("asks", ["human", "Human", "user", "USER"])
@pytest.mark.parametrize("answers", ["gpt", "GPT", "model", "Assistant"])
def test_roles(asks, answers):
    for keys in (("from", "value"), ("role", "content")):
        turns = [
            dict(zip(keys, turn, strict=True)) for turn in (("System", "Be brief."), (asks, "Is it?"), (answers, "yes"))
        ]
        messages, _ = to_messages(json.dumps(turns))
        assert [turn["role"] for turn in messages] == ["system", "user", "assistant"]


@given(st.text())
def test_a_text_that_is_no_json_is_the_answer(text):
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        content = text
    if isinstance(content, str):
        messages, question_type = to_messages(text)
        assert [turn["role"] for turn in messages] == ["user", "assistant"]
        assert messages[1]["content"] == clean(content)
        assert question_type is None


@pytest.mark.parametrize(
    "content", [{}, [], 3, [["a"]], [{"from": "doctor", "value": "?"}], [{"role": "user"}], ["type", "question", 4]]
)
def test_texts_that_are_no_chats(content):
    with pytest.raises(ValueError, match="is no chat; expected JSON of turns with 'from'"):
        to_messages(json.dumps(content))


def test_keys():
    names = [f"ecg-qa-{source}-250-{length}" for source in ("ptbxl", "mimic-iv-ecg") for length in (500, 1250, 2500)]
    assert all(is_key(name) for name in [*names, "pretrain-mimic-250-500", "rl-ecg-r1", "ecg-comp-1"])
    assert not any(is_key(name) for name in ("my_data", "willxxy/ecg-qa-cot", "ecg-qa", "ecg-qa-ptbxl-250-600"))
    assert all(is_key(pattern.replace("*", "500")) for pattern in DATASETS)
