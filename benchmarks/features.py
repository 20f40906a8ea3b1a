"""Training with a frozen encoder: its features kept against computed in each step.

    python benchmarks/features.py --llm FOLDER_OR_ID
    python benchmarks/features.py --llm FOLDER_OR_ID --data FOLDER --packing
    python benchmarks/features.py --encoder merl --batch_size 4

The sides are epochs of one run of `elm sft` with LoRA, in turn, on simulated ECGs with a question of each, or on the first chats of
--data; without --llm it is the quickstart's small language model. With --packing there are epochs with neither, too. What the command
line has beside the options below is given to `elm sft`. Samples by CPU seconds, all that the trainer does included. Beside them what
PyTorch counts of one epoch's arithmetic: where encoder and language model compute equally fast, its ratio is the most that keeping
features can bring.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from common import add_arguments, llm_of, make_rows
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from elm_ecg.training import run, sft
from elm_ecg.training.resume import RunOptions


class TakingTurns(TrainerCallback):
    """Epochs in which features are found, in which they are computed, and in which chats are padded too, in turn; the first one fills
    what is kept.

    Args:
        trainer: whose epochs they are.
        sides: the names of those that there are.
        timed: epochs whose CPU seconds count; of those after them the arithmetic does.
    """

    def __init__(self, trainer: sft.ELMTrainer, sides: list[str], timed: int) -> None:
        self.trainer, self.features, self.timed = trainer, trainer.features, timed
        self.collator: Any = trainer.data_collator
        self.packing = self.collator.packing
        self.seconds: dict[str, list[float]] = {side: [] for side in sides}
        self.flops: dict[str, int] = {}
        self.done = 0

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.name = [*self.seconds][self.done % len(self.seconds)]
        self.trainer.features = self.features if self.name == "kept" else None
        self.collator.packing = self.packing and self.name != "neither"
        self.counter = FlopCounterMode(display=False) if self.done >= self.timed else None
        if self.counter:
            self.counter.__enter__()
        self.start = time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.counter:
            self.counter.__exit__(None, None, None)
            self.flops[self.name] = self.counter.get_total_flops()
        else:
            self.seconds[self.name].append(time.process_time() - self.start)
        self.done += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--data", help="chats in place of the simulated ones")
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=16, help="chats of an epoch; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="of the last column; default: %(default)s")
    parser.set_defaults(encoder="st_mem", repeats=3)
    args, others = parser.parse_known_args()

    with tempfile.TemporaryDirectory() as folder:
        sides = ["kept", "computed", *(["neither"] if "--packing" in others else [])]
        timed = len(sides) * args.repeats + 1
        argv = ["--data", args.data or "simulated", "--llm", llm_of(args, folder), "--encoder", args.encoder]
        argv += ["--update", "connector", "llm", "--use_peft"]
        argv += ["--cache_features", "memory", "--output_dir", str(Path(folder) / "run"), "--seed", str(args.seed)]
        argv += ["--batch_size", str(args.batch_size), "--epochs", str(timed + len(sides)), "--save_strategy", "no"]
        argv += ["--report_to", "none", "--disable_tqdm", "true", "--logging_strategy", "no", *others]
        elm_args, training_args, model_args = sft.parse(argv)
        model, processor = run.build_base(elm_args, training_args, model_args)
        options = RunOptions.of(elm_args, training_args, model_args)
        if args.data is None:
            rows = [{**row, "messages": row["messages"][:2]} for row in make_rows(args.rows, args.seed)]
            data = Dataset.from_list(rows).with_format("numpy", columns=["ecg"], output_all_columns=True)
        else:
            data = run.load_splits(elm_args, training_args)["train"]
            data = data.select(range(min(args.rows, len(data))))
        splits = {"train": data, "validation": None}
        trainer = sft.make_trainer(elm_args, training_args, model_args, model, processor, splits, options)
        turns = TakingTurns(trainer, sides, timed)
        trainer.add_callback(turns)
        trainer.train()

    computed = statistics.median(turns.seconds["computed"])
    first, kept = turns.seconds["kept"][0], statistics.median(turns.seconds["kept"][1:])
    seconds = {"first epoch": (computed, first), "later epochs": (computed, kept)}
    whole = first + (args.epochs - 1) * kept
    seconds[f"{args.epochs} epochs, the mean"] = (computed, whole / args.epochs)
    print(turns.features)
    print("\n| | samples/s, computed | kept | ratio |\n| --- | --- | --- | --- |")
    for name, (without, with_features) in seconds.items():
        speeds = len(data) / without, len(data) / with_features
        print(f"| {name} | {speeds[0]:.2f} | {speeds[1]:.2f} | {speeds[1] / speeds[0]:.2f} |")
    if "neither" in turns.seconds:
        speed = len(data) / statistics.median(turns.seconds["neither"])
        print(
            f"\nPadded and computed: {speed:.2f} samples/s; packed and kept {len(data) / kept / speed:.2f} times as many"
        )
    per_sample = {name: flops / len(data) / 1e9 for name, flops in turns.flops.items()}
    print(
        f"\nArithmetic of a sample: {per_sample['computed']:.1f} GFLOP computed, {per_sample['kept']:.1f} kept, "
        f"ratio {per_sample['computed'] / per_sample['kept']:.2f}"
    )


if __name__ == "__main__":
    main()
