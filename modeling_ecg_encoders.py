"""The ECG encoders by their names: each a `PreTrainedModel` that loads and trains by itself."""

from typing import Any

from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from .modeling_ecg_base import ECGEncoder
from .modeling_ecg_resnets import MERLModel, XResNet1dModel
from .modeling_ecg_siglip import SiglipECGModel
from .modeling_ecg_transformers import MLAEModel, MTAEModel, STMEMModel

ENCODER_MODELS: dict[str, type[ECGEncoder]] = {
    model.config_class.model_type: model
    for model in (MERLModel, MLAEModel, MTAEModel, STMEMModel, XResNet1dModel, SiglipECGModel)
}


def ecg_encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of an encoder that reads records, of this project or somebody's own.

    Raises:
        ValueError: it is one's own, whose code is not loaded.
    """
    model_class: Any = ENCODER_MODELS.get(config.model_type) or MODEL_MAPPING.get(type(config), None)
    if model_class is None:
        raise ValueError(
            f"The code of the {config.model_type} encoder is not loaded; load the model with from_pretrained and "
            "trust_remote_code=True, or register the encoder's classes with AutoConfig and AutoModel."
        )
    return model_class


__all__ = ["MERLModel", "MLAEModel", "MTAEModel", "STMEMModel", "SiglipECGModel", "XResNet1dModel"]
