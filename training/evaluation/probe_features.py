"""What a probe learns from, computed once for each record: the features of a frozen encoder and of its twin with random weights, and
the samples that a plain CNN reads."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from elm_ecg.ecg_utils import as_record
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.training.encoders import LoadedEncoder
from elm_ecg.training.evaluation.probe_data import Records
from elm_ecg.training.evaluation.questions import digest_of_ecg

CNN_RATE = 100  # hertz; what PTB-XL's benchmark trains on (Strodthoff et al. 2020, arXiv 2004.13701)


@dataclass
class Features:
    """Of the records of a split, all float arrays that lie on disk.

    Args:
        of_models: `encoder` and `random` -> float32 [records, width], the mean over the encoder's tokens.
        samples: float16 [records, leads, samples], millivolts at `CNN_RATE`.
        projected: float32 [records, width], what is compared with texts; None without a text encoder.
        digest: of the samples of all records, as they are stored.
    """

    of_models: dict[str, np.ndarray]
    samples: np.ndarray
    projected: np.ndarray | None
    digest: str


def cnn_extractor(extractor: ECGFeatureExtractor) -> ECGFeatureExtractor:
    """Makes of records what the CNN reads: the leads and the part that the encoder reads, in millivolts at `CNN_RATE`."""
    return ECGFeatureExtractor(
        sampling_rate=CNN_RATE,
        num_samples=max(1, round(extractor.num_samples * CNN_RATE / extractor.sampling_rate)),
        lead_names=extractor.lead_names,
        truncation=extractor.truncation,
        missing_leads=extractor.missing_leads,
    )


@torch.inference_mode()
def compute_features(
    encoder: LoadedEncoder,
    twin: LoadedEncoder,
    records: Records,
    folder: Path,
    name: str,
    batch_size: int,
    device: torch.device,
) -> Features:
    """One pass over the records, each of which is read once.

    Args:
        twin: the encoder with random weights, which reads the same inputs.
        folder: where the arrays lie, so that memory does not grow with the records.
        name: of the split, in file names and in the progress bar.

    Raises:
        ValueError: a record cannot be read, or does not fit the encoder; it is named.
    """
    extractor = cnn_extractor(encoder.extractor)
    shape = (len(records), len(extractor.lead_names), extractor.num_samples)
    samples = _on_disk(folder / f"{name}-samples.npy", shape, np.float16)
    models: dict[str, Callable[[dict[str, torch.Tensor]], torch.Tensor]]
    models = {"encoder": encoder.features, "random": twin.features}
    if encoder.pretraining is not None and name == "test":
        models["projected"] = lambda inputs: encoder.pretraining.get_ecg_embeddings(
            inputs["ecg_values"], lead_mask=inputs.get("ecg_lead_mask")
        )
    arrays: dict[str, np.ndarray] = {}
    digest = hashlib.sha256()
    with tqdm(total=len(records), desc=f"Features of {name}", unit="record") as bar:
        for start in range(0, len(records), batch_size):
            stop = min(start + batch_size, len(records))
            batch = []
            for number, ecg in enumerate(records.ecgs(start, stop), start=start):
                try:
                    batch.append(as_record(ecg))
                    samples[number] = extractor(batch[-1])["ecg_values"][0]
                except (ValueError, OSError) as error:
                    raise ValueError(
                        f"The record {records.record_ids[number]} of the split {name!r}: {error}"
                    ) from error
                digest.update(digest_of_ecg(batch[-1]).encode())
            inputs = {key: value.to(device) for key, value in encoder.prepare(batch).items()}
            for model, features in models.items():
                values = features(inputs).float().cpu().numpy()
                if model not in arrays:
                    arrays[model] = _on_disk(
                        folder / f"{name}-{model}.npy", (len(records), values.shape[1]), np.float32
                    )
                arrays[model][start:stop] = values
            bar.update(stop - start)
    _check_finite(arrays)
    return Features(arrays, samples, arrays.pop("projected", None), digest.hexdigest())


def _on_disk(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _check_finite(arrays: dict[str, np.ndarray]) -> None:
    for model, values in arrays.items():
        for start in range(0, len(values), 4096):
            if not np.isfinite(values[start : start + 4096]).all():
                which = "The encoder with random weights" if model == "random" else "The encoder"
                raise ValueError(f"{which} gives NaN or infinity for a record; its weights or its inputs are at fault.")
