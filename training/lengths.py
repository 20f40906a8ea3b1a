"""`--train_sampling_strategy group_by_length`: how long the chats will be, before any ECG is read, and batches of like lengths."""

from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler

from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.loading import to_chat

CHATS_AT_ONCE = 1000
MEASURED = 8  # chats with symbolic ECGs of which the tokens of an ECG are counted


class GroupedByLength(LengthGroupedSampler):
    """As of transformers, in an order that depends on `seed` and epoch alone: equal in all processes, and after a resume.

    Args:
        lengths: tokens of each chat.
        batch_size: chats of a step.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        # seed + epoch would repeat those of the next seed
        seed = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        self.generator = torch.Generator().manual_seed(int(seed[0]))


def chat_lengths(dataset: Dataset, collator: ELMCollator) -> list[int]:
    """Tokens of each chat as the collator makes them, without reading the ECGs.

    A symbolic ECG has as many tokens as its record needs: here all count as many as the first few have on average.
    """
    num_ecgs = _num_ecgs(dataset) if collator.takes_ecgs else np.zeros(len(dataset), int)
    lengths: list[int] = []
    for chats in dataset.select_columns("messages").iter(CHATS_AT_ONCE):
        lengths += _text_lengths(chats["messages"], num_ecgs[len(lengths) :], collator)
    return (np.array(lengths) + num_ecgs * (_tokens_per_ecg(dataset, num_ecgs, lengths, collator) - 1)).tolist()


def _text_lengths(chats: list[Any], num_ecgs: np.ndarray, collator: ELMCollator) -> list[int]:
    """Tokens of chats in which each ECG is a single placeholder."""
    processor = collator.processor
    rows = [{"messages": chat, "ecg": ["not read"] * number} for chat, number in zip(chats, num_ecgs, strict=False)]
    texts = processor.apply_chat_template([to_chat(row, collator.takes_ecgs) for row in rows], tokenize=False)
    return [len(ids) for ids in processor.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _num_ecgs(dataset: Dataset) -> np.ndarray:
    """How many ECGs each row has, from the table that holds them: no sample is read."""
    if "ecg" not in dataset.column_names:
        return np.zeros(len(dataset), int)
    chunks = dataset.data["ecg"].chunks
    counts = [
        chunk.value_lengths().fill_null(0) if pa.types.is_list(chunk.type) else chunk.is_valid() for chunk in chunks
    ]
    stored = np.concatenate([one.to_numpy(zero_copy_only=False).astype(int) for one in counts])
    # rows that were chosen or shuffled are numbers of those in the table
    return stored if dataset._indices is None else stored[dataset._indices.column(0).to_numpy()]


def _tokens_per_ecg(dataset: Dataset, num_ecgs: np.ndarray, lengths: list[int], collator: ELMCollator) -> int:
    if collator.processor.representation != "symbolic":
        return collator.processor.num_ecg_tokens
    numbers = list(islice(np.flatnonzero(num_ecgs), MEASURED))
    whole = sum(int(collator.for_evaluation()([dataset[int(number)]])["attention_mask"].sum()) for number in numbers)
    words = sum(lengths[number] - num_ecgs[number] for number in numbers)
    return round((whole - words) / max(1, num_ecgs[numbers].sum()))
