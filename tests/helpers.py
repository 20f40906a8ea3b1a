"""What several test files share: weights by the golden formula, and processes without the project."""

import math
import os
import subprocess
import sys
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

ROOT = Path(__file__).resolve().parents[1]

# the project is installed editable: without its finder and its folder only what a saved folder holds can be imported
_HIDE_PROJECT = """
import importlib.util, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in f"{{getattr(f, '__module__', '')}} {{f!r}}".lower()]
sys.path[:] = [p for p in sys.path if p not in ("", {root!r}) and "editable" not in p]
assert importlib.util.find_spec("configuration_elm") is None, "the project is still importable"
"""


def golden_state_dict(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The reference's weights, each made from its key by the formula in golden/README.md."""

    def fill(key: str, shape: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        if key.endswith("num_batches_tracked"):
            return torch.zeros(shape)
        if key.endswith("running_var"):
            return 0.5 + torch.rand(shape, generator=generator)
        values = torch.randn(shape, generator=generator)
        if key.endswith("running_mean"):
            return 0.1 * values
        if len(shape) == 1 and key.endswith("weight"):
            return 1 + 0.1 * values
        if len(shape) <= 1:
            return 0.02 * values
        return values / math.sqrt(math.prod(shape[1:]))

    return {key: fill(key, shape) for key, shape in shapes.items()}


def run_isolated(code: str, cwd: str | Path) -> str:
    """Runs `code` in a fresh process that cannot import the project, and returns what it prints.

    `cwd` holds the process' Hugging Face caches too; a process that fails raises with its stderr.
    """
    caches = {"HF_HOME": str(Path(cwd) / "hf_home"), "HF_MODULES_CACHE": str(Path(cwd) / "hf_modules")}
    unset = ("PYTHONPATH", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.run(
        [sys.executable, "-c", _HIDE_PROJECT.format(root=str(ROOT)) + code],
        cwd=cwd,
        env=environment | caches | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"the isolated process ended with {process.returncode}:\n{process.stderr}")
    return process.stdout


# bos, eos and the other control tokens of each family's tokenizer
FAMILIES: dict[str, tuple[str | None, str, list[str]]] = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen2_5": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "gemma2": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "default": ("<s>", "</s>", []),
}


def tiny_tokenizer(family: str = "llama3") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte) with the control tokens of its family."""
    bos, eos, others = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.add_tokens(others, special_tokens=True)
    return fast


def tiny_llm_config(family: str = "llama3", vocab_size: int = 300, **changes) -> PreTrainedConfig:
    """Two layers of width 32, of the family's architecture."""
    shared = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    }
    if family == "qwen2_5":
        return Qwen2Config(**shared | {"tie_word_embeddings": True} | changes)
    if family == "gemma2":
        return Gemma2Config(**shared | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32} | changes)
    return LlamaConfig(**shared | changes)


def save_tiny_llm(folder: Path, family: str = "llama3", **changes) -> Path:
    """A random tiny language model with its tokenizer in a local folder, as `--llm` takes it."""
    tokenizer = tiny_tokenizer(family)
    config = tiny_llm_config(
        family, len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, **changes
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


# arguments of the smallest encoder of each kind, for records of 12 leads x 500 samples
_TINY_TRANSFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "mlp_ratio": 2,
}
_TINY_DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1}
TINY_ENCODERS: dict[str, dict] = {
    "merl": {"block": "basic", "depths": [1, 1], "widths": [8, 16]},
    "mlae": _TINY_TRANSFORMER | _TINY_DECODER,
    "mtae": _TINY_TRANSFORMER | _TINY_DECODER,
    "st_mem": _TINY_TRANSFORMER,
}
