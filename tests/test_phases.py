"""The phases of `elm sft`: reports without a chat, then chats whose answers begin with thinking."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training import sft
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.evaluation.evaluate import evaluate
from elm_ecg.training.evaluation.thinking import answer_of
from elm_ecg.training.load import load_elm
from helpers import ROOT, TINY_VISION, losses, run_isolated, save_tiny_llm, tiny_sft


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm") / "tied", "qwen2_5", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Records with a report, and a question whose answer thinks."""
    splits = {}
    for split, size in (("train", 16), ("validation", 4), ("test", 4)):
        rows = []
        for index in range(size):
            row = make_record(index, 0, split, sampling_rate=100, seconds=5.0)
            row["ecg"]["array"] = row["ecg"]["array"].tolist()
            question, answer = row["messages"][-2], row["messages"][-1]["content"]
            thought = f"<think>\nIt is {answer}.\n</think>\n<answer>{answer}</answer>"
            row["messages"] = [question, {"role": "assistant", "content": thought}]
            rows.append(row | {"report": f"Finding {index % 2}."})
        splits[split] = Dataset.from_list(rows)
    folder = tmp_path_factory.mktemp("data") / "all"
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def aligned(llm, data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("aligned") / "model"
    options = ["--train_phase", "pretrain", "--update", "connector", "--max_steps", "8", "--eval_strategy", "epoch"]
    sft.main(tiny_sft(llm, data, folder, *options))
    return folder


@pytest.fixture(scope="module")
def thinking(llm, data, aligned, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("thinking") / "model"
    options = ["--model_name_or_path", str(aligned), "--explicit_thinking", "--max_steps", "4"]
    sft.main(tiny_sft(llm, data, folder, *options, encoder=None))
    return folder


def parts_that_changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}


def processor_of(folder: Path) -> ELMProcessor:
    return ELMProcessor.from_pretrained(folder)


def test_reports_train_the_connector(aligned, llm):
    values = losses(aligned)
    assert np.mean(values[-2:]) < np.mean(values[:2])
    untrained = load_file(llm / "model.safetensors")
    trained = load_file(aligned / "model.safetensors")
    for name, weight in untrained.items():
        assert torch.equal(trained[f"model.language_model.{name.removeprefix('model.')}"], weight), name
    saved = json.loads((aligned / "processor_config.json").read_text())
    assert saved["train_phase"] == "pretrain"
    assert not saved["explicit_thinking"]
    # the chat template of the phase that follows
    assert processor_of(aligned).chat_template == (ROOT / "training" / "templates" / "qwen2_5.jinja").read_text()
    assert "never fine-tuned on chats" in (aligned / "README.md").read_text()


def test_a_model_that_knows_reports_alone_is_warned_of(aligned, data, caplog):
    model, processor = load_elm(str(aligned))
    rows = DatasetDict.load_from_disk(str(data))["test"]
    with caplog.at_level(logging.WARNING):
        evaluate(model, processor, rows, conditions="ecg", metrics=[], max_new_tokens=2, num_resamples=10)
    assert caplog.text.count("was never fine-tuned on chats") == 1


def test_chats_after_reports(thinking, aligned, data, caplog):
    before, after = (load_file(folder / "model.safetensors") for folder in (aligned, thinking))
    assert parts_that_changed(before, after) == {"connector", "language_model"}
    processor = processor_of(thinking)
    assert (processor.train_phase, processor.explicit_thinking) == ("sft", True)
    assert "begin with `<think>`" in (thinking / "README.md").read_text()


def test_scores_are_of_the_answer(thinking, data):
    """The model is made to write what is expected of each half of the questions, and something without an answer of the rest."""
    model, processor = load_elm(str(thinking))
    rows = DatasetDict.load_from_disk(str(data))["test"]
    right = [row["messages"][-1]["content"].removeprefix("<think>\n") for row in rows]
    written = [
        text if index % 2 else "It is.\n</think> " + text.split("answer>")[1] for index, text in enumerate(right)
    ]

    def generate(input_ids, **kwargs):
        assert processor.decode(input_ids[0]).endswith("<|im_start|>assistant\n<think>\n")
        texts = [written[next(texts_of)] + "<|im_end|>" for _ in input_ids]
        ids = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, ids], dim=1)

    order = iter(range(4))
    texts_of = order
    model.generate = generate
    results = evaluate(model, processor, rows, conditions="ecg", batch_size=1, num_resamples=10, training_dataset=rows)
    asked = [prediction["row"] for prediction in results.predictions]
    assert sorted(asked) == [0, 1, 2, 3]
    assert results["settings"]["explicit_thinking"]
    exact = results["conditions"]["ecg"]["metrics"]["exact_match"]["value"]
    agree = [prediction["ecg"] == prediction["answer"] for prediction in results.predictions]
    assert exact == pytest.approx(np.mean(agree))
    for prediction, row in zip(results.predictions, rows, strict=True):
        whole = row["messages"][-1]["content"]
        assert prediction["answer"] == answer_of(whole)
        assert prediction["written"]["answer"] == whole
        assert prediction["written"]["ecg"].startswith("<think>\n")
        assert prediction["ecg"] == (answer_of(prediction["written"]["ecg"]) or "")
        assert "<" not in prediction["most_frequent"]
    assert sum(prediction["ecg"] == "" for prediction in results.predictions) == 2
    assert "think" in results["conditions"]["ecg"]["parts"]
    assert "answer" not in results["conditions"]["ecg"]["parts"]


def test_explicit_thinking_in_a_fresh_process(thinking, tmp_path):
    printed = run_isolated(
        f"""
import numpy as np
from transformers import AutoProcessor, pipeline
processor = AutoProcessor.from_pretrained({str(thinking)!r}, trust_remote_code=True)
chat = [{{"role": "user", "content": [{{"type": "ecg"}}, {{"type": "text", "text": "Q"}}]}}]
print(repr(processor.apply_chat_template(chat, add_generation_prompt=True)))
pipe = pipeline("ecg-question-answering", model={str(thinking)!r}, trust_remote_code=True)
ecg = {{"array": np.zeros((12, 500), dtype=np.float32), "sampling_rate": 100, "unit": "mV"}}
print(repr(pipe({{"ecg": ecg, "question": "Q"}}, max_new_tokens=3)[0]["answer"]))
""",
        tmp_path,
    )
    prompt, answer = map(eval, printed.strip().splitlines()[-2:])  # what this test has printed
    assert prompt == "<|im_start|>user\n<signal>\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert answer == "" or answer.startswith("<think>\n")


VISION = json.dumps(TINY_VISION["vit"])
WAYS = {
    "fuyu, packed": ["--elm", "fuyu", "--packing", "--num_ecg_tokens", "5"],
    "symbolic": ["--elm", "ecg_byte", "--max_steps", "1"],
    "pictures, augmented": ["--representation", "rgb", "--encoder", "vit", "--encoder_config", VISION, "--augment_rgb"],
    "LoRA": ["--elm", "fuyu", "--num_ecg_tokens", "5", "--use_peft", "--lora_r", "2"],
    "streamed, by length": ["--elm", "fuyu", "--num_ecg_tokens", "5", "--streaming"],
    "two datasets": ["--elm", "fuyu", "--num_ecg_tokens", "5", "--train_sampling_strategy", "group_by_length"],
}


@pytest.mark.parametrize(
    "way", [*list(WAYS)[:3], *(pytest.param(way, marks=pytest.mark.slow) for way in list(WAYS)[3:])]
)
def test_reports_in_every_way(llm, data, tmp_path, way):
    options = ["--train_phase", "pretrain", "--max_steps", "2", *WAYS[way]]
    if way == "pictures, augmented":
        options += ["--image_processor", json.dumps({"size": {"height": 160, "width": 160}}), "--num_ecg_tokens", "4"]
    if way == "two datasets":
        options += ["--data", str(data), str(data)]
    sft.main(tiny_sft(llm, data, tmp_path / "model", *options, encoder=None))
    assert all(np.isfinite(losses(tmp_path / "model")))
    assert processor_of(tmp_path / "model").train_phase == "pretrain"


def test_lora_through_both_phases(llm, data, tmp_path):
    """The adapter of the second phase is loaded on the first one's model, with what that has learnt; so are its checkpoints, wherever
    the run is now."""
    lora = ["--use_peft", "--lora_r", "2", "--thinking_tokens", "--max_steps", "2"]
    first, second = tmp_path / "first", tmp_path / "second"
    sft.main(tiny_sft(llm, data, first, *WAYS["LoRA"], "--train_phase", "pretrain", *lora, encoder=None))
    more = [
        "--model_name_or_path",
        str(first),
        "--explicit_thinking",
        *lora,
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
    ]
    sft.main(tiny_sft(llm, data, second, *more, "--update", "llm", "--lr", "1e-12", encoder=None))
    moved = second.rename(tmp_path / "moved")
    one, *others = (load_elm(str(folder))[0].state_dict() for folder in (first, moved, moved / "checkpoint-2"))
    for name, weight in one.items():
        for other in others:
            torch.testing.assert_close(other[name], weight, rtol=0, atol=1e-6)


def test_frozen_encoder_is_read_once(llm, data, aligned, tmp_path, capsys):
    options = ["--model_name_or_path", str(aligned), "--train_phase", "pretrain", "--cache_features", "memory"]
    sft.main(tiny_sft(llm, data, tmp_path / "model", *options, "--max_steps", "8", encoder=None))
    assert "16 ECGs computed, 16 times found" in capsys.readouterr().out


def test_resumes_bit_for_bit(llm, data, aligned, tmp_path):
    options = ["--model_name_or_path", str(aligned), "--train_phase", "pretrain", "--augment_ecg"]
    options += ["--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    for name, more in (("whole", ["4"]), ("halves", ["2"]), ("halves", ["4", "--resume_from_checkpoint", "last"])):
        sft.main(tiny_sft(llm, data, tmp_path / name, *options, "--max_steps", *more, encoder=None))
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--train_phase", "rl"], "--train_phase rl cannot be used: .* Use `elm rl`"),
        (["--report_column", "report"], "--report_column report is of --train_phase pretrain"),
        (["--train_phase", "pretrain", "--explicit_thinking"], "--explicit_thinking with --train_phase pretrain"),
        (["--train_phase", "pretrain", "--system_prompt", "S"], "--system_prompt with --train_phase pretrain"),
    ],
)
def test_options_that_do_not_go_together(llm, data, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sft.parse(tiny_sft(llm, data, tmp_path, *options))


def test_defaults_of_the_phase(llm, data, tmp_path):
    def parsed(*options):
        words = tiny_sft(llm, data, tmp_path, "--train_phase", "pretrain", *options, encoder=None)
        place = words.index("--lr")
        args, training_args, _ = sft.parse(words[:place] + words[place + 2 :])
        return args.update, training_args.learning_rate

    assert parsed() == (["encoder", "connector"], 5e-4)
    assert parsed("--elm", "fuyu") == (["connector"], 5e-4)
    assert parsed("--elm", "fuyu", "--use_peft") == (["connector", "llm"], 2e-4)
    assert parsed("--update", "connector", "llm") == (["connector", "llm"], 2e-5)
