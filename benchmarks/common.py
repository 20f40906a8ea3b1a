"""What the speed benchmarks share."""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

# this folder has a benchmark named as the package `ecg_byte`: the package is to be found first
sys.path.append(sys.path.pop(0))

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training import sft
from elm_ecg.training.build import build_model, build_processor
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.quickstart import CONFIG
from elm_ecg.training.small_llm import save_small_llm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LLAMA = {
    "vocab_size": 128256,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
# language models of these shapes, with random weights
SHAPES: dict[str, PreTrainedConfig] = {
    "Llama-3.2-1B": LlamaConfig(**_LLAMA, hidden_size=2048, num_hidden_layers=16, num_attention_heads=32),
    "Llama-3.2-3B": LlamaConfig(**_LLAMA, hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--llm", help="language model as of `elm sft`; default: the quickstart's small one")
    parser.add_argument(
        "--encoder", help="merl, mlae, mtae or st_mem in full size; default: the quickstart's small one"
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")


def make_rows(num_rows: int, seed: int) -> list[dict[str, Any]]:
    return [make_record(index, seed) for index in range(num_rows)]


def llm_of(args: Namespace, folder: str) -> str:
    """--llm, or without it a folder below this one with the quickstart's small language model."""
    if args.llm is not None:
        return args.llm
    path = Path(folder) / "llm"
    save_small_llm(path, [row["messages"] for row in make_rows(960, args.seed)], args.seed)
    return str(path)


def build(args: Namespace) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """An ELM as `elm sft` builds it, on the accelerator if there is one."""
    torch.manual_seed(args.seed)
    argv = ["--data", "simulated", "--output_dir", "unused"]
    with tempfile.TemporaryDirectory() as folder:
        argv += ["--config", str(CONFIG)] if args.llm is None else []
        argv += ["--llm", llm_of(args, folder)]
        if args.encoder is not None:
            argv += ["--encoder", args.encoder, "--encoder_config", "{}"]
        elm_args, _, model_args = sft.parse(argv)
        processor = build_processor(elm_args)
        model = build_model(elm_args, processor, dtype=model_args.dtype)
    model.to(DEVICE)
    size = sum(parameter.numel() for parameter in model.parameters())
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{size / 1e6:.1f} million parameters, {where}, torch {torch.__version__}", flush=True)
    return model, processor


def seconds(work: Callable[[], None]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(works: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each work, after one that does not count.

    Each round does every work once, every second round backwards: what else the machine does hurts all alike.
    """
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for index in range(repeats):
        for name in list(works)[:: -1 if index % 2 else 1]:
            times[name].append(seconds(works[name]))
    return {name: statistics.median(values) for name, values in times.items()}
