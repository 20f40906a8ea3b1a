"""Configurations of the ECG encoders, which can also be used alone."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


class ECGEncoderConfig(PreTrainedConfig):
    """What every ECG encoder shares.

    Args:
        num_leads: leads of a record, in the order of the feature extractor's `lead_names`.
        num_samples: samples per lead; 2500 is 10 s at 250 Hz.
        output_size: width of `last_hidden_state`; each encoder has it as a property or in its `attribute_map`.
        paper: what the encoder is called in model cards, and where it is described.
    """

    paper: ClassVar[tuple[str, str]]  # no field, so not in config.json
    modeling_file: ClassVar[str]  # the one that has the model, without .py

    num_leads: int = 12
    num_samples: int = 2500
    initializer_range: float = 0.02  # standard deviation of new weights

    def __post_init__(self, **kwargs: Any) -> None:
        # written into config.json, so that Auto classes find the code that is saved beside the weights
        name = type(self).__name__  # MERLConfig belongs to MERLModel
        kwargs["auto_map"] = {
            "AutoConfig": f"configuration_ecg_encoders.{name}",
            "AutoModel": f"{self.modeling_file}.{name.removesuffix('Config')}Model",
        }
        super().__post_init__(**kwargs)

    def validate_input_shape(self) -> None:
        """ValueError for a record without leads or samples."""
        for name in ("num_leads", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be at least 1.")


class ResNetConfig(ECGEncoderConfig):
    """What the 1-D ResNets share: stages of blocks, whose convolutions have `kernel_size` samples.

    Args:
        block: `bottleneck` (1x1, kernel_size, 1x1, expansion 4: ResNet-50/101/152) or `basic` (twice kernel_size: ResNet-18/34).
        depths: blocks per stage.
        widths: channels of each stage before expansion; the stem has `widths[0]` channels.
        kernel_size: samples of a convolution of the blocks, an odd number.
    """

    modeling_file = "modeling_ecg_resnets"

    block: Literal["bottleneck", "basic"] = "bottleneck"
    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)  # JSON has no tuples: loaded ones are lists
    widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    kernel_size: int = 3

    def validate_stages(self) -> None:
        """ValueError if depths and widths are empty, not as many, or not positive."""
        if not self.depths or len(self.depths) != len(self.widths) or min(*self.depths, *self.widths) < 1:
            raise ValueError(
                f"{type(self).__name__} has depths={list(self.depths)} and widths={list(self.widths)}; give one of each per "
                "stage, all at least 1."
            )

    def validate_kernel_size(self) -> None:
        """ValueError for a kernel that has no middle."""
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                f"{type(self).__name__}.kernel_size is {self.kernel_size} samples; expected an odd number."
            )

    @property
    def output_size(self) -> int:
        """Channels of the last stage, after expansion."""
        return self.widths[-1] * (4 if self.block == "bottleneck" else 1)


@strict  # checks the fields' types and calls each `validate_...` after `__init__`
class MERLConfig(ResNetConfig):
    """1-D ResNet of MERL (Liu et al. 2024, arXiv 2403.06659); the default is its ResNet-101."""

    model_type = "merl"
    paper = ("MERL, a 1-D ResNet", "https://arxiv.org/abs/2403.06659")


@strict
class XResNet1dConfig(ResNetConfig):
    """xresnet1d of the PTB-XL benchmark (Strodthoff et al. 2020, arXiv 2004.13701), after He et al. 2018 (arXiv 1812.01187).

    The default is small, for CPUs: one of 18 layers at half the width, 1.6 million weights. Its xresnet1d101 is `block="bottleneck"`,
    `depths=(3, 4, 23, 3)`, `widths=(64, 128, 256, 512)`.
    """

    model_type = "xresnet1d"
    paper = ("xresnet1d, a 1-D ResNet of the PTB-XL benchmark", "https://arxiv.org/abs/2004.13701")

    block: Literal["bottleneck", "basic"] = "basic"
    depths: list[int] | tuple[int, ...] = (2, 2, 2, 2)
    widths: list[int] | tuple[int, ...] = (32, 64, 128, 256)
    kernel_size: int = 5


class ECGTransformerConfig(ECGEncoderConfig):
    """The pre-norm transformer that MLAE, MTAE and ST-MEM share: head size 64, MLP ratio 4, exact GELU."""

    attribute_map = {"output_size": "hidden_size"}  # config.output_size is config.hidden_size
    modeling_file = "modeling_ecg_transformers"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    head_dim: int = 64  # not hidden_size / heads: the two may differ
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-5


class MaskedAutoencoderConfig(ECGTransformerConfig):
    """MLAE and MTAE: the tokens are the states of the decoder."""

    attribute_map = {"output_size": "decoder_hidden_size"}

    decoder_hidden_size: int = 256
    decoder_num_hidden_layers: int = 4
    decoder_num_attention_heads: int = 4

    def validate_widths(self) -> None:
        """ValueError if a width is odd: half of a position embedding are sines, half cosines."""
        for name in ("hidden_size", "decoder_hidden_size"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; half of it are sines, half cosines: choose an even one."
                )


@strict
class MLAEConfig(MaskedAutoencoderConfig):
    """Masked lead autoencoder: one patch per `patch_size` leads, all of their samples in it."""

    model_type = "mlae"
    paper = ("MaeFE, masked lead autoencoder", "https://doi.org/10.1109/TIM.2022.3228267")

    patch_size: int = 1

    def validate_patches(self) -> None:
        """ValueError if the leads do not make whole patches."""
        if self.patch_size < 1 or self.num_leads % self.patch_size:
            raise ValueError(
                f"MLAEConfig.patch_size is {self.patch_size} leads, which must divide num_leads={self.num_leads}."
            )


def default_patch_size(num_samples: int) -> int:
    """Samples per time patch: the divisor of `num_samples` that gives the number of patches nearest to 32, in [16, 64].

    20, 50, 100, 200 for 500, 1250, 2500, 5000 samples.
    """
    counts = [n for n in range(16, 65) if num_samples % n == 0]
    if not counts:
        raise ValueError(
            f"num_samples={num_samples} cannot be cut into 16 to 64 equal patches; choose another length "
            "or set patch_size yourself."
        )
    return num_samples // min(counts, key=lambda n: abs(n - 32))  # of two counts as near, the lower


class TimePatchConfig(ECGEncoderConfig):
    """What MTAE and ST-MEM share: patches of `patch_size` samples; None takes `default_patch_size`."""

    patch_size: Any = None  # None is replaced at once, so `int | None` would be wrong for all who read it

    def __post_init__(self, **kwargs: Any) -> None:
        if self.patch_size is None:
            self.patch_size = default_patch_size(self.num_samples)
        super().__post_init__(**kwargs)

    def validate_patches(self) -> None:
        """ValueError if a record does not make whole patches."""
        size = self.patch_size
        if not isinstance(size, int) or size < 1 or self.num_samples % size:  # typed Any above, so unchecked
            raise ValueError(
                f"{type(self).__name__}.patch_size is {size!r} samples, which must divide num_samples={self.num_samples}."
            )


@strict
class MTAEConfig(TimePatchConfig, MaskedAutoencoderConfig):
    """Masked time autoencoder: one patch per `patch_size` samples, all leads in it."""

    model_type = "mtae"
    paper = ("MaeFE, masked time autoencoder", "https://doi.org/10.1109/TIM.2022.3228267")


@strict
class STMEMConfig(TimePatchConfig, ECGTransformerConfig):
    """ST-MEM (Na et al. 2024, arXiv 2402.09450): patches of `patch_size` samples of each lead, all in one sequence."""

    model_type = "st_mem"
    paper = ("ST-MEM", "https://arxiv.org/abs/2402.09450")


@strict
class SiglipECGConfig(TimePatchConfig):
    """A SigLIP 2 vision tower (Tschannen et al. 2025, arXiv 2502.14786) over patches of `patch_size` samples, all leads in each.

    The default has the size of SigLIP's base model. The fields of the tower are called as in `SiglipVisionConfig`.
    """

    model_type = "siglip_ecg"
    paper = ("a SigLIP 2 vision tower over time patches", "https://arxiv.org/abs/2502.14786")
    attribute_map = {"output_size": "hidden_size"}
    modeling_file = "modeling_ecg_siglip"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0

    def validate_heads(self) -> None:
        """ValueError if the heads do not divide the width."""
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"SiglipECGConfig.num_attention_heads is {self.num_attention_heads}, which must divide hidden_size={self.hidden_size}."
            )


ENCODER_CONFIGS: dict[str, type[ECGEncoderConfig]] = {
    config.model_type: config
    for config in (MERLConfig, MLAEConfig, MTAEConfig, STMEMConfig, XResNet1dConfig, SiglipECGConfig)
}
for _config in ENCODER_CONFIGS.values():
    _config.register_for_auto_class()

__all__ = ["MERLConfig", "MLAEConfig", "MTAEConfig", "STMEMConfig", "SiglipECGConfig", "XResNet1dConfig"]
