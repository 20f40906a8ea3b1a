"""Speed of ECG-Byte on the real ECGs of the PTB-XL subset in ../shared/data/ptbxl (CC BY 4.0): 12 leads, 10 s, 250 Hz.

    uv run --extra symbolic python benchmarks/ecg_byte.py
    uv run --extra symbolic python benchmarks/ecg_byte.py --train --output runs/ecg_byte.json

A row is the ratio of two median times, taken in turn on the same records: what else the machine does hurts both. One
thread unless the row says otherwise. `--train` learns 10,000 merges from 1,999 records.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, trainers

# this folder has a benchmark named as the package `ecg_byte`: the package is to be found first
sys.path.append(sys.path.pop(0))

from elm_ecg.ecg_utils import resample
from elm_ecg.tokenization_ecg_byte import (
    ALPHABET,
    FIRST_MERGE_ID,
    ECGByteTokenizer,
    PythonTokenizer,
    _quantize,
    ecg_byte,
)

ROOT = Path(__file__).resolve().parents[1]
PTBXL = ROOT.parent / "shared" / "data" / "ptbxl"
GOLDEN = ROOT.parent / "shared" / "golden" / "seed_ecg_byte_10000.json"
DEFAULT = ROOT / "training" / "tokenizers" / "ptbxl_250hz"
NUM_MERGES = 10_000
# merges after which a recount is timed
STAGES = (0, 10, 30, 100, 300, 1000, 3000, 6000, NUM_MERGES)
# about the most that Hugging Face's trainer learns from in a minute
HUGGING_FACE_RECORDS = 200

# a process of its own, so that its peak is that of training
TRAIN = """
import json, sys, time
import numpy as np
from elm_ecg.tokenization_ecg_byte import ECGByteTokenizer
records = np.load(sys.argv[1])
start = time.perf_counter()
tokenizer = ECGByteTokenizer.train(records, int(sys.argv[2]), show_progress=False)
seconds = time.perf_counter() - start
with open("/proc/self/status") as file:  # getrusage would count what the parent held too
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "gigabytes": peak * 1024 / 1e9, "merges": tokenizer.merges}))
"""


def row(upper: str, lower: str, seconds: Sequence[float], target: str, on: str) -> dict[str, Any]:
    """Of the table: the time of `upper` over that of `lower`."""
    ratio = seconds[0] / seconds[1]
    return {"of": upper, "over": lower, "ratio": ratio, "target": target, "on": on, "seconds": list(seconds)}


def load_records(name: str) -> np.ndarray:
    """float32 [records, 12, samples] in millivolts."""
    if not (PTBXL / name).is_file():
        raise SystemExit(f"There is no {PTBXL / name}: the benchmark measures real PTB-XL records.")
    return np.load(PTBXL / name)["ecg"] / np.float32(1000)


def load_tokenizer(source: str | None) -> ECGByteTokenizer:
    if source is not None:
        return ECGByteTokenizer.from_pretrained(source)
    if DEFAULT.is_dir():
        return ECGByteTokenizer.from_pretrained(DEFAULT)
    return ECGByteTokenizer([merge for merge, _ in json.loads(GOLDEN.read_text())["merges"]])


def medians(works: Sequence[Callable[[Any], object]], items: Sequence[Any]) -> list[float]:
    """Median seconds of each work over the items; all find their item in the caches."""
    times: list[list[float]] = [[] for _ in works]
    for place, item in enumerate(items):
        works[-1](item)
        for index in list(range(len(works)))[:: -1 if place % 2 else 1]:
            start = time.perf_counter()
            works[index](item)
            times[index].append(time.perf_counter() - start)
    return [statistics.median(values) for values in times]


def reference_ids(ecg: np.ndarray, merges: list[str]) -> list[int]:
    """Ids in the reference's way: a symbol looked up for each value, and a trie built for each call."""
    low, high = ecg.min(), ecg.max()
    normalized = np.clip((ecg - low) / (high - low + np.float32(1e-6)), 0, 1)
    indices = np.minimum(np.floor(normalized * np.float32(26)), 25).astype(np.uint8)
    symbols = "".join([ALPHABET[index] for index in indices.ravel()])
    trie: dict = {symbol: {None: ord(symbol)} for symbol in ALPHABET}
    for token_id, merge in enumerate(merges, FIRST_MERGE_ID):
        node = trie
        for symbol in merge:
            node = node.setdefault(symbol, {})
        node[None] = token_id
    ids, place = [], 0
    while place < len(symbols):
        node, end = trie, place
        token_id, token_end = 0, place
        while end < len(symbols) and symbols[end] in node:
            node = node[symbols[end]]
            end += 1
            if None in node:
                token_id, token_end = node[None], end
        ids.append(token_id)
        place = token_end
    return ids


def measure_coding(ecgs: np.ndarray, tokenizer: ECGByteTokenizer, batch_size: int) -> list[dict[str, Any]]:
    ids = [tokenizer.encode(ecg) for ecg in ecgs]
    num_tokens = statistics.median(map(len, ids))
    print(f"{tokenizer}; a record has {ecgs[0].size:,} samples and about {num_tokens:,.0f} tokens", flush=True)
    works = [tokenizer.encode, lambda ecg: (ecg.min(), ecg.max())]
    rows = [row("encode", "ecg.min(), ecg.max()", medians(works, ecgs), "<= 20", f"{len(ecgs)} records")]

    # the same merges over each record's range and all leads, as the reference does it
    merges = tokenizer.merges
    fast, python = ECGByteTokenizer(merges), PythonTokenizer(merges)
    for ecg in ecgs[:3]:
        assert fast.encode(ecg).tolist() == python.encode(ecg).tolist() == reference_ids(ecg, merges)
    # ten records at a time, as the slow ones leave nothing of the other's in the caches
    blocks = ecgs[:50].reshape(5, 10, *ecgs.shape[1:])
    for name, slow, target in (
        ("the reference's way", lambda ecg: reference_ids(ecg, merges), ">= 300"),
        ("the Python fallback", python.encode, ""),
    ):
        works = [lambda block, work=work: [work(ecg) for ecg in block] for work in (slow, fast.encode)]
        rows.append(row(name, "encode", medians(works, blocks), target, "5 times 10 records"))

    items = [(ecg, ecg_ids, *tokenizer.value_range(ecg)) for ecg, ecg_ids in zip(ecgs, ids, strict=True)]
    works = [lambda item: tokenizer.decode(*item[1:], num_leads=12), lambda item: item[0].copy()]
    rows.append(row("decode", "ecg.copy()", medians(works, items), "", f"{len(items)} records"))

    batch = list(ecgs[:batch_size])
    works = [lambda batch, number=number: tokenizer.encode_batch(batch, num_threads=number) for number in (1, 2)]
    on = f"20 times {len(batch)} records, {os.cpu_count()} cores"
    rows.append(row("encode_batch, 1 thread", "2 threads", medians(works, [batch] * 20), ">= 1.7", on))
    return rows


def recount(tokens: np.ndarray) -> None:
    """One merge by counting all pairs anew, in the fastest way that NumPy offers; the largest id stands for borders."""
    border = size = int(tokens.max())
    left, right = tokens[:-1], tokens[1:]
    pairs = (left.astype(np.uint32) * np.uint32(size) + right.astype(np.uint32))[(left != border) & (right != border)]
    if size**2 < 30 * len(pairs):  # beyond, sorting is faster
        best = int(np.bincount(pairs).argmax())
    else:
        pairs.sort()
        ends = np.flatnonzero(np.append(pairs[1:] != pairs[:-1], True))
        best = int(pairs[ends[np.diff(ends, prepend=-1).argmax()]])
    starts = np.flatnonzero((left == best // size) & (right == best % size))
    merged = tokens.copy()
    merged[starts] = border
    np.delete(merged, starts + 1)


def seconds_of_recounting(tokens_of: Callable[[list[str]], np.ndarray], merges: list[str]) -> float:
    """What all merges would take with a recount for each, from a few of them, in between linear.

    The sequence after some merges is taken to be that of their greedy tokens.
    """
    times = []
    for stage in STAGES:
        tokens = tokens_of(merges[:stage])
        times += medians([recount], [tokens] * 3)
        print(f"a recount after {stage:,} merges, of {len(tokens):,} tokens: {times[-1]:.3f} s", flush=True)
    return float(np.trapezoid(times, STAGES))


def hugging_face_merges(parts: list[str]) -> list[str]:
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(ALPHABET) + NUM_MERGES,
        min_frequency=2,
        initial_alphabet=list(ALPHABET),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(parts, trainer)
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)[len(ALPHABET) :]


def measure_training() -> list[dict[str, Any]]:
    records = np.stack([resample(ecg, 100, 250) for ecg in load_records("raw100.npz")])
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "records.npy", records)
        command = [sys.executable, "-c", TRAIN, str(Path(folder) / "records.npy"), str(NUM_MERGES)]
        trained = json.loads(subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout)
    merges = trained["merges"]
    on = f"{len(records):,} records, {records.size:,} symbols, {len(merges):,} merges, {trained['gigabytes']:.2f} GB"
    print(f"training: {trained['seconds']:.1f} s; {on}", flush=True)

    def tokens_of(merges: list[str]) -> np.ndarray:
        encode, border = ECGByteTokenizer(merges).encode, [FIRST_MERGE_ID + len(merges)]
        return np.concatenate([part for ecg in records for part in (encode(ecg), border)]).astype(np.int32)

    seconds = [seconds_of_recounting(tokens_of, merges), trained["seconds"]]
    rows = [row("recounting all pairs", "train", seconds, ">= 100, < 30 s, < 4 GB", on)]

    fewer = records[:HUGGING_FACE_RECORDS]
    parts = [_quantize(ecg, None).decode() for ecg in fewer]
    start = time.perf_counter()
    theirs = hugging_face_merges(parts)
    middle = time.perf_counter()
    ours = ECGByteTokenizer.train(fewer, NUM_MERGES, show_progress=False).merges
    end = time.perf_counter()
    assert ours == theirs
    on = f"{len(fewer)} records, {fewer.size:,} symbols, the same {len(ours):,} merges"
    return [*rows, row("Hugging Face BpeTrainer", "train", [middle - start, end - middle], "", on)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or Hub id; default: the project's own, or else the golden one")
    parser.add_argument("--batch_size", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--train", action="store_true", help="measure training too, which takes two minutes")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if ecg_byte is None:
        raise SystemExit("The extension is not installed: uv run --extra symbolic python benchmarks/ecg_byte.py")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    ecgs = load_records("raw500.npz")[:, :, ::2].copy()
    rows = measure_coding(ecgs, load_tokenizer(args.tokenizer), args.batch_size)
    if args.train:
        rows += measure_training()
    print("\n| time of | over time of | ratio | target | measured on |\n| --- | --- | --- | --- | --- |")
    for entry in rows:
        times = " : ".join(f"{1e6 * value:,.0f}" for value in entry["seconds"])
        columns = (entry["of"], entry["over"], f"{entry['ratio']:.3g}", entry["target"], f"{entry['on']}; {times} us")
        print(f"| {' | '.join(columns)} |")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
