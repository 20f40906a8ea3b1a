"""An ELM on the real ECGs of the PTB-XL subset in ../shared/data/ptbxl (1,999 records at 100 Hz, CC BY 4.0).

    python benchmarks/ptbxl.py build runs/ptbxl                     # questions from the SCP statements, and a small LLM
    elm sft --config training/configs/ptbxl_llava.yaml --data runs/ptbxl/data --ecg_root runs/ptbxl --llm runs/ptbxl/llm --output_dir runs/ptbxl/llava
    elm evaluate runs/ptbxl/llava --data runs/ptbxl/data --ecg_root runs/ptbxl
    elm evaluate runs/ptbxl/llava --data runs/ptbxl/all_questions --ecg_root runs/ptbxl --score likelihood --output_dir runs/ptbxl/llava_auroc

The last asks every record of fold 10 all five questions, and gives the area under the ROC curve of each. Another recipe learns from chats of
all five; beside it a plain CNN:

    elm sft --config training/configs/ptbxl_conversations.yaml --data runs/ptbxl/all_questions --ecg_root runs/ptbxl --llm runs/ptbxl/llm --output_dir runs/ptbxl/conversations
    elm evaluate runs/ptbxl/conversations --data runs/ptbxl/all_questions --ecg_root runs/ptbxl --score likelihood
    python benchmarks/ptbxl.py cnn                                  # the same areas, on folds 9 and 10

The augmentations of `elm sft` may be said there too, and `--encoder` puts an encoder of the package with a linear head in place of the CNN.
An encoder that has learnt so can be what an ELM reads, frozen:

    python benchmarks/ptbxl.py cnn --encoder xresnet1d --encoder_config '{"depths": [1, 1, 1], "widths": [32, 64, 128], "kernel_size": 7}' --num_epochs 15 --augment_ecg --time_shift 2 --gain_jitter 0.1 --lead_dropout 0.1 --output_dir runs/ptbxl/xresnet1d
    elm sft --config training/configs/ptbxl_xresnet1d.yaml --data runs/ptbxl/all_questions --ecg_root runs/ptbxl --llm runs/ptbxl/llm --output_dir runs/ptbxl/elm_xresnet1d

ptbxl_fuyu.yaml, ptbxl_rgb.yaml and ptbxl_stacked_signal.yaml run as the first recipe does. The symbolic ELM has a tokenizer of its own:

    elm tokenizer train --data runs/ptbxl/data --ecg_root runs/ptbxl --sampling_rate 50 --lead_names I II V1 V3 V5 --millivolt_range -2 2 --within_leads --num_merges 1000 --output_dir runs/ptbxl/ecg_byte
    elm sft --config training/configs/ptbxl_symbolic.yaml --ecg_tokenizer runs/ptbxl/ecg_byte --data runs/ptbxl/data --ecg_root runs/ptbxl --llm runs/ptbxl/llm --output_dir runs/ptbxl/symbolic

A pretrained language model reads short symbolic ECGs by LoRA, asked one question alone (SmolLM2 as a folder; 10 CPU minutes, of a CPU with bfloat16):

    python -c "from datasets import load_from_disk as l; l('runs/ptbxl/data').filter(lambda row: row['question_type'] == 'NORM').save_to_disk('runs/ptbxl/norm')"
    elm tokenizer train --data runs/ptbxl/data --ecg_root runs/ptbxl --sampling_rate 33 --lead_names I V2 V5 --millivolt_range -6 6 --within_leads --num_merges 500 --output_dir runs/ptbxl/ecg_byte_33
    elm sft --llm runs/smollm2 --representation symbolic --ecg_tokenizer runs/ptbxl/ecg_byte_33 --sampling_rate 33 --num_samples 83 --truncation start --lead_names I V2 V5 --chat_template_path training/templates/qwen2_5.jinja --data runs/ptbxl/norm --ecg_root runs/ptbxl --use_peft --lora_dropout 0 --dtype bfloat16 --bf16 --attn_implementation eager --learning_rate 1e-3 --lr_scheduler_type cosine --warmup_steps 10 --batch_size 8 --max_steps 200 --eval_strategy no --output_dir runs/ptbxl/smollm2_symbolic
    elm evaluate runs/ptbxl/smollm2_symbolic --data runs/ptbxl/norm --ecg_root runs/ptbxl --score likelihood --conditions swapped --batch_size 16 --dtype bfloat16

Encoders pretrained on the same records, without their questions; for the second the statements in English are the reports. Probes ask what they have learnt:

    elm data build runs/ptbxl/ecgs --metadata ../shared/data/ptbxl/records.csv --metadata_columns statement_text_en --no_questions --output_dir runs/ptbxl/records
    elm pretrain --config pretrain_ptbxl_st_mem --data runs/ptbxl/records --output_dir runs/ptbxl/st_mem
    elm pretrain --config pretrain_ptbxl_merl --text_encoder sentence-transformers/all-MiniLM-L6-v2 --data runs/ptbxl/records --output_dir runs/ptbxl/merl
    python benchmarks/ptbxl.py records --splits runs/PTB-XL-labels
    elm probe runs/ptbxl/st_mem --data runs/PTB-XL-labels --label_columns superclass
    elm sft --config ptbxl_pretrained --data runs/ptbxl/all_questions --ecg_root runs/ptbxl --llm runs/ptbxl/llm --output_dir runs/ptbxl/pretrained

The same with another encoder and a moving average, and what is lost on the way from its encoder to its answers:

    elm pretrain --config pretrain_ptbxl_merl --encoder xresnet1d --encoder_config '{"depths": [1, 1, 1], "widths": [32, 64, 128], "kernel_size": 7}' --text_encoder sentence-transformers/all-MiniLM-L6-v2 --data runs/ptbxl/records --output_dir runs/ptbxl/pretrained_xresnet1d
    elm sft --config ptbxl_pretrained --encoder_name_or_path runs/ptbxl/pretrained_xresnet1d --gain_jitter 0.1 --num_train_epochs 3 --ema_decay 0.99 --data runs/ptbxl/all_questions --ecg_root runs/ptbxl --llm runs/ptbxl/llm --output_dir runs/ptbxl/averaged
    python benchmarks/ptbxl.py gap runs/ptbxl/averaged runs/ptbxl

The tokenizer that comes with the package is made so:

    python benchmarks/ptbxl.py records runs/PTB-XL                  # all 2,009 records, no questions
    elm tokenizer train --data runs/PTB-XL --within_leads --output_dir training/tokenizers/ptbxl_250hz

Train on strat_fold 1-8, choose on 9, test on 10; PTB-XL's folds keep the records of a patient together.
"""

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, Features
from torch import nn
from tqdm import tqdm

# this folder has a benchmark named as the package `ecg_byte`: the package is to be found first
sys.path.append(sys.path.pop(0))

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.ecg_utils import STANDARD_LEADS, as_record
from elm_ecg.feature_extraction_elm import NORMALIZATIONS, ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS, ECGEncoder
from elm_ecg.training.arguments import AugmentationArguments
from elm_ecg.training.augmentation import augmented
from elm_ecg.training.data.labels import SUPERCLASSES
from elm_ecg.training.data.schema import ECG, SPLITS
from elm_ecg.training.data.splits import FOLDS
from elm_ecg.training.ema import MovingAverage
from elm_ecg.training.evaluation.predict import main as elm_predict
from elm_ecg.training.evaluation.probe_models import linear_probe, plain_cnn
from elm_ecg.training.small_llm import save_small_llm

NUM_SAMPLES = 1000  # 10 s at 100 Hz
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "ptbxl"
LABEL_COLUMNS = ("superclass", "subclass", "form", "rhythm")  # of records.csv; None where nobody named one
DESCRIPTION = "2,009 records of PTB-XL 1.0.3: 510 of them at 500 Hz, the others at 100 Hz."
LICENSE = "PTB-XL 1.0.3: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/"
CITATION = """\
Wagner P, Strodthoff N, Bousseljot R, Samek W, Schaeffter T. PTB-XL, a large publicly available electrocardiography
dataset (version 1.0.3). PhysioNet 2022. doi 10.13026/kfzx-aw45
Wagner P, Strodthoff N, Bousseljot R-D, Kreiseler D, Lunze FI, Samek W, Schaeffter T. PTB-XL, a large publicly available
electrocardiography dataset. Scientific Data 2020;7:154. doi 10.1038/s41597-020-0495-6
Goldberger AL, Amaral LAN, Glass L, et al. PhysioBank, PhysioToolkit, and PhysioNet. Circulation 2000;101:e215-e220.
doi 10.1161/01.CIR.101.23.e215"""


def in_split(row: dict[str, str], split: str) -> bool:
    return FOLDS[int(row["strat_fold"])] == split


def read_records(source: Path) -> list[dict[str, str]]:
    with (source / "records.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["has_raw100"] == "1" and row["superclass"]]


def answer_of(row: dict[str, str], superclass: str) -> str:
    return "yes" if superclass in row["superclass"].split() else "no"


def make_row(
    row: dict[str, str], question_type: str | list[str], questions: list[tuple[str, str]], folder: Path
) -> dict[str, Any]:
    turns = [text for question in questions for text in question]
    return {
        "ecg": str(folder / f"{int(row['ecg_id']):05d}.npz"),
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)],
        "record_id": row["ecg_id"],
        "patient_id": row["patient_id"],
        "question_type": question_type,
    }


def make_rows(
    records: list[dict[str, str]], split: str, folder: Path, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """As many records that have a superclass as records that have not, for each superclass.

    In training the rarer of the two are repeated, so that no record is left out; elsewhere the commoner are sampled, so
    that none counts twice.
    """
    records = [row for row in records if in_split(row, split)]
    for superclass, question in SUPERCLASSES.items():
        has = np.array([superclass in row["superclass"].split() for row in records])
        groups = [np.flatnonzero(~has), np.flatnonzero(has)]
        size = (max if split == "train" else min)(len(group) for group in groups)
        for answer, group in zip(("no", "yes"), groups, strict=True):
            chosen = rng.permutation(np.tile(group, -(-size // len(group))) if split == "train" else group)[:size]
            for index in chosen:
                yield make_row(records[index], superclass, [(question, answer)], folder)


def make_conversations(
    records: list[dict[str, str]], split: str, folder: Path, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Every record with all questions in one chat, five times: each question comes first once, the others in any order; and
    twice with one of them alone, as they are asked in evaluation."""
    superclasses = list(SUPERCLASSES)
    for row in records:
        if in_split(row, split):
            orders = [[first, *rng.permutation(np.delete(np.arange(5), first))] for first in range(5)]
            orders += [[index] for index in rng.permutation(5)[:2]]
            for order in orders:
                names = [superclasses[index] for index in order]
                asked = [(SUPERCLASSES[name], answer_of(row, name)) for name in names]
                yield make_row(row, names, asked, folder)


def make_questions(records: list[dict[str, str]], split: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Every record with each of the questions once, in a chat of its own."""
    for row in records:
        if in_split(row, split):
            for superclass, question in SUPERCLASSES.items():
                yield make_row(row, [superclass], [(question, answer_of(row, superclass))], folder)


def build(folder: Path, seed: int) -> None:
    ecgs = (folder / "ecgs").resolve()
    ecgs.mkdir(parents=True, exist_ok=True)
    raw = np.load(SHARED / "raw100.npz")
    for ecg_id, ecg in tqdm(zip(raw["ecg_id"], raw["ecg"], strict=True), total=len(raw["ecg_id"]), unit="record"):
        np.savez(ecgs / f"{ecg_id:05d}.npz", array=ecg, sampling_rate=100, lead_names=STANDARD_LEADS, unit="uV")
    records, rng = read_records(SHARED), np.random.default_rng(seed)
    data = DatasetDict({split: Dataset.from_list(list(make_rows(records, split, ecgs, rng))) for split in SPLITS})
    data.save_to_disk(folder / "data")
    save_small_llm(folder / "llm", data["train"]["messages"], seed)
    rows = {split: list(make_questions(records, split, ecgs)) for split in ("validation", "test")}
    rows["train"] = list(make_conversations(records, "train", ecgs, rng))
    all_questions = DatasetDict({split: Dataset.from_list(rows[split]) for split in SPLITS})
    all_questions.save_to_disk(folder / "all_questions")
    for name, splits in (("data", data), ("all_questions", all_questions)):
        print(folder / name, {split: len(rows) for split, rows in splits.items()})


def make_records(source: Path) -> Iterator[dict[str, Any]]:
    """Every record once, at 500 Hz where it is there at that rate."""
    with (source / "records.csv").open(newline="") as file:
        rows = {int(row["ecg_id"]): row for row in csv.DictReader(file)}
    written: set[int] = set()
    for rate in (500, 100):
        raw = np.load(source / f"raw{rate}.npz")
        for ecg_id, ecg in zip(raw["ecg_id"].tolist(), raw["ecg"], strict=True):
            if ecg_id not in written:
                written.add(ecg_id)
                row = rows[ecg_id]
                yield {
                    "ecg": {"array": ecg, "sampling_rate": rate, "lead_names": STANDARD_LEADS, "unit": "uV"},
                    "record_id": row["ecg_id"],
                    "patient_id": row["patient_id"],
                    "strat_fold": int(row["strat_fold"]),
                    **{column: row[column].split() or None for column in LABEL_COLUMNS},
                }


def save_records(folder: Path, splits: bool = False, source: Path = SHARED) -> None:
    columns = {"ecg": ECG, "record_id": pa.string(), "patient_id": pa.string(), "strat_fold": pa.int32()}
    columns |= dict.fromkeys(LABEL_COLUMNS, pa.list_(pa.string()))
    features = Features.from_arrow_schema(pa.schema(columns))
    with tempfile.TemporaryDirectory() as cache:
        data = Dataset.from_generator(make_records, features, cache, gen_kwargs={"source": source})
        data.info.description, data.info.license, data.info.citation = DESCRIPTION, LICENSE, CITATION
        parts = {"train": data}
        if splits:
            fold_of = np.array(data["strat_fold"])
            rows = {split: [fold for fold, name in FOLDS.items() if name == split] for split in SPLITS}
            parts = {split: data.select(np.flatnonzero(np.isin(fold_of, folds))) for split, folds in rows.items()}
        DatasetDict(parts).save_to_disk(folder)
    print(f"{len(data):,} records in {folder}")


def area_under_roc(scores: np.ndarray, has: np.ndarray) -> float:
    differences = scores[has][:, None] - scores[~has]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())


def in_words(areas: dict[str, float]) -> str:
    parts = [f"{name} {area:.3f}" for name, area in areas.items()]
    return " ".join([*parts, f"macro {np.mean(list(areas.values())):.3f}"])


class LinearHead(nn.Module):
    """An ECG encoder, the mean of its tokens, and a linear map."""

    def __init__(self, encoder: ECGEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.output_size, len(SUPERCLASSES))

    def forward(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """[batch, leads, samples] -> [batch, superclasses]."""
        return self.head(self.encoder(ecg_values).last_hidden_state.mean(1))


def make_classifier(args: argparse.Namespace) -> nn.Module:
    """The plain CNN, or an encoder of the package with a linear head."""
    if args.encoder is not None:
        config = ENCODER_CONFIGS[args.encoder](num_samples=NUM_SAMPLES, **args.encoder_config)
        return LinearHead(ENCODER_MODELS[args.encoder](config))
    return plain_cnn(len(STANDARD_LEADS), len(SUPERCLASSES))


def cnn(args: argparse.Namespace) -> None:
    """A classifier of the same records, augmented in the same way, of the epoch with the largest macro AUROC on fold 9."""
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    raw = np.load(SHARED / "raw100.npz")
    ecgs = dict(zip(raw["ecg_id"].tolist(), raw["ecg"], strict=True))
    rows = read_records(SHARED)
    records = [as_record(ecgs[int(row["ecg_id"])], 100, STANDARD_LEADS, "uV") for row in rows]
    extract = ECGFeatureExtractor(sampling_rate=100, num_samples=NUM_SAMPLES, normalization=args.normalization)
    labels = torch.tensor([[answer_of(row, superclass) == "yes" for superclass in SUPERCLASSES] for row in rows])
    parts = {split: torch.tensor([index for index, row in enumerate(rows) if in_split(row, split)]) for split in SPLITS}
    model = make_classifier(args)
    average = None if args.ema_decay is None else MovingAverage(model, args.ema_decay)
    optimizer = torch.optim.AdamW(model.parameters())
    num_steps = args.num_epochs * -(-len(parts["train"]) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=num_steps)

    def values_of(part: torch.Tensor, augment: bool = False) -> torch.Tensor:
        chosen = [records[index] for index in part.tolist()]
        if augment:
            chosen = [augmented(record, args, rng) for record in chosen]
        return extract(chosen, return_tensors="pt")["ecg_values"]

    evaluated = {split: values_of(parts[split]) for split in SPLITS if split != "train"}

    def areas(split: str) -> dict[str, float]:
        with torch.inference_mode():
            scores = torch.cat([model.eval()(values) for values in evaluated[split].split(64)]).numpy()
        return {
            superclass: area_under_roc(scores[:, index], labels[parts[split], index].numpy())
            for index, superclass in enumerate(SUPERCLASSES)
        }

    best: tuple[float, int, str, str] = (0.0, 0, "", "")
    for epoch in tqdm(range(1, args.num_epochs + 1), unit="epoch"):
        model.train()
        for batch in parts["train"][torch.randperm(len(parts["train"]))].split(args.batch_size):
            scores = model(values_of(batch, augment=True))
            loss = nn.functional.binary_cross_entropy_with_logits(scores, labels[batch].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if average is not None:
                average.update()
        with nullcontext() if average is None else average.in_model():
            on_validation = areas("validation")
            macro = float(np.mean(list(on_validation.values())))
            if macro > best[0]:
                best = macro, epoch, in_words(on_validation), in_words(areas("test"))
                if isinstance(model, LinearHead) and args.output_dir is not None:
                    model.encoder.save_pretrained(args.output_dir)
                    extract.save_pretrained(args.output_dir)
    print(f"epoch {best[1]} of {args.num_epochs}\nfold  9: {best[2]}\nfold 10: {best[3]}")


def predicted(model: str, rows: list[dict[str, str]], folder: Path, *options: str) -> np.ndarray:
    """What `elm predict` finds of each record, [records, questions, width]: features, or shares of the candidate answers."""
    files = [str(folder / "ecgs" / f"{int(row['ecg_id']):05d}.npz") for row in rows]
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary, "features.npz" if "--features" in options else "answers.jsonl")
        elm_predict([model, *files, *options, "--output", str(output), "--batch_size", "64"])
        if output.suffix == ".npz":
            with np.load(output) as arrays:
                names, values = arrays["record"].tolist(), arrays["features"]
        else:
            lines = [json.loads(line) for line in output.read_text().splitlines()]
            names, values = (
                [line["record"] for line in lines],
                np.array([list(line["shares"].values()) for line in lines]),
            )
    number = len(names) // len(rows)
    assert names[::number] == [Path(file).stem for file in files]  # a record after the other
    return values.reshape(len(rows), number, -1)


def gap(args: argparse.Namespace) -> None:
    """The areas that a linear head gets from what each part of an ELM makes of a record, and those of the ELM's own answers."""
    of_split = {split: [row for row in read_records(SHARED) if in_split(row, split)] for split in SPLITS}
    rows = [row for split in SPLITS for row in of_split[split]]
    labels = np.array([[answer_of(row, superclass) == "yes" for superclass in SUPERCLASSES] for row in rows])
    ends = np.cumsum([len(of_split[split]) for split in SPLITS])
    parts = dict(zip(SPLITS, np.split(np.arange(len(rows)), ends[:-1]), strict=True))
    asked = ["--question", *SUPERCLASSES.values()]

    def tell(name: str, scores: np.ndarray) -> None:
        """Prints the areas of folds 9 and 10; `scores` are those of their records, the last of `rows`."""
        for fold, split in ((9, "validation"), (10, "test")):
            part = parts[split]
            has, of_part = labels[part].T, scores[part - len(parts["train"])].T
            areas = [area_under_roc(*pair) for pair in zip(of_part, has, strict=True)]
            print(f"fold {fold:>2}, {name}: {in_words(dict(zip(SUPERCLASSES, areas, strict=True)))}", flush=True)

    for kind in ("encoder", "connector", "llm"):
        values = predicted(args.model, rows, args.folder, "--features", kind, *(asked if kind == "llm" else ()))
        columns = []
        for index in range(len(SUPERCLASSES)):
            features = values[:, index if kind == "llm" else 0]  # the language model is asked each question
            of = {"train": features[parts["train"]], "validation": features[parts["validation"]]}
            of["test"] = features[len(parts["train"]) :]  # both folds are scored
            known = {split: labels[part, index, None].astype(int) for split, part in parts.items()}
            columns.append(linear_probe(of, known, np.arange(len(parts["train"])))[0][:, 0])
        tell(f"a linear head on what the {kind} gives", np.stack(columns, 1))
    evaluated = rows[len(parts["train"]) :]
    shares = predicted(args.model, evaluated, args.folder, "--candidates", "yes", "no", *asked)
    tell("the answers", shares[:, :, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("build")
    command.add_argument("folder", type=Path)
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("cnn")
    command.add_argument("--encoder", choices=ENCODER_CONFIGS, help="an encoder with a linear head in place of the CNN")
    command.add_argument("--encoder_config", type=json.loads, default={}, help="JSON with fields of its config")
    command.add_argument("--output_dir", type=Path, help="folder that gets the encoder")
    command.add_argument("--normalization", default="none", choices=NORMALIZATIONS)
    command.add_argument("--num_epochs", type=int, default=20)
    command.add_argument("--batch_size", type=int, default=32)
    command.add_argument("--seed", type=int, default=0)
    for option in fields(AugmentationArguments):  # as of `elm sft`
        is_switch = isinstance(option.default, bool)
        kind: dict[str, Any] = {"action": "store_true"} if is_switch else {"type": float, "default": option.default}
        if option.name != "augment_rgb":
            command.add_argument(f"--{option.name}", **kind)
    command.add_argument("--ema_decay", type=float, help="as of `elm sft`")
    command = commands.add_parser("gap")
    command.add_argument("model", help="ELM with an encoder, trained on the data of `build`")
    command.add_argument("folder", type=Path, help="that `build` has made")
    command = commands.add_parser("records")
    command.add_argument("folder", type=Path)
    command.add_argument(
        "--splits", action="store_true", help="train, validation and test by fold, in place of train alone"
    )
    args = parser.parse_args()
    if args.command == "build":
        build(args.folder, args.seed)
    elif args.command == "records":
        save_records(args.folder, args.splits)
    elif args.command == "gap":
        gap(args)
    else:
        cnn(args)


if __name__ == "__main__":
    main()
