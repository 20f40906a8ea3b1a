"""Feature extractor of the ECG-language models: any ECG -> named leads, one rate, one length, normalised."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from transformers import BatchFeature, FeatureExtractionMixin
from transformers.utils import TensorType

from .ecg_utils import (
    STANDARD_LEADS,
    ZERO_CROSSINGS,
    ECGRecord,
    as_record,
    canonical_lead_names,
    check_filter,
    check_sampling_rate,
    filter_ecg,
    resample,
    resampling_ratio,
    select_leads,
    settling_seconds,
    with_notices,
)

NORMALIZATIONS = ("none", "zscore", "minmax")
TRUNCATIONS = (False, "start", "center", "end")  # False: a longer ECG is an error
MISSING_LEADS = ("error", "zeros")
EPSILON = 1e-6  # a constant record becomes zeros, not NaN


class ECGFeatureExtractor(FeatureExtractionMixin):
    """Makes the `ecg_values` of a model from ECGs of any rate, unit, lead order and length.

    Each ECG gets the leads `lead_names` by name (limb leads derived where missing), is resampled, filtered, cut, normalised
    over all of its leads and samples at once, and if short padded at its end with zeros. A zero there is 0 mV without
    normalisation, the mean after `zscore` and the minimum after `minmax`; padding does not enter the normalisation.

    `prepare` is the only way in which a record becomes what a model reads. It filters after resampling, so that a band means the
    same at every rate of the input and is checked once, and before cutting, so that filters have settled where the part that is
    kept begins.

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
        missing_leads: leads that an ECG lacks and that cannot be derived are an `error`, or `zeros`: rows of zeros as in padding,
            which do not enter the normalisation, and are False in `ecg_lead_mask`. At least one lead has to be recorded.

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

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> Any:
        """As of transformers, with its own code alone: a processor with which it was saved has named the processor's too."""
        # not to None: it would stay so in the file of a script's own class, whose code is not saved, and nothing loads that
        vars(self).pop("auto_map", None)
        return super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what `__call__` returns."""
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
        """Extracts the features of one ECG or of several: `prepare`, then zeros at the end of short ones.

        Args:
            ecgs: one ECG in any form that `as_record` takes, or a sequence of such; an array with three dimensions is
                a batch [n, leads, samples].
            sampling_rate, lead_names, unit, truncation: of all the ECGs, as of `prepare`.
            padding: False leaves short ECGs as short as they are.
            return_tensors: `pt` for a PyTorch tensor; a NumPy array otherwise.

        Returns:
            `ecg_values`: float32 [n, leads, samples]; without padding a list of [leads, its own samples].
            `ecg_lead_mask`: bool [n, leads], True for leads that are recorded or derived; with missing_leads="zeros" only.

        Raises:
            ValueError: there is no ECG, or as `prepare`.
        """
        described = {"sampling_rate": sampling_rate, "lead_names": lead_names, "unit": unit}
        records = self.prepare_batch(as_batch(ecgs), truncation=truncation, **described)
        values = np.zeros((len(records), len(self.lead_names), self.num_samples), dtype=np.float32)
        mask = np.zeros(values.shape[:2], dtype=bool)
        for index, record in enumerate(records):
            mask[index] = [name in record.lead_names for name in self.lead_names]
            values[index, mask[index], : record.array.shape[1]] = record.array  # both in the order of `lead_names`
        features: dict[str, Any] = {"ecg_values": values}
        if not padding:
            lengths = [record.array.shape[1] for record in records]
            features["ecg_values"] = [signal[:, :length] for signal, length in zip(values, lengths, strict=True)]
        if self.missing_leads == "zeros":
            features["ecg_lead_mask"] = mask
        return BatchFeature(features, tensor_type=return_tensors)

    def prepare(
        self,
        ecg: Any,
        sampling_rate: float | None = None,
        lead_names: Sequence[str] | None = None,
        unit: str | None = None,
        *,
        start: float | None = None,
        truncation: bool | str | None = None,
        normalize: bool = True,
    ) -> ECGRecord:
        """One ECG as a model reads it, but for the padding of a short one.

        Args:
            ecg, sampling_rate, lead_names, unit: as of `as_record`.
            start: second at which the part that is kept begins, in place of `truncation`. The `start` of the record's metadata
                counts where this is None.
            truncation: replaces the extractor's own.
            normalize: False keeps millivolts, for people to look at.

        Returns:
            A record of those leads of `lead_names` that are not missing, in that order, at `self.sampling_rate` and of at most
            `num_samples`. `start_second` of its metadata says where in the ECG it begins; its `notices` tell too which leads are
            derived, missing or not read, what is cut off, and whether it is shorter than what the model reads.

        Raises:
            ValueError: the ECG is invalid (see `as_record`), lacks a lead (see `select_leads`) or is too long, or `start` lies
                outside it.
        """
        recorded = as_record(ecg, sampling_rate, lead_names, unit)
        record = select_leads(recorded, self.lead_names, allow_missing=self.missing_leads == "zeros")
        start = record.metadata.get("start") if start is None else start  # no `or`: 0 is a start
        first = self._first_sample(record, start, truncation)
        array = self._part(record, first)
        array = self._normalize(array) if normalize else array

        rate, num_samples = self.sampling_rate, array.shape[1]
        seconds, duration = self.num_samples / rate, record.array.shape[1] / record.sampling_rate
        unread = [name for name in recorded.lead_names if name not in self.lead_names]
        sentences = {  # -> whether they apply; a sample more or less is rounding
            f"Not read: {', '.join(unread)}.": unread,
            f"Longer than the {seconds:g} s that the model reads: a part of it is cut off.": first
            or (duration - seconds) * rate >= 1,
            f"Shorter than the {seconds:g} s that the model reads.": num_samples < self.num_samples - 1,
        }
        # without `start`: a record that is prepared twice must not be cut twice
        metadata = {name: value for name, value in record.metadata.items() if name != "start"}
        metadata["start_second"] = first / rate
        prepared = replace(record, array=array, sampling_rate=rate, metadata=metadata)
        return with_notices(prepared, *(sentence for sentence, applies in sentences.items() if applies))

    def prepare_batch(self, ecgs: Sequence[Any], **options: Any) -> list[ECGRecord]:
        """`prepare` of each of several ECGs; of more than one, an error tells which it is about.

        Args:
            options: of `prepare`, for all the ECGs.
        """
        records = []
        for index, ecg in enumerate(ecgs):
            try:
                records.append(self.prepare(ecg, **options))
            except ValueError as error:
                if len(ecgs) == 1:
                    raise
                raise ValueError(f"ECG {index} of {len(ecgs)}, counted from 0: {error}") from error
        return records

    def _first_sample(self, record: ECGRecord, start: float | None, truncation: bool | str | None) -> int:
        """Where the part that is kept begins, in samples of the output."""
        truncation = self.truncation if truncation is None else _check_truncation(truncation)
        rate, length = self.sampling_rate, record.array.shape[1] * self.sampling_rate / record.sampling_rate
        num_samples = math.ceil(record.array.shape[1] * resampling_ratio(record.sampling_rate, rate))  # of `resample`
        if start is not None:
            if isinstance(start, bool) or not isinstance(start, numbers.Real):
                raise ValueError(f"start is {start!r:.100}; expected a number of seconds, such as 2.5.")
            if not 0 <= start < length / rate:
                raise ValueError(f"start is {start:g} s; expected a second of the ECG, which has {length / rate:g} s.")
            return min(round(start * rate), num_samples - 1)  # rounding may reach the end
        if truncation is False and length >= self.num_samples + 1:
            raise ValueError(
                f"The ECG is {length / rate:.4g} s long ({length:.6g} samples at {rate:g} Hz), the model takes "
                f"{self.num_samples / rate:.4g} s ({self.num_samples} samples), {(length - self.num_samples) / rate:.4g} s less: "
                'cut the ECG, or keep a part of it with truncation="start", "center" or "end" (in training and elm predict: --truncation; in elm explain: --start SECOND).'
            )
        excess = max(0, num_samples - self.num_samples)
        return excess if truncation == "end" else excess // 2 if truncation == "center" else 0

    def _part(self, record: ECGRecord, first: int) -> np.ndarray:
        """At most `num_samples` of the resampled and filtered record from the sample `first` of the output on."""
        rates = record.sampling_rate, self.sampling_rate
        ratio = resampling_ratio(*rates)
        # what lies beyond this margin does not change the part: a long record takes no more time and memory than its part
        seconds = settling_seconds(self.bandpass, self.notch) + ZERO_CROSSINGS / min(rates)  # of both filters
        margin = math.ceil(seconds * self.sampling_rate)
        # cut between blocks: where one of `denominator` samples of the record begins, one of `numerator` of the output does
        blocks = max(0, first - margin) // ratio.numerator
        stop = math.ceil((first + self.num_samples + margin) / ratio)  # samples of the record; may lie beyond its end
        signal = resample(record.array[:, blocks * ratio.denominator : stop], *rates, offset=record.array[:, :1])
        signal = filter_ecg(signal, self.sampling_rate, self.bandpass, self.notch)
        first -= blocks * ratio.numerator  # from here on in samples of the cut
        return signal[:, first : first + self.num_samples]

    def _normalize(self, signal: np.ndarray) -> np.ndarray:
        if self.normalization == "zscore":
            # sums in float64 make the mean of a constant that constant, and its deviation 0
            centred = signal - np.float32(signal.mean(dtype=np.float64))
            return centred / np.float32(centred.std(dtype=np.float64) + EPSILON)
        if self.normalization == "minmax":
            low = signal.min()
            return (signal - low) / (signal.max() - low + EPSILON)  # stays float32, as EPSILON is a Python float
        return signal


def _check_truncation(truncation: bool | str) -> bool | str:
    if truncation not in TRUNCATIONS:
        raise ValueError(f"truncation is {truncation!r}; expected one of {TRUNCATIONS}.")
    return truncation or False  # 0 equals False, so it passes the test above


def nesting(ecgs: Any) -> int:
    """How deep ECGs are nested: 2 for one ECG, whose numbers are [leads, samples]; 3 for several; 4 for groups of them."""
    if isinstance(ecgs, Sequence) and not isinstance(ecgs, str):  # a str is a path
        items = ecgs[:1] if len(ecgs) and isinstance(ecgs[0], (int, float)) else ecgs  # of numbers one tells for all
        return 1 + max(map(nesting, items), default=0)
    if isinstance(ecgs, (int, float)):
        return 0
    return getattr(ecgs, "ndim", 2)  # a path, dict, record or picture is an ECG as an array with two dimensions is


def as_batch(ecgs: Any) -> list:
    """The ECGs, of the nesting 2 or 3, as a list.

    Raises:
        ValueError: there is none, or they are in groups.
    """
    depth = nesting(ecgs)
    if depth == 4 and isinstance(ecgs, Sequence):
        raise ValueError(
            "The ECGs are in groups; give them in one list, or the processor the groups beside their texts."
        )
    batch = list(ecgs) if depth == 3 or (depth == 1 and isinstance(ecgs, Sequence)) else [ecgs]
    if not batch:
        raise ValueError("There is no ECG; give at least one.")
    return batch


def ungrouped(ecgs: Any) -> tuple[Any, list[int] | None]:
    """ECGs in groups, one for each text, as one list, and the sizes of the groups; others as they are, and None."""
    if not isinstance(ecgs, (list, tuple)):
        return ecgs, None
    all_empty = all(isinstance(group, (list, tuple)) and not group for group in ecgs)  # groups too
    if nesting(ecgs) != 4 and not all_empty:
        return ecgs, None
    groups = [as_batch(group) if nesting(group) > 1 else [] for group in ecgs]
    return [ecg for group in groups for ecg in group], [len(group) for group in groups]


ECGFeatureExtractor.register_for_auto_class()

__all__ = ["ECGFeatureExtractor"]
