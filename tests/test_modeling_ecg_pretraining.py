import copy
import json
from functools import cache

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

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
INVALID = (ValueError, StrictDataclassError)  # the latter wraps errors of single fields
OBJECTIVES = {"masked": ["masked"], "contrastive": ["contrastive"], "both": ["masked", "contrastive"]}
KINDS = [(kind, "masked") for kind in MASKED_ENCODERS]
KINDS += [(kind, "contrastive") for kind in ENCODER_MODELS] + [("st_mem", "both")]
SMALL = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def tiny_config(kind="st_mem", objectives="masked", encoder=None, text=None, **changes):
    encoder_config = ENCODER_CONFIGS[kind](num_samples=NUM_SAMPLES, **TINY_ENCODERS[kind] | (encoder or {}))
    text_config = None if objectives == "masked" else BertConfig(**TEXT | (text or {}))
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


tiny_once = cache(tiny)  # for all examples of a property


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
@pytest.mark.slow
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


@given(kind=st.sampled_from(MASKED_ENCODERS), seed=st.integers(0, 2**31), data=st.data())
def test_padding_and_missing_leads_do_not_count(kind, seed, data):
    """Whatever stands there, also NaN: the same loss, and gradients for all other values alone."""
    model = tiny_once(kind)
    values = batch_of(2, seed=seed)["ecg_values"]
    num_samples = torch.tensor([data.draw(st.integers(0, NUM_SAMPLES)), NUM_SAMPLES])
    lead_mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=2, max_size=2))
    )
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_samples": torch.ones(3)}, r"num_samples has shape \[3\] with ecg_values of shape \[4, 12, 500\]"),
        ({"lead_mask": torch.ones(4, 8)}, r"The lead mask has shape \[4, 8\]"),
        ({"ecg_values": torch.ones(12, 500)}, r"got ecg_values of shape \[12, 500\]"),
        ({"ecg_values": torch.ones(4, 12, 500, dtype=torch.long)}, "dtype torch.int64"),
        ({"ecg_values": torch.ones(4, 8, 500)}, "got records of 8 leads"),
    ],
)
def test_batches_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny("mtae")(**batch_of() | fields)


@pytest.mark.parametrize("kind", MASKED_ENCODERS)
def test_a_batch_where_nothing_counts(kind):
    model = tiny(kind)
    loss = model(**batch_of(2), num_samples=torch.zeros(2, dtype=torch.long)).loss
    assert loss.item() == 0
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decoder.parameters())


@given(case=st.sampled_from(KINDS), order=st.permutations(range(4)))
def test_permuted_batches(case, order):
    kind, objectives = case
    model = tiny_once(kind, objectives)
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


# reports


def test_both_objectives_are_the_sum_of_each():
    model, batch = tiny("st_mem", "both", contrastive_weight=0.3), batch_of(text=True)
    mask = mask_of(model.config)
    output = model(**batch, mask=mask)
    assert output.loss.item() == pytest.approx(output.masked_loss.item() + 0.3 * output.contrastive_loss.item())
    for objectives, name in (("masked", "masked_loss"), ("contrastive", "contrastive_loss")):
        alone = tiny("st_mem", objectives)
        weights = {key: weight for key, weight in model.state_dict().items() if key in alone.state_dict()}
        alone.load_state_dict(weights)
        single = alone(**batch, mask=mask)
        assert single.loss.item() == pytest.approx(output[name].item(), rel=1e-5)
        assert [key for key in ("masked_loss", "contrastive_loss") if getattr(single, key) is not None] == [name]


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
def test_records_without_report_have_their_views_compared(loss):
    model, batch = tiny("merl", "contrastive", contrastive_loss=loss), batch_of(text=True)
    has_report = torch.tensor([True, False, True, True])
    expected = model(**batch, has_report=has_report).loss
    batch["input_ids"][1] = 3  # whatever the text is
    assert torch.equal(model(**batch, has_report=has_report).loss, expected)
    assert model(**batch).loss != expected
    without = model(ecg_values=batch["ecg_values"])
    assert torch.equal(without.loss, model(**batch, has_report=torch.zeros(4, dtype=torch.bool)).loss)
    without.loss.backward()  # as DDP wants it, each head has a gradient
    assert all(parameter.grad is not None for parameter in model.heads.text_projection.parameters())


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_pooling_of_the_text(pooling):
    model, batch = tiny("merl", "contrastive", text_pooling=pooling), batch_of(text=True)
    assert (model.text_encoder.pooler is None) == (pooling != "pooler")
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    output = model.text_encoder(**texts)
    states = output.last_hidden_state
    pooled = {"mean": torch.stack([states[0, :4].mean(0), *states[1:].mean(1)]), "cls": states[:, 0]}
    pooled |= {"pooler": output.pooler_output}
    expected = nn.functional.normalize(model.heads.text_projection(pooled[pooling]), dim=1)
    torch.testing.assert_close(model.get_text_embeddings(**texts), expected)
    assert model.get_ecg_embeddings(batch["ecg_values"]).norm(dim=1).tolist() == pytest.approx([1] * 4)


@pytest.mark.slow
def test_training_tells_ecgs_apart_by_their_reports():
    torch.manual_seed(0)
    model, batch = ECGForPreTraining(tiny_config("mtae", "contrastive")), batch_of(text=True)
    times = torch.arange(NUM_SAMPLES) / 250
    batch["ecg_values"] *= 0.1
    batch["ecg_values"] += torch.stack([torch.sin(2 * torch.pi * rate * times) for rate in (1, 3, 6, 10)])[:, None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    ecgs = model.eval().get_ecg_embeddings(batch["ecg_values"])
    texts = model.get_text_embeddings(batch["input_ids"], batch["attention_mask"])
    assert (ecgs @ texts.T).argmax(1).tolist() == [0, 1, 2, 3]


def test_a_frozen_text_encoder():
    model, batch = ECGForPreTraining(tiny_config("st_mem", "both")), batch_of(text=True)
    model.text_encoder.requires_grad_(False)
    model.train()
    assert model.encoder.training
    assert not any(module.training for module in model.text_encoder.modules())
    seen = []
    model.text_encoder.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    model(**batch).loss.backward()
    assert not seen[0].requires_grad
    assert all(parameter.grad is None for parameter in model.text_encoder.parameters())
    assert all(parameter.grad is not None for parameter in model.heads.parameters())


def test_every_weight_gets_a_gradient():
    """DDP waits for each of them."""
    for kind, objectives in KINDS:
        model = tiny(kind, objectives).train()
        model(**batch_of(text=objectives != "masked")).loss.backward()
        without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert without == [], (kind, objectives)


def test_wrong_number_of_tokens():
    model = tiny("merl", "contrastive")
    with pytest.raises(
        ValueError, match="makes 100 tokens of these records, and the contrastive head has positions for 125"
    ):
        model(**batch_of(text=True, num_samples=400))


def test_texts_of_another_batch():
    model, batch = tiny("merl", "contrastive"), batch_of(text=True)
    batch |= {name: batch[name][:3] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="4 ECGs, 3 texts and 3 values of has_report"):
        model(**batch, has_report=torch.ones(3, dtype=torch.bool))


def test_embeddings_of_a_model_without_heads():
    with pytest.raises(ValueError, match="This model was made for masked"):
        tiny("st_mem").get_ecg_embeddings(batch_of()["ecg_values"])


# as any model of transformers


def test_given_parts_stay_as_they_are():
    torch.manual_seed(3)
    config = tiny_config("st_mem", "both")
    encoder, text_encoder = ENCODER_MODELS["st_mem"](config.encoder_config), BertModel(BertConfig(**TEXT))
    expected = copy.deepcopy((encoder.state_dict(), text_encoder.state_dict()))
    model = ECGForPreTraining(tiny_config("st_mem", "both"), encoder, text_encoder)
    for part, weights in zip((model.encoder, model.text_encoder), expected, strict=True):
        for name, weight in part.state_dict().items():
            assert torch.equal(weight, weights[name]), name
    assert model.config.encoder_config is encoder.config
    assert model.config.num_encoder_tokens == 12 * 25


class OwnConfig(PreTrainedConfig):
    model_type = "own_ecg_encoder"
    width: int = 8


class OwnEncoder(PreTrainedModel):
    """Any model that makes tokens of records."""

    config: OwnConfig
    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(12, config.width)
        self.post_init()

    def forward(self, ecg_values, lead_mask=None):
        return BaseModelOutput(last_hidden_state=self.linear(ecg_values.transpose(1, 2)[:, ::100]))


def test_an_encoder_of_ones_own(tmp_path):
    config = OwnConfig(num_leads=12, num_samples=NUM_SAMPLES, hidden_size=8)
    fields = {"objectives": ["contrastive"], "projection_size": 8, "text_config": BertConfig(**TEXT)}
    with pytest.raises(ValueError, match="OwnConfig has no num_leads or no num_samples; give num_encoder_tokens"):
        ECGForPreTraining(
            ECGPretrainingConfig(encoder_config=OwnConfig(hidden_size=8), **fields),
            OwnEncoder(OwnConfig(hidden_size=8)),
        )
    with pytest.raises(INVALID, match="masked with a own_ecg_encoder encoder"):
        ECGPretrainingConfig(encoder_config=config)
    model = ECGForPreTraining(ECGPretrainingConfig(encoder_config=config, **fields), OwnEncoder(config)).eval()
    assert model.config.num_encoder_tokens == 5
    loss = model(**batch_of(text=True)).loss
    loss.backward()
    assert model.encoder.linear.weight.grad.any()
    AutoConfig.register("own_ecg_encoder", OwnConfig, exist_ok=True)
    AutoModel.register(OwnConfig, OwnEncoder, exist_ok=True)
    model.save_pretrained(tmp_path)
    again = ECGForPreTraining.from_pretrained(tmp_path)
    assert type(again.encoder) is OwnEncoder
    assert torch.equal(again(**batch_of(text=True)).loss, loss)


def test_new_weights():
    torch.manual_seed(0)
    model = ECGForPreTraining(tiny_config("st_mem", "both", projection_size=64))
    for parameter in (model.decoder.mask_token, model.heads.attention_pool.positions, model.heads.view_1.weight):
        assert 0.01 < parameter.std() < 0.03
    positions = model.decoder.positions[0]
    assert not positions[0].any()
    assert not positions[-1].any()
    assert positions[1].tolist() == pytest.approx([0] * 8 + [1] * 8)  # sines and cosines of 0
    assert model.heads.attention_pool.attention.in_proj_weight.std() > 0.05  # PyTorch's own


RELOAD = """
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained("saved", trust_remote_code=True).eval()
batch = torch.load("batch.pt")
with torch.no_grad():
    print(repr(model(**batch).loss.item()), model.config.model_type, type(model.encoder).__module__.split(".")[0])
"""


@pytest.mark.parametrize(("kind", "objectives"), [("mtae", "masked"), ("st_mem", "both")])
def test_saved_models_load_without_the_project(kind, objectives, tmp_path):
    model, batch = tiny(kind, objectives), batch_of(text=objectives != "masked")
    batch["mask"] = mask_of(model.config)
    model.save_pretrained(tmp_path / "saved")
    torch.save(batch, tmp_path / "batch.pt")
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert run_isolated(RELOAD, tmp_path).split() == [repr(loss), "ecg_pretraining", "transformers_modules"]
    again = ECGForPreTraining.from_pretrained(tmp_path / "saved")
    assert again.config.to_dict().keys() == model.config.to_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_incomplete_files(tmp_path):
    model = tiny("st_mem")
    weights = {name: weight for name, weight in model.state_dict().items() if name != "decoder.mask_token"}
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"decoder\.mask_token"):
        ECGForPreTraining.from_pretrained(tmp_path)


@pytest.mark.parametrize(("kind", "objectives"), KINDS)
def test_gradient_checkpointing(kind, objectives):
    gradients = []
    for checkpointed in (False, True):
        model, batch = tiny(kind, objectives), batch_of(text=objectives != "masked")
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            assert all(block.gradient_checkpointing for block in blocks)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        torch.manual_seed(1)
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize(("kind", "objectives"), KINDS)
def test_bfloat16(kind, objectives):
    model, batch = tiny(kind, objectives), batch_of(text=objectives != "masked")
    if objectives != "contrastive":
        batch["mask"] = mask_of(model.config)
    expected = model(**batch).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected, rel=0.1)
    assert model.to(torch.bfloat16)(**batch).loss.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "objectives"),
    [
        ("mtae", "masked"),
        pytest.param("st_mem", "both", marks=pytest.mark.minutes),
        pytest.param("merl", "contrastive", marks=pytest.mark.minutes),
    ],
)
def test_one_graph(kind, objectives):
    model, batch = tiny(kind, objectives), batch_of(text=objectives != "masked")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = model(**batch).loss
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(**batch).loss, expected)


def test_parts_that_are_given_keep_an_attention():
    """transformers takes it from a configuration that becomes a part of another."""
    text = BertModel(BertConfig(vocab_size=20, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    encoder_config = ENCODER_CONFIGS["st_mem"](num_samples=500, **TINY_ENCODERS["st_mem"])
    encoder = ENCODER_MODELS["st_mem"](encoder_config)
    config = ECGPretrainingConfig(encoder_config=encoder_config, text_config=text.config, objectives=["contrastive"])
    model = ECGForPreTraining(config, encoder, text)
    assert model.encoder.config._attn_implementation == "sdpa"
    assert model.text_encoder.config._attn_implementation == "sdpa"
