"""ECG encoders: MERL, MLAE, MTAE and ST-MEM, each a `PreTrainedModel` that loads and trains by itself."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init  # leaves alone what a checkpoint has filled
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.siglip.modeling_siglip import eager_attention_forward
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_elm import (
    ECGEncoderConfig,
    ECGTransformerConfig,
    MaskedAutoencoderConfig,
    MERLConfig,
    MLAEConfig,
    MTAEConfig,
    STMEMConfig,
)
from .modeling_common import CompleteModel


class ECGEncoder(CompleteModel):
    """The base of all encoders. Each implements `encode`, and `check_num_samples` if it does not read records of any length.

    `lead_mask` [batch, leads] is False for missing leads: the values in their rows are never read. The convolutions of MERL and
    the time patches of MTAE read zeros there. The tokens of MLAE and ST-MEM are leads or parts of them: those of a missing lead
    are not attended to, and are zeros in the output.
    """

    config: ECGEncoderConfig
    config_class: type[ECGEncoderConfig]  # transformers sets it to what `config` is annotated with
    base_model_prefix = "encoder"
    main_input_name = "ecg_values"  # transformers would look for input_ids
    input_modalities = "ecg"
    supports_gradient_checkpointing = True

    def prepare_ecg_values(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The records in the model's dtype, zeros for missing leads; ValueError if they do not fit the configuration."""
        name, leads = type(self).__name__, self.config.num_leads
        if not ecg_values.is_floating_point():  # integers are a recorder's counts, not millivolts
            raise ValueError(
                f"{name} got ecg_values of dtype {ecg_values.dtype}; expected floating point values: "
                "convert them with ecg_values.float()."
            )
        if ecg_values.ndim != 3:
            raise ValueError(
                f"{name} got ecg_values of shape {list(ecg_values.shape)}; expected [batch, {leads} leads, samples]: "
                "give one record as ecg_values[None]."
            )
        if ecg_values.shape[1] != leads:
            raise ValueError(
                f"{name} got records of {ecg_values.shape[1]} leads; expected {leads}: "
                "select them by name, or set num_leads in the configuration."
            )
        self.check_num_samples(ecg_values.shape[2])
        return without_missing_leads(ecg_values, lead_mask).to(self.dtype)

    def check_num_samples(self, num_samples: int) -> None:
        """ValueError if the encoder does not admit records of this length."""
        if num_samples < 1:
            raise ValueError(f"{type(self).__name__} got records of 0 samples; expected at least 1: drop them.")

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """Tokens [batch, tokens, output_size] of records as `prepare_ecg_values` gives them; `kwargs` are of the attention."""
        raise NotImplementedError

    @capture_outputs(tie_last_hidden_states=False)  # else the last block's state becomes last_hidden_state
    def forward(
        self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        """
        Args:
            ecg_values: float [batch, leads, samples].
            lead_mask: [batch, leads], False for missing leads; None if none is missing.

        Returns:
            `last_hidden_state` [batch, tokens, output_size], before pooling.
        """
        records = self.prepare_ecg_values(ecg_values, lead_mask)
        # reentrant checkpointing trains a block only if its input needs a gradient; compiled, every block is trained
        if self.training and self.is_activation_checkpointing and not torch.compiler.is_compiling():
            records = records.detach().requires_grad_()
        return BaseModelOutput(last_hidden_state=self.encode(records, lead_mask, **kwargs))


def without_missing_leads(ecg_values: torch.Tensor, lead_mask: torch.Tensor | None) -> torch.Tensor:
    """The records [batch, leads, samples] with zeros where `lead_mask` [batch, leads] is False."""
    if lead_mask is None:
        return ecg_values
    if lead_mask.shape != ecg_values.shape[:2]:
        raise ValueError(
            f"The lead mask has shape {list(lead_mask.shape)}; expected {list(ecg_values.shape[:2])}, one value for each lead of each "
            "record: take ecg_lead_mask as the feature extractor gives it."
        )
    return ecg_values.masked_fill(~lead_mask.bool()[..., None], 0)  # not a product: 0 * NaN is NaN


# MERL


class ResNetConv(nn.Module):
    """Convolution and batch norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)  # its shift makes a bias before it useless

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, channels, length] -> [batch, out_channels, length / stride]."""
        return self.norm(self.conv(hidden_states))


class BatchNormBlock(GradientCheckpointingLayer):
    """A block with batch norm, whose running statistics are the same with gradient checkpointing as without."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # a checkpointed block runs twice: two steps of the smaller momentum move the statistics like one of 0.1;
        # compiled, the second run leaves them
        runs_twice = self.gradient_checkpointing and not torch.compiler.is_compiling()
        momentum = 1 - math.sqrt(0.9) if runs_twice else 0.1
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = momentum  # the weight of the newest batch, as PyTorch defines it
        return super().__call__(*args, **kwargs)


class ResNetBlock(BatchNormBlock):
    """`bottleneck` (1x1, k3, 1x1) or `basic` (k3, k3) block; the stride is on the first k3 convolution."""

    def __init__(self, config: MERLConfig, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        if config.block == "bottleneck":
            out_channels = 4 * width  # the expansion of ResNet
            convs = [
                ResNetConv(in_channels, width, 1),
                ResNetConv(width, width, 3, stride),  # here as in torchvision; ResNet's paper strides one before
                ResNetConv(width, out_channels, 1),
            ]
        else:
            out_channels = width
            convs = [ResNetConv(in_channels, width, 3, stride), ResNetConv(width, width, 3)]
        self.convs = nn.ModuleList(convs)
        same_shape = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same_shape else ResNetConv(in_channels, out_channels, 1, stride)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As of `ResNetConv`."""
        residual = self.shortcut(hidden_states)
        for conv in self.convs[:-1]:
            hidden_states = conv(hidden_states).relu()
        return (self.convs[-1](hidden_states) + residual).relu()


class ResNetStage(nn.Sequential):
    """Blocks of one width; the first may halve the length."""

    def __init__(self, config: MERLConfig, in_channels: int, width: int, depth: int, stride: int) -> None:
        out_channels = 4 * width if config.block == "bottleneck" else width
        super().__init__(
            ResNetBlock(config, in_channels, width, stride),
            *(ResNetBlock(config, out_channels, width, stride=1) for _ in range(depth - 1)),
        )


class MERLModel(ECGEncoder):
    """1-D ResNet of MERL (Liu et al. 2024, arXiv 2403.06659), without max pool.

    Takes records of any length; a token stands for 2 ** (number of stages) samples, 157 tokens for 2500 samples.
    `hidden_states` are the stem's output and each stage's, [batch, channels, length].
    """

    config: MERLConfig
    _no_split_modules = ["ResNetConv", "ResNetBlock"]  # accelerate keeps each on one device
    _can_record_outputs = {"hidden_states": ResNetStage}  # and the first one's input, which is the stem's output

    def __init__(self, config: MERLConfig) -> None:
        super().__init__(config)
        channels = config.widths[0]
        self.stem = ResNetConv(config.num_leads, channels, kernel_size=7, stride=2)
        self.stages = nn.ModuleList()  # all but the first halve the length, as the stem does
        for index, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            self.stages.append(ResNetStage(config, channels, width, depth, stride=1 if index == 0 else 2))
            channels = 4 * width if config.block == "bottleneck" else width
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """A token for each place of the last stage; missing leads are zeros."""
        hidden_states = self.stem(ecg_values).relu()
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return hidden_states.transpose(1, 2)  # [batch, tokens, channels]


# The transformer of MLAE, MTAE and ST-MEM


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


class ECGTransformer(ECGEncoder):
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

    def check_num_samples(self, num_samples: int) -> None:
        """ValueError if records of this length do not make whole patches, or more of them than there are positions."""
        patch_size, most = self.config.patch_size, self.config.num_samples
        if not 0 < num_samples <= most or num_samples % patch_size:
            raise ValueError(
                f"{type(self).__name__} got records of {num_samples} samples; expected a multiple of patch_size={patch_size}, "
                f"{most} at most: cut or pad the records, or set num_samples in the configuration."
            )

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

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, hidden_size] -> [batch, tokens, decoder_hidden_size]."""
        hidden_states = self.projection(hidden_states)
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


ENCODER_MODELS: dict[str, type[ECGEncoder]] = {
    model.config_class.model_type: model for model in (MERLModel, MLAEModel, MTAEModel, STMEMModel)
}
for _model in ENCODER_MODELS.values():
    _model.register_for_auto_class("AutoModel")

__all__ = ["MERLModel", "MLAEModel", "MTAEModel", "STMEMModel"]
