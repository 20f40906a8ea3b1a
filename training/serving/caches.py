"""What a language model keeps of several prompts, put together into what it keeps of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

_WITH_STATES = (
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)


def can_merge(cache: DynamicCache) -> bool:
    """Whether all layers are of the kinds that `merge` knows: some models have kinds of their own."""
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer, *_WITH_STATES) for layer in cache.layers
    )


def can_cut(cache: DynamicCache) -> bool:
    """Whether what was read can be cut to its beginning: a window forgets that, and a state is of all."""
    return all(type(layer) in (DynamicLayer, DummyLayer) for layer in cache.layers)


def merge(caches: Sequence[DynamicCache], length: int) -> DynamicCache:
    """The first cache with the rows of all, in their order.

    Args:
        length: tokens of the longest; the others are padded on the left, where the attention mask has to hide it. States need none.
    """
    layers: Any
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        first = layers[0]
        if isinstance(first, DynamicLayer) and first.is_initialized:
            width = length
            if isinstance(first, DynamicSlidingWindowLayer):
                width, first.cumulative_length = min(length, first.sliding_window - 1), length
            first.keys = torch.cat([_widened(layer.keys, width) for layer in layers])
            first.values = torch.cat([_widened(layer.values, width) for layer in layers])
        if isinstance(first, LinearAttentionLayer):
            for name in ("conv_states", "recurrent_states"):
                states = getattr(first, name)
                for place in states:
                    if states[place] is not None:
                        states[place] = torch.cat([getattr(layer, name)[place] for layer in layers])
    return caches[0]


def _widened(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """Keys or values [rows, heads, tokens, width of a head] of `width` tokens."""
    return pad(tensor, (0, 0, width - tensor.shape[-2], 0))


def trim(cache: DynamicCache, number: int) -> None:
    """Takes the first tokens of all rows away, which are padding."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            width = layer.keys.shape[-2] - number
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length -= number
                width = min(layer.cumulative_length, layer.sliding_window - 1)
            layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]


def row_of(cache: DynamicCache, row: int, mask: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Copies of the keys and values [1, heads, tokens, width of a head] of a row, for each layer that has any.

    Args:
        mask: [tokens], True for those of the row that are no padding.
    """
    layers: Any = cache.layers
    return [  # a mask copies
        None if layer.keys is None else (layer.keys[row : row + 1, :, mask], layer.values[row : row + 1, :, mask])
        for layer in layers
    ]
