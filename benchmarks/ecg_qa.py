"""An ELM on ECG-QA's questions about PTB-XL, one ECG or two compared, from the files in ../shared/data (CC BY 4.0).

    elm data build ../shared/data/ptbxl/raw100.npz --questions ../shared/data/ecg_qa/ecgqa_ptbxl_matched.jsonl --question_types single-verify --metadata ../shared/data/ptbxl/records.csv --split_by fold --sampling_rate 100 --unit uV --output_dir runs/ecg_qa/single
    elm data build ../shared/data/ptbxl/raw100.npz --questions ../shared/data/ecg_qa/ecgqa_ptbxl_matched.jsonl --question_types comparison_irrelevant-query --sort_answers --metadata ../shared/data/ptbxl/records.csv --split_by given --sampling_rate 100 --unit uV --output_dir runs/ecg_qa/comparison
    elm data check runs/ecg_qa/single
    elm data check runs/ecg_qa/comparison
    python benchmarks/ecg_qa.py runs/ecg_qa                         # a small language model for both
    elm sft --config training/configs/ecg_qa_llava.yaml --data runs/ecg_qa/single --llm runs/ecg_qa/llm --output_dir runs/ecg_qa/single_llava
    elm evaluate runs/ecg_qa/single_llava --data runs/ecg_qa/single

and with `comparison` in place of `single`. The answers of comparisons are lists in random order, hence --sort_answers. ECG-QA's own splits hold its questions about one ECG in `train` alone, hence PTB-XL's
folds (1-8, 9, 10) for these.
"""

import argparse
import sys
from pathlib import Path

# this folder has a benchmark named as the package `ecg_byte`: the package is to be found first
sys.path.append(sys.path.pop(0))

from elm_ecg.training.data.loading import load_splits
from elm_ecg.training.small_llm import save_small_llm


def save_llm(folder: Path, seed: int) -> None:
    chats = [
        chat
        for name in ("single", "comparison")
        for chat in load_splits(str(folder / name))["train"].select_columns("messages")["messages"]
    ]
    save_small_llm(folder / "llm", chats, seed)
    print(f"Language model in {folder / 'llm'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds the datasets single and comparison; gets the language model")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    save_llm(args.folder, args.seed)


if __name__ == "__main__":
    main()
