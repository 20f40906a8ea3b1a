import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.training import cli, pretrain, reconstructions, sft
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.encoders import load_encoder
from helpers import TINY_ENCODERS, fork_two, losses, run_isolated, save_tiny_data, tiny_sft, tiny_tokenizer
from probes import save_own

DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
SAVING = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]
LOAD = """\
import numpy as np
from transformers import AutoFeatureExtractor, AutoModel
encoder = AutoModel.from_pretrained("encoder", trust_remote_code=True)
extractor = AutoFeatureExtractor.from_pretrained("encoder", trust_remote_code=True)
values = extractor(np.zeros((12, 500), np.float32), 100, return_tensors="pt")["ecg_values"]
print(list(encoder(values).last_hidden_state.shape), extractor.sampling_rate)
"""
WORDS = ["sinus rhythm", "atrial fibrillation", "left bundle branch block", "st elevation", "normal ecg"]


def save_records(folder: Path, **sizes: int) -> Path:
    """Simulated records [12, 500] at 100 Hz, each with a report, but for every seventh."""
    splits = {}
    for split, size in sizes.items():
        rows = []
        for index in range(size):
            row = make_record(index, 0, split, sampling_rate=100, seconds=5.0)
            row["ecg"]["array"] = row["ecg"]["array"].tolist()
            report = None if index % 7 == 6 else f"{WORDS[index % 5]}; {WORDS[index % 3]}"
            names = {"record_id": f"{split}{index}", "patient_id": row["patient_id"]}
            rows.append({"ecg": row["ecg"], "report": report, **names})
        splits[split] = Dataset.from_list(rows)
    DatasetDict(splits).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small_pictures():
    """Which test_reconstructions.py looks at."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reconstructions, "WIDTH", 400)
        yield


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    return save_records(tmp_path_factory.mktemp("records") / "data", train=16, validation=4)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "bert"
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_pretrain(data: Path, output_dir: Path, *options: str, encoder: str | None = "st_mem") -> list[str]:
    """Arguments of `elm pretrain` for a run of seconds; a later option overrides an earlier one."""
    args = ["--data", str(data), "--output_dir", str(output_dir), "--sampling_rate", "100", "--num_samples", "500"]
    if encoder is not None:
        args += ["--encoder", encoder, "--encoder_config", json.dumps(TINY_ENCODERS[encoder])]
        args += ["--pretraining_config", json.dumps(DECODER)]
    args += [
        "--per_device_train_batch_size",
        "8",
        "--learning_rate",
        "1e-2",
        "--logging_steps",
        "1",
        "--max_steps",
        "2",
    ]
    args += ["--num_pictures", "0"]  # they take longer than the training
    return [*args, "--use_cpu", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", *options]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def trained(records, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    evaluated = ["--eval_strategy", "steps", "--eval_steps", "1", "--augment_ecg", "--num_pictures", "2"]
    pretrain.main(tiny_pretrain(records, folder, *evaluated))
    return folder


def test_what_a_run_leaves(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training.svg",
        "trainer_state.json",
    }
    assert names >= {"modeling_ecg_pretraining.py", "modeling_ecg_transformers.py", "training_options.json"}
    assert sorted(path.name for path in (trained / "reconstructions").iterdir()) == ["01.png", "02.png"]
    card = (trained / "encoder" / "README.md").read_text()
    assert "masked reconstruction (75% of the patches, standardised patches)" in card
    assert "from random weights, without labels: masked" in card
    assert "| train | 16 | 16 | 16 |" in card
    assert "Research software, not a medical device" in card
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert len([row for row in history if "eval_loss" in row]) == 2


def test_the_encoder_alone(trained):
    """It is that of the pretraining model, and a stranger's process loads it with its code."""
    encoder, whole = weights(trained / "encoder"), weights(trained)
    assert encoder.keys() == {name.removeprefix("encoder.") for name in whole if name.startswith("encoder.")}
    for name, tensor in encoder.items():
        assert torch.equal(tensor, whole[f"encoder.{name}"])
    assert run_isolated(LOAD, trained).split("\n")[-2] == "[1, 300, 32] 100.0"


def test_an_elm_takes_the_encoder(trained, llm, tmp_path):
    data = save_tiny_data(tmp_path / "chats", train=4)
    options = ["--encoder_name_or_path", str(trained / "encoder"), "--num_ecg_tokens", "4", "--max_steps", "1"]
    sft.main(tiny_sft(llm, data, tmp_path / "elm", *options, encoder=None))
    elm = weights(tmp_path / "elm")
    assert torch.equal(elm["model.encoder.embeddings.sep_token"], weights(trained)["encoder.embeddings.sep_token"])


def test_pretraining_goes_on_from_what_it_saved(trained, records, tmp_path, caplog):
    options = ["--model_name_or_path", str(trained), "--learning_rate", "1e-9", "--mask_ratio", "0.5"]
    pretrain.main(tiny_pretrain(records, tmp_path / "more", *options, encoder=None))
    before, after = weights(trained), weights(tmp_path / "more")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    model = ECGForPreTraining.from_pretrained(tmp_path / "more")
    assert model.config.mask_ratio == 0.5
    assert "Without effect" not in caplog.text
    # its encoder alone, with a new decoder
    begun = ["--encoder", str(trained), "--pretraining_config", json.dumps(DECODER), "--learning_rate", "1e-9"]
    pretrain.main(tiny_pretrain(records, tmp_path / "begun", *begun, encoder=None))
    after = weights(tmp_path / "begun")
    torch.testing.assert_close(after["encoder.embeddings.sep_token"], before["encoder.embeddings.sep_token"])
    assert not torch.allclose(after["decoder.head.weight"], before["decoder.head.weight"])


@pytest.mark.parametrize("encoder", ["merl", "siglip_ecg"])  # test_modeling_ecg_pretraining has all
def test_reports(encoder, records, text_encoder, tmp_path, capsys):
    """Any encoder learns from reports; a frozen text encoder stays as it was, and is saved with its tokenizer."""
    folder = tmp_path / "run"
    options = ["--objectives", "contrastive", "--text_encoder", str(text_encoder), "--eval_strategy", "epoch"]
    pretrain.main(tiny_pretrain(records, folder, *options, encoder=encoder))
    assert "contrastive: 16 records, 14 with a report, read as 500 samples at 100 Hz" in capsys.readouterr().out
    after = weights(folder)
    for name, tensor in load_file(text_encoder / "model.safetensors").items():
        if not name.startswith("pooler."):  # nothing reads it
            assert torch.equal(after[f"text_encoder.{name}"], tensor)
    assert (folder / "tokenizer.json").is_file()
    assert not (folder / "reconstructions").exists()
    model = ENCODER_MODELS[encoder].from_pretrained(folder / "encoder")
    assert all(torch.equal(tensor, after[f"encoder.{name}"]) for name, tensor in model.state_dict().items())
    card = (folder / "encoder" / "README.md").read_text()
    assert "ECGs against their reports (infonce; text encoder `bert`, as it was)" in card
    assert "It has seen these records of `data` with their reports" in card


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("encoder", "it is a 'st_mem' model, which reads ECGs; expected a text encoder with its tokenizer"),
        ("text", "its tokenizer cannot be read; expected a text encoder with its tokenizer"),
    ],
)
def test_what_is_no_text_encoder(kind, said, records, trained, text_encoder, tmp_path):
    other = tmp_path / "other"
    if kind == "encoder":
        shutil.copytree(trained / "encoder", other)
    else:
        BertModel.from_pretrained(text_encoder).save_pretrained(other)
    options = ["--objectives", "contrastive", "--text_encoder", str(other)]
    with pytest.raises(ValueError, match=f"--text_encoder .*other cannot be loaded: {said}"):
        pretrain.main(tiny_pretrain(records, tmp_path / "run", *options, encoder="merl"))


def test_both_objectives_and_a_trained_text_encoder(records, text_encoder, tmp_path):
    options = ["--objectives", "contrastive", "masked", "--text_encoder", str(text_encoder), "--train_text_encoder"]
    options += ["--contrastive_loss", "sigmoid", "--contrastive_weight", "0.5", "--eval_strategy", "epoch"]
    pretrain.main(tiny_pretrain(records, tmp_path / "run", *options))
    name = "encoder.layer.0.output.dense.weight"
    before, after = load_file(text_encoder / "model.safetensors"), weights(tmp_path / "run")
    assert not torch.equal(after[f"text_encoder.{name}"], before[name])
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    first, evaluated = history[0], next(row for row in history if "eval_loss" in row)
    for row, prefix in ((first, ""), (evaluated, "eval_")):
        parts = row[f"{prefix}masked_loss"] + 0.5 * row[f"{prefix}contrastive_loss"]
        assert row[f"{prefix}loss"] == pytest.approx(parts, rel=1e-3)


@pytest.mark.parametrize("kind", ["masked", "contrastive"])
def test_a_resumed_run_is_the_one_that_was_not_stopped(kind, records, text_encoder, tmp_path):
    """Bit for bit, with dropout, masks, augmentation and a moving average."""
    options = ["--ema_decay", "0.9", "--augment_ecg", "--time_shift", "1", "--max_steps", "4", *SAVING]
    encoder = "st_mem"
    if kind == "contrastive":
        options += ["--objectives", "contrastive", "--text_encoder", str(text_encoder), "--cache_reports"]
        encoder = "merl"
    folder = tmp_path / "run"
    pretrain.main(tiny_pretrain(records, folder, *options, encoder=encoder))
    whole, whole_losses = weights(folder), losses(folder)
    average = load_file(folder / "checkpoint-4" / "ema.safetensors")
    checkpoint = folder / "checkpoint-2"
    pretrain.main(
        tiny_pretrain(
            records, tmp_path / "again", *options, "--resume_from_checkpoint", str(checkpoint), encoder=encoder
        )
    )
    assert losses(tmp_path / "again") == whole_losses
    for name, tensor in weights(tmp_path / "again").items():
        assert torch.equal(tensor, whole[name]), name
    for name, tensor in load_file(tmp_path / "again" / "checkpoint-4" / "ema.safetensors").items():
        assert torch.equal(tensor, average[name]), name


def test_two_processes_are_as_one(records, text_encoder, tmp_path):
    """Two of batch 4 have the contrastive loss, and end at the weights, of one of batch 8; masks are the same too."""
    # larger weights than usual: those of the heads make tiny vectors, whose directions rounding changes
    config = json.dumps(DECODER | {"projection_dropout": 0.0, "initializer_range": 0.2})
    options = [
        "--objectives",
        "masked",
        "contrastive",
        "--text_encoder",
        str(text_encoder),
        "--pretraining_config",
        config,
    ]
    options += ["--max_steps", "3", "--adam_epsilon", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    pretrain.main(tiny_pretrain(records, one, *options))
    code = "import sys\nfrom elm_ecg.training import pretrain\npretrain.main(sys.argv[1:])"
    arguments = tiny_pretrain(records, two, *options, "--per_device_train_batch_size", "4", "--ddp_backend", "gloo")
    for process in fork_two(code, *arguments):
        ended = process.finish()
        assert ended.returncode == 0, ended.stderr[-3000:]
    histories = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (one, two)]
    for ours, theirs in zip(*histories, strict=True):
        for name in ("loss", "masked_loss", "contrastive_loss"):
            if name in ours:
                assert theirs[name] == pytest.approx(ours[name], rel=1e-5, abs=2e-6), name
    after = weights(two)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)


def test_streamed_records(records, tmp_path, capsys):
    pretrain.main(tiny_pretrain(records, tmp_path / "run", "--streaming"))
    assert "streamed records" in capsys.readouterr().out
    assert len(losses(tmp_path / "run")) == 2


def test_the_same_command_twice(records, tmp_path):
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        pretrain.main(tiny_pretrain(records, run, "--max_steps", "1", "--num_pictures", "1"))
    for name in ("model.safetensors", "reconstructions/01.png", "encoder/config.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()


def test_another_run_in_the_same_folder(trained, records, tmp_path):
    """The new model takes the place of the old one, and of its encoder; the scores of that one stay."""
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "encoder" / "probe").mkdir()
    (folder / "encoder" / "probe" / "scores.json").write_text("{}")
    pretrain.main(tiny_pretrain(records, folder, "--max_steps", "1", "--seed", "7", encoder="mtae"))
    assert type(load_encoder(str(folder)).model).__name__ == "MTAEModel"
    assert type(load_encoder(str(folder / "encoder")).model).__name__ == "MTAEModel"
    assert (folder / "encoder" / "probe" / "scores.json").is_file()
    assert not (folder / "reconstructions").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objectives", "contrastive"], "needs the text encoder of the reports: name one with --text_encoder"),
        (["--text_encoder", "bert"], "which reads no reports; add contrastive"),
        (["--cache_reports"], "--cache_reports with --objectives masked, which reads no reports"),
        (
            ["--encoder", "merl", "--encoder_config", "{}", "--objectives", "masked"],
            "The objective masked with a merl encoder; it hides patches",
        ),
        (["--encoder", "resnet", "--encoder_config", "{}"], "--encoder resnet is none of merl, mlae,"),
        (["--encoder", "stmem", "--encoder_config", "{}"], "Did you mean st_mem?"),
        (
            ["--encoder_config", '{"hidden": 3}'],
            "--encoder_config: STMEMConfig has no field hidden; it has num_leads, ",
        ),
        (["--pretraining_config", '{"mask_ratio": 0.5}'], "--mask_ratio is an option of its own"),
        (["--mask_ratio", "1"], "--mask_ratio is 1.0; expected a share"),
        (["--ema_decay", "1"], "--ema_decay is 1.0; expected a number between 0 and 1"),
        (["--perturb", "zeros"], "--perturb cannot be used: an encoder is pretrained on records"),
        (["--streaming", "--max_steps", "-1"], "--streaming does not know the number of rows; set --max_steps"),
        (["--eval_strategy", "epoch", "--data", "TRAIN"], "has no split 'validation'; leave --eval_strategy out"),
        (["--model_name_or_path", "nowhere"], "--model_name_or_path nowhere is no folder here"),
        (["--report_to", "wandb"], "the package wandb is not installed"),
    ],
)
def test_bad_input_is_one_line(options, message, records, tmp_path, capsys):
    if "TRAIN" in options:
        options = [*options[:-1], str(save_records(tmp_path / "train", train=8))]
    assert cli.main(["pretrain", *tiny_pretrain(records, tmp_path / "run", *options)]) == 1
    error = capsys.readouterr().err
    assert message in error.replace("\n", " ")
    assert not (tmp_path / "run").exists()


def test_records_that_fill_no_batch(records, tmp_path, capsys):
    """Weights that were never trained are not saved as pretrained."""
    arguments = tiny_pretrain(records, tmp_path / "run", "--per_device_train_batch_size", "200")
    assert cli.main(["pretrain", *arguments]) == 1
    assert "do not fill one batch of 200. Choose a smaller" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_reports_that_are_not_there(records, text_encoder, tmp_path, capsys):
    reports = ["--objectives", "contrastive", "--text_encoder", str(text_encoder)]
    arguments = tiny_pretrain(records, tmp_path / "run", *reports, "--report_column", "findings")
    assert cli.main(["pretrain", *arguments]) == 1
    assert "--report_column findings" in capsys.readouterr().err


def test_an_average_that_the_checkpoint_lacks(records, tmp_path, capsys):
    folder = tmp_path / "run"
    pretrain.main(tiny_pretrain(records, folder, *SAVING))
    arguments = tiny_pretrain(records, folder, *SAVING, "--ema_decay", "0.9", "--resume_from_checkpoint", "last")
    assert cli.main(["pretrain", *arguments]) == 1
    assert "--ema_decay" in capsys.readouterr().err


def test_an_encoder_of_somebodys_own(records, text_encoder, tmp_path, capsys):
    """It goes on from its weights, and is left with its code and a card; the whole model is read with it, too."""
    (tmp_path / "own").mkdir()
    save_own(tmp_path / "own")
    own = ["--encoder", str(tmp_path / "own"), "--objectives", "contrastive", "--text_encoder", str(text_encoder)]
    arguments = tiny_pretrain(records, tmp_path / "run", *own, encoder=None)
    assert cli.main(["pretrain", *arguments]) == 1
    assert "is a 'own_ecg' model, none of ours" in capsys.readouterr().err
    pretrain.main([*arguments, "--trust_remote_code"])
    card = (tmp_path / "run" / "encoder" / "README.md").read_text()
    assert "10 tokens of width 6 of a 12-lead ECG" in card
    assert "which lies beside the weights; read it before it is run" in card
    assert "written from the paper" not in card
    trained = weights(tmp_path / "run" / "encoder")
    for place in (tmp_path / "run", tmp_path / "run" / "encoder"):
        with pytest.raises(ValueError, match="--trust_remote_code"):
            load_encoder(str(place))
        loaded = load_encoder(str(place), trust_remote_code=True)
        assert torch.equal(loaded.model.state_dict()["conv.weight"], trained["conv.weight"])
        assert (loaded.pretraining is None) == (place.name == "encoder")
    go_on = ["--model_name_or_path", str(tmp_path / "run"), "--trust_remote_code"]
    pretrain.main(tiny_pretrain(records, tmp_path / "more", *go_on, encoder=None))
    assert not torch.equal(weights(tmp_path / "more" / "encoder")["conv.weight"], trained["conv.weight"])


def test_a_finished_model_and_options_of_a_new_one(trained, records, tmp_path, capsys, caplog):
    arguments = ["--model_name_or_path", str(trained), "--objectives", "contrastive"]
    assert cli.main(["pretrain", *tiny_pretrain(records, tmp_path / "run", *arguments, encoder=None)]) == 1
    assert "was made for masked; leave the option out, or begin with its encoder" in capsys.readouterr().err
    assert (
        cli.main(
            ["pretrain", *tiny_pretrain(records, tmp_path / "run", "--model_name_or_path", str(trained / "encoder"))]
        )
        == 1
    )
    assert "it is a 'st_mem' model; expected what `elm pretrain` saves" in capsys.readouterr().err


def test_what_is_read_is_not_written_over(trained, records, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("st_mem").mkdir()  # as an earlier run has called its folder
    monkeypatch.setattr(pretrain, "build_model", None)
    for encoder, said in (
        (trained, "is the folder of --encoder"),
        (trained / "encoder", "--encoder .* lies in encoder of"),
    ):
        with pytest.raises(ValueError, match=said):
            pretrain.main(tiny_pretrain(records, trained, "--encoder", str(encoder), encoder=None))
    for name in ("encoder", "reconstructions", "base_model"):
        data = shutil.copytree(records, tmp_path / "run" / name)
        with pytest.raises(ValueError, match=f"--data .* lies in {name} of --output_dir .*, which the run replaces"):
            pretrain.main(tiny_pretrain(Path(data), tmp_path / "run"))
    with pytest.raises(TypeError):
        pretrain.main(tiny_pretrain(records, Path("st_mem")))


def test_records_of_a_pretrained_encoder(trained, records, tmp_path, capsys, caplog):
    """The feature extractor beside an encoder wins; without one the options say what its records are."""
    folder = tmp_path / "encoder"
    ENCODER_MODELS["st_mem"].from_pretrained(trained / "encoder").save_pretrained(folder)
    arguments = ["--encoder", str(folder), "--pretraining_config", json.dumps(DECODER), "--lead_names", "I", "II"]
    assert cli.main(["pretrain", *tiny_pretrain(records, tmp_path / "run", *arguments, encoder=None)]) == 1
    assert "its records have 2 leads by its feature extractor, and the encoder reads 12" in capsys.readouterr().err
    ECGFeatureExtractor(100, 500).save_pretrained(folder)
    pretrain.main(tiny_pretrain(records, tmp_path / "run", *arguments, encoder=None))
    assert "Without effect: --lead_names" in caplog.text
