"""Datasets of ECGs: `elm data list`, `build`, `check` and `push`."""

import argparse
from pathlib import Path

from elm_ecg.training.command_line import CommandLineParser

# PyTorch, `datasets` and TRL take seconds to import, so each command imports what it needs


def show_keys(args: argparse.Namespace) -> None:
    from elm_ecg.training.data.reference import DATASETS, OWNER

    width = max(map(len, DATASETS))
    for key, description in DATASETS.items():
        print(f"{key:<{width}}  {description}")
    print(f"\nKeys for --data, of which * stands for any suffix; the datasets are {OWNER}/KEY.")


def build(args: argparse.Namespace) -> None:
    from elm_ecg.training.data import build as data_build

    data_build.build(args)


def check(args: argparse.Namespace) -> None:
    from elm_ecg.training.data import check as data_check

    data_check.check(args)


def push(args: argparse.Namespace) -> None:
    if not list((args.data / "data").glob("*.parquet")):
        raise ValueError(f"{args.data} holds no dataset; expected the folder that `elm data build` makes.")
    from elm_ecg.training.sharing import push

    given = {name: value for name in ("revision", "license", "license_link") if (value := getattr(args, name))}
    options = [f"--{name}" for name in ("private", "pr") if getattr(args, name)]
    options += [f"--{name}={value}" for name, value in given.items()]
    push.main([str(args.data), "--repo_id", args.repo_id, *options])


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = CommandLineParser(prog="elm data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("list", help="keys of the reference's datasets on the Hub")
    command.set_defaults(work=show_keys)

    command = commands.add_parser("build", help="a dataset of your own records and questions, or of PTB-XL")
    command.set_defaults(work=build)
    command.add_argument(
        "records",
        type=Path,
        metavar="RECORDS",
        help="folder of ECG files, .npz archive of records, or PTB-XL's own folder",
    )
    command.add_argument(
        "--questions",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="CSV, JSON or JSON Lines with record, question and answer (or messages), or a folder of these, as ECG-QA's; of "
        "PTB-XL's own folder by default its five diagnostic superclasses",
    )
    command.add_argument("--output_dir", type=Path, required=True, help="new folder of the dataset and its card")
    command.add_argument(
        "--question_types", nargs="+", metavar="TYPE", help="keep those alone; * stands for anything: comparison*"
    )
    command.add_argument("--join_questions", action="store_true", help="ask all questions about a record in one chat")
    command.add_argument(
        "--sort_answers",
        action="store_true",
        help="sort the items of answers that are lists, which ECG-QA has in any order; default: as they are",
    )
    command.add_argument(
        "--metadata", type=Path, metavar="FILE", help="table about the records: patient_id, strat_fold, age, sex"
    )
    command.add_argument(
        "--metadata_columns", nargs="+", default=[], metavar="NAME", help="further columns of that table to take over"
    )
    command.add_argument(
        "--split_by",
        choices=("given", "fold", "patient"),
        help="column or folder of the questions, strat_fold 1-8/9/10, or patients at random; default: the first that is there",
    )
    command.add_argument(
        "--shares",
        type=float,
        nargs=3,
        default=[0.8, 0.1, 0.1],
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="of the patients; default: 0.8 0.1 0.1",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="of the order and of patients' splits; default: %(default)s"
    )
    command.add_argument(
        "--sampling_rate", type=float, metavar="HZ", help="to which records are resampled; default: their own"
    )
    command.add_argument("--window", type=float, metavar="SECONDS", help="cut records into windows, each a row")
    command.add_argument(
        "--stride", type=float, metavar="SECONDS", help="from one window to the next; default: that of --window"
    )
    command.add_argument(
        "--sampling_rate_of_files", type=float, metavar="HZ", help="of RECORDS, where the files do not say"
    )
    command.add_argument("--unit", help="of RECORDS, where the files do not say: mV, uV or V")
    command.add_argument("--lead_names", nargs="+", metavar="LEAD", help="of RECORDS, where the files do not say")
    command.add_argument(
        "--skip_unreadable", action="store_true", help="leave out records that cannot be read, and list them"
    )
    command.add_argument("--num_proc", type=whole_number, default=1, help="processes that read; default: %(default)s")
    command.add_argument("--name", help="title of the card; default: the folder's name")
    command.add_argument("--license", metavar="ID", help="as the Hub spells it, such as cc-by-4.0")
    command.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="for the card: where the data are from, how to cite them",
    )

    command = commands.add_parser(
        "check", help="what a dataset holds, and what is wrong with it; status 1 if it has errors"
    )
    command.set_defaults(work=check)
    command.add_argument("data", metavar="DATA", help="a dataset as of `elm sft --data`")
    command.add_argument("--splits", nargs="+", metavar="SPLIT", help="default: all")
    command.add_argument("--fold", type=int, help="of datasets that have splits such as fold1_train")
    command.add_argument(
        "--ecg_root", metavar="FOLDER", help="of the ECG files that the dataset names by relative paths"
    )
    command.add_argument(
        "--read_files", action="store_true", help="read all ECG files; default: those of some 100 rows of each split"
    )
    command.add_argument("--output", type=Path, metavar="FILE.json", help="the report, as JSON")

    command = commands.add_parser("push", help="upload a dataset and its card to the Hub")
    command.set_defaults(work=push)
    command.add_argument("data", type=Path, metavar="FOLDER", help="made by `elm data build`")
    command.add_argument("--repo_id", required=True, metavar="OWNER/NAME")
    command.add_argument("--private", action="store_true", help="a repository that others do not see, if it is new")
    command.add_argument("--revision", metavar="BRANCH", help="made if it is new; default: main")
    command.add_argument("--pr", action="store_true", help="propose it as a pull request")
    command.add_argument("--license", metavar="ID", help="as the Hub spells it; default: the card's")
    command.add_argument("--license_link", metavar="URL", help="where the licence stands")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    args.work(args)


if __name__ == "__main__":
    main()
