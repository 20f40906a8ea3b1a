"""What the models of encoders and of ELMs share: complete weights, frozen parts, attention implementations."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# the tensors of a batch that hold its ECGs, one row an ECG
ECG_INPUTS = (
    "ecg_values",
    "ecg_lead_mask",
    "pixel_values",
    "pixel_attention_mask",
    "spatial_shapes",
    "encoder_features",
)


class CompleteModel(PreTrainedModel):
    """A model that `from_pretrained` fills wholly: in place of a missing weight transformers would draw a random one."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As of transformers.

        Raises:
            ValueError: a weight is not in the files.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        check_all_loaded(model, info)
        return (model, info) if output_loading_info else model


def check_all_loaded(model: PreTrainedModel, info: dict[str, Any], unread: str | None = None) -> None:
    """ValueError if some of the model's weights were not in its files, so that they are random.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returns beside the model.
        unread: beginning of the names of weights that may be missing, as nothing reads them.
    """
    missing = sorted(name for name in info["missing_keys"] if unread is None or not name.startswith(unread))
    if missing:
        raise ValueError(
            f"{model.name_or_path} is not complete: its files lack {some_of(missing)}. Random numbers would stand there; take a "
            "whole copy of the model."
        )


def some_of(names: list[str]) -> str:
    """At most three of the names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def stay_frozen(part: nn.Module) -> None:
    """Puts back into eval mode what is not trained of a part in training mode.

    A part of which nothing is trained works as in inference, without dropout. Where LoRA adapts a part, its batch norm stays
    frozen: an adapter's file does not hold the running statistics.
    """
    trained = [parameter.requires_grad for parameter in part.parameters()]
    for module in part.modules():
        if not any(trained):
            # gradients go through the language model to the connector: its layers are checkpointed in training mode only
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.training = all([parameter.requires_grad for parameter in module.parameters()] or trained)


@contextmanager
def in_eval_mode(part: nn.Module | None) -> Iterator[None]:
    """All of a part is in eval mode in the block, and behind it as it was; LoRA leaves some modules in eval mode."""
    # setting an attribute of a module takes long, and in evaluation none is in training mode
    training = [] if part is None else [module for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def attention_of(model_class: type[PreTrainedModel], requested: str | None) -> str | None:
    """The attention implementation that was asked of a whole ELM, or None, the encoder's own, where its class lacks it.

    Convolutional encoders have no attention, and a language model may support implementations that its encoder does not.
    """
    supports = {
        "sdpa": model_class._supports_sdpa,
        "flash": model_class._supports_flash_attn,
        "flex": model_class._supports_flex_attn,
    }
    lacking = [name for name, supported in supports.items() if name in (requested or "") and not supported]
    return None if lacking else requested
