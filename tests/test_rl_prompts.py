import re
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.rl_prompts import Prompts, cat_ecgs, check_answers, last_answer
from helpers import tiny_processor

USER, ANSWER = {"role": "user", "content": "And the rhythm?"}, {"role": "assistant", "content": "sinus rhythm"}


def rows(*ecgs: int) -> Dataset:
    """Rows with so many ECGs, and two questions each."""
    made: list[dict[str, Any]] = []
    for index, number in enumerate(ecgs):
        records = [make_record(10 * index + i, 0, sampling_rate=100, seconds=5.0)["ecg"] for i in range(number)]
        for record in records:
            record["array"] = record["array"].tolist()
        first = [{"role": "user", "content": "Is it normal?"}, {"role": "assistant", "content": "yes"}]
        made.append({"messages": [*first, USER, ANSWER], "ecg": records, "record_id": f"r{index}", "age": 40 + index})
    return Dataset.from_list(made)


def prompts_of(data: Dataset, **changes: Any) -> Prompts:
    return Prompts(data, ELMCollator(tiny_processor(sampling_rate=100), **changes))


def test_the_last_answer_is_what_is_right():
    prompts = prompts_of(rows(1, 0))
    row = prompts.row(0)
    assert row["solution"] == "sinus rhythm"
    assert [turn["content"] for turn in row["prompt"]] == ["Is it normal?", "yes", "And the rhythm?"]
    assert (row["row"], row["age"], row["record_id"]) == (0, 40, "r0")
    assert "ecg" not in row
    text = prompts.collator.processor.tokenizer.decode(prompts[0].input_ids)
    assert "And the rhythm?" in text
    assert "sinus rhythm" not in text  # the earlier answer is there, and this one is not
    assert text.endswith("assistant<|end_header_id|>\n\n")


def test_columns_of_names_that_rewards_know_are_left_out():
    data = rows(1)
    data = data.add_column("solution", ["theirs"]).add_column("row", [7]).add_column("image", ["a.png"])
    row = prompts_of(data).row(0)
    assert (row["solution"], row["row"], row["age"]) == ("sinus rhythm", 0, 40)
    assert "image" not in row  # TRL would read it


def test_prompts_are_what_the_processor_makes_of_the_chat():
    data = rows(2, 0, 1)
    prompts = prompts_of(data)
    prompts.keep([0, 1, 2])
    batch = prompts.collator([data[number] for number in range(3)])  # as of fine-tuning, with the last answer
    for number in range(3):
        ids = batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist()
        own = prompts[number].input_ids
        assert ids[: len(own)] == own
    ecgs = cat_ecgs(prompts[number] for number in range(3))
    assert torch.equal(ecgs["ecg_values"], batch["ecg_values"])
    assert [len(prompts[number].ecgs.get("ecg_values", [])) for number in range(3)] == [2, 0, 1]
    assert cat_ecgs([prompts[1]]) == {}


def test_rows_are_read_once_and_forgotten(monkeypatch):
    prompts = prompts_of(rows(1, 0, 1))
    read: list[list[int]] = []
    monkeypatch.setattr(prompts, "_read", lambda numbers, of=prompts._read: read.append(list(numbers)) or of(numbers))
    prompts.keep([0, 0, 1])
    assert prompts[0].input_ids
    prompts.keep([1, 2])
    assert prompts[1].input_ids
    assert prompts[0].input_ids  # as after a resumed run
    assert read == [[0, 1], [2], [0]]


def test_zeros_in_place_of_the_ecg():
    data = rows(1)
    with_ecg, zeros = (prompts_of(data, perturb=perturb)[0] for perturb in (None, "zeros"))
    assert with_ecg.input_ids == zeros.input_ids
    assert not zeros.ecgs["ecg_values"].any()
    assert with_ecg.ecgs["ecg_values"].any()


def test_real_recordings(shared):
    records = sorted((shared / "data/ptbxl/wfdb_examples/records100/00000").glob("*.hea"))
    data = Dataset.from_list([{"messages": [USER, ANSWER], "ecg": str(path)} for path in records[:1]])
    processor = tiny_processor(truncation="start", missing_leads="zeros")
    prompt = Prompts(data, ELMCollator(processor))[0]
    assert prompt.ecgs["ecg_values"].shape == (1, 12, 500)
    assert np.isfinite(prompt.ecgs["ecg_values"].numpy()).all()


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([USER, ANSWER], 1),
        ([USER, ANSWER, USER], 1),
        ([USER], -1),
        ([], -1),
        ([ANSWER], -1),
        ([ANSWER, USER, ANSWER], 2),
    ],
)
def test_last_answer(messages, place):
    assert last_answer(messages) == place


@pytest.mark.parametrize("messages", [[USER], [ANSWER], []])
def test_a_row_without_answer(messages):
    data = Dataset.from_list([{"messages": [USER, ANSWER]}] * 1500 + [{"messages": messages}])
    with pytest.raises(ValueError, match=re.escape("Row 1,500 of the split 'train', counted from 0, has no answer")):
        check_answers(data, "train")
