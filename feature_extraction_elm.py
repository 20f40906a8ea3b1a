"""Feature extractor of the ECG-language models: any ECG -> named leads, one rate, one length, normalised."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import TensorType

try:
    from .ecg_utils import (
        STANDARD_LEADS,
        ECGRecord,
        as_record,
        canonical_lead_names,
        check_sampling_rate,
        resample,
        select_leads,
    )
except ImportError:
    if __package__:  # loaded from a Hub repo: a real error
        raise
    from ecg_utils import (
        STANDARD_LEADS,
        ECGRecord,
        as_record,
        canonical_lead_names,
        check_sampling_rate,
        resample,
        select_leads,
    )

NORMALIZATIONS = ("none", "zscore", "minmax")
TRUNCATIONS = (False, "start", "center", "end")
EPSILON = 1e-6


class ECGFeatureExtractor(FeatureExtractionMixin):
    """Makes the `ecg_values` of a model from ECGs of any rate, unit, lead order and length.

    Each ECG gets the leads `lead_names` by name (limb leads derived where missing), is resampled, cut, normalised over
    all of its leads and samples at once, and if short padded at its end with zeros. A zero there is 0 mV without
    normalisation, the mean after `zscore` and the minimum after `minmax`; padding does not enter the normalisation.

    Args:
        sampling_rate: of the output, in hertz.
        num_samples: per lead of the output.
        lead_names: leads of the output, in order.
        normalization: `none` keeps millivolts; `zscore` is (x - mean) / (std + 1e-6); `minmax` is
            (x - min) / (max - min + 1e-6), which lies in [0, 1]. A constant record becomes zeros under both.
        truncation: what is kept of an ECG that is longer: its `start`, `center` or `end`; False raises an error.
            Less than one output sample too long is rounding, and cut in any case.

    Raises:
        ValueError: an argument is impossible.
        TypeError: an argument is unknown.
    """

    model_input_names = ["ecg_values"]

    def __init__(
        self,
        sampling_rate: float = 250,
        num_samples: int = 2500,
        lead_names: Sequence[str] = STANDARD_LEADS,
        normalization: str = "none",
        truncation: bool | str = False,
        **kwargs: Any,
    ) -> None:
        # the base class would take a misspelt argument as an attribute; these three come from saved files
        unknown = sorted(kwargs.keys() - {"auto_map", "feature_extractor_type", "processor_class"})
        if unknown:
            raise TypeError(f"ECGFeatureExtractor has no argument {', '.join(unknown)}.")
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples is {num_samples!r}; expected a whole number of at least 1.")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization is {normalization!r}; expected one of {NORMALIZATIONS}.")
        super().__init__(**kwargs)
        self.sampling_rate = check_sampling_rate(sampling_rate)
        self.num_samples = num_samples
        self.lead_names = list(canonical_lead_names(lead_names))
        self.normalization = normalization
        self.truncation = _check_truncation(truncation)

    def __call__(
        self,
        ecgs: Any,
        sampling_rate: float | None = None,
        lead_names: Sequence[str] | None = None,
        unit: str | None = None,
        truncation: bool | str | None = None,
        padding: bool = True,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """Extracts the features of one ECG or of several.

        Args:
            ecgs: one ECG in any form that `as_record` takes, or a sequence of such; an array with three dimensions is
                a batch [n, leads, samples].
            sampling_rate, lead_names, unit: of all the ECGs, where they do not say so themselves; see `as_record`.
            truncation: replaces the extractor's own for this call.
            padding: False leaves short ECGs as short as they are.
            return_tensors: `pt` for a PyTorch tensor; a NumPy array otherwise.

        Returns:
            `ecg_values`: float32 [n, leads, samples]; without padding a list of [leads, its own samples].

        Raises:
            ValueError: there is no ECG, one is invalid (see `as_record`, `select_leads`), or one is too long.
        """
        truncation = self.truncation if truncation is None else _check_truncation(truncation)
        batch = as_batch(ecgs)
        if not batch:
            raise ValueError("There is no ECG; give at least one.")
        values = np.zeros((len(batch), len(self.lead_names), self.num_samples), dtype=np.float32)
        lengths = []
        for index, ecg in enumerate(batch):
            try:
                signal = self._fit(as_record(ecg, sampling_rate, lead_names, unit), truncation)
            except ValueError as error:
                if len(batch) == 1:
                    raise
                raise ValueError(f"ECG {index} of {len(batch)}, counted from 0: {error}") from error
            self._normalize(signal, out=values[index, :, : signal.shape[1]])
            lengths.append(signal.shape[1])
        if not padding:
            short = [signal[:, :length] for signal, length in zip(values, lengths, strict=True)]
            return BatchFeature({"ecg_values": short}, tensor_type=return_tensors)
        return BatchFeature({"ecg_values": values}, tensor_type=return_tensors)

    def _fit(self, record: ECGRecord, truncation: bool | str) -> np.ndarray:
        """The record's millivolts with the leads and at the rate of the output, [leads, at most num_samples]."""
        record = select_leads(record, self.lead_names)
        length = record.array.shape[1] * self.sampling_rate / record.sampling_rate
        if truncation is False and length >= self.num_samples + 1:
            raise ValueError(
                f"The ECG is {length / self.sampling_rate:.4g} s long ({length:.6g} samples at "
                f"{self.sampling_rate:g} Hz), the model takes {self.num_samples / self.sampling_rate:.4g} s "
                f"({self.num_samples} samples), {(length - self.num_samples) / self.sampling_rate:.4g} s less; cut the "
                'ECG, or pass truncation="start", "center" or "end" to keep that part of it.'
            )
        signal = resample(record.array, record.sampling_rate, self.sampling_rate)
        excess = max(0, signal.shape[1] - self.num_samples)
        start = excess if truncation == "end" else excess // 2 if truncation == "center" else 0
        return signal[:, start : start + self.num_samples]

    def _normalize(self, signal: np.ndarray, out: np.ndarray) -> None:
        if self.normalization == "none":
            out[:] = signal
        elif self.normalization == "zscore":
            # sums in float64 make the mean of a constant that constant, and its deviation 0
            np.subtract(signal, float(signal.mean(dtype=np.float64)), out=out)
            out /= float(out.std(dtype=np.float64)) + EPSILON
        else:
            low = signal.min()
            np.subtract(signal, low, out=out)
            out /= signal.max() - low + EPSILON


def _check_truncation(truncation: bool | str) -> bool | str:
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation is {truncation!r}; expected one of {TRUNCATIONS}.")
    return truncation


def as_batch(ecgs: Any) -> list:
    """The ECGs as a list. Nested numbers are one ECG at depth 2, [leads, samples], and several at depth 3."""
    is_sequence = isinstance(ecgs, Sequence) and not isinstance(ecgs, str)
    depth, inner = 0, ecgs
    while isinstance(inner, Sequence) and not isinstance(inner, str) and len(inner):
        depth, inner = depth + 1, inner[0]
    depth += getattr(inner, "ndim", 0)
    return list(ecgs) if depth == 3 or (is_sequence and depth != 2) else [ecgs]


ECGFeatureExtractor.register_for_auto_class()

__all__ = ["ECGFeatureExtractor"]
