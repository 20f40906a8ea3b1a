import pytest
from transformers import BertConfig

from elm_ecg.configuration_ecg_encoders import MERLConfig, MLAEConfig, MTAEConfig, STMEMConfig
from elm_ecg.configuration_ecg_pretraining import ECGPretrainingConfig, mask_shape


@pytest.mark.parametrize(
    ("encoder_config", "shape", "normalize_targets"),
    [
        (MLAEConfig(patch_size=2), (6,), False),
        (MTAEConfig(), (25,), True),
        (STMEMConfig(num_leads=8, num_samples=500), (8, 25), True),
    ],
)
def test_defaults_of_each_encoder(encoder_config, shape, normalize_targets):
    config = ECGPretrainingConfig(encoder_config=encoder_config)
    assert mask_shape(config) == shape
    assert config.normalize_targets is normalize_targets
    assert ECGPretrainingConfig(encoder_config=encoder_config, normalize_targets=True).normalize_targets is True
    again = ECGPretrainingConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert type(again.encoder_config) is type(encoder_config)


def test_mask_shape_of_an_encoder_without_patches():
    config = ECGPretrainingConfig(
        encoder_config=MERLConfig(), text_config=BertConfig(), objectives=["contrastive"], mask_ratio=2.0
    )
    with pytest.raises(ValueError, match="A merl encoder has no patches to mask"):
        mask_shape(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": []}, r"objectives is \[\]; expected masked or contrastive"),
        ({"objectives": ["masked", "masked"]}, "or each of them once"),
        ({"objectives": ["jigsaw"]}, r"objectives is \['jigsaw'\]"),
        ({"encoder_config": MERLConfig()}, "masked with a merl encoder; it hides patches"),
        ({"objectives": ["contrastive"]}, "contrastive need a text encoder"),
        ({"text_config": BertConfig()}, "masked need no text encoder"),
        ({"mask_ratio": 0.0}, r"mask_ratio is 0\.0; expected a share between 0 and 1"),
        ({"mask_ratio": 1.0}, r"mask_ratio is 1\.0"),
        ({"mask_ratio": 0.97}, r"mask_ratio=0\.97 keeps none of 25 patches"),
        ({"decoder_hidden_size": 31}, "decoder_hidden_size is 31; half of a position"),
        ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers is 0"),
        ({"projection_size": 30}, "projection_size is 30; expected a multiple of 4"),
        ({"projection_dropout": 1.0}, r"projection_dropout is 1\.0"),
        ({"temperature": 0.0}, r"temperature is 0\.0; expected a positive number"),
        ({"contrastive_weight": float("inf")}, "contrastive_weight is inf"),
    ],
)
def test_what_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        ECGPretrainingConfig(**fields)


@pytest.mark.parametrize("fields", [{"contrastive_loss": "triplet"}, {"text_pooling": "max"}, {"mask_ratio": "0.5"}])
def test_types_of_fields(fields):
    with pytest.raises(Exception, match=next(iter(fields))):
        ECGPretrainingConfig(**fields)
