"""What training and evaluation take on this GPU: samples/s, tokens/s, MFU, peak memory and answers/s, in one go and offline.

    python benchmarks/gpu.py --output gpu.json
    python benchmarks/gpu.py --small            # in under a minute on a CPU, to see that it runs

Language models of the shapes of Llama-3.2-1B and Qwen2.5-7B with random weights, a frozen ST-MEM in full size, simulated ECGs and
chats; the trainer of `elm sft`, in bf16: weights in float32 where all of them are trained, in bfloat16 under LoRA. A case that does
not fit or does not run is a row that says so.

MFU is the share of the GPU's dense bf16 peak that goes into the matrices of the language model: 6 FLOPs for each of their weights and
each token that is no padding, 4 under LoRA, where frozen weights have no gradients, and those of the head at learnt tokens alone. What
encoder and attention scores take, and what checkpointing computes again, does not count.
"""

import argparse
import contextlib
import copy
import gc
import itertools
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import DEVICE, SHAPES, make_rows
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import is_flash_attn_2_available

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training import sft
from elm_ecg.training.build import build_model, build_processor
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.evaluation.answers import Answerer
from elm_ecg.training.evaluation.questions import list_questions
from elm_ecg.training.resume import RunOptions
from elm_ecg.training.small_llm import save_small_llm

LLMS = ("Llama-3.2-1B", "Qwen2.5-7B")
# dense bf16 TFLOPS of NVIDIA's data sheets, by a part of the card's name
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312, "L40S": 362, "L4": 121}
WARM_UP = 3 if DEVICE == "cuda" else 1  # steps that do not count: they allocate memory and choose kernels
TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "head_dim": 16}  # encoder of `--small`


@dataclass
class Case:
    """A row of the table."""

    llm: str
    training: str  # full, LoRA or evaluation
    batch_size: int
    padding: str = "padded"
    attention: str = "sdpa"
    checkpointing: bool = False

    def options(self) -> list[str]:
        """As `elm sft` takes them."""
        options = ["--batch_size", str(self.batch_size), "--attn_implementation", self.attention]
        options += ["--gradient_checkpointing", str(self.checkpointing).lower()]
        options += ["--padding_free"] if self.padding == "padding-free" else []
        if self.training == "LoRA":
            options += ["--use_peft", "--lora_r", "16", "--lora_alpha", "32"]
        # on a CPU 16 bits are slow
        return [*options, "--dtype", "bfloat16" if self.training != "full" and DEVICE == "cuda" else "float32"]


def list_cases(batch_sizes: dict[str, int]) -> list[Case]:
    """The most telling first, as time may run out; what may not fit comes last."""
    small, large = LLMS
    cases = []
    for llm, training in ((small, "LoRA"), (small, "full"), (large, "LoRA")):
        for changes in ({}, {"padding": "padding-free"}, {"checkpointing": True}):
            cases.append(Case(llm, training, batch_sizes[llm], **changes))
    cases += [Case(llm, "evaluation", 4 * batch_sizes[llm]) for llm in LLMS]
    for training in ("LoRA", "full"):
        for padding in ("padded", "padding-free"):
            cases.append(Case(small, training, batch_sizes[small], padding, "flash_attention_2"))
    return [*cases, Case(large, "full", batch_sizes[large], checkpointing=True)]


class Clock(TrainerCallback):
    """Times the steps after the first ones, and ends the training when there are enough."""

    def __init__(self, seconds: float):
        self.seconds, self.steps, self.start, self.end = seconds, 0, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == WARM_UP:
            self.start = now
        elif state.global_step > WARM_UP:
            self.steps, self.end = state.global_step - WARM_UP, now
            control.should_training_stop = now - self.start > self.seconds


class Bench:
    """Cases over the same simulated rows.

    Args:
        folder: of the tokenizer, and for what the trainer writes.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder = args, folder
        self.rows = make_rows(16 if args.small else 512, args.seed)
        save_small_llm(folder / "llm", [row["messages"] for row in self.rows], args.seed)
        lists = [{**row, "ecg": {**row["ecg"], "array": row["ecg"]["array"].tolist()}} for row in self.rows]
        self.data = Dataset.from_list(lists).with_format("numpy", columns=["ecg"], output_all_columns=True)
        name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
        found = [peak for part, peak in PEAKS.items() if part in name]
        self.peak = args.peak_tflops or (found[0] if found else None)

    def parse(self, case: Case) -> tuple[Any, Any, Any]:
        """The options of `elm sft`; ValueError where it refuses one."""
        argv = ["--data", "simulated", "--llm", str(self.folder / "llm"), "--output_dir", str(self.folder / "run")]
        argv += [
            "--encoder",
            "st_mem",
            "--update",
            "connector",
            "llm",
            "--sampling_rate",
            "250",
            "--num_samples",
            "2500",
        ]
        argv += ["--encoder_config", json.dumps(TINY)] if self.args.small else []
        argv += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--max_steps", "1000"]
        argv += ["--logging_steps", "100000", "--dataloader_num_workers", "0" if self.args.small else "8"]
        argv += ["--bf16"] if DEVICE == "cuda" else ["--use_cpu"]
        return sft.parse([*argv, "--seed", str(self.args.seed), *case.options()])

    def build(self, case: Case, parsed: tuple[Any, Any, Any]) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
        """An ELM as `elm sft` builds it, around a language model of the case's shape."""
        processor = build_processor(parsed[0])
        config = build_model(parsed[0], processor, attn_implementation=case.attention).config
        shape = copy.deepcopy(SHAPES[case.llm])
        if self.args.small:
            shape.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 2048})
            shape.update({"num_attention_heads": 4, "num_key_value_heads": 2})
        shape.update(
            {name: getattr(config.text_config, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        )
        shape._attn_implementation = case.attention
        config.text_config, config.tie_word_embeddings = shape, shape.tie_word_embeddings
        with torch.device(DEVICE):
            return ELMForConditionalGeneration._from_config(config, dtype=getattr(torch, parsed[2].dtype)), processor

    def run(self, case: Case) -> dict[str, Any]:
        """The numbers of a case, or a `note` why there are none."""
        if case.attention == "flash_attention_2" and not is_flash_attn_2_available():
            return {"note": "flash-attn is not installed, or there is no GPU for it"}
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            numbers = self.evaluate(case) if case.training == "evaluation" else self.train(case)
        except torch.OutOfMemoryError:
            return {"note": "out of memory"}
        except Exception as error:  # the other rows are worth having
            return {"note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        if DEVICE == "cuda":
            numbers["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers

    def train(self, case: Case) -> dict[str, Any]:
        parsed = self.parse(case)
        model, processor = self.build(case, parsed)
        options = RunOptions.of(*parsed)
        splits = {"train": self.data, "validation": None}
        trainer = sft.make_trainer(*parsed, model, processor, splits, options)
        clock = Clock(self.args.seconds_of_a_case)
        trainer.add_callback(clock)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer.train()
        samples = clock.steps * case.batch_size / (clock.end - clock.start)
        batch = ELMCollator(processor)(self.rows)
        tokens, learnt = (
            int(count) / len(self.rows) for count in (batch["attention_mask"].sum(), (batch["labels"] >= 0).sum())
        )
        matrices = sum(
            module.in_features * module.out_features
            for name, module in model.model.language_model.named_modules()
            if isinstance(module, torch.nn.Linear) and "lora_" not in name
        )
        head = model.lm_head.in_features * model.lm_head.out_features
        flops = (6 if case.training == "full" else 4) * (matrices * tokens + head * learnt)
        numbers = {"samples_per_second": samples, "tokens_per_second": samples * tokens}
        return numbers | ({"mfu": samples * flops / (self.peak * 1e12)} if self.peak else {})

    def evaluate(self, case: Case) -> dict[str, Any]:
        model, processor = self.build(case, self.parse(case))
        model.eval()
        few = self.data.select(range(4 if self.args.small else 4 * case.batch_size))
        questions = list_questions(few)
        length = {"min_new_tokens": 16, "max_new_tokens": 16}
        answerer = Answerer(model, processor, few, questions, None, case.batch_size, length)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # the bar
            start = time.perf_counter()
            answerer.ask("ecg")
            seconds = time.perf_counter() - start
        return {"answers_per_second": len(questions) / seconds}


def row(case: Case, numbers: dict[str, Any]) -> str:
    """A line of the Markdown table."""
    mfu = numbers.get("mfu")
    cells = [case.llm, case.training, str(case.batch_size), case.padding, case.attention]
    cells.append("yes" if case.checkpointing else "no")
    for name in ("samples_per_second", "tokens_per_second", "answers_per_second"):
        cells.append(f"{numbers[name]:,.1f}" if name in numbers else "")
    cells.append("" if mfu is None else f"{mfu:.1%}")
    cells += [f"{numbers['peak_gib']:.1f}" if "peak_gib" in numbers else "", numbers.get("note", "")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="models of two layers and short runs, as a trial")
    parser.add_argument("--seconds", type=float, default=480, help="no case begins after these; default: %(default)s")
    parser.add_argument("--seconds_of_a_case", type=float, help="of timed steps; default: 10, of --small 0.3")
    parser.add_argument("--peak_tflops", type=float, help="dense bf16 peak of the GPU; default: by its name")
    parser.add_argument("--batch_sizes", type=int, nargs=2, metavar=("1B", "7B"), help="default: 16 8, of --small 4 2")
    parser.add_argument("--output", type=Path, help="JSON file of the same numbers")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    args.seconds_of_a_case = args.seconds_of_a_case or (0.3 if args.small else 10)
    args.batch_sizes = args.batch_sizes or ([4, 2] if args.small else [16, 8])
    disable_progress_bars()
    began = time.monotonic()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    results: dict[str, Any] = {"device": device, "torch": torch.__version__, "small": args.small, "cases": []}
    print(f"{device}, torch {torch.__version__}{', --small: no figures to quote' if args.small else ''}\n")
    head = "LLM | training | batch | padding | attention | checkpointing | samples/s | tokens/s | answers/s | MFU | peak GiB | note"
    print(f"| {head} |\n|{' --- |' * 12}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        cases = list_cases(dict(zip(LLMS, args.batch_sizes, strict=True)))
        for case in itertools.takewhile(lambda _: time.monotonic() - began < args.seconds, cases):
            numbers = bench.run(case)
            gc.collect()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            print(row(case, numbers), flush=True)
            results["cases"].append(asdict(case) | numbers)
            if args.output is not None:  # after each case: what a run that is cut short has measured
                args.output.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{len(results['cases'])} of {len(cases)} cases in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
