"""Labels as texts, for an encoder whose ECGs and texts lie in one space: zero-shot scores without any training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from elm_ecg.training.command_line import did_you_mean
from elm_ecg.training.encoders import LoadedEncoder


def read_prompts(path: Path | None, labels: Sequence[str]) -> dict[str, list[str]]:
    """The texts that stand for each label: its name, or what a YAML file has, a text or a list of texts.

    Raises:
        ValueError: the file is no mapping of labels to texts, or names a label that is not probed.
        OSError: it cannot be read.
    """
    prompts = {label: [label] for label in labels}
    if path is None:
        return prompts
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--prompts {path} holds a {type(content).__name__}; expected lines such as `AFIB: atrial fibrillation`."
        )
    for label, texts in content.items():
        listed = [texts] if isinstance(texts, str) else texts
        if (
            not isinstance(listed, list)
            or not listed
            or not all(isinstance(text, str) and text.strip() for text in listed)
        ):
            raise ValueError(
                f"--prompts {path}: the texts of {label!r} are {texts!r}; expected a text, or a list of texts."
            )
        if str(label) not in prompts:
            raise ValueError(
                f"--prompts {path}: {str(label)!r} is none of the labels.{did_you_mean(str(label), labels)} They are {', '.join(labels)}."
            )
        prompts[str(label)] = listed
    return prompts


@torch.inference_mode()
def zero_shot(encoder: LoadedEncoder, projected: np.ndarray, prompts: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Cosines [records, labels] of ECGs and labels; of a label with several texts, with the mean of their embeddings.

    Args:
        projected: [records, width], as `get_ecg_embeddings` gives them.
    """
    model: Any = encoder.pretraining
    columns = []
    for texts in prompts.values():
        inputs = encoder.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(model.device)
        embeddings = model.get_text_embeddings(inputs["input_ids"], inputs["attention_mask"])
        mean = torch.nn.functional.normalize(embeddings, dim=-1).mean(dim=0)
        columns.append(torch.nn.functional.normalize(mean, dim=0).float().cpu().numpy())
    lengths = np.linalg.norm(projected, axis=1, keepdims=True)
    return projected / np.where(lengths > 0, lengths, 1) @ np.stack(columns, axis=1)
