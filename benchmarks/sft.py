"""Training speed of `elm sft` against a plain PyTorch loop, and of packed chats against padded ones.

    python benchmarks/sft.py
    python benchmarks/sft.py --vocabularies 152000 --elms merl
    python benchmarks/sft.py --llm FOLDER --data FOLDER --elms merl --batch_size 32 --sides ours packed --use_peft

The plain loop is what one would write by hand: a data loader with the same collator, so the same batches, which are padded to
their longest chat; the model's own forward and loss; `torch.optim.AdamW`; nothing else, not even clipping. The other side is
the trainer of `elm sft` with all that it does, its gradients clipped, its metrics measured and logged. Both train all of the same
weights: by default a Llama of 4 layers of width 256 and, with merl, the quickstart's encoder, on simulated records of 10 s with one
short question and its answer each. What the command line has beside the options below is given to `elm sft`, so that
`--use_peft` trains both sides by LoRA.

Each side runs in a process of its own with one thread and takes turns with the others, a few steps at a time. What counts is CPU
time, of reading the rows to the optimizer's step, so that what else runs on the machine changes little. Memory is the peak of a
process above what it had before it built the model.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, repeat
from multiprocessing.connection import Connection
from pathlib import Path

import common
import torch
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from elm_ecg.training import run, sft
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.lora import freeze, lora_config
from elm_ecg.training.quickstart import CONFIG
from elm_ecg.training.resume import RunOptions
from elm_ecg.training.small_llm import save_small_llm

ELMS = ("patch", "merl")
SIDES = {"plain": "plain loop", "ours": "elm sft", "packed": "elm sft --packing"}


class Turns(TrainerCallback):
    """Of one side: sends CPU seconds and peak memory of each few steps, and waits until it is its turn again."""

    def __init__(self, connection: Connection, steps: int):
        self.connection, self.steps, self.done = connection, steps, 0
        gc.collect()  # which reads pages of all libraries: they are none of what comes next
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.start = 0.0

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Called after each step of the optimizer."""
        self.done += 1
        if self.done % self.steps == 0:
            kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before
            self.connection.send((time.process_time() - self.start, kilobytes / 1024))
            if not self.connection.recv():
                os._exit(0)
            self.start = time.process_time()


def train_plainly(argv: list[str], turns: Turns) -> None:
    args, training_args, model_args = sft.parse(argv)
    torch.manual_seed(training_args.seed)
    model, processor = run.build_base(args, training_args, model_args)
    collator = ELMCollator(processor)
    if model_args.use_peft:
        model = get_peft_model(model, lora_config(args, model_args, model))
    else:
        freeze(model, args.update)
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-5)
    rows = run.load_splits(args, training_args)["train"]
    loader = DataLoader(rows, training_args.per_device_train_batch_size, collate_fn=collator, drop_last=True)
    for batch in chain.from_iterable(repeat(loader)):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        turns.on_step_end()


def train_by_trainer(argv: list[str], turns: Turns) -> None:
    args, training_args, model_args = sft.parse(argv)
    torch.manual_seed(training_args.seed)
    model, processor = run.build_base(args, training_args, model_args)
    splits = run.load_splits(args, training_args)
    options = RunOptions.of(args, training_args, model_args)
    trainer = sft.make_trainer(args, training_args, model_args, model, processor, splits, options)
    trainer.add_callback(turns)
    trainer.train()


def in_turns(
    sides: dict[str, Callable[[Turns], None]], steps: int, repeats: int
) -> dict[str, tuple[list[float], float]]:
    """CPU seconds of each few steps of each side, without the first, and its peak memory in MiB."""
    fork = multiprocessing.get_context("fork")
    pipes, processes = {}, []
    results: dict[str, tuple[list[float], float]] = {}
    for name, side in sides.items():  # what comes before the first turn is no part of training
        pipes[name], other = fork.Pipe()
        processes.append(fork.Process(target=lambda side=side, other=other: side(Turns(other, steps)), daemon=True))
        processes[-1].start()
        other.close()
        pipes[name].recv()  # the first steps
        results[name] = ([], 0.0)
    for turn in range(repeats):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            pipes[name].send(True)
            seconds, memory = pipes[name].recv()
            results[name] = ([*results[name][0], seconds], memory)
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return results


def save_parts(folder: Path, vocabulary: int, num_rows: int, seed: int) -> None:
    """Simulated chats of one question, and a language model for them, where `elm sft` takes them."""
    if not (folder / "data").exists():
        rows = common.make_rows(num_rows, seed)
        for row in rows:
            row["messages"] = row["messages"][:2]
            row["question_type"] = row["question_type"][:1]
        DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(folder / "data")
    llm = folder / f"llm-{vocabulary}"
    save_small_llm(llm, [row["messages"] for row in common.make_rows(480, seed)], seed)
    tokenizer = AutoTokenizer.from_pretrained(llm)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(llm)


def arguments_of(elm: str) -> list[str]:
    if elm == "patch":
        return ["--architecture", "fuyu", "--connector", "patch"]
    encoder_config = yaml.safe_load(CONFIG.read_text())["encoder_config"]
    return ["--encoder", elm, "--encoder_config", json.dumps(encoder_config), "--update", "encoder", "connector", "llm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2500, 152000], help="default: %(default)s")
    parser.add_argument("--elms", nargs="+", choices=ELMS, default=ELMS, help="default: %(default)s")
    parser.add_argument("--llm", help="language model in place of the small ones")
    parser.add_argument("--data", help="chats in place of the simulated ones")
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=["plain", "ours"],
        help="ratios are to the first; default: %(default)s",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of a turn; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="turns that count; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args, others = parser.parse_known_args()

    torch.set_num_threads(1)
    # what TRL tells Hugging Face takes 4 MiB of TLS, and is no part of training
    constants.HF_HUB_DISABLE_TELEMETRY = True
    num_chats = args.batch_size * args.steps
    print("| vocabulary | ELM | side | samples/s | ratio | MiB | ratio |\n| --- | --- | --- | --- | --- | --- | --- |")
    for vocabulary in [None] if args.llm else args.vocabularies:
        for elm in args.elms:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                rows = num_chats * (args.repeats + 1)
                process = multiprocessing.get_context("fork").Process(
                    target=save_parts, args=(folder, vocabulary or 512, rows, args.seed)
                )
                process.start()
                process.join()
                argv = ["--llm", args.llm or str(folder / f"llm-{vocabulary}"), *arguments_of(elm), *others]
                argv += ["--data", args.data or str(folder / "data"), "--seed", str(args.seed), "--use_cpu"]
                argv += ["--batch_size", str(args.batch_size), "--max_steps", str(args.steps * (args.repeats + 1))]
                argv += ["--train_sampling_strategy", "sequential", "--gradient_checkpointing", "false"]
                argv += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--output_dir"]
                sides: dict[str, Callable[[Turns], None]] = {
                    "plain": partial(train_plainly, [*argv, str(folder / "plain")]),
                    "ours": partial(train_by_trainer, [*argv, str(folder / "ours")]),
                    "packed": partial(train_by_trainer, [*argv, str(folder / "packed"), "--packing"]),
                }
                results = in_turns({side: sides[side] for side in args.sides}, args.steps, args.repeats)
            first_seconds, first_memory = results[args.sides[0]]
            for side, (seconds, memory) in results.items():
                ratio = statistics.median(one / other for one, other in zip(first_seconds, seconds, strict=True))
                speed = num_chats / statistics.median(seconds)
                row = (vocabulary or args.llm, elm, SIDES[side], f"{speed:.2f}", f"{ratio:.2f}", f"{memory:.0f}")
                print("|", " | ".join(map(str, row)), f"| {memory / first_memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
