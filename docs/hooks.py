"""Writes pages while the site is built: the commands from their parsers, the Python API from its names, the notebooks from their cells.

`mkdocs.yml` names this file. The functions above the hooks need no mkdocs, so that the tests compare parsers and pages.
"""

import argparse
import base64
import html
import importlib
import itertools
import json
import re
import shutil
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import elm_ecg
from elm_ecg.training.cli import COMMANDS
from elm_ecg.training.parser import ALIASES, ELMParser, recipes

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = (
    ROOT / "build" / "docs"
)  # where mkdocstrings finds the package by its name, without the environment and the tests
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SHARED = ("help", "help_all")  # options of every command
LINE_WIDTH = 100  # of what a notebook printed
MAX_CHOICES = 6  # that a heading shows
RECIPE_COMMANDS = ("sft", "pretrain", "rl", "dpo")
COMMANDS_INTRODUCTION = """\
`elm COMMAND --help` prints what these pages say. A command ends with status 0; with 1 if its input was at fault, 2 if the command line
was, and 130 after Ctrl-C. `ELM_DEBUG=1` before a command shows the traceback of an error.

In a clone put `uv run` before each command, or activate `.venv`.
"""
RECIPES_INTRODUCTION = """\
A recipe is a YAML file of options that comes with the package. `--config NAME` takes it, and options on the command line win over it.
`--config FILE.yaml` takes a file of your own.
"""
PYTHON_INTRODUCTION = """\
The first section is what `from elm_ecg import ...` gives. Most users need no other. [Work in Python](../how_to/python.md) shows them at work.
The sections after it are what the modules of a saved model define: configurations, encoders and processors.
"""
NOTEBOOK_INTRODUCTION = """\
This page is the notebook [{name}]({name}) with the outputs of its last run. This opens it in a clone:

```bash
uv run --with jupyterlab jupyter lab docs/notebooks
```
"""


class _Parsed(Exception):
    """Carries the parser out of a command that is about to show its help."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of `elm COMMAND`, as it is when the command shows its help."""

    def stop(parser: argparse.ArgumentParser, file: Any = None) -> None:
        raise _Parsed(parser)

    shown, argparse.ArgumentParser.print_help = argparse.ArgumentParser.print_help, stop  # type: ignore[method-assign]
    try:
        importlib.import_module(f"elm_ecg.training.{COMMANDS[command][0]}").main(["--help"])
    except _Parsed as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.print_help = shown  # type: ignore[method-assign]
    raise ValueError(f"elm {command} --help shows no help.")


def subcommands(parser: argparse.ArgumentParser) -> dict[str, tuple[str, argparse.ArgumentParser]]:
    """What `elm data` and the like can do: name -> one line about it, and its parser."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            told = {choice.dest: choice.help or "" for choice in action._choices_actions}
            return {name: (told.get(name, ""), choice) for name, choice in action.choices.items()}
    return {}


def groups_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[argparse.Action]]]:
    """The options that users may say, by the titles of their groups; those of other libraries last."""
    ours = list(parser._action_groups)
    foreign = parser.foreign_groups if isinstance(parser, ELMParser) else []
    for group in [*ours, *(group for group in foreign if group not in ours)]:
        actions = [
            action
            for action in group._group_actions
            if action.help != argparse.SUPPRESS
            and action.dest not in SHARED
            and not isinstance(action, argparse._SubParsersAction)
        ]
        if actions:
            yield group.title or "", actions


def as_markdown(text: str) -> str:
    """A help text as Markdown: options and what stands between backticks as code, all else to the letter."""
    parts = re.split(r"(`[^`]+`|(?<![\w-])--\w+)", " ".join(text.split()))
    for place, part in enumerate(parts):
        if part.startswith("--"):
            parts[place] = f"`{part}`"
        elif not part.startswith("`"):
            parts[place] = re.sub(r"([\\`*_{}\[\]#|~])", r"\\\1", html.escape(part, quote=False))
    return "".join(parts)


def _default_of(action: argparse.Action, told: str) -> str:
    if action.required:
        return "Required."
    if "efault" in told or action.default in (None, "", [], ()) or not action.option_strings:  # D, d
        return ""
    if isinstance(action.default, bool):
        return f"Default: {'on' if action.default else 'off'}."
    value = action.default
    words = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return f"Default: `{words}`."


def _sentence(words: str, values: list[str]) -> str:
    """Words with a capital letter and a full stop, but for a first word that is a name, a value or a unit."""
    first = words.split()[0].strip(":,")
    head = words[:1].upper() if first.isalpha() and first not in values else words[:1]
    return f"{head}{words[1:]}".rstrip(".") + "."


def _entry(actions: list[argparse.Action], parser: argparse.ArgumentParser, level: str, prefix: str) -> str:
    """A heading with the spellings and the value of an option; then its help, choices and default.

    Args:
        actions: the option, and `--no_x` of an option `--x` that is on by default.
    """
    action = actions[0]
    # HfArgumentParser adds --a-b to --a_b
    names = [name for action in actions for name in action.option_strings if "-" not in name[2:]]
    formatter = parser._get_formatter()
    choices = [str(choice) for choice in action.choices or ()]
    value = "" if action.nargs == 0 else formatter._format_args(action, action.dest.upper() if names else action.dest)
    if len(choices) > MAX_CHOICES:
        value = action.dest.upper()
    elif choices:
        value = value.replace(",", ", ")  # may break there on a phone
    spellings = ", ".join(f"`{name}`" for name in names)
    heading = f"{spellings} {as_markdown(value)}" if names else f"`{value}`"
    # argparse's formatter adds the default, which stands at the end here, in a form of its own
    told = re.sub(r" \(default: [^)]*\)$", "", formatter._expand_help(action)) if action.help else ""
    sentences = [as_markdown(told)]
    if not all(choice in told for choice in choices):
        sentences.append("One of " + ", ".join(f"`{choice}`" for choice in choices))
    sentences.append(_default_of(action, told))
    text = " ".join(_sentence(words, choices) for words in sentences if words)
    label = names[0] if names else value
    return f"{level} {heading.strip()} {{ #{prefix}{action.dest} data-toc-label='{label}' }}\n\n{text}\n"


def _options(parser: argparse.ArgumentParser, level: str, prefix: str = "") -> Iterator[str]:
    titles = {"positional arguments": "Arguments", "options": "Options", "this command": "Of this command"}
    for title, actions in groups_of(parser):
        yield f"{level} {titles.get(title, title[:1].upper() + title[1:])}\n"
        for _, same in itertools.groupby(actions, lambda action: action.dest):
            yield _entry(list(same), parser, f"{level}#", prefix)


def command_page(command: str) -> str:
    """The page of `elm COMMAND`: what it is for, how it is called, and every option with its help and default."""
    _, does, example = COMMANDS[command]
    parser, parts = parser_of(command), []
    below = subcommands(parser)
    lines = [f"# elm {command}\n", f"{as_markdown(does[:1].upper() + does[1:])}.\n"]
    lines.append(f"```text\nelm {command} {example}".rstrip() + "\n```\n")
    if below:
        parts = [f"- [`elm {command} {name}`](#{name}): {as_markdown(told)}" for name, (told, _) in below.items()]
        lines.append("\n".join(parts) + "\n")
    if isinstance(parser, ELMParser):
        lines.append("`--config` takes a file of options, or the name of a [recipe](../recipes.md).\n")
        spellings = [f"`--{alias}`" for alias, name in ALIASES.items() if f"--{name}" in parser._option_string_actions]
        if spellings:
            lines.append(
                f"Other spellings, those of [ELM-Research](../../coming_from_elm_research.md), stand beside the option: {', '.join(spellings)}.\n"
            )
    elif parser.epilog:
        lines.append(f"{as_markdown(parser.epilog)}\n")
    lines += _options(parser, "##")
    for name, (told, part) in below.items():
        lines.append(f"## elm {command} {name} {{ #{name} }}\n")
        lines.append(f"{as_markdown(told[:1].upper() + told[1:])}.\n" if told else "")
        lines += _options(part, "###", f"{name}-")
    return "\n".join(lines)


def commands_page() -> str:
    """The list of all commands."""
    rows = [f"| [`elm {name}`](commands/{name}.md) | {as_markdown(does)} |" for name, (_, does, _) in COMMANDS.items()]
    return "\n".join(["# Commands\n", COMMANDS_INTRODUCTION, "| command | what it does |", "| --- | --- |", *rows, ""])


def recipes_page() -> str:
    """The recipes that come with the package, by command, each with what its file says of itself."""
    lines = ["# Recipes\n", RECIPES_INTRODUCTION]
    for command in COMMANDS:
        found = recipes(f"elm {command}") if command in RECIPE_COMMANDS else {}
        if found:
            lines.append(f"## elm {command}\n")
        for name, path in found.items():
            text = path.read_text(encoding="utf-8").splitlines()
            values = list(itertools.dropwhile(lambda line: line.startswith("#"), text))
            told = " ".join(line.lstrip("# ") for line in text[: len(text) - len(values)])
            lines.append(f"### {name}\n\n{as_markdown(told)}\n")
            lines.append(
                "\n".join(
                    [f'??? note "{name}.yaml"\n', "    ```yaml", *(f"    {line}" for line in values), "    ```\n"]
                )
            )
    return "\n".join(lines)


def public_names() -> dict[str, list[str]]:
    """Module -> the names of the Python API: of the package, and what else its root modules list in `__all__`."""
    names = {"elm_ecg": sorted(elm_ecg.__all__)}
    seen = set(elm_ecg.__all__)
    modules = [importlib.import_module(f"elm_ecg.{path.stem}") for path in sorted(ROOT.glob("[!_]*.py"))]
    lists = {module.__name__: getattr(module, "__all__", []) for module in modules}
    for module in modules:
        for name in lists[module.__name__]:
            home = getattr(module, name).__module__  # a name that several modules list stands where it is defined
            if name not in seen and (home == module.__name__ or name not in lists.get(home, ())):
                names.setdefault(module.__name__, []).append(name)
                seen.add(name)
    return names


def python_page() -> str:
    """The Python API, filled in by mkdocstrings."""
    lines = ["# Python API\n", PYTHON_INTRODUCTION]
    for module, names in public_names().items():
        lines.append(f"## {module}\n")
        lines += [f"::: {module}.{name}\n" for name in names]
    return "\n".join(lines)


def _shown(output: dict[str, Any]) -> str:
    """What a cell printed, drew or gave, as Markdown; pictures stand in the page itself."""
    if output["output_type"] == "stream":
        lines = "".join(output["text"]).rstrip().splitlines()
        return "\n".join(["```text", *(textwrap.fill(line, LINE_WIDTH) for line in lines), "```"])
    content = output["data"]
    if "image/png" in content:
        return f"![Picture](data:image/png;base64,{''.join(content['image/png']).strip()})"
    if "image/svg+xml" in content:
        drawing = base64.b64encode("".join(content["image/svg+xml"]).encode()).decode()
        return f"![Picture](data:image/svg+xml;base64,{drawing})"
    return f"```text\n{''.join(content['text/plain'])}\n```"


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, and what came out of it when it was last run."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace(".ipynb)", ".md)"))
        else:
            parts += [f"```python\n{source}\n```", *map(_shown, cell["outputs"])]
    heading, *others = parts
    title, _, introduction = heading.partition("\n\n")
    return "\n\n".join([title, NOTEBOOK_INTRODUCTION.format(name=path.name), introduction, *others]) + "\n"


def pages() -> dict[str, str]:
    """All pages that are written here, by their paths in `docs`."""
    return {
        **{f"notebooks/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS},
        "reference/commands.md": commands_page(),
        **{f"reference/commands/{command}.md": command_page(command) for command in COMMANDS},
        "reference/recipes.md": recipes_page(),
        "reference/python.md": python_page(),
    }


def on_startup(**_: Any) -> None:
    """Lays out the package for mkdocstrings, before it looks for `paths`: where that is not there it finds the package in the
    environment, and with it all files of the clone, which takes minutes."""
    package = PACKAGE / "elm_ecg"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "training"]:
        (package / path.name).symlink_to(path)


def on_config(config: Any) -> Any:
    """Lists the page of each command in the navigation."""
    reference = next(item["Reference"] for item in config.nav if "Reference" in item)
    commands = next(item for item in reference if "Commands" in item)
    commands["Commands"] = [
        {"All commands": "reference/commands.md"},
        *({f"elm {name}": f"reference/commands/{name}.md"} for name in COMMANDS),
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files
