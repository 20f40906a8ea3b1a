from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.ecg_utils import STANDARD_LEADS, ECGRecord
from elm_ecg.feature_extraction_elm import ECGFeatureExtractor
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.encoders import LoadedEncoder, load_encoder
from helpers import (
    TINY_ENCODERS,
    tiny_elm,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_image_processor,
    tiny_image_processor_elm,
    tiny_processor,
    tiny_vision_config,
)
from probes import save_own, save_pretraining


def records(number: int = 3, seconds: float = 2.0) -> list[ECGRecord]:
    rng = np.random.default_rng(0)
    array = rng.normal(0, 0.3, (number, 12, round(250 * seconds))).astype(np.float32)
    return [ECGRecord(one, 250, STANDARD_LEADS) for one in array]


def save(folder: Path, kind: str = "st_mem", preprocessor: bool = True) -> Path:
    torch.manual_seed(0)
    ENCODER_MODELS[kind](ENCODER_CONFIGS[kind](num_samples=500, **TINY_ENCODERS[kind])).save_pretrained(folder)
    if preprocessor:
        ECGFeatureExtractor(num_samples=500).save_pretrained(folder)
    return folder


def features(encoder: LoadedEncoder, number: int = 3) -> torch.Tensor:
    with torch.inference_mode():
        return encoder.features(encoder.prepare(records(number)))


@pytest.mark.parametrize("kind", TINY_ENCODERS)
def test_an_encoder_of_ours(kind, tmp_path):
    encoder = load_encoder(str(save(tmp_path / "encoder", kind)))
    assert not encoder.model.training
    values = ECGFeatureExtractor(num_samples=500)(records(), return_tensors="pt")["ecg_values"]
    with torch.inference_mode():
        expected = encoder.model(values).last_hidden_state.mean(dim=1)
    assert torch.allclose(features(encoder), expected)

    one, same, other = (encoder.with_random_weights(seed) for seed in (1, 1, 2))
    assert torch.equal(features(one), features(same))
    assert not torch.allclose(features(one), features(other))
    assert not torch.allclose(features(one), features(encoder))
    assert one.model.config.to_dict() == encoder.model.config.to_dict()


def test_the_encoder_of_an_elm(tmp_path):
    processor = tiny_processor()
    elm = tiny_elm(processor)
    elm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    expected = {name: value.tolist() for name, value in elm.model.encoder.state_dict().items()}
    assert {name: value.tolist() for name, value in encoder.model.state_dict().items()} == expected
    assert encoder.extractor.num_samples == 500
    assert encoder.pretraining is None
    with pytest.raises(ValueError, match="comes with what prepares its records; leave --sampling_rate out"):
        load_encoder(str(tmp_path), sampling_rate=250)


def test_an_elm_without_encoder(tmp_path):
    processor = tiny_processor(num_ecg_tokens=1)
    elm = ELMForConditionalGeneration(tiny_elm_config("flat", ecg_token_id=processor.ecg_token_id))
    elm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no encoder \(its architecture is fuyu\); expected .* llava"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("model_type", ["vit", "siglip2_vision_model"])
def test_the_encoder_of_an_elm_of_pictures(model_type, tmp_path):
    processor = tiny_image_processor_elm(model_type, "stacked_signal")
    torch.manual_seed(0)
    elm = ELMForConditionalGeneration(
        tiny_image_elm_config(model_type, "stacked_signal", ecg_token_id=processor.ecg_token_id)
    ).eval()
    elm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    inputs = encoder.prepare(records())
    for name, values in processor(ecgs=records(), return_tensors="pt").items():
        assert torch.equal(inputs[name], values), name
    assert features(encoder).shape == (3, 32)
    assert features(encoder.with_random_weights(0)).shape == (3, 32)


def test_padding_is_not_read_of_pictures(tmp_path):
    """SigLIP2 reads patches of pictures of any shape: those that fill up a batch say nothing."""
    AutoModel.from_config(tiny_vision_config("siglip2_vision_model")).save_pretrained(tmp_path)
    tiny_image_processor("siglip2_vision_model").image_processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    inputs = encoder.prepare(records(1, seconds=10))
    inputs["pixel_attention_mask"][:, 12:] = 0  # as beside a wider picture
    inputs["spatial_shapes"][:] = torch.tensor([3, 4])
    noisy = inputs["pixel_values"] + 9.0 * ~inputs["pixel_attention_mask"].bool()[..., None]
    with torch.inference_mode():
        assert torch.allclose(encoder.features(inputs), encoder.features({**inputs, "pixel_values": noisy}), atol=1e-5)


def test_a_vision_backbone(tmp_path):
    AutoModel.from_config(tiny_vision_config("vit")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be loaded: it is a vision backbone without image processor"):
        load_encoder(str(tmp_path))
    tiny_image_processor("vit").image_processor.save_pretrained(tmp_path)
    encoder = load_encoder(str(tmp_path))
    expected = tiny_image_processor("vit")(ECGFeatureExtractor().prepare_batch(records()), 10, STANDARD_LEADS)
    assert (encoder.prepare(records())["pixel_values"].numpy() == expected["pixel_values"]).all()
    assert features(encoder).shape == (3, 32)


def test_a_language_model_is_no_encoder(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=10, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A 'bert' model reads no images"):
        load_encoder(str(tmp_path))


@pytest.mark.parametrize("contrastive", [True, False])
def test_the_encoder_of_a_pretraining_model(contrastive, tmp_path):
    model = save_pretraining(tmp_path, 500, contrastive)
    encoder = load_encoder(str(tmp_path))
    inputs = encoder.prepare(records())
    with torch.inference_mode():
        assert torch.allclose(features(encoder), model.encoder(inputs["ecg_values"]).last_hidden_state.mean(dim=1))
        if contrastive:
            expected = model.get_ecg_embeddings(inputs["ecg_values"])
            assert torch.allclose(encoder.pretraining.get_ecg_embeddings(inputs["ecg_values"]), expected)
    assert (encoder.tokenizer is not None) == (encoder.pretraining is not None) == contrastive


def test_an_encoder_of_ones_own(tmp_path):
    weights = save_own(tmp_path)
    with pytest.raises(
        ValueError, match=r"is a 'own_ecg' model, none of ours .* if you trust it say --trust_remote_code"
    ):
        load_encoder(str(tmp_path), sampling_rate=250)
    encoder = load_encoder(str(tmp_path), trust_remote_code=True, sampling_rate=250)
    values = encoder.prepare(records())["ecg_values"]
    expected = torch.nn.functional.conv1d(values, weights["conv.weight"], weights["conv.bias"], stride=50).mean(dim=2)
    assert torch.allclose(features(encoder), expected, atol=1e-5)
    assert features(encoder.with_random_weights(0)).shape == (3, 6)


def test_without_feature_extractor(tmp_path):
    folder = str(save(tmp_path / "encoder", preprocessor=False))
    with pytest.raises(ValueError, match=r"it has no preprocessor_config.json, .* say it with --sampling_rate"):
        load_encoder(folder)
    encoder = load_encoder(folder, sampling_rate=100, normalization="minmax", truncation="start")
    extractor = encoder.extractor
    assert (extractor.sampling_rate, extractor.num_samples, extractor.normalization) == (100, 500, "minmax")
    assert extractor.truncation == "start"
    assert extractor.lead_names == list(STANDARD_LEADS)
    with pytest.raises(ValueError, match="its records have 2 leads by its feature extractor, and the encoder reads 12"):
        load_encoder(folder, sampling_rate=100, lead_names=["I", "II"])


def test_files_that_do_not_go_together(tmp_path):
    folder = save(tmp_path / "encoder")
    ECGFeatureExtractor(num_samples=400).save_pretrained(folder)
    with pytest.raises(
        ValueError, match="its records have 400 samples by its feature extractor, and the encoder reads 500"
    ):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: {**weights, "extra": torch.zeros(1)},
            "its weights hold, without a place for it in the model, extra",
        ),
        (lambda weights: dict(list(weights.items())[1:]), "its files lack"),
        (
            lambda weights: {name: value * torch.nan for name, value in weights.items()},
            "weights that are NaN or infinite",
        ),
    ],
)
def test_damaged_weights(change, message, tmp_path):
    path = save(tmp_path / "encoder") / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_encoder(str(path.parent))


def test_no_such_encoder(tmp_path):
    with pytest.raises(ValueError, match=r"The encoder .* has no adapter_config\.json and no config\.json"):
        load_encoder(str(tmp_path))
    folder = save(tmp_path / "encoder")
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot be loaded: .*preprocessor_config\.json is damaged"):
        load_encoder(str(folder))
