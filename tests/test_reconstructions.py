import numpy as np
import pytest
import torch
from PIL import Image
from test_pretrain_collator import collator_of, config_of, rows

from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.training.reconstructions import as_records, draw_reconstructions, reconstruct

ENCODERS = ["st_mem", "mtae", "mlae"]


def model_of(encoder):
    torch.manual_seed(0)
    return ECGForPreTraining(config_of(encoder)).eval()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_patches_become_the_record_again(encoder):
    model, values = model_of(encoder), torch.randn(2, 12, 500)
    patches = model.decoder.make_patches(model.encoder, values)
    assert torch.equal(as_records(model.config, patches), values)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_is_drawn(encoder, monkeypatch):
    """What the encoder saw is the record; elsewhere a perfect model gives the record again, from standardised patches too."""
    model, batch = model_of(encoder), collator_of(encoder)(rows(3))
    drawn, mask = reconstruct(model, batch)
    assert 0.6 < mask.float().mean() < 0.9
    assert torch.equal(drawn[~mask], batch["ecg_values"][~mask])
    assert not torch.equal(drawn, batch["ecg_values"])

    def perfect(encoder, records, lead_mask, kept):
        patches = model.decoder.make_patches(encoder, records)
        if not model.config.normalize_targets:
            return patches
        return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()

    monkeypatch.setattr(model.decoder, "forward", perfect)
    drawn, _ = reconstruct(model, batch)
    torch.testing.assert_close(drawn, batch["ecg_values"], atol=1e-5, rtol=1e-4)


def test_pictures(tmp_path):
    model, collator = model_of("st_mem"), collator_of()
    data = [{**row, "record_id": f"r{index}"} for index, row in enumerate(rows(2))]
    draw_reconstructions(tmp_path / "pictures", model, collator, data)
    pictures = [Image.open(path) for path in sorted((tmp_path / "pictures").iterdir())]
    assert [picture.width for picture in pictures] == [1600, 1600]
    pixels = np.array(pictures[0]).astype(int)
    orange = (pixels[..., 0] > 180) & (pixels[..., 1] < 130) & (pixels[..., 2] < 60)
    assert 0.0005 < orange.mean() < 0.2
