"""ECG-Byte tokenizers of the reference system, which are pickles: read without executing them."""

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from elm_ecg.plain_pickle import load_plain_pickle
from elm_ecg.tokenization_ecg_byte import FILE_NAME, FIRST_MERGE_ID, ECGByteTokenizer

# 25 times the reference's file of 10,000 merges
MAX_PICKLE_BYTES = 16 * 2**20
# beside the imported tokenizer: all its ids in the order of the pickle's `vocab`, in which the reference adds their tokens to
# a language model. It is that of a hash table: the ids themselves do not tell it
ORDER_FILE = "reference_order.json"


def _merges_of(content: Any) -> tuple[list[str], list[int]]:
    """The merge strings of the reference's `(vocab, merges)` in the order of their ids, and all ids in that of `vocab`."""
    if not (isinstance(content, tuple) and isinstance(content[0], dict) and isinstance(content[1], list)):
        raise ValueError("expected a pair of a dict and a list, (vocab, merges)")
    vocab, entries = content  # two: pairs are the only tuples that are read
    for byte in range(FIRST_MERGE_ID):
        if vocab.get(byte) not in (chr(byte), f"<{byte}>"):  # the reference writes bytes above 127 as <128>
            raise ValueError(f"vocab has no single byte {chr(byte)!r} as id {byte}")
    merges = []
    for place, entry in enumerate(entries):
        symbols = entry[0] if isinstance(entry, tuple) else None
        if not (isinstance(symbols, list) and all(type(symbol) is int for symbol in symbols)):
            raise ValueError(f"merge {place} is no pair of a list of bytes and an id")
        token_id = FIRST_MERGE_ID + place
        if type(entry[1]) is not int or entry[1] != token_id:
            raise ValueError(f"merge {place} does not have the id {token_id}")
        if not all(0 <= symbol < FIRST_MERGE_ID for symbol in symbols):
            raise ValueError(f"merge {place} holds what is no byte")
        merge = "".join(map(chr, symbols))  # a letter for each byte, as latin-1 does
        if vocab.get(token_id) != merge:
            raise ValueError(f"merge {place} is {merge[:40]!r}, but vocab has another string as id {token_id}")
        merges.append(merge)
    if len(vocab) != FIRST_MERGE_ID + len(merges):
        raise ValueError(f"vocab has {len(vocab)} entries; expected 256 bytes and {len(merges)} merges")
    return merges, list(vocab)


def read_ecg_byte_pickle(path: Path) -> tuple[ECGByteTokenizer, list[int]]:
    """The reference's ECG-Byte tokenizer, a pickle of `(vocab: dict[int, str], merges: list[(list[int], int)])`, and its ids
    in the order of `vocab`.

    The pickle is never executed: anything but these containers is refused.

    Raises:
        ValueError: the file is no such pickle, damaged, or too large.
    """
    with path.open("rb") as file:
        content = file.read(MAX_PICKLE_BYTES + 1)  # one more shows that it is larger
    try:
        if len(content) > MAX_PICKLE_BYTES:
            raise ValueError(f"it is larger than {MAX_PICKLE_BYTES / 2**20:g} MiB")
        merges, ids = _merges_of(load_plain_pickle(content, int))
        return ECGByteTokenizer(merges), ids
    except ValueError as error:
        raise ValueError(f"{path} is no ECG-Byte tokenizer of the reference: {error}.") from error


def read_reference_tokenizer(name: str) -> tuple[ECGByteTokenizer, list[int]]:
    """A tokenizer that a model of the reference was trained with, and its ids in the order of that model's vocabulary.

    Args:
        name: of the reference's pickle, or folder or Hub id of what `elm tokenizer import` made of it.

    Raises:
        ValueError: there is no such tokenizer, it is damaged, or it does not say its order.
    """
    path = Path(name)
    if path.is_file():
        return read_ecg_byte_pickle(path)
    if not path.exists():
        from elm_ecg.training.model_files import find_model_file  # late: it imports PyTorch, for a better error

        find_model_file(name, [FILE_NAME], label="--ecg_tokenizer")
    ecg_byte = ECGByteTokenizer.from_pretrained(name)
    order = cached_file(name, ORDER_FILE, _raise_exceptions_for_missing_entries=False)
    if order is None:
        raise ValueError(
            f"--ecg_tokenizer {name} has no {ORDER_FILE}, so that nobody knows which token of the checkpoint is which: give the run's "
            ".pkl, or import it again with `elm tokenizer import`."
        )
    try:
        ids = json.loads(Path(order).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{order} is not JSON: {error}") from error
    if not isinstance(ids, list) or sorted(ids, key=str) != sorted(
        range(FIRST_MERGE_ID + len(ecg_byte.merges)), key=str
    ):
        raise ValueError(
            f"{order} does not hold each id of {FILE_NAME} once; import it again with `elm tokenizer import`."
        )
    return ecg_byte, ids
