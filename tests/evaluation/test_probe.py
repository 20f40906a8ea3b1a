import json
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from sklearn.metrics import roc_auc_score

from elm_ecg.training.evaluation import compare, probe, probe_models
from elm_ecg.training.evaluation.probe_data import draw_patients, load_records
from elm_ecg.training.sharing.disclosure import check_folder
from helpers import write_rows
from probes import SAMPLES, make_rows, save_encoder, save_records

OPTIONS = ["--shares", "0.2", "1", "--draws", "2", "--min_records", "5", "--num_resamples", "100"]
FILES = ("probe_results.json", "probe_records.jsonl", "probe_scores.safetensors", "report.html")


@pytest.fixture(scope="module", autouse=True)
def short_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_models, "NUM_EPOCHS", 1)
        patch.setattr(probe_models, "MIN_STEPS", 2)
        patch.setattr(probe_models, "STRENGTHS", [1e-3, 1e-1])
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_records(tmp_path_factory.mktemp("records") / "noises")


@pytest.fixture(scope="module")
def probed(data, tmp_path_factory) -> Path:
    """The folder of an encoder that was probed."""
    folder = save_encoder(tmp_path_factory.mktemp("encoders") / "one")
    probe.main([str(folder), "--data", str(data), *OPTIONS])
    return folder


def place_of(encoder: Path) -> Path:
    (place,) = (encoder / "probe").iterdir()
    return place


def test_a_probed_encoder_can_still_be_shared(probed):
    """What tells of its test patients stays where it is."""
    assert not [name for name in check_folder(probed, ["model.safetensors"]) if name.startswith("probe")]


def test_names_of_encoders(tmp_path):
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    assert probe._name_of(str(tmp_path / "run")) == "run"
    assert probe._name_of(str(tmp_path / "run" / "encoder")) == "run/encoder"
    assert probe._name_of("owner/encoder") == "owner/encoder"


def test_what_is_readable_is_read(probed, data, capsys):
    place = place_of(probed)
    assert re.fullmatch(r"noises-[0-9a-f]{8}", place.name)
    results = json.loads((place / "probe_results.json").read_text())
    tensors = load_file(place / "probe_scores.safetensors")
    records = [json.loads(line) for line in (place / "probe_records.jsonl").read_text().splitlines()]
    rows = make_rows("test", 60)
    assert [(row["record_id"], row["patient_id"], row["labels"]) for row in rows] == [
        (row["record_id"], row["patient_id"], row["labels"]) for row in records
    ]
    truth = np.array([[name in row["labels"] for name in ("loud", "random")] for row in rows])
    assert (tensors["labels"] == truth).all()
    assert list(results["metrics"]) == ["auroc_20%", "auroc_100%"]
    for model in ("encoder", "random", "cnn"):
        for metric, draws in (("auroc_20%", 2), ("auroc_100%", 1)):
            scores, row = tensors[f"{model}/{metric}"], results["models"][model][metric]
            assert scores.shape == (draws, 60, 2)
            areas = np.array([[roc_auc_score(truth[:, k], draw[:, k]) for k in range(2)] for draw in scores])
            assert row["macro"]["of_draws"] == pytest.approx(areas.mean(axis=1))
            assert row["macro"]["value"] == pytest.approx(areas.mean())
            assert [row["labels"][name]["value"] for name in ("loud", "random")] == pytest.approx(areas.mean(axis=0))
            low, high = row["macro"]["interval_95"]
            assert low < row["macro"]["value"] < high
    of_labels = results["models"]["encoder"]["auroc_100%"]["labels"]
    assert of_labels["loud"]["value"] > 0.95
    assert 0.25 < of_labels["random"]["value"] < 0.75
    own, other = (results["models"][model]["auroc_100%"]["macro"]["value"] for model in ("encoder", "random"))
    assert results["encoder_minus"]["random"]["auroc_100%"]["difference"] == pytest.approx(own - other)
    # both have random weights: nothing was learnt before
    assert results["verdict"].startswith("Has pretraining helped? Not shown. Macro AUROC over the same encoder with")


def test_same_command_same_bytes(probed, data):
    place = place_of(probed)
    before = {name: (place / name).read_bytes() for name in FILES}
    probe.main([str(probed), "--data", str(data), *OPTIONS])
    assert place_of(probed) == place
    assert {name: (place / name).read_bytes() for name in FILES} == before


def test_compare(probed, data, tmp_path, capsys):
    other = save_encoder(tmp_path / "two", seed=8)
    probe.main([str(other), "--data", str(data), *OPTIONS])
    assert capsys.readouterr().out.splitlines()[-1].startswith("Has pretraining helped")
    compare.main([str(probed), str(other), "--num_resamples", "300", "--output", str(tmp_path / "out.json")])
    assert "60 records of 30 patients" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    assert [row["metric"] for row in written["comparisons"]] == ["auroc_20%", "auroc_100%"]
    values = [
        json.loads((place_of(encoder) / "probe_results.json").read_text())["models"]["encoder"]["auroc_100%"]["macro"][
            "value"
        ]
        for encoder in (probed, other)
    ]
    assert written["comparisons"][1]["difference"] == pytest.approx(values[0] - values[1])
    compare.main([str(probed), str(place_of(other) / "probe_results.json"), "--metric", "auroc_100%"])
    with pytest.raises(
        ValueError, match=r"--metric auroc_5%: not all of these probes have it; they have auroc_20%, auroc_100%"
    ):
        compare.main([str(probed), str(other), "--metric", "auroc_5%"])
    with pytest.raises(ValueError, match=r"--condition zeroed: .* is of `elm probe`, which shows all ECGs"):
        compare.main([str(probed), str(other), "--condition", "zeroed"])

    changed = place_of(other) / "probe_records.jsonl"
    changed.write_text(changed.read_text().replace("test-1", "test-9"))
    with pytest.raises(ValueError, match=r"is not what probe_results\.json is about"):
        compare.main([str(probed), str(other)])


def test_other_probes_are_not_compared(probed, data, tmp_path):
    other = save_encoder(tmp_path / "two")
    probe.main([str(other), "--data", str(data), *OPTIONS, "--shares", "1", "--seed", "1"])
    with pytest.raises(ValueError, match="are not of the same probe: the seed of the settings is 0 and 1"):
        compare.main([str(probed), str(other)])


def test_results_of_other_weights_move_aside(data, tmp_path):
    folder = save_encoder(tmp_path / "encoder")
    argv = [str(folder), "--data", str(data), *OPTIONS, "--shares", "1"]
    first = probe.main(argv)
    save_encoder(folder, seed=9)
    second = probe.main(argv)
    assert first["model_revision"] != second["model_revision"]
    (old,) = (folder / "old_results" / "1" / "probe").iterdir()
    assert json.loads((old / "probe_results.json").read_text())["model_revision"] == first["model_revision"]
    with pytest.raises(ValueError, match="holds the results of another probe"):
        probe.main([*argv, "--output_dir", str(place_of(folder)), "--seed", "2"])


def test_nested_draws_of_patients():
    patients = [f"p{number // 3}" for number in np.random.default_rng(0).permutation(90)]
    drawn = draw_patients(patients, [0.1, 0.5, 1.0], 4, seed=3)
    assert [len(draws) for draws in drawn.values()] == [4, 4, 1]
    for draw in range(4):
        small, large = ({patients[row] for row in drawn[share][draw]} for share in (0.1, 0.5))
        assert (len(small), len(large)) == (3, 15)
        assert small < large
        for rows, names in ((drawn[0.1][draw], small), (drawn[0.5][draw], large)):
            assert rows.tolist() == [
                row for row, patient in enumerate(patients) if patient in names
            ]  # with all of their records
    assert len({tuple(rows) for rows in drawn[0.1]}) == 4
    assert drawn[1.0][0].tolist() == list(range(90))
    again = draw_patients(patients, [0.1], 4, seed=3)
    assert all((a == b).all() for a, b in zip(drawn[0.1], again[0.1], strict=True))
    with pytest.raises(ValueError, match=r"--shares 0\.01 of 30 training patients is none; the least share is 0\.033"):
        draw_patients(patients, [0.01], 4, seed=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shares", "0"], "--shares has 0; expected shares"),
        (["--shares", "1.5"], "--shares has 1.5"),
        (["--shares", "nan"], "--shares has nan"),
        (["--shares", "1", "1"], "names one twice"),
        (
            ["--label_columns", "label"],
            "--label_columns label: the split 'train' of --data has no such column. Did you mean labels?",
        ),
        (["--sampling_rate", "100"], "comes with what prepares its records; leave --sampling_rate out"),
        (["--zero_shot"], "--zero_shot with .* which has no text encoder"),
        (
            ["--min_records", "50"],
            r"None of the 2 labels can be probed \(loud, random\): each needs 50 training records",
        ),
    ],
)
def test_bad_options(options, message, probed, data):
    with pytest.raises(ValueError, match=message):
        probe.main([str(probed), "--data", str(data), *options])


def test_no_file_is_left_where_a_record_does_not_fit(data, tmp_path):
    encoder = save_encoder(tmp_path / "encoder", num_samples=SAMPLES // 2)
    with pytest.raises(
        ValueError, match=r"The record train-0 of the split 'train': The ECG is 2 s long .* --truncation"
    ):
        probe.main([str(encoder), "--data", str(data), *OPTIONS])
    assert not (encoder / "probe").exists()
    cut = probe.main([str(encoder), "--data", str(data), *OPTIONS, "--shares", "1", "--truncation", "end"])
    assert cut["settings"]["extractor"]["truncation"] == "end"


def test_prompts_are_for_text_encoders(probed, data, tmp_path):
    prompts = write_rows(tmp_path / "prompts.json", {"loud": "loud"})
    with pytest.raises(ValueError, match=r"--prompts with .* which has no text encoder"):
        probe.main([str(probed), "--data", str(data), "--prompts", str(prompts)])


def test_columns_of_zeros_and_ones(data):
    loaded = load_records([str(data)], ["loud"], min_records=1)
    assert loaded.labels == ["loud"]
    assert loaded.splits["train"].labels[:, 0].tolist() == [row["loud"] for row in make_rows("train", 60)]
