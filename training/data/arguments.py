"""How a dataset is built: the arguments of `build_dataset`, which are the options of `elm data build`."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from elm_ecg.training.command_line import whole_number

SPLIT_RULES = ("given", "fold", "patient", "record")
# public sets of recordings, see `downloads.DOWNLOADS`
SOURCES = ("ptb-xl", "mimic-iv-ecg", "code-15", "challenge", "csn")
QUESTION_KINDS = ("verify", "choose", "query")  # that are made from labels
HERTZ, SECONDS = {"type": float, "metavar": "HZ"}, {"type": float, "metavar": "SECONDS"}
METADATA_COLUMNS = ("patient_id", "strat_fold", "age", "sex")  # that are kept of a table about the records
# that are kept of the questions' table, beside what makes the chat: ECG-QA's, by which answers are scored, and those above.
# Others are kept only if they are named, as they may hold names, dates and addresses
KEPT_COLUMNS = ("question_type", "template_id", "question_id", "sample_id", "attribute_type", "attribute", "age", "sex")

# of pushing a dataset
ALLOW_HELP = (
    "columns of a dataset to share though they are none that `elm data build` keeps by itself, or seem to be personal"
)
DRY_RUN_HELP = "check, and show what would be sent, but send nothing"


def _option(default: Any, text: str, **parsing: Any) -> Any:
    """A field with its help, and what else `argparse` has to know of it."""
    parsing |= {"action": "store_true"} if default is False else {}  # `is`, as the default 0 of `seed` == False
    return field(default=default, metadata={"help": text, **parsing})


@dataclass(frozen=True)
class BuildArguments:
    """How a dataset is made of records and questions; the help of each argument is in the metadata of its field.

    Raises:
        ValueError: a value is not of the kind that its argument takes, a rate or length is not above 0, or there is a `stride`
            without a `window`, or `source` is none of `SOURCES`.
    """

    columns: Sequence[str] = _option(
        (),
        "NAME=THEIRS says how the tables of --questions and --metadata call one of our columns, such as question=prompt; NAME keeps "
        f"a further column of the questions; kept anyway are {', '.join(KEPT_COLUMNS)}",
        nargs="+",
        metavar="NAME",
    )
    question_types: Sequence[str] | None = _option(
        None, "keep the questions of these types; * stands for anything: comparison*", nargs="+", metavar="TYPE"
    )
    no_questions: bool = _option(False, "records alone, without questions, as for pretraining an encoder")
    make_questions: Sequence[str] = _option(
        (),
        "make questions of the records' labels: verify (is it there?), choose (which of two?), query (what is there?)",
        nargs="+",
        choices=QUESTION_KINDS,
    )
    label_columns: Sequence[str] = _option(
        (),
        "columns of the table of --metadata with these labels: names, separated by semicolons or commas or as a JSON list, or 0 and 1 "
        "for the label that the column is called after; default: the labels that --source knows",
        nargs="+",
        metavar="NAME",
    )
    min_records: int = _option(
        10, "that a label needs for questions to be made of it; default: %(default)s", type=whole_number
    )
    join_questions: bool = _option(False, "ask all questions about a record in one chat")
    sort_answers: bool = _option(False, "sort the items of answers that are lists, which ECG-QA has in any order")
    metadata: str | Path | Iterable[Mapping[str, Any]] | None = field(
        default=None,
        metadata={"help": f"table about the records: {', '.join(METADATA_COLUMNS)}", "type": Path, "metavar": "FILE"},
    )
    metadata_columns: Sequence[str] = _option((), "further columns of that table to keep", nargs="+", metavar="NAME")
    split_by: str | None = _option(
        None,
        "the questions' split, PTB-XL's fold, or patients at random; default: the first that is known; or records at random, where "
        "nobody knows the patients",
        choices=SPLIT_RULES,
    )
    shares: Sequence[float] = _option(
        (0.8, 0.1, 0.1), "of the patients in each split; default: 0.8 0.1 0.1", type=float, nargs=3, metavar="SHARE"
    )
    seed: int = _option(0, "of the order of records and of the patients' splits; default: %(default)s", type=int)
    source: str | None = _option(
        None,
        "the public set that RECORDS holds, as its authors publish it; its patients, folds, ages and sexes are taken over",
        choices=SOURCES,
    )
    sampling_rate: float | None = _option(None, "of the files in RECORDS that do not say it themselves", **HERTZ)
    unit: str | None = _option(None, "of the files in RECORDS that do not say it themselves: mV, uV or V")
    lead_names: Sequence[str] | None = _option(
        None, "of files that do not say them themselves", nargs="+", metavar="LEAD"
    )
    resample: float | None = _option(None, "sampling rate of the dataset; default: that of each record", **HERTZ)
    window: float | None = _option(None, "length of windows into which records are cut, each a row", **SECONDS)
    stride: float | None = _option(None, "from the start of a window to that of the next; default: --window", **SECONDS)
    skip_unreadable: bool = _option(False, "leave out records that cannot be read, and list them")
    num_proc: int = _option(1, "processes that read; default: %(default)s", type=whole_number)

    def __post_init__(self) -> None:
        for option in fields(self):
            value, nargs = getattr(self, option.name), option.metadata.get("nargs")
            if nargs is not None and value is not None and (isinstance(value, str) or not isinstance(value, Sequence)):
                raise ValueError(f"--{option.name} is {value!r}; expected a list.")
            if option.default is False and not isinstance(value, bool):
                raise ValueError(f"--{option.name} is {value!r}; expected True or False.")
        for name, least in {"seed": 0, "num_proc": 1, "min_records": 1}.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"--{name} is {value!r}; expected a whole number of at least {least}.")
        for name in ("sampling_rate", "resample", "window", "stride"):  # all may be fractions
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and 0 < value < math.inf):  # NaN is not either
                raise ValueError(f"--{name} is {value}; expected a number above 0.")
        if self.source is not None and self.source not in SOURCES:
            raise ValueError(f"--source is {self.source!r}; expected one of {', '.join(SOURCES)}.")
        if self.stride is not None and self.window is None:
            raise ValueError("--stride is from one window to the next; say with --window how long they are.")
        shares = self.shares
        if len(shares) != 3 or not all(isinstance(share, int | float) and share >= 0 for share in shares):
            raise ValueError(f"--shares is {' '.join(map(str, shares))}; expected three numbers that sum to 1.")
        if unknown := [kind for kind in self.make_questions if kind not in QUESTION_KINDS]:
            raise ValueError(f"--make_questions is {' '.join(unknown)}; expected any of {', '.join(QUESTION_KINDS)}.")
        if self.label_columns and not self.make_questions:
            raise ValueError(
                f"--label_columns are for questions about labels; say which with --make_questions ({', '.join(QUESTION_KINDS)})."
            )
        if self.label_columns and self.metadata is None:
            raise ValueError("--label_columns are those of a table about the records; name it with --metadata.")
        if len(self.names) < len(self.columns):
            raise ValueError(f"--columns is {' '.join(self.columns)}; expected each name once.")

    @property
    def names(self) -> dict[str, str]:
        """The further columns of the questions, and those that the tables call otherwise: our name -> theirs."""
        pairs = (column.partition("=") for column in self.columns)
        return {ours: theirs if equals else ours for ours, equals, theirs in pairs}


def in_python(message: str) -> str:
    """A message of the command line in the words of `build_dataset`: its arguments in place of options."""
    names = "|".join(["records", "questions", *(option.name for option in fields(BuildArguments))])
    return re.sub(rf"--({names})\b", r"`\1`", message)
