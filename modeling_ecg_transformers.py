"""ECG encoders that are transformers: MLAE, MTAE and ST-MEM."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init  # leaves alone what a checkpoint has filled
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder

from .configuration_ecg_encoders import (
    ECGTransformerConfig,
    MaskedAutoencoderConfig,
    MLAEConfig,
    MTAEConfig,
    STMEMConfig,
)
from .modeling_ecg_base import TimePatchEncoder


class ECGAttention(nn.Module):
    """Self-attention by the attention implementation that the configuration names."""

    def __init__(self, config: ECGTransformerConfig, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False  # read by the attention implementations
        self.qkv_proj = nn.Linear(hidden_size, 3 * num_heads * config.head_dim)
        self.out_proj = nn.Linear(num_heads * config.head_dim, hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States [batch, tokens, hidden_size], and the attention's weights where its implementation gives them."""
        query, key, value = self.qkv_proj(hidden_states).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(  # the table has no eager: each model has its own
            self.config._attn_implementation, eager_attention_forward
        )
        hidden_states, weights = attention(
            self,
            query.transpose(1, 2),  # [batch, heads, tokens, head_dim]
            key.transpose(1, 2),
            value.transpose(1, 2),
            attention_mask=attention_mask,
            scaling=self.scaling,
            **kwargs,
        )
        return self.out_proj(hidden_states.flatten(2)), weights  # heads side by side


class ECGMLP(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size], token by token."""
        return self.fc2(nn.functional.gelu(self.fc1(hidden_states)))


class ECGTransformerLayer(GradientCheckpointingLayer):
    """Pre-norm block: x + Attn(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, config: ECGTransformerConfig, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = ECGAttention(config, hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = ECGMLP(hidden_size, config.mlp_ratio * hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """[batch, tokens, hidden_size]; `kwargs` are of the attention."""
        hidden_states = hidden_states + self.attention(self.norm1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.norm2(hidden_states))


class PatchEmbedding(nn.Module):
    """Patches [..., patch_dim] to [..., hidden_size]: layer norm, linear, layer norm."""

    def __init__(self, config: ECGTransformerConfig, patch_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(patch_dim, eps=config.layer_norm_eps)
        self.projection = nn.Linear(patch_dim, config.hidden_size)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[..., patch_dim] -> [..., hidden_size]."""
        return self.norm2(self.projection(self.norm1(patches)))


class ECGTransformer(TimePatchEncoder):
    """Base of MLAE, MTAE and ST-MEM. `hidden_states` and `attentions` are those of the blocks in `layers`."""

    config: ECGTransformerConfig
    # accelerate keeps each of these on one device: their forward uses parameters of their own
    _no_split_modules = ["ECGTransformerLayer", "MaskedAutoencoderEmbeddings", "DecoderEmbeddings", "STMEMEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # by the name of the list, as the decoder's blocks have another width
    _can_record_outputs = {
        "hidden_states": OutputRecorder(ECGTransformerLayer, index=0, layer_name="layers"),
        "attentions": OutputRecorder(ECGAttention, index=1, layer_name="layers"),
    }

    def __init__(self, config: ECGTransformerConfig, embeddings: nn.Module) -> None:
        super().__init__(config)
        width, heads = config.hidden_size, config.num_attention_heads
        self.embeddings = embeddings
        self.layers = nn.ModuleList(ECGTransformerLayer(config, width, heads) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (MaskedAutoencoderEmbeddings, DecoderEmbeddings)):
            _, tokens, width = module.positions.shape
            init.copy_(module.positions, sincos_positions(tokens - 1, width))  # CLS is not in the table
        if isinstance(module, MaskedAutoencoderEmbeddings):
            init.trunc_normal_(module.cls_token, std=std)
        elif isinstance(module, STMEMEmbeddings):
            for parameter in (module.positions, module.sep_token, module.lead_embeddings):
                init.trunc_normal_(parameter, std=std)


def zero_missing(hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """The states [batch, tokens, width] with zeros where `token_mask` [batch, tokens] is False."""
    return hidden_states if token_mask is None else hidden_states.masked_fill(~token_mask[..., None], 0)


# MLAE and MTAE


def sincos_positions(num_patches: int, width: int) -> torch.Tensor:
    """Fixed positions [1, 1 + num_patches, width]: zero for CLS, then sines, then cosines (MAE, arXiv 2111.06377)."""
    frequencies = 10000 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2))  # float64 as in MAE
    angles = torch.arange(num_patches, dtype=torch.float64)[:, None] * frequencies
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(table, (0, 0, 1, 0))[None].float()  # CLS is a row of zeros


class MaskedAutoencoderEmbeddings(nn.Module):
    """Patches [batch, patches, patch_dim] to tokens [batch, 1 + patches, hidden_size], CLS first."""

    positions: torch.Tensor

    def __init__(self, config: MaskedAutoencoderConfig, num_patches: int) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config, config.num_leads * config.num_samples // num_patches)
        self.cls_token = nn.Parameter(torch.zeros(config.hidden_size))
        # A persistent buffer: checkpoints carry the table, and neither `requires_grad_(True)` nor PEFT's
        # `modules_to_save` can make it train, as they would a frozen parameter.
        self.register_buffer("positions", torch.zeros(1, 1 + num_patches, config.hidden_size))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[batch, patches, patch_dim] -> [batch, 1 + patches, hidden_size]; records may be shorter than `num_samples`."""
        hidden_states = self.patch_embedding(patches)
        cls_token = self.cls_token.expand(hidden_states.shape[0], 1, -1)
        hidden_states = torch.cat([cls_token, hidden_states], dim=1)
        return hidden_states + self.positions[:, : hidden_states.shape[1]]  # short records: the first


class DecoderEmbeddings(nn.Module):
    """Tokens of the encoder to the decoder's width, with positions of their own."""

    positions: torch.Tensor

    def __init__(self, config: MaskedAutoencoderConfig, num_patches: int) -> None:
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, config.decoder_hidden_size)
        self.register_buffer("positions", torch.zeros(1, 1 + num_patches, config.decoder_hidden_size))

    def forward(self, hidden_states: torch.Tensor, unmask: Callable | None = None) -> torch.Tensor:
        """[batch, tokens, hidden_size] -> [batch, tokens, decoder_hidden_size]; `unmask` puts masked patches between them, in
        pretraining."""
        hidden_states = self.projection(hidden_states)
        if unmask is not None:
            hidden_states = unmask(hidden_states)
        return hidden_states + self.positions[:, : hidden_states.shape[1]]


class MaskedAutoencoderModel(ECGTransformer):
    """Encoder and decoder of a masked autoencoder, without masking; the tokens are the decoder's, CLS included.

    The decoder's final norm and its head serve the reconstruction only, and are left out.
    """

    config: MaskedAutoencoderConfig
    _keys_to_ignore_on_load_missing = [r"embeddings\.positions$"]  # fixed tables: they are made where a file lacks them

    def __init__(self, config: MaskedAutoencoderConfig, num_patches: int) -> None:
        super().__init__(config, MaskedAutoencoderEmbeddings(config, num_patches))
        width, heads = config.decoder_hidden_size, config.decoder_num_attention_heads
        self.decoder_embeddings = DecoderEmbeddings(config, num_patches)
        self.decoder_layers = nn.ModuleList(
            ECGTransformerLayer(config, width, heads) for _ in range(config.decoder_num_hidden_layers)
        )
        self.post_init()

    def make_patches(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """Records [batch, leads, samples] to patches [batch, patches, patch_dim]."""
        raise NotImplementedError

    def make_token_mask(self, lead_mask: torch.Tensor) -> torch.Tensor | None:
        """Which tokens [batch, 1 + patches] hold a lead that is not missing; None for all."""
        return None

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """The decoder's states, CLS first. Missing leads are zeros in time patches; MLAE gives zeros for a patch of none."""
        hidden_states = self.embeddings(self.make_patches(ecg_values))
        token_mask = None if lead_mask is None else self.make_token_mask(lead_mask)  # None for MTAE: all leads in each
        attention_mask = create_bidirectional_mask(self.config, hidden_states, token_mask)  # hides them as keys only
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = self.decoder_embeddings(self.norm(hidden_states))
        for layer in self.decoder_layers:  # the same mask: without masking, its tokens are the encoder's
            hidden_states = layer(hidden_states, attention_mask=attention_mask, **kwargs)
        return zero_missing(hidden_states, token_mask)


class MLAEModel(MaskedAutoencoderModel):
    """Masked lead autoencoder: a patch is all samples of `patch_size` leads. Records have `num_samples` samples."""

    config: MLAEConfig

    def __init__(self, config: MLAEConfig) -> None:
        super().__init__(config, num_patches=config.num_leads // config.patch_size)

    def check_num_samples(self, num_samples: int) -> None:
        """ValueError for any length but that of the configuration."""
        if num_samples != self.config.num_samples:
            raise ValueError(
                f"MLAEModel got records of {num_samples} samples; expected {self.config.num_samples}, as a patch is a "
                "whole lead: cut or pad the records, or set num_samples in the configuration."
            )

    def make_patches(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """[batch, leads / patch_size, patch_size * samples], lead after lead."""
        return ecg_values.unflatten(1, (-1, self.config.patch_size)).flatten(2)

    def make_token_mask(self, lead_mask: torch.Tensor) -> torch.Tensor:
        """CLS, and the patches with at least one lead that is there."""
        patches = lead_mask.bool().unflatten(1, (-1, self.config.patch_size)).any(-1)
        return nn.functional.pad(patches, (1, 0), value=True)  # CLS


class MTAEModel(MaskedAutoencoderModel):
    """Masked time autoencoder: a patch is `patch_size` samples of all leads, ordered (sample, lead).

    Takes shorter records too, of a multiple of `patch_size` samples.
    """

    config: MTAEConfig

    def __init__(self, config: MTAEConfig) -> None:
        super().__init__(config, num_patches=config.num_samples // config.patch_size)

    def make_patches(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """[batch, samples / patch_size, patch_size * leads], sample after sample."""
        return ecg_values.transpose(1, 2).unflatten(1, (-1, self.config.patch_size)).flatten(2)


# ST-MEM


class STMEMEmbeddings(nn.Module):
    """Records [batch, leads, samples] to tokens [batch, leads, patches + 2, hidden_size], SEP round each lead."""

    def __init__(self, config: STMEMConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embedding = PatchEmbedding(config, config.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, config.num_samples // config.patch_size + 2, config.hidden_size))
        self.sep_token = nn.Parameter(torch.zeros(config.hidden_size))
        self.lead_embeddings = nn.Parameter(torch.zeros(config.num_leads, config.hidden_size))  # by a lead's row

    def forward(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """[batch, leads, samples] -> [batch, leads, 1 + patches + 1, hidden_size]."""
        hidden_states = self.patch_embedding(ecg_values.unflatten(-1, (-1, self.patch_size)))
        sep_tokens = self.sep_token.expand(*hidden_states.shape[:2], 1, -1)
        hidden_states = torch.cat([sep_tokens, hidden_states, sep_tokens], dim=2)
        return hidden_states + self.positions[:, : hidden_states.shape[2]] + self.lead_embeddings[:, None]


class STMEMModel(ECGTransformer):
    """ST-MEM (Na et al. 2024, arXiv 2402.09450): patches of `patch_size` samples of each lead, all in one sequence.

    Takes shorter records too, of a multiple of `patch_size` samples.
    """

    config: STMEMConfig

    def __init__(self, config: STMEMConfig) -> None:
        super().__init__(config, STMEMEmbeddings(config))
        self.post_init()

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """All patches of a lead before the next lead's, without SEP; zeros for those of missing leads."""
        hidden_states = self.embeddings(ecg_values)
        token_mask = None if lead_mask is None else lead_mask.bool().repeat_interleave(hidden_states.shape[2], dim=1)
        hidden_states = hidden_states.flatten(1, 2)  # [batch, leads x (patches + 2), hidden_size]
        attention_mask = create_bidirectional_mask(self.config, hidden_states, token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=attention_mask, **kwargs)
        hidden_states = zero_missing(self.norm(hidden_states), token_mask)
        return hidden_states.unflatten(1, (self.config.num_leads, -1))[:, :, 1:-1].flatten(1, 2)


for _model in (MLAEModel, MTAEModel, STMEMModel):
    _model.register_for_auto_class("AutoModel")  # the code is saved beside the weights

__all__ = ["MLAEModel", "MTAEModel", "STMEMModel"]
