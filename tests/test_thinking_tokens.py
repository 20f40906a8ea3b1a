"""Tags of answers that reason as tokens: their rows are trained, also by LoRA, and survive saving."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from elm_ecg.training import sft
from elm_ecg.training.build import new_elm
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.evaluation.thinking import TAGS
from elm_ecg.training.load import load_elm
from elm_ecg.training.thinking_tokens import add_thinking_tokens, thinking_token_ids
from helpers import save_tiny_llm, tiny_ecg_byte, tiny_sft, tiny_tokenizer

FUYU = ["--elm", "fuyu", "--num_ecg_tokens", "5"]


@pytest.fixture(scope="module")
def llms(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("llms")
    return {
        "tied": save_tiny_llm(folder / "tied", "qwen2_5"),
        "untied": save_tiny_llm(folder / "untied", "llama3"),
        "spare rows": save_tiny_llm(folder / "spare", "gemma2"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rows = []
    for index in range(8):
        row = make_record(index, 0, "train", sampling_rate=100, seconds=5.0)
        row["ecg"]["array"] = row["ecg"]["array"].tolist()
        thought = f"<think>\nIt is {index}.\n</think>\n<answer>{index % 2}</answer>"
        rows.append(row | {"messages": [row["messages"][-2], {"role": "assistant", "content": thought}]})
    folder = tmp_path_factory.mktemp("data") / "all"
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(folder)
    return folder


def rows_of(model, ids) -> torch.Tensor:
    """[2, tags, width], of embeddings and head."""
    return torch.stack([model.get_input_embeddings().weight[ids], model.get_output_embeddings().weight[ids]]).detach()


KINDS, WAYS = ("tied", "untied", "spare rows"), ("in full", "LoRA", "LoRA of symbolic ECGs")


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=[] if KINDS.index(kind) == WAYS.index(way) else [pytest.mark.slow])
        for kind in KINDS
        for way in WAYS
    ],
)
def test_rows_are_trained_and_saved(llms, data, tmp_path, kind, way):
    if way == "LoRA of symbolic ECGs":
        tiny_ecg_byte().save_pretrained(tmp_path / "ecg_byte")
        options = ["--elm", "ecg_byte", "--ecg_tokenizer", str(tmp_path / "ecg_byte"), "--lead_names", "I", "V1"]
        settings = {"elm": "ecg_byte", "ecg_tokenizer": str(tmp_path / "ecg_byte"), "lead_names": ["I", "V1"]}
    else:
        options, settings = FUYU, {"elm": "fuyu", "num_ecg_tokens": 5}
    options = [*options, *(["--use_peft", "--lora_r", "2"] if way != "in full" else [])]
    settings |= {"sampling_rate": 100, "num_samples": 500, "thinking_tokens": True}
    before, processor = new_elm(str(llms[kind]), **settings)
    ids = thinking_token_ids(processor)
    assert ids == list(range(ids[0], ids[0] + 4)) == [processor.ecg_token_id + place for place in (1, 2, 3, 4)]
    if processor.signal_token_ids:
        assert processor.signal_token_ids[0] == ids[-1] + 1
    folder = tmp_path / "model"
    more = ["--thinking_tokens", "--explicit_thinking", "--max_steps", "2"]
    sft.main(tiny_sft(llms[kind], data, folder, *options, *more, encoder=None))
    model, loaded = load_elm(str(folder))
    assert thinking_token_ids(loaded) == ids
    text = "<think>a</think><answer>b</answer>"
    written = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(written) == 6
    assert loaded.decode(written, skip_special_tokens=True) == text
    old, new = rows_of(before, ids), rows_of(model, ids)
    changed = (old != new).any(-1)
    assert changed.all() if kind == "tied" else changed[1].all()
    # <think> is given, so an untied head learns only not to write it, and <answer> is read before it is written
    assert changed[0, 1:3].all()
    words = list(range(processor.ecg_token_id))
    assert torch.equal(rows_of(before, words), rows_of(model, words)) is (way != "in full")
    if way != "in full":
        saved = load_file(folder / "adapter_model.safetensors")
        assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in saved)


def test_rows_begin_as_the_mean_of_their_pieces(llms):
    model, processor = new_elm(str(llms["untied"]), elm="fuyu", num_samples=500, num_ecg_tokens=5, thinking_tokens=True)
    plain, _ = new_elm(str(llms["untied"]), elm="fuyu", num_samples=500, num_ecg_tokens=5)
    pieces = processor.tokenizer(["<", "/", "answer", ">"], add_special_tokens=False)["input_ids"]
    pieces = [token for piece in pieces for token in piece]
    expected = rows_of(plain, pieces).mean(1)
    token_id = processor.tokenizer.convert_tokens_to_ids("</answer>")
    torch.testing.assert_close(rows_of(model, [token_id])[:, 0], expected)
    assert model.config.text_config.vocab_size == len(processor.tokenizer)


def test_tokens_that_are_there_stay():
    tokenizer = tiny_tokenizer("qwen2_5")
    tokenizer.add_tokens(["<think>", "</think>"])
    known = tokenizer.get_vocab()
    assert add_thinking_tokens(tokenizer) == list(TAGS[2:])
    assert add_thinking_tokens(tokenizer) == []
    assert all(tokenizer.get_vocab()[token] == token_id for token, token_id in known.items())


def test_a_saved_elm(llms, data, tmp_path):
    """It gets them in full training; an adapter would have no base with such rows."""
    plain = tmp_path / "plain"
    sft.main(tiny_sft(llms["tied"], data, plain, *FUYU, "--max_steps", "1", encoder=None))
    more = ["--model_name_or_path", str(plain), "--thinking_tokens", "--max_steps", "1"]
    with pytest.raises(
        ValueError, match=r"--thinking_tokens with --model_name_or_path .*, which has no <think>: its adapter"
    ):
        sft.main(tiny_sft(llms["tied"], data, tmp_path / "lora", *more, "--use_peft", encoder=None))
    sft.main(tiny_sft(llms["tied"], data, tmp_path / "full", *more, encoder=None))
    model, processor = load_elm(str(tmp_path / "full"))
    assert max(thinking_token_ids(processor)) < model.config.text_config.vocab_size
    again = ["--model_name_or_path", str(tmp_path / "full"), *more[2:], "--use_peft"]
    sft.main(tiny_sft(llms["tied"], data, tmp_path / "lora", *again, encoder=None))
    adapted, _ = load_elm(str(tmp_path / "lora"))
    ids = thinking_token_ids(processor)
    assert not torch.equal(rows_of(adapted, ids), rows_of(model, ids))
