"""The options of `elm predict`, checked before anything is read."""

import argparse
from pathlib import Path

from elm_ecg.feature_extraction_elm import TRUNCATIONS
from elm_ecg.training.command_line import (
    MAX_NEW_TOKENS,
    CommandLineParser,
    add_model_options,
    add_record_options,
    read_system_prompt,
    whole_number,
)
from elm_ecg.training.evaluation.arguments import check_generation

FEATURES = ("encoder", "connector", "llm")
ANSWER_FILES, FEATURE_FILES = (".jsonl", ".csv"), (".npz", ".parquet")
OF_DATA = ("split", "fold", "ecg_root")
OF_FILES = ("sampling_rate", "unit", "lead_names")  # what a file may lack


def make_parser() -> argparse.ArgumentParser:
    """The options of `elm predict`."""
    usage = "elm predict MODEL RECORD [RECORD ...] --question TEXT [TEXT ...] [options]"
    description = (
        "Answers questions about any number of ECGs, to which nobody has to know the right answers. A run that was interrupted goes on "
        "where it was when its command is repeated. Research software, not a medical device."
    )
    parser = CommandLineParser(prog="elm predict", usage=usage, description=description)
    add = parser.add_argument
    add("model", metavar="MODEL", help="saved ELM or LoRA adapter: local folder or Hub id")
    records_help = "files of any format of docs/reference/file_formats.md, folders, or patterns such as 'ecgs/*.xml'"
    add("records", nargs="*", metavar="RECORD", help=records_help)
    add("--question", nargs="+", metavar="TEXT", help="asked about each record")
    questions_help = (
        "questions: a .txt file with one in each line, or a table with the column question; where it has a column record too, each is "
        "asked about that record alone"
    )
    add("--questions", type=Path, metavar="FILE", help=questions_help)
    data_help = "datasets in place of RECORD; without a question, those of its own chats are asked"
    add("--data", nargs="+", metavar="DATA", help=data_help)
    add("--split", help="of --data; default: test")
    add("--fold", type=int, help="of --data that has splits such as fold1_test")
    add("--ecg_root", metavar="FOLDER", help="of the ECG files that --data names; default: its own, if it is local")
    output_help = (
        "what is written, .jsonl or .csv, or of features .npz or .parquet; default: predictions.jsonl or features.npz"
    )
    add("-o", "--output", type=Path, metavar="FILE", help=output_help)
    candidates_help = "answers to choose from by their likelihood; each gets its share, and all shares add up to 1"
    add("--candidates", nargs="+", metavar="TEXT", help=candidates_help)
    features_help = (
        "write no answers, but a vector for each record: the mean of the encoder's tokens, the mean of what the connector makes of "
        "them, or what the language model holds where its answer to a question would begin"
    )
    add("--features", choices=FEATURES, help=features_help)
    add("--batch_size", type=whole_number, default=32, help="questions answered at once; default: %(default)s")
    generation_help = 'JSON with other options of `generate`, such as {"num_beams": 4}; default: greedy decoding'
    add("--generation_kwargs", metavar="JSON", help=generation_help)
    add("--seed", type=int, default=0, help="of sampled answers; default: %(default)s")
    add_model_options(parser, MAX_NEW_TOKENS)
    parser.set_defaults(max_new_tokens=None)  # whether it was said counts
    add_record_options(parser)
    truncation_help = (
        "part that is read of a record that is longer than the model takes; default: that of its training, or an error"
    )
    add("--truncation", choices=TRUNCATIONS[1:], help=truncation_help)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, with `output`, `split` and `max_new_tokens` as they count, and `generation`, the other options of `generate`.

    Raises:
        ValueError: some do not go together, or one is not as expected.
    """
    from elm_ecg.training.arguments import json_fields  # imports TRL, which takes seconds; --help need not wait

    parser = make_parser()
    args, rest = argparse.ArgumentParser.parse_known_args(parser, argv)
    if any(word.startswith("-") for word in rest):
        parser.parse_args(argv)  # tells which option there is not
    args.records += rest  # argparse takes them only where they follow the model at once
    args.system_prompt = read_system_prompt(args.system_prompt)
    args.generation = json_fields("generation_kwargs", args.generation_kwargs)
    check_generation(args.generation, args.max_new_tokens or MAX_NEW_TOKENS, "--")
    _check_records(args)
    _check_questions(args)
    _check_answers(args)
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be at least 0.")
    suffixes = ANSWER_FILES if args.features is None else FEATURE_FILES
    args.output = args.output or Path(
        f"predictions{suffixes[0]}" if args.features is None else f"features{suffixes[0]}"
    )
    if args.output.suffix.lower() not in suffixes:
        what = "answers go" if args.features is None else "features go"
        raise ValueError(f"--output is {args.output}; {what} into a file that ends with {' or '.join(suffixes)}.")
    if not args.output.parent.is_dir():
        raise ValueError(f"--output is {args.output}; there is no folder {args.output.parent}.")
    if args.output.exists():
        raise ValueError(f"--output {args.output} is there already; name another file, or move it away.")
    return args


def _check_records(args: argparse.Namespace) -> None:
    if bool(args.records) == bool(args.data):
        raise ValueError(
            "Which ECGs? Name files or folders behind the model, or datasets with --data"
            + (", not both." if args.records else ".")
        )
    for names, other, given in ((OF_DATA, "--data", args.data), (OF_FILES, "RECORD", args.records)):
        said = [name for name in names if getattr(args, name) is not None]
        if said and not given:
            raise ValueError(f"--{said[0]} changes nothing without {other}; leave it out.")
    args.split = args.split or "test"


def _check_questions(args: argparse.Namespace) -> None:
    asked = args.question is not None or args.questions is not None
    if args.question is not None and args.questions is not None:
        raise ValueError("--question and --questions are two ways to say what is asked; leave one of them out.")
    if args.question is not None and not all(text.strip() for text in args.question):
        raise ValueError("--question has an empty text; say what is asked.")
    if args.questions is not None and not args.questions.is_file():
        raise ValueError(f"--questions {args.questions}: there is no such file.")
    if args.features in ("encoder", "connector"):
        if asked:
            raise ValueError(f"--features {args.features} reads no question; leave it out, or take --features llm.")
    elif not asked and args.records:
        raise ValueError("What is asked? Give --question TEXT, or --questions FILE.")


def _check_answers(args: argparse.Namespace) -> None:
    writing = {"generation_kwargs": args.generation, "max_new_tokens": args.max_new_tokens}
    said = next((name for name, value in writing.items() if value), None)
    if args.candidates is not None:
        if len(set(args.candidates)) < max(2, len(args.candidates)) or not all(c.strip() for c in args.candidates):
            raise ValueError(f"--candidates {' '.join(args.candidates)}: expected at least two different answers.")
        if said is not None:
            raise ValueError(
                f"--{said} changes nothing with --candidates, of which one is chosen; leave one of them out."
            )
    said = "candidates" if args.candidates else said
    if args.features is not None and said is not None:
        raise ValueError(f"--{said} changes nothing with --features, which answers nothing; leave it out.")
    args.max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS
