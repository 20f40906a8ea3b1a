"""What a frozen encoder gives for each ECG, computed once and kept, in memory or on disk.

An encoder of which nothing is trained works as in inference, so that it gives the same for the same ECG each time. What a connector
that averages reads of it is small: 12 tokens of ST-MEM's 300, or 36 KB of an ECG. A connector that pools with weights of its own, as
the perceiver, reads all 300.
"""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from elm_ecg.modeling_common import in_eval_mode
from elm_ecg.modeling_elm import ECG_INPUTS, ELMModel
from elm_ecg.modeling_parts import own_classes
from elm_ecg.own_code import digest_of_code
from elm_ecg.training.files import atomic_path

FOLDER = Path(HF_HOME) / "elm_ecg" / "encoder_features"
NAME = "encoder_features"  # of the tensor in a file, and in a batch


class EncoderFeatures:
    """The features of ECGs that were seen before are found by the content of what the encoder reads of them.

    Each ECG is encoded by itself: in a batch it would be rounded by what stands beside it, and a run that is resumed, or an
    evaluation that goes on, would differ from one that was not interrupted. Processes share a folder: each file is whole or not
    there, and whoever comes second finds it, or writes the same again.

    Args:
        model: whose encoder does not change as long as this lives.
        folder: keep the features below it, in a folder of this very encoder; None: in memory.
        max_bytes: of the memory; what was not asked for longest makes room. None: everything stays.
        together: encode the new ECGs of a batch at once, which is faster, and rounded by what stands beside them.

    `computed` and `found` count ECGs.
    """

    def __init__(
        self, model: ELMModel, folder: Path | None = None, max_bytes: int | None = None, together: bool = False
    ):
        self.model = model
        self.folder = None if folder is None else folder / _digest_of_encoder(model)
        self.max_bytes = max_bytes
        self.together = together
        self.num_bytes = 0  # in memory, or written by this process
        self.computed, self.found = 0, 0
        self._kept: OrderedDict[str, torch.Tensor] = OrderedDict()  # that asked for last is last

    def replace(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with `encoder_features` [ECGs, tokens, width of the encoder] in place of its ECGs, on the model's device;
        one without ECGs as it is."""
        ecgs = {name: batch[name] for name in ECG_INPUTS if batch.get(name) is not None}
        if not ecgs:
            return batch
        precision, rows = self._precision(), _rows(ecgs)
        keys = [_digest_of(row, precision) for row in rows]
        features: dict[str, Any] = {key: self._read(key) for key in dict.fromkeys(keys)}
        new = {key: row for key, row in zip(keys, rows, strict=True) if features[key] is None}
        self.found += len(keys) - len(new)
        for group in [[*new]] if self.together and new else [[key] for key in new]:
            encoded = self._encode([new[key] for key in group])
            for key, of_one in zip(group, encoded.split(1), strict=True):
                features[key] = of_one.clone() if len(group) > 1 else of_one  # which holds no more than itself
                self._keep(key, features[key])
        rest = {name: values for name, values in batch.items() if name not in ECG_INPUTS}
        return {**rest, NAME: torch.cat([features[key] for key in keys]).to(self.model.device)}

    def __str__(self) -> str:
        where = "memory" if self.folder is None else str(self.folder)
        return (
            f"Features of the frozen encoder: {self.computed:,} ECGs computed, {self.found:,} times found; "
            f"{self.num_bytes / 1e6:,.1f} MB kept in {where}"
        )

    def _encode(self, ecgs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        """[ECGs, tokens, width of the encoder], in the main memory."""
        inputs = {name: torch.cat([ecg[name] for ecg in ecgs]).to(self.model.device) for name in ecgs[0]}
        with torch.no_grad(), in_eval_mode(self.model.encoder):
            return self.model.get_encoder_features(**inputs).cpu().contiguous()

    def _keep(self, key: str, features: torch.Tensor) -> None:
        self.computed += 1
        self.num_bytes += features.nbytes
        self._write(key, features)

    def _precision(self) -> str:
        """In which ECGs are encoded now; a model takes as long to tell its dtype as a small one to encode."""
        kind = self.model.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return f"{kind} {self.model.dtype} {autocast}"

    def _read(self, key: str) -> torch.Tensor | None:
        if self.folder is None:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)
        try:
            return load_file(self._path(key))[NAME]
        except (FileNotFoundError, SafetensorError, KeyError):  # a damaged file is written anew
            return None

    def _write(self, key: str, features: torch.Tensor) -> None:
        if self.folder is not None:
            path = self._path(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({NAME: features}, temporary)
            return
        self._kept[key] = features
        while self.max_bytes is not None and self.num_bytes > self.max_bytes and len(self._kept) > 1:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        # 256 folders, as some disks are slow with 100,000 files in one
        return self.folder / key[:2] / f"{key}.safetensors"


def _rows(ecgs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The tensors of each ECG, of which each keeps its first dimension."""
    number = len(next(iter(ecgs.values())))
    return [{name: values[row : row + 1] for name, values in ecgs.items()} for row in range(number)]


def digests_of(ecgs: dict[str, torch.Tensor]) -> list[str]:
    """Of each ECG of a batch, by the content of what the model reads of it."""
    return [_digest_of(row) for row in _rows(ecgs)] if ecgs else []


def _digest_of(ecg: dict[str, torch.Tensor], precision: str = "") -> str:
    digest = hashlib.sha256(precision.encode())
    _update(digest, ecg)
    return digest.hexdigest()


def _digest_of_encoder(model: ELMModel) -> str:
    """By the weights of the encoder, and what else of the model's configuration its features depend on."""
    config, encoder = model.config, model.encoder
    assert encoder is not None
    settings: list[Any] = [config.representation, config.connector, config.num_ecg_tokens, config.image_features]
    settings += map(digest_of_code, own_classes(config, model.connector))
    of_encoder = {name: value for name, value in encoder.config.to_dict().items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps([settings, of_encoder], sort_keys=True, default=str).encode())
    _update(digest, encoder.state_dict())
    return digest.hexdigest()


def _update(digest: Any, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # NumPy has no bfloat16
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
