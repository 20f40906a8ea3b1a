import json

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.lengths import GroupedByLength, chat_lengths
from helpers import fork_two, save_tiny_data, tiny_processor, tiny_sft, tiny_symbolic_processor


def rows_of(count: int, rate: int) -> Dataset:
    """Simulated chats, every third without ECG, in which words of different numbers come first."""
    rows = []
    for index in range(count):
        row = make_record(index, 0, sampling_rate=rate, seconds=5.0)
        row["messages"] = row["messages"][: 2 * (1 + index % 4)]
        row["ecg"] = None if index % 3 == 1 else row["ecg"] | {"array": row["ecg"]["array"].tolist()}
        rows.append({"messages": row["messages"], "ecg": row["ecg"]})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("only_text", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_lengths_are_those_of_the_collator(shuffled, only_text):
    processor = tiny_processor(truncation="end")
    processor.system_prompt = "Be brief."
    dataset = rows_of(7, 250)
    dataset = concatenate_datasets([dataset, dataset.select([5, 1, 0])]).shuffle(seed=0) if shuffled else dataset
    collator = ELMCollator(processor, perturb="only_text" if only_text else None)
    expected = [collator([row])["input_ids"].shape[1] for row in dataset]
    assert chat_lengths(dataset, collator) == expected


def test_several_ecgs_and_places_in_the_text():
    row = rows_of(1, 250)[0]
    question = {"role": "user", "content": [{"type": "text", "text": "Is "}, {"type": "ecg"}, {"type": "ecg"}]}
    dataset = Dataset.from_list(
        [
            {
                "messages": [question, {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}],
                "ecg": 2 * [row["ecg"]],
            }
        ]
    )
    collator = ELMCollator(tiny_processor(truncation="end"))
    assert chat_lengths(dataset, collator) == [collator([dataset[0]])["input_ids"].shape[1]]


def test_lengths_of_symbolic_ecgs_are_right_on_average():
    processor = tiny_symbolic_processor(extractor={"num_samples": 200, "truncation": "end"})
    dataset, collator = rows_of(9, 100), ELMCollator(processor)
    expected = [collator([row])["input_ids"].shape[1] for row in dataset]
    lengths = chat_lengths(dataset, collator)
    assert sum(lengths) == pytest.approx(sum(expected), rel=0.01)
    for length, true, row in zip(lengths, expected, dataset, strict=True):
        assert row["ecg"] is not None or length == true


def test_the_order_depends_on_seed_and_epoch_alone():
    lengths = np.random.default_rng(0).integers(10, 100, 200).tolist()
    sampler = GroupedByLength(lengths, 8, seed=3)
    first = list(sampler)
    torch.rand(5)  # as dropout does
    sampler.set_epoch(1)
    second = list(sampler)
    resumed = GroupedByLength(lengths, 8, seed=3)
    resumed.set_epoch(1)
    assert sorted(first) == sorted(second) == list(range(200))
    assert first != second == list(resumed) != list(GroupedByLength(lengths, 8, seed=4))


def test_little_is_padded():
    lengths = np.random.default_rng(0).integers(10, 100, 400)
    shares = []
    for order in (range(400), GroupedByLength(lengths.tolist(), 8, seed=0)):
        batches = lengths[list(order)].reshape(-1, 8)
        shares.append(1 - batches.sum() / (8 * batches.max(-1).sum()))
    assert shares[0] > 0.3
    assert shares[1] < 0.1


STEPS = """
import json, os, sys
from elm_ecg.training import collator, sft
seen, call = [], collator.ELMCollator.__call__
def note(self, rows):
    seen.extend(row["record_id"] for row in rows)
    return call(self, rows)
collator.ELMCollator.__call__ = note
sft.main(sys.argv[2:])
json.dump(seen, open(sys.argv[1] + os.environ["RANK"], "w"))
"""


def test_two_processes_see_each_chat_once_an_epoch(llm, tmp_path):
    data = save_tiny_data(tmp_path / "data", without_ecg=2, train=8)
    options = ["--num_train_epochs", "2", "--batch_size", "2", "--train_sampling_strategy", "group_by_length"]
    argv = tiny_sft(llm, data, tmp_path / "run", *options, "--distributed", encoder="st_mem")
    for process in fork_two(STEPS, str(tmp_path / "seen"), *argv):
        done = process.finish()
        assert done.returncode == 0, done.stderr
    seen = [json.loads((tmp_path / f"seen{rank}").read_text()) for rank in "01"]
    for epoch in (slice(4), slice(4, 8)):
        assert len({*seen[0][epoch], *seen[1][epoch]}) == 8
