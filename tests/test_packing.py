import json
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import FalconH1Config, GPTNeoConfig, GptOssConfig, Lfm2Config, OPTConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import sft
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.packing import (
    check_kept_apart,
    common_begin,
    keeps_apart,
    mask_of,
    max_tokens_to_share,
    num_packed_tokens,
    pack,
    packed_width,
    shared_rows,
)
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

# of tiny language models
SIZES: Any = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}


@settings(deadline=None)
@given(st.lists(st.integers(2, 120), min_size=1, max_size=40), st.integers(2, 500), st.integers(0, 1))
def test_rows_are_within_the_limit_and_less_than_padded(lengths, limit, begin):
    rows = shared_rows(lengths, limit, begin)
    assert sorted(chat for row in rows for chat in row) == list(range(len(lengths)))
    width = packed_width(lengths, rows, [begin] * len(rows))
    assert width <= max(limit, *lengths)
    assert width * len(rows) <= max(lengths) * len(lengths)


def test_rows_are_filled_evenly():
    assert shared_rows([5, 5, 5, 5], 10) == [[0, 2], [1, 3]]
    assert shared_rows([7, 3, 5, 5], 10) == [[0, 1], [2, 3]]  # one row less than one by one would need
    assert shared_rows([30], 10) == [[0]]
    assert len(shared_rows([67] * 8, 140)) == 4
    assert len(shared_rows([67] * 8, 128)) == 8  # two do not fit
    assert len(shared_rows([67] * 8, 128, begin=24)) == 4  # two without what they share do
    for seed in range(50):  # as in batches: what is left of padding is little
        lengths = np.random.default_rng(seed).integers(20, 80, 32).tolist()
        rows = shared_rows(lengths, 256)
        assert len(rows) * packed_width(lengths, rows, [0] * len(rows)) < 1.1 * sum(lengths)


def batch_of(*chats: tuple[list[int], int]) -> dict[str, torch.Tensor]:
    """Padded chats of ids, of which those from a place on are learnt."""
    width = max(len(ids) for ids, _ in chats)
    ids, mask = torch.zeros(len(chats), width, dtype=torch.long), torch.zeros(len(chats), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (of_chat, first) in enumerate(chats):
        ids[row, : len(of_chat)], mask[row, : len(of_chat)] = torch.tensor(of_chat), 1
        labels[row, first : len(of_chat)] = torch.tensor(of_chat[first:])
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def test_what_chats_begin_with():
    ecg = 99
    assert common_begin(batch_of(([1, 2, 3, 4, 5], 3), ([1, 2, 3, 6], 3)), ecg) == 2  # 3 predicts what is learnt
    assert common_begin(batch_of(([1, 2, 3, 4, 5, 6], 5), ([1, 2, 7, 4, 5, 6], 5)), ecg) == 2
    assert common_begin(batch_of(([1, ecg, 3, 4, 5], 4), ([1, ecg, 3, 4, 6], 4)), ecg) == 1  # another ECG
    assert common_begin(batch_of(([1, 2, 3, 4, 5], 4), ([7, 2, 3, 4, 5], 4)), ecg) == 0
    assert common_begin(batch_of(([1, 2, 3, 4], 3), ([1, 2], 2)), ecg) == 1  # one of two tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_a_token_sees(attention):
    """Of each row the first two tokens are of all its chats, or none are."""
    batch = batch_of(([1, 2, 3, 4], 3), ([1, 2, 5, 6, 7], 3), ([1, 2, 8], 9), ([1, 2, 9], 9))
    packed = pack(batch, [[1, 0, 2], [3]], [0] * 4, ["input_ids", "labels", "attention_mask"], 0, begins=[2, 2])
    assert packed["input_ids"].tolist() == [[1, 2, 5, 6, 7, 3, 4, 8], [1, 2, 9, 0, 0, 0, 0, 0]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 2], [0, 1, 2, 0, 0, 0, 0, 0]]
    assert packed["labels"].tolist() == [[-100, -100, -100, 6, 7, -100, 4, -100], [-100] * 8]
    assert num_packed_tokens(packed["position_ids"]) == 4 + 5 + 3 + 3
    model = ELMForConditionalGeneration(tiny_elm_config(None))
    model.set_attn_implementation({"text_config": attention})
    mask = mask_of(packed["position_ids"], model)
    seen = mask if attention == "sdpa" else mask == 0
    of_first = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 5], [0, 1, 5, 6], [0, 1, 7]]
    assert [row.nonzero()[:, 0].tolist() for row in seen[0, 0]] == of_first
    assert [row.nonzero()[:, 0].tolist() for row in seen[1, 0]] == [[0], [0, 1], [0, 1, 2], [3], [4], [5], [6], [7]]
    assert mask.dtype == (torch.bool if attention == "sdpa" else torch.float32)
    # some models, as BioGPT, would go on in float32 behind it
    assert mask_of(packed["position_ids"], model.bfloat16()).dtype == (
        torch.bool if attention == "sdpa" else torch.bfloat16
    )


def test_where_nothing_can_be_shared():
    config = tiny_llm_config("gemma2")
    config._attn_implementation = "eager"
    assert max_tokens_to_share(config) == config.sliding_window == 32
    config = tiny_llm_config()
    config._attn_implementation = "sdpa"
    assert max_tokens_to_share(config) == sys.maxsize
    config._attn_implementation = "flash_attention_2"
    assert max_tokens_to_share(config) == 0
    config = GPTNeoConfig(attention_types=[[["global", "local"], 1]], num_layers=2, window_size=256)
    config._attn_implementation = "eager"
    assert max_tokens_to_share(config) == 256


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
        "shared": {"packing": True, "max_length": sum(chats), "max_tokens_to_share": 10_000},
    }.items():
        batch = ELMCollator(processor, **options)(rows)
        if name == "shared":
            assert batch["input_ids"].numel() < sum(chats)
            batch["attention_mask"] = mask_of(batch["position_ids"], model)
        model.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        found[name] = (loss.item(), model.get_input_embeddings().weight.grad.clone())
        if options:
            assert num_packed_tokens(batch["position_ids"]) == sum(chats)
            assert ("attention_mask" in batch) == (name == "shared")
        if name == "padding_free":
            assert batch["input_ids"].shape == (1, sum(chats))
        if name == "packing":
            assert batch["input_ids"].shape[0] == 2
            assert batch["input_ids"].shape[1] <= longest + 50
        if name == "multiple":
            assert batch["input_ids"].shape[1] % 64 == 0
        assert found[name][0] == pytest.approx(found["padded"][0], abs=1e-5), name
        torch.testing.assert_close(found[name][1], found["padded"][1], atol=1e-5, rtol=1e-4)
        check_kept_apart(model, model, model.device, one_row=name == "padding_free", share=name == "shared")


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
    llm = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    model = ELMForConditionalGeneration(tiny_elm_config(None, llm=llm))
    model.train()
    with pytest.raises(ValueError, match=f"^--{option}: lfm2 with .* attention does not keep the chats of a row apart"):
        check_kept_apart(model, model, model.device, one_row=option == "padding_free")
    assert model.training


def test_a_window_that_is_narrower_than_rows():
    """gpt-oss keeps chats apart under a mask of their own alone, which rows that are wider than its window do not have."""
    llm = GptOssConfig(
        **SIZES,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = ELMForConditionalGeneration(tiny_elm_config(None, llm=llm, attn_implementation={"text_config": "eager"}))
    collator = ELMCollator(tiny_processor(), packing=True, max_tokens_to_share=max_tokens_to_share(llm))
    assert collator.longest_row == math.inf  # a chat may be of any length
    with pytest.raises(
        ValueError, match="in rows of 64 tokens, its window, and more; --max_length 63 and less keeps them apart"
    ):
        check_kept_apart(model, model, model.device, False, True, collator.longest_row)
    check_kept_apart(model, model, model.device, False, True, replace(collator, max_length=63).longest_row)
    assert replace(collator, max_length=63, pad_to_multiple_of=8).longest_row == 71
    llm = OPTConfig(
        vocab_size=300, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32
    )
    model = ELMForConditionalGeneration(tiny_elm_config(None, llm=llm))
    assert not keeps_apart(model, model, model.device)
    # it has no window, so that all rows have their mask
    check_kept_apart(model, model, model.device, False, True, math.inf)


def test_a_small_state_is_seen_in_bfloat16():
    """That of Falcon-H1 changes the logits of the next chat by less than bfloat16 rounds those of some models."""
    llm = FalconH1Config(
        **SIZES,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_n_groups=1,
        mamba_chunk_size=16,
        ssm_multipliers=[0.01] * 5,
    )
    model = ELMForConditionalGeneration(tiny_elm_config(None, llm=llm)).bfloat16()
    assert not any(keeps_apart(model, model, model.device, share=share) for share in (False, True))


@pytest.mark.parametrize(("step", "shares"), [(2**-8, True), (0.5, False)])
def test_what_is_computed_otherwise_may_be_rounded_otherwise(step, shares):
    """On a GPU a chat alone goes through other kernels than a row, to the precision of bfloat16 though the logits are in float32."""
    model, _ = build("signal", "sdpa")
    forward = model.forward

    def rounded(**kwargs):
        outputs = forward(**kwargs)
        if "attention_mask" not in kwargs:
            unit = step * outputs.logits.abs().max()
            outputs.logits = (outputs.logits / unit).round() * unit
        return outputs

    model.forward = rounded
    assert keeps_apart(model, model, model.device, share=True) == shares
