"""Rows of records, with or without reports, to a batch that an encoder is pretrained on."""

import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig, mask_shape
from elm_ecg.ecg_utils import ECGRecord, as_record
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_masked import mask_from_noise
from elm_ecg.training.augmentation import NO_AUGMENTATION, augmented
from elm_ecg.training.collator import naming_records, tell_notices
from elm_ecg.training.data.loading import ecgs_of
from elm_ecg.training.data.record_rows import report_of


@dataclass
class PretrainingCollator:
    """The inputs of [`ECGForPreTraining`] of some rows, of which each has one ECG.

    What is random about a record, its changes and its mask, depends on `seed`, `epoch` and the record alone: a run that is resumed,
    or that has other workers or processes, sees the same. Each distinct notice about a record is logged once in each process.

    Args:
        tokenizer: of the text encoder; None: no reports are read.
        report_column: as of `report_of`.
        max_report_tokens: behind these a report is cut.
        augment_ecg, time_shift, gain_jitter, lead_dropout: as of `ELMCollator`.
        epoch: the trainer counts it up, in memory that data loader workers share.
        told, known: the notices that were logged, and those of `notices_of`.
    """

    config: ECGPretrainingConfig
    feature_extractor: ECGFeatureExtractor
    tokenizer: Any = None
    report_column: str | None = None
    max_report_tokens: int = 128
    augment_ecg: bool = False
    time_shift: float = 0.0
    gain_jitter: float = 0.0
    lead_dropout: float = 0.0
    seed: int = 0
    epoch: Any = 0
    told: set[str] = field(default_factory=set, repr=False)
    known: dict[Any, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.epoch = torch.tensor(int(self.epoch)).share_memory_()

    def for_evaluation(self) -> "PretrainingCollator":
        """The same, but nothing is augmented, and a record has the same mask each time."""
        changes = {name: value for name, value in NO_AUGMENTATION.items() if hasattr(self, name)}
        return replace(self, **changes, epoch=0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        with naming_records(rows):
            return self._batch(rows)

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        records, masks = [], []
        for row in rows:
            record = self._record(row)
            epoch = row.get("epoch", int(self.epoch))  # of a stream its pass
            # by content: the order of the rows changes nothing
            rng = np.random.default_rng([self.seed, epoch, zlib.crc32(record.array.tobytes())])
            if "masked" in self.config.objectives:
                noise = torch.from_numpy(rng.random(mask_shape(self.config), dtype=np.float32))
                masks.append(mask_from_noise(noise, self.config.mask_ratio))
            as_missing = self.feature_extractor.missing_leads == "zeros"
            records.append(augmented(record, self, rng, as_missing))
        features = self.feature_extractor(records, padding=False)
        lengths = [signal.shape[1] for signal in features["ecg_values"]]
        values = np.zeros(
            (len(rows), len(self.feature_extractor.lead_names), self.feature_extractor.num_samples), np.float32
        )
        for index, signal in enumerate(features["ecg_values"]):
            values[index, :, : lengths[index]] = signal
        batch = {"ecg_values": torch.from_numpy(values), "num_samples": torch.tensor(lengths)}
        if "ecg_lead_mask" in features:
            batch["lead_mask"] = torch.as_tensor(features["ecg_lead_mask"])
        if masks:
            batch["mask"] = torch.stack(masks)
        if self.tokenizer is not None:
            batch |= self._reports(rows)
        return batch

    def _reports(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        reports = [report_of(row, self.report_column) for row in rows]
        tokens = self.tokenizer(
            # a text for each row, as all rows have as many tokens
            [report or "." for report in reports],
            padding=True,
            truncation=True,
            max_length=self.max_report_tokens,
            return_tensors="pt",
        )
        return {
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
            "has_report": torch.tensor([bool(report) for report in reports]),
        }

    def _record(self, row: dict[str, Any]) -> ECGRecord:
        """The ECG of a row; ValueError if it has not just one."""
        ecgs = ecgs_of(row)
        if len(ecgs) != 1:
            raise ValueError(
                f"The row of the record {row.get('record_id', 'without id')} has {len(ecgs)} ECGs; expected one: build the data with "
                "`elm data build --no_questions`."
            )
        record = as_record(ecgs[0])
        tell_notices(record, row, self.feature_extractor, self.known, self.told)
        return record
