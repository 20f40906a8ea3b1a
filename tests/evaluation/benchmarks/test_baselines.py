from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from elm_ecg.ecg_utils import as_record
from elm_ecg.training.evaluation.benchmarks import command
from elm_ecg.training.evaluation.benchmarks.baselines import ChatAnswerer, described, drawn, shown_records
from elm_ecg.training.evaluation.conditions import CONDITIONS
from elm_ecg.training.evaluation.questions import list_questions
from helpers import save_record, tiny_llm_config, tiny_tokenizer, write_rows

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    folder = tmp_path_factory.mktemp("records")
    turns = ("Is it?", "yes", "Sure?", "no")
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    files = [str(save_record(folder / f"{number}.npz", seed=number)) for number in range(4)]
    return Dataset.from_list([{"ecg": [file], "messages": messages, "patient_id": [file]} for file in files])


def test_what_each_condition_shows(data):
    own = as_record(data[0]["ecg"][0])
    shown = {
        name: shown_records(data, 0, CONDITIONS[name], np.array([2, 3, 0, 1]), 0)
        for name in CONDITIONS
        if name != "most_frequent"
    }
    assert np.array_equal(shown["ecg"][0].array, own.array)
    assert not shown["zeroed"][0].array.any()
    assert shown["noise"][0].array.std() == pytest.approx(1, abs=0.02)
    assert np.array_equal(shown["noise"][0].array, shown_records(data, 0, CONDITIONS["noise"], None, 0)[0].array)
    assert np.array_equal(shown["swapped"][0].array, as_record(data[2]["ecg"][0]).array)
    assert shown["left_out"] == []


def test_pictures_and_words(data):
    record = as_record(data[0]["ecg"][0])
    picture = drawn(record)
    assert picture.size[0] == 1100
    assert picture.mode == "RGB"
    assert described([record]).startswith("The ECG: ")
    assert described([record, record]).count("\n") == 2


def test_each_question_comes_after_the_right_answers_before_it(data):
    asked = []

    def reply(chats):
        asked.extend(chats)
        return [f"answer {len(chat)}" for chat in chats]

    questions = list_questions(data)
    answerer = ChatAnswerer(data, questions, reply, batch_size=3, seed=0, system_prompt="Be brief.")
    answers, reason = answerer.ask("ecg")
    assert reason is None
    assert answers == ["answer 2", "answer 4"] * 4
    assert [[part["type"] for part in turn["content"]] for turn in asked[1]] == [
        ["text"],
        ["image", "text"],
        ["text"],
        ["text"],
    ]
    assert asked[1][2]["content"][0]["text"] == "yes"
    one = Dataset.from_list([data[0]])
    answers, reason = ChatAnswerer(one, list_questions(one), reply, 3, 0).ask("swapped")
    assert answers == []
    assert "no other ECG to swap in" in reason


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A tiny model of transformers that reads pictures and text, with random weights."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = tiny_tokenizer("llama3", padding_side="left")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = tiny_llm_config("llama3", len(tokenizer))
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def test_a_model_that_reads_pictures(llava, data, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "write_report", lambda *args: None)
    files = [Path(row["ecg"][0]) for row in data]
    asked = {"template_id": 2, "question_type": "verify", "split": "test"}
    rows = [{**asked, "ecg_id": [file.stem], "question": "Is it?", "answer": ["yes"]} for file in files]
    rows.append({**rows[0], "ecg_id": [files[0].stem, files[1].stem]})
    texts = write_rows(tmp_path / "qa.jsonl", *rows)
    argv = [
        str(llava),
        "--suite",
        f"ecg-qa={texts}",
        "--records",
        str(files[0].parent),
        "--max_new_tokens",
        "3",
        "--batch_size",
        "2",
    ]
    results = command.main([*argv, "--conditions", "zeroed", "left_out", "--output_dir", str(tmp_path / "out")])[
        "ecg-qa"
    ]
    assert results["num_questions"] == 5
    assert results["model_revision"].startswith("sha256:")
    assert all(isinstance(row["ecg"], str) for row in results.predictions)
    assert [*results["conditions"]] == ["ecg", "zeroed", "left_out"]
    # the picture reaches the model
    assert any(row["ecg"] != row["left_out"] for row in results.predictions)


def test_any_number_of_ecgs_is_described(data):
    record = as_record(data[0]["ecg"][0])
    starts = [line.partition(":")[0] for line in described([record] * 7).splitlines()]
    assert starts[:2] == ["The first ECG", "The second ECG"]
    assert starts[5:] == ["ECG 6", "ECG 7"]
    assert described([record]).startswith("The ECG: ")
