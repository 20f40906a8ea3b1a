import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, BertConfig, BertModel
from transformers.modeling_layers import GradientCheckpointingLayer

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.configuration_ecg_pretraining import MASKED_ENCODERS, ECGPretrainingConfig
from elm_ecg.modeling_ecg_contrastive import info_nce
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.modeling_ecg_masked import masked_loss
from elm_ecg.modeling_ecg_pretraining import ECGForPreTraining, mask_from_noise, mask_shape
from elm_ecg.training.sharing.checkpoint_keys import convert_pretraining_part
from helpers import TINY_ENCODERS, golden_state_dict, run_isolated

NUM_SAMPLES, PATCH = 500, 20
TEXT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
OBJECTIVES = {"masked": ["masked"], "contrastive": ["contrastive"], "both": ["masked", "contrastive"]}
KINDS = [(kind, "masked") for kind in MASKED_ENCODERS]
KINDS += [(kind, "contrastive") for kind in ENCODER_MODELS] + [("st_mem", "both")]
SMALL = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def tiny_config(kind="st_mem", objectives="masked", encoder=None, **changes):
    encoder_config = ENCODER_CONFIGS[kind](num_samples=NUM_SAMPLES, **TINY_ENCODERS[kind] | (encoder or {}))
    text_config = None if objectives == "masked" else BertConfig(**TEXT)
    fields = {"objectives": OBJECTIVES[objectives], "projection_size": 8, "projection_dropout": 0.0} | SMALL | changes
    return ECGPretrainingConfig(encoder_config=encoder_config, text_config=text_config, **fields)


def tiny(kind="st_mem", objectives="masked", **changes):
    """A small model in which no tensor is trivial."""
    torch.manual_seed(0)
    model = ECGForPreTraining(tiny_config(kind, objectives, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(number=4, text=False, num_samples=NUM_SAMPLES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = {"ecg_values": torch.randn(number, 12, num_samples, generator=generator)}
    if text:
        batch["input_ids"] = torch.randint(1, 50, (number, 7), generator=generator)
        batch["attention_mask"] = torch.ones(number, 7, dtype=torch.long)
        batch["attention_mask"][0, 4:] = 0
    return batch


def mask_of(config, number=4, seed=2):
    noise = torch.rand(number, *mask_shape(config), generator=torch.Generator().manual_seed(seed))
    return mask_from_noise(noise, config.mask_ratio)


# the reference's numbers


@pytest.fixture(scope="module")
def golden(shared):
    folder = shared / "golden"
    numbers = load_file(folder / "pretraining.safetensors")
    numbers["input"] = load_file(folder / "encoders.safetensors")["input"]
    return json.loads((folder / "pretraining_state_dicts.json").read_text()), numbers


def of_the_reference(kind, shapes, **fields):
    """The model with the reference's weights."""
    with torch.device("meta"):
        model = ECGForPreTraining(ECGPretrainingConfig(encoder_config=ENCODER_CONFIGS[kind](), **fields))
    weights = convert_pretraining_part(kind, golden_state_dict(shapes)).tensors
    if model.text_encoder is not None:
        weights |= {name: torch.zeros(w.shape) for name, w in model.state_dict().items() if name.startswith("text_")}
    model.load_state_dict(weights, assign=True)
    return model.eval()


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
@torch.inference_mode()
def test_masked_parity(kind, golden):
    shapes, numbers = golden
    model = of_the_reference(kind, shapes[kind])
    mask = numbers[f"{kind}.mask"]
    output = model(numbers["input"], mask=mask)
    torch.testing.assert_close(output.loss, numbers[f"{kind}.loss"][0], rtol=1e-4, atol=0)
    patches = model.decoder.make_patches(model.encoder, numbers["input"])
    counted = mask[..., None].bool().expand(patches.shape)
    for normalize_targets, name in ((True, "normalized"), (False, "plain")):
        loss = masked_loss(output.reconstruction, patches, counted, normalize_targets)
        torch.testing.assert_close(loss, numbers[f"{kind}.loss_{name}_targets"][0], rtol=1e-4, atol=0)
    expected = numbers[f"{kind}.reconstruction"]
    assert output.reconstruction.shape == (2, *mask_shape(model.config), expected.shape[-1])
    torch.testing.assert_close(output.reconstruction, expected, rtol=1e-4, atol=1e-4 * expected.std().item())


@torch.inference_mode()
def test_contrastive_parity(golden):
    shapes, numbers = golden
    text_config = BertConfig(**TEXT | {"hidden_size": 768})
    model = of_the_reference("merl", shapes["merl"], objectives=["contrastive"], text_config=text_config)
    tokens = model.encoder(numbers["merl.input"]).last_hidden_state
    ecgs = model.heads.embed_ecgs(tokens)
    texts = model.heads.text_projection(numbers["merl.text_embeddings"])
    for name, values in zip(("ecg_projection", "view_1", "view_2", "text_projection"), (*ecgs, texts), strict=True):
        expected = numbers[f"merl.{name}"]
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    everyone, temperature = torch.ones(6, dtype=torch.bool), model.config.temperature
    cross_modal = info_nce(ecgs[0], texts, temperature, everyone)
    torch.testing.assert_close(cross_modal, numbers["merl.cross_modal_loss"][0], rtol=1e-4, atol=0)
    uni_modal = info_nce(ecgs[1], ecgs[2], temperature, everyone)
    torch.testing.assert_close(uni_modal, numbers["merl.uni_modal_loss"][0], rtol=1e-4, atol=0)


# masking


@given(
    rows=st.integers(1, 4),
    number=st.integers(1, 40),
    mask_ratio=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
    equal=st.booleans(),
)
def test_each_row_keeps_as_many_places(rows, number, mask_ratio, seed, equal):
    noise = torch.rand(rows, 2, number, generator=torch.Generator().manual_seed(seed))
    noise = torch.zeros_like(noise) if equal else noise  # ties
    mask = mask_from_noise(noise, mask_ratio)
    assert mask.shape == noise.shape
    assert ((~mask).sum(-1) == int(number * (1 - mask_ratio))).all()


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
def test_drawn_masks(kind):
    model = tiny(kind)
    batch = batch_of()
    torch.manual_seed(5)
    first, second = model(**batch), model(**batch)
    assert first.mask.shape == (4, *mask_shape(model.config))
    assert (first.mask != second.mask).any()
    assert (first.mask.sum(-1) == mask_shape(model.config)[-1] - int(mask_shape(model.config)[-1] * 0.25)).all()
    torch.manual_seed(5)
    assert torch.equal(model(**batch).loss, first.loss)


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
def test_the_encoder_does_not_see_masked_patches(kind):
    """Other values there change the targets, and nothing of the reconstruction."""
    model, batch = tiny(kind), batch_of()
    mask = mask_of(model.config)
    output = model(**batch, mask=mask)
    hidden = model.decoder.make_patches(model.encoder, torch.ones_like(batch["ecg_values"]))
    hidden = (hidden.bool() & mask[..., None]).float()  # what is masked, as a record
    match kind:
        case "mlae":
            hidden = hidden.reshape(batch["ecg_values"].shape)
        case "mtae":
            hidden = hidden.reshape(4, NUM_SAMPLES, 12).transpose(1, 2)
        case "st_mem":
            hidden = hidden.flatten(2)
    assert 0.6 < hidden.mean() < 0.8
    noise = torch.randn_like(batch["ecg_values"])
    other = model(batch["ecg_values"] + noise * hidden, mask=mask)
    torch.testing.assert_close(other.reconstruction, output.reconstruction)
    assert other.loss != output.loss
    seen = model(batch["ecg_values"] + noise * (1 - hidden), mask=mask)
    assert (seen.reconstruction - output.reconstruction).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
def test_the_encoder_reads_shorter_sequences(kind):
    model = tiny(kind)
    lengths = []
    model.encoder.layers[0].register_forward_hook(lambda module, args, output: lengths.append(args[0].shape[1]))
    model(**batch_of())
    assert lengths == [{"mlae": 1 + 3, "mtae": 1 + 6, "st_mem": 12 * (2 + 6)}[kind]]


@pytest.mark.parametrize("kind", ["mtae", "st_mem"])
def test_shorter_records(kind):
    model = tiny(kind)
    output = model(**batch_of(num_samples=10 * PATCH))
    assert output.reconstruction.shape[-2] == output.mask.shape[-1] == 10
    assert output.loss.isfinite()


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
@given(seed=st.integers(0, 2**31), data=st.data())
def test_padding_and_missing_leads_do_not_count(kind, seed, data):
    """Whatever stands there, also NaN: the same loss, and gradients for all other values alone."""
    model = _model(kind)
    values = batch_of(2, seed=seed)["ecg_values"]
    num_samples = torch.tensor([data.draw(st.integers(0, NUM_SAMPLES)), NUM_SAMPLES])
    lead_mask = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=2, max_size=2)))
    mask = mask_of(model.config, 2, seed)
    there = lead_mask[..., None] & (torch.arange(NUM_SAMPLES) < num_samples[:, None])[:, None]
    results = []
    for filling in (0.0, 7.0, float("nan")):
        inputs = values.where(there, torch.tensor(filling)).requires_grad_()
        loss = model(inputs, lead_mask=lead_mask, num_samples=num_samples, mask=mask).loss
        (gradient,) = torch.autograd.grad(loss, inputs)
        assert loss.isfinite()
        assert not gradient[~there].any()
        results.append((loss, gradient))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


_MODELS = {}


def _model(kind):
    """One model for all examples of a property."""
    if kind not in _MODELS:
        _MODELS[kind] = tiny(kind)
    return _MODELS[kind]


@pytest.mark.parametrize("kind", ["mtae", "st_mem"])
def test_patches_that_hold_any_padding_do_not_count(kind):
    model, values = tiny(kind), batch_of(2)["ecg_values"]
    mask = torch.zeros(2, *mask_shape(model.config), dtype=torch.bool)
    mask[..., 3:6] = True  # samples 60 to 119
    losses = [model(values, num_samples=torch.full((2,), n), mask=mask).loss.item() for n in (60, 79, 80, 99, 100, 120)]
    assert losses[:2] == [0, 0]
    reconstruction = model(values, num_samples=torch.full((2,), 99), mask=mask).reconstruction
    patches = model.decoder.make_patches(model.encoder, values)
    counted = torch.zeros_like(patches, dtype=torch.bool)
    counted[..., 3, :] = True
    assert losses[3] == pytest.approx(masked_loss(reconstruction, patches, counted, True).item(), rel=1e-5)


def test_padded_samples_of_a_lead_do_not_count():
    """A patch of MLAE is a whole lead, so what is there of it counts."""
    model, values = tiny("mlae"), batch_of(2)["ecg_values"]
    mask = mask_of(model.config, 2)
    output = model(values, num_samples=torch.tensor([200, NUM_SAMPLES]), mask=mask)
    errors = (output.reconstruction - values).square()
    errors = torch.cat([errors[0, mask[0], :200].flatten(), errors[1, mask[1]].flatten()])
    assert output.loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
def test_a_batch_where_nothing_counts(kind):
    model = tiny(kind)
    loss = model(**batch_of(2), num_samples=torch.zeros(2, dtype=torch.long)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())


@pytest.mark.parametrize(("kind", "objectives"), KINDS)
@given(order=st.permutations(range(4)))
def test_permuted_batches(kind, objectives, order):
    model = _MODELS.setdefault((kind, objectives), None) or tiny(kind, objectives)
    _MODELS[kind, objectives] = model
    batch = batch_of(text=objectives != "masked")
    if objectives != "contrastive":
        batch["mask"] = mask_of(model.config)
    with torch.no_grad():
        output = model(**batch)
        permuted = model(**{name: tensor[list(order)] for name, tensor in batch.items()})
    torch.testing.assert_close(permuted.loss, output.loss)
    if output.reconstruction is not None:
        torch.testing.assert_close(permuted.reconstruction, output.reconstruction[list(order)])


def test_standardised_targets():
    """Each patch by its mean and unbiased variance, of the leads that are there."""
    model, values = tiny("mtae"), batch_of(2)["ecg_values"]
    lead_mask = torch.ones(2, 12, dtype=torch.bool)
    lead_mask[0, 3:] = False
    mask = mask_of(model.config, 2)
    output = model(values, lead_mask=lead_mask, mask=mask)
    errors = []
    for record, leads, masked, patches in zip(values, lead_mask, mask, output.reconstruction, strict=True):
        for index in masked.nonzero()[:, 0].tolist():
            target = record[leads, index * PATCH : (index + 1) * PATCH]
            target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            given = patches[index].reshape(PATCH, 12)[:, leads].T  # ordered (sample, lead)
            errors.append((given - target).square().flatten())
    assert output.loss.item() == pytest.approx(torch.cat(errors).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(4, 24), r"mask has shape \[4, 24\]; expected \[4, 25\]"),
        (torch.eye(4, 25).index_fill(0, torch.tensor([0]), 0), "mask keeps 24 to 25 patches of a row"),
    ],
)
def test_bad_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        tiny("mtae")(**batch_of(), mask=mask)
