"""The splits that a training run reads."""

from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from elm_ecg.training.data.streams import load_stream


def read_splits(
    args: Any,
    training_args: TrainingArguments,
    load: Callable[[str], Any],
    column: str = "messages",
    change: Callable[[Any, str], Any] | None = None,
) -> dict[str, Any]:
    """The rows of `train`, and with `--eval_strategy` those of `validation`, else None.

    Args:
        args: the `DataArguments` and `RunArguments` of the command.
        load: gives the rows of a split that is not streamed, None where there is none.
        column, change: of streamed rows, as of `load_stream`.

    Raises:
        ValueError: there is no such split; or as `load` and `load_stream`.
    """
    splits: dict[str, Any] = {"train": None, "validation": None}
    # of a stream; else the trainer has it
    order = training_args.seed if training_args.data_seed is None else training_args.data_seed
    for split in ["train"] if training_args.eval_strategy == "no" else ["train", "validation"]:
        if args.streaming:
            buffer = args.shuffle_buffer if split == "train" else None
            splits[split] = load_stream(args, split, order, buffer, column, change)
        else:
            with training_args.main_process_first(desc="preparing the data"):  # the others read what it has cached
                splits[split] = load(split)
        if splits[split] is None:
            hint = "; leave --eval_strategy out" if split == "validation" else ""
            raise ValueError(f"--data {' '.join(args.data)} has no split {split!r}{hint}.")
    return splits
