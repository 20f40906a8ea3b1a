"""The `elm` command: one verb for each job."""

import importlib
import sys

from huggingface_hub.errors import StrictDataclassError

# verb -> module whose main(argv) does it, what it does
COMMANDS = {
    "quickstart": (
        "elm_ecg.training.quickstart",
        "simulate ECGs, fine-tune a small ELM on them, evaluate it; minutes, offline",
    ),
    "sft": ("elm_ecg.training.sft", "fine-tune an ELM; every option of TRL's SFTConfig, and --config FILE.yaml"),
    "evaluate": (
        "elm_ecg.training.evaluation.evaluate",
        "score an ELM with the ECG and without it: elm evaluate MODEL --data DATA",
    ),
    "compare": (
        "elm_ecg.training.evaluation.compare",
        "tell several models apart by their answers to the same questions: elm compare A.json B.json [...]",
    ),
    "chat": ("elm_ecg.training.apps.chat", "ask an ELM about ECGs in the terminal: elm chat MODEL"),
    "demo": ("elm_ecg.training.apps.demo", "ask an ELM about ECGs on a page in the browser: elm demo MODEL"),
    "push": (
        "elm_ecg.training.sharing.push",
        "share a model, adapter, encoder, tokenizer or dataset on the Hub: elm push FOLDER --repo_id OWNER/NAME",
    ),
    "convert": (
        "elm_ecg.training.sharing.convert",
        "a checkpoint of ELM-Research/ELM as a folder that from_pretrained loads: elm convert FILE.pt",
    ),
    "data": (
        "elm_ecg.training.data.commands",
        "build, check or push a dataset of ECGs; list the reference's: elm data COMMAND",
    ),
    "tokenizer": (
        "elm_ecg.training.tokenizer",
        "train, inspect or import an ECG-Byte tokenizer, which writes ECGs as tokens",
    ),
    "plot": ("elm_ecg.training.apps.plot", "draw ECG files on ECG paper, as PNG or SVG: elm plot RECORD [RECORD ...]"),
}


def usage() -> str:
    verbs = "\n".join(f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items())
    return f"usage: elm COMMAND [options]\n\n{verbs}\n\nelm COMMAND --help lists the options of a command."


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where the input was at fault, 2 where the command was; 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"elm: no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    if command == "evaluate" and rest and not rest[0].startswith("-"):
        rest.insert(0, "--model_name_or_path")
    try:
        module = importlib.import_module(COMMANDS[command][0])  # late: --help need not wait for torch
        try:
            module.main(rest)
        except (ValueError, OSError, ImportError, StrictDataclassError) as error:
            print(f"elm {command}: {error}", file=sys.stderr)
            return 1
    except KeyboardInterrupt:
        print(f"\nelm {command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
