"""A small probe: simulated records, of which one label is readable and one is not, and an encoder with random weights."""

import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import save_file
from transformers import BertConfig

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS, MERLConfig
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.ecg_utils import STANDARD_LEADS
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import MERLModel
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from helpers import TINY_ENCODERS, tiny_tokenizer

SIZES = {"train": 60, "validation": 30, "test": 60}
SAMPLES = 200  # at 100 Hz

# an encoder of somebody's own, with code that is no part of the project
OWN = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class OwnConfig(PreTrainedConfig):
    model_type = "own_ecg"

    def __init__(self, num_leads=12, num_samples=500, hidden_size=6, **kwargs):
        self.num_leads, self.num_samples, self.hidden_size = num_leads, num_samples, hidden_size
        super().__init__(**kwargs)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.conv = torch.nn.Conv1d(config.num_leads, config.hidden_size, 50, stride=50)
        self.post_init()

    def forward(self, ecg_values, lead_mask=None):
        return BaseModelOutput(last_hidden_state=self.conv(ecg_values).mT)
"""


def make_rows(split: str, size: int, **changes) -> list[dict]:
    """Noise that is large where a record is `loud`; `random` says nothing of it. Each patient has two records."""
    rng = np.random.default_rng(len(split))
    rows = []
    for index in range(size):
        loud, random = rng.random(2) < 0.5
        array = rng.normal(0, 900 if loud else 300, (12, SAMPLES)).astype(np.int16)
        ecg = {"array": array.tolist(), "sampling_rate": 100.0, "lead_names": list(STANDARD_LEADS), "unit": "uV"}
        names = ["loud"] * bool(loud) + ["random"] * bool(random)
        row = {"ecg": ecg, "record_id": f"{split}-{index}", "patient_id": f"{split}-{index // 2}", "labels": names}
        rows.append({**row, "loud": int(loud), **changes})
    return rows


def save_records(folder: Path, sizes: dict[str, int] = SIZES) -> Path:
    splits = {split: Dataset.from_list(make_rows(split, size)) for split, size in sizes.items()}
    DatasetDict(splits).save_to_disk(folder)
    return folder


def save_encoder(folder: Path, seed: int = 7, num_samples: int = SAMPLES, preprocessor: bool = True) -> Path:
    torch.manual_seed(seed)
    MERLModel(MERLConfig(num_samples=num_samples, **TINY_ENCODERS["merl"])).save_pretrained(folder)
    if preprocessor:
        ECGFeatureExtractor(sampling_rate=100, num_samples=num_samples).save_pretrained(folder)
    return folder


def save_own(folder: Path) -> dict[str, torch.Tensor]:
    """Saves an encoder of `OWN`, without feature extractor; returns its weights."""
    (folder / "own_model.py").write_text(OWN)
    auto_map = {"AutoConfig": "own_model.OwnConfig", "AutoModel": "own_model.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own_ecg", "auto_map": auto_map}))
    torch.manual_seed(0)
    weights = {"conv.weight": torch.randn(6, 12, 50), "conv.bias": torch.randn(6)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return weights


def save_pretraining(folder: Path, num_samples: int = SAMPLES, contrastive: bool = True) -> ECGForPreTraining:
    """A contrastive MERL with a text encoder, or a masked MTAE."""
    tokenizer = tiny_tokenizer("default")
    tokenizer.pad_token = tokenizer.eos_token
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text_config = BertConfig(vocab_size=len(tokenizer), **sizes) if contrastive else None
    kind = "merl" if contrastive else "mtae"
    encoder_config = ENCODER_CONFIGS[kind](num_samples=num_samples, **TINY_ENCODERS[kind])
    objectives = ["contrastive" if contrastive else "masked"]
    torch.manual_seed(0)
    config = ECGPretrainingConfig(
        encoder_config=encoder_config, text_config=text_config, objectives=objectives, projection_size=8
    )
    model = ECGForPreTraining(config).eval()
    model.save_pretrained(folder)
    ECGFeatureExtractor(sampling_rate=100, num_samples=num_samples).save_pretrained(folder)
    if contrastive:
        tokenizer.save_pretrained(folder)
    return model
