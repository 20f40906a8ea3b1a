import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, CLIPVisionConfig, Siglip2Config, ViTMAEConfig

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_elm import (
    CONNECTORS,
    IMAGE_REPRESENTATIONS,
    ELMConfig,
    MERLConfig,
    MLAEConfig,
    MTAEConfig,
    STMEMConfig,
    connectors_of,
    default_num_ecg_tokens,
)
from elm_ecg.modeling_connectors import CONNECTOR_MODULES
from helpers import (
    TINY_ENCODERS,
    TINY_VISION,
    run_isolated,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_llm_config,
    tiny_vision_config,
)

INVALID = (ValueError, StrictDataclassError)  # of the strict dataclass, where a field or a combination is wrong
ECG_PARTS = [*TINY_ENCODERS, *connectors_of("fuyu"), None]
VIT = tiny_vision_config("vit")


class TestELMConfig:
    @pytest.mark.parametrize("ecg_part", ECG_PARTS)
    @pytest.mark.parametrize("family", ["llama3", "qwen2_5", "gemma2"])
    def test_round_trip(self, ecg_part, family, tmp_path):
        self.check_round_trip(tiny_elm_config(ecg_part, family), tmp_path)

    @pytest.mark.parametrize("representation", IMAGE_REPRESENTATIONS)
    @pytest.mark.parametrize("backbone", TINY_VISION)
    def test_round_trip_with_a_vision_backbone(self, backbone, representation, tmp_path):
        config = tiny_image_elm_config(backbone, representation, image_features="embedding", num_ecg_tokens=1)
        self.check_round_trip(config, tmp_path)

    def check_round_trip(self, config, folder):
        config.save_pretrained(folder)
        loaded = ELMConfig.from_pretrained(folder)
        assert loaded.to_dict() == config.to_dict()
        assert type(loaded.text_config) is type(config.text_config)
        assert type(loaded.encoder_config) is type(config.encoder_config)
        assert loaded.get_text_config() is loaded.text_config

    def test_parts_as_dicts(self):
        encoder_config = {"model_type": "st_mem", "num_samples": 500, **TINY_ENCODERS["st_mem"]}
        text_config = tiny_llm_config("qwen2_5").to_dict()
        config = ELMConfig(text_config=text_config, encoder_config=encoder_config, ecg_token_id=299)
        assert isinstance(config.encoder_config, STMEMConfig)
        assert config.to_dict() == tiny_elm_config("st_mem", "qwen2_5", connector="linear", num_ecg_tokens=1).to_dict()

    def test_a_vision_backbone_as_a_dict(self):
        encoder_config = {"model_type": "clip_vision_model", "hidden_size": 24}
        config = tiny_image_elm_config("vit", encoder_config=encoder_config)
        assert isinstance(config.encoder_config, CLIPVisionConfig)
        assert config.encoder_config.hidden_size == 24
        assert config.image_features == "patches"

    @pytest.mark.parametrize(("family", "tied"), [("llama3", False), ("qwen2_5", True), ("gemma2", True)])
    def test_tying_is_that_of_the_language_model(self, family, tied):
        assert tiny_elm_config("merl", family).tie_word_embeddings is tied

    def test_the_record_of_the_encoder_is_that_of_the_elm(self):
        encoder_config = MERLConfig(num_leads=8, num_samples=1250)
        config = tiny_elm_config("merl", encoder_config=encoder_config, num_leads=3, num_samples=7)
        assert (config.num_leads, config.num_samples) == (8, 1250)

    def test_a_fresh_process_without_the_project(self, tmp_path):
        """The code of the configuration stands beside it, and its own copy is complete again."""
        first, second = tmp_path / "first", tmp_path / "second"
        config = tiny_elm_config("mtae", "gemma2")
        config.save_pretrained(first)
        name = run_isolated(
            "from transformers import AutoConfig\n"
            f"config = AutoConfig.from_pretrained({str(first)!r}, trust_remote_code=True)\n"
            f"config.save_pretrained({str(second)!r})\n"
            f"AutoConfig.from_pretrained({str(second)!r}, trust_remote_code=True)\n"
            "print(type(config).__name__)",
            tmp_path,
        )
        assert name.split()[-1] == "ELMConfig"
        assert json.loads((second / "config.json").read_text()) == json.loads((first / "config.json").read_text())
        assert (second / "configuration_elm.py").is_file()

    @pytest.mark.parametrize(
        ("ecg_part", "changes", "message"),
        [
            ("merl", {"encoder_config": {"model_type": "resnext"}}, r"Unknown encoder model_type 'resnext'; expected one of merl, mlae, mtae, st_mem"),
            ("merl", {"connector": "flat"}, r"connector='flat' with architecture='llava'; expected 'linear' or 'mlp'"),
            ("merl", {"connector": None}, r"connector=None with architecture='llava'; expected 'linear' or 'mlp'"),
            ("conv", {"connector": "linear"}, r"architecture='fuyu'; expected 'patch' or 'conv' or 'flat'"),
            (None, {"connector": "linear"}, r"connector='linear' with architecture='text'; expected None"),
            ("merl", {"encoder_config": None}, r"architecture='llava' with no encoder_config; 'llava' needs an encoder_config"),
            ("patch", {"encoder_config": MERLConfig()}, r"architecture='fuyu' with a merl encoder; .* 'fuyu' and 'text' take none"),
            (None, {"encoder_config": MERLConfig()}, r"architecture='text' with a merl encoder"),
            ("merl", {"ecg_token_id": None}, r"ecg_token_id is None; give the id of the tokenizer's ECG placeholder"),
            ("flat", {"ecg_token_id": None}, r"ecg_token_id is None"),
            ("merl", {"num_ecg_tokens": 0}, r"num_ecg_tokens is 0; it must be at least 1"),
            ("flat", {"num_ecg_tokens": 2}, r"flat connector makes one token of a record; num_ecg_tokens is 2"),
            ("patch", {"num_ecg_tokens": 3}, r"num_ecg_tokens=3 patches do not divide a record of 500 samples"),
            ("conv", {"num_ecg_tokens": 7}, r"num_ecg_tokens=7 patches do not divide a record of 500 samples"),
            ("merl", {"architecture": "flamingo"}, r"(?s)architecture.*flamingo"),
            ("merl", {"connector": "qformer"}, r"(?s)connector.*qformer"),
            ("merl", {"representation": "symbolic"}, r"architecture='llava' with representation='symbolic'; .* expected 'text'"),
            ("conv", {"representation": "symbolic"}, r"architecture='fuyu' with representation='symbolic'"),
            ("merl", {"representation": "wavelet"}, r"(?s)representation.*wavelet"),
            ("merl", {"num_ecg_tokens": "4"}, r"(?s)num_ecg_tokens.*int"),
            ("merl", {"representation": "rgb"}, r"representation='rgb' with a merl encoder; expected a Hugging Face vision backbone"),
            ("merl", {"encoder_config": VIT}, r"representation='signal' with a vit encoder; expected one of merl, mlae, mtae, st_mem"),
            ("conv", {"representation": "rgb"}, r"architecture='fuyu' with representation='rgb'; .* need a vision backbone: expected 'llava'"),
            ("merl", {"representation": "stacked_signal", "encoder_config": None}, r"'llava' needs an encoder_config"),
            ("merl", {"representation": "rgb", "encoder_config": CLIPConfig()}, r"of a 'clip' model, which reads text too; give its vision_config alone"),
            ("merl", {"representation": "stacked_signal", "encoder_config": Siglip2Config()}, r"of a 'siglip2' model, which reads text too"),
            ("merl", {"representation": "rgb", "encoder_config": ViTMAEConfig()}, r"A vit_mae encoder hides and shuffles patches at random, at inference too"),
            ("merl", {"representation": "rgb", "encoder_config": VIT, "image_features": "embedding"}, r"image_features='embedding' is one token; num_ecg_tokens is 4"),
            ("merl", {"image_features": "embedding", "num_ecg_tokens": 1}, r"image_features='embedding' with representation='signal'; only vision backbones have"),
            ("flat", {"image_features": "embedding"}, r"image_features='embedding' with representation='signal'"),
            ("merl", {"image_features": "pooled"}, r"image_features is 'pooled'; expected one of patches, embedding"),
            ("merl", {"text_config": "llama"}, r"(?s)text_config.*TypeError"),
            ("merl", {"encoder_config": 3}, r"(?s)encoder_config.*TypeError"),
        ],
    )  # fmt: skip
    def test_invalid(self, ecg_part, changes, message):
        with pytest.raises(INVALID, match=message):
            tiny_elm_config(ecg_part, **changes)


class TestConnectors:
    def test_each_has_a_module(self):
        assert CONNECTOR_MODULES.keys() == CONNECTORS.keys()

    @pytest.mark.parametrize(
        ("architecture", "expected"),
        [("llava", ["linear", "mlp", "perceiver"]), ("fuyu", ["patch", "conv", "flat"]), ("text", [None])],
    )
    def test_of_an_architecture(self, architecture, expected):
        assert connectors_of(architecture) == expected

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (["linear"], 12),
            (["mlp", "signal", "patches"], 12),
            (["mlp", "rgb"], 49),
            (["linear", "stacked_signal", "embedding"], 1),
            (["patch"], 25),
            (["conv"], 25),
            (["flat"], 1),
            ([None, "symbolic"], 1),
        ],
    )
    def test_default_number_of_tokens(self, arguments, expected):
        assert default_num_ecg_tokens(*arguments) == expected


class TestEncoderConfigs:
    def test_defaults_are_those_of_the_reference(self):
        for config in ENCODER_CONFIGS.values():
            assert (config().num_leads, config().num_samples) == (12, 2500)
        for name, width in {"merl": 2048, "mlae": 256, "mtae": 256, "st_mem": 768}.items():
            assert ENCODER_CONFIGS[name]().output_size == width

    @pytest.mark.parametrize("config_class", [MTAEConfig, STMEMConfig])
    @pytest.mark.parametrize(("num_samples", "patch_size"), [(500, 20), (1250, 50), (2500, 100), (5000, 200)])
    def test_patch_size(self, config_class, num_samples, patch_size):
        assert config_class(num_samples=num_samples).patch_size == patch_size
        assert config_class(num_samples=num_samples, patch_size=10).patch_size == 10

    @pytest.mark.parametrize("kind", TINY_ENCODERS)
    def test_round_trip(self, kind, tmp_path):
        config = ENCODER_CONFIGS[kind](num_samples=500, **TINY_ENCODERS[kind])
        config.save_pretrained(tmp_path)
        loaded = ENCODER_CONFIGS[kind].from_pretrained(tmp_path)
        assert loaded.to_dict() == config.to_dict()
        assert loaded.output_size == config.output_size

    @pytest.mark.parametrize(
        ("config_class", "changes", "message"),
        [
            (MERLConfig, {"num_leads": 0}, r"MERLConfig\.num_leads is 0; it must be at least 1"),
            (STMEMConfig, {"num_samples": 0, "patch_size": 1}, r"STMEMConfig\.num_samples is 0"),
            (MERLConfig, {"depths": (2, 2)}, r"depths=\[2, 2\] and widths=\[64, 128, 256, 512\]; give one of each"),
            (MERLConfig, {"depths": (), "widths": ()}, r"give one of each per stage"),
            (MERLConfig, {"block": "preact"}, r"(?s)block.*preact"),
            (MLAEConfig, {"patch_size": 5}, r"MLAEConfig\.patch_size is 5 leads, which must divide num_leads=12"),
            (MTAEConfig, {"patch_size": 99}, r"MTAEConfig\.patch_size is 99 samples, which must divide num_samples=2500"),
            (STMEMConfig, {"patch_size": 0}, r"STMEMConfig\.patch_size is 0 samples"),
            (STMEMConfig, {"patch_size": "20"}, r"STMEMConfig\.patch_size is '20' samples"),
            (MTAEConfig, {"num_samples": 2503}, r"num_samples=2503 cannot be cut into 16 to 64 equal patches"),
        ],
    )  # fmt: skip
    def test_invalid(self, config_class, changes, message):
        with pytest.raises(INVALID, match=message):
            config_class(**changes)
