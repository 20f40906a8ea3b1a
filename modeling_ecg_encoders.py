"""The ECG encoders by their names: each a `PreTrainedModel` that loads and trains by itself."""

from .modeling_ecg_base import ECGEncoder
from .modeling_ecg_resnets import MERLModel, XResNet1dModel
from .modeling_ecg_siglip import SiglipECGModel
from .modeling_ecg_transformers import MLAEModel, MTAEModel, STMEMModel

ENCODER_MODELS: dict[str, type[ECGEncoder]] = {
    model.config_class.model_type: model
    for model in (MERLModel, MLAEModel, MTAEModel, STMEMModel, XResNet1dModel, SiglipECGModel)
}

__all__ = ["MERLModel", "MLAEModel", "MTAEModel", "STMEMModel", "SiglipECGModel", "XResNet1dModel"]
