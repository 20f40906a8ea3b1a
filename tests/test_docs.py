"""What the documentation says, holds: commands parse, code runs, tables name what there is, links lead somewhere."""

import importlib
import os
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from trl import SFTConfig

import elm_ecg
from documents import TEXTS, block, blocks, hooks
from elm_ecg.training import cli, pretrain, rl, run_options, sft
from elm_ecg.training.arguments import ELMS, VISION_BACKBONES, DataArguments
from elm_ecg.training.data.loading import ecgs_of, load_data
from elm_ecg.training.evaluation import evaluate as evaluation
from elm_ecg.training.evaluation.conditions import CONDITIONS
from elm_ecg.training.evaluation.scores import METRIC_NAMES
from elm_ecg.training.llms import LLMS
from elm_ecg.training.parser import ALIASES
from elm_ecg.training.sharing import convert
from helpers import ROOT, run_isolated, save_tiny_llm

TYPED = "\n".join(TEXTS.values())
COMMANDS = [line for _, block in blocks(TYPED, "bash") for line in block.splitlines()]
COMMANDS = [
    line for line in COMMANDS if re.match(r"(uv run )?(elm|accelerate|torchrun|python|pytest)\b|uv sync|\.ci", line)
]
COMMANDS += re.findall(r"`((?:elm|python) [^`\n]+)`", TYPED)
COMMANDS = [command for command in dict.fromkeys(COMMANDS) if not re.search(r"COMMAND|FOLDER|FILE|\.\.\.", command)]


def test_the_documents_have_commands() -> None:
    assert sum(command.startswith("elm sft") for command in COMMANDS) >= 5
    assert any("accelerate launch" in command for command in COMMANDS)
    assert any("torchrun" in command for command in COMMANDS)


# what checks the options of a command, beyond its parser
PARSE = {
    "sft": sft.parse,
    "pretrain": pretrain.parse,
    "rl": rl.parse,
    "evaluate": evaluation.parse,
    "convert": convert.parse,
    "quickstart": list,
}
SUBCOMMANDS = [
    ["tokenizer", "import"],
    ["data", "build"],
    ["data", "simulate"],
    ["data", "check"],
    ["data", "push"],
    ["data", "list"],
]


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
    place = program.removesuffix(".py").replace("/", ".").removeprefix("elm_ecg.").removeprefix("training.")
    verb = next((verb for verb, (module, _, _) in cli.COMMANDS.items() if module == place), None)
    if verb is not None:
        program, words = "elm", [verb, *words]

    if program == "elm":
        if len(words) == 1 or words in SUBCOMMANDS or words[1:] in (["--help"], ["--help-all"]):  # named in a sentence
            assert words[0] in cli.COMMANDS or words[0].startswith("--"), f"there is no command {words[0]}"
            return
        module = importlib.import_module(f"elm_ecg.training.{cli.COMMANDS[words[0]][0]}")
        parse = PARSE.get(words[0])
        if parse is None:
            parser = hooks.parser_of(words[0])
            parse = getattr(parser, "parse_args_and_config", parser.parse_args)
        parsed: list[Any] = []
        monkeypatch.setattr(module, "main", lambda argv: parsed.append(parse(argv)))
        monkeypatch.setattr(run_options, "find_spec", lambda name: name)  # of the extra `quantized`
        assert cli.main(words) == 0, f"does not parse: {command}"
        assert len(parsed) == 1
    elif program == "python":
        assert (
            (ROOT / words[0]).is_file() or f"# {words[0]}\n" in TYPED or f"`{words[0]}`" in TYPED
        )  # a block of a page
    elif program == ".ci/run":
        assert (ROOT / program).stat().st_mode & 0o111
    else:
        assert (program, *words[:1]) in {("pytest",), ("uv", "sync"), ("mkdocs", "serve"), ("mkdocs", "build")}


def test_quickstart_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["elm"] == "elm_ecg.training.cli:main"


def test_file_tree() -> None:
    tree = block("docs/explanations/design.md", "__init__.py")
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
    assert modules <= named, "the file tree lacks a module"


def test_tables_name_what_there_is() -> None:
    models, coming = TEXTS["docs/reference/models.md"], TEXTS["docs/coming_from_elm_research.md"]
    for name, hub_id in (LLMS | VISION_BACKBONES).items():
        assert f"`{name}`" in models
        assert f"`{hub_id}`" in models
    for flag in ALIASES:
        assert f"`--{flag}`" in coming or f"`--{flag} " in coming, flag
    for elm in ELMS.keys() - {"text"}:
        assert f"`{elm}`" in coming or f"`--elm {elm}`" in coming, elm
    for name in CONDITIONS:
        assert f"| `{name}` |" in TEXTS["docs/explanations/ablations.md"]
    for name in METRIC_NAMES:
        assert f"`{name}`" in TEXTS["docs/how_to/evaluate.md"]


def test_recordings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    samples = np.random.default_rng(0).integers(-500, 500, (1000, 2))
    np.savetxt("record.csv", samples, "%d", ",", header="sampling_rate: 500\nII,V1", comments="# ")
    Path("record.csv").write_text(Path("record.csv").read_text().replace("# II", "II"))
    exec(block("docs/how_to/recordings.md", "from elm_ecg import read_ecg"), {})
    assert capsys.readouterr().out.startswith("('II', 'V1') 500.0 (2, 1000) float32\n{")


def test_ecg_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    exec(block("docs/how_to/ecg_byte.md", "import numpy"), names)
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
    exec(
        block("docs/how_to/python.md", "import torch")
        .replace("qwen2.5-0.5b-instruct", str(llm))
        .replace('"merl"', small),
        names,
    )
    assert names["results"]["verdict"] in capsys.readouterr().out
    assert {split: len(rows) for split, rows in names["data"].items()} == {"train": 1, "validation": 1, "test": 1}
    assert (tmp_path / "runs" / "in_python" / "processor_config.json").is_file()


@pytest.mark.slow
def test_own_data_to_inference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hospital's files with a tiny model: make the data, train, evaluate, load in a process without the project."""
    monkeypatch.chdir(tmp_path)
    header, *examples = block("docs/tutorials/own_files.md", "record,").splitlines()
    rng = np.random.default_rng(0)
    lines = [header]
    for number in range(40):
        record = Path("recordings") / "2024" / f"{number:04d}.npz"
        record.parent.mkdir(parents=True, exist_ok=True)
        np.savez(record, array=rng.normal(0, 100, (12, 5000)).astype(np.int16), sampling_rate=500, unit="uV")
        _, _, question, answer = examples[number % len(examples)].split(",")
        lines.append(f"2024/{number:04d},p{number // 2},{question},{answer}")
    Path("questions.csv").write_text("\n".join(lines))
    tutorial = [
        shlex.split(line)[1:]
        for _, lines in blocks(TEXTS["docs/tutorials/own_files.md"], "bash")
        for line in lines.splitlines()
    ]
    build, check, evaluate = (
        next(words for words in tutorial if words[: len(verb)] == verb)
        for verb in (["data", "build"], ["data", "check"], ["evaluate"])
    )
    (train,) = (words for words in tutorial if "qwen2.5-0.5b-instruct" in words)
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
    train[train.index("--output_dir") + 1] = evaluate[1]
    small = ["--encoder_config", '{"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1}']
    assert cli.main([*train, *small, "--max_steps", "1", "--report_to", "none"]) == 0
    assert cli.main([*evaluate, "--max_new_tokens", "4"]) == 0
    assert list(tmp_path.glob("runs/my_elm/evaluation/my_data-test-generation-*/evaluation_results.json"))
    shutil.rmtree(tmp_path / "llm")  # what is saved stands alone
    inference = block("docs/tutorials/first_elm.md", "import numpy").replace("runs/quickstart/model", "runs/my_elm")
    inference = re.sub(r"from elm_ecg .*\n|\(ecg,\) = .*\n|np.savez.*\n", "", inference)  # which have the file written
    shutil.copy("recordings/2024/0000.npz", "record.npz")
    printed = run_isolated(f"{inference}\nprint(answer.shape[1] > inputs['input_ids'].shape[1])", tmp_path)
    assert printed.endswith("True\n")


def options_in_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit, match="0"):
        cli.main(words)
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if re.match(" {2}-", line)]
    spellings = {name for line in lines for name in re.findall(r"--[\w-]+", re.split(" {2,}", line)[0])}
    return {name for name in spellings if "-" not in name[2:]} - {"--help"}  # others with dashes mean the same


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_reference_has_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As `--help` prints them, by the parts of a command that has several."""
    sections = re.split(r"^## elm \S+ (\S+) .*\n", hooks.command_page(command), flags=re.MULTILINE)
    parts = dict(zip(sections[1::2], sections[2::2], strict=True)) or {"": sections[0]}
    for part, text in parts.items():
        words = [command, part] if part else [command]
        told = options_in_help([*words, "--help"], capsys)
        if getattr(hooks.parser_of(command), "foreign_groups", ()):
            told |= options_in_help([*words, "--help-all"], capsys)
        shown = {
            name for line in text.splitlines() if re.match("#{3,4} `-", line) for name in re.findall("`(--\\w+)`", line)
        }
        assert shown == told
        bare = [line for line in text.split("\n#")[1:] if not line.strip()]
        assert not bare
    if sections[1:]:
        assert set(parts) == set(hooks.subcommands(hooks.parser_of(command)))


def test_the_reference_has_every_public_name() -> None:
    page = hooks.python_page()
    for module in ["", *(f".{path.stem}" for path in ROOT.glob("[!_]*.py"))]:
        names = getattr(importlib.import_module(f"elm_ecg{module}"), "__all__", [])
        for name in names:
            assert re.search(rf"^::: elm_ecg\S*\.{name}$", page, re.MULTILINE), name
    assert page.count("::: ") == len(set(re.findall(r"^::: \S+\.(\w+)$", page, re.MULTILINE))), "a name is there twice"
    assert set(elm_ecg.__all__) <= set(hooks.public_names()["elm_ecg"])


def anchors(text: str) -> set[str]:
    """As Python-Markdown makes them of headings; blocks of code have none."""
    text = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(r"^#+ (.*?)(?: \{ #(\S+)[^}]*\})?$", text, re.MULTILINE)
    return {own or re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title, own in found}


def test_links_lead_somewhere() -> None:
    """Those within the repository; `mkdocs build --strict` sees the same of the site."""
    pages = TEXTS | {f"docs/{path}": text for path, text in hooks.pages().items()}
    for page, text in pages.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
            if re.match("https?:|mailto:|data:", target):
                continue
            file, _, anchor = target.partition("#")
            place = (ROOT / page).parent / file if file else ROOT / page
            name = Path(os.path.relpath(place, ROOT)).as_posix()
            assert name in pages or place.exists(), f"{page} links to {target}"
            assert not anchor or anchor in anchors(pages[name]), f"{page} links to {target}"


def test_links_to_other_sites_are_well_formed() -> None:
    """The network is not asked. A new host goes into the list once its page was looked at."""
    hosts = {
        "docs.astral.sh",
        "docs.vllm.ai",
        "download.pytorch.org",
        "github.com",
        "huggingface.co",
        "kellerjordan.github.io",
    }
    hosts |= {"arxiv.org", "doi.org", "rustup.rs", "www.adept.ai"}
    forms = {"arxiv.org": r"/abs/\d{4}\.\d{5}", "doi.org": r"/10\.\d{4,5}/[\w./-]*\w"}
    pages = [*TEXTS.values(), *(hooks.notebook_page(path) for path in hooks.NOTEBOOKS)]
    targets = {target for text in pages for target in re.findall(r"\]\((https?:[^)\s]+)\)", text)}
    assert len(targets) > 20
    for target in targets:
        found = re.fullmatch(r"https://([^/]+)(/.*)?", target)
        assert found, f"{target} is not https"
        host, path = found[1], found[2] or ""
        assert host in hosts, target
        assert re.fullmatch(forms.get(host, ".*"), path), target


def test_the_package_lies_where_mkdocstrings_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any plugin looks: else it goes through all files of the clone, those of `.venv` too."""
    monkeypatch.setattr(hooks, "PACKAGE", tmp_path)
    hooks.on_startup(command="build", dirty=False)
    assert {path.name for path in tmp_path.iterdir()} == {"elm_ecg"}
    found = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.py"), ROOT / "training"]}
    assert {path.name for path in (tmp_path / "elm_ecg").iterdir()} == found
    assert "paths: [build/docs]" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation() -> None:
    loader = yaml.SafeLoader
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"^ +- .*: (\S+\.md)$", text, re.MULTILINE))
    assert {path.removeprefix("docs/") for path in TEXTS if path.startswith("docs/")} <= listed
    assert {f"notebooks/{path.stem}.md" for path in hooks.NOTEBOOKS} <= listed
    assert yaml.load(text, loader)["strict"]
