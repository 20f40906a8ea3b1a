"""Configuration of the ELM: encoder, connector and language model."""

import re
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_ecg_encoders import ENCODER_CONFIGS, MERLConfig, MLAEConfig, MTAEConfig, STMEMConfig

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
    "perceiver": ConnectorSpec("llava", 32),
    "patch": ConnectorSpec("fuyu", 25, "patches"),
    "conv": ConnectorSpec("fuyu", 25, "patches"),
    "flat": ConnectorSpec("fuyu", 1, "one"),
}
# one's own class: it may be of any architecture that has a connector
OWN_CONNECTOR = ConnectorSpec("", 12)


def is_own_connector(connector: Any) -> bool:
    """Whether the name is that of somebody's own class, `module.Class`."""
    return isinstance(connector, str) and re.fullmatch(r"[^\W\d]\w*\.[^\W\d]\w*", connector) is not None


def connectors_of(architecture: str) -> list[str | None]:
    """The connectors of an architecture, its default first; `[None]` for `text`."""
    return [name for name, spec in CONNECTORS.items() if spec.architecture == architecture] or [None]


def default_num_ecg_tokens(
    connector: str | None, representation: str = "signal", image_features: str = "patches"
) -> int:
    """The default number of tokens of an ECG; of a picture it depends on `image_features`."""
    if representation in IMAGE_REPRESENTATIONS:
        return IMAGE_FEATURES[image_features]
    if connector is None:
        return 1
    return CONNECTORS.get(connector, OWN_CONNECTOR).num_ecg_tokens


def reads_pictures(encoder_config: PreTrainedConfig) -> bool:
    """Whether an encoder is a vision backbone of transformers; all others, ours and one's own, read records."""
    return type(encoder_config).__module__.startswith("transformers.")


class OwnEncoderConfig(PreTrainedConfig):
    """The fields of somebody's own encoder, as config.json has them, until its code is loaded (see `own_code`).

    Reading a configuration runs no code: `from_pretrained` of the model does, if it is asked to.
    """

    def to_dict(self) -> dict[str, Any]:
        """As of transformers, with the own `model_type`, which is no class's."""
        return super().to_dict() | {"model_type": self.model_type}


def is_unread(encoder_config: Any) -> bool:
    """Whether it is an `OwnEncoderConfig`, by name: classes loaded from a Hub repo are not these classes."""
    return type(encoder_config).__name__ == OwnEncoderConfig.__name__


class EncoderSpec(SubConfigSpec):
    """Resolves `encoder_config` by its `model_type`: an ECG encoder of this project, any model that transformers knows, which may
    be one that somebody has registered with `AutoConfig`, or else one's own."""

    def get_config_class(self, model_type: str | None = None) -> type[PreTrainedConfig]:
        """The class of that `model_type`."""
        if model_type in ENCODER_CONFIGS:
            return ENCODER_CONFIGS[model_type]
        if model_type is not None and model_type in CONFIG_MAPPING:
            return CONFIG_MAPPING[model_type]
        return OwnEncoderConfig


if TYPE_CHECKING:
    SubConfig = Any  # once the base class has made it: its class depends on its model_type
else:  # what a caller may pass
    SubConfig = PreTrainedConfig | dict | None


@strict
class ELMConfig(PreTrainedConfig):
    """An ECG-language model: ECG encoder, connector and causal language model.

    Args:
        text_config: configuration of the language model, any Hugging Face causal LLM.
        encoder_config: configuration of the encoder (`llava` only): of an ECG encoder for `signal`, which may be one's own, of any
            Hugging Face vision backbone for `stacked_signal` and `rgb`.
        architecture: `llava` (encoder tokens through the connector), `fuyu` (the record straight through the
            connector, no encoder) or `text` (no ECG features: the language model alone, or ECG-Byte tokens).
        connector: one of `CONNECTORS` for llava and fuyu, or `module.Class`, whose code lies beside the weights; None for text.
        connector_config: arguments of the connector beside this configuration, such as of the perceiver {"num_hidden_layers": 2}.
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
    connector_config: dict[str, Any] | None = None
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
        if self.encoder_config is not None and not reads_pictures(self.encoder_config):
            for name in ("num_leads", "num_samples"):  # one's own encoder may read records of any size
                setattr(self, name, getattr(self.encoder_config, name, getattr(self, name)))

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
        if self.connector not in connectors and not (self.architecture != "text" and is_own_connector(self.connector)):
            expected = " or ".join(map(repr, connectors)) + " or one's own, 'module.Class'" * (
                self.architecture != "text"
            )
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
        if is_unread(encoder) and "AutoModel" not in (getattr(encoder, "auto_map", None) or {}):
            raise ValueError(
                f"Unknown encoder model_type {encoder.model_type!r}; expected one of {', '.join(ENCODER_CONFIGS)}, the model_type of a "
                "Hugging Face vision model, or one's own with an auto_map that names its code."
            )
        if reads_pictures(encoder) != (self.representation in IMAGE_REPRESENTATIONS):
            records = f"one of {', '.join(ENCODER_CONFIGS)}, or one's own"
            expected = records if reads_pictures(encoder) else "a Hugging Face vision backbone"
            raise ValueError(
                f"representation={self.representation!r} with a {encoder.model_type} encoder; expected {expected}."
            )
        if encoder.model_type == "vit_mae":
            raise ValueError(
                "A vit_mae encoder hides and shuffles patches at random, at inference too; choose a backbone that sees the whole "
                "picture, such as vit."
            )

    @property
    def encoder_output_size(self) -> int:
        """Width of what the connector reads of the encoder.

        Raises:
            ValueError: the encoder's configuration does not say it.
        """
        encoder: Any = self.encoder_config
        if encoder.model_type == "clip_vision_model" and self.image_features == "embedding":
            return encoder.projection_dim
        for name in ("output_size", "hidden_size"):
            if hasattr(encoder, name):
                return getattr(encoder, name)
        if hasattr(encoder, "hidden_sizes"):  # of the stages of a convolutional backbone
            return encoder.hidden_sizes[-1]
        raise ValueError(
            f"The configuration of a {encoder.model_type!r} model has neither output_size nor hidden_size nor hidden_sizes, so the width of its "
            "tokens is unknown; choose another, such as clip, siglip2, vit, dinov2, convnext or resnet, or give your own encoder's "
            "configuration an output_size."
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
        demanded = CONNECTORS.get(self.connector or "", OWN_CONNECTOR).tokens
        if demanded == "one" and self.num_ecg_tokens != 1:
            raise ValueError(
                f"The {self.connector} connector makes one token of a record; num_ecg_tokens is {self.num_ecg_tokens}."
            )
        if demanded == "patches" and self.num_samples % self.num_ecg_tokens:
            raise ValueError(
                f"num_ecg_tokens={self.num_ecg_tokens} patches do not divide a record of {self.num_samples} samples."
            )


ELMConfig.register_for_auto_class()

__all__ = ["ELMConfig", "MERLConfig", "MLAEConfig", "MTAEConfig", "STMEMConfig"]
