"""ECGs as tokens of a text: their ids in the language model, fewer of them where a text is too long, and back."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .ecg_utils import STANDARD_LEADS, ECGRecord, resample, select_leads
from .feature_extraction_elm import ECGFeatureExtractor
from .tokenization_ecg_byte import ECGByteTokenizer

OVERFLOWS = ("error", "downsample", "drop_leads")
# in the order in which they are left out: sums of I and II, then chest leads that resemble a neighbour, the rhythm strip last
DISPENSABLE_LEADS = ("aVR", "aVL", "aVF", "III", "V4", "V6", "V2", "V3", "I", "V5", "V1", "II")
MIN_SAMPLING_RATE = 30  # hertz; below it a QRS complex is a sample or two


def signal_tokens(ecg_byte: ECGByteTokenizer, lead_names: Sequence[str] = STANDARD_LEADS) -> list[str]:
    """Tokens that ECGs take in the language model's vocabulary.

    `signal_<id>` for each of ECG-Byte's, as in the reference, and where these keep within leads, `signal_<lead>` for
    what each lead begins with, so that the model knows which it reads.
    """
    names = [f"signal_{token_id}" for token_id in ecg_byte.token_ids]
    return names if ecg_byte.across_leads else names + [f"signal_{lead}" for lead in lead_names]


class SymbolicECGs:
    """The tokens of ECGs in a language model's vocabulary.

    Args:
        ecg_byte: the ECG-Byte tokenizer.
        vocabulary: id by token, of the language model's tokenizer.
        feature_extractor: prepares the records, and knows their leads and sampling rate.

    Raises:
        ValueError: the vocabulary lacks some of `signal_tokens`.
    """

    def __init__(
        self, ecg_byte: ECGByteTokenizer, vocabulary: Mapping[str, int], feature_extractor: ECGFeatureExtractor
    ):
        self.ecg_byte, self.feature_extractor = ecg_byte, feature_extractor
        names = signal_tokens(ecg_byte, feature_extractor.lead_names)
        missing = [name for name in names if name not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {len(missing)} of {len(names)} ECG tokens, {missing[0]} first. Add them, "
                "tokenizer.add_tokens(ELMProcessor.signal_tokens(ecg_byte, lead_names)), and resize the model's "
                "embeddings."
            )
        ids = [vocabulary[name] for name in names]  # ECG-Byte's, then those of leads, if any
        # ids of the language model by ids of ECG-Byte, and by leads
        self._signal_ids = np.full(len(ecg_byte.token_lengths), -1)  # -1: no token has this id
        self._signal_ids[ecg_byte.token_ids] = ids[: ecg_byte.vocab_size]
        self._lead_ids = dict(zip(feature_extractor.lead_names, ids[ecg_byte.vocab_size :], strict=False))

    @property
    def token_ids(self) -> list[int]:
        """Ids of `signal_tokens`."""
        return [*self._signal_ids[self._signal_ids >= 0].tolist(), *self._lead_ids.values()]

    def encode(self, records: list[ECGRecord]) -> list[list[int]]:
        """Ids of the language model for each ECG."""
        batch = []
        encoded = self.ecg_byte.encode_batch([record.array for record in records])  # in parallel with Rust
        for record, ids in zip(records, encoded, strict=True):
            tokens = self._signal_ids[ids]
            if self._lead_ids:  # the name of each lead before its samples
                leads = self.ecg_byte.offsets(ids, record.array.shape[1])[:, 0]  # the lead of each token
                starts = np.searchsorted(leads, np.arange(len(record.array)))  # the first token of each lead
                tokens = np.insert(tokens, starts, [self._lead_ids[name] for name in record.lead_names])
            batch.append(tokens.tolist())
        return batch

    def smaller(self, records: list[ECGRecord], overflow: str) -> Iterator[tuple[list[ECGRecord], str]]:
        """The records with less and less in them, by the rule `overflow`, and in words what became of them."""
        rate = self.feature_extractor.sampling_rate
        leads = {lead for record in records for lead in record.lead_names}
        if overflow == "downsample" and records:
            for power in range(1, int(math.log2(rate / MIN_SAMPLING_RATE)) + 1):  # halvings
                lower = rate / 2**power  # from the full rate each time: losses do not add up
                slower = [
                    replace(record, array=resample(record.array, rate, lower), sampling_rate=lower)
                    for record in records
                ]
                yield slower, f"they are resampled from {rate:g} to {lower:g} Hz"
        elif overflow == "drop_leads":
            order = [lead for lead in DISPENSABLE_LEADS if lead in leads]
            for number in range(1, len(order)):  # one lead stays
                kept = [[lead for lead in record.lead_names if lead not in order[:number]] for record in records]
                # a record that has no other leads keeps them
                fewer = [select_leads(one, own or one.lead_names) for one, own in zip(records, kept, strict=True)]
                yield fewer, f"their leads {', '.join(order[:number])} are left out"

    def decode(
        self, token_ids: Any, low: float | None = None, high: float | None = None, num_samples: int | None = None
    ) -> list[dict[str, Any]]:
        """As `ELMProcessor.decode_ecg`."""
        names = self.feature_extractor.lead_names
        num_samples = num_samples or self.feature_extractor.num_samples
        ecg_ids = {signal_id: ecg_id for ecg_id, signal_id in enumerate(self._signal_ids.tolist()) if signal_id >= 0}
        leads = {lead_id: names.index(name) for name, lead_id in self._lead_ids.items()}
        ecgs: list[dict[str, Any]] = []
        token_ids = token_ids.tolist() if hasattr(token_ids, "tolist") else list(token_ids)
        if token_ids and not isinstance(token_ids[0], int):
            raise ValueError("The token ids are a batch; decode the ECGs of one text at a time, token_ids[0].")
        for is_ecg, run in itertools.groupby(token_ids, key=lambda token_id: token_id in ecg_ids or token_id in leads):
            if not is_ecg:
                continue
            array = np.full((len(names), num_samples), np.nan, dtype=np.float32)
            # a piece of samples for each lead token, or one for all leads
            pieces: list[tuple[int, list[int]]] = [] if leads else [(0, [])]
            for token_id in run:
                if token_id in leads:
                    pieces.append((leads[token_id], []))
                elif pieces:
                    pieces[-1][1].append(ecg_ids[token_id])
                else:
                    raise ValueError(f"ECG {len(ecgs)} begins without the token of a lead; expected one of {names}.")
            for lead, ids in pieces:
                values = self.ecg_byte.decode(np.array(ids, dtype=np.int64), low, high)  # [] alone is float64
                place = array.reshape(-1) if not leads else array[lead]  # a view: fills `array`
                if len(values) > len(place):
                    raise ValueError(
                        f"ECG {len(ecgs)} has {len(values)} samples in {names[lead] if leads else 'all its leads'}; expected at "
                        f"most {len(place)}."
                    )
                place[: len(values)] = values
            ecgs.append(
                {
                    "array": array,
                    "sampling_rate": self.feature_extractor.sampling_rate,
                    "lead_names": list(names),
                    "unit": "mV",
                }
            )
        return ecgs


__all__ = ["SymbolicECGs", "signal_tokens"]
