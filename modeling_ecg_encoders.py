"""The ECG encoders by their names: each a `PreTrainedModel` that loads and trains by itself."""

from .modeling_ecg_base import ECGEncoder
from .modeling_ecg_resnets import MERLModel
from .modeling_ecg_transformers import MLAEModel, MTAEModel, STMEMModel

ENCODER_MODELS: dict[str, type[ECGEncoder]] = {
    model.config_class.model_type: model for model in (MERLModel, MLAEModel, MTAEModel, STMEMModel)
}

__all__ = ["MERLModel", "MLAEModel", "MTAEModel", "STMEMModel"]
