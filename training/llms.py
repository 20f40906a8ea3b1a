"""Language models: their short names, and where they are loaded from."""

from pathlib import Path

from elm_ecg.training.arguments import ModelArguments
from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.model_files import find_model_file

LLMS = {
    "llama-3.2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b-instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b-instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5-3b-instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "gemma-2-2b-it": "google/gemma-2-2b-it",
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
