import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    EfficientNetConfig,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    ViTConfig,
    ViTMSNConfig,
    logging,
)

from elm_ecg.configuration_elm import ELMConfig
from elm_ecg.modeling_connectors import pool_tokens
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.modeling_vision_encoders import (
    blank_images,
    encode_images,
    load_vision_model,
    vision_config,
    vision_model_class,
)
from helpers import TINY_VISION, every_pair, save_tiny_llm, tiny_image_elm_config, tiny_vision_config

# tokens before the patches: class, distillation and register tokens
EXTRA_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "vit": 1,
    "deit": 2,
    "dinov2": 1,
    "dinov2_with_registers": 5,
}
SHAPES = torch.tensor([[5, 3], [4, 4], [1, 7], [2, 2]])  # rows and columns of SigLIP2's patches


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tiny_tower(model_type, image_features="patches", **changes):
    torch.manual_seed(0)
    if model_type in TINY_VISION:
        config = tiny_vision_config(model_type, **changes)
    else:
        of = "dinov2" if model_type.startswith("dinov2") else "vit"
        config = CONFIG_MAPPING[model_type](**TINY_VISION[of] | changes)
    return vision_model_class(config, image_features)(config).eval()


def naflex(shapes=SHAPES):
    """Inputs of SigLIP2, zeros in the padding as its image processor leaves them."""
    lengths = shapes.prod(-1)
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return {
        "pixel_values": randn(*mask.shape, 3 * 32**2) * mask[..., None],
        "pixel_attention_mask": mask,
        "spatial_shapes": shapes,
    }


def inputs_of(model_type):
    return naflex() if model_type == "siglip2_vision_model" else {"pixel_values": randn(2, 3, 160, 160)}


@torch.no_grad()
def encode(model, image_features="patches", **inputs):
    return encode_images(model, image_features, **inputs)


class TestPatches:
    @pytest.mark.parametrize("model_type", EXTRA_TOKENS)
    def test_class_and_register_tokens_are_left_out(self, model_type):
        model = tiny_tower(model_type)
        pictures = randn(2, 3, 160, 160)
        patches = encode(model, pixel_values=pictures)
        assert patches.shape == (2, 25, 32)
        states = model(pictures).last_hidden_state
        assert states.shape[1] == 25 + EXTRA_TOKENS[model_type]
        assert torch.equal(patches, states[:, EXTRA_TOKENS[model_type] :])

    def test_of_a_convolutional_backbone(self):
        """Row by row."""
        model = tiny_tower("resnet")
        patches = encode(model, pixel_values=(pictures := randn(2, 3, 96, 160)))
        states = model(pictures).last_hidden_state
        assert states.shape == (2, 32, 12, 20)
        assert patches.shape == (2, 240, 32)
        assert torch.equal(patches[:, 3 * 20 + 7], states[:, :, 3, 7])

    @pytest.mark.parametrize("size", [(96, 160), (256, 192), (170, 190)])
    @pytest.mark.parametrize("model_type", ["clip_vision_model", "vit", "dinov2"])
    def test_pictures_of_another_size(self, model_type, size):
        """Positions are interpolated: those of the tower's own size would not do."""
        model = tiny_tower(model_type)
        pictures = randn(2, 3, *size)
        patches = encode(model, pixel_values=pictures)
        assert patches.shape == (2, (size[0] // 32) * (size[1] // 32), 32)
        if model_type != "dinov2":  # which does so by itself
            states = model(pictures, interpolate_pos_encoding=True).last_hidden_state
            assert torch.equal(patches, states[:, 1:])
            with pytest.raises(ValueError, match="doesn't match model"):
                model(pictures)
        torch.testing.assert_close(patches[:1], encode(model, pixel_values=pictures[:1]))

    def test_in_the_wrapper_of_lora(self):
        """Which has another signature than the tower."""
        model = ELMForConditionalGeneration(tiny_image_elm_config("vit")).eval()
        pictures = randn(1, 3, 96, 160)
        expected = model.get_ecg_features(pixel_values=pictures)
        lora = LoraConfig(target_modules=r".*language_model.*q_proj", modules_to_save=["encoder"])
        wrapped = get_peft_model(model, lora).base_model.model
        assert torch.equal(wrapped.get_ecg_features(pixel_values=pictures), expected)

    def test_a_tower_of_oblong_pictures(self):
        """JSON makes a list of the size."""
        model = tiny_tower("vit", image_size=[64, 160])
        assert encode(model, pixel_values=randn(1, 3, 64, 160)).shape == (1, 10, 32)

    @pytest.mark.parametrize("image_features", ["patches", "embedding"])
    @pytest.mark.parametrize("model_type", TINY_VISION)
    def test_no_randomness(self, model_type, image_features):
        model = tiny_tower(model_type, image_features)
        inputs = inputs_of(model_type)
        assert torch.equal(encode(model, image_features, **inputs), encode(model, image_features, **inputs))

    @pytest.mark.slow
    def test_compiled(self):
        inputs = (tiny_tower("clip_vision_model"), "patches", randn(2, 3, 160, 160))
        patches = torch.compile(encode_images, backend="aot_eager")(*inputs)
        patches.sum().backward()
        torch.testing.assert_close(patches, encode_images(*inputs))

    @pytest.mark.parametrize("model_type", TINY_VISION)
    def test_a_blank_picture(self, model_type):
        model = tiny_tower(model_type)
        blank = blank_images(model.config, like=torch.zeros((), dtype=torch.bfloat16))
        assert blank["pixel_values"].dtype == torch.bfloat16
        assert not blank["pixel_values"].any()
        assert encode(model, **blank).isfinite().all()


class TestPaddingOfSiglip2:
    """Pictures of 15, 16, 7 and 4 patches in one batch."""

    @pytest.fixture(scope="class", params=["patches", "embedding"])
    def elm(self, request):
        torch.manual_seed(0)
        changes = {"image_features": request.param, "num_ecg_tokens": 4 if request.param == "patches" else 1}
        return ELMForConditionalGeneration(tiny_image_elm_config("siglip2_vision_model", **changes)).eval()

    @torch.no_grad()
    def test_a_batch_is_as_its_pictures_alone(self, elm):
        inputs = naflex()
        features = elm.get_ecg_features(**inputs)
        assert features.shape == (4, elm.config.num_ecg_tokens, 32)
        for row, length in enumerate(SHAPES.prod(-1)):
            alone = {name: values[row : row + 1] for name, values in inputs.items()}
            for name in ("pixel_values", "pixel_attention_mask"):
                alone[name] = alone[name][:, :length]
            torch.testing.assert_close(features[row : row + 1], elm.get_ecg_features(**alone))

    @torch.no_grad()
    def test_what_stands_in_the_padding_is_not_seen(self, elm):
        inputs = naflex()
        padding = inputs["pixel_attention_mask"] == 0
        features = elm.get_ecg_features(**inputs)
        other = inputs["pixel_values"].clone()
        other[padding] = 100 * randn(int(padding.sum()), 3 * 32**2)
        torch.testing.assert_close(elm.get_ecg_features(**inputs | {"pixel_values": other}), features)
        other[~padding] += 1
        assert not torch.allclose(elm.get_ecg_features(**inputs | {"pixel_values": other}), features, atol=1e-3)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(1, 9))
def test_pooling_is_that_of_torch_over_the_tokens_of_each_row(lengths, num_tokens):
    tokens = randn(len(lengths), max(*lengths, num_tokens), 3)
    expected = [
        nn.functional.adaptive_avg_pool1d(row[:length].T, num_tokens).T
        for row, length in zip(tokens, lengths, strict=True)
    ]
    mask = (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).long()
    pooled = pool_tokens(tokens.masked_fill(mask[..., None] == 0, torch.nan), num_tokens, mask)
    torch.testing.assert_close(pooled, torch.stack(expected))
    torch.testing.assert_close(pool_tokens(tokens, num_tokens), pool_tokens(tokens, num_tokens, torch.ones_like(mask)))


@pytest.fixture(scope="module")
def two_towers(tmp_path_factory):
    """A CLIP and a SigLIP2 of a vision and a text tower, in memory and in folders, and a language model's folder."""
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    models = {
        "clip_vision_model": CLIPModel(
            CLIPConfig(text_config=text, vision_config=TINY_VISION["clip_vision_model"], projection_dim=24)
        ),
        "siglip2_vision_model": Siglip2Model(
            Siglip2Config(text_config=text, vision_config=TINY_VISION["siglip2_vision_model"])
        ),
    }
    folder = tmp_path_factory.mktemp("two_towers")
    for name, model in models.items():
        model.eval().save_pretrained(folder / name)
    save_tiny_llm(folder / "llm")
    return models, folder


class TestEmbedding:
    @pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip2_vision_model"])
    @torch.no_grad()
    def test_of_a_model_of_two_towers(self, model_type, two_towers):
        models, folder = two_towers
        model = load_vision_model(folder / model_type, "embedding").eval()
        embedding = encode(model, "embedding", **inputs_of(model_type))
        expected = models[model_type].get_image_features(**inputs_of(model_type)).pooler_output
        torch.testing.assert_close(embedding, expected[:, None])
        config = tiny_image_elm_config(model_type, image_features="embedding", num_ecg_tokens=1)
        assert embedding.shape[-1] == config.encoder_output_size

    def test_of_vit_is_the_mean_over_layers_and_patches(self):
        model = tiny_tower("vit")
        states = []
        for layer in model.layers:
            layer.register_forward_hook(lambda module, args, output: states.append(output))
        embedding = encode(model, "embedding", **inputs_of("vit"))
        assert len(states) == 2
        torch.testing.assert_close(embedding[:, 0], torch.stack(states)[:, :, 1:].mean((0, 2)))

    @pytest.mark.parametrize("model_type", ["dinov2", "resnet", "siglip_vision_model"])
    @torch.no_grad()
    def test_of_others_is_what_their_pooler_gives(self, model_type):
        model = tiny_tower(model_type)
        pictures = randn(2, 3, 160, 160)
        embedding = encode(model, "embedding", pixel_values=pictures)
        assert embedding.shape == (2, 1, 32)
        assert torch.equal(embedding[:, 0], model(pictures).pooler_output.flatten(1))

    @pytest.mark.parametrize(
        "model",
        [
            tiny_tower("siglip2_vision_model", vision_use_head=False),
            vision_model_class(config := ViTMSNConfig(**TINY_VISION["vit"]), "embedding")(config),
        ],
        ids=["siglip2 without head", "vit_msn"],
    )
    def test_without_a_pooler(self, model):
        model_type = model.config.model_type
        with pytest.raises(
            ValueError, match=f"A {model_type} model makes no pooled vector; give image_features='patches'"
        ):
            encode(model, "embedding", **inputs_of(model_type))


class TestOnlyTheVisionTower:
    @pytest.mark.parametrize("image_features", ["patches", "embedding"])
    @pytest.mark.parametrize("model_type", ["clip_vision_model", "siglip2_vision_model"])
    def test_is_loaded_and_saved(self, model_type, image_features, two_towers, tmp_path, caplog):
        models, folder = two_towers
        assert vision_config(folder / model_type).model_type == model_type
        logging.get_logger("transformers").addHandler(caplog.handler)
        try:
            model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
                folder / "llm",
                encoder=folder / model_type,
                representation="rgb",
                image_features=image_features,
                ecg_token_id=5,
            ).eval()
        finally:
            logging.get_logger("transformers").removeHandler(caplog.handler)
        assert "text_model.final_layer_norm.bias" in caplog.text  # as left out
        assert "MISSING" not in caplog.text

        tower = model.model.encoder
        projected = model_type == "clip_vision_model" and image_features == "embedding"
        expected = dict(models[model_type].vision_model.state_dict())
        if projected:
            expected = {f"vision_model.{name}": weight for name, weight in expected.items()}
            expected["visual_projection.weight"] = models[model_type].visual_projection.weight
        torch.testing.assert_close(dict(tower.state_dict()), expected, rtol=0, atol=0)
        assert model.model.connector.projection.in_features == (24 if projected else 32)

        model.save_pretrained(tmp_path)
        names = [*load_file(tmp_path / "model.safetensors"), *model.state_dict()]
        assert not [name for name in names if "text" in name or "logit" in name]
        loaded, info = ELMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert type(loaded.model.encoder) is type(tower)
        features = (elm.get_ecg_features(**inputs_of(model_type)) for elm in (loaded, model))
        assert torch.equal(*features)

    @pytest.mark.parametrize("model_type", TINY_VISION)
    def test_that_was_saved_alone(self, model_type, tmp_path):
        saved = tiny_tower(model_type)
        saved.save_pretrained(tmp_path)
        loaded = load_vision_model(tmp_path, "patches")
        assert type(loaded) is type(saved)
        torch.testing.assert_close(dict(loaded.state_dict()), dict(saved.state_dict()), rtol=0, atol=0)


class TestRealSizes:
    """The published models, on the meta device."""

    # tower, and its patches, their width, the width of its embedding and its millions of weights
    TOWERS = {
        "openai/clip-vit-base-patch32": (CLIPVisionConfig(), 49, 768, 512, 87.5),
        "google/siglip2-so400m-patch16-naflex": (
            Siglip2VisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                patch_size=16,
                num_patches=256,
            ),
            256,
            1152,
            1152,
            427.9,
        ),
        "google/vit-base-patch16-224-in21k": (ViTConfig(), 196, 768, 768, 86.4),
    }
    LLMS = {
        "llama-3.2-1b": (LlamaConfig, 2048, 8192, 32, 8),
        "llama-3.2-3b": (LlamaConfig, 3072, 8192, 24, 8),
        "qwen2.5-1.5b": (Qwen2Config, 1536, 8960, 12, 2),
        "qwen2.5-7b": (Qwen2Config, 3584, 18944, 28, 4),
        "gemma-2-2b": (Gemma2Config, 2304, 9216, 8, 4),
    }

    def elm(self, tower: PreTrainedConfig, llm: str, **changes):
        config_class, hidden_size, intermediate_size, heads, key_value_heads = self.LLMS[llm]
        text_config = config_class(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            num_hidden_layers=1,
        )
        config = ELMConfig(
            text_config=text_config, encoder_config=tower, representation="rgb", ecg_token_id=5, **changes
        )
        with torch.device("meta"):
            return ELMForConditionalGeneration(config).eval()

    def blank(self, tower):
        inputs = blank_images(tower, like=torch.zeros((), device="meta"))
        if "spatial_shapes" in inputs:  # into which SigLIP2 looks
            return {"pixel_values": inputs["pixel_values"], "spatial_shapes": torch.tensor([[16, 16]])}
        return inputs

    # each tower, each language model and each connector; their shapes go together in no other way in another pair
    @pytest.mark.parametrize(
        ("llm", "tower", "connector"),
        [
            pytest.param(*pair, marks=[] if place in (0, 4, 8, 9, 13) else [pytest.mark.slow, pytest.mark.minutes])
            for place, pair in enumerate(every_pair(list(LLMS), list(TOWERS), ["linear", "mlp"]))
        ],
    )
    def test_connector(self, tower, llm, connector):
        config, num_patches, width, _, _ = self.TOWERS[tower]
        model = self.elm(config, llm, connector=connector, num_ecg_tokens=num_patches)
        hidden_size = self.LLMS[llm][1]
        shapes = {name: tuple(weight.shape) for name, weight in model.model.connector.named_parameters()}
        if connector == "linear":
            assert shapes == {"projection.weight": (hidden_size, width), "projection.bias": (hidden_size,)}
        else:
            assert shapes["linear_1.weight"] == (hidden_size, width)
            assert shapes["linear_2.weight"] == (hidden_size, hidden_size)
        assert model.get_ecg_features(**self.blank(config)).shape == (1, num_patches, hidden_size)

    @pytest.mark.parametrize("tower", TOWERS)
    def test_tower(self, tower):
        config, num_patches, width, embedding_width, millions = self.TOWERS[tower]
        with torch.device("meta"):
            model = vision_model_class(config, "patches")(config)
        assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        assert encode(model, **self.blank(config)).shape == (1, num_patches, width)
        embedded = self.elm(config, "llama-3.2-1b", image_features="embedding")
        assert embedded.model.connector.projection.in_features == embedding_width
        assert embedded.get_ecg_features(**self.blank(config)).shape == (1, 1, 2048)


def test_a_width_that_the_configuration_does_not_say():
    config = tiny_image_elm_config("vit", encoder_config=EfficientNetConfig())
    with pytest.raises(ValueError, match=r"efficientnet.* neither output_size nor hidden_size nor hidden_sizes"):
        _ = config.encoder_output_size


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("trained", [False, True])
def test_no_gradient_goes_through_a_frozen_tower(trained):
    """Reentrant checkpointing needs one that begins at the patches, but only where something is trained behind them."""
    model = ELMForConditionalGeneration(tiny_image_elm_config("vit"))
    model.requires_grad_(False)
    model.model.encoder.layers[-1].requires_grad_(trained)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.train()
    assert model.model.get_encoder_features(**inputs_of("vit")).requires_grad == trained
    assert model.get_input_embeddings()(torch.tensor([1])).requires_grad
