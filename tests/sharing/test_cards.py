import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import UndefinedError
from trl import ModelConfig, SFTConfig

from elm_ecg.training.arguments import ELMArguments
from elm_ecg.training.evaluation.card import add_evaluations
from elm_ecg.training.evaluation.results import Results
from elm_ecg.training.markdown import make_card
from elm_ecg.training.sharing.cards import count, elm_card, write_model_card
from helpers import (
    RESULTS,
    ROOT,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor_elm,
    tiny_processor,
    tiny_symbolic_processor,
)
from loopback_hub import card_errors

FINISHED = list((ROOT / "model_cards").glob("*_*.md"))
TRAINING = SFTConfig(output_dir="unused", learning_rate=3e-4, per_device_train_batch_size=4, use_cpu=True, bf16=False)
SPLITS = {"train": Dataset.from_dict({"patient_id": ["a", "a", "b"], "record_id": ["1", "2", "3"]}), "validation": None}


def write(folder: Path, part: str | None = "merl", model: dict | None = None, **options) -> ModelCard:
    defaults = {"data": ["owner/data", "/home/someone/secret/local"], "llm": "qwen2.5-0.5b-instruct"}
    options = defaults | {"update": ["connector", "llm"]} | options
    folder.mkdir(exist_ok=True)
    arguments = (ELMArguments(**options), TRAINING, ModelConfig(**model or {}))
    write_model_card(folder, *arguments, tiny_elm_config(part), tiny_processor(), SPLITS)
    return ModelCard.load(folder / "README.md")


def test_what_a_card_says(tmp_path):
    card = write(tmp_path / "my-elm")
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert card.data.datasets == ["owner/data"]
    assert card.data.library_name == "transformers"
    assert {"ecg", "elm", "trl"} <= set(card.data.tags)
    assert "# my-elm" in card.text
    assert "`merl` encoder, `mlp` connector" in card.text
    assert "12 leads, 500 samples at 250 Hz, normalisation `none`" in card.text
    assert "| trained parts | connector, llm |" in card.text
    assert "`owner/data`, `local`" in card.text
    assert "secret" not in card.text
    assert str(tmp_path) not in card.text
    assert "not a medical device" in card.text
    assert "Not evaluated yet" in card.text
    assert "| train | 3 | 3 | 2 |" in card.text
    assert "| `learning_rate` | 0.0003 |" in card.text
    assert "| batch size | 4 |" in card.text
    assert f"| threads of the CPU | {torch.get_num_threads()} |" in card.text
    assert "| `seed` | 42 |" in card.text
    assert "| transformers |" in card.text
    assert "validation" not in card.text
    assert "{{" not in card.text
    assert card_errors(str(card)) == []


@pytest.mark.parametrize(
    ("part", "words", "trained"),
    [("patch", "`patch` connector, no encoder", "connector, llm"), (None, "none: the model reads no ECG", "llm")],
)
def test_other_architectures(tmp_path, part, words, trained):
    text = write(tmp_path, part).text
    assert words in text
    assert f"| trained parts | {trained} |" in text


PICTURES = {
    "vit-rgb": "`rgb`: a drawing on ECG paper, layout 12x1, 25 mm/s, 10 mm/mV, 160 x 160 pixels",
    "siglip2_vision_model-rgb": "`rgb`: a drawing on ECG paper, layout 12x1, 25 mm/s, 10 mm/mV, 96 x 160 pixels",
    "vit-stacked_signal": "`stacked_signal`: a grey picture of leads x samples, black at 0 and white at 1",
}


@pytest.mark.parametrize("case", PICTURES)
def test_what_a_model_of_pictures_sees(tmp_path, case):
    backbone, representation = case.split("-")
    options = {"data": ["owner/data"], "update": ["connector"], "representation": representation}

    def card(model: ModelConfig, **changes) -> str:
        config, processor = (
            make(backbone, representation) for make in (tiny_image_elm_config, tiny_image_processor_elm)
        )
        write_model_card(tmp_path, ELMArguments(**options | changes), TRAINING, model, config, processor, SPLITS)
        return ModelCard.load(tmp_path / "README.md").text

    text = card(ModelConfig(), encoder="owner/backbone")
    assert f"| representation | {PICTURES[case]} |" in text
    assert f"| ECG path | `{backbone}` encoder of `owner/backbone`, `mlp` connector |" in text
    assert "secret" not in card(ModelConfig(), encoder="/home/someone/secret/backbone")
    for text in (card(ModelConfig(), encoder="vit"), card(ModelConfig(model_name_or_path="owner/old-elm"))):
        assert f"| ECG path | `{backbone}` encoder, `mlp` connector |" in text


def test_other_representations(tmp_path):
    def text(processor) -> str:
        return elm_card(tmp_path, tiny_elm_config(None), "name", processor).text

    assert "| representation | `signal` |" in text(tiny_processor())
    assert "| representation | none |" in text(tiny_processor(num_ecg_tokens=0))
    symbolic = text(tiny_symbolic_processor())
    assert "| representation | `symbolic` |" in symbolic
    assert "| ECG path | ECG-Byte tokens in the text, 86 of them in the vocabulary |" in symbolic
    assert "| tokens for each ECG | as many as its signal needs |" in symbolic


def test_a_template_gets_all_its_facts():
    with pytest.raises(UndefinedError, match="'num_tokens' is undefined"):
        make_card("encoder.md", ModelCardData(), model_name="x")


def test_adapter(tmp_path):
    card = write(tmp_path, model={"use_peft": True})
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert "(LoRA on the language model)" in card.text
    assert "AutoPeftModelForCausalLM.from_pretrained" in card.text


def test_continued_from_a_model(tmp_path):
    card = write(tmp_path / "new", model={"model_name_or_path": "owner/old-elm"})
    assert card.data.base_model == "owner/old-elm"
    assert "| built on | `owner/old-elm` |" in card.text
    card = write(tmp_path / "new", model={"model_name_or_path": "/home/someone/old-elm"})
    assert card.data.base_model is None
    assert "| built on | `old-elm` |" in card.text


@pytest.mark.parametrize(
    ("patients", "expected"),
    [
        (["a", "a", "b"], ("3", "unknown", "2")),
        ([["a", "b"], ["b"], ["c"]], ("3", "unknown", "3")),  # rows about several ECGs
        (["a", None, "b"], ("3", "unknown", "unknown")),  # as in the card of a dataset: there may be more than two
        (["a", "", "b"], ("3", "unknown", "unknown")),
    ],
)
def test_count(patients, expected):
    assert count(Dataset.from_dict({"patient_id": patients})) == expected


def test_snippet_is_python(tmp_path):
    for model in ({}, {"use_peft": True}):
        text = write(tmp_path, model=model).text
        code = text.split("```python\n")[1].split("\n```")[0]
        compile(code, "card", "exec")
        assert len(code.splitlines()) <= 13


def evaluate(folder: Path, name: str = "a", **changes: Any) -> None:
    """As `elm evaluate` leaves it."""
    place = folder / "evaluation" / name
    place.mkdir(parents=True, exist_ok=True)
    Results({**RESULTS, "evaluation": name, **changes}).save(place)
    add_evaluations(folder, "sha256:0")


def test_add_evaluations(tmp_path):
    before = write(tmp_path).text
    for value in (0.5, 0.875):  # a second evaluation replaces the first
        conditions = json.loads(json.dumps(RESULTS["conditions"]))
        conditions["ecg"]["metrics"]["exact_match"]["value"] = value
        evaluate(tmp_path, conditions=conditions)
    card = ModelCard.load(tmp_path / "README.md")
    assert "| ECG | exact match | AUROC |" in card.text
    assert "| ecg | 87.5 [80.0, 95.0] | undefined |\n| left_out | 25.0 |  |" in card.text
    assert RESULTS["verdict"] in card.text
    assert "`ecgs`, split `test` of fold 2: 40 questions, 20 patients; answers by generation, seed 0." in card.text
    assert "most frequent answer to each question in training, without any model." in card.text
    assert "50.0 [" not in card.text
    assert "Not evaluated yet" not in card.text
    assert card.text.split("## Limits")[1].strip() == before.split("## Limits")[1].strip()
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("exact_match", 0.875, "test")
    assert result.dataset_args == {"fold": 2}
    assert card.data.metrics == ["exact_match", "auroc"]
    assert card_errors(str(card)) == []


def test_the_card_has_all_evaluations_of_the_weights(tmp_path):
    """Not those of others; a metric in units is not shown in percent."""
    write(tmp_path)
    evaluate(tmp_path)
    evaluate(tmp_path, "stale", model_revision="sha256:1", verdict="Of other weights.")
    scale = RESULTS["metrics"]["exact_match"] | {"title": "error of the rate", "unit": "bpm", "higher_is_better": False}
    evaluate(tmp_path, "b", metrics={**RESULTS["metrics"], "exact_match": scale}, verdict="By the rate.")
    card = ModelCard.load(tmp_path / "README.md")
    assert RESULTS["verdict"] in card.text
    assert "By the rate.\n\n| ECG | error of the rate (bpm, lower is better) | AUROC |" in card.text
    assert "| ecg | 0.9 [0.8, 0.9] | undefined |" in card.text
    assert "Of other weights." not in card.text
    assert [result.dataset_config for result in card.data.eval_results] == ["a", "b"]
    assert card_errors(str(card)) == []


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("license: no-such-licence", "license"),
        ("pipeline_tag: no-such-task", "pipeline_tag"),
        ("tags: ecg", "tags"),
        ("base_model: /home/someone/llm", "is no repo id"),
        ("license: other", "license_link"),
        ("model-index: [{name: x, results: [{task: {type: a}}]}]", "model-index"),
        (
            "model-index: [{name: x, results: [{task: {type: a}, dataset: {type: b, name: c}, metrics: [{type: d, value: 1}]}]}]",
            "unknown task a",
        ),
        ("a: [", "bad yaml"),
    ],
)
def test_the_loopback_hub_refuses_a_bad_card(metadata, error):
    assert error in " ".join(card_errors(f"---\n{metadata}\n---\n# x\n"))
    assert card_errors("# x\n") == ["empty or missing yaml metadata"]


def test_training_again_drops_old_scores(tmp_path):
    write(tmp_path)
    evaluate(tmp_path)
    assert "Not evaluated yet" in write(tmp_path).text


@pytest.mark.parametrize("path", sorted(FINISHED), ids=lambda path: path.stem)
def test_finished_cards(path):
    """The card of each recipe that was run is one that the Hub takes, and says what it must."""
    text = path.read_text(encoding="utf-8")
    assert (ROOT / "training" / "configs" / f"{path.stem}.yaml").is_file()
    assert card_errors(text) == []
    assert ModelCard(text).data.license == "mit"
    for words in ("not a medical device", "## What it says without the ECG", "## Limits"):
        assert words in text
