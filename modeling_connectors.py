"""Connectors: from the tokens of an encoder, or from the record itself, to embeddings of the language model."""

import torch
from torch import nn

from .configuration_elm import ELMConfig
from .modeling_ecg_encoders import ENCODER_MODELS
from .modeling_vision_encoders import vision_output_size


def encoder_output_size(config: ELMConfig) -> int:
    """Width of what the connector reads of the encoder."""
    if config.encoder_config.model_type in ENCODER_MODELS:
        return config.encoder_config.output_size
    return vision_output_size(config.encoder_config, config.image_features)


def pool_tokens(tokens: torch.Tensor, num_tokens: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Adaptive average pooling of tokens [ECGs, tokens, width] to [ECGs, num_tokens, width].

    Args:
        mask: [ECGs, tokens], 1 for the tokens that are pooled, which come first, and 0 for padding.

    Raises:
        ValueError: there are fewer tokens than that.
    """
    if num_tokens > tokens.shape[1]:
        raise ValueError(
            f"num_ecg_tokens={num_tokens}, but the encoder makes {tokens.shape[1]} tokens of a record; choose at most that many."
        )
    if mask is None:
        return nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), num_tokens).transpose(1, 2)
    # the same bins as torch's, of each ECG's own number of tokens
    lengths = mask.sum(-1)[:, None]  # [ECGs, 1], tokens that are no padding
    bins = torch.arange(num_tokens, device=tokens.device)  # neighbours share a token where `lengths` is no multiple
    starts, ends = bins * lengths // num_tokens, ((bins + 1) * lengths + num_tokens - 1) // num_tokens  # floor, ceil
    places = torch.arange(tokens.shape[1], device=tokens.device)
    inside = (places >= starts[..., None]) & (places < ends[..., None])  # [ECGs, num_tokens, tokens]
    weights = inside.to(tokens.dtype) / (ends - starts)[..., None].to(tokens.dtype)  # each row sums to 1
    # what stands in padding may be anything, even NaN
    return weights @ tokens.masked_fill(mask[..., None] == 0, 0)


class EncoderConnector(nn.Module):
    """The base of what connects an encoder. `pool` has no weights, so what it gives for an ECG changes with the encoder alone."""

    def __init__(self, config: ELMConfig):
        super().__init__()
        self.num_ecg_tokens = config.num_ecg_tokens

    def pool(self, encoder_tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """What `forward` reads of the encoder's tokens [ECGs, tokens, width]: their averages [ECGs, num_ecg_tokens, width], as
        `pool_tokens` makes them."""
        return pool_tokens(encoder_tokens, self.num_ecg_tokens, mask)


class LinearConnector(EncoderConnector):
    """LLaVA's first connector: one linear map of each of the averaged tokens."""

    def __init__(self, config: ELMConfig):
        super().__init__(config)
        self.projection = nn.Linear(encoder_output_size(config), config.text_config.hidden_size)

    def forward(self, encoder_features: torch.Tensor) -> torch.Tensor:
        """[ECGs, num_ecg_tokens, encoder width], as of `pool` -> [ECGs, num_ecg_tokens, width of the language model]."""
        return self.projection(encoder_features)


class MLPConnector(EncoderConnector):
    """LLaVA-1.5's connector: linear, GELU, linear of each of the averaged tokens."""

    def __init__(self, config: ELMConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(encoder_output_size(config), hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, encoder_features: torch.Tensor) -> torch.Tensor:
        """As of `LinearConnector`."""
        return self.linear_2(nn.functional.gelu(self.linear_1(encoder_features)))


class FlatConnector(nn.Module):
    """Fuyu-like, without encoder: the whole record as one vector, one linear map, one token."""

    def __init__(self, config: ELMConfig):
        super().__init__()
        self.projection = nn.Linear(config.num_leads * config.num_samples, config.text_config.hidden_size)

    def forward(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """[ECGs, leads, samples] -> [ECGs, 1, width of the language model]."""
        return self.projection(ecg_values.flatten(1)).unsqueeze(1)


def time_patches(ecg_values: torch.Tensor, num_patches: int) -> torch.Tensor:
    """[ECGs, leads, samples] -> [ECGs, patches, leads, samples of a patch]."""
    num_ecgs, num_leads, _ = ecg_values.shape  # the config makes sure that patches divide the samples
    return ecg_values.reshape(num_ecgs, num_leads, num_patches, -1).transpose(1, 2)


class PatchConnector(nn.Module):
    """Fuyu-like, without encoder: one linear map of each time patch, its values ordered (lead, sample)."""

    def __init__(self, config: ELMConfig):
        super().__init__()
        self.num_patches = config.num_ecg_tokens
        patch_values = config.num_leads * config.num_samples // self.num_patches  # leads x samples of a patch
        self.projection = nn.Linear(patch_values, config.text_config.hidden_size)

    def forward(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """[ECGs, leads, samples] -> [ECGs, num_ecg_tokens, width of the language model]."""
        return self.projection(time_patches(ecg_values, self.num_patches).flatten(2))


class ConvConnector(nn.Module):
    """Fuyu-like, without encoder: two convolutions over each time patch, averaged over its samples, one linear map."""

    def __init__(self, config: ELMConfig):
        super().__init__()
        self.num_patches = config.num_ecg_tokens
        self.conv1 = nn.Conv1d(config.num_leads, 64, kernel_size=3, padding=1)  # sizes of the reference
        self.conv2 = nn.Conv1d(64, 128, kernel_size=7, padding=3)
        self.projection = nn.Linear(128, config.text_config.hidden_size)

    def forward(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """As of `PatchConnector`."""
        patches = time_patches(ecg_values, self.num_patches)
        states = self.conv2(self.conv1(patches.flatten(0, 1)).relu()).relu()  # zeros round each patch: each by itself
        return self.projection(states.mean(-1)).unflatten(0, patches.shape[:2])  # [ECGs, patches, width]


# the module of each of CONNECTORS; those of llava pool the encoder's tokens and take these, those of fuyu the records
CONNECTOR_MODULES: dict[str, type[nn.Module]] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "flat": FlatConnector,
    "patch": PatchConnector,
    "conv": ConvConnector,
}
