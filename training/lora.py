"""Which parts of an ELM are trained, in full or by LoRA."""

import re
from dataclasses import replace
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.arguments import ELMArguments
from elm_ecg.training.command_line import did_you_mean


def freeze(model: ELMForConditionalGeneration, update: list[str]) -> None:
    """Leaves only the named parts (`encoder`, `connector`, `llm`) to be trained."""
    if "encoder" in update and model.model.encoder is None:
        raise ValueError(f"--update encoder: a {model.config.architecture} ELM has no encoder.")
    model.requires_grad_("llm" in update)  # the head too; encoder and connector follow
    if model.model.signal_embeddings is not None:  # the new part of a symbolic ELM, as the connector is of others
        model.model.signal_embeddings.requires_grad_(True)
    for name in ("encoder", "connector"):
        part = getattr(model.model, name)
        if part is not None:
            part.requires_grad_(name in update)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--update {' '.join(update)} leaves nothing to train in a {model.config.architecture} ELM.")


def lora_config(args: ELMArguments, model_args: ModelConfig, model: ELMForConditionalGeneration) -> LoraConfig:
    """LoRA on the language model's linear layers; connector and encoder, where updated, and the embeddings of symbolic ECGs are
    trained in full."""
    if "llm" not in args.update:
        raise ValueError(f"--peft adapts the language model, but --update is {' '.join(args.update)}; add llm to it.")
    modules, parameters = ([name for name, _ in pairs] for pairs in (model.named_modules(), model.named_parameters()))
    # of one name TRL makes a text, which PEFT takes for a regex of whole names
    targets: str | list[str] | None = model_args.lora_target_modules
    if targets in (None, "all-linear"):  # Conv1D is the linear layer of GPT-2
        layers = model.model.language_model.named_modules()
        targets = sorted({name.rsplit(".", 1)[-1] for name, layer in layers if isinstance(layer, nn.Linear | Conv1D)})
    elif isinstance(targets, str) and not any(re.fullmatch(targets, name) for name in modules):
        targets = [targets]
    if isinstance(targets, list):  # a regex: the encoder may have such names too
        _check_ends("--lora_target_modules", targets, [name for name, _ in model.model.language_model.named_modules()])
        targets = rf".*language_model\..*\.({'|'.join(map(re.escape, targets))})"
    _check_ends("--lora_target_parameters", model_args.lora_target_parameters or [], parameters)
    _check_ends("--lora_modules_to_save", model_args.lora_modules_to_save or [], modules)
    parts = [
        f"model.{name}"
        for name in ("encoder", "connector", "signal_embeddings")
        if name in (*args.update, "signal_embeddings") and getattr(model.model, name) is not None
    ]
    # PEFT compares the ends of names, and many a backbone has a part that is called encoder too
    if inner := [name for name, _ in model.named_modules() if name.endswith(tuple(parts)) and name not in parts]:
        raise ValueError(
            f"--update encoder with LoRA: PEFT cannot tell the encoder from its part {inner[0]}. Train it without --use_peft, "
            "leave encoder out of --update, or take --image_features patches."
        )
    changes: dict[str, Any] = {
        "use_peft": True,
        "lora_target_modules": targets,
        # `or` binds last: None for no module
        "lora_modules_to_save": parts + (model_args.lora_modules_to_save or []) or None,
    }
    config = get_peft_config(replace(model_args, **changes))
    assert isinstance(config, LoraConfig)
    return config


def _check_ends(option: str, ends: list[str], names: list[str]) -> None:
    """ValueError for what is the end of no name, which PEFT would leave out without a word."""
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            near = did_you_mean(end, (name.rpartition(".")[2] for name in names))
            raise ValueError(f"{option} {end}: nothing in the model is called so.{near}")
