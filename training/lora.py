"""Which parts of an ELM are trained, in full or by LoRA."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D
from trl import ModelConfig, get_peft_config

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.arguments import ELMArguments
from elm_ecg.training.command_line import did_you_mean


def keep_statistics(model: nn.Module) -> None:
    """Batch norm goes by the statistics that it has, as where answers are written: with those of a batch, which has several answers to one
    ECG, it would be another model than the one that is compared."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


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


def set_precision(model: ELMForConditionalGeneration, update: list[str], use_peft: bool, dtype: torch.dtype) -> None:
    """Puts what is trained in full into float32, as small steps are lost in 16 bits, and what is frozen into `dtype`.

    The statistics of batch norm stay in float32, and with them its weights.

    Args:
        use_peft: of the language model only an adapter is trained, which PEFT keeps in float32 itself.
    """
    elm = model.model
    llm_in_full = "llm" in update and not use_peft
    parts = [
        (elm.encoder, "encoder" in update),
        (elm.connector, True),  # small, whether it is trained or not
        (elm.signal_embeddings, True),
        (elm.language_model, llm_in_full),
        (model.lm_head, llm_in_full),
    ]
    for part, trained in parts:
        for module in () if part is None else part.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                continue
            # of a language model the weights alone: its rotary frequencies are in float32
            buffers = () if part is elm.language_model else module.buffers(recurse=False)
            for tensor in (*module.parameters(recurse=False), *buffers):
                if tensor.is_floating_point():  # quantized ones are not
                    tensor.data = tensor.data.to(torch.float32 if trained else dtype)


def lora_config(
    args: ELMArguments, model_args: ModelConfig, model: ELMForConditionalGeneration, token_ids: Sequence[int] = ()
) -> LoraConfig:
    """LoRA on the language model's linear layers; connector and encoder, where updated, and the embeddings of symbolic ECGs are
    trained in full.

    Of a new ELM the adapter holds all parts that are not pretrained, the frozen ones too (`freeze_new_parts`): its base, which
    runs share, is made of pretrained weights.

    Args:
        token_ids: of words whose rows in embeddings and head are trained too.
    """
    if "llm" not in args.update:
        raise ValueError(f"--peft adapts the language model, but --update is {' '.join(args.update)}; add llm to it.")
    modules, parameters = ([name for name, _ in pairs] for pairs in (model.named_modules(), model.named_parameters()))
    # of one name TRL makes a text, which PEFT takes for a regex of whole names
    targets: str | list[str] | None = model_args.lora_target_modules
    if targets in (None, "all-linear"):
        targets = linear_layers(model.model.language_model)
    elif isinstance(targets, str) and not any(re.fullmatch(targets, name) for name in modules):
        targets = [targets]
    if isinstance(targets, list):  # a regex: the encoder may have such names too
        _check_ends("--lora_target_modules", targets, [name for name, _ in model.model.language_model.named_modules()])
        targets = rf".*language_model\..*\.({'|'.join(map(re.escape, targets))})"
    _check_ends("--lora_target_parameters", model_args.lora_target_parameters or [], parameters)
    _check_ends("--lora_modules_to_save", model_args.lora_modules_to_save or [], modules)
    kept = {*args.update, "signal_embeddings"}
    if model_args.model_name_or_path is None:
        kept |= {"connector"} if args.encoder_name_or_path is not None else {"connector", "encoder"}
    parts = [
        f"model.{name}"
        for name in ("encoder", "connector", "signal_embeddings")
        if name in kept and getattr(model.model, name) is not None
    ]
    # PEFT compares the ends of names, and many a backbone has a part that is called encoder too
    if inner := [name for name, _ in model.named_modules() if name.endswith(tuple(parts)) and name not in parts]:
        raise ValueError(
            f"--update encoder with LoRA: PEFT cannot tell the encoder from its part {inner[0]}. Train it without --use_peft, "
            "leave encoder out of --update, or take --image_features patches."
        )
    whole = [name for name in modules if any(name.startswith(f"{part}.") for part in parts)]
    # PEFT skips them
    if adapted := [name for name in whole if isinstance(targets, str) and re.fullmatch(targets, name)]:
        part = adapted[0].split(".")[1]
        raise ValueError(
            f"--lora_target_modules {targets} names {adapted[0]}, of the {part}, which the adapter holds whole, as it is new or trained "
            f"in full. Leave the {part} out of the expression; only a pretrained encoder that --update does not name can be adapted."
        )
    changes: dict[str, Any] = {
        "use_peft": True,
        "lora_target_modules": targets,
        # `or` binds last: None for no module
        "lora_modules_to_save": parts + (model_args.lora_modules_to_save or []) or None,
    }
    config = get_peft_config(replace(model_args, **changes))
    assert isinstance(config, LoraConfig)
    layers = {name: layer for name, layer in _linear(model) if isinstance(targets, str) and re.fullmatch(targets, name)}
    _check_not_shared(layers, model.model.language_model)
    if token_ids:
        embeddings = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        # PEFT follows weights that are tied
        places = [embeddings] if model.config.tie_word_embeddings else [embeddings, "lm_head"]
        config.trainable_token_indices = {place: list(token_ids) for place in places}
    # PEFT finds it out too, and warns
    config.fan_in_fan_out = any(isinstance(layer, Conv1D) for layer in layers.values())
    return config


def linear_layers(language_model: nn.Module) -> str:
    """A regular expression of the names in an ELM of all linear layers of its language model, for `target_modules` of LoRA.

    It has the ends of their names, and of a layer that is a number in a list, the name of that list.
    """
    ends = set()
    for name, _ in _linear(language_model):
        parts = name.split(".")
        first = max(place for place, part in enumerate(parts) if not part.isdigit())
        ends.add(r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts[first:]))
    return rf".*language_model\..*\.({'|'.join(sorted(ends))})"


def _linear(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of linear layers; Conv1D is that of GPT-2."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D))


def _check_not_shared(layers: dict[str, Any], language_model: nn.Module) -> None:
    """ValueError if two of the layers have one weight, as in Zamba2: an adapter of each could not be merged into it."""
    first: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        if (other := first.setdefault(layer.weight, name)) != name:
            uses = Counter(layer.weight for _, layer in _linear(language_model))
            own = sorted(
                {name.rpartition(".")[2] for name, layer in _linear(language_model) if uses[layer.weight] == 1}
            )
            raise ValueError(
                f"--use_peft: {other} and {name} of this language model share their weight, into which an adapter of each cannot be "
                f"merged. Name other layers: --lora_target_modules {' '.join(own)}."
            )


def adapt_quantized(model: ELMForConditionalGeneration, config: LoraConfig, bits: int) -> PeftModel:
    """The model with a new adapter on its language model, which is quantized to 4 or 8 `bits`.

    PEFT asks the whole model whether it is quantized. TRL does so too, and would then train in bfloat16 all that is trained, the
    parts that are trained in full among it: so the answer is given to PEFT alone.

    On CPUs with AVX512-BF16 a 4-bit layer of bitsandbytes repacks its weights when it is asked without gradients, and no gradient goes
    through it from then on (0.50.2): they are packed back, and stay so. With nested quantization its scales move a little by that.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # packs back in place
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # of a layer, which says of no attribute what it is
    setattr(model, f"is_loaded_in_{bits}bit", True)
    adapted = get_peft_model(model, config)
    setattr(model, f"is_loaded_in_{bits}bit", False)
    assert isinstance(adapted, PeftModel)
    return adapted


def complete_head(model: Any) -> None:
    """Gives the head of an adapted model the bias that TRL looks for: PEFT's wrapper of a head of which some rows are trained lacks it."""
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        object.__setattr__(head, "bias", head.original_module.bias)  # not as a parameter, which it is there


def freeze_new_parts(model: nn.Module, update: list[str]) -> None:
    """Freezes again what the adapter holds of encoder and connector though `update` does not name it: PEFT trains all that it saves."""
    for name, parameter in model.named_parameters():
        if any(f".model.{part}." in name and part not in update for part in ("encoder", "connector")):
            parameter.requires_grad_("lora_" in name and parameter.requires_grad)


def _check_ends(option: str, ends: list[str], names: list[str]) -> None:
    """ValueError for what is the end of no name, which PEFT would leave out without a word."""
    for end in ends:
        if not any(f".{name}".endswith(f".{end}") for name in names):
            near = did_you_mean(end, (name.rpartition(".")[2] for name in names))
            raise ValueError(f"{option} {end}: nothing in the model is called so.{near}")
