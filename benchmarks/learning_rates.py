"""Learning rates of `elm sft` compared by the loss of held-out chats.

    python benchmarks/ptbxl.py build runs/ptbxl
    python benchmarks/learning_rates.py --rates 1e-4 2e-4 5e-4 1e-3 2e-3 --use_peft --llm FOLDER_OR_ID --encoder_name_or_path FOLDER
    python benchmarks/learning_rates.py --rates 1e-5 2e-5 5e-5 1e-4 --llm FOLDER_OR_ID --encoder_name_or_path FOLDER

What the command line has beside the options below is given to `elm sft`, and so are --data, --ecg_root, 100 steps of 8 chats and
the sizes of PTB-XL's records at 100 Hz, where it says nothing else. Each rate begins with the same weights and sees the same chats.
"""

import argparse
import tempfile
import time

import torch
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from elm_ecg.training import run, sft
from elm_ecg.training.resume import RunOptions

RECORDS = ["--data", "runs/ptbxl/data", "--ecg_root", "runs/ptbxl", "--sampling_rate", "100", "--num_samples", "1000"]
ELM = ["--connector", "mlp", "--num_ecg_tokens", "4", "--cache_features", "memory"]
RUN = ["--max_steps", "100", "--batch_size", "8", "--save_strategy", "no", "--logging_strategy", "no"]
RUN += ["--eval_strategy", "epoch", "--report_to", "none", "--disable_tqdm", "true"]


def train(argv: list[str], num_chats: int) -> tuple[float, float, float]:
    """Loss and accuracy of the learnt tokens of held-out chats after a run of `elm sft`, and the CPU seconds of a step."""
    args, training_args, model_args = sft.parse(argv)
    set_seed(training_args.seed)
    model, processor = run.build_base(args, training_args, model_args)
    splits = run.load_splits(args, training_args)
    validation = splits["validation"].shuffle(seed=training_args.seed)
    splits["validation"] = validation.select(range(min(num_chats, len(validation))))
    training_args.eval_strategy = IntervalStrategy.NO  # at the end alone; before, it asked for the split
    options = RunOptions.of(args, training_args, model_args)
    trainer = sft.make_trainer(args, training_args, model_args, model, processor, splits, options)
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    scores = trainer.evaluate()
    return scores["eval_loss"], scores["eval_mean_token_accuracy"], seconds / training_args.max_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", required=True, help="learning rates")
    parser.add_argument("--eval_chats", type=int, default=200, help="held-out chats that count; default: %(default)s")
    args, others = parser.parse_known_args()

    torch.set_num_threads(1)
    print("| learning rate | loss | accuracy of tokens | CPU s of a step |\n| --- | --- | --- | --- |")
    for rate in args.rates:
        with tempfile.TemporaryDirectory() as folder:
            argv = [*RECORDS, *ELM, *RUN, *others, "--learning_rate", rate, "--output_dir", folder]
            loss, accuracy, seconds = train(argv, args.eval_chats)
        print(f"| {rate} | {loss:.4f} | {accuracy:.3f} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
