"""Answers a second of `elm evaluate`: one by one, in batches, and with what the turns of a conversation share read once.

    python benchmarks/generation.py
    python benchmarks/generation.py --llm qwen2.5-0.5b-instruct --encoder st_mem

Conversations of four or five questions about one record each. Every answer has the same number of tokens, so that all sides do
the same work: processor, greedy generation with cache, decoding; on a GPU in bf16.
"""

import argparse
import contextlib
import os
from functools import partial

from common import DEVICE, add_arguments, build, interleaved, make_rows
from datasets import Dataset

from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.questions import list_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--conversations", type=int, default=32, help="of a repeat; default: %(default)s")
    parser.add_argument("--new_tokens", type=int, default=16, help="of an answer; default: %(default)s")
    args = parser.parse_args()

    model, processor = build(args)
    model.eval()
    if DEVICE == "cuda":
        model.bfloat16()
    data = Dataset.from_list(
        [
            {**row, "ecg": {**row["ecg"], "array": row["ecg"]["array"].tolist()}}
            for row in make_rows(args.conversations, args.seed)
        ]
    )
    data = data.with_format("numpy", columns=["ecg"], output_all_columns=True)
    questions = list_questions(data)
    generation = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}

    def answer(batch_size: int, reuse_prefix: bool) -> None:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # the bar
            answerer = Answerer(
                model, processor, data, questions, None, batch_size, generation, reuse_prefix=reuse_prefix
            )
            answerer.ask("ecg")

    works = {str(size): partial(answer, size, False) for size in args.batch_sizes}
    largest = max(args.batch_sizes)
    works[f"{largest}, prefix reused"] = partial(answer, largest, True)
    times = interleaved(works, args.repeats)
    speeds = {size: len(questions) / median for size, median in times.items()}
    print(
        f"\n{len(questions)} answers of {args.new_tokens} tokens\n\n| batch | answers/s | ratio |\n| --- | --- | --- |"
    )
    for size, speed in speeds.items():
        print(f"| {size} | {speed:.2f} | {speed / speeds[str(args.batch_sizes[0])]:.1f} |")


if __name__ == "__main__":
    main()
