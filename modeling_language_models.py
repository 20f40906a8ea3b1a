"""Language models of transformers as part of an ELM: the text part of those that read more, and what their heads do."""

import os
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from .modeling_common import check_all_loaded


def load_language_model(llm: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A pretrained language model with its head; of one that reads pictures or sounds too, its text part alone.

    Args:
        llm: Hub id or local folder.
        kwargs: for `from_pretrained` (`dtype`, `revision`, `attn_implementation`, ...).

    Raises:
        ValueError: it is no causal language model, or its weights are not complete.
        ImportError: it needs a package that is not installed.
    """
    # code beside the weights could not be saved with the ELM; transformers would ask on standard input whether to run it
    kwargs = {"trust_remote_code": False} | kwargs
    revision = kwargs.get("revision") or "main"
    config = AutoConfig.from_pretrained(llm, revision=revision, trust_remote_code=kwargs["trust_remote_code"])
    text_config = config.get_text_config()
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        model_class = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        raise ValueError(f"{llm} holds a {config.model_type!r} model, which writes no text; expected a causal LLM.")
    if text_config is config:
        model_class = AutoModelForCausalLM
    elif model_class.config_class is type(text_config):  # AutoModelForCausalLM takes the text part
        text_config.tie_word_embeddings |= config.tie_word_embeddings
        model_class, kwargs["config"] = AutoModelForCausalLM, config
    else:
        model_class = _without_towers(model_class)
        if isinstance(kwargs.get("attn_implementation"), str):  # what the towers support does not matter
            kwargs["attn_implementation"] = {"text_config": kwargs["attn_implementation"]}
    try:
        loaded: Any = model_class.from_pretrained(llm, output_loading_info=True, **kwargs)
    except ImportError as error:  # of a tower, which is made before it is left out; Gemma 3n's is of timm
        raise ImportError(f"{llm} cannot be loaded: {' '.join(str(error).split())}") from error
    model, info = loaded
    check_all_loaded(model, info)
    of_text = model.config.get_text_config()
    if getattr(of_text, "hidden_size_per_layer_input", None) and of_text.pad_token_id is None:
        of_text.pad_token_id = 0  # Gemma 4 reads it in place of pictures, and fails on a text alone without it
    return model


def _without_towers(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class without all that is not its language model: `from_pretrained` makes modules without memory, and leaves weights in
    the file that have no place."""

    class TextPart(model_class):  # type: ignore[misc, valid-type]
        # transformers looks up by the name of class and module how a file's weights are called
        __module__ = model_class.__module__

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            others = [name for name, child in self.base_model.named_children() if child is not self.get_decoder()]
            for name in others:
                delattr(self.base_model, name)
            self._keys_to_ignore_on_load_unexpected = {rf"(^|\.){name}\." for name in others}

    TextPart.__name__ = model_class.__name__
    return TextPart


def without_head(llm: PreTrainedModel) -> nn.Module:
    """The language model without the head that predicts tokens."""
    return llm.base_model if llm.config.get_text_config() is llm.config else llm.get_decoder()


def logit_scale(config: PreTrainedConfig) -> float:
    """What a language model multiplies its logits by, before a soft cap.

    Each family has a name of its own for it. TRL's fused head reads the same ones, in the same order.
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale = getattr(config, name, None)
        if scale is not None:
            return scale
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling
