"""TRL's trainer of direct preference optimization, for pairs of answers about any number of ECGs."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOTrainer

from elm_ecg.training.checkpoints import WholeCheckpoints
from elm_ecg.training.collator import ELMCollator, naming_records
from elm_ecg.training.lora import keep_statistics
from elm_ecg.training.muon import OptimizesByMuon
from elm_ecg.training.trainer import CollatesECGs, gather_head

PAIR = ("chosen", "rejected")  # columns of a row: the better answer and the worse one


def answer_of_pair(value: Any) -> str | None:
    """The text of an answer, which is a text, or as TRL has it a chat of one message; None of what is neither, or empty."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    return value if isinstance(value, str) and value.strip() else None


def check_pairs(data: Dataset, split: str) -> None:
    """ValueError if a row is no prompt with a better and a worse answer."""
    if lacking := [name for name in PAIR if name not in data.column_names]:
        raise ValueError(
            f"The split {split!r} has no column {' and no '.join(lacking)}, but {', '.join(data.column_names)}; expected beside messages, the "
            "prompt, the answers chosen and rejected."
        )
    number = 0
    for batch in data.with_format(None).select_columns(["messages", *PAIR]).iter(1000):  # faster than row by row
        for messages, *pair in zip(batch["messages"], *(batch[name] for name in PAIR), strict=True):
            answers = [answer_of_pair(value) for value in pair]
            fault = next(
                (
                    f"{name} is {value!r:.100}, no text"
                    for name, value, text in zip(PAIR, pair, answers, strict=True)
                    if text is None
                ),
                None,
            )
            if fault is None and answers[0] == answers[1]:
                fault = f"chosen and rejected are both {answers[0]!r:.100}"
            if fault is None and (not messages or messages[-1]["role"] != "user"):
                fault = "messages do not end with a turn of role user"
            if fault is not None:
                raise ValueError(
                    f"Row {number:,} of the split {split!r}, counted from 0: {fault}; leave such rows out."
                )
            number += 1


@dataclass
class PairsCollator:
    """Rows with `messages`, the prompt, and the answers `chosen` and `rejected`, to the batch of TRL's trainer: all better answers,
    then all worse ones, each behind its prompt with the same ECGs.

    The batch is that of `ELMCollator`, with `completion_mask` [2 x rows, tokens] in place of labels: 1 where the answer stands,
    with its end of turn.

    Args:
        collator: says what becomes of the ECGs.
    """

    collator: ELMCollator

    def for_evaluation(self) -> "PairsCollator":
        """The same, without random changes."""
        return PairsCollator(self.collator.for_evaluation())

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        collator = self.collator
        with naming_records(rows):
            if collator.takes_ecgs:  # changed at random once, alike for both answers
                rows = [{**row, "ecg": collator.ecgs_of_row(row)} for row in rows]
        pairs = [
            {**row, "messages": [*row["messages"], {"role": "assistant", "content": answer_of_pair(row[name])}]}
            for name in PAIR
            for row in rows
        ]
        plain = replace(collator.for_evaluation(), perturb="only_text" if collator.perturb == "only_text" else None)
        batch = plain(pairs)
        answers = batch.pop("labels") != -100  # [2 x rows, tokens], with earlier answers of the prompt
        begins = answers & ~torch.nn.functional.pad(answers, (1, 0))[:, :-1]
        numbers = begins.cumsum(1)  # [2 x rows, tokens], of the answer that a token belongs to
        batch["completion_mask"] = (answers & (numbers == numbers[:, -1:])).long()
        return batch


class ELMDPOTrainer(CollatesECGs, OptimizesByMuon, WholeCheckpoints, DPOTrainer):
    """TRL's trainer for ELMs.

    Args:
        kwargs: for `WholeCheckpoints` and TRL's trainer; the collator is a `PairsCollator`.
    """

    def __init__(self, **kwargs: Any):
        model = kwargs["model"]
        if kwargs.get("peft_config") is None and not isinstance(model, PeftModel):
            # TRL would load it from its folder, which a new model has not
            kwargs["ref_model"] = copy.deepcopy(model).requires_grad_(False).eval()
        super().__init__(**kwargs)
        adapters = getattr(self.model, "peft_config", {})
        if "ref" in adapters:  # a copy of a new adapter, which changes nothing: the model without it is the same
            self.model.delete_adapter("ref")  # type: ignore[union-attr,operator]

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As it is: TRL would tokenize the chats, without their ECGs."""
        return dataset

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, with batch norm and head as they have to be."""
        keep_statistics(model)
        gather_head(self.model)
        return super().compute_loss(model, *args, **kwargs)
