"""An ECG encoder of time patches and the layers of a SigLIP vision tower, whose weights it can take."""

import os
from typing import Any

import torch
from torch import nn
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipPreTrainedModel

from .configuration_ecg_encoders import SiglipECGConfig
from .modeling_ecg_base import TimePatchEncoder
from .modeling_vision_encoders import load_vision_model

# model types, whose layers are the same, and the fields of their configurations that these depend on
VISION_TOWERS = ("siglip_vision_model", "siglip2_vision_model")
FIELDS_OF_A_TOWER = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)


class SiglipECGEmbeddings(nn.Module):
    """Records [batch, leads, samples] to tokens [batch, patches, hidden_size]: one linear map and learned positions."""

    def __init__(self, config: SiglipECGConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.patch_embedding = nn.Linear(config.num_leads * config.patch_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.num_samples // config.patch_size, config.hidden_size)

    def forward(self, ecg_values: torch.Tensor) -> torch.Tensor:
        """[batch, leads, samples] -> [batch, samples / patch_size, hidden_size]; values of a patch are ordered (lead, sample)."""
        patches = ecg_values.unflatten(2, (-1, self.patch_size)).transpose(1, 2).flatten(2)
        return self.patch_embedding(patches) + self.position_embedding.weight[: patches.shape[1]]


class SiglipECGModel(TimePatchEncoder, SiglipPreTrainedModel):  # type: ignore[misc]  # the first says what it reads
    """The layers of a SigLIP 2 vision tower (Tschannen et al. 2025, arXiv 2502.14786) over patches of `patch_size` samples of all leads.

    Takes shorter records too, of a multiple of `patch_size` samples. New weights are drawn as SigLIP's; `hidden_states` and
    `attentions` are those of its layers.
    """

    config: SiglipECGConfig  # type: ignore[assignment]  # of a tower its layers read only what this has too
    _no_split_modules = ["SiglipECGEmbeddings", "SiglipEncoderLayer"]  # accelerate keeps each on one device

    def __init__(self, config: SiglipECGConfig) -> None:
        super().__init__(config)
        self.embeddings = SiglipECGEmbeddings(config)
        of_tower: Any = config
        self.layers = nn.ModuleList(SiglipEncoderLayer(of_tower) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @classmethod
    def from_vision_pretrained(cls, place: str | os.PathLike, **config_kwargs: Any) -> "SiglipECGModel":
        """An encoder with the layers of a pretrained vision tower; the patch embedding and the positions are new.

        Args:
            place: Hub id or local folder of a SigLIP or SigLIP 2 model, or of its vision tower.
            config_kwargs: arguments of [`SiglipECGConfig`] that no tower has: `num_leads`, `num_samples`, `patch_size`.

        Raises:
            ValueError: the model there is none of SigLIP.
        """
        tower: Any = load_vision_model(place, "patches")
        of_tower = tower.config
        if of_tower.model_type not in VISION_TOWERS:
            raise ValueError(
                f"{place} is of the model type {of_tower.model_type}; expected a SigLIP or SigLIP 2 model, such as "
                "google/siglip2-base-patch16-224."
            )
        shared = {name: getattr(of_tower, name) for name in FIELDS_OF_A_TOWER}
        model = cls(SiglipECGConfig(**shared, **config_kwargs))
        model.layers.load_state_dict(tower.encoder.layers.state_dict())
        model.post_layernorm.load_state_dict(tower.post_layernorm.state_dict())
        return model.eval()  # as `from_pretrained` leaves it

    def encode(self, ecg_values: torch.Tensor, lead_mask: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        """A token for each patch; missing leads are zeros."""
        hidden_states = self.embeddings(ecg_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, None, **kwargs)  # no attention mask
        return self.post_layernorm(hidden_states)


SiglipECGModel.register_for_auto_class("AutoModel")  # the code is saved beside the weights

__all__ = ["SiglipECGModel"]
