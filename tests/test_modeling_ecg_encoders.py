import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.training.sharing.convert import convert_state_dict
from helpers import golden_state_dict, run_isolated

ENCODERS = list(ENCODER_MODELS)
OF_THE_REFERENCE = ["merl", "mlae", "mtae", "st_mem"]
TRANSFORMERS = ["mlae", "mtae", "st_mem", "siglip_ecg"]
TIME_PATCHES = ["mtae", "st_mem", "siglip_ecg"]
NUM_LEADS, NUM_SAMPLES, PATCH_SIZE = 6, 80, 10
LAYERS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 16}
DECODER = {"decoder_hidden_size": 24, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 3}
SIZES = {
    "merl": {"depths": (2, 1), "widths": (8, 16)},
    "mlae": {"patch_size": 2, **LAYERS, **DECODER},
    "mtae": {"patch_size": PATCH_SIZE, **LAYERS, **DECODER},
    "st_mem": {"patch_size": PATCH_SIZE, **LAYERS},
    "xresnet1d": {"depths": (2, 1), "widths": (8, 16)},
    "siglip_ecg": {
        "patch_size": PATCH_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    },
}
TOKENS = {"merl": 20, "mlae": 4, "mtae": 9, "st_mem": 48, "xresnet1d": 10, "siglip_ecg": 8}
CHECKPOINTED_BLOCKS = {"merl": 3, "mlae": 5, "mtae": 5, "st_mem": 3, "xresnet1d": 3, "siglip_ecg": 3}


def tiny_config(kind, **changes):
    return ENCODER_CONFIGS[kind](**{"num_leads": NUM_LEADS, "num_samples": NUM_SAMPLES, **SIZES[kind], **changes})


def tiny(kind, seed=0, **changes):
    """A small encoder in which no tensor is trivial: biases, norms and running statistics are random too."""
    torch.manual_seed(seed)
    model = ENCODER_MODELS[kind](tiny_config(kind, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


def records(num_samples=NUM_SAMPLES, num_leads=NUM_LEADS, batch=2):
    return torch.randn(batch, num_leads, num_samples, generator=torch.Generator().manual_seed(1))


def pool(tokens, size):
    return nn.functional.adaptive_avg_pool1d(tokens.transpose(1, 2), size).transpose(1, 2)


# the reference's numbers


@pytest.mark.parametrize("kind", OF_THE_REFERENCE)
def test_golden_parity(kind, shared):
    shapes = json.loads((shared / "golden" / "encoder_state_dicts.json").read_text())[kind]
    golden = load_file(shared / "golden" / "encoders.safetensors")
    with torch.device("meta"):
        model = ENCODER_MODELS[kind](ENCODER_CONFIGS[kind]())
    model.load_state_dict(convert_state_dict(kind, golden_state_dict(shapes)), assign=True)
    with torch.inference_mode():
        tokens = model.eval()(golden["input"]).last_hidden_state
    assert tokens.shape[2] == model.config.output_size
    for size in (1, 5):
        expected = golden[f"{kind}.tokens{size}"]
        assert (pool(tokens, size) - expected).abs().max() <= 1e-4 * expected.abs().max()
        torch.testing.assert_close(pool(tokens, size), expected, rtol=1e-4, atol=1e-4 * expected.std().item())


# shapes, leads and lengths


@pytest.mark.parametrize("kind", ENCODERS)
def test_tokens_are_as_wide_as_the_configuration_says(kind):
    model = tiny(kind)
    output = model(ecg_values=records(batch=3))
    assert output.last_hidden_state.shape == (3, TOKENS[kind], model.config.output_size)
    assert model.main_input_name == "ecg_values"
    assert isinstance(model(records(), return_dict=False), tuple)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_resnet_widths_and_lengths(block):
    model = tiny("merl", block=block, depths=(1, 2, 1), widths=(8, 16, 32))
    expansion = {"basic": 1, "bottleneck": 4}[block]
    hidden_states = model(records(2500), output_hidden_states=True).hidden_states
    shapes = [tuple(state.shape[1:]) for state in hidden_states]
    assert shapes == [(8, 1250), (8 * expansion, 1250), (16 * expansion, 625), (32 * expansion, 313)]


@given(num_leads=st.integers(1, 16), num_samples=st.integers(1, 300))
def test_merl_takes_any_leads_and_length(num_leads, num_samples):
    model = tiny("merl", num_leads=num_leads)
    tokens = model(records(num_samples, num_leads)).last_hidden_state
    assert tokens.shape[1] == -(-num_samples // 4)
    assert tokens.isfinite().all()


@given(kind=st.sampled_from(TIME_PATCHES), num_leads=st.integers(1, 16), num_patches=st.integers(1, 8))
def test_time_patches_take_any_leads_and_shorter_records(kind, num_leads, num_patches):
    model = tiny(kind, num_leads=num_leads)
    tokens = model(records(num_patches * PATCH_SIZE, num_leads)).last_hidden_state
    assert tokens.shape[1] == {"mtae": 1 + num_patches, "st_mem": num_leads * num_patches}.get(kind, num_patches)
    assert tokens.isfinite().all()


@pytest.mark.parametrize("kind", TIME_PATCHES)
def test_shorter_records_take_the_first_positions(kind):
    """The long model on a short record is the short model that holds the first positions only."""
    long, short = tiny(kind), tiny(kind, num_samples=30)
    weights = long.state_dict()
    for name in [name for name in weights if name.endswith("positions")]:
        weights[name] = weights[name][:, : 3 + (1 if kind == "mtae" else 2)]
    if kind == "siglip_ecg":
        name = "embeddings.position_embedding.weight"
        weights[name] = weights[name][:3]
    short.load_state_dict(weights)
    torch.testing.assert_close(long(records(30)).last_hidden_state, short(records(30)).last_hidden_state)


@pytest.mark.parametrize(("num_leads", "patch_size"), [(1, 1), (8, 4), (12, 1), (3, 3)])
def test_mlae_leads(num_leads, patch_size):
    model = tiny("mlae", num_leads=num_leads, patch_size=patch_size)
    assert model(records(num_leads=num_leads)).last_hidden_state.shape[1] == 1 + num_leads // patch_size


def test_patch_order():
    ecg_values = torch.arange(NUM_LEADS * NUM_SAMPLES).reshape(1, NUM_LEADS, NUM_SAMPLES).float()
    patches = tiny("mtae").make_patches(ecg_values)
    for patch in range(NUM_SAMPLES // PATCH_SIZE):
        window = ecg_values[0, :, patch * PATCH_SIZE : (patch + 1) * PATCH_SIZE]
        assert patches[0, patch].tolist() == window.T.flatten().tolist()  # (sample, lead)
    patches = tiny("mlae").make_patches(ecg_values)
    assert patches[0, 1].tolist() == ecg_values[0, 2:4].flatten().tolist()


def test_st_mem_tokens_are_lead_major():
    """Without attention between tokens, a token depends on its own lead and patch only."""
    model = tiny("st_mem", num_hidden_layers=0)
    ecg_values = records()
    changed = ecg_values.clone()
    changed[:, 2, 3 * PATCH_SIZE : 4 * PATCH_SIZE] += 1 + records()[:, 2, :PATCH_SIZE]
    difference = (model(changed).last_hidden_state - model(ecg_values).last_hidden_state).abs().amax(dim=(0, 2))
    assert difference.nonzero().flatten().tolist() == [2 * (NUM_SAMPLES // PATCH_SIZE) + 3]


@pytest.mark.parametrize("kind", ENCODERS)
def test_records_of_a_batch_do_not_mix(kind):
    model, ecg_values = tiny(kind), records(batch=3)
    one_by_one = torch.cat([model(record[None]).last_hidden_state for record in ecg_values])
    torch.testing.assert_close(model(ecg_values).last_hidden_state, one_by_one)


# missing leads

LEADS_THERE = torch.tensor([[True, False, True, True, False, True], [False, False, True, False, False, False]])


@pytest.mark.parametrize("kind", ENCODERS)
def test_mask_of_all_leads_is_none(kind):
    model = tiny(kind)
    masked = model(records(), lead_mask=torch.ones(2, NUM_LEADS, dtype=torch.bool)).last_hidden_state
    assert torch.equal(masked, model(records()).last_hidden_state)


@pytest.mark.parametrize("kind", ENCODERS)
def test_values_of_missing_leads_are_not_read(kind):
    model = tiny(kind)
    expected = model(records(), lead_mask=LEADS_THERE).last_hidden_state
    assert expected.isfinite().all()
    other = records().masked_fill(~LEADS_THERE[..., None], torch.nan)
    assert torch.equal(model(other, lead_mask=LEADS_THERE).last_hidden_state, expected)
    assert not torch.allclose(model(records()).last_hidden_state, expected)


@pytest.mark.parametrize("kind", ["merl", "mtae", "xresnet1d", "siglip_ecg"])
def test_missing_leads_are_zeros_where_tokens_hold_all_leads(kind):
    zeros = records().masked_fill(~LEADS_THERE[..., None], 0)
    model = tiny(kind)
    assert torch.equal(model(records(), lead_mask=LEADS_THERE).last_hidden_state, model(zeros).last_hidden_state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["mlae", "st_mem"])
def test_missing_leads_are_as_if_the_model_had_none_of_them(kind, attention):
    """The tokens of the others are those of a model of these leads alone."""
    patches = {"mlae": {"patch_size": 1}, "st_mem": {}}[kind]
    model = tiny(kind, **patches)
    model.set_attn_implementation(attention)
    output = model(records(), lead_mask=LEADS_THERE).last_hidden_state
    if kind == "mlae":
        output = output[:, 1:]
    output = output.unflatten(1, (NUM_LEADS, -1))
    for record, there, tokens in zip(records(), LEADS_THERE, output, strict=True):
        assert not tokens[~there].any()
        smaller = tiny(kind, num_leads=int(there.sum()), **patches)
        weights = model.state_dict()
        for name, rows in (
            (name, rows) for name, rows in weights.items() if rows.shape != smaller.state_dict()[name].shape
        ):
            cls = torch.tensor([True])
            weights[name] = rows[there] if kind == "st_mem" else rows[:, torch.cat([cls, there])]
        smaller.load_state_dict(weights)
        expected = smaller(record[there][None]).last_hidden_state[0, 1 if kind == "mlae" else 0 :]
        torch.testing.assert_close(tokens[there].flatten(0, 1), expected)


def test_mlae_patch_with_one_of_its_leads():
    output = tiny("mlae")(records(), lead_mask=LEADS_THERE).last_hidden_state
    assert output.any(-1).tolist() == [[True, True, True, True], [True, False, True, False]]


@pytest.mark.parametrize("kind", ENCODERS)
def test_training_with_missing_leads(kind):
    model = tiny(kind).train()
    model(records(), lead_mask=LEADS_THERE).last_hidden_state.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert next(model.parameters()).grad.any()


@pytest.mark.parametrize("kind", ENCODERS)
def test_wrong_lead_mask(kind):
    with pytest.raises(ValueError, match=r"The lead mask has shape \[6\]; expected \[2, 6\], one value for each lead"):
        tiny(kind)(records(), lead_mask=LEADS_THERE[0])


# errors


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize(
    ("ecg_values", "message"),
    [
        (torch.zeros(NUM_LEADS, NUM_SAMPLES), r"shape \[6, 80\]; expected \[batch, 6 leads, samples\]"),
        (torch.zeros(1, 1, NUM_LEADS, NUM_SAMPLES), r"shape \[1, 1, 6, 80\]; expected"),
        (torch.zeros(2, 12, NUM_SAMPLES), "records of 12 leads; expected 6"),
        (torch.zeros(2, NUM_LEADS, NUM_SAMPLES, dtype=torch.int16), r"dtype torch.int16; .* ecg_values.float\(\)"),
        (torch.zeros(2, NUM_LEADS, 0), "records of 0 samples; expected"),
    ],
)
def test_wrong_input(kind, ecg_values, message):
    with pytest.raises(ValueError, match=message):
        tiny(kind)(ecg_values)


@pytest.mark.parametrize("kind", TIME_PATCHES)
@pytest.mark.parametrize("num_samples", [5, 75, 90])
def test_length_that_time_patches_do_not_admit(kind, num_samples):
    message = f"{num_samples} samples; expected a multiple of patch_size=10, 80 at most: cut or pad"
    with pytest.raises(ValueError, match=message):
        tiny(kind)(records(num_samples))


@pytest.mark.parametrize("num_samples", [40, 81, 160])
def test_length_that_mlae_does_not_admit(num_samples):
    with pytest.raises(ValueError, match=f"{num_samples} samples; expected 80, .* cut or pad"):
        tiny("mlae")(records(num_samples))


# attention, hidden states


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_eager_equals_sdpa(kind):
    model = tiny(kind)
    assert model.config._attn_implementation == "sdpa"
    sdpa = model(records()).last_hidden_state
    model.set_attn_implementation("eager")
    output = model(records(), output_attentions=True)
    torch.testing.assert_close(output.last_hidden_state, sdpa)
    tokens = (TOKENS | {"st_mem": 60})[kind]  # ST-MEM: 6 leads of 8 patches and 2 SEPs
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 2, tokens, tokens)] * 3
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 2, tokens))


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_hidden_states_are_those_of_the_encoder(kind):
    model = tiny(kind)
    output = model(records(), output_hidden_states=True)
    assert [state.shape[-1] for state in output.hidden_states] == [32] * 4
    last = model(records(), output_hidden_states=[-1]).hidden_states[-1]
    torch.testing.assert_close(last, output.hidden_states[-1])
    if kind == "st_mem":
        tokens = last.unflatten(1, (NUM_LEADS, -1))[:, :, 1:-1].flatten(1, 2)
        torch.testing.assert_close(model.norm(tokens), output.last_hidden_state)


# training


def gradients(model, ecg_values):
    model.train()
    output = model(ecg_values).last_hidden_state
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ENCODERS)
def test_every_parameter_gets_a_gradient(kind):
    """As DDP needs with find_unused_parameters=False."""
    for name, gradient in gradients(tiny(kind), records()).items():
        assert gradient is not None, name
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ENCODERS)
def test_gradient_checkpointing_changes_nothing(kind, use_reentrant):
    model, checkpointed = tiny(kind), tiny(kind)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    blocks = [module for module in checkpointed.modules() if isinstance(module, GradientCheckpointingLayer)]
    assert len(blocks) == CHECKPOINTED_BLOCKS[kind]
    runs = []
    first = next(module for module in blocks[0].modules() if not list(module.children()))
    first.register_forward_hook(lambda *_: runs.append(1))
    expected, actual = gradients(model, records()), gradients(checkpointed, records())
    assert len(runs) == 2  # it was really run again
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, msg=name)
    # and the running statistics of batch norm do not move twice
    buffers = dict(checkpointed.named_buffers())
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(buffers[name], buffer, msg=name)


@pytest.mark.parametrize(("compiling", "share"), [(False, 1 - 0.9**0.5), (True, 0.1)])
def test_share_of_a_batch_in_the_statistics_of_a_checkpointed_block(compiling, share, monkeypatch):
    """Compiled by PyTorch, the second run of the block leaves the statistics; they would move half as far."""
    block = tiny("merl").stages[1][0].train()
    block.gradient_checkpointing = True
    block._gradient_checkpointing_func = lambda forward, *args: forward(*args)  # what the first run does
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    norm, hidden_states = block.convs[0].norm, torch.randn(2, 32, 16)
    expected = norm.running_mean * (1 - share) + share * block.convs[0].conv(hidden_states).mean((0, 2))
    block(hidden_states)
    torch.testing.assert_close(norm.running_mean, expected)


def test_a_block_that_reads_the_record_itself_is_trained_with_reentrant_checkpointing():
    model = tiny("merl", widths=(NUM_LEADS, 8), depths=(1, 1))
    model.stem = nn.Identity()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    ecg_values = records()
    assert all(gradient.any() for gradient in gradients(model, ecg_values).values())
    assert not ecg_values.requires_grad  # the caller's own tensor stays as it is


def test_checkpointing_can_be_switched_off_again():
    model, other = tiny("merl"), tiny("merl")
    model.gradient_checkpointing_enable()
    gradients(model, records())
    model.load_state_dict(other.state_dict())
    model.gradient_checkpointing_disable()
    model.train()(records())
    other.train()(records())
    torch.testing.assert_close(dict(model.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize("kind", ["mlae", "mtae"])
def test_fixed_positions_do_not_train(kind):
    model = tiny(kind)
    model.requires_grad_(True)
    names = {"embeddings.positions", "decoder_embeddings.positions"}
    assert not names & dict(model.named_parameters()).keys()
    assert names <= model.state_dict().keys()


@pytest.mark.parametrize("kind", ["mlae", "mtae"])
def test_fixed_positions_are_sines_and_cosines(kind):
    model = tiny(kind)
    for positions in (model.embeddings.positions[0], model.decoder_embeddings.positions[0]):
        half = positions.shape[1] // 2
        assert not positions[0].any()  # CLS
        assert not positions[1, :half].any()  # sin 0
        assert (positions[1, half:] == 1).all()  # cos 0
        for patch, channel in [(2, 0), (3, 1), (3, half - 1)]:
            angle = torch.tensor((patch - 1) / 10000 ** (channel / half))
            torch.testing.assert_close(positions[patch, channel], angle.sin())
            torch.testing.assert_close(positions[patch, half + channel], angle.cos())


@pytest.mark.parametrize("kind", ENCODERS)
def test_bfloat16(kind):
    model = tiny(kind)
    expected = model(records()).last_hidden_state
    tokens = model.to(torch.bfloat16)(records()).last_hidden_state  # float32 records are cast
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - expected).norm() < 0.05 * expected.norm()
    assert all(gradient.isfinite().all() for gradient in gradients(model, records()).values())


@pytest.mark.parametrize("kind", ENCODERS)
def test_float64_records_are_cast(kind):
    torch.testing.assert_close(
        tiny(kind)(records().double()).last_hidden_state, tiny(kind)(records()).last_hidden_state
    )


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.slow
def test_compiles_without_graph_breaks(kind):
    model = tiny(kind)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(records()).last_hidden_state, model(records()).last_hidden_state)


# initialisation, saving and loading


@pytest.mark.parametrize("kind", ENCODERS)
def test_initialisation_leaves_nothing_undefined(kind):
    torch.manual_seed(0)
    # enough numbers for a standard deviation
    wide = {"num_leads": 12, "hidden_size": 64} if kind in TRANSFORMERS else {}
    model = ENCODER_MODELS[kind](tiny_config(kind, **wide))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith(("cls_token", "sep_token", "lead_embeddings")) or name == "embeddings.positions":
            assert 0.01 < parameter.std() < 0.03, name
    tokens = model(records(model.config.num_samples, model.config.num_leads)).last_hidden_state
    assert 0.05 < tokens.std() < 20


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(kind, dtype, tmp_path):
    model = tiny(kind).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, info = ENCODER_MODELS[kind].from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert torch.equal(loaded(records()).last_hidden_state, model(records()).last_hidden_state)


@pytest.mark.parametrize("kind", ["mlae", "mtae"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_that_a_checkpoint_lacks_are_made(kind, dtype, tmp_path):
    """from_pretrained builds on the meta device, where a table computed in `__init__` would be lost."""
    model = tiny(kind)
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("positions")}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = ENCODER_MODELS[kind].from_pretrained(tmp_path, dtype=dtype)
    for name in ("embeddings.positions", "decoder_embeddings.positions"):
        assert torch.equal(loaded.get_buffer(name), model.get_buffer(name).to(dtype)), name


@pytest.mark.parametrize("kind", ENCODERS)
def test_meta_device(kind):
    with torch.device("meta"):
        model = ENCODER_MODELS[kind](tiny_config(kind))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.load_state_dict(tiny(kind).state_dict(), assign=True)
    torch.testing.assert_close(model.eval()(records()).last_hidden_state, tiny(kind)(records()).last_hidden_state)


def test_fresh_process_loads_by_auto_classes(tmp_path):
    """From another folder, where nothing of the project can be imported; all encoders in one process to save time."""
    expected = {}
    for kind in ENCODERS:
        model = tiny(kind)
        model.save_pretrained(tmp_path / kind)
        expected[kind] = model(records()).last_hidden_state.double().sum(dim=(0, 1)).tolist()
    code = f"""
import json, torch
from transformers import AutoConfig, AutoModel
ecg_values = torch.randn(2, {NUM_LEADS}, {NUM_SAMPLES}, generator=torch.Generator().manual_seed(1))
sums = {{}}
for kind in {ENCODERS!r}:
    assert AutoConfig.from_pretrained(kind, trust_remote_code=True).model_type == kind
    model = AutoModel.from_pretrained(kind, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    sums[kind] = model(ecg_values).last_hidden_state.double().sum(dim=(0, 1)).tolist()
print(json.dumps(sums))
"""
    actual = json.loads(run_isolated(code, tmp_path).splitlines()[-1])
    for kind in ENCODERS:
        torch.testing.assert_close(torch.tensor(actual[kind]), torch.tensor(expected[kind]))


@pytest.mark.parametrize("kind", ENCODER_CONFIGS)
def test_model_of_each_configuration(kind):
    config_class = ENCODER_CONFIGS[kind]
    assert ENCODER_MODELS[kind].config_class is config_class
    assert ENCODER_MODELS[kind].__name__ == config_class.__name__.removesuffix("Config") + "Model"
    assert copy.deepcopy(tiny(kind)).config.model_type == kind
    name, url = config_class.paper
    assert name
    assert url.startswith("https://")
