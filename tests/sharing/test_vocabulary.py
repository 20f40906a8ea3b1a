"""Checkpoints with the reference's added tokens, and the same model made by hand."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference_checkpoints import FUYU, ORDER, checkpoint_of, fuyu, llm_weights, reference_llm, run, save_pickle
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from elm_ecg import evaluate
from elm_ecg.ecg_utils import REFERENCE_LEADS
from elm_ecg.pipeline_elm import ECGQuestionAnsweringPipeline
from elm_ecg.tokenization_ecg_byte import ECGByteTokenizer
from elm_ecg.training import tokenizer
from elm_ecg.training.apps.conversation import stream_answer
from elm_ecg.training.evaluation.thinking import TAGS
from elm_ecg.training.load import load_elm
from helpers import save_tiny_llm

REASONING = list(TAGS)
SIGNALS = [f"signal_{token_id}" for token_id in ORDER]
CHAT = [{"role": "user", "content": [{"type": "ecg"}, {"type": "text", "text": "Rhythm? <think>"}]}]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("llm"), hidden_size=64)


@pytest.fixture(scope="module")
def tied_llm(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("tied"), "qwen2_5", hidden_size=64)


@pytest.fixture(scope="module")
def thinking_llm(tmp_path_factory):
    """One whose vocabulary has tokens for thinking."""
    folder = tmp_path_factory.mktemp("thinking")
    save_tiny_llm(folder, hidden_size=64)
    words = AutoTokenizer.from_pretrained(folder)
    words.add_tokens(["<think>", "</think>"])
    words.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(words))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ecg_byte(tmp_path_factory):
    """A pickle, and what `elm tokenizer import` makes of it."""
    folder = tmp_path_factory.mktemp("ecg_byte")
    save_pickle(folder / "tokenizer.pkl")
    tokenizer.main(["import", str(folder / "tokenizer.pkl"), "--output_dir", str(folder / "imported")])
    return folder


def same_logits(folder, reference, first, names, features=None):
    """The converted model's logits for an ECG and a question are those of the reference's model, row by row."""
    model, processor = load_elm(str(folder))
    ecg = {"array": np.linspace(-1, 1, 600).reshape(12, 50), "sampling_rate": 250, "lead_names": REFERENCE_LEADS}
    if features is not None:
        ecg["array"] = np.random.default_rng(0).normal(size=(12, 500))
    text = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(CHAT, **text, processor_kwargs={"ecgs": [ecg]})
    ids = inputs["input_ids"][0]
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    # the same text with the reference's ids
    theirs = torch.tensor(
        [first + names.index(name) if name in names else int(i) for name, i in zip(tokens, ids, strict=True)]
    )
    embeddings = reference.get_input_embeddings()(theirs)
    with torch.no_grad():
        if features is not None:
            embeddings[ids == processor.ecg_token_id] = model.get_ecg_features(inputs["ecg_values"]).flatten(0, -2)
        expected = reference(inputs_embeds=embeddings[None]).logits[0]
        found = model(**inputs).logits[0]
    vocabulary = processor.tokenizer.get_vocab()
    kept = {name: vocabulary[name] for name in names if name in vocabulary}
    torch.testing.assert_close(found[:, :first], expected[:, :first], rtol=1e-5, atol=1e-5)
    rows = expected[:, [first + names.index(name) for name in kept]]
    torch.testing.assert_close(found[:, list(kept.values())], rows, rtol=1e-5, atol=1e-5)
    return tokens, kept


@pytest.mark.parametrize(
    ("phase", "added"),
    [
        ("sft and rl", ["<signal>", *REASONING]),
        ("pretrain", ["<signal>"]),
        ("of a language model that thinks", ["<signal>", "<answer>", "</answer>"]),
    ],
)
def test_added_tokens_are_told_by_the_number_of_rows(phase, added, llm, thinking_llm, tmp_path, capsys):
    llm = thinking_llm if "thinks" in phase else llm
    first = AutoConfig.from_pretrained(llm).vocab_size
    rows = first + len(added)
    report = run(tmp_path / "elm.pt", checkpoint_of(fuyu(llm, rows=rows)), "--llm", llm, *FUYU)
    assert (report["left_over"], report["missing"]) == ([], [])
    assumed = f"Assumed: the {len(added)} rows behind those of {llm.name} are {' '.join(added)}, in this order; name others with"
    assert assumed in capsys.readouterr().out
    tokens, kept = same_logits(tmp_path / "out", reference_llm(llm, rows), first, added, features=True)
    assert list(kept) == added
    assert tokens.count("<signal>") == 5
    assert ("<think>" in tokens) == (phase != "pretrain")


@pytest.mark.parametrize(
    ("phase", "added"),
    [("pretrain", ["<signal>"]), ("sft", ["<signal>", *REASONING]), ("rl", ["<signal>", *REASONING])],
)
def test_checkpoints_of_all_phases(phase, added, llm, tmp_path, capsys):
    """Their weights have the same names; the converted ELM knows which phase it was."""
    rows = AutoConfig.from_pretrained(llm).vocab_size + len(added)
    content = checkpoint_of(fuyu(llm, rows=rows), "module.")
    thinks = phase == "rl"
    options = ["--llm", llm, *FUYU, "--train_phase", phase, *(["--explicit_thinking"] if thinks else [])]
    report = run(tmp_path / "elm.pt", content, *options)
    assert (report["left_over"], report["missing"], report["ignored"]) == ([], [], {})
    assert report["used"].keys() == content["model_state_dict"].keys()
    said = capsys.readouterr().out
    assert f"the {len(added)} rows behind those of {llm.name} are {' '.join(added)}" in said
    assert ("answers begin without a given <think>; give --explicit_thinking" in said) == (phase == "sft")
    _, processor = load_elm(str(tmp_path / "out"))
    assert (processor.train_phase, processor.explicit_thinking) == (phase, thinks)


def test_rows_of_another_phase(llm, tmp_path):
    rows = AutoConfig.from_pretrained(llm).vocab_size + 5
    with pytest.raises(ValueError, match=r"5 more than .*; the reference adds 1 \(<signal>\)\. Check --llm"):
        run(tmp_path / "elm.pt", fuyu(llm, rows=rows), "--llm", llm, *FUYU, "--train_phase", "pretrain")
    with pytest.raises(ValueError, match=r"--explicit_thinking with --train_phase pretrain.*leave it out"):
        run(tmp_path / "elm.pt", {}, "--llm", llm, *FUYU, "--train_phase", "pretrain", "--explicit_thinking")


@pytest.mark.parametrize("source", ["tokenizer.pkl", "imported"])
@pytest.mark.parametrize("reasoning", [REASONING, []])
@pytest.mark.parametrize("lora", [False, True])
def test_symbolic_elms(lora, reasoning, source, llm, tied_llm, ecg_byte, tmp_path, capsys):
    """The bare language model, with and without LoRA, and the tokens of the ECGs in the order of the pickle."""
    llm = tied_llm if reasoning else llm
    first = AutoConfig.from_pretrained(llm).vocab_size
    names = ["<signal>", *reasoning, *SIGNALS]
    reference, prefix = reference_llm(llm, first + len(names)), "llm."
    if lora:
        config = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        reference = get_peft_model(reference, config).eval()
    weights = {prefix + key: tensor.clone() for key, tensor in reference.state_dict().items()}
    assert ("llm.base_model.model.model.norm.weight" if lora else "llm.model.norm.weight") in weights
    options = ["--llm", llm, "--elm", "ecg_byte", "--ecg_tokenizer", ecg_byte / source, "--segment_len", 50]
    report = run(tmp_path / "elm.pt", checkpoint_of(weights), *options)
    assert (report["left_over"], report["missing"]) == ([], [])
    order = " ".join(["<signal>", *reasoning, "signal_*"])
    assert f"are {order}, in this order, signal_* in the order of the tokenizer's vocabulary" in capsys.readouterr().out
    tokens, kept = same_logits(tmp_path / "out", reference, first, names)
    assert {"signal_256", "signal_257", "signal_122"} <= set(tokens)  # nn, nnn, z
    assert {"<signal>", "signal_97", "signal_258", *reasoning} <= kept.keys()
    assert "signal_255" not in kept  # a byte that no ECG has


@pytest.mark.parametrize("order", [["signal_*", "<signal>"], ["<signal>", "<ecg>", "signal_*"]])
def test_the_users_order_wins(order, llm, ecg_byte, tmp_path):
    first = AutoConfig.from_pretrained(llm).vocab_size
    names = [name for token in order for name in (SIGNALS if "*" in token else [token])]
    options = ["--llm", llm, "--elm", "ecg_byte", "--ecg_tokenizer", ecg_byte / "imported", "--segment_len", 50]
    report = run(tmp_path / "elm.pt", llm_weights(llm, rows=first + len(names)), *options, "--added_tokens", *order)
    assert not any("in this order" in line for line in report["assumed"])
    same_logits(tmp_path / "out", reference_llm(llm, first + len(names)), first, names)


def test_a_tokenizer_that_does_not_say_its_order(llm, ecg_byte, tmp_path):
    """Neither one of ours, nor one whose file was cut, is guessed about."""
    options = ["--llm", llm, "--elm", "ecg_byte", "--ecg_tokenizer"]
    folder = shutil.copytree(ecg_byte / "imported", tmp_path / "imported")
    for content, message in (("[97, 98]", "does not hold each id of"), ("{", "is not JSON"), ("{}", "does not hold")):
        (folder / "reference_order.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "elm.pt", llm_weights(llm), *options, folder)
    (folder / "reference_order.json").unlink()
    with pytest.raises(ValueError, match=r"nobody knows which token.*give the run's \.pkl, or import it again"):
        run(tmp_path / "elm.pt", llm_weights(llm), *options, folder)
    ECGByteTokenizer(["nn"], across_leads=False).save_pretrained(folder)
    (folder / "reference_order.json").write_text(str(list(range(257))))
    with pytest.raises(ValueError, match="keeps within leads"):
        run(tmp_path / "elm.pt", llm_weights(llm), *options, folder)
    with pytest.raises(ValueError, match=r"ecg_byte\.json is no ECG-Byte tokenizer of the reference"):
        run(tmp_path / "elm.pt", llm_weights(llm), *options, folder / "ecg_byte.json")


@pytest.mark.parametrize("tied", [False, True])
def test_smaller_vocabulary_keeps_its_rows(tied, llm, tied_llm, tmp_path):
    llm = tied_llm if tied else llm
    rows = AutoConfig.from_pretrained(llm).vocab_size - 2
    weights = fuyu(llm, rows=rows)
    report = run(tmp_path / "elm.pt", weights, "--llm", llm, *FUYU)
    assert any(f"has {rows} rows; the other 3 of {rows + 3}" in line for line in report["assumed"])
    model, _ = load_elm(str(tmp_path / "out"))
    embeddings = model.get_input_embeddings().weight
    assert embeddings.shape[0] == rows + 3
    assert torch.equal(embeddings[:rows], weights["llm.llm.model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight[:rows], weights["llm.llm.lm_head.weight"])
    base = AutoModelForCausalLM.from_pretrained(llm).get_input_embeddings().weight
    assert torch.equal(embeddings[rows : rows + 2], base[rows:])


def test_spare_rows_of_the_language_model(tmp_path):
    """They do not tell how many tokens were added: those of the reference's default take the first ones."""
    folder = save_tiny_llm(tmp_path / "llm", hidden_size=64)
    first = AutoConfig.from_pretrained(folder).vocab_size
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(first + 20)
    model.save_pretrained(folder)
    weights = fuyu(folder, rows=first + 20)
    report = run(tmp_path / "elm.pt", weights, "--llm", folder, *FUYU)
    assert any("has spare rows, which do not tell how many" in line for line in report["assumed"])
    same_logits(tmp_path / "out", reference_llm(folder, first + 20), first, ["<signal>", *REASONING], features=True)


def test_added_tokens_are_found_by_name(llm, tmp_path):
    rows = AutoConfig.from_pretrained(llm).vocab_size
    weights = fuyu(llm, rows=rows + 3)
    with pytest.raises(
        ValueError,
        match=rf"have {rows + 3} rows in the checkpoint, 3 more than the {rows} tokens.*adds 1 \(<signal>\) or 5 \(<signal> <think> .*"
        r"--added_tokens",
    ):
        run(tmp_path / "elm.pt", weights, "--llm", llm, *FUYU)
    run(tmp_path / "elm.pt", weights, "--llm", llm, *FUYU, "--added_tokens", "<think>", "</think>", "<signal>")
    model, processor = load_elm(str(tmp_path / "out"))
    theirs = weights["llm.llm.model.embed_tokens.weight"]
    for place, token in enumerate(["<think>", "</think>", "<signal>"]):
        row = model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids(token)]
        assert torch.equal(row, theirs[rows + place])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--elm", "ecg_byte"],
            r"does not say which of its rows is which token.*--ecg_tokenizer.*'<signal>' 'signal_\*'",
        ),
        (["--elm", "ecg_byte", "--added_tokens", "<signal>", "--ecg_tokenizer"], r"does not say which of its rows"),
        (["--elm", "ecg_byte", "--added_tokens", "signal_*"], r"does not say which of its rows"),
        (
            ["--elm", "ecg_byte", "--ecg_tokenizer"],
            r"the reference adds 260 \(<signal> signal_\*\) or 264 \(<signal> <think> </think> <answer> </answer> signal_\*\)",
        ),
        (
            ["--elm", "ecg_byte", "--added_tokens", "signal_*", "--ecg_tokenizer"],
            r"needs 519; check --llm and --ecg_tokenizer",
        ),
        ([*FUYU, "--added_tokens", "signal_*"], r"signal_\* is for symbolic ELMs"),
        ([*FUYU, "--added_tokens", "<signal>", "<signal>"], r"--added_tokens has <signal> more than once"),
        ([*FUYU, "--added_tokens", "<|eot_id|>", "<signal>"], r"--added_tokens <\|eot_id\|>: --llm .* has it already"),
        ([*FUYU, "--added_tokens", "<signal>", "<a>"], r"with <signal> <a> needs 262; check --llm, or name all tokens"),
        ([*FUYU, "--lora_alpha", "nan"], r"--lora_alpha is nan; expected a number above 0"),
    ],
)
def test_added_tokens_that_do_not_fit(options, message, llm, ecg_byte, tmp_path):
    rows = AutoConfig.from_pretrained(llm).vocab_size + 200
    options = [*options, ecg_byte / "imported"] if options[-1] == "--ecg_tokenizer" else options
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "elm.pt", fuyu(llm, rows=rows), "--llm", llm, *options)
    assert not (tmp_path / "out").exists()


def test_rows_of_some_of_the_added_tokens_are_not_guessed(llm, tmp_path):
    rows = AutoConfig.from_pretrained(llm).vocab_size
    with pytest.raises(ValueError, match=rf"have {rows + 1} rows.*<think> </think> <signal> needs {rows + 3}"):
        run(tmp_path / "elm.pt", fuyu(llm), "--llm", llm, *FUYU, "--added_tokens", "<think>", "</think>", "<signal>")


def test_embeddings_and_head_of_other_numbers_of_rows(llm, tmp_path):
    weights = fuyu(llm)
    weights["llm.llm.lm_head.weight"] = weights["llm.llm.lm_head.weight"][:-1]
    with pytest.raises(
        ValueError, match=r"Embeddings and head have .* rows in the checkpoint; expected as many of both"
    ):
        run(tmp_path / "elm.pt", weights, "--llm", llm, *FUYU)


def answering(llm, answer):
    """Weights of a model that writes `answer`, tokens of its vocabulary, whatever it is asked: each token makes the next likely."""
    words = AutoTokenizer.from_pretrained(llm)
    words.add_tokens(["<signal>", *REASONING], special_tokens=True)
    chain = words.convert_tokens_to_ids(["\u010a", *answer])  # a byte-level tokenizer's newline, which ends the prompt
    weights = fuyu(llm, rows=len(words))
    for key, tensor in weights.items():
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()  # so that a token sees itself alone
    embeddings, head = (weights[f"llm.llm.{name}.weight"] for name in ("model.embed_tokens", "lm_head"))
    head.zero_()
    for place, (token_id, following) in enumerate(itertools.pairwise(chain)):
        embeddings[token_id] = head[following] = 10 * torch.eye(64)[place]
    return weights


def test_reasoning_is_in_the_answers(llm, tmp_path):
    """In those of evaluation, chat and pipeline, which leave special tokens out."""
    weights = answering(llm, ["<think>", "a", "</think>", "<answer>", "b", "</answer>", "<|eot_id|>"])
    run(tmp_path / "elm.pt", checkpoint_of(weights), "--llm", llm, *FUYU)
    model, processor = load_elm(str(tmp_path / "out"))
    written = "<think>a</think><answer>b</answer>"
    chat = [{"role": "user", "content": "Rhythm?"}]
    assert "".join(stream_answer(model, processor, chat, max_new_tokens=9)) == written
    ask = ECGQuestionAnsweringPipeline(model, processor=processor)
    assert ask({"question": "Rhythm?"}, max_new_tokens=9) == [{"answer": written}]
    rows = [{"messages": [*chat, {"role": "assistant", "content": "b"}]}]
    results = evaluate(model, processor, rows, max_new_tokens=9)
    assert results.predictions[0]["ecg"] == written


def test_a_given_think_is_given_again(llm, tmp_path):
    """Answers of a run with --explicit_thinking go on behind it."""
    weights = answering(llm, ["a", "</think>", "<answer>", "b", "</answer>", "<|eot_id|>"])
    options = ["--llm", llm, *FUYU, "--train_phase", "rl", "--explicit_thinking"]
    run(tmp_path / "elm.pt", checkpoint_of(weights), *options)
    model, processor = load_elm(str(tmp_path / "out"))
    chat = [{"role": "user", "content": "Rhythm?"}]
    assert "".join(stream_answer(model, processor, chat, max_new_tokens=9)) == "<think>\na</think><answer>b</answer>"
    rows = [{"messages": [*chat, {"role": "assistant", "content": "<think>\nc</think><answer>b</answer>"}]}]
    results = evaluate(model, processor, rows, max_new_tokens=9)
    assert results.predictions[0]["ecg"] == "b"
