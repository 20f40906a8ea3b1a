"""The chats of a split as prompts of reinforcement learning: each up to its last answer, which is the right one."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from elm_ecg.modeling_elm import ECG_INPUTS
from elm_ecg.training.collator import ELMCollator, naming_records
from elm_ecg.training.data.loading import to_chat

# names under which rewards, or TRL, get something else than a column of the data
TAKEN = {"row", "prompt", "prompts", "solution", "completion", "completions", "completion_ids", "image", "images"}
TAKEN |= {
    "environment",
    "environments",
    "trainer_state",
    "log_extra",
    "log_metric",
    "think_given",
    "max_completion_length",
}


@dataclass
class Prompt:
    """What the model reads before it answers.

    Args:
        ecgs: `ECG_INPUTS` of its ECGs, each tensor [number of ECGs, ...]; empty where it has none.
    """

    input_ids: list[int]
    ecgs: dict[str, torch.Tensor]


@dataclass
class Prompts:
    """The rows of a split by their numbers, as prompts and right answers.

    Args:
        collator: says what becomes of the ECGs.
        template_kwargs: variables of the chat template.
        max_length: tokens that a prompt may have, so that an answer fits behind it; None: any number.
    """

    data: Dataset
    collator: ELMCollator
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None

    def __post_init__(self) -> None:
        columns = [name for name in self.data.column_names if name not in {"ecg", *TAKEN}]
        self._texts = self.data.with_format(None).select_columns(columns)  # no ECG is read for them
        self._kept: dict[int, Prompt] = {}

    def row(self, number: int) -> dict[str, Any]:
        """The columns of a row but for its ECG and those in `TAKEN`, with `row`, `prompt` and `solution`, as TRL gives them to the
        rewards."""
        row = self._texts[number]
        turns = [{"role": turn["role"], "content": _text(turn["content"])} for turn in row["messages"]]
        place = last_answer(row["messages"])
        return {**row, "row": number, "prompt": turns[:place], "solution": turns[place]["content"]}

    def keep(self, numbers: Iterable[int]) -> None:
        """Reads these rows at once, and forgets all others."""
        numbers = list(dict.fromkeys(numbers))
        new = [number for number in numbers if number not in self._kept]
        read = dict(zip(new, self._read(new), strict=True)) if new else {}
        self._kept = {number: read[number] if number in read else self._kept[number] for number in numbers}

    def __getitem__(self, number: int) -> Prompt:
        if number not in self._kept:
            self._kept[number] = self._read([number])[0]
        return self._kept[number]

    def _read(self, numbers: Sequence[int]) -> list[Prompt]:
        collator, rows = self.collator, [dict(self.data[number]) for number in numbers]
        processor = collator.processor
        with naming_records(rows):
            chats = []
            for row in rows:
                place = last_answer(row["messages"])
                if collator.takes_ecgs:
                    row["ecg"] = collator.ecgs_of_row(row)
                chats.append(to_chat(row, collator.takes_ecgs)[:place])
            columns: Any = processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors=None,  # prompts of different lengths make no tensor
                processor_kwargs={"padding": False},
                **self.template_kwargs,
            )
        tensors = {name: torch.as_tensor(np.asarray(columns[name])) for name in ECG_INPUTS if name in columns}
        counts = [sum(part["type"] == "ecg" for turn in chat for part in turn["content"]) for chat in chats]
        ends = np.cumsum(counts)
        prompts = []
        for row, ids, end, count in zip(rows, columns["input_ids"], ends, counts, strict=True):
            if self.max_length is not None and len(ids) > self.max_length:
                raise ValueError(
                    f"The prompt of the record {row.get('record_id') or 'without id'} has {len(ids):,} tokens, and behind it there is no room "
                    f"for an answer: this language model reads {self.max_length:,} before one of --max_completion_length. Lower that option, "
                    "or leave the row out."
                )
            ecgs = {name: values[end - count : end] for name, values in tensors.items()} if count else {}
            prompts.append(Prompt(list(ids), ecgs))
        return prompts


def last_answer(messages: Sequence[dict[str, Any]]) -> int:
    """The place of the last answer of a chat; -1 without one, or where nothing stands before it."""
    places = [place for place, turn in enumerate(messages) if turn["role"] == "assistant"]
    return places[-1] if places and places[-1] > 0 else -1


def _text(content: Any) -> str:
    """A message in words: `<signal>` and a newline where an ECG stands."""
    if isinstance(content, str):
        return content
    return "".join("<signal>\n" if part["type"] == "ecg" else part["text"] for part in content)


def check_answers(data: Dataset, split: str) -> None:
    """ValueError if a chat has no answer to be compared with."""
    messages = data.with_format(None).select_columns(["messages"])
    number = 0
    for batch in messages.iter(1000):  # faster than row by row
        for chat in batch["messages"]:
            turns = [turn for turn in chat or [] if isinstance(turn, dict) and "role" in turn]
            if last_answer(turns) == -1:
                raise ValueError(
                    f"Row {number:,} of the split {split!r}, counted from 0, has no answer: {str(chat)[:200]}. Rewards compare what the model "
                    "writes with the last turn of role assistant; leave such rows out."
                )
            number += 1


def cat_ecgs(prompts: Iterable[Prompt]) -> dict[str, torch.Tensor]:
    """The ECGs of several prompts, in their order; empty where none has any."""
    ecgs = [prompt.ecgs for prompt in prompts if prompt.ecgs]
    return {name: torch.cat([own[name] for own in ecgs]) for name in (ecgs[0] if ecgs else ())}
