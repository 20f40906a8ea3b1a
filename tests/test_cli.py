import errno
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from elm_ecg.training import cli
from elm_ecg.training.files import new_folder
from helpers import ROOT


@pytest.mark.parametrize("argv", [["-h"], ["--help"]])
def test_help(argv, capsys):
    assert cli.main(argv) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: elm COMMAND")
    assert all(f"  {command} " in output for command in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"elm-ecg {version('elm-ecg')}\n"


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        ([], ["elm COMMAND [options]", "elm --help lists the commands."]),
        (["evalute"], ["elm: there is no command 'evalute'. Did you mean evaluate?", "elm --help lists the commands."]),
        (["fly"], ["elm: there is no command 'fly'.", "elm --help lists the commands."]),
        (["sft"], ["usage: elm sft --data DATA --llm LLM --output_dir FOLDER", "elm sft --help lists the options."]),
        (["chat"], ["usage: elm chat MODEL", "elm chat --help lists the options."]),
    ],
)
def test_two_lines_say_how(argv, lines, capsys, monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", None)  # said before any import, which takes seconds
    assert cli.main(argv) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 2
    assert all(expected in line for expected, line in zip(lines, printed, strict=True))


def test_errors_do_not_steer_the_terminal(monkeypatch, capsys):
    def main(options):
        raise ValueError("There is no lead \x1b]0;x\x07\x9b\u202e.")

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(main=main))
    assert cli.main(["plot", "x"]) == 1
    assert capsys.readouterr().err == "elm plot: There is no lead \ufffd]0;x\ufffd\ufffd\ufffd.\n"


def test_commands_import_and_help_without_torch():
    """`elm --help` and `import elm_ecg` take a moment."""
    code = "import sys, elm_ecg; from elm_ecg.training import cli; cli.main(['--help']); print({'torch', 'transformers', 'trl'} & {*sys.modules})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "/nowhere/model", "--data", "x"], "/nowhere/model"),
        (["evaluate", "--data", "x"], "Which model?"),
        (["sft", "--data", "nowhere", "--use_cpu"], "No dataset 'nowhere'"),
        (["sft", "--data", "x", "--use_cpu", "--data_subset", "0"], "--data_subset is 0"),
        (
            ["chat", "nowhere"],
            "The model nowhere is no folder here and not in the Hub's cache, and the Hub cannot be asked",
        ),
        (["evaluate", "runs/a/typo", "--data", "x"], "The model runs/a/typo is no folder here, and no id of the Hub"),
        (["sft", "--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["tokenizer", "inspect", "/nowhere/tokenizer"], "The tokenizer /nowhere/tokenizer is no folder here"),
        (["tokenizer", "inspect", "runs/typo"], "The tokenizer runs/typo is no folder here and not in the Hub's cache"),
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


def test_parts_that_do_not_go_together_take_one_line(monkeypatch, capsys):
    from elm_ecg import ELMConfig

    monkeypatch.setattr("elm_ecg.training.sft.main", lambda argv: ELMConfig(architecture="fuyu", connector="mlp"))
    assert cli.main(["sft", "--data", "x"]) == 1
    expected = (
        "connector='mlp' with architecture='fuyu'; expected 'patch' or 'conv' or 'flat' or one's own, 'module.Class'."
    )
    assert capsys.readouterr().err == f"elm sft: {expected}\n"


def test_dashes_alone_make_no_option_near(capsys):
    for option, near in (("--bandpas", ""), ("--layot", " Did you mean --layout?")):
        with pytest.raises(SystemExit):
            cli.main(["plot", "record.csv", option, "1"])
        assert capsys.readouterr().err.startswith(f"elm plot: there is no option {option}.{near}\n")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(argv):
        raise AttributeError("a bug")

    monkeypatch.setattr("elm_ecg.training.sft.main", broken)
    with pytest.raises(AttributeError, match="a bug"):
        cli.main(["sft", "--data", "x"])


def test_debug_shows_the_traceback_of_any_error(monkeypatch):
    monkeypatch.setenv("ELM_DEBUG", "1")
    with pytest.raises(OSError, match=r"nowhere\.npz"):
        cli.main(["plot", "/nowhere.npz"])


def test_a_missing_file_is_told_in_a_sentence(tmp_path, monkeypatch, capsys):
    """Of the readers' own, and of any `open` within a command."""
    assert cli.main(["plot", "nowhere.npz"]) == 1
    assert capsys.readouterr().err == "elm plot: There is no file nowhere.npz.\n"
    monkeypatch.setattr("elm_ecg.training.apps.plot.main", lambda argv: (tmp_path / "nowhere.txt").read_text())
    assert cli.main(["plot", "a"]) == 1
    assert capsys.readouterr().err == f"elm plot: There is no file {tmp_path / 'nowhere.txt'}.\n"


def test_ctrl_c(monkeypatch, capsys):
    def wait(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("elm_ecg.training.sft.main", wait)
    assert cli.main(["sft", "--data", "x"]) == 130
    assert capsys.readouterr().err == "\nelm sft: interrupted\n"


def test_sigterm(monkeypatch, tmp_path):
    """Exit status 143, after what the command tidies up."""

    def wait(argv):
        with new_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.sigtimedwait([], 10)

    monkeypatch.setattr("elm_ecg.training.sft.main", wait)
    with pytest.raises(SystemExit, match="143"):
        cli.main(["sft", "--data", "x"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), "runs/a"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "a disk that it writes to"),
    ],
)
def test_a_full_disk_takes_one_line(error, where, monkeypatch, capsys):
    def write(argv):
        raise error

    monkeypatch.setattr("elm_ecg.training.sft.main", write)
    assert cli.main(["sft", "--data", "x"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"elm sft: No space left on device: {where}")


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
