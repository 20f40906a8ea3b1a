"""Runs the verbs of the installed `elm`, in the working directory, where `elm quickstart --output_dir quickstart` has run.

Each in a process of its own, forked from this one, which has imported what takes most of the time of a command, all of other projects:
what our modules import of each other, each command shows.
"""

import csv
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import urllib.request
from pathlib import Path

import captum.attr  # noqa: F401
import datasets  # noqa: F401
import evaluate  # noqa: F401
import matplotlib.pyplot as plt  # noqa: F401
import numpy as np
import peft  # noqa: F401
import scipy.signal
import scipy.stats  # noqa: F401
import sklearn.linear_model  # noqa: F401
import torch
from datasets import Dataset, DatasetDict
from transformers import Pipeline, Trainer  # noqa: F401
from trl import DPOTrainer, GRPOTrainer, SFTTrainer  # noqa: F401

from elm_ecg.configuration_ecg_encoders import MERLConfig
from elm_ecg.modeling_ecg_encoders import MERLModel
from elm_ecg.training.cli import main
from elm_ecg.training.data.synthetic import make_record


def elm(command: str, prints: str, typed: str = "") -> None:
    """Ends the run if the command fails, or what it prints lacks the text `prints`; `typed` is its standard input."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as keyboard:
        keyboard.write(typed.encode())
        keyboard.seek(0)
        process = os.fork()
        if process == 0:
            for file, descriptor in ((keyboard, 0), (output, 1), (output, 2)):
                os.dup2(file.fileno(), descriptor)
            status = 99
            try:
                status = main(command.split())
            except SystemExit as end:  # of argparse
                status = int(end.code or 0)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        text = output.read().decode()
    if status or prints not in text:
        sys.exit(f"{text}\nelm {command}: exit status {status}; expected 0 and the output {prints!r}")
    print(f"elm {command}: {time.monotonic() - start:.1f} s", flush=True)


def files_of(folder: str, *names: str) -> None:
    """Ends the run if one of them is not there or empty."""
    for path in (Path(folder, name) for name in names):
        if not (path.is_file() and path.stat().st_size):
            sys.exit(f"{path} is not there, or empty")


def reference_encoder() -> dict[str, torch.Tensor]:
    """A small MERL encoder as the reference saves it."""
    encoder = MERLModel(MERLConfig(block="basic", depths=[1], widths=[64]))
    names = {"stem.conv": "conv1", "stem.norm": "bn1"}
    for number in (1, 2):
        names[f"stages.0.0.convs.{number - 1}.conv"] = f"layer1.0.conv{number}"
        names[f"stages.0.0.convs.{number - 1}.norm"] = f"layer1.0.bn{number}"
    split = {key: key.rpartition(".") for key in encoder.state_dict()}
    return {f"resnet.{names[split[key][0]]}.{split[key][2]}": value for key, value in encoder.state_dict().items()}


def show(verb: str, model: str, path: str, holds: bytes) -> None:
    """Ends the run if a page of `elm demo` or `elm serve` cannot be fetched, or lacks what it `holds`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        os._exit(main([verb, model, "--port", str(port)]))
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}") as page:
                    assert holds in page.read()
                break
            except OSError:  # it does not listen yet
                if time.monotonic() - start > 120 or os.waitpid(process, os.WNOHANG)[0]:
                    sys.exit(f"elm {verb}: there is no page {path}")
                time.sleep(0.2)
    finally:
        os.kill(process, signal.SIGKILL)
    print(f"elm {verb}: {time.monotonic() - start:.1f} s", flush=True)


Path("recordings").mkdir()
with open("questions.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["record", "patient_id", "question", "answer"])
    for index in range(12):
        row = make_record(index, 0, sampling_rate=125)
        np.savez(f"recordings/{index}.npz", **row["ecg"])
        table.writerow([index, f"p{index}", *(turn["content"] for turn in row["messages"][:2])])

files_of("quickstart", "report.html")
files_of("quickstart/model", "model.safetensors", "README.md", "modeling_elm.py")
elm("data list", "ecg-qa-ptbxl-250-2500")
elm("data build recordings --questions questions.csv --output_dir my_data --shares 0.5 0.25 0.25", "my_data")
elm("data check my_data", "train")
elm("data simulate ecgs --num_records 8 8 8 --sampling_rate 100", "ecgs/answers: 8 records")
options = "--data my_data --llm quickstart/llm --max_steps 2 --logging_steps 1"
elm(f"sft --config quickstart {options} --output_dir model", "loss")
files_of("model", "model.safetensors", "README.md", "modeling_elm.py")
options = "--use_cpu --report_to none --max_steps 1 --max_completion_length 4 --output_dir reinforced"
elm(f"rl --data my_data --model_name_or_path model {options}", "groups of answers taught nothing")
files_of("reinforced", "model.safetensors", "README.md", "rewards.svg", "answers/step-000000.html")
rows = [make_record(index, 0, sampling_rate=125) for index in range(8)]
for row in rows:
    row |= {"messages": row["messages"][:1], "chosen": "yes", "rejected": "no"}
    row["ecg"]["array"] = row["ecg"]["array"].tolist()
DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk("pairs")
options = "--use_cpu --report_to none --max_steps 1 --output_dir preferring"
elm(f"dpo --data pairs --model_name_or_path model {options}", "pairs of answers")
files_of("preferring", "model.safetensors", "README.md", "training.svg")
elm("evaluate model --data my_data --max_new_tokens 2", "ECG")
(place,) = Path("model/evaluation").iterdir()
files_of(str(place), "evaluation_results.json", "predictions.jsonl", "report.html")
elm("predict model recordings --question Why? --max_new_tokens 2 --output answers.csv", "12 answers about 12 records")
elm("predict model recordings --features encoder --output features.npz", "12 vectors about 12 records")
elm("explain model recordings/0.npz --question Why? --answer yes --output why", "'yes' has probability")
files_of(".", "answers.csv", "features.npz", "why.png", "why.svg", "why.json")
Path("suite").mkdir()
with open("suite/questions.jsonl", "w") as texts:
    for index in range(12):
        row = {
            "ecg_id": index,
            "question": "Is there noise?",
            "answer": ["no"],
            "question_type": "verify",
            "split": "test",
        }
        print(json.dumps(row), file=texts)
elm(
    "benchmark model --suite ecg-qa=suite --records recordings --max_new_tokens 2 --conditions zeroed --output_dir benchmark",
    "ECG-QA",
)
files_of("benchmark/ecg-qa", "evaluation_results.json", "predictions.jsonl", "report.html", "table.md", "table.tex")
shutil.copytree("model", "other")
elm("compare model other", "xact")
elm("tokenizer train --data my_data --num_merges 30 --output_dir tokenizer", "tokenizer")
elm("tokenizer inspect tokenizer --ecg recordings/0.npz", "merges")
elm("plot recordings/0.npz --layout 3x4 --output ecg.png", "png")
files_of(".", "tokenizer/ecg_byte.json", "tokenizer/README.md", "tokens.png", "ecg.png")
torch.save(reference_encoder(), "merl.pt")
elm("convert merl.pt --encoder merl --num_samples 500 --sampling_rate 50 --output_dir converted", "converted")
files_of("converted", "model.safetensors", "README.md", "conversion.json", "modeling_ecg_resnets.py")
elm("export model --part llm --output_dir exported", "Saved the language model to")
elm("export model --part encoder --output_dir exported/encoder", "Saved the encoder to")
files_of("exported", "model.safetensors", "tokenizer.json", "chat_template.jinja", "encoder/preprocessor_config.json")
with open("records.csv", "w", newline="") as file:
    folds = [1, 1, 1, 1, 9, 9, 9, 9, 10, 10, 10, 10]
    csv.writer(file).writerows(
        [("record", "patient_id", "strat_fold", "odd"), *((i, f"p{i}", fold, i % 2) for i, fold in enumerate(folds))]
    )
elm(
    "data build recordings --no_questions --metadata records.csv --metadata_columns odd --output_dir labelled",
    "labelled",
)
encoder = '{"hidden_size":32,"num_hidden_layers":1,"num_attention_heads":2,"decoder_num_hidden_layers":1}'
options = f"--encoder mtae --encoder_config {encoder} --sampling_rate 50 --num_samples 500 --report_to none"
elm(
    f"pretrain --data labelled {options} --per_device_train_batch_size 4 --max_steps 1 --output_dir pretrained", "Saved"
)
files_of("pretrained", "model.safetensors", "encoder/model.safetensors", "encoder/README.md", "training.svg")
options = "--label_columns odd --min_records 1 --shares 1 --output_dir probed"
elm(f"probe converted --data labelled {options}", "Has pretraining helped?")
files_of("probed", "probe_results.json", "probe_records.jsonl", "probe_scores.safetensors", "report.html")
show("demo", "model", "", b"gradio")
show("serve", "model", "v1/models", b'"id":"model"')
elm("chat model --max_new_tokens 4", "leads", typed="/ecg recordings/0.npz\nWhat is the rhythm?\n/quit\n")
elm("push model --repo_id user/model --license mit", "user/model")
elm("chat user/model", "leads", typed="/quit\n")  # as others get it
