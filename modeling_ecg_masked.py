"""Masked autoencoding of ECGs: the encoder sees the patches that are kept, a decoder gives the masked ones back."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask

from .configuration_ecg_pretraining import ECGPretrainingConfig, num_kept
from .modeling_ecg_transformers import ECGTransformerLayer, sincos_positions


def mask_from_noise(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """Masks of which each row keeps the `int(n * (1 - mask_ratio))` places of the lowest noise.

    Args:
        noise: [..., n], such as of `torch.rand`.

    Returns:
        bool [..., n], True where masked.
    """
    ranks = noise.argsort(-1).argsort(-1)
    return ranks >= num_kept(noise.shape[-1], mask_ratio)


def kept_places(mask: torch.Tensor, number: int) -> torch.Tensor:
    """The places [..., number] that a mask [..., n] keeps, in ascending order."""
    return mask.byte().argsort(dim=-1, stable=True)[..., :number]  # of the bools False comes first


def _run(
    config: Any, layers: Iterable[nn.Module], states: torch.Tensor, token_mask: torch.Tensor | None
) -> torch.Tensor:
    """States [batch, tokens, width] through blocks; tokens whose `token_mask` is False are not attended to."""
    attention_mask = create_bidirectional_mask(config, states, token_mask)
    for layer in layers:
        states = layer(states, attention_mask=attention_mask)
    return states


class MaskedDecoder(nn.Module):
    """Reconstruction of MLAE and MTAE. Its blocks are those of the encoder's own decoder, whose states are an ELM's tokens."""

    def __init__(self, config: ECGPretrainingConfig, width: int, patch_values: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=config.encoder_config.layer_norm_eps)
        self.head = nn.Linear(width, patch_values)

    def make_patches(self, encoder: Any, records: torch.Tensor) -> torch.Tensor:
        """[batch, leads, samples] -> [batch, patches, patch values]."""
        return encoder.make_patches(records)

    def forward(
        self, encoder: Any, records: torch.Tensor, lead_mask: torch.Tensor | None, kept: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            encoder: MLAE or MTAE.
            records: [batch, leads, samples], as its `prepare_ecg_values` gives them.
            kept: [batch, patches that are not masked], their places.

        Returns:
            [batch, patches, patch values], of all patches.
        """
        states = encoder.embeddings(encoder.make_patches(records))  # CLS first
        batch, num_tokens, _ = states.shape
        token_mask = None if lead_mask is None else encoder.make_token_mask(lead_mask)
        places = nn.functional.pad(kept + 1, (1, 0))  # CLS is always kept
        kept_mask = None if token_mask is None else token_mask.gather(1, places)
        states = states.take_along_dim(places[..., None], dim=1)
        states = encoder.norm(_run(encoder.config, encoder.layers, states, kept_mask))

        states = encoder.decoder_embeddings.projection(states)
        every = self.mask_token.to(states.dtype).expand(batch, num_tokens, -1)
        states = every.scatter(1, places[..., None].expand_as(states), states)
        states = states + encoder.decoder_embeddings.positions[:, :num_tokens]
        states = _run(encoder.config, encoder.decoder_layers, states, token_mask)
        return self.head(self.norm(states[:, 1:]))


class LeadDecoder(MaskedDecoder):
    """Reconstruction of ST-MEM: one decoder for all leads, which reads each lead by itself."""

    positions: torch.Tensor

    def __init__(self, config: ECGPretrainingConfig) -> None:
        encoder, width = config.encoder_config, config.decoder_hidden_size
        super().__init__(config, width, encoder.patch_size)
        self.projection = nn.Linear(encoder.hidden_size, width)
        # a persistent buffer, as those of the encoders
        self.register_buffer("positions", torch.zeros(1, encoder.num_samples // encoder.patch_size + 2, width))
        self.layers = nn.ModuleList(
            ECGTransformerLayer(encoder, width, config.decoder_num_attention_heads)
            for _ in range(config.decoder_num_hidden_layers)
        )

    def fixed_positions(self) -> torch.Tensor:
        """Sines and cosines of the patches, zeros for the separators at both ends."""
        _, tokens, width = self.positions.shape
        return nn.functional.pad(sincos_positions(tokens - 2, width), (0, 0, 0, 1))

    def make_patches(self, encoder: Any, records: torch.Tensor) -> torch.Tensor:
        """[batch, leads, samples] -> [batch, leads, patches, patch values]."""
        return records.unflatten(-1, (-1, encoder.config.patch_size))

    def forward(
        self, encoder: Any, records: torch.Tensor, lead_mask: torch.Tensor | None, kept: torch.Tensor
    ) -> torch.Tensor:
        """As of `MaskedDecoder`; `kept` is [batch, leads, patches of each that are not masked], what comes out [batch, leads, patches,
        patch values]."""
        states = encoder.embeddings(records)  # [batch, leads, patches + 2, width], a separator at both ends
        batch, num_leads, num_tokens, _ = states.shape
        places = nn.functional.pad(kept + 1, (1, 0))
        places = nn.functional.pad(places, (0, 1), value=num_tokens - 1)  # separators are always kept
        states = states.take_along_dim(places[..., None], dim=2)
        kept_mask = None if lead_mask is None else lead_mask.bool().repeat_interleave(places.shape[2], dim=1)
        states = encoder.norm(_run(encoder.config, encoder.layers, states.flatten(1, 2), kept_mask))

        states = self.projection(states).unflatten(1, (num_leads, -1)).flatten(0, 1)  # a lead is a sequence
        every = self.mask_token.to(states.dtype).expand(batch * num_leads, num_tokens, -1)
        states = every.scatter(1, places.flatten(0, 1)[..., None].expand_as(states), states)
        # of short records the first patches', and the last separator's
        states = states + torch.cat([self.positions[:, : num_tokens - 1], self.positions[:, -1:]], dim=1)
        states = _run(encoder.config, self.layers, states, None)
        return self.head(self.norm(states[:, 1:-1])).unflatten(0, (batch, num_leads))


def make_masked_decoder(config: ECGPretrainingConfig) -> MaskedDecoder:
    """The decoder for the configured encoder."""
    encoder = config.encoder_config
    if encoder.model_type == "st_mem":
        return LeadDecoder(config)
    values = encoder.patch_size * (encoder.num_leads if encoder.model_type == "mtae" else encoder.num_samples)
    return MaskedDecoder(config, encoder.decoder_hidden_size, values)


def masked_loss(
    reconstruction: torch.Tensor, patches: torch.Tensor, counted: torch.Tensor, normalize_targets: bool
) -> torch.Tensor:
    """Mean squared error, in float32, over the values that count; 0 if none does.

    Args:
        reconstruction, patches: [..., patch values].
        counted: bool of the same shape.
        normalize_targets: each patch is standardised by mean and unbiased variance of its values that count.
    """
    patches, counts = patches.float(), counted.float()
    if normalize_targets:
        number = counts.sum(-1, keepdim=True)
        centred = (patches - (patches * counts).sum(-1, keepdim=True) / number.clamp(min=1)) * counts
        variance = centred.square().sum(-1, keepdim=True) / (number - 1).clamp(min=1)
        patches = centred / (variance + 1e-6).sqrt()
    errors = (reconstruction.float() - patches).square() * counts
    return errors.sum() / counts.sum().clamp(min=1)
