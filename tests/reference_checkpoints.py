"""Small checkpoints laid out as the reference's, and `elm convert` on them."""

import json
import pickle
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from elm_ecg.training.sharing.convert import main
from helpers import golden_state_dict

MERGES = ["nn", "nnn", "ab"]
# the ids of a pickle's vocab as a hash table has them: in no order that the ids would tell
ORDER = sorted(range(256 + len(MERGES)), key=lambda token_id: (token_id * 97 + 31) % 259)
FUYU = ["--elm", "patch_elf", "--segment_len", 500]


def run(checkpoint: Path, content, *options) -> dict:
    """The report of `elm convert` on a checkpoint of this content."""
    torch.save(content, checkpoint)
    output_dir = checkpoint.parent / "out"
    main([str(checkpoint), "--output_dir", str(output_dir), *map(str, options)])
    return json.loads((output_dir / "conversion.json").read_text())


def checkpoint_of(weights, prefix=""):
    """As a run of the reference writes it."""
    return {
        "model_state_dict": {prefix + key: tensor for key, tensor in weights.items()},
        "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1e-4}]},
        "epoch": 1,
        "step": 2,
    }


def reference_llm(folder: Path, rows: int) -> PreTrainedModel:
    """A language model with new weights, and so many rows."""
    torch.manual_seed(7)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = rows
    return AutoModelForCausalLM.from_config(config).eval()


def llm_weights(folder, prefix="llm.llm.", rows=None):
    """New weights of the language model under the reference's names, with a row for `<signal>` or with `rows`."""
    rows = AutoConfig.from_pretrained(folder).vocab_size + 1 if rows is None else rows
    return {prefix + key: tensor.clone() for key, tensor in reference_llm(folder, rows).state_dict().items()}


def fuyu(llm, **changes):
    """A whole ELM of 12 x 500 samples in 5 patches."""
    connector = {"projection.weight": [64, 1200], "projection.bias": [64]}
    return llm_weights(llm, **changes) | {
        f"project_layer.{key}": tensor for key, tensor in golden_state_dict(connector).items()
    }


def save_pickle(path: Path) -> Path:
    """A tokenizer of the reference whose vocab stands in `ORDER`."""
    names = {byte: chr(byte) if byte < 128 else f"<{byte}>" for byte in range(256)} | dict(enumerate(MERGES, 256))
    merges = [([ord(symbol) for symbol in merge], token_id) for token_id, merge in enumerate(MERGES, 256)]
    path.write_bytes(pickle.dumps(({token_id: names[token_id] for token_id in ORDER}, merges)))
    return path
