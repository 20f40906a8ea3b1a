"""Small checkpoints laid out as the reference's, and `elm convert` on them."""

import json
import pickle
import re
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


def shrunk(shapes):
    """Shapes of the same encoder with one block of width 64 (its decoder's too), as numbers of the formula."""
    sizes = {768: 64, 2304: 192, 3072: 256, 256: 64, 1024: 256}
    patches = {"to_patch_embedding.1", "to_patch_embedding.2"}
    small = {}
    for key, shape in shapes.items():
        if re.search(r"(block|blocks\.)[1-9]", key):
            continue
        last = shape[-1:] if any(f"{name}." in key for name in patches) and shape[-1:] != [768] else []
        small[key] = [sizes.get(size, size) for size in shape[: len(shape) - len(last)]] + last
        if "to_qkv" in key:
            small[key][0] = 192
    return golden_state_dict(small)


def basic_merl():
    """A small ResNet of basic blocks in the reference's layout."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    shapes = {"resnet.conv1.weight": [8, 12, 7]}
    shapes |= {f"resnet.bn1.{name}": [] if "tracked" in name else [8] for name in norm}
    for conv in (1, 2):
        shapes[f"resnet.layer1.0.conv{conv}.weight"] = [8, 8, 3]
        shapes |= {f"resnet.layer1.0.bn{conv}.{name}": [] if "tracked" in name else [8] for name in norm}
    return golden_state_dict(shapes)
