"""Connectors: from the tokens of an encoder, or from the record itself, to embeddings of the language model."""

import inspect
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_elm import ELMConfig, is_own_connector
from .own_code import own_reference


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


def zero_padding(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """All of an encoder's tokens [ECGs, tokens, width], zeros for padding, where `mask` [ECGs, tokens] is 0."""
    return tokens if mask is None else tokens.masked_fill(mask[..., None] == 0, 0)


class EncoderConnector(nn.Module):
    """The base of what connects an encoder. `pool` has no weights, so what it gives for an ECG changes with the encoder alone: what is
    trained is in `forward`. A connector without `pool` reads what `zero_padding` gives."""

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
        self.projection = nn.Linear(config.encoder_output_size, config.text_config.hidden_size)

    def forward(self, encoder_features: torch.Tensor) -> torch.Tensor:
        """[ECGs, num_ecg_tokens, encoder width], as of `pool` -> [ECGs, num_ecg_tokens, width of the language model]."""
        return self.projection(encoder_features)


class MLPConnector(EncoderConnector):
    """LLaVA-1.5's connector: linear, GELU, linear of each of the averaged tokens."""

    def __init__(self, config: ELMConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.encoder_output_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, encoder_features: torch.Tensor) -> torch.Tensor:
        """As of `LinearConnector`."""
        return self.linear_2(nn.functional.gelu(self.linear_1(encoder_features)))


def sine_positions(number: int, width: int, device: torch.device) -> torch.Tensor:
    """Positions [number, width]: sines, then cosines, of frequencies from 1 to 1/10000 (arXiv 1706.03762)."""
    frequencies = 10000 ** -(torch.arange(width // 2, device=device) / (width // 2))
    angles = torch.arange(number, device=device)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class PerceiverLayer(GradientCheckpointingLayer):
    """Latents look at the tokens and at each other, then pass a two-layer perceptron; both with a residual."""

    def __init__(self, hidden_size: int, num_attention_heads: int, mlp_ratio: int):
        super().__init__()
        self.num_heads = num_attention_heads
        self.norm_tokens, self.norm_latents = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.output = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.mlp_1 = nn.Linear(hidden_size, mlp_ratio * hidden_size)
        self.mlp_2 = nn.Linear(mlp_ratio * hidden_size, hidden_size)

    def forward(self, latents: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Latents [ECGs, latents, width], tokens [ECGs, tokens, width], mask [ECGs, 1, 1, tokens + latents], False for what is not
        looked at -> [ECGs, latents, width]."""
        normed = self.norm_latents(latents)
        seen = torch.cat([self.norm_tokens(tokens), normed], dim=1)
        query, key, value = (
            states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [ECGs, heads, tokens, width of a head]
            for states in (self.query(normed), *self.key_value(seen).chunk(2, dim=-1))
        )
        states = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        latents = latents + self.output(states.transpose(1, 2).flatten(2))
        return latents + self.mlp_2(nn.functional.gelu(self.mlp_1(self.norm_mlp(latents))))


class PerceiverConnector(EncoderConnector):
    """The perceiver resampler of Flamingo (arXiv 2204.14198): learned latents, as many as an ECG has tokens in the text, gather what
    they need of all the encoder's tokens, which have positions.

    A token of zeros is padding, or that of a missing lead, and not looked at.

    Args:
        num_hidden_layers: layers.
        num_attention_heads: heads, which share the width.
        hidden_size: width of the latents.
        mlp_ratio: width of the perceptrons in these.
    """

    def __init__(
        self,
        config: ELMConfig,
        num_hidden_layers: int = 2,
        num_attention_heads: int = 8,
        hidden_size: int = 512,
        mlp_ratio: int = 4,
    ):
        super().__init__(config)
        for name, value in (
            ("num_hidden_layers", num_hidden_layers),
            ("num_attention_heads", num_attention_heads),
            ("hidden_size", hidden_size),
            ("mlp_ratio", mlp_ratio),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"connector_config: {name} is {value!r}; expected a whole number of at least 1.")
        if hidden_size % (2 * num_attention_heads):
            raise ValueError(
                f"connector_config: hidden_size is {hidden_size}; expected a multiple of twice num_attention_heads={num_attention_heads}."
            )
        self.latents = nn.Parameter(0.02 * torch.randn(config.num_ecg_tokens, hidden_size))
        self.input = nn.Linear(config.encoder_output_size, hidden_size)
        self.layers = nn.ModuleList(
            PerceiverLayer(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_hidden_layers)
        )
        self.norm = nn.LayerNorm(hidden_size)
        self.projection = nn.Linear(hidden_size, config.text_config.hidden_size)

    def pool(self, encoder_tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """All of the encoder's tokens, as `zero_padding` gives them: the latents pool them."""
        return zero_padding(encoder_tokens, mask)

    def forward(self, encoder_features: torch.Tensor) -> torch.Tensor:
        """[ECGs, tokens, encoder width] -> [ECGs, num_ecg_tokens, width of the language model]."""
        seen = encoder_features.ne(0).any(-1)
        seen = seen | ~seen.any(-1, keepdim=True)  # of nothing but zeros, as of a silent record, all are
        tokens = self.input(encoder_features)
        tokens = tokens + sine_positions(tokens.shape[1], tokens.shape[2], tokens.device).to(tokens.dtype)
        latents = self.latents.expand(len(tokens), -1, -1)
        mask = nn.functional.pad(seen, (0, latents.shape[1]), value=True)[:, None, None]
        for layer in self.layers:
            latents = layer(latents, tokens, mask)
        return self.projection(self.norm(latents))


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


# the module of each of CONNECTORS; those of llava read the encoder's tokens, those of fuyu the records
CONNECTOR_MODULES: dict[str, type[nn.Module]] = {
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "perceiver": PerceiverConnector,
    "flat": FlatConnector,
    "patch": PatchConnector,
    "conv": ConvConnector,
}
# somebody's own by `module.Class`, once its code is loaded
OWN_CONNECTORS: dict[str, type[nn.Module]] = {}


def adopt_connector_class(connector_class: type[nn.Module]) -> str:
    """Makes somebody's own connector known to `make_connector`; returns its name for `ELMConfig`."""
    name = own_reference(connector_class)
    OWN_CONNECTORS[name] = connector_class
    return name


def make_connector(config: ELMConfig) -> nn.Module:
    """The connector of the config, with random weights; its `connector_config` then has the defaults too.

    Raises:
        ValueError: there is no such connector, or it has no such argument.
    """
    name, own = config.connector or "", is_own_connector(config.connector)
    connector_class = (OWN_CONNECTORS if own else CONNECTOR_MODULES).get(name)
    if connector_class is None:  # the config has checked names of ours
        raise ValueError(
            f"The code of the connector {name} is not loaded; load the model with from_pretrained and trust_remote_code=True."
        )
    given = config.connector_config or {}
    parameters = inspect.signature(connector_class.__init__).parameters.values()
    defaults: dict[str, Any] = {part.name: part.default for part in list(parameters)[2:]}  # behind self and config
    if unknown := sorted(given.keys() - defaults.keys()):
        expected = f"it has {', '.join(defaults)}" if defaults else "it has none"
        raise ValueError(f"connector_config: the {name} connector has no field {', '.join(unknown)}; {expected}.")
    fields = defaults | given
    if missing := [field for field, value in fields.items() if value is inspect.Parameter.empty]:
        raise ValueError(
            f"connector_config: the {name} connector needs {', '.join(missing)}, which it has no default of."
        )
    connector = connector_class(config, **fields)
    config.connector_config = fields or None
    if own:  # one's own begins as its `__init__` leaves it; layers of ours are drawn as transformers does
        for module in connector.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
    return connector
