"""ECG-language models on the Hugging Face stack: an ECG encoder, a connector and an LLM that answers questions about a 12-lead ECG."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_elm import ELMConfig
    from .ecg_utils import ECGRecord, read_ecg
    from .feature_extraction_elm import ECGFeatureExtractor
    from .modeling_elm import ELMForConditionalGeneration
    from .processing_elm import ELMProcessor
    from .tokenization_ecg_byte import ECGByteTokenizer

# name -> its module, imported when the name is first used: `import elm_ecg` need not wait for PyTorch
_MODULES = {
    "ECGByteTokenizer": "tokenization_ecg_byte",
    "ECGFeatureExtractor": "feature_extraction_elm",
    "ECGRecord": "ecg_utils",
    "ELMConfig": "configuration_elm",
    "ELMForConditionalGeneration": "modeling_elm",
    "ELMProcessor": "processing_elm",
    "read_ecg": "ecg_utils",
}

__all__ = [
    "ECGByteTokenizer",
    "ECGFeatureExtractor",
    "ECGRecord",
    "ELMConfig",
    "ELMForConditionalGeneration",
    "ELMProcessor",
    "read_ecg",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("elm-ecg")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
