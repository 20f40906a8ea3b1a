import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional
from transformers import (
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from elm_ecg.configuration_ecg_encoders import SiglipECGConfig
from elm_ecg.modeling_ecg_encoders import SiglipECGModel

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE = {"num_leads": 3, "num_samples": 80, "patch_size": 10}


def siglip(seed=0, **fields):
    """A small one in which no tensor is trivial."""
    torch.manual_seed(seed)
    model = SiglipECGModel(SiglipECGConfig(**{**SIZES, **SHAPE, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def recompute(model, ecg_values):
    """The tokens, by the papers' description and the names of the weights."""
    weights, eps, heads = model.state_dict(), model.config.layer_norm_eps, model.config.num_attention_heads

    def linear(name, hidden_states):
        return hidden_states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, hidden_states):
        mean, var = hidden_states.mean(-1, keepdim=True), hidden_states.var(-1, correction=0, keepdim=True)
        return (hidden_states - mean) / (var + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    size, num_samples = model.config.patch_size, ecg_values.shape[2]
    patches = [ecg_values[:, :, start : start + size].flatten(1) for start in range(0, num_samples, size)]
    hidden_states = linear("embeddings.patch_embedding", torch.stack(patches, 1))
    hidden_states = hidden_states + weights["embeddings.position_embedding.weight"][: len(patches)]
    for layer in range(model.config.num_hidden_layers):
        name = f"layers.{layer}"
        normed = norm(f"{name}.layer_norm1", hidden_states)
        query, key, value = (  # [batch, heads, tokens, width of a head]
            linear(f"{name}.self_attn.{part}_proj", normed).unflatten(-1, (heads, -1)).transpose(1, 2) for part in "qkv"
        )
        attention = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(-1)
        attended = (attention @ value).transpose(1, 2).flatten(2)
        hidden_states = hidden_states + linear(f"{name}.self_attn.out_proj", attended)
        mlp = linear(f"{name}.mlp.fc1", norm(f"{name}.layer_norm2", hidden_states))
        hidden_states = hidden_states + linear(f"{name}.mlp.fc2", functional.gelu(mlp, approximate="tanh"))
    return norm("post_layernorm", hidden_states)


@pytest.mark.parametrize("num_samples", [80, 30])
def test_siglip_is_that_of_the_papers(num_samples):
    model, ecg_values = siglip(), torch.randn(2, 3, num_samples)
    with torch.inference_mode():
        torch.testing.assert_close(model(ecg_values).last_hidden_state, recompute(model, ecg_values))


def test_a_patch_is_lead_after_lead():
    model = siglip(num_hidden_layers=0)
    ecg_values = torch.zeros(1, 3, 80)
    ecg_values[0, 2, 41] = 1.0
    with torch.inference_mode():
        mapped = model.embeddings(ecg_values) - model.embeddings(torch.zeros(1, 3, 80))
    expected = torch.zeros(8, 32)
    expected[4] = model.embeddings.patch_embedding.weight[:, 2 * 10 + 1].detach()
    torch.testing.assert_close(mapped[0], expected, rtol=1e-4, atol=1e-6)


def test_new_weights_are_drawn_as_siglips():
    torch.manual_seed(0)
    model = SiglipECGModel(SiglipECGConfig(**SIZES | {"hidden_size": 256, "num_hidden_layers": 1}))
    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(**SIZES | {"hidden_size": 256, "num_hidden_layers": 1}))
    assert model.embeddings.position_embedding.weight.std().item() == pytest.approx(256**-0.5, rel=0.1)
    theirs = tower.encoder.layers.state_dict()
    for name, tensor in model.layers.state_dict().items():
        torch.testing.assert_close(tensor.std(), theirs[name].std(), rtol=0.1, atol=2e-7, msg=name)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(StrictDataclassError, match="num_attention_heads is 5, which must divide hidden_size=32"):
        SiglipECGConfig(**SIZES | {"num_attention_heads": 5})


class TestFromVisionPretrained:
    TOWERS = (
        (SiglipVisionModel, SiglipVisionConfig(**SIZES, image_size=32)),
        (Siglip2VisionModel, Siglip2VisionConfig(**SIZES, num_patches=4)),
        (SiglipModel, SiglipConfig(vision_config={**SIZES, "image_size": 32}, text_config={**SIZES, "vocab_size": 20})),
    )

    @pytest.mark.parametrize(("model_class", "config"), TOWERS, ids=["siglip", "siglip2", "with its text tower"])
    def test_layers_are_those_of_the_tower(self, model_class, config, tmp_path):
        torch.manual_seed(0)
        whole = model_class(config).eval()
        whole.save_pretrained(tmp_path / "tower")
        tower = getattr(whole, "vision_model", whole)
        model = SiglipECGModel.from_vision_pretrained(tmp_path / "tower", **SHAPE)
        assert (model.config.hidden_size, model.config.num_samples, model.training) == (32, 80, False)
        ecg_values = torch.randn(2, 3, 80)
        with torch.inference_mode():
            tokens = model(ecg_values).last_hidden_state
            hidden_states = tower.encoder(model.embeddings(ecg_values), attention_mask=None).last_hidden_state
            torch.testing.assert_close(tokens, tower.post_layernorm(hidden_states))
            model.save_pretrained(tmp_path / "encoder")
            loaded = SiglipECGModel.from_pretrained(tmp_path / "encoder")
            assert torch.equal(loaded(ecg_values).last_hidden_state, tokens)

    def test_another_backbone(self, tmp_path):
        ViTModel(ViTConfig(**SIZES, image_size=32)).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match="is of the model type vit; expected a SigLIP or SigLIP 2 model, such as google"
        ):
            SiglipECGModel.from_vision_pretrained(tmp_path)
