"""A saved ELM or LoRA adapter, checked as it is loaded."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from transformers import PreTrainedModel

from elm_ecg.modeling_common import some_of
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.base_models import find_base
from elm_ecg.training.chat_templates import stop_at_end_of_turn
from elm_ecg.training.digest import OPTIONS_FILE, base_of_adapter, shared_bases
from elm_ecg.training.files import read_json
from elm_ecg.training.model_files import (
    check_config,
    check_finite,
    check_processor,
    check_weights,
    loading,
    model_folder,
)

logger = logging.getLogger(__name__)

SMALL_MODEL = 5_000_000  # parameters


def limit_threads(model: PreTrainedModel, device: torch.device) -> None:
    """One thread for a small model on the CPU, unless OMP_NUM_THREADS is set: its operations are so short that threads
    wait for each other longer than they work."""
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ or model.num_parameters() >= SMALL_MODEL:
        return
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        print("A model this small runs on one thread; OMP_NUM_THREADS sets another number.", flush=True)


def load_elm(
    name_or_path: str, revision: str = "main", trust_remote_code: bool = False, **model_kwargs: Any
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """A saved ELM and its processor; a LoRA adapter is loaded on its base model and merged into it.

    Args:
        name_or_path: Hub id, or local folder of an ELM or of an adapter.
        trust_remote_code: run the code of an encoder or connector that is neither of this project nor of transformers.
        model_kwargs: for `from_pretrained` (`dtype`, `attn_implementation`, `device_map`, ...). All is in one dtype.

    Raises:
        ValueError: as `find_model_file`; or files are damaged, or do not go together, or hold too few weights, or NaN.
    """
    folder, filename = model_folder(name_or_path, ["adapter_config.json", "config.json"], revision)
    label = f"The model {name_or_path}"
    if filename == "config.json":
        model = load_whole(folder, label, trust_remote_code, **model_kwargs)
    else:
        model = _load_adapted(folder, label, trust_remote_code, **model_kwargs)
    processor = load_processor(folder, label, model)
    with loading(folder, label):
        stop_at_end_of_turn(model, processor)  # an adapter's base may have been built for another chat template
    return model, processor


def load_processor(folder: Path, label: str, model: ELMForConditionalGeneration) -> ELMProcessor:
    """The processor of a model's folder, or of an adapter's, which has one too (ValueError: it does not go with the model)."""
    with loading(folder, label):
        # without the last, transformers asks on standard input whether its code may run
        processor = ELMProcessor.from_pretrained(folder, trust_remote_code=False)
        check_processor(processor, model.config)
    return processor


def warn_if_untuned(processor: ELMProcessor) -> None:
    """Logs a warning of a model that has learnt reports alone, before it is asked or trained by rewards."""
    if processor.train_phase == "pretrain":
        logger.warning(
            "The model has learnt reports alone (--train_phase pretrain) and was never fine-tuned on chats, so it hardly answers questions: "
            "fine-tune it first, `elm sft --model_name_or_path MODEL --data CHATS`."
        )


def load_whole(folder: Path, label: str, trust_remote_code: bool, **model_kwargs: Any) -> ELMForConditionalGeneration:
    """The model of a folder that holds all of it (ValueError: as `load_elm`)."""
    model_kwargs |= {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    with loading(folder, label):
        check_config(folder, trust_remote_code)
        model, info = ELMForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **model_kwargs)
        if unexpected := sorted(info["unexpected_keys"]):
            raise ValueError(
                f"its weights hold {some_of(unexpected)}, for which the model of config.json has no place."
            )
        check_finite(model.state_dict(), "it")
    return model


def _load_adapted(
    folder: Path, label: str, trust_remote_code: bool, **model_kwargs: Any
) -> ELMForConditionalGeneration:
    base_folder, base_label = base_folder_of(folder, label, trust_remote_code)
    base = load_whole(base_folder, base_label, trust_remote_code, **model_kwargs)
    adapted = with_adapter(base, folder, label)
    with loading(folder, label):
        return _merged(adapted)


def base_folder_of(folder: Path, label: str, trust_remote_code: bool) -> tuple[Path, str]:
    """The folder of an adapter's base, and how errors call it (ValueError: the adapter names none, or it is not there)."""
    with loading(folder, label):
        config = PeftConfig.from_pretrained(str(folder))
        if not isinstance(config.base_model_name_or_path, str):
            raise ValueError(
                f"adapter_config.json does not name its base model (base_model_name_or_path is {config.base_model_name_or_path})."
            )
    base_path = _base_of(folder, trust_remote_code)
    base_folder, _ = model_folder(base_path, ["config.json"], config.revision or "main", "The adapter's base")
    return base_folder, f"The adapter's base {base_path}"


def with_adapter(
    model: ELMForConditionalGeneration | PeftModel, folder: Path, label: str, name: str = "default"
) -> PeftModel:
    """A base model with an adapter in it, or one more beside those that it has.

    Args:
        name: by which PEFT knows the adapter.

    Raises:
        ValueError: the adapter is damaged, or belongs to another base.
    """
    # PEFT uses a name that transformers is about to change
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    with loading(folder, label), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
        # on the meta device none is copied
        warnings.filterwarnings("ignore", "(?s).*copying from a non-meta parameter")
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise ValueError(f"it has no {weights.name}, the weights of the adapter.")
        try:
            if isinstance(model, PeftModel):
                model.load_adapter(folder, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        except KeyError as error:  # of a module that is saved whole
            raise ValueError(f"{weights.name} is not complete: it lacks {error.args[0]}.") from error
        with safe_open(weights, "pt") as file:
            saved = set(file.keys())
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        if lacking := sorted(expected.keys() - saved):
            raise ValueError(f"{weights.name} is not complete: it lacks {some_of(lacking)}.")
        if unexpected := sorted(saved - expected.keys() - model.state_dict().keys()):
            raise ValueError(
                f"{weights.name} holds {some_of(unexpected)}, for which its base {model.peft_config[name].base_model_name_or_path} has no "
                "place."
            )
        check_weights(folder, expected)
        check_finite(expected, "it")
        return model


def _base_of(folder: Path, trust_remote_code: bool) -> str:
    """`base_of_adapter`, made again if it is gone from where runs share it."""
    base, options = base_of_adapter(folder), folder / OPTIONS_FILE
    if Path(base).exists() or Path(base).parent != shared_bases() or not options.is_file():
        return base
    recipe = read_json(options)["base"]
    logger.warning("The adapter's base is not in %s; it is made again of %s.", base, recipe["llm"]["place"])
    with loading(folder, f"The base of the adapter {folder}"):
        processor = ELMProcessor.from_pretrained(folder, trust_remote_code=False)
        return str(find_base(recipe, processor, trust_remote_code))


def _merged(model: PeftModel) -> ELMForConditionalGeneration:
    """The base model with the adapter in it, all in the base's dtype, to which each weight is rounded once: sums are in float32."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            base: Any = layer.get_base_layer()
            weight = next(base.parameters())
            if not weight.is_meta:  # those are elsewhere, and merged below
                dtype = weight.dtype
                base.to(torch.float32)
                layer.merge()  # type: ignore[operator]
                base.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        merged: Any = model.merge_and_unload()  # what is saved whole takes its place
    for part in (merged.model.encoder, merged.model.connector, merged.model.signal_embeddings):
        if part is not None:
            part.to(merged.dtype)  # they were trained in float32
    return merged
