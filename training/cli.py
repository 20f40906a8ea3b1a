"""The `elm` command: one verb for each job."""

import importlib
import importlib.metadata
import sys

from elm_ecg.training.command_line import did_you_mean, run_command

# verb -> module below elm_ecg.training whose main(argv) does it, what it does, example arguments (empty: it runs without)
COMMANDS = {
    "quickstart": ("quickstart", "simulate ECGs, fine-tune a small ELM on them, evaluate it; minutes, offline", ""),
    "pretrain": (
        "pretrain",
        "pretrain an ECG encoder on records, with masked patches or reports",
        "--data DATA --encoder st_mem --output_dir FOLDER",
    ),
    "sft": (
        "sft",
        "fine-tune an ELM, with the options of TRL's SFTConfig",
        "--data DATA --llm LLM --output_dir FOLDER",
    ),
    "rl": (
        "rl",
        "train an ELM by reinforcement learning, with the options of TRL's GRPOConfig",
        "--data DATA --model_name_or_path MODEL --output_dir FOLDER",
    ),
    "dpo": (
        "dpo",
        "train an ELM on preferences, the better of two answers, with the options of TRL's DPOConfig",
        "--data DATA --model_name_or_path MODEL --output_dir FOLDER",
    ),
    "evaluate": ("evaluation.evaluate", "score an ELM with the ECG and without it", "MODEL --data DATA"),
    "predict": (
        "evaluation.predict",
        "answer questions about any number of ECGs, or write their features",
        "MODEL RECORD [RECORD ...] --question TEXT",
    ),
    "explain": (
        "evaluation.explain",
        "show which leads and moments of an ECG an answer rests on",
        "MODEL RECORD --question TEXT",
    ),
    "benchmark": (
        "evaluation.benchmarks.command",
        "score a model on published benchmarks, with the ECG and without it",
        "MODEL --suite NAME[=PLACE] --records PLACE",
    ),
    "probe": (
        "evaluation.probe",
        "measure what a frozen ECG encoder has learnt, by linear probes",
        "ENCODER --data DATA",
    ),
    "compare": (
        "evaluation.compare",
        "compare models by their answers, or encoders by their probes, with intervals",
        "A.json B.json ...",
    ),
    "chat": ("apps.chat", "ask an ELM about ECGs in the terminal", "MODEL"),
    "demo": ("apps.demo", "ask an ELM about ECGs on a page in the browser", "MODEL"),
    "serve": ("serving.serve", "answer chats with ECGs over HTTP, as OpenAI's API does", "MODEL [MODEL ...]"),
    "push": ("sharing.push", "share a model, encoder, tokenizer or dataset on the Hub", "FOLDER --repo_id OWNER/NAME"),
    "convert": ("sharing.convert", "convert a checkpoint of ELM-Research/ELM", "FILE.pt --output_dir FOLDER"),
    "export": (
        "sharing.export",
        "save an ELM's language model or encoder by itself, for vLLM or other programs",
        "MODEL --part llm --output_dir FOLDER",
    ),
    "data": ("dataset_commands", "build, check or push a dataset of ECGs; list the reference's", "COMMAND"),
    "tokenizer": ("tokenizer", "train, inspect or import an ECG-Byte tokenizer: ECGs as tokens", "COMMAND"),
    "plot": ("apps.plot", "draw ECG files on ECG paper, as PNG or SVG", "RECORD [RECORD ...]"),
}
HELP = """\
usage: elm COMMAND [options]

{verbs}

elm COMMAND --help lists the options of a command. ELM_DEBUG=1 shows the traceback of an error."""


def _usage_error(*lines: str) -> int:
    print(*lines, sep="\n", file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where the input was at fault, 2 where the command was; 130 after Ctrl-C. SIGTERM raises
    SystemExit (143)."""
    command, *options = (sys.argv[1:] if argv is None else argv) or [""]
    if command in ("-h", "--help"):
        print(HELP.format(verbs="\n".join(f"  {name:<11} {does}" for name, (_, does, _) in COMMANDS.items())))
        return 0
    if command == "--version":
        print(f"elm-ecg {importlib.metadata.version('elm-ecg')}")
        return 0
    if not command:
        return _usage_error(
            "elm makes, trains, evaluates and shares ECG-language models: elm COMMAND [options]",
            "elm --help lists the commands.",
        )
    if command not in COMMANDS:
        return _usage_error(
            f"elm: there is no command {command!r}.{did_you_mean(command, COMMANDS)}", "elm --help lists the commands."
        )
    name, _, example = COMMANDS[command]
    if example and not options:  # said before the imports, which take seconds
        return _usage_error(f"usage: elm {command} {example}", f"elm {command} --help lists the options.")
    if command == "evaluate" and not options[0].startswith("-"):  # TRL's parser takes no word without its option
        options.insert(0, "--model_name_or_path")
    # imported late: --help of all commands need not wait for torch
    return run_command(f"elm {command}", lambda: importlib.import_module(f"elm_ecg.training.{name}").main(options))


if __name__ == "__main__":
    sys.exit(main())
