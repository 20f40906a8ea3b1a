"""Datasets of chats about ECGs whose rows are read as they are needed."""

import logging
from collections.abc import Callable, Iterator
from itertools import count, cycle
from typing import TYPE_CHECKING, Any

import datasets
import fsspec.asyn
import numpy as np
import torch.utils.data
from datasets import Dataset, Features, IterableDataset

from elm_ecg.training.data.loading import STREAMED_ROWS, is_answered, load_parts, weights_of, with_arrays

if TYPE_CHECKING:
    from elm_ecg.training.arguments import DataArguments  # imports TRL, which takes seconds

logger = logging.getLogger(__name__)


def load_stream(
    args: "DataArguments",
    split: str,
    seed: int = 0,
    shuffle_buffer: int | None = None,
    column: str = "messages",
    change: Callable[[Any, str], Any] | None = None,
) -> "RowStream | None":
    """The rows of `load_data`, read as they are needed; None where no dataset has that split.

    Args:
        column: that the rows have to have, as of `load_split`.
        shuffle_buffer: rows that are shuffled among each other; the stream is then endless. None reads them once, in order.
        change: makes of each dataset, with its name, the one that is read.

    Raises:
        ValueError: as `load_data`; `args.data_subset` is set.
    """
    if args.data_subset is not None:
        raise ValueError(
            "--data_subset with --streaming, which does not know the number of rows; set --max_steps instead."
        )
    parts = load_parts(args, split, column, streaming=True)
    if change is not None:
        parts = [None if part is None else change(part, name) for part, name in zip(parts, args.data, strict=True)]
    have_split = [part is not None for part in parts]
    if not any(have_split):
        return None
    endless = shuffle_buffer is not None
    weights = None if args.data_weights is None or not endless else weights_of(args, have_split)
    return RowStream([part for part in parts if part is not None], weights, shuffle_buffer, seed)


class RowStream(torch.utils.data.IterableDataset):
    """Rows of streamed datasets. Their order depends only on `seed` and the number of data loader workers.

    A shuffled stream is endless, and each pass has another order: pieces of the files (row groups of parquet) come in random
    order, and rows are shuffled within a buffer. The shuffling of `datasets` copies each row, which is 20 times slower, and
    leaves workers idle where there are fewer files than workers.

    Args:
        sources: one or several.
        weights: the share of the rows that each source is to have; None reads each of their rows once a pass.
        shuffle_buffer: rows that are held and shuffled; None keeps the order and ends after one pass.

    Each row has its `epoch`, the pass over its source.
    """

    def __init__(
        self, sources: list[IterableDataset], weights: list[float] | None, shuffle_buffer: int | None, seed: int
    ) -> None:
        self.sources = [source.reshard() for source in sources]  # row groups, not files, so that workers share a file
        self.weights = weights
        self.shuffle_buffer = shuffle_buffer
        self.seed = seed
        self.left_out = 0  # rows with an empty answer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            fsspec.asyn.reset_lock()  # remote files would hang in a forked process
        place, places = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if self.weights is None:
            yield from self._passes(self.sources, place, places)
            return
        streams = [self._passes([source], place, places) for source in self.sources]
        rng = np.random.default_rng([self.seed, place])  # workers draw independently of each other
        while True:
            for choice in rng.choice(len(streams), size=1000, p=self.weights):  # many at once are drawn faster
                if (row := next(streams[choice], None)) is None:
                    return  # it has no rows for this worker
                yield row

    def _passes(self, sources: list[IterableDataset], place: int, places: int) -> Iterator[dict[str, Any]]:
        for epoch in count() if self.shuffle_buffer is not None else (0,):
            row = None
            for row in self._pass(sources, epoch, place, places):
                yield {**row, "epoch": epoch}
            if row is None:  # nothing for this worker: an endless stream would spin here
                return

    def _pass(self, sources: list[IterableDataset], epoch: int, place: int, places: int) -> Iterator[dict[str, Any]]:
        pieces = [(source, piece) for source in sources for piece in range(source.num_shards)]
        if self.shuffle_buffer is not None:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(pieces))  # alike in all workers
            pieces = [pieces[index] for index in order]
        by_piece = len(pieces) >= places  # else every worker reads all, and takes its share of the rows
        if by_piece:
            pieces = pieces[place::places]
        rng = np.random.default_rng([self.seed, epoch, place])
        turn = cycle(range(places))  # deals out the rows where pieces are too few
        held: list[tuple[Dataset, int]] = []  # tables and row numbers: a row is decoded only when it is yielded
        for source, piece in pieces:
            for block in _blocks(source.shard(source.num_shards, piece)):
                held += [(block, row) for row in range(len(block)) if by_piece or next(turn) == place]
                if self.shuffle_buffer is None or len(held) >= self.shuffle_buffer:
                    yield from self._release(held, rng)
                    held = []
        yield from self._release(held, rng)

    def _release(self, held: list[tuple[Dataset, int]], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
        order = range(len(held)) if self.shuffle_buffer is None else rng.permutation(len(held))
        for index in order:
            block, number = held[index]
            row = block[number]
            if is_answered(row.get("messages")):
                yield row
                continue
            self.left_out += 1
            if str(self.left_out).strip("0") == "1":  # the first, the tenth, the hundredth
                logger.warning("%s rows so far are left out, as they have an empty answer", self.left_out)


def _blocks(source: IterableDataset) -> Iterator[Dataset]:
    """The rows as small tables that are read as those of a whole dataset are."""
    for table in source.with_format("arrow").iter(STREAMED_ROWS):
        features = source.features or Features.from_arrow_schema(table.schema)  # JSON and CSV may not say
        yield with_arrays(Dataset(table, datasets.DatasetInfo(features=features)))
