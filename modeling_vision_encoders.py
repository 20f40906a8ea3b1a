"""Vision backbones of Hugging Face as encoders of drawn or stacked ECGs: their towers, tokens and embeddings."""

import inspect
import math
import os
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, CLIPVisionModelWithProjection, PreTrainedConfig, PreTrainedModel

from .modeling_common import check_all_loaded


def vision_config(encoder: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of the vision tower of a model, which may have other towers (Hub id or local folder)."""
    config = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
    return getattr(config, "vision_config", config)


def vision_model_class(config: PreTrainedConfig, image_features: str) -> type[PreTrainedModel]:
    """The class of the tower.

    Raises:
        ValueError: the configuration is of a model that reads no images.
    """
    if config.model_type == "clip_vision_model" and image_features == "embedding":
        return CLIPVisionModelWithProjection  # into the space that CLIP's images share with its texts
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if model_class is None or model_class.main_input_name != "pixel_values":  # text and audio models stand there too
        raise ValueError(
            f"A {config.model_type!r} model reads no images; expected a vision backbone of transformers, such as clip, siglip2, "
            "vit, dinov2, convnext or resnet."
        )
    return model_class


def load_vision_model(encoder: str | os.PathLike, image_features: str) -> PreTrainedModel:
    """The pretrained vision tower of a model (Hub id or local folder); a text tower beside it is not loaded."""
    config = vision_config(encoder)
    model_class = vision_model_class(config, image_features)
    loaded: Any = model_class.from_pretrained(encoder, config=config, output_loading_info=True)
    model, info = loaded
    # a classifier is saved without a pooler; only embeddings are read of it, and of ViT not even those
    pools = image_features == "embedding" and config.model_type != "vit"
    check_all_loaded(model, info, unread=None if pools else "pooler.")
    return model


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)  # a list where it comes from JSON


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures that the tower was made for; 224 where any will do."""
    return _pair(getattr(config, "image_size", None) or 224)


def blank_images(config: PreTrainedConfig, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """One picture of zeros as inputs of the tower, of the device and the dtype of `like`."""
    if not hasattr(config, "num_patches"):  # SigLIP2 states it, and reads patches in place of pictures
        return {"pixel_values": like.new_zeros(1, config.num_channels, *image_size(config))}
    side = math.isqrt(config.num_patches)  # its table of positions is a square
    return {
        "pixel_values": like.new_zeros(1, side**2, config.num_channels * config.patch_size**2),
        "pixel_attention_mask": torch.ones(1, side**2, dtype=torch.long, device=like.device),
        "spatial_shapes": torch.full((1, 2), side, device=like.device),
    }


def encode_images(
    model: PreTrainedModel,
    image_features: str,
    pixel_values: torch.Tensor,
    pixel_attention_mask: torch.Tensor | None = None,
    spatial_shapes: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the tower makes of pictures.

    Args:
        image_features: `patches` for patch tokens, without class and register tokens; `embedding` for the pooled vector as in
            the reference: the image embedding of CLIP and SigLIP, of ViT the mean over layers and patches, of others their
            pooler's output.
        pixel_values: [pictures, channels, height, width]; of SigLIP2 [pictures, patches, values of a patch].
        pixel_attention_mask: [pictures, patches] of SigLIP2, 0 where there is only padding.
        spatial_shapes: [pictures, 2] of SigLIP2, rows and columns of patches.

    Returns:
        [pictures, patches, width] or [pictures, 1, width]

    Raises:
        ValueError: an embedding is wanted of a tower that has none.
    """
    config: Any = model.config
    kwargs: dict[str, Any] = {}
    # asked of the class: LoRA wraps the tower in a module with another signature
    takes = inspect.signature(vision_model_class(config, image_features).forward).parameters
    if spatial_shapes is not None:
        kwargs = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
    elif "interpolate_pos_encoding" in takes:  # without it ViT and others admit their own size only
        kwargs["interpolate_pos_encoding"] = tuple(pixel_values.shape[-2:]) != image_size(config)
    mean_of_layers = image_features == "embedding" and config.model_type == "vit"  # its pooler was not pretrained
    outputs = model(pixel_values.to(model.dtype), output_hidden_states=mean_of_layers, **kwargs)

    def patches(states: torch.Tensor) -> torch.Tensor:
        if states.ndim == 4:  # of a convolutional backbone: [pictures, width, rows, columns]
            return states.flatten(2).transpose(1, 2)
        if spatial_shapes is not None or not hasattr(config, "patch_size"):  # SigLIP2 has no token but patches
            return states
        rows, columns = (a // b for a, b in zip(pixel_values.shape[-2:], _pair(config.patch_size), strict=True))
        return states[:, max(0, states.shape[1] - rows * columns) :]  # class and register tokens come first

    if image_features == "patches":
        return patches(outputs.last_hidden_state)
    if mean_of_layers:  # of [1:], as [0] comes before the first layer
        return torch.stack([patches(states).mean(1) for states in outputs.hidden_states[1:]]).mean(0)[:, None]
    embedding = outputs.get("image_embeds", outputs.get("pooler_output"))  # the former of CLIP with its projection
    if embedding is None:
        raise ValueError(f"A {config.model_type} model makes no pooled vector; give image_features='patches'.")
    return embedding.flatten(1)[:, None]  # ResNet's pooler leaves [pictures, width, 1, 1]
