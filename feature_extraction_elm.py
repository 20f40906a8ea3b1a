"""Feature extractor of the ECG-language models: any ECG -> named leads, one rate, one length, normalised."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import TensorType

from .ecg_utils import (
    STANDARD_LEADS,
    ECGRecord,
    as_record,
    canonical_lead_names,
    check_filter,
    check_sampling_rate,
    filter_ecg,
    resample,
    select_leads,
)

NORMALIZATIONS = ("none", "zscore", "minmax")
TRUNCATIONS = (False, "start", "center", "end")
MISSING_LEADS = ("error", "zeros")
EPSILON = 1e-6


class ECGFeatureExtractor(FeatureExtractionMixin):
    """Makes the `ecg_values` of a model from ECGs of any rate, unit, lead order and length.

    Each ECG gets the leads `lead_names` by name (limb leads derived where missing), is resampled, filtered, cut, normalised
    over all of its leads and samples at once, and if short padded at its end with zeros. A zero there is 0 mV without
    normalisation, the mean after `zscore` and the minimum after `minmax`; padding does not enter the normalisation.

    Filters come after resampling, so that a band means the same at every rate of the input and is checked once, and before
    cutting, so that they have settled where the part that is kept begins.

    Args:
        sampling_rate: of the output, in hertz.
        num_samples: per lead of the output.
        lead_names: leads of the output, in order.
        normalization: `none` keeps millivolts; `zscore` is (x - mean) / (std + 1e-6); `minmax` is
            (x - min) / (max - min + 1e-6), which lies in [0, 1]. A constant record becomes zeros under both.
        truncation: what is kept of an ECG that is longer: its `start`, `center` or `end`; False raises an error.
            Less than one output sample too long is rounding, and cut in any case.
        bandpass: low and high frequency in hertz that pass, such as [0.5, 40]; see `filter_ecg`.
        notch: frequency of the mains in hertz that is taken out, 50 or 60.
        missing_leads: leads that an ECG has not, and that cannot be derived, are an `error`, or `zeros`: rows of zeros as in
            padding, which do not enter the normalisation, and `ecg_lead_mask` says which are there. One lead has to be.

    Raises:
        ValueError: an argument is impossible.
        TypeError: an argument is unknown.
    """

    def __init__(
        self,
        sampling_rate: float = 250,
        num_samples: int = 2500,
        lead_names: Sequence[str] = STANDARD_LEADS,
        normalization: str = "none",
        truncation: bool | str = False,
        bandpass: Sequence[float] | None = None,
        notch: float | None = None,
        missing_leads: str = "error",
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
        if missing_leads not in MISSING_LEADS:
            raise ValueError(f"missing_leads is {missing_leads!r}; expected one of {MISSING_LEADS}.")
        super().__init__(**kwargs)
        self.sampling_rate = check_sampling_rate(sampling_rate)
        self.num_samples = num_samples
        self.lead_names = list(canonical_lead_names(lead_names))
        self.normalization = normalization
        self.truncation = _check_truncation(truncation)
        check_filter(self.sampling_rate, bandpass, notch)
        self.bandpass = None if bandpass is None else [float(frequency) for frequency in bandpass]
        self.notch = None if notch is None else float(notch)
        self.missing_leads = missing_leads

    @property
    def model_input_names(self) -> list[str]:
        return ["ecg_values"] if self.missing_leads == "error" else ["ecg_values", "ecg_lead_mask"]

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
            `ecg_lead_mask`: bool [n, leads], True for leads that are there, recorded or derived; with missing_leads="zeros" only.

        Raises:
            ValueError: there is no ECG, one is invalid (see `as_record`, `select_leads`), or one is too long.
        """
        truncation = self.truncation if truncation is None else _check_truncation(truncation)
        batch = as_batch(ecgs)
        if not batch:
            raise ValueError("There is no ECG; give at least one.")
        values = np.zeros((len(batch), len(self.lead_names), self.num_samples), dtype=np.float32)
        mask = np.zeros(values.shape[:2], dtype=bool)
        lengths = []
        for index, ecg in enumerate(batch):
            try:
                record = self._fit(as_record(ecg, sampling_rate, lead_names, unit), truncation)
            except ValueError as error:
                if len(batch) == 1:
                    raise
                raise ValueError(f"ECG {index} of {len(batch)}, counted from 0: {error}") from error
            mask[index] = [name in record.lead_names for name in self.lead_names]
            lengths.append(record.array.shape[1])
            values[index, mask[index], : lengths[-1]] = self._normalize(record.array)
        features: dict[str, Any] = {"ecg_values": values}
        if not padding:
            features["ecg_values"] = [signal[:, :length] for signal, length in zip(values, lengths, strict=True)]
        if self.missing_leads == "zeros":
            features["ecg_lead_mask"] = mask
        return BatchFeature(features, tensor_type=return_tensors)

    def _fit(self, record: ECGRecord, truncation: bool | str) -> ECGRecord:
        """The record with those leads of the output that are there, at its rate, filtered and no longer than it."""
        record = select_leads(record, self.lead_names, allow_missing=self.missing_leads == "zeros")
        length = record.array.shape[1] * self.sampling_rate / record.sampling_rate
        if truncation is False and length >= self.num_samples + 1:
            raise ValueError(
                f"The ECG is {length / self.sampling_rate:.4g} s long ({length:.6g} samples at "
                f"{self.sampling_rate:g} Hz), the model takes {self.num_samples / self.sampling_rate:.4g} s "
                f"({self.num_samples} samples), {(length - self.num_samples) / self.sampling_rate:.4g} s less; cut the "
                'ECG, or pass truncation="start", "center" or "end" to keep that part of it.'
            )
        signal = resample(record.array, record.sampling_rate, self.sampling_rate)
        signal = filter_ecg(signal, self.sampling_rate, self.bandpass, self.notch)
        excess = max(0, signal.shape[1] - self.num_samples)
        start = excess if truncation == "end" else excess // 2 if truncation == "center" else 0
        return replace(record, array=signal[:, start : start + self.num_samples], sampling_rate=self.sampling_rate)

    def _normalize(self, signal: np.ndarray) -> np.ndarray:
        if self.normalization == "zscore":
            # sums in float64 make the mean of a constant that constant, and its deviation 0
            centred = signal - np.float32(signal.mean(dtype=np.float64))
            return centred / np.float32(centred.std(dtype=np.float64) + EPSILON)
        if self.normalization == "minmax":
            low = signal.min()
            return (signal - low) / (signal.max() - low + EPSILON)
        return signal


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
