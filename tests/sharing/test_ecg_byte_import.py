import io
import itertools
import os
import pickle
from pathlib import Path

import pytest

from elm_ecg.training.sharing.ecg_byte_import import MAX_PICKLE_BYTES, read_ecg_byte_pickle, read_reference_tokenizer
from elm_ecg.training.tokenizer import main

BYTES = {byte: chr(byte) if byte < 128 else f"<{byte}>" for byte in range(256)}
VOCAB = BYTES | {256: "aa", 257: "aab", 258: "zz"}
MERGES = [([97, 97], 256), ([97, 97, 98], 257), ([122, 122], 258)]


def read(folder: Path, content: bytes):
    (folder / "tokenizer.pkl").write_bytes(content)
    return read_ecg_byte_pickle(folder / "tokenizer.pkl")[0]


def test_order_of_the_vocabulary(tmp_path):
    """That of the pickle's dict, which the ids do not tell."""
    order = [258, 97, 257, *(byte for byte in range(256) if byte != 97), 256]
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(({token_id: VOCAB[token_id] for token_id in order}, MERGES)))
    assert read_ecg_byte_pickle(path)[1] == order
    main(["import", str(path), "--output_dir", str(tmp_path / "imported")])
    assert read_reference_tokenizer(str(tmp_path / "imported"))[1] == order


def test_order_of_the_reference_s_own_file(shared):
    ids = read_ecg_byte_pickle(shared / "golden/seed_ecg_byte_10000.pkl")[1]
    assert (ids[:3], sorted(ids)) == ([4082, 9938, 1548], list(range(10256)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tokenizer_of_every_binary_protocol(protocol, tmp_path):
    tokenizer = read(tmp_path, pickle.dumps((VOCAB, MERGES), protocol))
    assert tokenizer.merges == ["aa", "aab", "zz"]
    assert (tokenizer.millivolt_range, tokenizer.across_leads, tokenizer.sampling_rate) == (None, True, None)


@pytest.mark.slow
def test_tokenizer_of_many_merges(tmp_path):
    # more items than the pickler writes at once, and ids of more than two bytes
    strings = ["".join(letters) for letters in itertools.product("abcdefghijklmnopq", repeat=4)]
    vocab = BYTES | dict(enumerate(strings, 256))
    merges = [(list(map(ord, string)), token_id) for token_id, string in enumerate(strings, 256)]
    assert merges[-1][1] > 65535
    assert read(tmp_path, pickle.dumps((vocab, merges))).merges == strings


def test_tokenizer_of_one_merge(tmp_path):
    # one item has an opcode of its own in a list, and in a dict
    merges = [([97, 98], 256)]
    assert read(tmp_path, pickle.dumps((BYTES | {256: "ab"}, merges))).merges == ["ab"]
    content = pickle.dumps(BYTES, 3)[:-1] + b"M\x00\x01X\x02\x00\x00\x00abs" + pickle.dumps(merges, 3)[2:-1] + b"\x86."
    assert pickle.loads(content) == (BYTES | {256: "ab"}, merges)
    assert read(tmp_path, content).merges == ["ab"]


class Evil:
    """Its pickle makes the file `owned` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def test_a_hostile_file_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in (pickle.dumps((VOCAB, [Evil()])), pickle.dumps((VOCAB, MERGES))[:-1] + pickle.dumps(Evil())[2:]):
        with pytest.raises(
            ValueError, match=r"tokenizer.pkl is no ECG-Byte tokenizer of the reference: it holds \w+ at byte"
        ):
            read(tmp_path, content)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.pkl"]


def test_truncated_anywhere(tmp_path):
    content = pickle.dumps((VOCAB, MERGES))
    for length in range(0, len(content), 37):
        with pytest.raises(ValueError, match="is no ECG-Byte tokenizer of the reference"):
            read(tmp_path, content[:length])


def test_huge_file(tmp_path):
    with (tmp_path / "huge.pkl").open("wb") as file:
        file.truncate(100 * MAX_PICKLE_BYTES)
    with pytest.raises(ValueError, match="it is larger than 16 MiB"):
        read_ecg_byte_pickle(tmp_path / "huge.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([VOCAB, MERGES], "expected a pair of a dict and a list"),
        ((MERGES, VOCAB), "expected a pair of a dict and a list"),
        (VOCAB, "expected a pair of a dict and a list"),
        ((VOCAB, ["aa"]), "merge 0 is no pair of a list of bytes and an id"),
        ((VOCAB, [("aa", 256)]), "merge 0 is no pair of a list of bytes and an id"),
        ((VOCAB, [([97, "a"], 256)]), "merge 0 is no pair of a list of bytes and an id"),
        ((VOCAB, [([97, 97], "256")]), "merge 0 does not have the id 256"),
        ((VOCAB, MERGES[::-1]), "merge 0 does not have the id 256"),
        ((VOCAB, [([97, 353], 256)]), "merge 0 holds what is no byte"),
        ((VOCAB, [([97, -1], 256)]), "merge 0 holds what is no byte"),
        ((VOCAB | {257: "aac"}, MERGES), "merge 1 is 'aab', but vocab has another string as id 257"),
        ((VOCAB | {257: [VOCAB]}, MERGES), "merge 1 is 'aab', but vocab has another string as id 257"),
        ((VOCAB, MERGES[:2]), "vocab has 259 entries; expected 256 bytes and 2 merges"),
        ((VOCAB | {-1: "aa"}, MERGES), "vocab has 260 entries; expected 256 bytes and 3 merges"),
        (({97: "a"}, MERGES), r"vocab has no single byte '\\x00' as id 0"),
        ((VOCAB | {97: "b"}, MERGES), "vocab has no single byte 'a' as id 97"),
        ((BYTES | {256: "AB"}, [([65, 66], 256)]), r"merge 0 \('AB'\) holds 'A'; symbols are a to z"),
        ((BYTES | {256: "a"}, [([97], 256)]), r"merge 0 \('a'\) has 1 symbol; expected at least 2"),
        ((BYTES | {256: "aa", 257: "aa"}, [([97, 97], 256), ([97, 97], 257)]), r"merge 1 \('aa'\) is also merge 0"),
    ],
)
def test_what_is_no_tokenizer(content, message, tmp_path):
    with io.BytesIO() as file:
        pickler = pickle.Pickler(file)
        pickler.fast = True  # strings that stand twice here are written out twice
        pickler.dump(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, file.getvalue())
