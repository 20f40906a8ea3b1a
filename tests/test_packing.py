import json

import numpy as np
import pytest
import torch
from transformers import Lfm2Config

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import sft
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.packing import check_kept_apart, num_packed_tokens, pack, shared_rows
from helpers import (
    save_tiny_data,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_llm_config,
    tiny_processor,
    tiny_sft,
    tiny_symbolic_processor,
)


def test_rows_are_few_and_even():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths, limit = rng.integers(2, 120, rng.integers(1, 40)).tolist(), int(rng.integers(2, 500))
        rows = shared_rows(lengths, limit)
        assert sorted(chat for row in rows for chat in row) == list(range(len(lengths)))
        filled = [sum(lengths[chat] for chat in row) for row in rows]
        assert max(filled) <= max(limit, *lengths)
        assert max(filled) - min(filled) <= max(lengths)
    assert shared_rows([5, 5, 5, 5], 10) == [[0, 2], [1, 3]]
    assert shared_rows([7, 3, 5, 5], 10) == [[0, 1], [2, 3]]  # one row less than one by one would need
    assert shared_rows([30], 10) == [[0]]


def rows_of(processor) -> list[dict]:
    """Chats of one ECG, of none and of two, of different lengths; the ECGs are all different."""
    rate = processor.feature_extractor.sampling_rate
    walks = np.random.default_rng(0).normal(0, 0.02, (3, 12, 500)).cumsum(-1).astype(np.float32)
    ecgs = [{"array": walk, "sampling_rate": rate} for walk in walks]
    texts = [("Is it?", "yes"), ("No recording at all?", "no, none"), ("Has it changed since the last time?", "a bit")]
    turns = [[{"role": "user", "content": one}, {"role": "assistant", "content": two}] for one, two in texts]
    return [{"messages": messages, "ecg": own} for messages, own in zip(turns, (ecgs[0], None, ecgs[1:]), strict=True)]


def build(representation: str, attention: str):
    """A tiny ELM and its processor."""
    if representation == "symbolic":
        processor = tiny_symbolic_processor(extractor={"num_samples": 50, "truncation": "end"})
        config = tiny_elm_config(None, llm=tiny_llm_config(vocab_size=len(processor.tokenizer)))
    elif representation == "signal":
        processor = tiny_processor()
        config = tiny_elm_config("merl", ecg_token_id=processor.ecg_token_id)
    else:
        backbone = {"rgb": "vit", "stacked_signal": "siglip2_vision_model"}[representation]
        processor = tiny_image_processor_elm(backbone, representation)
        config = tiny_image_elm_config(backbone, representation, ecg_token_id=processor.ecg_token_id)
    torch.manual_seed(0)
    model = ELMForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": attention})
    return model, processor


@pytest.mark.parametrize(
    ("representation", "attention"),
    [("signal", "sdpa"), ("symbolic", "sdpa"), ("rgb", "eager"), ("stacked_signal", "sdpa")],
)
def test_the_loss_is_that_of_padded_chats(representation, attention):
    """And so are its gradients; every ECG comes to its own chat, in whichever order the rows hold them."""
    model, processor = build(representation, attention)
    rows = rows_of(processor)
    padded = ELMCollator(processor)(rows)
    longest = padded["input_ids"].shape[1]
    chats = padded["attention_mask"].sum(-1).tolist()
    found = {}
    for name, options in {
        "padded": {},
        "padding_free": {"padding_free": True},
        "packing": {"packing": True, "max_length": longest + 50},
        "multiple": {"packing": True, "max_length": longest + 50, "pad_to_multiple_of": 64},
    }.items():
        batch = ELMCollator(processor, **options)(rows)
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found[name] = (loss.item(), model.get_input_embeddings().weight.grad.clone())
        if options:
            assert num_packed_tokens(batch["position_ids"]) == sum(chats)
            assert "attention_mask" not in batch
        if name == "padding_free":
            assert batch["input_ids"].shape == (1, sum(chats))
        if name == "packing":
            assert batch["input_ids"].shape[0] == 2
            assert batch["input_ids"].shape[1] <= longest + 50
        if name == "multiple":
            assert batch["input_ids"].shape[1] % 64 == 0
        assert found[name][0] == pytest.approx(found["padded"][0], abs=1e-5), name
        torch.testing.assert_close(found[name][1], found["padded"][1], atol=1e-5, rtol=1e-4)
        check_kept_apart(model, model.config, model.device, one_row=name == "padding_free")


def test_the_first_token_of_a_chat_is_not_learnt():
    """The one before it is of another chat."""
    ids = torch.arange(8).view(2, 4)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    packed = pack(batch, [[1, 0]], [0, 0], ["input_ids", "attention_mask", "labels"], pad_token_id=9)
    assert packed["input_ids"].tolist() == [[4, 5, 0, 1, 2, 3]]
    assert packed["labels"].tolist() == [[-100, 5, -100, 1, 2, 3]]
    assert packed["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]]


def test_training_is_that_of_padded_chats(llm, tmp_path):
    """Losses, metrics and tokens of a run with an evaluation; the last batch is smaller."""
    data = save_tiny_data(tmp_path / "data", without_ecg=3, train=10, validation=3)
    options = ["--num_train_epochs", "1", "--eval_strategy", "steps", "--eval_steps", "3"]
    histories = {}
    for name in ("padded", "padding_free", "packing"):
        more = [] if name == "padded" else [f"--{name}"]
        sft.main(tiny_sft(llm, data, tmp_path / name, *options, *more, encoder="st_mem"))
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        named = ("loss", "eval_loss", "num_tokens", "mean_token_accuracy", "entropy", "eval_entropy")
        histories[name] = [{key: row[key] for key in named if key in row} for row in history]
    assert len(histories["padded"]) >= 4
    for name in ("padding_free", "packing"):
        for one, other in zip(histories["padded"], histories[name], strict=True):
            assert one == pytest.approx(other, rel=1e-4), name


@pytest.mark.parametrize("option", ["padding_free", "packing"])
def test_a_model_that_mixes_chats_is_refused(option):
    """Here by a convolution over the tokens."""
    llm = Lfm2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["conv", "full_attention"],
    )
    model = ELMForConditionalGeneration(tiny_elm_config(None, llm=llm))
    model.train()
    with pytest.raises(ValueError, match=f"^--{option}: lfm2 with .* attention does not keep the chats of a row apart"):
        check_kept_apart(model, model.config, model.device, one_row=option == "padding_free")
    assert model.training
