"""The encoder and the connector of an ELM: their classes by its configuration, of this project, of transformers, or one's own."""

import logging
import os
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_elm import ELMConfig, is_own_connector, is_unread, reads_pictures
from .modeling_common import CompleteModel, attention_of, check_all_loaded
from .modeling_connectors import adopt_connector_class
from .modeling_ecg_encoders import ENCODER_MODELS, ecg_encoder_class
from .modeling_vision_encoders import load_vision_model, vision_model_class
from .own_code import load_own_class, own_reference, save_own_files


def encoder_class_of(config: Any) -> type[PreTrainedModel]:
    """The class of the config's encoder.

    Raises:
        ValueError: it is one's own, whose code is not loaded, or a model that reads no images.
    """
    encoder_config: Any = config.encoder_config
    if reads_pictures(encoder_config):
        return vision_model_class(encoder_config, config.image_features)
    return ecg_encoder_class(encoder_config)


def make_encoder(config: Any) -> PreTrainedModel:
    """The encoder of the config, with random weights."""
    encoder_config, encoder_class = config.encoder_config, encoder_class_of(config)
    encoder_config._attn_implementation = attention_of(encoder_class, encoder_config._attn_implementation)
    return encoder_class(encoder_config)


def adopt_encoder_class(encoder_class: type[PreTrainedModel]) -> dict[str, str]:
    """Makes somebody's own encoder known to `encoder_class_of`; returns the `auto_map` of its configuration."""
    config_class: Any = encoder_class.config_class
    encoder_class.register_for_auto_class("AutoModel")  # alone, too, it is saved with its code
    config_class.register_for_auto_class()
    AutoModel.register(config_class, encoder_class, exist_ok=True)
    return {"AutoConfig": own_reference(config_class), "AutoModel": own_reference(encoder_class)}


def own_encoder_class(
    auto_map: dict[str, str], place: str | os.PathLike, trust_remote_code: bool | None = False, **hub_kwargs: Any
) -> Any:
    """The class of somebody's own encoder by the `auto_map` of its configuration; arguments and errors as of `load_own_class`."""
    own_class: Any = load_own_class(auto_map["AutoModel"], place, trust_remote_code, **hub_kwargs)
    adopt_encoder_class(own_class)
    return own_class


def load_own_parts(config: Any, place: str | os.PathLike, trust_remote_code: bool | None, **hub_kwargs: Any) -> bool:
    """Loads the code of an own encoder and connector from beside the weights, and says whether there is any.

    Args:
        config: of the model there, an ELM or a pretraining model, which has no connector; it gets the encoder's own configuration in place of one that is unread.
        place: Hub id or local folder.
        hub_kwargs: as of `load_own_class`.

    Raises:
        ValueError: the code is not to be run, or not there.
    """
    encoder: Any = config.encoder_config
    connector, unread = getattr(config, "connector", None), is_unread(encoder)
    if unread:
        encoder_class = own_encoder_class(encoder.auto_map, place, trust_remote_code, **hub_kwargs)
        fields = encoder.to_dict() | {"auto_map": adopt_encoder_class(encoder_class)}
        config.encoder_config = encoder_class.config_class.from_dict(fields)
    if connector is not None and is_own_connector(connector):
        own_class: Any = load_own_class(connector, place, trust_remote_code, **hub_kwargs)
        adopt_connector_class(own_class)
    return unread or (connector is not None and is_own_connector(connector))


def plain_class(module: nn.Module) -> type:
    """The class of a module as it was written: FSDP2 makes one of its own of it, which has no code to save."""
    return next(base for base in type(module).__mro__ if not base.__name__.startswith("FSDP"))


def own_classes(config: Any, connector: nn.Module | None) -> list[type]:
    """The classes of encoder and connector, and of their configurations, that are neither ours nor of transformers."""
    encoder, own = config.encoder_config, []
    if encoder is not None and not reads_pictures(encoder) and encoder.model_type not in ENCODER_MODELS:
        own += [encoder_class_of(config), type(encoder)]
    if connector is not None and is_own_connector(config.connector):
        own.append(plain_class(connector))
    return own


class ModelOfParts(CompleteModel):
    """A model around an ECG encoder, an ELM or one that pretrains it: own code of its parts is loaded and saved with it."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the place has its name there too
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        config: Any = None,
        trust_remote_code: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As of transformers; the code of an own encoder or connector runs with `trust_remote_code=True` alone."""
        place, names = pretrained_model_name_or_path, ("cache_dir", "local_files_only", "proxies", "revision", "token")
        hub_kwargs = {name: kwargs[name] for name in names if name in kwargs}
        own = config
        config_class: Any = cls.config_class
        if not isinstance(own, PreTrainedConfig):
            own = config_class.from_pretrained(place if config is None else config, **hub_kwargs)
        if load_own_parts(own, place, trust_remote_code, **hub_kwargs):
            config = own
        return super().from_pretrained(place, *args, config=config, **kwargs)

    def initialize_weights(self) -> None:
        """As of transformers; an own encoder's weights are drawn as they are where it stands alone: of others' code those that are
        loaded stay, however it draws them."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel) and module.config is self.config.encoder_config:
                module.initialize_weights()
        super().initialize_weights()

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, though transformers does not have these models.

        Of custom code `from_pretrained` would leave buffers that are not saved, such as Falcon-H1's, as they happen to be.
        """
        return False

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As of transformers, with the weights under the names of the modules.

        The older names that transformers keeps for the files of some backbones are unknown to its trainer when it loads a
        checkpoint, to resume or as the best.
        """
        kwargs.setdefault("save_original_format", False)
        sharded = type(self)
        self.__class__ = plain_class(self)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = sharded
        if kwargs.get("is_main_process", True):
            for own_class in own_classes(self.config, getattr(self.base_model, "connector", None)):
                save_own_files(own_class, args[0] if args else kwargs["save_directory"])


def load_encoder_part(
    place: str | os.PathLike, image_features: str = "patches", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A pretrained encoder: that of a folder or Hub id of an ECG encoder, which may be somebody's own, of an ELM, or of a model whose
    vision tower is taken.

    Args:
        image_features: of a vision backbone, see [`ELMConfig`].
        trust_remote_code: run the code that comes with it.

    Raises:
        ValueError: it lacks weights, or its code is not to be run.
    """
    settings = PreTrainedConfig.get_config_dict(place)[0]  # AutoConfig may lack our types
    encoder_type, auto_map = str(settings.get("model_type")), settings.get("auto_map") or {}
    if encoder_type == ELMConfig.model_type:
        config = ELMConfig.from_pretrained(place)
        if config.encoder_config is None:
            raise ValueError(f"{place} is a {config.architecture} ELM, which has no encoder.")
        load_own_parts(config, place, trust_remote_code)
        config.image_features = image_features
        return _load_whole(
            encoder_class_of(config), place, config=config.encoder_config, key_mapping={r"^model\.encoder\.": ""}
        )
    if encoder_type in ENCODER_MODELS:
        return ENCODER_MODELS[encoder_type].from_pretrained(place)
    if encoder_type in CONFIG_MAPPING:
        registered = CONFIG_MAPPING[encoder_type]
        if not registered.__module__.startswith("transformers."):  # somebody's own, which is known here
            return _load_whole(MODEL_MAPPING[registered], place)
    elif "AutoModel" in auto_map:
        own_class = own_encoder_class(auto_map, place, trust_remote_code)
        encoder = _load_whole(own_class, place)
        encoder.config.auto_map = adopt_encoder_class(own_class)
        return encoder
    return load_vision_model(place, image_features)


def _load_whole(model_class: Any, place: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    log = logging.getLogger("transformers.modeling_utils")  # it would warn of all other weights of an ELM
    log.addFilter(_is_error)
    try:
        model, info = model_class.from_pretrained(place, output_loading_info=True, **kwargs)
    finally:
        log.removeFilter(_is_error)
    vars(model).pop("_weight_conversions", None)  # it is saved under its own names, not those of the ELM
    check_all_loaded(model, info)
    return model


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
