"""Language models: their short names, and where they are loaded from."""

from pathlib import Path

from elm_ecg.training.arguments import ModelArguments
from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.model_files import find_model_file

LLMS = {
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-0.6b-base": "Qwen/Qwen3-0.6B-Base",
    "qwen3-1.7b-base": "Qwen/Qwen3-1.7B-Base",
    "qwen3-4b-base": "Qwen/Qwen3-4B-Base",
    "qwen3-8b-base": "Qwen/Qwen3-8B-Base",
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
    "qwen3.5-2b": "Qwen/Qwen3.5-2B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "qwen3.5-0.8b-base": "Qwen/Qwen3.5-0.8B-Base",
    "qwen3.5-2b-base": "Qwen/Qwen3.5-2B-Base",
    "qwen3.5-4b-base": "Qwen/Qwen3.5-4B-Base",
    "qwen3.5-9b-base": "Qwen/Qwen3.5-9B-Base",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
    "gemma-3-270m-it": "google/gemma-3-270m-it",
    "gemma-3-1b-it": "google/gemma-3-1b-it",
    "gemma-3-4b-it": "google/gemma-3-4b-it",
    "medgemma-4b-it": "google/medgemma-4b-it",
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm3-3b": "HuggingFaceTB/SmolLM3-3B",
}


def resolve_llm(llm: str) -> str:
    """Hub id or local folder of a language model given by its name, id or folder."""
    if llm in LLMS:
        return LLMS[llm]
    if Path(llm).is_dir() or (llm.count("/") == 1 and not llm.startswith((".", "/", "~"))):
        return llm
    raise ValueError(
        f"Unknown --llm {llm!r}; expected {', '.join(LLMS)}, a Hub id such as owner/name, or a local folder."
        f"{did_you_mean(llm, LLMS)}"
    )


def place_of_llm(args: ModelArguments, revision: str = "main") -> str:
    """Where `--llm` is loaded from (ValueError: nowhere)."""
    return find_model_file(resolve_llm(args.llm), ["config.json"], revision, label="--llm")[0]
