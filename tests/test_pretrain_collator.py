import numpy as np
import pytest
import torch

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.training.data.synthetic import make_record
from elm_ecg.training.pretrain_collator import PretrainingCollator
from helpers import TINY_ENCODERS, tiny_tokenizer


def config_of(encoder="st_mem"):
    return ECGPretrainingConfig(encoder_config=ENCODER_CONFIGS[encoder](num_samples=500, **TINY_ENCODERS[encoder]))


def collator_of(encoder="st_mem", extractor=None, **options):
    extractor = extractor or ECGFeatureExtractor(100, 500)
    return PretrainingCollator(config_of(encoder), extractor, **options)


def rows(size):
    return [{"ecg": make_record(index, 0, sampling_rate=100, seconds=5.0)["ecg"]} for index in range(size)]


@pytest.mark.parametrize(
    ("encoder", "shape", "kept"), [("st_mem", (12, 25), 6), ("mtae", (25,), 6), ("mlae", (12,), 3)]
)
def test_masks_depend_on_seed_epoch_and_record_alone(encoder, shape, kept):
    data = rows(4)
    batch = collator_of(encoder)(data)
    assert batch["mask"].shape == (4, *shape)
    assert batch["mask"].dtype == torch.bool
    assert ((~batch["mask"]).sum(-1) == kept).all()
    assert torch.equal(collator_of(encoder)(data[::-1])["mask"], batch["mask"].flip(0))
    assert not torch.equal(batch["mask"][0], batch["mask"][1])
    assert not torch.equal(collator_of(encoder, epoch=1)(data)["mask"], batch["mask"])
    assert not torch.equal(collator_of(encoder, seed=1)(data)["mask"], batch["mask"])
    streamed = [{**row, "epoch": 1} for row in data]  # streams tell their own
    assert torch.equal(collator_of(encoder)(streamed)["mask"], collator_of(encoder, epoch=1)(data)["mask"])


def test_padding_and_missing_leads_are_told():
    extractor = ECGFeatureExtractor(100, 500, missing_leads="zeros")
    data = rows(2)
    ecg = data[1]["ecg"]
    data[1]["ecg"] = {**ecg, "array": ecg["array"][:3, :300], "lead_names": ["I", "V1", "V2"]}
    batch = collator_of(extractor=extractor)(data)
    assert batch["num_samples"].tolist() == [500, 300]
    assert batch["lead_mask"].sum(1).tolist() == [12, 3]
    assert not batch["ecg_values"][1, :, 300:].any()
    assert "lead_mask" not in collator_of()(rows(1))
    expected = extractor([row["ecg"] for row in data], return_tensors="pt")["ecg_values"]
    assert torch.equal(batch["ecg_values"], expected)


def test_reports():
    data = [{**row, "report": report} for row, report in zip(rows(3), ["sinus rhythm", None, "st " * 50], strict=True)]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    batch = collator_of(tokenizer=tokenizer, report_column="report", max_report_tokens=20)(data)
    assert batch["has_report"].tolist() == [True, False, True]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 20)
    words = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert "sinus rhythm" in tokenizer.decode(words)
    assert "input_ids" not in collator_of()(data)


def test_evaluation_is_not_augmented():
    changes = {"augment_ecg": True, "time_shift": 1.0, "gain_jitter": 0.3, "lead_dropout": 0.5, "epoch": 3}
    data = rows(8)
    plain, changed = collator_of()(data), collator_of(**changes)
    assert not torch.equal(changed(data)["ecg_values"], plain["ecg_values"])
    evaluated = changed.for_evaluation()(data)
    for name, values in plain.items():
        assert torch.equal(evaluated[name], values)


def test_errors_name_the_record():
    row = {"record_id": "r7", "ecg": {"array": np.full((12, 500), np.nan, np.float32), "sampling_rate": 100}}
    with pytest.raises(ValueError, match="In the batch of the records r7: "):
        collator_of()([row])
    ecg = rows(1)[0]["ecg"]
    with pytest.raises(ValueError, match="The row of the record r7 has 2 ECGs; expected one"):
        collator_of()([{"record_id": "r7", "ecg": [ecg, ecg]}])
