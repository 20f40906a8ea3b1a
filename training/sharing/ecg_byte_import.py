"""ECG-Byte tokenizers of the reference system, which are pickles: read without executing them."""

from pathlib import Path
from typing import Any

from elm_ecg.plain_pickle import load_plain_pickle
from elm_ecg.tokenization_ecg_byte import FIRST_MERGE_ID, ECGByteTokenizer

# 25 times the reference's file of 10,000 merges
MAX_PICKLE_BYTES = 16 * 2**20


def _merges_of(content: Any) -> list[str]:
    """The merge strings of the reference's `(vocab, merges)`, in the order of their ids."""
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
    return merges


def read_ecg_byte_pickle(path: Path) -> ECGByteTokenizer:
    """The reference's ECG-Byte tokenizer, a pickle of `(vocab: dict[int, str], merges: list[(list[int], int)])`.

    The pickle is never executed: anything but these containers is refused.

    Raises:
        ValueError: the file is no such pickle, damaged, or too large.
    """
    with path.open("rb") as file:
        content = file.read(MAX_PICKLE_BYTES + 1)  # one more shows that it is larger
    try:
        if len(content) > MAX_PICKLE_BYTES:
            raise ValueError(f"it is larger than {MAX_PICKLE_BYTES / 2**20:g} MiB")
        return ECGByteTokenizer(_merges_of(load_plain_pickle(content, int)))
    except ValueError as error:
        raise ValueError(f"{path} is no ECG-Byte tokenizer of the reference: {error}.") from error
