"""What several test files share: weights by the golden formula, and processes without the project."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
import zlib
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from venv import EnvBuilder

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, DatasetDict
from openpyxl import Workbook
from packaging.requirements import Requirement
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.image_processing_elm import ECGImageProcessor
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.tokenization_ecg_byte import ECGByteTokenizer
from elm_ecg.training.data.synthetic import make_record
from forks import ROOT, Fork


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


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    """Writes a table in the form that the suffix of its name says; a `.csv` or `.xlsx` has the columns of its first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        case ".xlsx":
            workbook = Workbook()
            for cells in (rows[0], *(row.values() for row in rows)):
                workbook.active.append(list(cells))
            workbook.save(path)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        case _:
            path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def run_isolated(code: str, cwd: str | Path, anew: bool = False) -> str:
    """Runs `code` in a fresh process that cannot import the project, and returns what it prints.

    `cwd` holds the process' Hugging Face caches too; a process that fails raises with its stderr. What the code hides before
    transformers is imported, as `sys.modules["torchvision"] = None`, is hidden only from a process that starts `anew`.
    """
    caches = {"HF_HOME": str(Path(cwd) / "hf_home"), "HF_MODULES_CACHE": str(Path(cwd) / "hf_modules")}
    unset = ("PYTHONPATH", "HF_HUB_CACHE", "TRANSFORMERS_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= caches | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if anew:
        code = f"import sys\nsys.path.append({str(ROOT / 'tests')!r})\nimport forks\nforks.hide_project()\n{code}"
        command = [sys.executable, "-c", code]
        process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    else:
        process = Fork(code, cwd=cwd, environment=environment).finish()
    if process.returncode:
        raise RuntimeError(f"the isolated process ended with {process.returncode}:\n{process.stderr}")
    return process.stdout


def environment_of(packages: list[str], folder: Path) -> Path:
    """A new virtual environment with these of the installed packages, what they require, and nothing else; returns its Python."""
    EnvBuilder(symlinks=True).create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    wanted = [Requirement(name) for name in packages]
    done: set[tuple[str, str]] = set()
    while wanted:
        requirement = wanted.pop()
        for extra in ("", *requirement.extras):
            if (requirement.name.lower(), extra) in done:
                continue
            done.add((requirement.name.lower(), extra))
            package = distribution(requirement.name)
            for text in package.requires or []:
                part = Requirement(text)
                if part.marker is None or part.marker.evaluate({"extra": extra}):
                    wanted.append(part)
            for entry in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
                if not (site / entry).exists():
                    (site / entry).symlink_to(package.locate_file(entry))
    return folder / "bin" / "python"


# bos, eos and the other control tokens of each family's tokenizer
FAMILIES: dict[str, tuple[str | None, str, list[str]]] = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen2_5": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"]),
    "gemma2": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "default": ("<s>", "</s>", []),
}


def tiny_tokenizer(family: str = "llama3", **kwargs) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token a byte) with the control tokens of its family."""
    bos, eos, others = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, **kwargs)
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
    "xresnet1d": {"depths": [1, 1], "widths": [8, 16]},
    "siglip_ecg": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
}

# arguments of the smallest vision backbones, for pictures of 160 x 160 pixels or 16 patches, and their image processors
_TINY_VISION_TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 32}
_TINY_VIT = _TINY_VISION_TRANSFORMER | {"intermediate_size": 32, "image_size": 160}
TINY_VISION: dict[str, dict] = {
    "clip_vision_model": _TINY_VIT | {"projection_dim": 24},
    "siglip2_vision_model": _TINY_VISION_TRANSFORMER | {"intermediate_size": 32, "num_patches": 16},
    "vit": _TINY_VIT,
    "dinov2": _TINY_VISION_TRANSFORMER | {"mlp_ratio": 1, "image_size": 160},
    "resnet": {"layer_type": "basic", "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]},
}
_SIZE = {"height": 160, "width": 160}
_TINY_IMAGE_PROCESSORS: dict[str, dict] = {
    "clip_vision_model": {"image_processor_type": "CLIPImageProcessor", "size": _SIZE, "crop_size": _SIZE},
    "siglip2_vision_model": {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 32, "max_num_patches": 16},
    "vit": {"image_processor_type": "ViTImageProcessor", "size": _SIZE},
    "dinov2": {"image_processor_type": "BitImageProcessor", "size": _SIZE, "crop_size": _SIZE},
    "resnet": {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 160}},
}


def tiny_vision_config(model_type: str, **changes) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**TINY_VISION[model_type] | changes)


def tiny_image_processor(model_type: str, representation: str = "rgb", **changes) -> ECGImageProcessor:
    """The image processor of the tiny vision backbone; `changes` are of its own, such as `max_num_patches`."""
    return ECGImageProcessor(_TINY_IMAGE_PROCESSORS[model_type] | changes, representation)


def tiny_elm_config(
    ecg_part: str | None = "merl", family: str = "llama3", llm: PreTrainedConfig | None = None, **changes
) -> ELMConfig:
    """An ELM for records of 12 leads x 500 samples and a vocabulary of 300, whose last token is the placeholder.

    `ecg_part` is an encoder (with an MLP connector, unless `changes` say otherwise), a connector of fuyu, or None.
    """
    shared = {"text_config": llm or tiny_llm_config(family), "ecg_token_id": 299, "num_ecg_tokens": 4}
    if ecg_part in TINY_ENCODERS:
        encoder_config = ENCODER_CONFIGS[ecg_part](num_samples=500, **TINY_ENCODERS[ecg_part])
        return ELMConfig(**shared | {"encoder_config": encoder_config, "connector": "mlp"} | changes)
    if ecg_part is None:
        return ELMConfig(**shared | {"architecture": "text", "connector": None, "ecg_token_id": None} | changes)
    fuyu = {"architecture": "fuyu", "connector": ecg_part, "num_samples": 500}
    return ELMConfig(**shared | fuyu | ({"num_ecg_tokens": 1} if ecg_part == "flat" else {}) | changes)


def tiny_image_elm_config(model_type: str, representation: str = "rgb", **changes) -> ELMConfig:
    """As `tiny_elm_config`, around a vision backbone with an MLP connector."""
    encoder_config = tiny_vision_config(model_type)
    changes = {"encoder_config": encoder_config, "connector": "mlp", "representation": representation} | changes
    return tiny_elm_config(**changes)


def tiny_processor(family: str = "llama3", num_ecg_tokens: int = 4, **changes) -> ELMProcessor:
    """A processor of records of 2 s at 250 Hz, with the chat template of its family; pads on the left."""
    tokenizer = tiny_tokenizer(family, padding_side="left")
    tokenizer.add_tokens([ELMProcessor.ecg_token], special_tokens=True)
    tokenizer.pad_token = tokenizer.eos_token
    template = (ROOT / "training" / "templates" / f"{family}.jinja").read_text()
    return ELMProcessor(ECGFeatureExtractor(num_samples=500, **changes), tokenizer, template, num_ecg_tokens)


def tiny_image_processor_elm(
    model_type: str, representation: str = "rgb", num_ecg_tokens: int = 4, **changes
) -> ELMProcessor:
    """As `tiny_processor`, for ECGs of 5 s at 100 Hz as pictures; stacked ones are normalized to [0, 1]."""
    normalization = "minmax" if representation == "stacked_signal" else "none"
    changes = {"sampling_rate": 100, "normalization": normalization} | changes
    processor = tiny_processor(num_ecg_tokens=num_ecg_tokens, **changes)
    return ELMProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        processor.chat_template,
        num_ecg_tokens,
        representation,
        tiny_image_processor(model_type, representation),
    )


def tiny_ecg_byte(**settings) -> ECGByteTokenizer:
    """An ECG-Byte tokenizer of 60 merges, trained on four simulated records of 5 s at 100 Hz and a flat one."""
    records = [
        make_record(index, 0, sampling_rate=100, seconds=5.0)["ecg"]["array"] / np.float32(1e3) for index in range(4)
    ]
    records.append(np.zeros_like(records[0]))
    return ECGByteTokenizer.train(records, num_merges=60, sampling_rate=100, show_progress=False, **settings)


def tiny_symbolic_processor(
    family: str = "llama3", ecg_byte: ECGByteTokenizer | None = None, extractor: dict | None = None, **changes
) -> ELMProcessor:
    """As `tiny_processor`, for ECGs of 5 s at 100 Hz as tokens in the text."""
    ecg_byte = ecg_byte or tiny_ecg_byte()
    feature_extractor = ECGFeatureExtractor(**{"sampling_rate": 100, "num_samples": 500} | (extractor or {}))
    tokenizer = tiny_processor(family).tokenizer
    tokenizer.add_tokens(ELMProcessor.signal_tokens(ecg_byte, feature_extractor.lead_names))
    template = (ROOT / "training" / "templates" / f"{family}.jinja").read_text()
    changes = {"num_ecg_tokens": 0, "representation": "symbolic", "ecg_byte": ecg_byte} | changes
    return ELMProcessor(feature_extractor, tokenizer, template, **changes)


def save_tiny_data(folder: Path, without_ecg: int = 0, **sizes: int) -> Path:
    """Simulated records [12 leads, 500 samples] at 100 Hz; every `without_ecg`-th row has no ECG (0: none)."""
    splits = {}
    for split, size in sizes.items():
        rows = [make_record(index, 0, split, sampling_rate=100, seconds=5.0) for index in range(size)]
        for index, row in enumerate(rows):
            if without_ecg and index % without_ecg == 0:
                row["ecg"] = None
            else:
                row["ecg"]["array"] = row["ecg"]["array"].tolist()
        splits[split] = Dataset.from_list(rows)
    DatasetDict(splits).save_to_disk(folder)
    return Path(folder)


def tiny_sft(llm: Path, data: Path, output_dir: Path, *options: str, encoder: str | None = "merl") -> list[str]:
    """Arguments of `elm sft` for a run of seconds; a later option overrides an earlier one."""
    args = ["--llm", str(llm), "--data", str(data), "--output_dir", str(output_dir)]
    args += ["--sampling_rate", "100", "--num_samples", "500", "--use_cpu", "--report_to", "none"]
    args += ["--gradient_checkpointing", "false", "--batch_size", "4", "--lr", "1e-2", "--logging_steps", "1"]
    if encoder is not None:
        args += ["--encoder", encoder, "--encoder_config", json.dumps(TINY_ENCODERS[encoder]), "--num_ecg_tokens", "4"]
    return [*args, "--save_strategy", "no", "--disable_tqdm", "true", *options]


# what `elm evaluate` writes, as far as cards read it
_SHARE = {"unit": "%", "low": 0.0, "high": 1.0, "higher_is_better": True, "decimals": 1}
RESULTS = {
    "schema_version": 4,
    "model": "elm",
    "model_revision": "sha256:0",
    "evaluation": "ecgs-test-generation-01234567",
    "settings": {"score": "generation", "seed": 0},
    "verdict": "Exact match 87.5%, better than all that does without: the model looks at the ECG.",
    "data": {"names": ["ecgs"], "split": "test", "fold": 2, "fingerprint": "0"},
    "num_questions": 40,
    "num_patients": 20,
    "metrics": {"exact_match": {"title": "exact match", **_SHARE}, "auroc": {"title": "AUROC", **_SHARE}},
    "main_metric": "exact_match",
    "conditions": {
        "ecg": {
            "metrics": {
                "exact_match": {"value": 0.875, "interval_95": [0.8, 0.95]},
                "auroc": {"value": None, "interval_95": None},
            }
        },
        "left_out": {"metrics": {"exact_match": {"value": 0.25, "interval_95": None}}},
        "most_frequent": {"metrics": {"exact_match": {"value": 0.5, "interval_95": None}}},
    },
    "predictions_sha256": "0",
}


def tiny_elm(processor, **changes) -> ELMForConditionalGeneration:
    torch.manual_seed(0)
    return ELMForConditionalGeneration(tiny_elm_config(ecg_token_id=processor.ecg_token_id, **changes)).eval()


def save_record(path: Path, seconds: float = 2.0, leads=STANDARD_LEADS, seed: int = 0) -> Path:
    """Walks at 500 Hz, in millivolts; of the limb leads I and II are free."""
    rows = dict(
        zip(leads, np.random.default_rng(seed).normal(0, 0.02, (len(leads), round(500 * seconds))), strict=True)
    )
    rows = {name: row.cumsum() for name, row in rows.items()}
    if len(leads) == 12:
        one, two = rows["I"], rows["II"]
        rows |= {"III": two - one, "aVR": -(one + two) / 2, "aVL": one - two / 2, "aVF": two - one / 2}
    array = np.stack([rows[name] for name in leads]).astype(np.float32)
    np.savez(path, array=array, sampling_rate=500, lead_names=leads, unit="mV")
    return path


def losses(folder: Path) -> list[float]:
    """Training losses of every logged step."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


def fork_project(code: str, *arguments: str, **environment: str) -> Fork:
    """`code` in a fresh process in the repository's folder, which does not reach the Hub."""
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return Fork(code, *arguments, cwd=ROOT, environment=os.environ | environment, project=True)


def fork_two(code: str, *arguments: str) -> list[Fork]:
    """`code` in two processes at once, which know of each other as those of `torchrun --nproc_per_node 2` do."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [fork_project(code, *arguments, **shared, RANK=rank, LOCAL_RANK=rank) for rank in "01"]


def every_pair(first: Sequence, second: Sequence, third: Sequence) -> list[tuple]:
    """Triples in which each value meets each one of the other two lists, of which none is shorter than the third."""
    return [(a, b, third[(i + j) % len(third)]) for i, a in enumerate(first) for j, b in enumerate(second)]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
