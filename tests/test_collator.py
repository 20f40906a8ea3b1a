from typing import Any

import numpy as np
import pytest
import torch
from helpers import FAMILIES, tiny_processor

from training.collator import ELMCollator, augment


def row(*turns: str, ecg: bool = True) -> dict[str, Any]:
    """A chat of alternating user and assistant turns about a record of noise."""
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    array = np.random.default_rng(len(turns)).normal(size=(12, 500)).astype("float32")
    return {"messages": messages, "ecg": {"array": array, "sampling_rate": 250, "unit": "mV"} if ecg else None}


def learnt(processor, labels: torch.Tensor) -> list[str]:
    """The stretches of text that are labels, decoded."""
    texts, current = [], []
    for label in [*labels.tolist(), -100]:
        if label != -100:
            current.append(label)
        elif current:
            texts.append(processor.tokenizer.decode(current))
            current = []
    return texts


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama3", ["yes<|eot_id|>", "no, é<|eot_id|>"]),
        ("qwen2_5", ["yes<|im_end|>", "no, é<|im_end|>"]),
        ("gemma2", ["yes<end_of_turn>", "no, é<end_of_turn>", "<eos>"]),
        ("default", [" yes</s>", " no, é</s>"]),
    ],
)
def test_labels_are_the_assistants_turns(family, expected):
    assert family in FAMILIES
    processor = tiny_processor(family)
    batch = ELMCollator(processor)([row("Is it?", "yes", "And <this>?", "no, é"), row("Is it?", "yes")])
    assert learnt(processor, batch["labels"][0]) == expected
    assert learnt(processor, batch["labels"][1]) == [expected[0], *expected[2:]]
    kept = batch["labels"] != -100
    assert torch.equal(batch["labels"][kept], batch["input_ids"][kept])


def test_padding_is_dynamic_and_on_the_right():
    processor = tiny_processor()
    rows = [row("Is it?", "yes"), row("Is it not, or is it?", "no")]
    both = ELMCollator(processor)(rows)
    alone = [ELMCollator(processor)([one]) for one in rows]
    lengths = [batch["input_ids"].shape[1] for batch in alone]
    assert both["input_ids"].shape[1] == max(lengths) > min(lengths)
    assert both["attention_mask"].sum(1).tolist() == lengths
    for index, (batch, length) in enumerate(zip(alone, lengths, strict=True)):
        for key in ("input_ids", "labels", "attention_mask"):
            assert torch.equal(both[key][index, :length], batch[key][0])
        assert (both["labels"][index, length:] == -100).all()
        assert (both["attention_mask"][index, length:] == 0).all()
        assert torch.equal(both["ecg_values"][index], batch["ecg_values"][0])


def test_keys_of_a_batch():
    processor = tiny_processor()
    with_ecg, without = ELMCollator(processor)([row("a", "b")]), ELMCollator(processor)([row("a", "b", ecg=False)])
    assert set(with_ecg) == {"input_ids", "attention_mask", "labels", "ecg_values"}
    assert set(without) == {"input_ids", "attention_mask", "labels"}
    assert (with_ecg["input_ids"] == processor.ecg_token_id).sum() == 4


def test_system_prompt():
    processor = tiny_processor()
    batch = ELMCollator(processor, system_prompt="Be brief.")([row("Is it?", "yes")])
    assert "Be brief." in processor.tokenizer.decode(batch["input_ids"][0])
    assert learnt(processor, batch["labels"][0]) == ["yes<|eot_id|>"]


def test_perturb():
    processor = tiny_processor()
    rows = [row("Is it?", "yes"), row("Is it?", "yes", "Sure?", "no")]
    plain = ELMCollator(processor)(rows)
    zeros = ELMCollator(processor, perturb="zeros")(rows)
    assert torch.equal(zeros["ecg_values"], torch.zeros(2, 12, 500))
    torch.manual_seed(0)
    noise = ELMCollator(processor, perturb="noise")(rows)["ecg_values"]
    assert noise.shape == (2, 12, 500)
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(zeros["input_ids"], plain["input_ids"])
    only_text = ELMCollator(processor, perturb="only_text")(rows)
    assert "ecg_values" not in only_text
    assert processor.ecg_token_id not in only_text["input_ids"]
    assert learnt(processor, only_text["labels"][1]) == learnt(processor, plain["labels"][1])


def test_text_only_processor_leaves_the_ecg_out():
    processor = tiny_processor(num_ecg_tokens=0)
    batch = ELMCollator(processor)([row("Is it?", "yes")])
    assert "ecg_values" not in batch
    assert processor.ecg_token_id not in batch["input_ids"]


def test_augment_statistics():
    torch.manual_seed(0)
    ecgs = torch.randn(4000, 2, 100)
    change = augment(ecgs) - ecgs
    unchanged = (change.abs().amax((1, 2)) == 0).float().mean()
    assert unchanged == pytest.approx(0.25, abs=0.03)
    lead_difference = change[:, 0] - change[:, 1]  # the wander is the same in all leads, the noise is not
    noisy = lead_difference.abs().amax(1) > 1e-5
    assert noisy.float().mean() == pytest.approx(0.5, abs=0.03)
    assert lead_difference[noisy].std() == pytest.approx(0.05 * 2**0.5, rel=0.02)
    wander = change[~noisy, 0]
    wander = wander[wander.abs().amax(1) > 0]
    assert len(wander) / (~noisy).sum() == pytest.approx(0.5, abs=0.05)
    amplitudes = ecgs[~noisy][change[~noisy].abs().amax((1, 2)) > 0].abs().amax((1, 2))
    assert torch.allclose(wander.abs().amax(1), 0.07 * amplitudes, rtol=0.01)
    crossings = (wander[:, 1:-1].sign().diff(dim=1) != 0).sum(1) + 1
    assert sorted(set(crossings.tolist())) == [1, 2, 3, 4, 5]


def test_augment_is_seeded_and_leaves_its_input():
    ecgs = torch.ones(8, 12, 500)
    torch.manual_seed(1)
    first = augment(ecgs)
    torch.manual_seed(1)
    assert torch.equal(augment(ecgs), first)
    assert not torch.equal(augment(ecgs), first)
    assert torch.equal(ecgs, torch.ones(8, 12, 500))


def test_max_length():
    processor = tiny_processor()
    length = ELMCollator(processor)([row("Is it?", "yes")])["input_ids"].shape[1]
    assert ELMCollator(processor, max_length=length)([row("Is it?", "yes")])["input_ids"].shape[1] == length
    with pytest.raises(ValueError, match=rf"has {length} tokens and max_length is {length - 1}; nothing is cut"):
        ELMCollator(processor, max_length=length - 1)([row("Is it?", "yes")])


def test_nothing_to_learn():
    with pytest.raises(ValueError, match="no assistant turn to learn from"):
        ELMCollator(tiny_processor())([row("Is it?", "yes"), row("Is it?")])
    processor = tiny_processor()
    processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="the chat template does not mark it"):
        ELMCollator(processor)([row("Is it?", "yes", ecg=False)])
