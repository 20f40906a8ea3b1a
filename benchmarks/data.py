"""How many records a second come from parquet through the processor to tensors, and what memory a long stream takes.

    python benchmarks/data.py                              # against a training step of the quickstart's model
    python benchmarks/data.py --sampling_rate 500          # records as PTB-XL's, resampled to the model's 125 Hz
    python benchmarks/data.py --stream_rows 60000          # peak memory while so many rows are streamed

Simulated records of 12 leads x 10 s, int16 microvolts, a chat each, in batches of 32: cached by `datasets` and shuffled, or
streamed with its shuffle buffer, with 0, 1 and 2 worker processes; each process has one thread. The training step (forward, backward,
optimizer) has two, or the accelerator.
"""

import argparse
import os
import resource
import tempfile
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from common import DEVICE, add_arguments, build, interleaved
from datasets import Dataset, disable_progress_bars
from torch.utils.data import DataLoader
from tqdm import tqdm

from elm_ecg.training.arguments import DataArguments
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.loading import load_data
from elm_ecg.training.data.streams import load_stream
from elm_ecg.training.data.synthetic import make_record

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are forked
BATCH_SIZE = 32
ROW_GROUP = 100


def save_parquet(folder: Path, num_rows: int, distinct: int, sampling_rate: int, seed: int) -> None:
    """`num_rows` rows of `distinct` records, in row groups as `elm data build` writes them."""
    rows = [make_record(index, seed, sampling_rate=sampling_rate) for index in range(distinct)]
    columns = ("ecg", "messages", "record_id")
    # through JSON-like rows NumPy arrays lose their type
    table = Dataset.from_list([{name: row[name] for name in columns} for row in rows]).data.table.combine_chunks()
    with pq.ParquetWriter(folder / "train.parquet", table.schema, compression="zstd") as writer:
        for start in range(0, num_rows, ROW_GROUP):
            first = start % distinct
            writer.write_table(table.slice(first, min(ROW_GROUP, num_rows - start)), row_group_size=ROW_GROUP)


def resident() -> float:
    """MiB that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def watch_memory(loader: Iterable, num_rows: int) -> None:
    samples: list[tuple[int, float]] = []
    with tqdm(total=num_rows, unit="row", desc="Streaming") as progress:
        for number, _ in enumerate(islice(loader, num_rows // BATCH_SIZE)):
            progress.update(BATCH_SIZE)
            samples.append(((number + 1) * BATCH_SIZE, resident()))
    tenth = len(samples) // 10
    print("\n| rows | highest memory, MiB |\n| --- | --- |")
    for part in range(10):
        rows = samples[part * tenth : (part + 1) * tenth]
        print(f"| {rows[0][0]:,} to {rows[-1][0]:,} | {max(memory for _, memory in rows):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--num_rows", type=int, default=640, help="of a repeat; default: %(default)s")
    parser.add_argument("--sampling_rate", type=int, default=125, help="of the records, Hz; default: %(default)s")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="default: %(default)s")
    parser.add_argument("--shuffle_buffer", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--stream_rows", type=int, metavar="ROWS", help="watch the memory over so many rows instead")
    args = parser.parse_args()
    disable_progress_bars()
    model, processor = build(args)
    collator = ELMCollator(processor)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_args = DataArguments(data=[name])
        if args.stream_rows is not None:
            save_parquet(folder, args.stream_rows, 1000, args.sampling_rate, args.seed)
            stream = load_stream(data_args, "train", args.seed, args.shuffle_buffer)
            watch_memory(DataLoader(stream, BATCH_SIZE, collate_fn=collator), args.stream_rows)
            return
        save_parquet(folder, args.num_rows, args.num_rows, args.sampling_rate, args.seed)
        cached = load_data(data_args, "train", args.seed)
        stream = load_stream(data_args, "train", args.seed, args.shuffle_buffer)
        num_batches = args.num_rows // BATCH_SIZE

        def feed(data: Dataset, num_workers: int) -> None:
            shuffle = True if isinstance(data, Dataset) else None
            loader = DataLoader(data, BATCH_SIZE, shuffle, collate_fn=collator, num_workers=num_workers)
            for _ in islice(loader, num_batches):
                pass

        batches = list(islice(DataLoader(cached, BATCH_SIZE, collate_fn=collator), num_batches))
        batches = [{key: value.to(DEVICE) for key, value in batch.items()} for batch in batches]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        model.train()
        num_threads = torch.get_num_threads()

        def train() -> None:
            torch.set_num_threads(num_threads)
            for batch in batches:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            torch.set_num_threads(1)

        works = {"training step": train}
        for kind, data in (("cached", cached), ("streamed", stream)):
            works |= {f"{kind}, {number} workers": partial(feed, data, number) for number in args.workers}
        times = interleaved(works, args.repeats)
        count = num_batches * BATCH_SIZE
    print(
        f"{count} records at {args.sampling_rate} Hz, chats of {np.mean([len(b['input_ids'][0]) for b in batches]):.0f} tokens\n"
    )
    print("| | records/s | times the training step |\n| --- | --- | --- |")
    for name, time in times.items():
        print(f"| {name} | {count / time:.0f} | {times['training step'] / time:.1f} |")


if __name__ == "__main__":
    main()
