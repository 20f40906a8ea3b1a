"""Rows of chats with ECGs to a batch that the ELM trains on."""

import json
import logging
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from elm_ecg.ecg_utils import ECGRecord, as_record
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import AugmentationArguments
from elm_ecg.training.augmentation import NO_AUGMENTATION, augmented, augmented_rgb, perturbed
from elm_ecg.training.chat_templates import for_reports
from elm_ecg.training.data.loading import ecgs_of, notices_of, to_chat
from elm_ecg.training.packing import ROW_TOKENS, common_begin, pack, shared_rows

logger = logging.getLogger(__name__)


@contextmanager
def naming_records(rows: list[dict[str, Any]]) -> Iterator[None]:
    """Names the records of a batch in an error (ValueError) of the block, where they have names."""
    try:
        yield
    except (ValueError, OSError) as error:
        # several rows may be about one record
        records = dict.fromkeys(str(row["record_id"]) for row in rows if row.get("record_id") is not None)
        if not records:
            raise
        raise ValueError(f"In the batch of the records {', '.join(records)}: {error}") from error


def tell_notices(
    record: ECGRecord, row: dict[str, Any], extractor: Any, known: dict[Any, list[str]], told: set[str]
) -> None:
    """Logs the notices about a record of a row that are not among those that were `told`; `known` is of `notices_of`."""
    for notice in notices_of(record, extractor, known):
        if notice not in told:
            told.add(notice)
            logger.warning("%s (record %s; not told again)", notice, row.get("record_id") or "without id")


@dataclass
class ELMCollator:
    """Pads to the longest chat of the batch, or packs; labels are the assistant's turns, their end-of-turn included.

    What is random about an ECG depends on `seed`, `epoch` and the row alone, not on what else was drawn before: a run that
    is resumed, or that has other workers, sees the same. Each distinct notice about a record is logged once in each process.

    Args:
        perturb: what becomes of every ECG: `noise`, `zeros`, or `only_text` to leave it out.
        augment_ecg: change some of the ECGs, as `augmented_ecg` does.
        augment_rgb: change some of the drawings, as `augmented_rgb` does; for the representation `rgb`.
        time_shift: seconds by which a recording begins later at most, see `time_shifted`.
        gain_jitter: share by which the amplitude of a recording is larger or smaller at most.
        lead_dropout: probability of each lead to be lost, see `with_lost_leads`.
        max_length: tokens that a chat may have at most; the processor may allow fewer.
        pad_to_multiple_of: number of tokens, of which that of a batch is a multiple.
        padding_free: one row for all chats of the batch, without padding, see `pack`.
        packing: rows of several chats, of at most `max_length` tokens, or `ROW_TOKENS`.
        max_tokens_to_share: rows of fewer tokens have once what their chats begin with alike; 0: none have.
        train_phase: `sft`, or `pretrain` for chats that become reports without a chat template, see `for_reports`.
        epoch: the trainer counts it up, in memory that data loader workers share, those that persist too.
        told, known: the notices that were logged, and those of `notices_of`.
    """

    processor: ELMProcessor
    perturb: str | None = None
    augment_ecg: bool = False
    augment_rgb: bool = False
    time_shift: float = 0.0
    gain_jitter: float = 0.0
    lead_dropout: float = 0.0
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    padding_free: bool = False
    packing: bool = False
    max_tokens_to_share: int = 0
    train_phase: str = "sft"
    seed: int = 0
    epoch: Any = 0
    told: set[str] = field(default_factory=set, repr=False)
    known: dict[Any, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.perturb not in (None, "noise", "zeros", "only_text"):
            raise ValueError(f"perturb is {self.perturb!r}; expected noise, zeros, only_text or None.")
        self.epoch = torch.tensor(int(self.epoch)).share_memory_()
        AugmentationArguments(**{name: getattr(self, name) for name in NO_AUGMENTATION})  # checks their values
        if self.augment_rgb and self.processor.representation != "rgb":
            raise ValueError(
                f"--augment_rgb with a model of {self.processor.representation!r} ECGs; only 'rgb' ones are drawn."
            )
        if self.train_phase == "pretrain":
            self.processor = for_reports(self.processor)
        if self.max_length is not None:  # of training alone: the processor that is saved keeps its own
            self.processor = copy(self.processor)
            self.processor.max_length = min(self.max_length, self.processor.max_length or self.max_length)

    def for_evaluation(self) -> "ELMCollator":
        """The same, but nothing is augmented and each chat has its row; `perturb` stays."""
        return replace(self, **NO_AUGMENTATION, padding_free=False, packing=False)

    @property
    def takes_ecgs(self) -> bool:
        """Whether the chats keep their ECGs."""
        return self.perturb != "only_text" and self.processor.takes_ecgs

    @property
    def longest_row(self) -> float:
        """Tokens that a row of `packing` may have; a longer chat has its row."""
        longest = max(self.max_length or ROW_TOKENS, self.processor.max_length or math.inf)
        return longest + (self.pad_to_multiple_of or 0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        with naming_records(rows):
            return self._batch(rows)

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        with_ecg = self.takes_ecgs
        if with_ecg:
            rows = [{**row, "ecg": self.ecgs_of_row(row)} for row in rows]
        chats = [to_chat(row, with_ecg) for row in rows]
        batch: Any = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,  # of what the template has within {% generation %}
            return_tensors=None,  # the mask is found token by token, which takes 50 times as long in tensors
            # left is for generation
            processor_kwargs={"padding": True, "padding_side": "right", "pad_to_multiple_of": self.pad_to_multiple_of},
        )
        batch.convert_to_tensors("pt")  # of texts [batch, tokens], of ECGs [all ECGs of the batch, ...]
        answers = batch.pop("assistant_masks").bool()  # [batch, tokens], True where the model answers
        if not answers.any(-1).all():
            row = rows[int(answers.any(-1).logical_not().nonzero()[0])]
            raise ValueError(
                f"The chat {row['messages']} has no assistant turn to learn from, or the chat template does not mark it "
                "with {% generation %}."
            )
        # an ECG in an answer is not learnt: it was given, and its tokens may lie beyond the vocabulary
        of_ecgs = torch.tensor([self.processor.ecg_token_id, *self.processor.signal_token_ids])
        answers &= torch.isin(batch["input_ids"], of_ecgs, invert=True)
        batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)  # no loss there
        if not (self.padding_free or self.packing):
            return dict(batch)
        return self._packed(dict(batch), [len(row["ecg"]) if with_ecg else 0 for row in rows])

    def _packed(self, batch: dict[str, torch.Tensor], num_ecgs: list[int]) -> dict[str, torch.Tensor]:
        """See `pack`; `num_ecgs` of each chat."""
        tokenizer, ecg_token_id = self.processor.tokenizer, self.processor.ecg_token_id
        lengths, limit = batch["attention_mask"].sum(-1).tolist(), self.max_length or ROW_TOKENS
        begin, rows = 0, [list(range(len(lengths)))]
        if self.packing:
            longest = max(limit, *lengths) + (self.pad_to_multiple_of or 0)  # a row
            begin = common_begin(batch, ecg_token_id) if longest < self.max_tokens_to_share else 0
            rows = shared_rows(lengths, limit, begin)
        names = [*tokenizer.model_input_names, "labels"]
        return pack(batch, rows, num_ecgs, names, tokenizer.pad_token_id, self.pad_to_multiple_of, [begin] * len(rows))

    def ecgs_of_row(self, row: dict[str, Any]) -> list[Any]:
        """The ECGs of a row as records, changed by the options; as drawings where `augment_rgb` changes these."""
        records: list[Any] = [ecg if isinstance(ecg, Image.Image) else as_record(ecg) for ecg in ecgs_of(row)]
        extractor = self.processor.feature_extractor
        signals = [record for record in records if not isinstance(record, Image.Image)]
        for record in signals:
            tell_notices(record, row, extractor, self.known, self.told)
        if not (self.perturb or any(getattr(self, name) for name in NO_AUGMENTATION)):
            return records
        epoch, words = row.get("epoch", int(self.epoch)), zlib.crc32(json.dumps(row["messages"], default=str).encode())
        ecgs: list[Any] = []
        for record in records:  # crc32, as `hash` of a text differs between processes
            # by content: neither the order of the rows nor that of the options changes what is drawn
            rng = np.random.default_rng([self.seed, epoch, words, zlib.crc32(record.array.tobytes())])
            record = replace(record, array=perturbed(record.array, self.perturb, rng))
            as_missing = self.processor.feature_extractor.missing_leads == "zeros"
            record = augmented(record, self, rng, as_missing)
            ecgs.append(augmented_rgb(self.processor.draw(record), rng) if self.augment_rgb else record)
        return ecgs
