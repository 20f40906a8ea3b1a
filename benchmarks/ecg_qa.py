"""An ELM on ECG-QA's questions about PTB-XL, one ECG or two compared, from the files in ../shared/data (CC BY 4.0).

    elm data build ../shared/data/ptbxl/raw100.npz --questions ../shared/data/ecg_qa/ecgqa_ptbxl_matched.jsonl --question_types single-verify --metadata ../shared/data/ptbxl/records.csv --split_by fold --sampling_rate_of_files 100 --unit uV --output_dir runs/ecg_qa/single
    elm data build ../shared/data/ptbxl/raw100.npz --questions ../shared/data/ecg_qa/ecgqa_ptbxl_matched.jsonl --question_types comparison_irrelevant-query --sort_answers --metadata ../shared/data/ptbxl/records.csv --split_by given --sampling_rate_of_files 100 --unit uV --output_dir runs/ecg_qa/comparison
    elm data check runs/ecg_qa/single
    elm data check runs/ecg_qa/comparison
    python benchmarks/ecg_qa.py llm runs/ecg_qa                     # a small language model for both
    elm sft --config training/configs/ecg_qa_llava.yaml --data runs/ecg_qa/single --llm runs/ecg_qa/llm --output_dir runs/ecg_qa/single_llava
    elm evaluate runs/ecg_qa/single_llava --data runs/ecg_qa/single
    python benchmarks/ecg_qa.py baseline runs/ecg_qa/single         # the most frequent answer of each question

and with `comparison` in place of `single`. The answers of comparisons are lists in random order, hence --sort_answers. ECG-QA's own splits hold its questions about one ECG in `train` alone, hence PTB-XL's
folds (1-8, 9, 10) for these.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

# this folder has a benchmark named as the package `ecg_byte`: the package is to be found first
sys.path.append(sys.path.pop(0))

from training.data import load_splits
from training.quickstart import save_small_llm


def save_llm(folder: Path, seed: int) -> None:
    chats = [
        chat
        for name in ("single", "comparison")
        for chat in load_splits(str(folder / name))["train"].select_columns("messages")["messages"]
    ]
    save_small_llm(folder / "llm", chats, seed)
    print(f"Language model in {folder / 'llm'}")


def baseline(folder: Path) -> None:
    """Exact match of the answer that each template of questions has most often in training."""
    splits = load_splits(str(folder))
    answers: dict[int, Counter[str]] = defaultdict(Counter)
    columns = ["messages", "template_id"]
    for row in splits["train"].select_columns(columns):
        answers[row["template_id"]][row["messages"][-1]["content"]] += 1
    right = [
        answers[row["template_id"]].most_common(1)[0][0] == row["messages"][-1]["content"]
        for row in splits["test"].select_columns(columns)
    ]
    print(f"Most frequent answer of the question's template: {100 * sum(right) / len(right):.1f}% of {len(right)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("llm", help="save a small language model of random weights for the questions")
    command.add_argument("folder", type=Path, help="holds single and comparison")
    command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    command = commands.add_parser("baseline", help="score the most frequent answers")
    command.add_argument("folder", type=Path, help="a dataset")
    args = parser.parse_args()
    if args.command == "llm":
        save_llm(args.folder, args.seed)
    else:
        baseline(args.folder)


if __name__ == "__main__":
    main()
