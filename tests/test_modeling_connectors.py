"""The perceiver resampler; `tests/test_modeling_elm.py` runs on every connector."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elm_ecg.modeling_connectors import PerceiverConnector, make_connector, pool_tokens, sine_positions
from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.load import load_elm
from helpers import tiny_elm_config, tiny_image_elm_config, tiny_image_processor_elm, tiny_processor

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}


def perceiver(encoder: str = "merl", **changes) -> PerceiverConnector:
    torch.manual_seed(0)
    config = tiny_elm_config(encoder, connector="perceiver", connector_config=SMALL | changes)
    connector = make_connector(config)
    assert isinstance(connector, PerceiverConnector)
    return connector.eval()


def tokens_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_attention_is_that_of_a_plain_sum():
    """One layer against softmax(q k / sqrt(width of a head)) v, head by head and latent by latent."""
    layer = perceiver().layers[0]
    latents, tokens = tokens_of(1, 3, 16), tokens_of(1, 5, 16) + 1
    mask = torch.ones(1, 1, 1, 8, dtype=bool)
    mask[..., 2] = False
    normed = layer.norm_latents(latents)[0]
    seen = torch.cat([layer.norm_tokens(tokens)[0], normed])
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        key, value = seen @ layer.key_value.weight[:16].T, seen @ layer.key_value.weight[16:].T
        scores = (normed @ layer.query.weight.T)[:, head] @ key[:, head].T / 8**0.5
        scores[:, 2] = -torch.inf
        heads.append(scores.softmax(-1) @ value[:, head])
    after = latents[0] + torch.cat(heads, dim=1) @ layer.output.weight.T
    after = after + layer.mlp_2(torch.nn.functional.gelu(layer.mlp_1(layer.norm_mlp(after))))
    torch.testing.assert_close(layer(latents, tokens, mask)[0], after, atol=1e-5, rtol=1e-5)


@given(num_tokens=st.integers(1, 30), num_padding=st.integers(0, 5))
@torch.no_grad()
def test_padding_changes_nothing(num_tokens, num_padding):
    connector = perceiver()
    tokens = tokens_of(2, num_tokens, 16)
    padding = torch.full((2, num_padding, 16), torch.nan)
    mask = torch.cat([torch.ones(2, num_tokens), torch.zeros(2, num_padding)], dim=1)
    features = connector.pool(torch.cat([tokens, padding], dim=1), mask)
    torch.testing.assert_close(connector(features), connector(connector.pool(tokens)), atol=1e-5, rtol=1e-4)
    assert connector(features).shape == (2, 4, 32)


@torch.no_grad()
def test_order_of_tokens_and_silence():
    connector = perceiver()
    tokens = tokens_of(2, 6, 16)
    assert not torch.allclose(connector(tokens), connector(tokens.flip(1)))  # they have positions
    assert connector(torch.zeros(1, 6, 16)).isfinite().all()
    together, alone = connector(torch.cat([tokens, torch.zeros(1, 6, 16)])), connector(tokens)
    torch.testing.assert_close(together[:2], alone)


def test_positions():
    table = sine_positions(3, 4, torch.device("cpu"))
    expected = torch.tensor(
        [[0, 0, 1, 1], [0.8414710, 0.0099998, 0.5403023, 0.9999500], [0.9092974, 0.0199987, -0.4161468, 0.9998000]]
    )
    torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"depth": 2},
            "perceiver connector has no field depth; it has num_hidden_layers, num_attention_heads, hidden_size",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; expected a whole number of at least 1"),
        ({"hidden_size": 2.5}, "hidden_size is 2.5; expected a whole number"),
        ({"hidden_size": 18}, "hidden_size is 18; expected a multiple of twice num_attention_heads=2"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        perceiver(**fields)


def test_defaults_are_saved_too():
    config = tiny_elm_config("merl", connector="perceiver", connector_config={"hidden_size": 32})
    make_connector(config)
    assert config.connector_config == {
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "hidden_size": 32,
        "mlp_ratio": 4,
    }


@pytest.mark.parametrize("encoder", ["st_mem", "siglip2_vision_model"])
def test_in_an_elm(encoder, tmp_path):
    """Of records, one with a missing lead, and of pictures with padding: saved and loaded, trained with checkpoints as without, and by
    kept features."""
    changes = {"connector": "perceiver", "connector_config": SMALL}
    records = [tokens_of(12, 500).numpy(), tokens_of(12, 500).numpy() + 1]
    make, processor = tiny_elm_config, tiny_processor(sampling_rate=100)
    if encoder != "st_mem":
        make, processor = tiny_image_elm_config, tiny_image_processor_elm(encoder)
    config = make(encoder, ecg_token_id=processor.ecg_token_id, **changes)
    torch.manual_seed(0)
    elm = ELMForConditionalGeneration(config)
    inputs = dict(
        processor(text=["<signal> a", "<signal> b"], ecgs=records, sampling_rate=100, padding=True, return_tensors="pt")
    )
    if encoder == "st_mem":
        inputs["ecg_lead_mask"] = torch.tensor([[True] * 12, [False, *[True] * 11]])
    elm.model.encoder.requires_grad_(False)
    labels = inputs["input_ids"]

    def gradients(model: ELMForConditionalGeneration, batch: dict) -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(**batch, labels=labels).loss.backward()
        return [weight.grad.clone() for weight in model.model.connector.parameters()]

    plain = gradients(elm, inputs)
    assert all(gradient.abs().sum() > 0 for gradient in plain)
    kept = EncoderFeatures(elm.model).replace(inputs)
    for with_kept, without in zip(gradients(elm, kept), plain, strict=True):
        torch.testing.assert_close(with_kept, without, atol=1e-5, rtol=1e-3)
    checkpointed = copy.deepcopy(elm)
    checkpointed.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in checkpointed.model.connector.layers)
    for again, without in zip(gradients(checkpointed, inputs), plain, strict=True):
        torch.testing.assert_close(again, without, atol=1e-5, rtol=1e-3)
    gradients(
        elm, {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"input_ids": labels.clamp(max=200)}
    )
    for part in (elm, processor):
        part.save_pretrained(tmp_path)
    loaded, _ = load_elm(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, elm.eval()(**inputs).logits, atol=1e-5, rtol=1e-5)


def test_averages_have_no_latents():
    """What the perceiver gathers is not what averaging gives."""
    tokens = tokens_of(1, 8, 16)
    assert perceiver().pool(tokens).shape == (1, 8, 16)
    assert pool_tokens(tokens, 4).shape == (1, 4, 16)
