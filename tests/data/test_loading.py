import json
import shutil
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from PIL import Image
from torch.utils.data import DataLoader

from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.loading import ecgs_of, load_data, load_ecgs, load_splits, to_chat
from elm_ecg.training.data.schema import MESSAGES
from elm_ecg.training.data.streams import load_stream
from elm_ecg.training.data.synthetic import make_dataset
from elm_ecg.training.dataset_commands import main
from helpers import save_tiny_data, tiny_processor

ECG = {"array": np.zeros((12, 500)), "sampling_rate": 250, "unit": "mV"}
ASKED = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "yes"}]


def load(*names: Any, split: str = "train", seed: int = 0, **options: Any) -> Dataset | None:
    return load_data(DataArguments(data=[str(name) for name in names], **options), split, seed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A DatasetDict of plain lists."""
    return save_tiny_data(tmp_path_factory.mktemp("data") / "saved", train=6, test=3)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    """One Dataset of fixed [12, 1000] arrays, another length and rate than `saved`."""
    folder = tmp_path_factory.mktemp("data") / "simulated"
    make_dataset(4, seed=1, sampling_rate=200, seconds=5.0, cache_dir=str(folder.parent)).save_to_disk(folder)
    return folder


def json_lines(folder: Path, rows: list[dict[str, Any]], split: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plain_ecg(value: float = 0.0) -> dict[str, Any]:
    return {"array": [[value] * 500] * 12, "sampling_rate": 250, "unit": "mV"}


def test_saved_splits(saved):
    assert len(load(saved)) == 6
    assert len(load(saved, split="test")) == 3
    assert load(saved, split="validation") is None
    ecg = load(saved)[0]["ecg"]
    assert ecg["array"].shape == (12, 500)
    assert ecg["array"].dtype.kind == "i"  # microvolts, not Python numbers


def test_arrays_are_as_stored(simulated):
    """And `datasets` is left as it is for everybody else."""
    assert (find_spec("torchvision") is not None) == datasets.config.TORCHVISION_AVAILABLE
    ecg = load(simulated)[0]["ecg"]
    as_numpy = load_from_disk(simulated).with_format("numpy")[0]["ecg"]
    assert ecg["array"].dtype == np.int16
    assert np.array_equal(ecg["array"], as_numpy["array"])
    assert [ecg["unit"], int(ecg["sampling_rate"])] == [as_numpy["unit"], int(as_numpy["sampling_rate"])]
    assert list(ecg["lead_names"]) == list(as_numpy["lead_names"])


def test_single_dataset_is_train(simulated):
    assert len(load(simulated)) == 4
    assert load(simulated, split="test") is None


def test_parquet_folder(saved, tmp_path):
    load_from_disk(saved)["train"].to_parquet(tmp_path / "train.parquet")
    load_from_disk(saved)["test"].to_parquet(tmp_path / "test-00000-of-00001.parquet")
    assert len(load(tmp_path, split="test")) == 3
    assert np.array_equal(load(tmp_path)[2]["ecg"]["array"], load(saved)[2]["ecg"]["array"])


@pytest.mark.parametrize("card", ["", "---\nconfigs:\n- config_name: default\n  data_files: data.jsonl\n---\n"])
def test_folders_of_one_name(tmp_path, card):
    """`datasets` alone takes the second for the first, and a changed one for what it was."""
    for number, place in enumerate(("a", "b", "b")):
        folder = tmp_path / place / "data"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card)
        (folder / "data.jsonl").write_text(json.dumps({"messages": ASKED, "record_id": f"{place}{number}"}) + "\n")
        assert load(folder)["record_id"][:] == [f"{place}{number}"]
        assert [row["record_id"] for row in load_stream(DataArguments(data=[str(folder)]), "train")] == [
            f"{place}{number}"
        ]


def test_json_lines_folder(tmp_path):
    json_lines(tmp_path, [{"messages": ASKED, "ecg": plain_ecg(1.5)}, {"messages": ASKED, "ecg": None}])
    data = load(tmp_path)
    assert data[0]["ecg"]["array"].shape == (12, 500)
    assert data[0]["ecg"]["array"][3, 4] == 1.5
    assert data[1]["ecg"] is None


def test_tables_of_other_columns(tmp_path):
    """Such as a folder of PTB-XL's tables, where a dataset was meant."""
    for name, header in {"records": "ecg_id,age", "statements": "code,description"}.items():
        (tmp_path / f"{name}.csv").write_text(f"{header}\n1,2\n")
    with pytest.raises(
        ValueError,
        match=r"is no dataset that can be read: .* Give a folder in which all files of a split have the same",
    ):
        load_splits(str(tmp_path))


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    json_lines(tmp_path / "chats", [{"messages": ASKED}])
    assert len(load("~/chats")) == 1


def test_mixed_datasets(saved, simulated, tmp_path):
    words = json_lines(tmp_path / "words", [{"messages": ASKED}])
    floats = json_lines(tmp_path / "floats", [{"messages": ASKED, "ecg": plain_ecg(0.25)}])
    data = load(saved, simulated, words)
    assert len(data) == 11
    arrays = [ecgs_of(row)[0]["array"] for row in data.select(range(10))]
    assert [array.shape for array in arrays] == [(12, 500)] * 6 + [(12, 1000)] * 4
    assert np.array_equal(arrays[1], load(saved)[1]["ecg"]["array"])
    assert np.array_equal(arrays[6], load(simulated)[0]["ecg"]["array"])
    assert ecgs_of(data[6])[0].keys() == {"array", "sampling_rate", "lead_names", "unit"}
    assert ecgs_of(data[6])[0]["sampling_rate"] == 200
    assert ecgs_of(data[10]) == []
    assert load(saved, saved, split="test").num_rows == 6
    assert load(floats, json_lines(tmp_path / "more", [{"messages": ASKED, "ecg": plain_ecg()}])).num_rows == 2


def test_split_of_some_of_the_datasets(saved, simulated):
    assert len(load(saved, simulated, split="test")) == 3


def test_subset_is_seeded(saved):
    def ids(seed: int) -> list[str]:
        return load(saved, data_subset=0.5, seed=seed)["record_id"][:]

    assert len(ids(0)) == 3
    assert ids(0) == ids(0)
    assert any(ids(0) != ids(seed) for seed in range(1, 4))
    assert len(load(saved, data_subset=0.001)) == 1


def test_wrong_columns(tmp_path):
    with pytest.raises(ValueError, match=r"has the columns \['text'\]; expected 'messages'"):
        load(json_lines(tmp_path, [{"text": "words"}]))


def test_ecgs_alone(saved, tmp_path):
    """Of chats, and of records without any."""
    records = Dataset.from_list([{"ecg": plain_ecg(0.5), "patient_id": 7}, {"ecg": None, "patient_id": 8}])
    records.info.license = "CC BY 4.0"
    records.save_to_disk(tmp_path / "records")
    args = DataArguments(data=[str(saved), str(tmp_path / "records")])
    data = load_ecgs(args, "train")
    assert data.column_names == ["ecg"]
    assert data.info.license == "CC BY 4.0"
    assert np.array_equal(ecgs_of(data[1])[0]["array"], load(saved)[1]["ecg"]["array"])
    assert (ecgs_of(data[6])[0]["array"] == 0.5).all()
    assert ecgs_of(data[7]) == []
    assert len(data) == 8
    assert len(load_ecgs(args, "test")) == 3
    assert load_ecgs(args, "validation") is None


def test_subset_of_the_ecgs_is_that_of_the_chats(saved):
    args = DataArguments(data=[str(saved)], data_subset=0.5)
    rows = load(saved, data_subset=0.5, seed=3)
    ecgs = load_ecgs(args, "train", seed=3)
    assert len(ecgs) == 3
    assert all(np.array_equal(row["ecg"]["array"], ecg["ecg"]["array"]) for row, ecg in zip(rows, ecgs, strict=True))


def test_no_ecgs(tmp_path):
    with pytest.raises(ValueError, match=r"has the columns \['messages'\]; expected 'ecg', a dict with 'array'"):
        load_ecgs(DataArguments(data=[str(json_lines(tmp_path, [{"messages": ASKED}]))]), "train")


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match="No dataset 'nowhere'"):
        load("nowhere")
    with pytest.raises(ValueError, match="No dataset '/nowhere/at/all'"):
        load("/nowhere/at/all")
    with pytest.raises(FileNotFoundError, match="doesn't contain any data files"):
        load(tmp_path)


def test_rows_of_two_one_and_no_ecg(tmp_path):
    both = [{"type": "ecg"}, {"type": "text", "text": "and"}, {"type": "ecg"}, {"type": "text", "text": "Same?"}]
    words = [{"type": "text", "text": "Hello?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    rows = [
        {"messages": [{"role": "user", "content": both}, answer], "ecg": [plain_ecg(1.0), plain_ecg(2.0)]},
        {"messages": [{"role": "user", "content": words}, answer], "ecg": [plain_ecg(3.0)]},
        {"messages": [{"role": "user", "content": words}, answer], "ecg": None},
        {"messages": [{"role": "user", "content": words}, answer], "ecg": []},
    ]
    data = load(json_lines(tmp_path / "one", rows))
    mixed = load(tmp_path / "one", json_lines(tmp_path / "two", rows[:1]))
    processor = tiny_processor(num_ecg_tokens=4)
    batch = ELMCollator(processor)(data.__getitems__([0, 1, 2, 3]))
    assert batch["ecg_values"][:, 0, 0].tolist() == [1.0, 2.0, 3.0]
    assert (batch["input_ids"] == processor.ecg_token_id).sum(1).tolist() == [8, 4, 0, 0]
    assert "ecg_values" not in ELMCollator(processor)([data[2]])
    assert ELMCollator(processor)([mixed[4]])["ecg_values"][:, 0, 0].tolist() == [1.0, 2.0]


def test_rows_of_paths(tmp_path):
    data = load(
        json_lines(tmp_path, [{"messages": ASKED, "ecg": ["a.csv", "b.csv"]}, {"messages": ASKED, "ecg": None}])
    )
    parts = to_chat(data[0])[0]["content"]
    assert [part.get("path") for part in parts] == [str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), None]
    assert len(to_chat(data[1])[0]["content"]) == 1


def test_ecg_stands_before_the_first_user_message():
    messages = [{"role": "system", "content": "Be brief."}, *ASKED, *ASKED]
    chat = to_chat({"messages": messages, "ecg": ECG})
    assert [message["role"] for message in chat] == ["system", "user", "assistant", "user", "assistant"]
    assert chat[1]["content"] == [{"type": "ecg", "ecg": ECG}, {"type": "text", "text": "Is it?"}]
    assert all(part["type"] == "text" for message in chat[2:] for part in message["content"])


def test_ecg_stands_where_the_messages_say():
    places = [{"type": "text", "text": "This:"}, {"type": "ecg"}]
    later = [{"type": "ecg"}, {"type": "text", "text": "and now?"}]
    messages = [{"role": "user", "content": places}, ASKED[1], {"role": "user", "content": later}]
    chat = to_chat({"messages": messages, "ecg": [ECG, "file.xml"]})
    assert chat[0]["content"][1] == {"type": "ecg", "ecg": ECG}
    assert chat[2]["content"][0] == {"type": "ecg", "path": "file.xml"}
    assert places[1] == {"type": "ecg"}  # the row is as it was


def test_without_ecg():
    messages = [{"role": "user", "content": [{"type": "ecg"}, {"type": "text", "text": "Is it?"}]}, ASKED[1]]
    for row in ({"messages": messages, "ecg": ECG}, {"messages": ASKED, "ecg": ECG}, {"messages": ASKED}):
        assert to_chat(row, with_ecg=False)[0]["content"] == [{"type": "text", "text": "Is it?"}]


def test_a_chat_without_user_needs_no_ecg():
    assert len(to_chat({"messages": [ASKED[1]], "ecg": None})) == 1
    with pytest.raises(ValueError, match="no user message to put its ECG in"):
        to_chat({"messages": [ASKED[1]], "ecg": ECG})


@pytest.mark.parametrize("ecg", [None, [ECG], [ECG] * 3])
def test_places_and_ecgs_differ(ecg):
    content = [{"type": "ecg"}, {"type": "ecg"}]
    with pytest.raises(ValueError, match=r"2 places for ECGs, but the row has \d ECGs"):
        to_chat({"messages": [{"role": "user", "content": content}], "ecg": ecg})


def test_no_messages():
    with pytest.raises(ValueError, match="row 17 has no messages"):
        to_chat({"messages": [], "record_id": "17"})


def test_saved_dataset_dict_of_other_splits(tmp_path):
    DatasetDict(val=Dataset.from_list([{"messages": ASKED}])).save_to_disk(tmp_path)
    assert load(tmp_path) is None
    assert len(load(tmp_path, split="val")) == 1


# streaming


@pytest.fixture(scope="module")
def parquet(saved, tmp_path_factory) -> Path:
    """Twenty-four rows in three row groups."""
    folder = tmp_path_factory.mktemp("data") / "parquet"
    data = save_tiny_data(folder / "saved", train=24)
    load_from_disk(data)["train"].to_parquet(folder / "train" / "train.parquet", batch_size=8)
    return folder / "train"


def stream_ids(*names: Any, rows: int, workers: int = 0, seed: int = 0, shuffle_buffer: int = 10, **options) -> list:
    args = DataArguments(data=[str(name) for name in names], **options)
    stream = load_stream(args, "train", seed, shuffle_buffer)
    loader = DataLoader(stream, batch_size=4, num_workers=workers, collate_fn=_ids)
    return [ids for batch in islice(loader, rows // 4) for ids in batch]


def _ids(rows: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(row["epoch"], row["record_id"]) for row in rows]


@pytest.mark.parametrize(
    "workers", [0, 2, pytest.param(5, marks=pytest.mark.minutes)]
)  # fewer and more than row groups
@pytest.mark.slow
def test_a_stream_gives_every_row_once_a_pass(parquet, workers):
    rows = stream_ids(parquet, rows=72, workers=workers)
    assert rows == stream_ids(parquet, rows=72, workers=workers)
    assert rows != stream_ids(parquet, rows=72, workers=workers, seed=1)
    passes = [[record for epoch, record in rows if epoch == number] for number in (0, 1)]
    assert all(len(set(records)) == len(records) for records in passes)
    assert passes[0] != sorted(passes[0])
    assert passes[0] != passes[1]
    if workers == 0:
        assert [len(records) for records in passes] == [24, 24]


def test_streamed_rows_are_as_those_of_the_dataset(parquet, saved):
    streamed = list(load_stream(DataArguments(data=[str(parquet)]), "train"))
    whole = load(parquet)
    assert [row["record_id"] for row in streamed] == whole["record_id"][:]
    for one, other in zip(streamed, whole, strict=True):
        assert np.array_equal(one["ecg"]["array"], other["ecg"]["array"])
        assert one["ecg"]["array"].dtype == other["ecg"]["array"].dtype
        assert one["messages"] == other["messages"]
    assert len(list(load_stream(DataArguments(data=[str(saved)]), "test"))) == 3  # of save_to_disk
    assert load_stream(DataArguments(data=[str(saved)]), "validation") is None


@pytest.mark.parametrize(
    "ecg", [plain_ecg(), "record.npy", {"path": "record.npy", **plain_ecg()}], ids=["array", "file", "both"]
)
def test_a_stream_that_begins_without_an_ecg(ecg, tmp_path):
    rows = [None, None, ecg, ecg]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    Dataset.from_list([{"ecg": row, "messages": messages} for row in rows]).to_parquet(tmp_path / "train.parquet")
    streamed = [ecgs_of(row) for row in load_stream(DataArguments(data=[str(tmp_path)]), "train")]
    assert [len(ecgs) for ecgs in streamed] == [0, 0, 1, 1]
    whole = [ecgs_of(row) for row in load(tmp_path)]
    assert str(streamed) == str(whole)


@pytest.mark.slow
def test_a_stream_of_several_datasets(parquet, simulated):
    both = stream_ids(parquet, simulated, rows=28)
    assert len(set(both)) == 28  # all of the first pass
    weighted = stream_ids(parquet, simulated, rows=200, data_weights=[0.8, 0.2])
    assert 20 < len([record for _, record in weighted if record.startswith("synthetic-1-")]) < 60
    assert weighted == stream_ids(parquet, simulated, rows=200, data_weights=[0.8, 0.2])


def test_a_stream_has_no_subset(parquet):
    with pytest.raises(ValueError, match="--data_subset with --streaming"):
        load_stream(DataArguments(data=[str(parquet)], data_subset=0.5), "train")


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, 2.0, 3.0]])
def test_wrong_weights(weights):
    with pytest.raises(ValueError, match="expected a positive number for each of the 2 of --data"):
        DataArguments(data=["a", "b"], data_weights=weights)


def test_paths_under_a_root(tmp_path):
    absolute = str(tmp_path / "ecgs" / "c.npz")
    rows = [{"messages": ASKED, "ecg": ["a/../b.npz", absolute]}, {"messages": ASKED, "ecg": None}]
    data = load(json_lines(tmp_path / "data", rows), ecg_root=str(tmp_path / "ecgs"))
    assert ecgs_of(data[0]) == [f"{tmp_path}/ecgs/a/../b.npz", absolute]
    assert ecgs_of(data[1]) == []


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder `ecgs` that holds a link out of it, to a file beside `data`, which holds such a link too."""
    np.savez(tmp_path / "private.npz", **plain_ecg(7.0))
    for name in ("ecgs", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "link.npz").symlink_to(tmp_path / "private.npz")
    return tmp_path


COLUMNS = ("text", "list", "dict", "reference")
OUTSIDE = ("{0}/private.npz", "../private.npz", "link.npz", "/etc/hostname")


@pytest.mark.parametrize(
    ("path", "column", "ecg_root"),
    [
        pytest.param(path, column, ecg_root, marks=[] if (place + number) % 2 == ecg_root else [pytest.mark.slow])
        for place, path in enumerate(OUTSIDE)
        for number, column in enumerate(COLUMNS)
        for ecg_root in (True, False)
    ],
)
def test_rows_read_no_other_files(path, column, ecg_root, outside):
    """Neither with --ecg_root nor without, in no form of a row, whole or streamed, by whatever command."""
    path = path.format(outside)
    ecg = {"text": path, "list": ["noise", path], "dict": {"path": path, "unit": None}}.get(column)
    row = {"messages": ASKED, "ecg": ecg} if ecg else {"text": json.dumps(["q", "Is it?", ["yes"]]), "ecg_path": path}
    folder = json_lines(outside / "data", [row])
    root = str(outside / "ecgs") if ecg_root else None
    args = DataArguments(data=[str(folder)], ecg_root=root)
    message = (
        "say under which folder they are"
        if column == "reference" and not root
        else r"Row 0: .*, outside of .*--ecg_root"
    )
    if column == "reference":  # the first file is looked for before the rows are read
        message += "|there is no such file"
    for read in (load_data, load_ecgs, lambda *given: list(load_stream(*given))):
        with pytest.raises((ValueError, OSError), match=message):
            read(args, "train")
    if column == "text":
        with pytest.raises(ValueError, match=message):
            main(["check", str(folder), *(["--ecg_root", root] if root else [])])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["card", "absolute card", "state", "splits"])
def test_a_dataset_consists_of_its_own_files(form, streaming, tmp_path):
    """Its card, or what `save_to_disk` writes, may name any file of this machine."""
    rows, folder = [{"messages": ASKED, "ecg": None}], tmp_path / "data"
    json_lines(tmp_path / "private", rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "private" / "saved")
    if "card" in form:
        path = "../private/*.jsonl" if form == "card" else tmp_path / "private" / "train.jsonl"
        json_lines(folder, rows)
        card = f"configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: '{path}'\n"
        (folder / "README.md").write_text(f"---\n{card}---\n")
    elif form == "state":
        shutil.copytree(tmp_path / "private" / "saved", folder)
        state = json.loads((folder / "state.json").read_text())
        state["_data_files"] = [{"filename": f"../private/saved/{file['filename']}"} for file in state["_data_files"]]
        (folder / "state.json").write_text(json.dumps(state))
    else:
        folder.mkdir()
        (folder / "dataset_dict.json").write_text('{"splits": ["../private/saved"]}')
    with pytest.raises(
        ValueError, match=r"names the file .*private/.*, which is not part of it .*: no other files are"
    ):
        load_splits(str(folder), streaming)


def test_a_dataset_of_links_and_below_a_link(tmp_path):
    """The user's own."""
    json_lines(tmp_path / "disk", [{"messages": ASKED, "ecg": None}])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").symlink_to(tmp_path / "disk" / "train.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert len(load(tmp_path / "data")) == len(load(tmp_path / "link")) == 1


@pytest.mark.parametrize("content", ["[1]", "{}", '{"splits": 5}', "[" * 100_000, "{", '{"splits": ["a"]}'])
def test_damaged_datasets(content, tmp_path):
    (tmp_path / "dataset_dict.json").write_text(content)
    with pytest.raises((ValueError, OSError)):
        load(tmp_path)
    (tmp_path / "dataset_dict.json").unlink()
    (tmp_path / "train.parquet").write_bytes(b"PAR1" + content[:9].encode() + b"PAR1")
    with pytest.raises((ValueError, OSError)):
        load(tmp_path)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "path": "/etc/hostname"},
        {"type": "image", "url": "http://127.0.0.1:9/a.png"},
        {"type": "text"},
        {"text": "Is it?"},
        "Is it?",
    ],
)
def test_parts_that_are_neither_text_nor_ecg(part):
    """transformers would read the file, or fetch it, where the chat template lets it."""
    row = {"record_id": "r7", "ecg": None, "messages": [{"role": "user", "content": [part]}, ASKED[1]]}
    with pytest.raises(ValueError, match=r"The row r7 has the part .* in a message; expected \{'type': 'text'"):
        to_chat(row)


def test_members_of_a_part_name_no_other_ecg():
    part = {"type": "ecg", "ecg": "/etc/hostname", "path": "/etc/hostname", "url": "http://127.0.0.1:9/", "unit": "uV"}
    row = {"ecg": "a.npz", "messages": [{"role": "user", "content": [part]}, ASKED[1]]}
    assert to_chat(row)[0]["content"] == [{"type": "ecg", "path": "a.npz"}]


def test_rows_of_the_hub_need_a_root(tmp_path, monkeypatch):
    """There is no folder of theirs."""
    splits = DatasetDict(train=Dataset.from_list([{"messages": ASKED, "ecg": "a.npz"}]))
    monkeypatch.setattr("elm_ecg.training.data.loading._load_splits", lambda *given: splits)
    with pytest.raises(ValueError, match=r"Row 0: .*'a.npz'; say under which folder such files are with --ecg_root"):
        load("owner/name")
    assert ecgs_of(load("owner/name", ecg_root=str(tmp_path))[0]) == [str(tmp_path / "a.npz")]


@pytest.mark.parametrize("several", [False, True])
def test_pictures_are_not_read(several, tmp_path):
    """Else `datasets` reads the file that a row names, or fetches it."""
    picture = str(tmp_path / "gone.png")
    Image.new("L", (8, 8)).save(picture)
    features = {
        "picture": datasets.Image(),
        "messages": datasets.Features.from_arrow_schema(pa.schema({"m": MESSAGES}))["m"],
    }
    if several:
        features["picture"] = datasets.List({"of": datasets.Image()})
        picture = [{"of": picture}]
    rows = Dataset.from_dict({"messages": [ASKED], "picture": [picture]}, features=datasets.Features(features))
    rows.save_to_disk(tmp_path / "data", max_shard_size="1GB")
    (tmp_path / "gone.png").unlink()
    (row,) = load(tmp_path / "data")
    assert row.keys() == {"messages"}
    (row,) = load_stream(DataArguments(data=[str(tmp_path / "data")]), "train")
    assert row.keys() == {"messages", "epoch"}


def test_empty_answers_are_left_out(tmp_path, caplog):
    """In each form of an answer, whole and streamed; what is left out is counted."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}]
    empty = [*parts, {"role": "assistant", "content": [{"type": "text", "text": " "}]}]
    whole = [*parts, {"role": "assistant", "content": [{"type": "text", "text": "no"}]}]
    silent = [ASKED[0], {"role": "assistant", "content": "\n"}]
    words = json_lines(tmp_path / "words", [{"messages": chat} for chat in (ASKED, silent, [*ASKED, *silent])])
    of_parts = json_lines(tmp_path / "parts", [{"messages": chat} for chat in (empty, whole)])
    for folder, number in ((words, "2 of 3"), (of_parts, "1 of 2")):
        caplog.clear()
        assert len(load(folder)) == 1
        assert f"{number} rows are left out, as they have an empty answer" in caplog.text
        caplog.clear()
        assert len(list(load_stream(DataArguments(data=[str(folder)]), "train"))) == 1
        assert "1 rows so far are left out" in caplog.text
    with pytest.raises(ValueError, match="all of its 2 rows have an empty answer"):
        load(json_lines(tmp_path / "silent", [{"messages": silent}] * 2))


def test_mixed_datasets_of_other_columns(tmp_path):
    """Of one ECG and of two, of a type for the row and for each answer, patients as numbers and as names."""
    one = {"messages": ASKED, "ecg": plain_ecg(1.0), "patient_id": 7, "question_type": "rhythm", "age": 60}
    two = {
        "messages": ASKED,
        "ecg": [plain_ecg(2.0), plain_ecg(3.0)],
        "patient_id": ["8", "9"],
        "question_type": ["rate"],
    }
    mixed = load(json_lines(tmp_path / "one", [one]), json_lines(tmp_path / "two", [two, {**two, "ecg": None}]))
    assert [[ecg["array"][0, 0] for ecg in ecgs_of(row)] for row in mixed] == [[1.0], [2.0, 3.0], []]
    assert mixed["patient_id"][:] == [["7"], ["8", "9"], ["8", "9"]]
    assert mixed["question_type"][:] == [["rhythm"], ["rate"], ["rate"]]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Is it?"}]}]
    with pytest.raises(ValueError, match="to mix them, make them lists of 'role' and 'content', both strings"):
        load(tmp_path / "one", json_lines(tmp_path / "parts", [{"messages": parts}]))


def test_weights_are_of_training(saved, simulated):
    weights = {"data_weights": [9.0, 1.0]}
    assert len(load(saved, saved, **weights)) > 12
    assert len(load(saved, saved, split="test", **weights)) == 6


def test_large_types_of_arrow(tmp_path):
    """As Polars writes them."""
    turn = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
    schema = pa.schema([("messages", pa.large_list(turn)), ("ecg", pa.large_string())])
    rows = [{"messages": ASKED, "ecg": "a.npz"}, {"messages": ASKED, "ecg": "noise"}]
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "train.parquet")
    assert load(tmp_path, ecg_root="/ecgs")["ecg"][:].tolist() == ["/ecgs/a.npz", "noise"]
    assert len(load(tmp_path, json_lines(tmp_path / "more", [{"messages": ASKED, "ecg": plain_ecg()}]))) == 3


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (None, "no messages, but None"),
        ("Is it?", "no messages, but 'Is it"),
        ([{"role": "tool", "content": "yes"}], "expected a role of system, user, assistant"),
        ([{"role": None, "content": "yes"}], "expected a role of"),
        ([{"role": "user", "content": None}], "a content that is text or a list of parts"),
        ([{"role": "user"}], "a content that is text or a list of parts"),
        ([{"content": "yes"}], "expected a role of"),
        ({"role": "user", "content": "Is it"}, "expected a role of"),
    ],
)
def test_messages_that_are_no_chat(messages, words):
    with pytest.raises(ValueError, match=f"The row 17 has .*{words}"):
        to_chat({"messages": messages, "record_id": "17"})


def test_messages_of_another_type(tmp_path):
    with pytest.raises(ValueError, match="expected a list of turns with 'role' and 'content'"):
        load(json_lines(tmp_path, [{"messages": "Is it?"}]))


def test_a_null_among_the_ecgs():
    with pytest.raises(ValueError, match="The row 17 lists 2 ECGs, one of which is null"):
        ecgs_of({"ecg": [ECG, None], "record_id": "17"})


def test_a_file_is_no_dataset(tmp_path):
    json_lines(tmp_path, [{"messages": ASKED}])
    with pytest.raises(ValueError, match=r"train.jsonl is a file; give the folder that holds it"):
        load(tmp_path / "train.jsonl")


def of_ecg_r1(names, question):
    """A row in the form of ECG-R1's data."""
    thought = "<think>\nNo P waves.\n</think>\n<answer>AF</answer>"
    turns = [("system", "Think first."), ("user", question), ("assistant", thought)]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"messages": messages, "objects": {"ecg": names}, "source": "PTB-XL"}


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_ecg_r1(tmp_path, streaming):
    """Their ECGs stand where the text says so."""
    for name in ("a", "b"):
        np.savez(tmp_path / f"{name}.npz", array=np.zeros((12, 500), np.float32), sampling_rate=250)
    rows = [
        of_ecg_r1(["a.npz"], "<ecg>\nWhat is it?"),
        of_ecg_r1(["a.npz", "b.npz"], "First <ecg>, then <ECG> <image is no place"),
        of_ecg_r1(["b.npz"], "What is it?"),
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = DataArguments(data=[str(tmp_path)])
    data = load_stream(args, "train") if streaming else load_data(args, "train")
    loaded = list(data)
    chats = [to_chat(row) for row in loaded]
    first, second = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    assert chats[0][1]["content"] == [{"type": "ecg", "path": first}, {"type": "text", "text": "What is it?"}]
    assert chats[1][1]["content"] == [
        {"type": "text", "text": "First "},
        {"type": "ecg", "path": first},
        {"type": "text", "text": ", then "},
        {"type": "ecg", "path": second},
        {"type": "text", "text": "<image is no place"},
    ]
    assert chats[2][1]["content"] == [{"type": "ecg", "path": second}, {"type": "text", "text": "What is it?"}]
    assert [turn["role"] for turn in chats[0]] == ["system", "user", "assistant"]
    assert chats[0][2]["content"][0]["text"].startswith("<think>")
    with pytest.raises(ValueError, match="have 1 places for ECGs, but the row has 2 ECGs"):
        to_chat({**loaded[0], "ecg": [first, second]})
