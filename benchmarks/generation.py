"""Answers a second of `elm evaluate`: one by one, in batches, and with what questions share read once.

    python benchmarks/generation.py
    python benchmarks/generation.py --llm qwen2.5-0.5b-instruct --encoder st_mem

Conversations of four or five questions about one record each. Every answer has the same number of tokens, so that all sides do
the same work: processor, greedy generation with cache, decoding; on a GPU in bf16. Then the same questions in rows of their own, by the
likelihoods of "yes" and "no", as benchmarks ask them: what the rows about a record begin with is read for each of them, and once.
"""

import argparse
import contextlib
import os
from collections.abc import Callable
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
    apart = Dataset.from_list(
        [
            {**row, "messages": row["messages"][turn : turn + 2], "record_id": str(number)}
            for number, row in enumerate(data.with_format(None))
            for turn in range(0, len(row["messages"]), 2)
        ]
    )
    apart = apart.with_format("numpy", columns=["ecg"], output_all_columns=True)
    num_questions = len(list_questions(data))
    generation = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}

    def answer(rows: Dataset, candidates: list[str] | None, batch_size: int, reuse_prefix: bool) -> None:
        questions = list_questions(rows)
        choices = None if candidates is None else [candidates] * len(questions)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # the bar
            answerer = Answerer(
                model, processor, rows, questions, choices, batch_size, generation, reuse_prefix=reuse_prefix
            )
            answerer.ask("ecg")

    def compare(title: str, works: dict[str, Callable[[], None]]) -> None:
        times = interleaved(works, args.repeats)
        speeds = {name: num_questions / median for name, median in times.items()}
        print(f"\n{title}\n\n| batch | answers/s | ratio |\n| --- | --- | --- |")
        for name, speed in speeds.items():
            print(f"| {name} | {speed:.2f} | {speed / next(iter(speeds.values())):.1f} |")

    largest = max(args.batch_sizes)
    works = {str(size): partial(answer, data, None, size, False) for size in args.batch_sizes}
    works[f"{largest}, prefix reused"] = partial(answer, data, None, largest, True)
    compare(f"{num_questions} answers of {args.new_tokens} tokens, in conversations", works)
    works = {
        f"{largest}": partial(answer, apart, ["yes", "no"], largest, False),
        f"{largest}, beginnings read once": partial(answer, apart, ["yes", "no"], largest, True),
    }
    compare(f'{num_questions} questions in rows of their own, by the likelihoods of "yes" and "no"', works)


if __name__ == "__main__":
    main()
