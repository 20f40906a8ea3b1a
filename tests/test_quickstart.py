import base64
import json
import re

import pytest
from datasets import load_from_disk
from PIL import Image, ImageChops
from transformers import AutoModelForCausalLM, AutoTokenizer

from ecg_drawing import draw_ecg
from ecg_utils import as_record
from training import quickstart
from training.build import load_elm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    patch = pytest.MonkeyPatch()

    make_dataset = quickstart.make_dataset
    patch.setattr(
        quickstart, "make_dataset", lambda size, **options: make_dataset(min(size, 8), **options | {"num_proc": None})
    )
    try:
        options = ["--output_dir", str(folder), "--num_records", "8", "--max_steps", "2", "--use_cpu"]
        quickstart.main([*options, "--batch_size", "4", "--disable_tqdm", "true"])
    finally:
        patch.undo()
    return folder


def test_writes_what_it_promises(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names >= {"data/dataset_dict.json", "llm/model.safetensors", "report.html", "training.png", "example.png"}
    model = {"model.safetensors", "README.md", "evaluation_results.json", "predictions.jsonl", "exact_match.png"}
    assert names >= {f"model/{name}" for name in model | {"modeling_elm.py", "processor_config.json"}}


def test_report_holds_its_pictures(folder):
    report = (folder / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', report)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "src=" not in re.sub(r'src="data:[^"]+"', "", report)  # nothing outside the file
    results = json.loads((folder / "model" / "evaluation_results.json").read_text())
    assert f"Exact match {100 * results['conditions']['ecg']['exact_match']:.1f}%" in report
    assert "not a medical device" in report


def test_example_is_the_record_that_was_asked_about(folder):
    first = json.loads((folder / "model" / "predictions.jsonl").read_text().splitlines()[0])
    record = as_record(load_from_disk(folder / "data")["test"][first["row"]]["ecg"])
    caption = f"{first['question']}  Model: {first['ecg']}. Truth: {first['answer']}."
    with Image.open(folder / "example.png") as picture:
        assert (
            ImageChops.difference(picture, draw_ecg(record, picture.height, picture.width, caption=caption)).getbbox()
            is None
        )


def test_options_reach_the_training(folder):
    assert json.loads((folder / "model" / "trainer_state.json").read_text())["max_steps"] == 2


def test_parts_load(folder):
    model, processor = load_elm(str(folder / "model"))
    assert model.config.encoder_config.model_type == "merl"
    assert processor.num_ecg_tokens == model.config.num_ecg_tokens > 1
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    assert llm.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "llm"))
    text = "Is this atrial fibrillation? 12 µV é"
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_card_has_the_scores(folder):
    card = (folder / "model" / "README.md").read_text()
    assert "| left_out |" in card
    assert "Not evaluated yet" not in card
    assert str(folder) not in card
