import subprocess
import sys

import pytest

from elm_ecg.training import cli
from helpers import ROOT


@pytest.mark.parametrize("argv", [["-h"], ["--help"]])
def test_help(argv, capsys):
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: elm COMMAND")
    assert all(f"  {command} " in output for command in cli.COMMANDS)


def test_no_command(capsys):
    assert cli.main([]) == 2
    assert "usage: elm COMMAND" in capsys.readouterr().out


def test_unknown_command(capsys):
    assert cli.main(["fly"]) == 2
    captured = capsys.readouterr()
    assert "no command 'fly'" in captured.err
    assert "usage" in captured.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "/nowhere/model", "--data", "x"], "/nowhere/model"),
        (["evaluate", "--data", "x"], "Which model?"),
        (["sft", "--data", "nowhere", "--use_cpu"], "No dataset 'nowhere'"),
        (["sft", "--data", "x", "--use_cpu", "--bogus", "1"], "--bogus"),
        (["sft", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["tokenizer", "inspect", "/nowhere/tokenizer"], "/nowhere/tokenizer"),
        (["plot", "/nowhere.npz"], "/nowhere.npz"),
        (["compare", "/nowhere/a.json", "/nowhere/b.json"], "/nowhere/a.json"),
    ],
)
def test_input_at_fault(argv, message, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(argv) == 1
    error = capsys.readouterr().err
    assert f"elm {argv[0]}: " in error
    assert message in error
    assert "Traceback" not in error


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise AttributeError("a bug")

    monkeypatch.setattr("elm_ecg.training.sft.main", broken)
    with pytest.raises(AttributeError, match="a bug"):
        cli.main(["sft"])


def test_ctrl_c(monkeypatch, capsys):
    def wait(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("elm_ecg.training.sft.main", wait)
    assert cli.main(["sft"]) == 130
    assert capsys.readouterr().err == "\nelm sft: interrupted\n"


@pytest.mark.parametrize("argv", [["evaluate", "some/model", "--data", "a", "b"], ["evaluate", "--split", "x"]])
def test_first_argument_of_evaluate_is_the_model(argv, monkeypatch):
    seen = []
    monkeypatch.setattr("elm_ecg.training.evaluation.evaluate.main", seen.append)
    assert cli.main(argv) == 0
    assert seen == [["--model_name_or_path", *argv[1:]] if argv[1] == "some/model" else argv[1:]]


def test_help_of_a_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["evaluate", "--help"])
    assert "--max_new_tokens" in capsys.readouterr().out


def test_exit_status_of_the_process():
    process = subprocess.run(
        [sys.executable, "-m", "elm_ecg.training.cli", "fly"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 2
    assert "Traceback" not in process.stderr
