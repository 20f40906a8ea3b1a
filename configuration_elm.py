"""Configurations of the ELM and of the ECG encoders, which can also be used alone."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

# what the processor makes of a record; the latter two are pictures, for vision backbones
REPRESENTATIONS = ("signal", "symbolic", "stacked_signal", "rgb")
IMAGE_REPRESENTATIONS = ("stacked_signal", "rgb")
# what a connector reads of a vision backbone -> the default number of tokens of an ECG (CLIP's 7 x 7 patches, or its embedding)
IMAGE_FEATURES = {"patches": 49, "embedding": 1}
# an encoder and a connector; a connector that reads the record itself; no ECG features beside the text
ARCHITECTURES = ("llava", "fuyu", "text")


class ConnectorSpec(NamedTuple):
    """The architecture of a connector, and how many tokens it makes of an ECG."""

    architecture: str
    num_ecg_tokens: int  # by default
    # which numbers it can make; `patches`: those that cut the record into equal parts
    tokens: Literal["any", "one", "patches"] = "any"


# the first of an architecture is its default
CONNECTORS: dict[str, ConnectorSpec] = {
    "linear": ConnectorSpec("llava", 12),
    "mlp": ConnectorSpec("llava", 12),
    "patch": ConnectorSpec("fuyu", 25, "patches"),
    "conv": ConnectorSpec("fuyu", 25, "patches"),
    "flat": ConnectorSpec("fuyu", 1, "one"),
}


def connectors_of(architecture: str) -> list[str | None]:
    """The connectors of an architecture, its default first; `[None]` for `text`."""
    return [name for name, spec in CONNECTORS.items() if spec.architecture == architecture] or [None]


def default_num_ecg_tokens(
    connector: str | None, representation: str = "signal", image_features: str = "patches"
) -> int:
    """The default number of tokens of an ECG; of a picture it depends on `image_features`."""
    if representation in IMAGE_REPRESENTATIONS:
        return IMAGE_FEATURES[image_features]
    return 1 if connector is None else CONNECTORS[connector].num_ecg_tokens


class ECGEncoderConfig(PreTrainedConfig):
    """What every ECG encoder shares.

    Args:
        num_leads: leads of a record, in the order of the feature extractor's `lead_names`.
        num_samples: samples per lead; 2500 is 10 s at 250 Hz.
        output_size: width of `last_hidden_state`; each encoder has it as a property or in its `attribute_map`.
        paper: what the encoder is called in model cards, and where it is described.
    """

    paper: ClassVar[tuple[str, str]]  # no field, so not in config.json

    num_leads: int = 12
    num_samples: int = 2500
    initializer_range: float = 0.02  # standard deviation of new weights

    def __post_init__(self, **kwargs: Any) -> None:
        # written into config.json, so that Auto classes find the code that is saved beside the weights
        name = type(self).__name__  # MERLConfig belongs to MERLModel
        kwargs["auto_map"] = {
            "AutoConfig": f"configuration_elm.{name}",
            "AutoModel": f"modeling_ecg_encoders.{name.removesuffix('Config')}Model",
        }
        super().__post_init__(**kwargs)

    def validate_input_shape(self) -> None:
        """ValueError for a record without leads or samples."""
        for name in ("num_leads", "num_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{type(self).__name__}.{name} is {getattr(self, name)}; it must be at least 1.")


@strict  # checks the fields' types and calls each `validate_...` after `__init__`
class MERLConfig(ECGEncoderConfig):
    """1-D ResNet of MERL (Liu et al. 2024, arXiv 2403.06659); the default is its ResNet-101.

    Args:
        block: `bottleneck` (1x1, k3, 1x1, expansion 4: ResNet-50/101/152) or `basic` (k3, k3: ResNet-18/34).
        depths: blocks per stage.
        widths: channels of each stage before expansion; the stem has `widths[0]` channels.
    """

    model_type = "merl"
    paper = ("MERL, a 1-D ResNet", "https://arxiv.org/abs/2403.06659")

    block: Literal["bottleneck", "basic"] = "bottleneck"
    depths: list[int] | tuple[int, ...] = (3, 4, 23, 3)  # JSON has no tuples: loaded ones are lists
    widths: list[int] | tuple[int, ...] = (64, 128, 256, 512)

    def validate_stages(self) -> None:
        """ValueError if depths and widths are empty, not as many, or not positive."""
        if not self.depths or len(self.depths) != len(self.widths) or min(*self.depths, *self.widths) < 1:
            raise ValueError(
                f"MERLConfig has depths={list(self.depths)} and widths={list(self.widths)}; give one of each per stage, all at least 1."
            )

    @property
    def output_size(self) -> int:
        """Channels of the last stage, after expansion."""
        return self.widths[-1] * (4 if self.block == "bottleneck" else 1)


class ECGTransformerConfig(ECGEncoderConfig):
    """The pre-norm transformer that MLAE, MTAE and ST-MEM share: head size 64, MLP ratio 4, exact GELU."""

    attribute_map = {"output_size": "hidden_size"}  # config.output_size is config.hidden_size

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


ENCODER_CONFIGS: dict[str, type[ECGEncoderConfig]] = {
    config.model_type: config for config in (MERLConfig, MLAEConfig, MTAEConfig, STMEMConfig)
}


class EncoderSpec(SubConfigSpec):
    """Resolves `encoder_config` by its `model_type`: an ECG encoder of this file or any Hugging Face vision model."""

    def get_config_class(self, model_type: str | None = None) -> type[PreTrainedConfig]:
        """The class of that `model_type`; ValueError if there is none."""
        if model_type in ENCODER_CONFIGS:
            return ENCODER_CONFIGS[model_type]
        if model_type is not None and model_type in CONFIG_MAPPING:
            return CONFIG_MAPPING[model_type]
        raise ValueError(
            f"Unknown encoder model_type {model_type!r}; expected one of {', '.join(ENCODER_CONFIGS)} "
            "or the model_type of a Hugging Face vision model."
        )


if TYPE_CHECKING:
    SubConfig = Any  # once the base class has made it: its class depends on its model_type
else:  # what a caller may pass
    SubConfig = dict | PreTrainedConfig | None


@strict
class ELMConfig(PreTrainedConfig):
    """An ECG-language model: ECG encoder, connector and causal language model.

    Args:
        text_config: configuration of the language model, any Hugging Face causal LLM.
        encoder_config: configuration of the encoder (`llava` only): of an ECG encoder for `signal`, of any Hugging Face vision
            backbone for `stacked_signal` and `rgb`.
        architecture: `llava` (encoder tokens through the connector), `fuyu` (the record straight through the
            connector, no encoder) or `text` (no ECG features: the language model alone, or ECG-Byte tokens).
        connector: one of `CONNECTORS` for llava and fuyu; None for text.
        representation: what the processor makes of a record, one of `REPRESENTATIONS`.
        num_ecg_tokens: placeholder tokens that each ECG takes in the text.
        image_features: what the connector reads of a vision backbone: `patches`, its patch tokens pooled to `num_ecg_tokens`;
            or `embedding`, its pooled vector as in the reference, which takes one token.
        ecg_token_id: id of the placeholder token. It may lie beyond the vocabulary, as an ECG's embeddings take its place.
        first_signal_token_id, num_signal_tokens: ids of the tokens of symbolic ECGs, which follow each other. They are looked up in a
            table of their own, wherever they lie; 0: they are rows of the vocabulary, as in converted models.
        num_leads, num_samples: shape of the record that a fuyu connector reads; an encoder has its own.
        lm_head_bias: whether the head that predicts tokens has a bias, as those of Phi and GPT-J; set where an ELM is built.
    """

    model_type = "elm"
    sub_configs_defaults = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),  # where no model_type is given
        "encoder_config": EncoderSpec(config_class=AutoConfig, model_type="merl", optional=True),
    }

    text_config: SubConfig = None
    encoder_config: SubConfig = None
    architecture: str = "llava"
    connector: str | None = "linear"
    representation: str = "signal"
    num_ecg_tokens: int = 1  # the trainer fills in the connector's own, of `default_num_ecg_tokens`
    image_features: str = "patches"
    ecg_token_id: int | None = None
    first_signal_token_id: int | None = None
    num_signal_tokens: int = 0
    num_leads: int = 12
    num_samples: int = 2500
    lm_head_bias: bool = False
    tie_word_embeddings: bool = False  # any value is replaced below by that of text_config

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_elm.ELMConfig",
            "AutoModelForCausalLM": "modeling_elm.ELMForConditionalGeneration",
            "AutoModelForImageTextToText": "modeling_elm.ELMForConditionalGeneration",  # TRL tries it first
        }
        kwargs["custom_pipelines"] = {  # read by `pipeline()` from the config.json of a Hub repo
            "ecg-question-answering": {
                "impl": "pipeline_elm.ECGQuestionAnsweringPipeline",
                "pt": ["AutoModelForCausalLM"],
                "type": "multimodal",
            }
        }
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings  # transformers reads it of the outer config
        # by name: classes loaded from a Hub repo are not these classes
        if self.encoder_config is not None and self.encoder_config.model_type in ENCODER_CONFIGS:
            self.num_leads, self.num_samples = self.encoder_config.num_leads, self.encoder_config.num_samples

    def validate_choices(self) -> None:
        """ValueError for an unknown architecture, representation, image feature or connector."""
        for name, choices in (
            ("architecture", ARCHITECTURES),
            ("representation", REPRESENTATIONS),
            ("image_features", IMAGE_FEATURES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(choices)}.")
        connectors = connectors_of(self.architecture)
        if self.connector not in connectors:
            expected = " or ".join(map(repr, connectors))
            raise ValueError(
                f"connector={self.connector!r} with architecture={self.architecture!r}; expected {expected}."
            )

    def validate_parts(self) -> None:
        """ValueError if architecture, representation and encoder do not go together."""
        if self.representation == "symbolic" and self.architecture != "text":
            raise ValueError(
                f"architecture={self.architecture!r} with representation='symbolic'; symbolic ECGs are tokens of the text, "
                "which the language model reads alone: expected 'text'."
            )
        if (self.encoder_config is not None) != (self.architecture == "llava"):
            encoder = self.encoder_config
            got = "no encoder_config" if encoder is None else f"a {encoder.model_type} encoder"
            raise ValueError(
                f"architecture={self.architecture!r} with {got}; 'llava' needs an encoder_config, 'fuyu' and 'text' take none."
            )

    def validate_encoder(self) -> None:
        """ValueError if the encoder cannot read the representation, or gives no such features."""
        encoder = self.encoder_config
        if self.image_features == "embedding" and self.representation not in IMAGE_REPRESENTATIONS:
            raise ValueError(
                f"image_features='embedding' with representation={self.representation!r}; only vision backbones have an "
                "embedding: expected 'patches'."
            )
        if encoder is None:
            if self.representation in IMAGE_REPRESENTATIONS and self.architecture == "fuyu":
                raise ValueError(
                    f"architecture={self.architecture!r} with representation={self.representation!r}; pictures of ECGs need a "
                    "vision backbone: expected 'llava'."
                )
            return
        if hasattr(encoder, "vision_config"):  # CLIP as a whole, not its tower
            raise ValueError(
                f"encoder_config is of a {encoder.model_type!r} model, which reads text too; give its vision_config alone."
            )
        is_ecg_encoder = encoder.model_type in ENCODER_CONFIGS
        if is_ecg_encoder == (self.representation in IMAGE_REPRESENTATIONS):
            expected = "a Hugging Face vision backbone" if is_ecg_encoder else f"one of {', '.join(ENCODER_CONFIGS)}"
            raise ValueError(
                f"representation={self.representation!r} with a {encoder.model_type} encoder; expected {expected}."
            )
        if encoder.model_type == "vit_mae":
            raise ValueError(
                "A vit_mae encoder hides and shuffles patches at random, at inference too; choose a backbone that sees the whole "
                "picture, such as vit."
            )

    @property
    def signal_token_ids(self) -> range:
        """Ids of the tokens that have a table of their own."""
        first = self.first_signal_token_id or 0
        return range(first, first + self.num_signal_tokens)

    @property
    def end_of_ecg_ids(self) -> int:
        """The first id that is larger than those of ECGs."""
        return max(self.signal_token_ids.stop, 0 if self.ecg_token_id is None else self.ecg_token_id + 1)

    def validate_signal_tokens(self) -> None:
        """ValueError if the table of tokens is not of symbolic ECGs, or the placeholder is among them."""
        ids = self.signal_token_ids
        if self.num_signal_tokens < 0 or (self.first_signal_token_id is None) != (self.num_signal_tokens == 0):
            raise ValueError(
                f"num_signal_tokens={self.num_signal_tokens} with first_signal_token_id={self.first_signal_token_id}; give both, or "
                "neither where ECGs are no tokens."
            )
        if ids and self.representation != "symbolic":
            raise ValueError(
                f"num_signal_tokens={self.num_signal_tokens} with representation={self.representation!r}; only 'symbolic' ECGs are "
                "tokens of the text."
            )
        if self.ecg_token_id in ids:
            raise ValueError(
                f"ecg_token_id={self.ecg_token_id} is one of the {len(ids)} signal tokens from {ids.start} on; the placeholder is none."
            )

    def validate_tokens(self) -> None:
        """ValueError if the connector cannot make that many tokens, or none has a place in the text."""
        if self.num_ecg_tokens < 1:
            raise ValueError(f"num_ecg_tokens is {self.num_ecg_tokens}; it must be at least 1.")
        if self.architecture != "text" and self.ecg_token_id is None:
            raise ValueError("ecg_token_id is None; give the id of the tokenizer's ECG placeholder token.")
        if self.image_features == "embedding" and self.num_ecg_tokens != 1:
            raise ValueError(f"image_features='embedding' is one token; num_ecg_tokens is {self.num_ecg_tokens}.")
        demanded = "any" if self.connector is None else CONNECTORS[self.connector].tokens
        if demanded == "one" and self.num_ecg_tokens != 1:
            raise ValueError(
                f"The {self.connector} connector makes one token of a record; num_ecg_tokens is {self.num_ecg_tokens}."
            )
        if demanded == "patches" and self.num_samples % self.num_ecg_tokens:
            raise ValueError(
                f"num_ecg_tokens={self.num_ecg_tokens} patches do not divide a record of {self.num_samples} samples."
            )


ELMConfig.register_for_auto_class()
for _config in ENCODER_CONFIGS.values():
    _config.register_for_auto_class()

__all__ = ["ELMConfig", "MERLConfig", "MLAEConfig", "MTAEConfig", "STMEMConfig"]
