"""An ELM on the real ECGs of the PTB-XL subset in ../shared/data/ptbxl (1,999 records at 100 Hz, CC BY 4.0).

    python benchmarks/ptbxl.py build runs/ptbxl                     # questions from the SCP statements, and a small LLM
    elm sft --config training/configs/ptbxl_llava.yaml --data runs/ptbxl/data --llm runs/ptbxl/llm --output_dir runs/ptbxl/llava
    elm evaluate runs/ptbxl/llava --data runs/ptbxl/data
    python benchmarks/ptbxl.py auroc runs/ptbxl/llava runs/ptbxl    # of P(yes), for the five superclasses on fold 10

Train on strat_fold 1-8, choose on 9, test on 10; PTB-XL's folds keep the records of a patient together.
"""

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from tqdm import tqdm

from ecg_utils import STANDARD_LEADS
from training.build import load_elm
from training.quickstart import save_small_llm

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "ptbxl"
# superclass of the SCP statements -> what is asked
QUESTIONS = {
    "NORM": "Is this a normal ECG?",
    "MI": "Does this ECG show myocardial infarction?",
    "STTC": "Does this ECG show ST or T wave changes?",
    "CD": "Does this ECG show a conduction disturbance?",
    "HYP": "Does this ECG show hypertrophy?",
}
FOLDS = {"train": range(1, 9), "validation": (9,), "test": (10,)}


def read_records(source: Path) -> list[dict[str, str]]:
    with (source / "records.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["has_raw100"] == "1" and row["superclass"]]


def make_rows(
    records: list[dict[str, str]], split: str, folder: Path, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """As many records that have a superclass as records that have not, for each superclass.

    In training the rarer of the two are repeated, so that no record is left out; elsewhere the commoner are sampled, so
    that none counts twice.
    """
    records = [row for row in records if int(row["strat_fold"]) in FOLDS[split]]
    for superclass, question in QUESTIONS.items():
        has = np.array([superclass in row["superclass"].split() for row in records])
        groups = [np.flatnonzero(~has), np.flatnonzero(has)]
        size = (max if split == "train" else min)(len(group) for group in groups)
        for answer, group in zip(("no", "yes"), groups, strict=True):
            chosen = rng.permutation(np.tile(group, -(-size // len(group))) if split == "train" else group)[:size]
            for index in chosen:
                row = records[index]
                yield {
                    "ecg": str(folder / f"{int(row['ecg_id']):05d}.npz"),
                    "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
                    "record_id": row["ecg_id"],
                    "patient_id": row["patient_id"],
                    "question_type": superclass,
                }


def build(folder: Path, seed: int) -> None:
    ecgs = (folder / "ecgs").resolve()
    ecgs.mkdir(parents=True, exist_ok=True)
    raw = np.load(SHARED / "raw100.npz")
    for ecg_id, ecg in tqdm(zip(raw["ecg_id"], raw["ecg"], strict=True), total=len(raw["ecg_id"]), unit="record"):
        np.savez(ecgs / f"{ecg_id:05d}.npz", array=ecg, sampling_rate=100, lead_names=STANDARD_LEADS, unit="uV")
    records, rng = read_records(SHARED), np.random.default_rng(seed)
    data = DatasetDict({split: Dataset.from_list(list(make_rows(records, split, ecgs, rng))) for split in FOLDS})
    data.save_to_disk(folder / "data")
    save_small_llm(folder / "llm", data["train"]["messages"], seed)
    print({split: len(rows) for split, rows in data.items()})


@torch.inference_mode()
def auroc(model_path: str, folder: Path) -> None:
    """Area under the ROC curve of the model's P(yes) against P(no), over every record of fold 10."""
    model, processor = load_elm(model_path, dtype="float32")
    model.eval()
    yes, no = (processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in ("yes", "no"))
    records = [row for row in read_records(SHARED) if int(row["strat_fold"]) in FOLDS["test"]]
    areas = {}
    for superclass, question in QUESTIONS.items():
        scores = []
        for start in range(0, len(records), 64):
            chats = []
            for row in records[start : start + 64]:
                path = str(folder / "ecgs" / f"{int(row['ecg_id']):05d}.npz")
                content = [{"type": "ecg", "path": path}, {"type": "text", "text": question}]
                chats.append([{"role": "user", "content": content}])
            inputs = processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
            scores.append((logits[:, yes] - logits[:, no]).numpy())
        has = np.array([superclass in row["superclass"].split() for row in records])
        score = np.concatenate(scores)
        ranks = score[has][:, None] - score[~has]
        areas[superclass] = ((ranks > 0) + 0.5 * (ranks == 0)).mean()
    print(" ".join(f"{name} {area:.3f}" for name, area in areas.items()), f"macro {np.mean(list(areas.values())):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build")
    command.add_argument("folder", type=Path)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("auroc")
    command.add_argument("model")
    command.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.command == "build":
        build(args.folder, args.seed)
    else:
        auroc(args.model, args.folder)


if __name__ == "__main__":
    main()
