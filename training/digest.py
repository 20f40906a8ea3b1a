"""By which content a model is known again: digests of a saved model, and of one in memory with its processor."""

import hashlib
import json
import os
import tempfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HOME
from tqdm import tqdm

from elm_ecg.training.files import read_json

# what loading a model reads, and so what is shared of it; not its card, its results, or what training left beside
MODEL_FILES = ["config.json", "generation_config.json", "adapter_config.json", "processor_config.json"]
MODEL_FILES += ["preprocessor_config.json"]
MODEL_FILES += ["model*.safetensors", "model*.safetensors.index.json", "adapter_model.safetensors", "ecg_byte.json"]
MODEL_FILES += ["chat_template.jinja", "additional_chat_templates/*.jinja", "tokenizer.json", "tokenizer_config.json"]
MODEL_FILES += ["special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model"]
CODE_FILES = ["*.py"]
OPTIONS_FILE = "training_options.json"  # what the training run of a model was begun with
PROGRESS_FROM = 2**30  # bytes: reading fewer takes no time


def files_of_model(folder: Path) -> list[Path]:
    """The files of a saved model or adapter that loading it reads, sorted; of an adapter without those of its base."""
    patterns = [*MODEL_FILES, *CODE_FILES]
    paths = [path for path in [*folder.glob("*"), *folder.glob("additional_chat_templates/*")] if path.is_file()]
    return sorted(path for path in paths if any(fnmatchcase(_name(path, folder), pattern) for pattern in patterns))


def digest_of_folder(folder: str | Path) -> str:
    """A digest of a saved model: of every file that loading it reads (`files_of_model`), and of an adapter its base too.

    The files' content and names count, not where the folder is. A base on the Hub counts by its commit.

    Args:
        folder: of an ELM or adapter, also one in the Hub's cache (`folder_of`).

    Returns:
        "sha256:" and 64 hexadecimal digits.

    Raises:
        ValueError: it holds no model.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    paths = files_of_model(folder)
    if not any(path.name in ("config.json", "adapter_config.json") for path in paths):
        raise ValueError(
            f"{folder} has no config.json and no adapter_config.json; expected the folder of a saved model."
        )
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, desc="Digest of the model", unit="B", unit_scale=True, disable=total < PROGRESS_FROM) as bar:
        for path in paths:
            if path.name == "adapter_config.json":
                content, base = _adapter(folder)
                digest.update(f"base {base}\n".encode())
                of_file = hashlib.sha256(content).hexdigest()
            else:
                with path.open("rb") as file:
                    of_file = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{_name(path, folder)} {of_file}\n".encode())
            bar.update(path.stat().st_size)
    return f"sha256:{digest.hexdigest()}"


def digest_of_model(model: torch.nn.Module, processor: Any) -> str:
    """A digest of a model in memory: its weights and buffers with their names and types, its configurations, and all that its
    processor saves.

    It is not that of the folder where the same model is saved, and begins otherwise: "memory:sha256:".

    Args:
        model: an ELM, on any device.
        processor: its `ELMProcessor`.
    """
    digest = hashlib.sha256()
    for name in ("config", "generation_config"):
        fields = getattr(model, name).to_dict()
        digest.update(json.dumps(_without_names(fields), sort_keys=True, default=str).encode())
    tensors = model.state_dict()
    total = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=total, desc="Digest of the model", unit="B", unit_scale=True, disable=total < PROGRESS_FROM) as bar:
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            values = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(values.view(torch.uint8).numpy())  # NumPy knows no bfloat16
            bar.update(tensor.nbytes)
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        for path in files_of_model(Path(folder)):
            digest.update(f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return f"memory:sha256:{digest.hexdigest()}"


def folder_of(name_or_path: str, revision: str = "main") -> Path:
    """The folder of a model that was loaded: a local one, or that of its commit in the Hub's cache, whose name is the commit.

    Raises:
        ValueError: it is neither here nor in the cache.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    for name in ("config.json", "adapter_config.json"):
        path = try_to_load_from_cache(name_or_path, name, revision=revision)
        if isinstance(path, str):  # not None, nor _CACHED_NO_EXIST
            return Path(path).parent
    raise ValueError(f"{name_or_path} is no folder here, and not in the Hub's cache at the revision {revision}.")


def shared_bases() -> Path:
    """Where bases of adapters lie that runs share: `ELM_BASE_MODELS`, by default below `HF_HOME`."""
    return Path(os.environ.get("ELM_BASE_MODELS") or Path(HF_HOME) / "elm_ecg" / "base_models").absolute()


def base_of_adapter(folder: Path) -> str:
    """What an adapter is loaded on: a local folder, which one that was moved has as `base_model`, its checkpoints beside them, or a Hub id.

    Of an adapter that came from another machine it is the folder in which its base would be here, whether it is there or not.
    """
    base = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "")
    beside, options = folder / "base_model", folder / OPTIONS_FILE
    # its own, wherever the folder is now: at the old place may be that of another adapter
    if beside.is_dir() and (Path(base).name == beside.name or not Path(base).exists()):
        return str(beside)
    of_run = folder.absolute().parent / beside.name
    if folder.absolute().name.startswith("checkpoint-") and of_run.is_dir() and Path(base).name == of_run.name:
        return str(of_run)
    if Path(base).exists():
        return base
    recipe = read_json(options).get("base") if options.is_file() else None
    return base if recipe is None else str(shared_bases() / recipe["name"])


def _adapter(folder: Path) -> tuple[bytes, str]:
    """The configuration of an adapter without the place of its base, and a digest of the base."""
    config = read_json(folder / "adapter_config.json")
    base, revision = base_of_adapter(folder), config.get("revision") or "main"
    rest = {name: value for name, value in config.items() if name not in ("base_model_name_or_path", "revision")}
    content = json.dumps(rest, sort_keys=True).encode()
    if not base:
        raise ValueError(f"{folder / 'adapter_config.json'} names no base_model_name_or_path, so nobody can load it.")
    if Path(base).is_dir():
        if Path(base).resolve() == folder.resolve():
            raise ValueError(f"{folder / 'adapter_config.json'} names its own folder as base_model_name_or_path.")
        return content, digest_of_folder(base)
    if Path(base).is_absolute():
        raise ValueError(f"The adapter's base {base} is not here; load the adapter, which makes it again where it can.")
    try:
        return content, f"{base}@{folder_of(base, revision).name}"  # a commit is a digest of its files
    except ValueError:
        return content, f"{base}@{HfApi().model_info(base, revision=revision).sha}"


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _without_names(value: Any) -> Any:
    """A configuration without the names and places that its parts were loaded from."""
    if isinstance(value, dict):
        dropped = ("_name_or_path", "name_or_path", "_commit_hash")
        return {key: _without_names(part) for key, part in value.items() if key not in dropped}
    return [_without_names(part) for part in value] if isinstance(value, list | tuple) else value
