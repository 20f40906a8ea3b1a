"""Datasets of ECGs: `elm data list`, `build`, `simulate`, `check` and `push`."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from elm_ecg.training.command_line import CommandLineParser, whole_number
from elm_ecg.training.data.arguments import ALLOW_HELP, DRY_RUN_HELP, BuildArguments

# PyTorch, `datasets` and TRL take seconds to import, so each command imports what it needs. Not in the room `data`, which
# does not know that of sharing.


def show_keys(args: argparse.Namespace) -> None:
    """`elm data list`: prints the keys of the reference's datasets."""
    from elm_ecg.training.data.reference import DATASETS, OWNER

    width = max(map(len, DATASETS))
    for key, description in DATASETS.items():
        print(f"{key:<{width}}  {description}")
    print(f"\nKeys for --data; * stands for any suffix. The datasets are {OWNER}/KEY.")


def build(args: argparse.Namespace) -> None:
    """`elm data build`: see `write.build`."""
    from elm_ecg.training.data import write

    write.build(args)


def simulate(args: argparse.Namespace) -> None:
    """`elm data simulate`: the sets of `simulated_reports`, and a small language model with a tokenizer of their texts."""
    from tempfile import TemporaryDirectory

    from datasets import DatasetDict

    from elm_ecg.training.data.simulated_reports import HELD_OUT, KINDS, make_set
    from elm_ecg.training.files import new_folder
    from elm_ecg.training.small_llm import save_small_llm

    if args.sampling_rate < 100:
        raise ValueError(f"--sampling_rate {args.sampling_rate}: a QRS needs at least 100 Hz.")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be at least 0.")
    if not 0 <= args.no_signal < 1:  # `not` refuses NaN too
        raise ValueError(f"--no_signal is {args.no_signal}; expected a share of the records, from 0 to less than 1.")
    options = {"sampling_rate": args.sampling_rate, "no_signal": args.no_signal, "num_proc": args.num_proc}
    chats: list[Any] = []  # for the tokenizer, reports as answers
    with new_folder(args.output_dir) as folder, TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as cache:
        for kind, number in zip(KINDS, args.num_records, strict=True):
            sizes = {"train": number, **HELD_OUT}
            data = DatasetDict(
                {
                    split: make_set(kind, size, args.seed, split, cache_dir=cache, **options)
                    for split, size in sizes.items()
                }
            )
            data.save_to_disk(folder / kind)
            train = data["train"]
            reports = kind == "reports"
            chats += (
                [[{"role": "assistant", "content": text}] for text in train["report"]] if reports else train["messages"]
            )
        save_small_llm(folder / "llm", chats, args.seed, vocab_size=1024)
    for kind, number in zip(KINDS, args.num_records, strict=True):
        print(f"{args.output_dir / kind}: {number:,} records to train on")
    print(f"{args.output_dir / 'llm'}: a small language model, not trained, with a tokenizer of these texts")


def check(args: argparse.Namespace) -> None:
    """`elm data check`: see `check.check`."""
    from elm_ecg.training.data import check as data_check

    data_check.check(args)


def push(args: argparse.Namespace) -> None:
    """`elm data push`: `elm push` of a folder that `elm data build` made; ValueError if it is another."""
    if not list((args.data / "data").glob("*.parquet")):
        raise ValueError(f"{args.data} holds no dataset; expected the folder that `elm data build` makes.")
    from elm_ecg.training.sharing import push

    values = {name: value for name in ("revision", "license", "license_link") if (value := getattr(args, name))}
    options = [f"--{name}" for name in ("private", "pr", "dry_run") if getattr(args, name)]
    options += [f"--{name}={value}" for name, value in values.items()]  # one word: a value may begin with a dash
    allow = ["--allow", *args.allow] if args.allow else []
    push.main([str(args.data), "--repo_id", args.repo_id, *options, *allow])


def shard_of(text: str) -> tuple[int, int]:
    """The numbers of `--shard 3/16`, for `argparse`."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise argparse.ArgumentTypeError(f"is {text!r}; expected the share and their number, 1/16 to 16/16")
    return int(number), int(of)


def make_parser() -> argparse.ArgumentParser:
    """The options of the five commands."""
    parser = CommandLineParser(prog="elm data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="keys of the reference's datasets on the Hub").set_defaults(work=show_keys)

    command = commands.add_parser("build", help="a dataset of your own records and questions, or of PTB-XL")
    command.set_defaults(work=build)
    add: Any = command.add_argument
    records = "folder of ECG files, .npz archive of records, PTB-XL's own folder, or that of the download of --source"
    add("records", type=Path, metavar="RECORDS", help=records)
    questions = "CSV, Excel (FILE.xlsx or FILE.xlsx#SHEET), Parquet, JSON or JSON Lines with record, question and answer (or messages), "
    questions += (
        "or a folder of these, as the text sets are published: ECG-QA, ECG-Chat, PULSE, GEM, ECG-R1, OpenTSLM; "
    )
    questions += "for PTB-XL's own folder by default its five diagnostic superclasses"
    add("--questions", type=Path, nargs="+", metavar="FILE", help=questions)
    add("--output_dir", type=Path, required=True, help="new folder of the dataset and its card")
    shard = (
        "this machine's share of the work, 1/16 to 16/16; all write into one folder, or into folders that are merged"
    )
    add("--shard", type=shard_of, metavar="I/N", help=shard)
    for option in fields(BuildArguments):
        add(f"--{option.name}", default=option.default, **option.metadata)  # metadata: keywords of argparse
    add("--name", help="title of the card; default: the folder's name")
    add("--license", metavar="ID", help="as the Hub spells it, such as cc-by-4.0; default: that of --source")
    attribution = "for the card: where the data are from, and how to cite them; default: as of --source"
    add("--attribution", nargs="+", default=[], metavar="TEXT", help=attribution)

    text = "ECGs with reports, with chats that reason and with answers alone, all true, and a small language model for them"
    command = commands.add_parser("simulate", help=text)
    command.set_defaults(work=simulate)
    add = command.add_argument
    add("output_dir", type=Path, metavar="OUTPUT_DIR", help="new folder of `reports`, `reasoning`, `answers` and `llm`")
    sizes = "records to train on in each set, beside 144 of validation and 1,008 of test; default: %(default)s"
    add(
        "--num_records",
        type=whole_number,
        nargs=3,
        default=[1440, 480, 1920],
        metavar=("REPORTS", "REASONING", "ANSWERS"),
        help=sizes,
    )
    no_signal = "share of the records whose electrodes are off, and of which every right answer is that there is no ECG signal: models "
    no_signal += "that learn it do not answer without an ECG; default: %(default)s"
    add("--no_signal", type=float, default=0.05, metavar="SHARE", help=no_signal)
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--sampling_rate", type=whole_number, default=125, help="hertz, at least 100; default: %(default)s")
    add("--num_proc", type=whole_number, default=2, help="processes; default: %(default)s")

    text = "what a dataset holds, and what is wrong with it; status 1 if it has errors"
    command = commands.add_parser("check", help=text)
    command.set_defaults(work=check)
    add = command.add_argument
    add("data", metavar="DATA", help="a dataset as of `elm sft --data`")
    add("--splits", nargs="+", metavar="SPLIT", help="default: all")
    add("--fold", type=int, help="of datasets that have splits such as fold1_train")
    ecg_root = "of the ECG files that the dataset names, or of the downloads that the reference made them of; default: its own folder"
    add("--ecg_root", metavar="FOLDER", help=ecg_root)
    read_files = "read all ECG files; default: those of some 100 rows of each split"
    add("--read_files", action="store_true", help=read_files)
    add("--output", type=Path, metavar="FILE.json", help="the report, as JSON")

    command = commands.add_parser("push", help="upload a dataset and its card to the Hub")
    command.set_defaults(work=push)
    add = command.add_argument
    add("data", type=Path, metavar="FOLDER", help="made by `elm data build`")
    add("--repo_id", required=True, metavar="OWNER/NAME")
    add("--private", action="store_true", help="a repository that others do not see, if it is new")
    add("--revision", metavar="BRANCH", help="made if it is new; default: main")
    add("--pr", action="store_true", help="propose it as a pull request")
    add("--dry_run", action="store_true", help=DRY_RUN_HELP)
    add("--allow", nargs="+", default=[], metavar="COLUMN", help=ALLOW_HELP)
    add("--license", metavar="ID", help="as the Hub spells it; default: the card's")
    add("--license_link", metavar="URL", help="where the text of the licence is")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Runs one of the commands; ValueError if its input is at fault."""
    args = make_parser().parse_args(argv)
    args.work(args)
