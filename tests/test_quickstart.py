import base64
import html
import io
import json
import re
from pathlib import Path

import pytest
from datasets import load_from_disk
from PIL import Image, ImageChops
from transformers import AutoModelForCausalLM, AutoTokenizer

from elm_ecg.ecg_drawing import ECGPaper, draw_ecg
from elm_ecg.ecg_utils import as_record
from elm_ecg.training import quickstart
from elm_ecg.training.evaluation.report import examples
from elm_ecg.training.load import load_elm


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


@pytest.mark.slow
def test_writes_what_it_promises(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert names >= {"data/dataset_dict.json", "llm/model.safetensors", "report.html"}
    model = {"model.safetensors", "README.md", "modeling_elm.py", "processor_config.json"}
    assert names >= {f"model/{name}" for name in model}
    assert {path.name for path in evaluation(folder).iterdir()} == {
        "evaluation_results.json",
        "predictions.jsonl",
        "report.html",
    }


def evaluation(folder: Path) -> Path:
    (place,) = folder.glob("model/evaluation/data-test-generation-*")
    return place


@pytest.mark.slow
def test_report(folder):
    report = (folder / "report.html").read_text()
    assert "src=" not in re.sub(r'src="data:[^"]+"', "", report)  # nothing outside the file
    results = json.loads((evaluation(folder) / "evaluation_results.json").read_text())
    for words in (results["verdict"], "on simulated ECGs", "not a medical device", "Loss while training"):
        assert words in html.unescape(report)


@pytest.mark.slow
def test_examples_are_the_records_that_were_asked_about(folder):
    report = (folder / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', report)
    lines = (evaluation(folder) / "predictions.jsonl").read_text().split("\n")[:-1]
    chosen = examples([json.loads(line) for line in lines])
    assert len(pictures) == len(chosen)
    record = as_record(load_from_disk(folder / "data")["test"][chosen[0]["row"]]["ecg"])
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        drawn = draw_ecg(record, picture.height, picture.width, ECGPaper(layout="6x2")).quantize(64)
        assert ImageChops.difference(picture.convert("RGB"), drawn.convert("RGB")).getbbox() is None


@pytest.mark.slow
def test_options_reach_the_training(folder):
    assert json.loads((folder / "model" / "trainer_state.json").read_text())["max_steps"] == 2


@pytest.mark.slow
def test_parts_load(folder):
    model, processor = load_elm(str(folder / "model"))
    assert model.config.encoder_config.model_type == "merl"
    assert processor.num_ecg_tokens == model.config.num_ecg_tokens > 1
    llm = AutoModelForCausalLM.from_pretrained(folder / "llm")
    assert llm.config.vocab_size == len(AutoTokenizer.from_pretrained(folder / "llm"))
    text = "Is this atrial fibrillation? 12 µV é"
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


@pytest.mark.slow
def test_card_has_the_scores(folder):
    card = (folder / "model" / "README.md").read_text()
    assert "| left_out |" in card
    assert "Not evaluated yet" not in card
    assert str(folder) not in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outputdir", "q"], "elm quickstart: there is no option --outputdir. Did you mean --output_dir?"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
    ],
)
def test_a_typo_writes_nothing(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        quickstart.main(["--use_cpu", *options])
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="--data_subset is 0"):
        quickstart.main(["--use_cpu", "--data_subset", "0"])
    with pytest.raises(ValueError, match="--data: elm quickstart makes its own data"):
        quickstart.main(["--use_cpu", "--data=mine"])
    with pytest.raises(ValueError, match="--model_name_or_path: elm quickstart makes"):
        quickstart.main(["--use_cpu", "--model-name-or-path", "mine"])
    with pytest.raises(ValueError, match=r"--config mine\.yaml is no file"):
        quickstart.main(["--use_cpu", "--config=mine.yaml"])
    assert list(tmp_path.iterdir()) == []
