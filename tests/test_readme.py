"""What README and CONTRIBUTING tell users to type, works."""

import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from trl import SFTConfig

from elm_ecg.training import cli, pretrain, quickstart, sft, tokenizer
from elm_ecg.training import dataset_commands as data_tool
from elm_ecg.training.apps import chat, demo, plot
from elm_ecg.training.arguments import ELMS, VISION_BACKBONES, DataArguments
from elm_ecg.training.data.loading import ecgs_of, load_data
from elm_ecg.training.evaluation import compare, probe
from elm_ecg.training.evaluation import evaluate as evaluation
from elm_ecg.training.evaluation.benchmarks import command as benchmark
from elm_ecg.training.llms import LLMS
from elm_ecg.training.parser import ALIASES
from elm_ecg.training.sharing import convert, push
from helpers import ROOT, run_isolated, save_tiny_llm

README = (ROOT / "README.md").read_text()
DOCUMENTS = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/benchmarks.md"))


def blocks(language: str, text: str = README) -> list[str]:
    # in one pass, as the end of a block looks like the beginning of one without a language
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


INFERENCE, RECORDINGS, IN_PYTHON, ECG_BYTE = blocks("python")
COMMANDS = [
    line for block in blocks("bash", DOCUMENTS) for line in block.splitlines() if line and not line.startswith("#")
]
COMMANDS += [code for code in re.findall(r"`((?:elm|python) [^`\n]+)`", DOCUMENTS) if code not in COMMANDS]


def test_the_documents_have_commands() -> None:
    assert sum(command.startswith("elm sft") for command in COMMANDS) >= 5
    assert any("accelerate launch" in command for command in COMMANDS)
    assert any("torchrun" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "uv" and words[0] == "run":
        program, *words = words[1:]
    if program == "accelerate":
        launch = launch_command_parser().parse_args(words[1:])
        assert Path(launch.config_file).is_file()
        program, words = launch.training_script, launch.training_script_args
    elif program == "torchrun":
        launch = get_args_parser().parse_args(words)
        program, words = launch.training_script, launch.training_script_args
        monkeypatch.setattr(SFTConfig, "world_size", property(lambda args: int(launch.nproc_per_node)))
    verbs = {
        "training/sft.py": "sft",
        "training/pretrain.py": "pretrain",
        "elm_ecg.training.evaluation.evaluate": "evaluate",
    }
    if program in verbs:
        program, words = "elm", [verbs[program], *words]

    if program == "elm":
        parsed: list[Any] = []
        monkeypatch.setattr(sft, "main", lambda argv: parsed.append(sft.parse(argv)))
        monkeypatch.setattr(sft, "find_spec", lambda name: name)  # of the extra `quantized`
        monkeypatch.setattr(evaluation, "main", lambda argv: parsed.append(evaluation.parse(argv)))
        monkeypatch.setattr(benchmark, "main", lambda argv: parsed.append(benchmark.parser().parse_args(argv)))
        monkeypatch.setattr(pretrain, "main", lambda argv: parsed.append(pretrain.parse(argv)))
        monkeypatch.setattr(probe, "main", lambda argv: parsed.append(probe.make_parser().parse_args(argv)))
        monkeypatch.setattr(quickstart, "main", lambda argv: parsed.append(argv))
        monkeypatch.setattr(tokenizer, "main", lambda argv: parsed.append(tokenizer.make_parser().parse_args(argv)))
        monkeypatch.setattr(data_tool, "main", lambda argv: parsed.append(data_tool.make_parser().parse_args(argv)))
        monkeypatch.setattr(compare, "main", lambda argv: parsed.append(compare.make_parser().parse_args(argv)))
        monkeypatch.setattr(plot, "main", lambda argv: parsed.append(plot.make_parser().parse_args(argv)))
        monkeypatch.setattr(convert, "main", lambda argv: parsed.append(convert.parse(argv)))
        monkeypatch.setattr(chat, "main", lambda argv: parsed.append(chat.make_parser().parse_args(argv)))
        monkeypatch.setattr(demo, "main", lambda argv: parsed.append(demo.make_parser().parse_args(argv)))
        monkeypatch.setattr(push, "main", lambda argv: parsed.append(push.make_parser().parse_args(argv)))
        names = (
            ["sft"],
            ["pretrain"],
            ["probe"],
            ["chat"],
            ["demo"],
            ["push"],
            ["convert"],
            ["evaluate"],
            ["benchmark"],
            ["compare"],
            ["plot"],
            ["tokenizer"],
            ["tokenizer", "import"],
            ["data"],
            ["data", "build"],
            ["data", "check"],
        )
        if words in names or words[1:] in (["--help"], ["--help-all"]):  # the name of a command in a sentence
            return
        assert cli.main(words) == 0, f"does not parse: {command}"
        assert len(parsed) == 1
    elif program == "python":
        assert (ROOT / words[0]).is_file()
    elif program == ".ci/run":
        assert (ROOT / program).stat().st_mode & 0o111
    else:
        assert (program, *words[:1]) in {("pytest",), ("uv", "sync")}


def test_quickstart_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["elm"] == "elm_ecg.training.cli:main"


def test_file_tree() -> None:
    (tree,) = (block for block in blocks("") if "configuration_elm.py" in block)
    folder, named = "", set()
    for line in tree.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ""
        assert (ROOT / folder / name).exists(), f"{folder}{name} is not there"
        assert len(line.split()) > 1, f"{name} has no description"
        named.add(folder + name)
        if name.endswith("/") and not folder:
            folder = name
    modules = {path.name for path in ROOT.glob("*.py")} | {
        f"training/{path.name}" for path in (ROOT / "training").glob("*.py") if path.name != "__init__.py"
    }
    assert modules <= named, "the README's file tree lacks a module"


def test_tables_name_what_there_is() -> None:
    for name, hub_id in LLMS.items():
        assert f"`{name}`" in README
        assert f"`{hub_id}`" in README
    for name, hub_id in VISION_BACKBONES.items():
        assert f"`{name}`" in README
        assert f"`{hub_id}`" in README
    for flag in ALIASES:
        assert f"`--{flag}`" in README or f"`--{flag} " in README, flag
    for elm in ELMS.keys() - {"text"}:
        assert f"`{elm}`" in README or f"`--elm {elm}`" in README, elm


def test_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    samples = np.random.default_rng(0).integers(-500, 500, (1000, 2))
    np.savetxt("record.csv", samples, "%d", ",", header="sampling_rate: 500\nII,V1", comments="# ")
    Path("record.csv").write_text(Path("record.csv").read_text().replace("# II", "II"))
    exec(RECORDINGS, {})
    assert capsys.readouterr().out.startswith("('II', 'V1') 500.0 (2, 1000) float32\n{")


def test_ecg_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(ECG_BYTE, names)
    assert abs(names["again"] - names["ecg"]).max() <= (names["high"] - names["low"]) / 26 + 1e-6
    assert 0 <= names["first_sample"] <= names["last_sample"] < 2500
    assert 0 <= names["lead"] < 12


def test_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Python API as printed, with a tiny language model in place of the one that would be downloaded."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number in (1, 2, 3):
        record = Path("recordings") / "2024" / f"{number:04d}.npz"
        record.parent.mkdir(parents=True, exist_ok=True)
        np.savez(record, array=rng.normal(0, 0.1, (12, 5000)).astype(np.float32), sampling_rate=500, unit="mV")
    llm = save_tiny_llm(tmp_path / "llm", "qwen2_5")
    small = """"merl", encoder_config='{"block": "basic", "depths": [1, 1], "widths": [8, 16]}'"""
    names: dict[str, Any] = {}
    exec(IN_PYTHON.replace("qwen2.5-0.5b-instruct", str(llm)).replace('"merl"', small), names)
    assert names["results"]["verdict"] in capsys.readouterr().out
    assert {split: len(rows) for split, rows in names["data"].items()} == {"train": 1, "validation": 1, "test": 1}
    assert (tmp_path / "runs" / "in_python" / "processor_config.json").is_file()


def test_own_data_to_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's story with a tiny model: make the data, train, evaluate, load in a process without the project."""
    monkeypatch.chdir(tmp_path)
    header, *examples = next(block for block in blocks("") if block.startswith("record,")).splitlines()
    rng = np.random.default_rng(0)
    lines = [header]
    for number in range(40):
        record = Path("recordings") / "2024" / f"{number:04d}.npz"
        record.parent.mkdir(parents=True, exist_ok=True)
        np.savez(record, array=rng.normal(0, 100, (12, 5000)).astype(np.int16), sampling_rate=500, unit="uV")
        _, _, question, answer = examples[number % len(examples)].split(",")
        lines.append(f"2024/{number:04d},p{number // 2},{question},{answer}")
    Path("questions.csv").write_text("\n".join(lines))
    (story,) = (text for text in blocks("bash") if text.startswith("elm data build") and "elm evaluate" in text)
    build, check, train, evaluate = (shlex.split(line)[1:] for line in story.splitlines())
    assert cli.main(build) == 0
    assert cli.main(check) == 0
    splits = {split: load_data(DataArguments(["my_data"]), split) for split in ("train", "validation", "test")}
    patients = {split: set(rows["patient_id"]) for split, rows in splits.items()}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 32, "validation": 4, "test": 4}
    assert len(set.union(*patients.values())) == sum(map(len, patients.values())), "a patient is in two splits"
    (ecg,) = ecgs_of(splits["train"][0])
    assert np.shape(ecg["array"]) == (12, 5000)
    assert ecg["unit"] == "uV"

    train[train.index("--llm") + 1] = str(save_tiny_llm(tmp_path / "llm", "default"))
    small = ["--encoder_config", '{"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1}']
    assert cli.main([*train, *small, "--max_steps", "1", "--report_to", "none"]) == 0
    assert cli.main([*evaluate, "--max_new_tokens", "4"]) == 0
    assert list(tmp_path.glob("runs/my_elm/evaluation/my_data-test-generation-*/evaluation_results.json"))
    shutil.rmtree(tmp_path / "llm")  # what is saved stands alone
    inference = INFERENCE.replace("runs/quickstart/model", "runs/my_elm")
    assert run_isolated(f"{inference}\nprint(answer.shape[1] > inputs['input_ids'].shape[1])", tmp_path).endswith(
        "True\n"
    )
