"""`elm quickstart`: simulated ECGs, a small ELM fine-tuned on them, its evaluation and a report, offline."""

import argparse
import json
import time
from pathlib import Path

from datasets import DatasetDict

from elm_ecg.training import sft
from elm_ecg.training.command_line import whole_number
from elm_ecg.training.data.synthetic import make_dataset
from elm_ecg.training.evaluation import evaluate
from elm_ecg.training.evaluation.report import write_report
from elm_ecg.training.figures import training_plot
from elm_ecg.training.files import check_output_folder, resource
from elm_ecg.training.small_llm import save_small_llm

CONFIG = resource("training/configs/quickstart.yaml")
OWN = ("--data", "--llm", "--model_name_or_path", "--elm_ckpt")  # options of `elm sft` that are not the user's here


def simulate(folder: Path, num_records: int, seed: int) -> DatasetDict:
    """Simulated records with four or five questions each, in splits by patient, saved under `folder`."""
    data = DatasetDict()
    for split, size in {"train": num_records, "validation": 96, "test": 192}.items():  # multiples of 48 balance answers
        data[split] = make_dataset(size, seed=seed, split=split, sampling_rate=125, num_proc=2)  # Hz of quickstart.yaml
    data.save_to_disk(folder)
    return data


def main(argv: list[str] | None = None) -> None:
    """Simulates, trains, evaluates and reports; what the command line says is checked before anything is written."""
    parser = argparse.ArgumentParser(  # no CommandLineParser: what it does not know is for `elm sft`
        prog="elm quickstart", description=__doc__, epilog="All options of `elm sft` are taken too."
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("runs/quickstart"),
        help="folder of the data, models and report; default: %(default)s",
    )
    parser.add_argument(
        "--num_records", type=whole_number, default=1920, help="simulated training records; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of data and training; default: %(default)s")
    args, options = parser.parse_known_args(argv)
    said = {"--" + word[2:].partition("=")[0].replace("-", "_") for word in options if word.startswith("--")}
    for option in OWN:
        if option in said:
            raise ValueError(
                f"{option}: elm quickstart makes its own data and language model; for yours take `elm sft`."
            )
    started = time.monotonic()
    folder = args.output_dir
    if "--config" not in said:
        options = ["--config", str(CONFIG), *options]
    common = ["--data", str(folder / "data")]
    parts = ["--llm", str(folder / "llm"), "--output_dir", str(folder / "model"), "--seed", str(args.seed)]
    training = sft.parse([*options, *common, *parts], prog="elm quickstart")  # ours come last and count
    check_output_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)

    print(f"[1/4] Simulating ECGs into {folder / 'data'}", flush=True)
    data = simulate(folder / "data", args.num_records, args.seed)
    save_small_llm(folder / "llm", data["train"]["messages"], args.seed)

    print(f"[2/4] Fine-tuning a small ELM into {folder / 'model'}", flush=True)
    sft.train(*training)

    print("[3/4] Evaluating it with the ECG and without", flush=True)
    model = str(folder / "model")
    results = evaluate.main(["--model_name_or_path", model, *common, "--max_new_tokens", "16", "--batch_size", "96"])

    print("[4/4] Writing the report", flush=True)
    history = json.loads((folder / "model" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    minutes = (time.monotonic() - started) / 60
    write_report(
        folder / "report.html",
        results,
        results.predictions,
        data["test"],
        title="ELM quickstart",
        notice=f"The model was trained from scratch in {minutes:.1f} minutes on simulated ECGs, which are no evidence about real ones.",
        pictures=[(training_plot(history), "Loss while training.")],
    )
    print(f"Done in {minutes:.1f} minutes. Report: {(folder / 'report.html').resolve()}")
    print(f'Load it anywhere: AutoModelForCausalLM.from_pretrained("{folder / "model"}", trust_remote_code=True)')
