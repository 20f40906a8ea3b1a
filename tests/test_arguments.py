from dataclasses import fields
from pathlib import Path

import pytest
from trl import ModelConfig, SFTConfig

from elm_ecg.training.arguments import (
    ELMS,
    VISION_BACKBONES,
    AugmentationArguments,
    DataArguments,
    ELMArguments,
    ModelArguments,
    new_elm_options,
)
from elm_ecg.training.evaluation.evaluate import parse as parse_evaluation
from elm_ecg.training.parser import ALIASES, ELMParser
from elm_ecg.training.sft import make_parser, parse

BASE = ["--data", "some/data", "--output_dir", "out", "--use_cpu"]


def write_yaml(folder: Path, text: str) -> list[str]:
    (folder / "config.yaml").write_text(text)
    return ["--config", str(folder / "config.yaml")]


@pytest.mark.parametrize(
    ("options", "part", "name", "value"),
    [
        (["--epochs", "3"], 1, "num_train_epochs", 3),
        (["--batch_size", "5"], 1, "per_device_train_batch_size", 5),
        (["--lr", "1e-3"], 1, "learning_rate", 1e-3),
        (["--peft"], 2, "use_peft", True),
        (["--num_encoder_tokens", "7"], 0, "num_ecg_tokens", 7),
        (["--segment_len", "1250"], 0, "num_samples", 1250),
        (["--leads", "I", "aVR"], 0, "lead_names", ["I", "aVR"]),
        (["--elm_ckpt", "folder"], 2, "model_name_or_path", "folder"),
        (["--encoder_ckpt", "folder"], 0, "encoder_name_or_path", "folder"),
        (["--optimizer", "adam"], 1, "optim", "adamw_torch"),
        (["--optimizer=adamw"], 1, "optim", "adamw_torch"),
        (["--optimizer", "adafactor"], 1, "optim", "adafactor"),
        (["--optim", "adam"], 1, "optim", "adamw_torch"),
        (["--llm_input_len", "512"], 1, "max_length", 512),
        (["--data_representation", "signal"], 0, "representation", "signal"),
        (["--data_representation", "symbolic", "--ecg_tokenizer", "mine"], 0, "ecg_tokenizer", "mine"),
        (["--representation", "symbolic"], 0, "architecture", "text"),
        (["--elm", "ecg_byte"], 0, "representation", "symbolic"),
        (["--representation", "symbolic", "--ecg_overflow", "drop_leads"], 0, "ecg_overflow", "drop_leads"),
        ([], 0, "architecture", "llava"),
        (["--perturb", "noise"], 0, "perturb", "noise"),
        (["--update", "encoder", "llm"], 0, "update", ["encoder", "llm"]),
        (["--data_subset", "0.5"], 0, "data_subset", 0.5),
        (["--augment_ecg"], 0, "augment_ecg", True),
        (["--time_shift", "1.5"], 0, "time_shift", 1.5),
        (["--gain_jitter", "0.1"], 0, "gain_jitter", 0.1),
        (["--lead_dropout", "0.2"], 0, "lead_dropout", 0.2),
        (["--missing_leads", "zeros"], 0, "missing_leads", "zeros"),
        (["--bandpass", "0.5", "40"], 0, "bandpass", [0.5, 40.0]),
        (["--notch", "50"], 0, "notch", 50.0),
        (["--augment_rgb"], 0, "augment_rgb", True),  # of a saved model too, whose representation is not yet known
        (["--data_representation", "rgb"], 0, "representation", "rgb"),
        (["--representation", "rgb", "--paper", '{"layout": "3x4"}'], 0, "paper_fields", {"layout": "3x4"}),
        (
            ["--representation", "stacked_signal", "--image_processor", '{"size": {"height": 96, "width": 640}}'],
            0,
            "image_processor_fields",
            {"size": {"height": 96, "width": 640}},
        ),
        (["--gradient_accumulation_steps", "4"], 1, "gradient_accumulation_steps", 4),
        (["--lr_scheduler_type", "cosine"], 1, "lr_scheduler_type", "cosine"),
        (["--gradient_checkpointing", "false"], 1, "gradient_checkpointing", False),
        (["--torch_compile"], 1, "torch_compile", True),
        (["--peft", "--lora_r", "4"], 2, "lora_r", 4),
        (["--dtype", "bfloat16"], 2, "dtype", "bfloat16"),
    ],
)
def test_option_reaches_its_field(options, part, name, value):
    assert getattr(parse([*BASE, *options])[part], name) == value


def test_every_alias_is_an_option():
    options = ELMParser((ELMArguments, SFTConfig, ModelConfig))._option_string_actions
    for alias, name in ALIASES.items():
        assert options[f"--{alias}"] is options[f"--{name}"]


@pytest.mark.parametrize("elm", ELMS)
def test_elm_sets_architecture_and_connector(elm):
    args, _, _ = parse([*BASE, "--elm", elm])
    assert (args.architecture, args.connector) == ELMS[elm]


@pytest.mark.parametrize("representation", ["rgb", "stacked_signal"])
@pytest.mark.parametrize("name", VISION_BACKBONES)
def test_names_of_vision_backbones(name, representation):
    """As in the reference: the last part of the Hub id."""
    args, _, _ = parse([*BASE, "--representation", representation, "--encoder", name])
    owner, model = args.encoder_name_or_path.split("/")
    assert (owner, model) == ("openai" if name.startswith("clip") else "google", name)
    assert args.update == ["connector", "llm"]


@pytest.mark.parametrize(
    ("options", "name_or_path"),
    [
        ([], "openai/clip-vit-base-patch32"),
        (["--encoder", "facebook/dinov2-small"], "facebook/dinov2-small"),
        (["--encoder", "./my_clip"], "./my_clip"),
        (["--encoder", "vit", "--encoder_ckpt", "my_vit"], "my_vit"),
        (["--encoder", "vit"], None),  # random weights
    ],
)
def test_encoder_of_pictures(options, name_or_path):
    assert parse([*BASE, "--representation", "rgb", *options])[0].encoder_name_or_path == name_or_path


@pytest.mark.parametrize(
    ("options", "num_ecg_tokens", "normalization"),
    [
        (["--representation", "rgb"], 49, "none"),
        (["--representation", "stacked_signal"], 49, "minmax"),
        (["--representation", "rgb", "--image_features", "embedding"], 1, "none"),
        (["--representation", "rgb", "--num_encoder_tokens", "5"], 5, "none"),
        (["--representation", "stacked_signal", "--normalization", "zscore"], 49, "zscore"),
        (["--representation", "stacked_signal", "--normalization", "none"], 49, "none"),
        (["--normalization", "minmax"], 12, "minmax"),
    ],
)
def test_defaults_of_each_representation(options, num_ecg_tokens, normalization):
    args, _, _ = parse([*BASE, *options])
    assert (args.architecture, args.connector) == ("llava", "linear")
    assert (args.num_ecg_tokens, args.normalization) == (num_ecg_tokens, normalization)


def test_connector_beside_elm_wins():
    args, _, _ = parse([*BASE, "--elm", "fuyu", "--connector", "conv"])
    assert (args.architecture, args.connector) == ("fuyu", "conv")


@pytest.mark.parametrize(
    ("options", "connector", "num_ecg_tokens"),
    [
        ([], "linear", 12),
        (["--connector", "mlp"], "mlp", 12),
        (["--architecture", "fuyu"], "patch", 25),
        (["--elm", "base_elf"], "flat", 1),
        (["--elm", "conv_elf"], "conv", 25),
        (["--architecture", "text"], None, 1),
        (["--elm", "ecg_byte"], None, 1),
    ],
)
def test_defaults_of_each_architecture(options, connector, num_ecg_tokens):
    args, _, _ = parse([*BASE, *options])
    assert (args.connector, args.num_ecg_tokens) == (connector, num_ecg_tokens)


@pytest.mark.parametrize(
    ("options", "update"),
    [
        ([], ["encoder", "connector", "llm"]),  # nothing is learnt through a frozen random encoder
        (["--encoder_name_or_path", "pretrained"], ["connector", "llm"]),
        (["--model_name_or_path", "runs/elm"], ["connector", "llm"]),
        (["--elm", "fuyu"], ["connector", "llm"]),
        (["--update", "connector"], ["connector"]),
    ],
)
def test_parts_that_are_trained(options, update):
    assert parse([*BASE, *options])[0].update == update


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--representation", "symbolic", "--normalization", "minmax"],
            "the ECG-Byte tokenizer normalizes millivolts; leave the option out",
        ),
        (["--representation", "rgb", "--normalization", "minmax"], "ECG paper shows millivolts; leave the option out"),
        (["--ecg_tokenizer", "mine"], "--ecg_tokenizer with --representation signal; it is for symbolic ECGs"),
        (["--paper", '{"layout": "3x4"}'], "--paper with --representation signal; it is for rgb ECGs"),
        (
            ["--representation", "stacked_signal", "--paper", '{"gain": 20}'],
            "--paper with --representation stacked_signal",
        ),
        (
            ["--image_processor", '{"size": 96}'],
            "--image_processor with --representation signal; it is for stacked_signal and rgb ECGs",
        ),
        (
            ["--representation", "rgb", "--encoder_config", '{"hidden_size": 32}'],
            "--encoder_config with the pretrained encoder openai/clip-vit-base-patch32, whose own config stands",
        ),
        (
            ["--encoder_name_or_path", "mine", "--encoder_config", '{"depths": [1]}'],
            "--encoder_config with the pretrained encoder mine",
        ),
        (
            ["--representation", "rgb", "--elm", "fuyu"],
            "--representation rgb with --architecture fuyu; pictures of ECGs need a vision backbone",
        ),
        (
            ["--representation", "stacked_signal", "--architecture", "text"],
            "with --architecture text; pictures of ECGs",
        ),
        (["--representation", "rgb", "--paper", "3x4"], "--paper is not JSON"),
        (["--representation", "rgb", "--paper", "3"], "--paper is '3'; expected names and values of fields"),
        (["--representation", "rgb", "--image_processor", "[1]"], r"--image_processor is '\[1\]'; expected names"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        parse([*BASE, *options])


def test_options_of_a_new_elm():
    """Those that a saved ELM does not take; what is random in training is none of them."""
    of_new = ["--missing_leads", "zeros", "--bandpass", "0.5", "40", "--notch", "50"]
    of_training = ["--augment_ecg", "--time_shift", "1", "--gain_jitter", "0.1", "--lead_dropout", "0.2"]
    args = parse([*BASE, *of_new, *of_training])[0]
    assert new_elm_options(args) == ["missing_leads", "bandpass", "notch"]


def test_defaults_of_training():
    _, training_args, _ = parse(BASE)
    assert training_args.max_length is None
    assert not training_args.remove_unused_columns
    assert not training_args.bf16


def test_yaml_and_command_line(tmp_path):
    config = write_yaml(
        tmp_path,
        "data: a/b\nlr: 1e-3\nnum_train_epochs: 4\noptimizer: adam\nleads: [II, V1]\nupdate: connector\n"
        "encoder_config: {depths: [1, 1], widths: [8, 16]}\nresume_from_checkpoint: true\n",
    )
    args, training_args, _ = parse([*config, "--output_dir", "out", "--use_cpu", "--epochs", "9"])
    assert args.data == ["a/b"]
    assert training_args.learning_rate == 1e-3
    assert training_args.num_train_epochs == 9  # the command line's
    assert training_args.optim == "adamw_torch"
    assert args.lead_names == ["II", "V1"]
    assert args.update == ["connector"]
    assert args.encoder_fields == {"depths": [1, 1], "widths": [8, 16]}
    args, _, _ = parse([*BASE, *config, "--data", "c/d", "e/f", "--encoder_config", '{"depths": [2]}'])
    assert args.data == ["c/d", "e/f"]
    assert args.encoder_fields == {"depths": [2]}


def test_numbers_that_yaml_takes_for_others(tmp_path):
    config = write_yaml(tmp_path, "learning_rate: 1e-4\nbandpass: [5e-1, 40]\nmax_steps: '7'\nnum_samples: 250.0\n")
    args, training_args, _ = parse([*BASE, *config])
    assert (args.num_samples, type(args.num_samples)) == (250, int)  # a whole number all the same
    assert (args.bandpass, training_args.learning_rate) == ([0.5, 40], 1e-4)
    assert training_args.max_steps == 7


def test_yaml_of_pictures(tmp_path):
    config = write_yaml(
        tmp_path,
        "representation: rgb\npaper: {layout: 3x4, gain: 20}\nimage_processor: {max_num_patches: 512}\n"
        "encoder: siglip2-so400m-patch16-naflex\naugment_rgb: true\n",
    )
    args, _, _ = parse([*BASE, *config])
    assert args.paper_fields == {"layout": "3x4", "gain": 20}
    assert args.image_processor_fields == {"max_num_patches": 512}
    assert args.encoder_name_or_path == "google/siglip2-so400m-patch16-naflex"
    assert args.augment_rgb


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bogus: 1\n", r"--config .*config\.yaml: there is no option bogus\."),
        ("learning_rat: 1\n", r"there is no option learning_rat\. Did you mean learning_rate\?"),
        ("perturb: nois\n", r"perturb is 'nois'; .*\. Did you mean noise\?"),
        ("perturb: nonsense\n", r"config\.yaml: perturb is 'nonsense'; expected one of noise, zeros, only_text"),
        ("architecture: clip\n", "architecture is 'clip'"),
        ("elm: clip\n", "elm is 'clip'"),
        ("update: [connector, head]\n", "update is 'head'"),
        ("optimizer: dion\n", "optimizer is 'dion'"),
        ("save_strategy: no\n", "save_strategy is False"),  # YAML's no
        ("max_steps: 1.5\n", r"config\.yaml: max_steps is 1\.5; expected a whole number\."),
        ("max_steps: [1]\n", r"max_steps is \[1\]; expected a whole number"),
        ("max_steps: many\n", "max_steps is 'many'; expected a whole number"),
        ("lora_alpha: true\n", "lora_alpha is True; expected a whole number"),
        ("max_length: true\n", "max_length is True; expected a whole number"),  # which may be none, too
        ("max_length: []\n", r"max_length is \[\]; expected a whole number"),
        ("num_samples: .inf\n", "num_samples is inf; expected a whole number"),
        ("learning_rate: true\n", "learning_rate is True; expected a number"),
        ("bandpass: [0.5, yes]\n", "bandpass is True; expected a number"),
        ("- data\n", "must contain a YAML mapping"),
    ],
)
def test_wrong_yaml(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        parse([*BASE, *write_yaml(tmp_path, text)])


@pytest.mark.parametrize("options", [["--config", "quickstart"], ["--config=quickstart"]])
def test_recipe_by_name(options):
    assert parse([*BASE, *options])[0].num_samples == 1250
    assert parse([*BASE, *options, "--num_samples", "500"])[0].num_samples == 500


@pytest.mark.parametrize("name", ["quikstart", "training/configs/quikstart.yaml"])
def test_unknown_recipe(name):
    with pytest.raises(ValueError, match=rf"--config {name} is no .*Did you mean quickstart\? Recipes: .*ptbxl_fuyu"):
        parse([*BASE, "--config", name])


def test_config_without_a_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*BASE, "--config"])
    assert "--config needs a YAML file, or the name of a recipe" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parse([*BASE, "--config", "quickstart", "--config=road_sft"])
    assert "--config takes one YAML file or recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data_subset", "0"], "--data_subset is 0.0"),
        (["--data_subset", "1.5"], "--data_subset is 1.5"),
        (["--time_shift", "-1"], r"--time_shift is -1\.0; expected seconds, at least 0"),
        (["--time_shift", "inf"], "--time_shift is inf"),
        (["--gain_jitter", "1"], r"--gain_jitter is 1\.0; expected a share in \[0, 1\)"),
        (["--lead_dropout", "1"], r"--lead_dropout is 1\.0; expected a share in \[0, 1\)"),
        (["--lead_dropout", "-0.1"], r"--lead_dropout is -0\.1"),
        (["--lead_dropout", "nan"], "--lead_dropout is nan"),
        (["--encoder_config", "{depths"], "--encoder_config is not JSON"),
        (["--encoder_config", "[1]"], r"--encoder_config is '\[1\]'; expected names and values"),
        (["--distributed"], "--distributed, but there is one process"),
        (["--streaming"], "--streaming does not know .*; set --max_steps"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        parse([*BASE, *options])


@pytest.mark.parametrize(
    ("options", "near"),
    [
        (["--update", "conector"], "connector"),
        (["--elm", "linear_lava"], "linear_llava"),
        (["--perturb", "zero"], "zeros"),
        (["--optimizer", "adamw_troch"], "adamw_torch"),
        (["--normalization", "z-score"], "zscore"),
        (["--elm", "qqqq"], None),
    ],
)
def test_bad_choices(options, near, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse([*BASE, *options])
    error = capsys.readouterr().err
    assert "invalid choice" in error
    assert f" Did you mean {near}?\n" in error if near else "Did you mean" not in error


@pytest.mark.parametrize(
    ("parse", "option", "meant"),
    [
        (parse, "--outputdir", "--output_dir"),
        (parse, "--encodr=merl", "--encoder"),
        (parse_evaluation, "--max_new_token_", "--max_new_tokens"),
    ],
)
def test_unknown_option(parse, option, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--data", "x", option, "q"])
    error = capsys.readouterr().err
    assert f"there is no option {option.partition('=')[0]}. Did you mean {meant}?" in error
    assert error.count("\n") == 2


def test_help_shows_our_options_in_groups(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    text = capsys.readouterr().out
    groups = ["\ndata:", "--data DATA", "\na new model:", "--llm LLM", "\naugmentation:", "\ntraining:", "--output_dir"]
    places = [text.index(words) for words in groups]
    assert places == sorted(places)
    assert "--learning_rate, --lr" in text
    assert "qwen2_5_1_5b_merl_llava" in text
    assert "--ddp_backend" not in text
    with pytest.raises(SystemExit, match="0"):
        parse(["--help-all"])
    everything = capsys.readouterr().out
    assert everything.startswith(text[: text.index("\ntraining:")])
    assert "--ddp_backend" in everything


def test_parts_of_the_arguments():
    """What a new ELM is made of, needs no data."""
    assert {option.name for option in fields(ModelArguments)} & {"data", "augment_ecg", "update"} == set()
    args = ModelArguments(elm="mlp_llava", encoder="merl")
    assert (args.architecture, args.connector, args.num_ecg_tokens) == ("llava", "mlp", 12)
    with pytest.raises(ValueError, match="--gain_jitter is 2"):
        AugmentationArguments(gain_jitter=2)


def test_data_is_required(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(["--output_dir", "out", "--use_cpu"])
    assert "--data" in capsys.readouterr().err


def test_wandb(monkeypatch):
    monkeypatch.setattr("elm_ecg.training.run_options.get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(
        ValueError, match=r"--report_to wandb: the package wandb is not installed.*here are tensorboard"
    ):
        parse([*BASE, "--wandb"])
    monkeypatch.setattr("elm_ecg.training.run_options.get_available_reporting_integrations", lambda: ["wandb"])
    assert parse([*BASE, "--wandb"])[1].report_to == ["wandb"]
    assert parse([*BASE, "--wandb", "--report_to", "none"])[1].report_to == ["wandb"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--lr", "1e-4", "--learning_rate", "2e-4"], "--lr and --learning_rate"),
        (["--learning_r", "1e-4", "--lr", "2e-4"], "--learning_r and --lr"),
        (["--batch_size=4", "--per-device-train-batch-size=8"], "--batch_size and --per-device-train-batch-size"),
        (
            ["--gradient_checkpointing", "false", "--activation_checkpointing", "true"],
            "--gradient_checkpointing and --activation_checkpointing",
        ),
        (["--gradient_checkpointing", "--no_gradient_checkpointing"], "--gradient_checkpointing and --no_gradient"),
    ],
)
def test_two_names_of_one_option(options, names):
    with pytest.raises(ValueError, match=f"{names}.* are one option; leave one of them out"):
        parse([*BASE, *options])


def test_two_names_of_one_option_in_yaml(tmp_path):
    config = write_yaml(tmp_path, "lr: 1e-4\nlearning_rate: 2e-4\n")
    with pytest.raises(ValueError, match=r"config\.yaml: --lr and --learning_rate are one option"):
        parse([*BASE, *config])
    config = write_yaml(tmp_path, "learning_rate: 2e-4\n")
    assert parse([*BASE, *config, "--lr", "1e-4", "--lr", "3e-4"])[1].learning_rate == 3e-4  # the last one said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--perturb", "noise"], "--perturb cannot be used: evaluation changes the ECGs itself, as --conditions says"),
        (["--data_weights", "1"], "--data_weights cannot be used: all rows are scored, each once"),
    ],
)
def test_options_of_training_alone(options, message):
    with pytest.raises(ValueError, match=message):
        parse_evaluation(["--elm_ckpt", "folder", "--data", "some/data", *options])


@pytest.mark.parametrize("name", ["bf16", "tf32"])
def test_yes_or_no_needs_no_value(name):
    """As `--fp16`, although the default of these is neither."""
    action = make_parser()._option_string_actions[f"--{name}"]
    assert (action.nargs, action.const) == ("?", True)
    if name == "bf16":  # for tf32 the trainer needs a GPU
        for words, value in ((["--bf16", "--seed", "3"], True), (["--bf16", "true"], True), (["--bf16=false"], False)):
            assert parse([*BASE, *words])[1].bf16 is value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--metric_for_best_model", "eval_accuracy"],
            "--metric_for_best_model is accuracy; an evaluation while training gives loss, mean_token_accuracy, entropy",
        ),
        (
            ["--lr_scheduler_kwargs", '{"num_cycles": 2}'],
            r"--lr_scheduler_type linear does not go with --lr_scheduler_kwargs \{'num_cycles': 2\}: .*num_cycles",
        ),
        (["--lr_scheduler_kwargs", '{"num_cycles"'], r"--lr_scheduler_kwargs is not JSON \(Expecting ':' delimiter"),
        (["--lr_scheduler_kwargs", "num_cycles=2"], "--lr_scheduler_kwargs is not JSON"),
        (["--lr_scheduler_kwargs", "[1]"], r"--lr_scheduler_kwargs is '\[1\]'; expected names and values of fields"),
        (["--gradient_checkpointing_kwargs", "{3}"], "--gradient_checkpointing_kwargs is not JSON"),
        (
            ["--streaming", "--max_steps", "1", "--train_sampling_strategy", "sequential"],
            "--train_sampling_strategy sequential with --streaming: its rows are shuffled in --shuffle_buffer",
        ),
        (
            ["--use_peft", "--lora_target_parameters", "a.weight", "--lora_dropout", "0.05"],
            r"--lora_target_parameters with --lora_dropout 0.05: .*leave --lora_dropout out\.",
        ),
        (
            ["--packing", "--attn_implementation", "flex_attention"],
            "--attn_implementation flex_attention needs a GPU: PyTorch has no gradients of it on a CPU",
        ),
    ],
)
def test_options_of_libraries_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        parse([*BASE, *options])


def test_schedules_with_their_own_numbers():
    for name, kwargs in (("cosine_with_restarts", '{"num_cycles": 2}'), ("polynomial", '{"power": 2}')):
        assert parse([*BASE, "--lr_scheduler_type", name, "--lr_scheduler_kwargs", kwargs])[1].lr_scheduler_kwargs


def test_a_file_named_as_the_program_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "elm.args").write_text("--max_steps 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "elm")])
    assert parse(BASE)[1].max_steps == -1
    model = ["--model_name_or_path", "folder", "--data", "some/data"]
    (tmp_path / "elm.args").write_text("--batch_size 7")
    assert parse_evaluation(model).batch_size == 32


def test_evaluation_knows_the_aliases_and_its_own_batch_size():
    args = parse_evaluation(["--elm_ckpt", "folder", "--data", "some/data", "--batch_size", "3"])
    assert (args.model_name_or_path, args.batch_size) == ("folder", 3)


def test_system_prompt_is_text_or_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_text("You read ECGs.\n", encoding="utf-8")
    assert DataArguments(data=["d"], system_prompt=str(tmp_path / "prompt.txt")).system_prompt == "You read ECGs."
    for text in ("Be brief.", "Be brief. " * 100):  # longer than a file's name may be
        assert DataArguments(data=["d"], system_prompt=text).system_prompt == text
