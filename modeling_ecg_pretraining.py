"""Pretraining of an ECG encoder: masked patches, reports, or both. The encoder is then used by itself, or in an ELM."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init  # leaves alone what a checkpoint has filled
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_ecg_pretraining import ECGPretrainingConfig, mask_shape, num_kept
from .modeling_common import attention_of, in_eval_mode, stay_frozen
from .modeling_ecg_base import without_missing_leads
from .modeling_ecg_contrastive import AttentionPool, ContrastiveHeads, contrastive_loss
from .modeling_ecg_encoders import ENCODER_MODELS
from .modeling_ecg_masked import (
    LeadDecoder,
    MaskedDecoder,
    kept_places,
    make_masked_decoder,
    mask_from_noise,
    masked_loss,
)
from .modeling_parts import ModelOfParts, adopt_encoder_class, make_encoder


@dataclass
class ECGPretrainingOutput(ModelOutput):
    """What a step of pretraining gives; None for what is not among the objectives.

    Args:
        loss: masked_loss + contrastive_weight * contrastive_loss.
        masked_loss: mean squared error of the masked values.
        contrastive_loss: ECG against report and one view of the ECG against the other, over the batch of all processes.
        reconstruction: [batch, *mask_shape, patch values], of all patches; where targets are standardised, of standardised ones.
        mask: bool [batch, *mask_shape], True for the patches that the encoder did not see.
    """

    loss: torch.Tensor | None = None
    masked_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    mask: torch.Tensor | None = None


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


class ECGForPreTraining(ModelOfParts):
    """An ECG encoder with its decoder for masked patches, heads and text encoder for reports, as the objectives need them.

    - `masked` (MAE, arXiv 2111.06377; ST-MEM, arXiv 2402.09450; MaeFE): the encoder sees the patches that are kept, and no others.
    - `contrastive` (MERL, arXiv 2403.06659): ECGs and their reports, and two views of each ECG.
    - both: the encoder runs twice, on the kept patches and on the whole record.

    A text encoder of which nothing is trained runs without gradients and dropout; `text_encoder.requires_grad_(False)` freezes it.
    """

    config: ECGPretrainingConfig
    config_class: type[ECGPretrainingConfig]  # transformers sets it to what `config` is annotated with
    main_input_name = "ecg_values"  # transformers would look for input_ids
    input_modalities = ["ecg", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self,
        config: ECGPretrainingConfig,
        encoder: PreTrainedModel | None = None,
        text_encoder: PreTrainedModel | None = None,
    ) -> None:
        """
        Args:
            encoder, text_encoder: pretrained ones, whose configurations those in `config` become; None: new ones. A text encoder
                loses its pooler where nothing reads it.
        """
        for name, part in (("encoder_config", encoder), ("text_config", text_encoder)):
            if part is not None:
                setattr(config, name, part.config)
        super().__init__(config)
        for part in (encoder, text_encoder):
            # lost as it became a part of another config
            if part is not None and part.config._attn_implementation is None:
                part.config._attn_implementation = attention_of(type(part), config._attn_implementation) or "eager"
        self.encoder = make_encoder(config) if encoder is None else encoder
        if type(self.encoder) not in ENCODER_MODELS.values():  # somebody's own: its code is saved too
            config.encoder_config.auto_map = adopt_encoder_class(type(self.encoder))
        self.decoder = make_masked_decoder(config) if "masked" in config.objectives else None
        self.text_encoder: Any = None
        self.heads: Any = None
        if "contrastive" in config.objectives:
            self.text_encoder = AutoModel.from_config(config.text_config) if text_encoder is None else text_encoder
            if config.text_pooling != "pooler" and getattr(self.text_encoder, "pooler", None) is not None:
                self.text_encoder.pooler = None  # DDP waits for the gradients of all weights
            width, config.num_encoder_tokens = self._encoder_sizes()
            self.heads = ContrastiveHeads(config, width, config.num_encoder_tokens)
        self.post_init()

    def _encoder_sizes(self) -> tuple[int, int]:
        """Width and number of the encoder's tokens; a silent record tells a number that the configuration does not have."""
        config, encoder_config = self.config, self.config.encoder_config
        width = getattr(encoder_config, "output_size", None) or encoder_config.hidden_size
        if config.num_encoder_tokens is not None:
            return width, config.num_encoder_tokens
        shape: list[Any] = [getattr(encoder_config, name, None) for name in ("num_leads", "num_samples")]
        if None in shape:
            raise ValueError(
                f"{type(encoder_config).__name__} has no num_leads or no num_samples; give num_encoder_tokens in the configuration of the "
                "pretraining, as many as the encoder makes of a record."
            )
        silence = next(self.encoder.parameters()).new_zeros(1, *shape)
        with torch.no_grad(), in_eval_mode(self.encoder):
            return width, self.encoder(silence).last_hidden_state.shape[1]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MaskedDecoder):
            init.normal_(module.mask_token, std=std)
        if isinstance(module, LeadDecoder):
            init.copy_(module.positions, module.fixed_positions())
        elif isinstance(module, AttentionPool):
            init.normal_(module.cls_token, std=std)
            init.normal_(module.positions, std=std)

    def train(self, mode: bool = True) -> "ECGForPreTraining":
        """What is not trained stays in eval mode, as `stay_frozen` says."""
        super().train(mode)
        for part in (self.encoder, self.text_encoder) if mode else ():
            if part is not None:
                stay_frozen(part)
        return self

    def get_ecg_embeddings(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors [batch, projection_size] of ECGs [batch, leads, samples]; ValueError without the objective contrastive."""
        return nn.functional.normalize(self._embed_ecgs(ecg_values, lead_mask)[0].float(), dim=1)

    def get_text_embeddings(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors [batch, projection_size] of texts [batch, tokens]; ValueError without the objective contrastive."""
        features = self.get_text_features(input_ids, attention_mask)
        return nn.functional.normalize(self.heads.text_projection(features).float(), dim=1)

    def _check_contrastive(self) -> None:
        if self.heads is None:
            raise ValueError(
                f"This model was made for {' and '.join(self.config.objectives)}, so it has no embeddings of ECGs and reports: pretrain "
                "it with the objective contrastive."
            )

    def _embed_ecgs(
        self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._check_contrastive()
        return self.heads.embed_ecgs(self.encoder(ecg_values, lead_mask=lead_mask).last_hidden_state)

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """What the text encoder gives for texts [batch, tokens], pooled: [batch, width of the text encoder]. One that is frozen gives
        the same for a text each time."""
        self._check_contrastive()
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        with torch.set_grad_enabled(torch.is_grad_enabled() and _is_trained(self.text_encoder)):
            output = self.text_encoder(input_ids=input_ids, attention_mask=attention_mask)
        if self.config.text_pooling == "pooler":
            return output.pooler_output
        if self.config.text_pooling == "cls":
            return output.last_hidden_state[:, 0]
        attended = attention_mask[..., None].to(output.last_hidden_state.dtype)
        return (output.last_hidden_state * attended).sum(1) / attended.sum(1).clamp(min=1)

    def _masked(
        self,
        ecg_values: torch.Tensor,
        lead_mask: torch.Tensor | None,
        num_samples: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> ECGPretrainingOutput:
        """Reconstruction and its loss, of records with zeros at their padding."""
        assert self.decoder is not None
        config, encoder = self.config, self.encoder
        prepare: Any = encoder.prepare_ecg_values
        records = prepare(ecg_values, lead_mask)
        there = torch.ones_like(records, dtype=torch.bool)
        if lead_mask is not None:
            there &= lead_mask.bool()[..., None]
        if num_samples is not None:
            # patches of time that hold any padding do not count; of the whole leads of MLAE what is there does
            size = 1 if config.encoder_config.model_type == "mlae" else config.encoder_config.patch_size
            there &= ~_padding(records, num_samples // size * size)
        # not of the records, which are in the model's dtype
        patches = self.decoder.make_patches(encoder, without_missing_leads(ecg_values, lead_mask))
        there = self.decoder.make_patches(encoder, there)

        shape = patches.shape[:-1]
        if mask is None:
            mask = mask_from_noise(torch.rand(shape, device=records.device), config.mask_ratio)
            number = num_kept(shape[-1], config.mask_ratio)
        else:
            mask, number = _checked_mask(mask, shape)
        reconstruction = self.decoder(encoder, records, lead_mask, kept_places(mask, number))
        loss = masked_loss(reconstruction, patches, mask[..., None] & there, bool(config.normalize_targets))
        return ECGPretrainingOutput(masked_loss=loss, reconstruction=reconstruction, mask=mask)

    @can_return_tuple
    def forward(
        self,
        ecg_values: torch.Tensor,
        lead_mask: torch.Tensor | None = None,
        num_samples: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        has_report: torch.Tensor | None = None,
        text_features: torch.Tensor | None = None,
    ) -> ECGPretrainingOutput:
        """
        Args:
            ecg_values: float [batch, leads, samples].
            lead_mask: [batch, leads], False for missing leads, which are not read, and do not count in the masked loss; None if none
                is missing.
            num_samples: [batch], samples of each record before its padding, which is not read, and does not count in the masked
                loss: nor does a patch of time that holds any. None: there is no padding.
            mask: bool [batch, *mask_shape(config)], True where masked, as many in each row; None: `mask_ratio` at random.
            input_ids, attention_mask: [batch, tokens] of the reports; None: no record has a report, and the ECGs' views alone are
                compared. With several processes and a text encoder that is trained, give them in each batch.
            text_features: in place of them, what `get_text_features` gave for them.
            has_report: bool [batch], False where the text is no report; such records have their views compared alone. None: all have.

        Raises:
            ValueError: records, mask or texts do not fit each other or the configuration.
        """
        if num_samples is not None:  # zeros also where NaN stands
            ecg_values = ecg_values.masked_fill(_padding(ecg_values, num_samples), 0)
        output = ECGPretrainingOutput()
        losses: list[Any] = []
        if self.decoder is not None:
            output = self._masked(ecg_values, lead_mask, num_samples, mask)
            losses.append(output.masked_loss)
        if self.heads is not None:
            if text_features is None and input_ids is not None:
                text_features = self.get_text_features(input_ids, attention_mask)
            loss = self._contrast(ecg_values, lead_mask, text_features, has_report)
            output.contrastive_loss = loss
            losses.append(loss if self.decoder is None else self.config.contrastive_weight * loss)
        output.loss = sum(losses[1:], losses[0])
        return output

    def _contrast(
        self,
        ecg_values: torch.Tensor,
        lead_mask: torch.Tensor | None,
        text_features: torch.Tensor | None,
        has_report: torch.Tensor | None,
    ) -> torch.Tensor:
        ecgs = self._embed_ecgs(ecg_values, lead_mask)
        batch = len(ecg_values)
        if text_features is None:
            # nothing reads these, but all processes gather as much, and DDP waits for the gradients of the projection
            text_features = ecgs[0].new_zeros(batch, self.config.text_config.hidden_size)
            has_report = torch.zeros(batch, dtype=torch.bool, device=ecg_values.device)
        texts = self.heads.text_projection(text_features)
        if has_report is None:
            has_report = torch.ones(batch, dtype=torch.bool, device=ecg_values.device)
        if len(texts) != batch or len(has_report) != batch:
            raise ValueError(
                f"The batch has {batch} ECGs, {len(texts)} texts and {len(has_report)} values of has_report; give one of each for each "
                "ECG."
            )
        return contrastive_loss(self.heads, ecgs, texts, has_report.bool(), self.config.temperature)


def _padding(ecg_values: torch.Tensor, num_samples: torch.Tensor) -> torch.Tensor:
    """Where records [batch, leads, samples] are padding: bool [batch, 1, samples]; ValueError if there is no number for each."""
    if ecg_values.ndim != 3 or num_samples.shape != ecg_values.shape[:1]:
        raise ValueError(
            f"num_samples has shape {list(num_samples.shape)} with ecg_values of shape {list(ecg_values.shape)}; expected [batch] and "
            "[batch, leads, samples], a number for each record."
        )
    return (torch.arange(ecg_values.shape[2], device=ecg_values.device) >= num_samples[:, None])[:, None]


def _checked_mask(mask: torch.Tensor, shape: torch.Size) -> tuple[torch.Tensor, int]:
    """A given mask as bools, and how many patches each row keeps; ValueError if it does not fit."""
    if mask.shape != shape:
        raise ValueError(f"mask has shape {list(mask.shape)}; expected {list(shape)}, a value for each patch.")
    mask = mask.bool()
    numbers = (~mask).sum(-1)
    if numbers.min() != numbers.max():
        raise ValueError(
            f"mask keeps {numbers.min()} to {numbers.max()} patches of a row; keep as many in each, as `mask_from_noise` does."
        )
    return mask, int(numbers.max())


ECGForPreTraining.register_for_auto_class("AutoModel")  # the code is saved beside the weights

__all__ = ["ECGForPreTraining", "ECGPretrainingConfig", "ECGPretrainingOutput", "mask_from_noise", "mask_shape"]
