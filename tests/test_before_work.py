"""What is wrong with the options of a command is told before it loads or writes anything, in one line."""

from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from elm_ecg.training import cli, pretrain, run, sft, tokenizer
from elm_ecg.training.data import write
from elm_ecg.training.evaluation import evaluate, probe
from elm_ecg.training.evaluation.benchmarks import command as benchmark
from elm_ecg.training.sharing import convert, export
from helpers import fork_project, save_tiny_data

# a command line of each verb, as far as a wrong option matters
COMMANDS = {
    "quickstart": [],
    "pretrain": ["--data", "x", "--use_cpu"],
    "sft": ["--data", "x", "--use_cpu"],
    "rl": ["--data", "x", "--use_cpu"],
    "dpo": ["--data", "x", "--use_cpu"],
    "evaluate": ["model", "--data", "x"],
    "predict": ["model", "a.csv", "--question", "x"],
    "explain": ["model", "a.csv", "--question", "x"],
    "benchmark": ["model", "--suite", "ptbxl", "--records", "x"],
    "probe": ["encoder", "--data", "x"],
    "compare": ["a.json", "b.json"],
    "chat": ["model"],
    "demo": ["model"],
    "serve": ["model"],
    "push": ["folder", "--repo_id", "a/b"],
    "convert": ["elm.pt", "--output_dir", "out"],
    "export": ["model", "--part", "llm", "--output_dir", "out"],
    "data build": ["records", "--output_dir", "out"],
    "data simulate": ["out"],
    "data check": ["data"],
    "data push": ["folder", "--repo_id", "a/b"],
    "tokenizer train": ["--data", "x", "--output_dir", "out", "--sampling_rate", "250"],
    "tokenizer import": ["a.pkl", "--output_dir", "out"],
    "tokenizer inspect": ["a", "--data", "x"],
    "plot": ["a.csv"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "data", train=2)


def test_every_command_is_here():
    assert {verb.split()[0] for verb in COMMANDS} == cli.COMMANDS.keys()


@pytest.mark.parametrize("verb", COMMANDS)
def test_a_wrong_option_writes_nothing(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        cli.main([*verb.split(), *COMMANDS[verb], "--no_such_option", "q"])
    assert "there is no option --no_such_option" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def fail(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("something is loaded")


@pytest.mark.parametrize(
    ("argv", "work"),
    [
        (["quickstart", "--use_cpu"], []),
        (["pretrain", "--data", "x", "--use_cpu"], [(pretrain, "build_model"), (pretrain, "load_splits")]),
        (["sft", "--data", "x", "--use_cpu"], [(run, "load_splits"), (run, "load_elm"), (run, "build_base")]),
        (["rl", "--data", "x", "--use_cpu"], [(run, "load_splits"), (run, "build_base")]),
        (["dpo", "--data", "x", "--use_cpu"], [(run, "load_splits"), (run, "build_base")]),
        (["evaluate", "model", "--data", "x"], [(evaluate, "_load_data"), (evaluate, "load_elm")]),
        (
            ["benchmark", "model", "--suite", "ptbxl", "--records", "x"],
            [(benchmark, "read_places"), (benchmark, "open_contender")],
        ),
        (["probe", "encoder", "--data", "x"], [(probe, "load_encoder"), (probe, "load_records")]),
        (["convert", "elm.pt", "--encoder", "merl"], [(convert, "read_checkpoint")]),
        (["export", "model", "--part", "llm"], [(export, "load_elm")]),
        (["data", "build", "records"], [(write, "make_plan")]),
        (["tokenizer", "train", "--data", "x", "--sampling_rate", "250"], [(tokenizer, "load_splits")]),
        (["tokenizer", "import", "a.pkl"], [(tokenizer, "read_ecg_byte_pickle")]),
    ],
)
def test_an_output_folder_that_cannot_be_written(argv, work, tmp_path, monkeypatch, capsys):
    for module, name in work:
        monkeypatch.setattr(module, name, fail)
    (tmp_path / "file").write_text("here")
    assert cli.main([*argv, "--output_dir", str(tmp_path / "file" / "out")]) == 1
    error = capsys.readouterr().err
    assert f"--output_dir {tmp_path / 'file' / 'out'} cannot be written: Not a directory. Name another.\n" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("argv", [["convert", "elm.pt", "--encoder", "merl"], ["data", "build", "records"]])
def test_an_output_folder_that_is_not_empty(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(convert, "read_checkpoint", fail)
    monkeypatch.setattr(write, "make_plan", fail)
    (tmp_path / "kept").write_text("here")
    assert cli.main([*argv, "--output_dir", str(tmp_path)]) == 1
    assert f"--output_dir {tmp_path} is there and not empty" in capsys.readouterr().err


def test_two_encoders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "load_splits", fail)
    (tmp_path / "config.json").write_text('{"model_type": "merl"}')
    argv = ["sft", *COMMANDS["sft"], "--encoder", "st_mem", "--encoder_ckpt", str(tmp_path)]
    assert cli.main([*argv, "--output_dir", str(tmp_path / "out")]) == 1
    said = f"--encoder st_mem and --encoder_name_or_path {tmp_path}, which is of the kind merl, name two encoders"
    assert said in capsys.readouterr().err


def test_quickstart_makes_data_and_language_model_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for option in (["--data", "mine"], ["--llm=mine"], ["--elm_ckpt", "mine"]):
        assert cli.main(["quickstart", "--use_cpu", *option]) == 1
        assert f"{option[0].split('=')[0]}: elm quickstart makes its own data" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["quickstart", "--num_records", "0"])
    assert list(tmp_path.iterdir()) == []


def test_evaluation_loads_no_model_for_data_that_it_has_not(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "load_elm", fail)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    model = ["evaluate", str(tmp_path / "model")]
    for options, message in (
        (["--data", "nowhere"], "No dataset 'nowhere'"),
        (["--data", str(data)], "has no split 'test'"),
        (["--data", str(data), "--split", "train", "--fold", "1", "2"], "--fold 1 with data without folds"),
        (["--data", str(data), "--output_dir", str(tmp_path / "model" / "config.json")], "cannot be written"),
    ):
        assert cli.main([*model, *options]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["evaluate", "runs/fold{fold}", "--data", str(data)]) == 1
    assert "--model_name_or_path is runs/fold{fold}; say which --fold stands for {fold}" in capsys.readouterr().err


def test_training_loads_no_model_for_data_that_it_has_not(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "build_base", fail)
    base = ["sft", "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    for options, message in (
        (["--data", "nowhere"], "No dataset 'nowhere'"),
        (["--data", str(data), "--eval_strategy", "epoch"], "has no split 'validation'"),
        (
            ["--data", str(data), "--fold", "3"],
            f"--fold 3 with data without folds; leave it out. Splits: {data} has train.",
        ),
        (["--data", "nowhere", "--model_name_or_path", "runs/a/typo"], "The model runs/a/typo is no folder here"),
    ):
        assert cli.main([*base, *options]) == 1
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv", [["data", "check", "DATA"], ["tokenizer", "inspect", "TOKENIZER", "--data", "DATA"]])
def test_a_fold_that_other_commands_would_ignore(argv, data, tmp_path, capsys):
    from helpers import tiny_ecg_byte

    tiny_ecg_byte().save_pretrained(tmp_path)
    words = [{"DATA": str(data), "TOKENIZER": str(tmp_path)}.get(word, word) for word in argv]
    split = ["--split", "train"] if argv[0] == "tokenizer" else []
    assert cli.main([*words, "--fold", "3", *split]) == 1
    assert "--fold 3 with data without folds; leave it out" in capsys.readouterr().err


def test_a_fold_of_one_of_several_datasets(data, tmp_path):
    splits = load_from_disk(str(data))
    type(splits)({"fold1_train": splits["train"]}).save_to_disk(tmp_path / "folds")
    options = ["--data", str(data), str(tmp_path / "folds"), "--fold", "1", "--output_dir", "o", "--use_cpu"]
    args, training_args, _ = sft.parse(options)
    assert len(run.load_splits(args, training_args)["train"]) == 4


LAUNCHED = "import runpy\nrunpy.run_module('elm_ecg.training.{}', run_name='__main__')"


@pytest.mark.parametrize("module", ["sft", "evaluation.evaluate"])
def test_a_launcher_sees_one_line_too(module, data):
    """As `accelerate launch` and `torchrun` start it."""
    argv = ["--data", str(data), "--data_subset", "0"]
    argv += ["--use_cpu"] if module == "sft" else ["--model_name_or_path", "x"]
    run = fork_project(LAUNCHED.format(module), *argv)
    debugged = fork_project(LAUNCHED.format(module), *argv, ELM_DEBUG="1").finish()
    process = run.finish()
    assert process.returncode == 1
    message = "--data_subset is 0.0; expected a share of the rows in (0, 1]."
    assert process.stderr.splitlines()[-1] == f"elm {module.rpartition('.')[2]}: {message}"
    assert "Traceback" not in process.stderr
    assert "Traceback" in debugged.stderr


def test_subcommands_and_verbs_that_were_meant(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", "biuld", "records"])
    assert "Did you mean build?" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tokenizer", "trian"])
    assert "Did you mean train?" in capsys.readouterr().err


def test_the_token_of_the_hub_is_in_no_file(data, tmp_path, monkeypatch):
    """Nor in an error."""
    with pytest.raises(ValueError, match="--hub_token cannot be used: it would be saved") as raised:
        sft.main(["--data", str(data), "--output_dir", str(tmp_path / "out"), "--hub_token", "hf_secret", "--use_cpu"])
    assert "hf_secret" not in str(raised.value)
    assert not (tmp_path / "out").exists()
