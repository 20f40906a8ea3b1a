"""Records as a pretraining model gives them back, beside what they are, on ECG paper."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig
from elm_ecg.ecg_drawing import ECGPaper, draw_ecg, page_height, page_width
from elm_ecg.ecg_utils import ECGRecord
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining
from elm_ecg.training.files import atomic_path
from elm_ecg.training.pretrain_collator import PretrainingCollator

WIDTH = 1600  # pixels of a picture
EPSILON = 1e-6  # of a patch's variance, as the targets have it


def as_records(config: ECGPretrainingConfig, patches: torch.Tensor) -> torch.Tensor:
    """Patches [batch, *mask_shape, patch values] as records [batch, leads, samples]."""
    encoder = config.encoder_config
    if encoder.model_type == "mtae":  # a patch is ordered (sample, lead)
        return patches.unflatten(-1, (-1, encoder.num_leads)).flatten(1, 2).transpose(1, 2)
    if encoder.model_type == "mlae":  # lead after lead
        return patches.unflatten(-1, (encoder.patch_size, -1)).flatten(1, 2)
    return patches.flatten(2)  # st_mem: [batch, leads, patches, samples of a patch]


@torch.no_grad()
def reconstruct(model: ECGForPreTraining, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Records with what the model draws in place of their masked patches, and the mask, both [batch, leads, samples].

    A model of standardised targets draws shapes alone: mean and deviation are those of the patch that is masked.
    """
    inputs = {
        name: batch[name].to(model.device)
        for name in ("ecg_values", "lead_mask", "num_samples", "mask")
        if name in batch
    }
    output = model(**inputs)  # without reports, which change nothing here
    assert model.decoder is not None
    assert output.reconstruction is not None
    assert output.mask is not None
    values, drawn = inputs["ecg_values"], output.reconstruction.float()
    if model.config.normalize_targets:
        patches = model.decoder.make_patches(model.encoder, values).float()
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        drawn = drawn * (variance + EPSILON).sqrt() + mean
    mask = as_records(model.config, output.mask[..., None].expand_as(drawn))
    return torch.where(mask, as_records(model.config, drawn), values).cpu(), mask.cpu()


def draw_reconstructions(
    folder: Path, model: ECGForPreTraining, collator: PretrainingCollator, rows: list[dict[str, Any]]
) -> None:
    """Draws each row's record into a PNG below `folder`: shaded where it is masked, and there in another colour what the model draws."""
    batch = collator(rows)
    was_training = model.training
    drawn, masks = reconstruct(model.eval(), batch)
    model.train(was_training)
    extractor, paper = collator.feature_extractor, ECGPaper()
    folder.mkdir(parents=True, exist_ok=True)
    unit = "" if extractor.normalization == "none" else f", {extractor.normalization} in place of mV"
    for index, row in enumerate(rows):
        length = int(batch["num_samples"][index])
        record = ECGRecord(
            batch["ecg_values"][index, :, :length].numpy(), extractor.sampling_rate, tuple(extractor.lead_names)
        )
        beside = replace(record, array=drawn[index, :, :length].numpy())
        scale = WIDTH / page_width(paper, length / extractor.sampling_rate)
        height = round(scale * page_height(paper, record.lead_names))
        name = str(row.get("record_id") or index + 1)
        caption = f"{name}: masked where shaded, reconstructed in orange{unit}"
        shades = masks[index, :, :length].numpy().astype(np.float32)
        picture = draw_ecg(record, height, WIDTH, paper, caption, beside=beside, shades=shades)
        with atomic_path(folder / f"{index + 1:02d}.png") as path:
            picture.save(path, "PNG")
