import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from elm_ecg.ecg_utils import as_record
from elm_ecg.training.encoders import load_encoder
from elm_ecg.training.evaluation import probe, probe_models
from elm_ecg.training.evaluation.probe_data import load_records
from elm_ecg.training.evaluation.probe_prompts import read_prompts, zero_shot
from probes import save_pretraining, save_records

LABELS = ["AFIB", "MI"]


@pytest.fixture
def pretrained(tmp_path):
    save_pretraining(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def test_prompts(tmp_path):
    assert read_prompts(None, LABELS) == {"AFIB": ["AFIB"], "MI": ["MI"]}
    path = tmp_path / "prompts.yaml"
    path.write_text("AFIB: atrial fibrillation\nMI: [infarction, myocardial infarction]\n")
    assert read_prompts(path, LABELS) == {
        "AFIB": ["atrial fibrillation"],
        "MI": ["infarction", "myocardial infarction"],
    }
    path.write_text("AFIB: atrial fibrillation\n")
    assert read_prompts(path, LABELS)["MI"] == ["MI"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[AFIB]", "holds a list; expected lines such as"),
        ("AFIB: [", "is not YAML"),
        ("AFB: x", "'AFB' is none of the labels. Did you mean AFIB"),
        ("AFIB: []", r"the texts of 'AFIB' are \[\]; expected a text, or a list of texts"),
        ("AFIB: 3", "the texts of 'AFIB' are 3"),
        ("AFIB: ['']", "the texts of 'AFIB' are"),
    ],
)
def test_bad_prompts(content, message, tmp_path):
    (tmp_path / "prompts.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.yaml", LABELS)


def test_cosines_with_the_mean_of_the_texts(pretrained):
    encoder = load_encoder(str(pretrained))
    projected = np.random.default_rng(0).normal(0, 3, (4, 8)).astype(np.float32)
    scores = zero_shot(encoder, projected, {"AFIB": ["fibrillation", "irregular"], "MI": ["infarction"]})
    texts = []
    for text in ("fibrillation", "irregular", "infarction"):  # each by itself, without padding
        ids = encoder.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            texts.append(encoder.pretraining.get_text_embeddings(ids)[0].numpy())
    for column, text in enumerate((texts[0] + texts[1], texts[2])):
        expected = projected @ text / (np.linalg.norm(projected, axis=1) * np.linalg.norm(text))
        assert scores[:, column] == pytest.approx(expected, abs=1e-5)


def test_a_contrastive_encoder_is_scored_without_training(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr(probe_models, "NUM_EPOCHS", 1)
    monkeypatch.setattr(probe_models, "MIN_STEPS", 2)
    monkeypatch.setattr(probe_models, "STRENGTHS", [1e-2])
    data = save_records(tmp_path / "noises")
    prompts = tmp_path / "prompts.json"  # JSON is YAML
    prompts.write_text('{"loud": ["a loud record", "noise"]}')
    argv = [str(pretrained), "--data", str(data), "--shares", "1", "--min_records", "5", "--num_resamples", "100"]
    results = probe.main([*argv, "--prompts", str(prompts)])
    assert results["prompts"] == {"loud": ["a loud record", "noise"], "random": ["random"]}
    assert list(results["metrics"]) == ["auroc_100%", "auroc_zero_shot"]
    assert "auroc_zero_shot" not in results["models"]["random"]

    encoder = load_encoder(str(pretrained))
    (place,) = (pretrained / "probe").iterdir()
    scores = load_file(place / "probe_scores.safetensors")["encoder/auroc_zero_shot"]
    records = load_records([str(data)], min_records=5).splits["test"]
    inputs = encoder.prepare([as_record(ecg) for ecg in records.ecgs(0, 60)])
    with torch.inference_mode():
        projected = encoder.pretraining.get_ecg_embeddings(inputs["ecg_values"]).numpy()
    assert scores[0] == pytest.approx(zero_shot(encoder, projected, results["prompts"]), abs=1e-5)
    row = results["models"]["encoder"]["auroc_zero_shot"]
    for column, label in enumerate(("loud", "random")):
        area = roc_auc_score(records.labels[:, column], scores[0, :, column])
        assert row["labels"][label]["value"] == pytest.approx(area)
    assert "a loud record; noise" in (place / "report.html").read_text()
