"""ECG-language models on the Hugging Face stack: an ECG encoder, a connector and an LLM that answers questions about a 12-lead ECG."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_elm import ELMConfig as ELMConfig
    from .ecg_drawing import draw_ecg as draw_ecg
    from .ecg_utils import ECGRecord as ECGRecord
    from .ecg_utils import read_ecg as read_ecg
    from .feature_extraction_elm import ECGFeatureExtractor as ECGFeatureExtractor
    from .modeling_elm import ELMForConditionalGeneration as ELMForConditionalGeneration
    from .processing_elm import ELMProcessor as ELMProcessor
    from .tokenization_ecg_byte import ECGByteTokenizer as ECGByteTokenizer
    from .training.build import new_elm as new_elm
    from .training.collator import ELMCollator as ELMCollator
    from .training.data.build import build_dataset as build_dataset
    from .training.data.loading import ecgs_of as ecgs_of
    from .training.data.loading import load_dataset as load_dataset
    from .training.evaluation.evaluate import evaluate as evaluate
    from .training.load import load_elm as load_elm

# name -> its module, imported when the name is first used: `import elm_ecg` need not wait for PyTorch
_MODULES = {
    "ECGByteTokenizer": "tokenization_ecg_byte",
    "ECGFeatureExtractor": "feature_extraction_elm",
    "ECGRecord": "ecg_utils",
    "ELMCollator": "training.collator",
    "ELMConfig": "configuration_elm",
    "ELMForConditionalGeneration": "modeling_elm",
    "ELMProcessor": "processing_elm",
    "build_dataset": "training.data.build",
    "draw_ecg": "ecg_drawing",
    "ecgs_of": "training.data.loading",
    "evaluate": "training.evaluation.evaluate",
    "load_dataset": "training.data.loading",
    "load_elm": "training.load",
    "new_elm": "training.build",
    "read_ecg": "ecg_utils",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("elm-ecg")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*_MODULES, "__doc__", "__file__", "__name__", "__path__", "__version__"})
