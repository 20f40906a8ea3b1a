"""How a dataset is built: the arguments of `build_dataset`, which are the options of `elm data build`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elm_ecg.training.command_line import whole_number

SPLIT_RULES = ("given", "fold", "patient")
HERTZ, SECONDS = {"type": float, "metavar": "HZ"}, {"type": float, "metavar": "SECONDS"}
METADATA_COLUMNS = ("patient_id", "strat_fold", "age", "sex")  # that are kept of a table about the records


def _option(default: Any, text: str, **parsing: Any) -> Any:
    """A field with its help, and what else `argparse` has to know of it."""
    parsing |= {"action": "store_true"} if default is False else {}  # `is`, as the default 0 of `seed` == False
    return field(default=default, metadata={"help": text, **parsing})


@dataclass(frozen=True)
class BuildArguments:
    """How a dataset is made of records and questions; the help of each argument is in the metadata of its field.

    Raises:
        ValueError: a rate or length is not above 0, or there is a `stride` without a `window`.
    """

    question_types: Sequence[str] | None = _option(
        None, "keep the questions of these types; * stands for anything: comparison*", nargs="+", metavar="TYPE"
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
        "the questions' split, PTB-XL's fold, or patients at random; default: the first that is known",
        choices=SPLIT_RULES,
    )
    shares: Sequence[float] = _option(
        (0.8, 0.1, 0.1), "of the patients in each split; default: 0.8 0.1 0.1", type=float, nargs=3, metavar="SHARE"
    )
    seed: int = _option(0, "of the order of records and of the patients' splits; default: %(default)s", type=int)
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
        for option in ("sampling_rate", "resample", "window", "stride"):  # all may be fractions
            value = getattr(self, option)
            if value is not None and not 0 < value < math.inf:  # `not` refuses NaN too
                raise ValueError(f"--{option} is {value:g}; expected a number above 0.")
        if self.stride is not None and self.window is None:
            raise ValueError("--stride is from one window to the next; say with --window how long they are.")
