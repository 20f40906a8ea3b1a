"""Configuration of the pretraining of ECG encoders: what is to be learnt, and the parts that serve it alone."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_elm import EncoderSpec

OBJECTIVES = ("masked", "contrastive")
# encoders that read patches, so that some can be hidden; the last has no decoder of its own
MASKED_ENCODERS = ("mlae", "mtae", "st_mem")
NUM_POOL_HEADS = 4  # of the attention that pools an ECG's tokens, as in MERL

if TYPE_CHECKING:
    SubConfig = Any  # once the base class has made it: its class depends on its model_type
else:  # what a caller may pass
    SubConfig = PreTrainedConfig | dict | None


@strict
class ECGPretrainingConfig(PreTrainedConfig):
    """An ECG encoder with what its pretraining needs: a decoder for masked patches, heads and a text encoder for reports.

    Args:
        encoder_config: configuration of the ECG encoder. `masked` needs one of `MASKED_ENCODERS`.
        text_config: configuration of the text encoder, any encoder of transformers; None without reports.
        objectives: `masked`, `contrastive` or both.
        mask_ratio: share of the patches that are masked; of ST-MEM, of each lead's.
        normalize_targets: whether each patch is standardised before it is compared. None: True for patches of time, False for
            the whole leads of MLAE.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads: of ST-MEM's decoder. MLAE and MTAE have theirs
            in the encoder.
        projection_size: width in which ECGs and reports are compared.
        projection_dropout: of the two views of an ECG.
        contrastive_loss: how ECGs and reports are compared: `infonce` (MERL) or `sigmoid` (SigLIP).
        temperature: by which InfoNCE divides similarities.
        text_pooling: what stands for a report: `mean` of its tokens, `cls` (the first token) or the text encoder's `pooler`.
        contrastive_weight: by which the contrastive loss is multiplied where there are both objectives.
        num_encoder_tokens: tokens that the encoder makes of a record, each with a learned position; None: they are counted.
    """

    model_type = "ecg_pretraining"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "encoder_config": EncoderSpec(config_class=AutoConfig, model_type="st_mem"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert", optional=True),
    }

    encoder_config: SubConfig = None
    text_config: SubConfig = None
    objectives: list[str] | tuple[str, ...] = ("masked",)  # JSON has no tuples: loaded ones are lists
    mask_ratio: float = 0.75
    normalize_targets: bool | None = None
    decoder_hidden_size: int = 256
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 4
    projection_size: int = 256
    projection_dropout: float = 0.1
    contrastive_loss: Literal["infonce", "sigmoid"] = "infonce"
    temperature: float = 0.07
    text_pooling: Literal["mean", "cls", "pooler"] = "mean"
    contrastive_weight: float = 1.0
    num_encoder_tokens: int | None = None
    initializer_range: float = 0.02  # standard deviation of new weights

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_ecg_pretraining.ECGPretrainingConfig",
            "AutoModel": "modeling_ecg_pretraining.ECGForPreTraining",
        }
        super().__post_init__(**kwargs)
        if self.normalize_targets is None:
            self.normalize_targets = self.encoder_config.model_type != "mlae"

    def validate_objectives(self) -> None:
        """ValueError for unknown objectives, or parts that do not go with them."""
        objectives = list(self.objectives)
        if not objectives or len(set(objectives)) < len(objectives) or not set(objectives) <= set(OBJECTIVES):
            raise ValueError(f"objectives is {objectives}; expected {' or '.join(OBJECTIVES)}, or each of them once.")
        kind = self.encoder_config.model_type
        if "masked" in objectives and kind not in MASKED_ENCODERS:
            raise ValueError(
                f"The objective masked with a {kind} encoder; it hides patches, so choose an encoder of patches, "
                f"{', '.join(MASKED_ENCODERS)}, or the objective contrastive, which goes with any encoder."
            )
        if ("contrastive" in objectives) != (self.text_config is not None):
            needed = "a text encoder for the reports" if self.text_config is None else "no text encoder"
            raise ValueError(f"The objectives {' and '.join(objectives)} need {needed}: check text_config.")

    def validate_mask(self) -> None:
        """ValueError if no patch would be masked, or none kept."""
        if "masked" not in self.objectives or self.encoder_config.model_type not in MASKED_ENCODERS:
            return
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio is {self.mask_ratio}; expected a share between 0 and 1, such as 0.75.")
        number = mask_shape(self)[-1]
        if num_kept(number, self.mask_ratio) < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio} keeps none of {number} patches; choose a smaller one.")

    def validate_numbers(self) -> None:
        """ValueError for sizes, weights and temperatures that cannot be."""
        for name in ("decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.decoder_hidden_size % 2:
            raise ValueError(
                f"decoder_hidden_size is {self.decoder_hidden_size}; half of a position are sines, half cosines: choose an even one."
            )
        if self.projection_size < 1 or self.projection_size % NUM_POOL_HEADS:
            raise ValueError(
                f"projection_size is {self.projection_size}; expected a multiple of {NUM_POOL_HEADS}, the heads that share it."
            )
        if not 0 <= self.projection_dropout < 1:
            raise ValueError(f"projection_dropout is {self.projection_dropout}; expected at least 0 and below 1.")
        for name in ("temperature", "contrastive_weight"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number.")


def mask_shape(config: ECGPretrainingConfig) -> tuple[int, ...]:
    """The shape of a record's mask: (patches,) of MTAE, (groups of leads,) of MLAE, (leads, patches) of ST-MEM."""
    encoder = config.encoder_config
    match encoder.model_type:
        case "mlae":
            return (encoder.num_leads // encoder.patch_size,)
        case "mtae":
            return (encoder.num_samples // encoder.patch_size,)
        case "st_mem":
            return encoder.num_leads, encoder.num_samples // encoder.patch_size
    raise ValueError(f"A {encoder.model_type} encoder has no patches to mask; expected {', '.join(MASKED_ENCODERS)}.")


def num_kept(number: int, mask_ratio: float) -> int:
    """How many of so many patches are not masked."""
    return int(number * (1 - mask_ratio))


ECGPretrainingConfig.register_for_auto_class()

__all__ = ["ECGPretrainingConfig"]
