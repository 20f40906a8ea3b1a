import pytest
import torch

from elm_ecg.configuration_ecg_encoders import ENCODER_CONFIGS
from elm_ecg.modeling_ecg_encoders import ENCODER_MODELS
from elm_ecg.training.sharing.checkpoint_keys import convert_state_dict
from helpers import golden_state_dict

ENCODERS = ["merl", "mlae", "mtae", "st_mem"]
CONNECTOR_KEYS = {
    "linear": {"projection"},
    "mlp": {"linear_1", "linear_2"},
    "flat": {"projection"},
    "patch": {"projection"},
    "conv": {"conv1", "conv2", "projection"},
}
# entries of the reference that serve its pretraining only, or stand there twice
IGNORED = {
    "merl": set(),
    "st_mem": set(),
    "mtae": {"mask_embedding", "decoder_norm", "decoder_head", "encoder.to_patch_embedding"},
}
IGNORED["mlae"] = IGNORED["mtae"]


def small(shapes):
    """One number an entry, as keys are all that matters; each has a value of its own."""
    return {key: torch.tensor(float(index)) for index, key in enumerate(shapes)}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_keys_are_those_of_the_model_and_every_entry_is_used(kind, shapes):
    reference = small(shapes[kind])
    converted = convert_state_dict(kind, reference)
    with torch.device("meta"):
        model = ENCODER_MODELS[kind](ENCODER_CONFIGS[kind]())
    assert converted.keys() == model.state_dict().keys()
    used = torch.cat([tensor.flatten() for tensor in converted.values()]).long().tolist()
    assert len(used) == len(set(used))
    unused = {key for index, key in enumerate(reference) if index not in set(used)}
    assert all(key.startswith(tuple(IGNORED[kind])) for key in unused)
    assert {prefix for prefix in IGNORED[kind] if any(key.startswith(prefix) for key in unused)} == IGNORED[kind]


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoder_loads_strictly(kind, shapes):
    with torch.device("meta"):
        model = ENCODER_MODELS[kind](ENCODER_CONFIGS[kind]())
    reference = {key: torch.empty(shape, device="meta") for key, shape in shapes[kind].items()}
    model.load_state_dict(convert_state_dict(kind, reference), strict=True, assign=True)


def test_leads_are_stacked_in_numeric_order(shapes):
    reference = small(shapes["st_mem"])
    stacked = convert_state_dict("st_mem", dict(reversed(reference.items())))["embeddings.lead_embeddings"]
    assert stacked.tolist() == [reference[f"encoder.lead_embeddings.{lead}"].item() for lead in range(12)]


@pytest.mark.parametrize(("kind", "modules"), CONNECTOR_KEYS.items())
def test_connector_keys(kind, modules, shapes):
    reference = golden_state_dict(shapes[kind])
    converted = convert_state_dict(kind, reference)
    assert converted.keys() == {f"{module}.{tensor}" for module in modules for tensor in ("weight", "bias")}
    if kind == "mlp":
        assert converted["linear_2.weight"] is reference["projection.2.weight"]
    elif kind == "conv":
        assert converted["projection.weight"] is reference["fc.weight"]
        assert converted["conv2.bias"] is reference["conv2.bias"]
    else:
        assert converted["projection.bias"] is reference["projection.bias"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("kind", ["merl", "mtae", "conv"])
def test_prefixes_of_ddp_and_compile(kind, prefix, shapes):
    reference = small(shapes[kind])
    wrapped = {prefix + key: tensor for key, tensor in reference.items()}
    assert convert_state_dict(kind, wrapped) == convert_state_dict(kind, reference)


def test_prefix_inside_a_key(shapes):
    reference = small(shapes["mtae"])
    compiled = {key.replace("encoder.", "encoder._orig_mod."): tensor for key, tensor in reference.items()}
    assert compiled.keys() != reference.keys()
    assert convert_state_dict("mtae", compiled) == convert_state_dict("mtae", reference)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("merl", ["proj_t.0.weight", "lm_model.encoder.layer.0.output.dense.weight", "logit_scale"]),
        (
            "st_mem",
            ["mask_embedding", "decoder_pos_embed", "to_decoder_embedding.weight", "decoder_blocks.0.ff.norm.bias"],
        ),
    ],
)
def test_extra_entries_of_the_pretraining_are_ignored(kind, extra, shapes):
    reference = small(shapes[kind])
    with_extra = reference | {key: torch.tensor(-1.0) for key in extra}
    converted, expected = convert_state_dict(kind, with_extra), convert_state_dict(kind, reference)
    assert {key: tensor.tolist() for key, tensor in converted.items()} == {k: t.tolist() for k, t in expected.items()}


@pytest.mark.parametrize("depths", [(2, 2, 2, 2), (3, 4, 6, 3)])
def test_resnet_of_basic_blocks(depths):
    """ResNet-18 and ResNet-34: two convolutions a block, and no shortcut convolution in the first stage."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["resnet.conv1.weight", *(f"resnet.bn1.{name}" for name in norm)]
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            for conv in (1, 2):
                keys.append(f"resnet.layer{stage}.{block}.conv{conv}.weight")
                keys.extend(f"resnet.layer{stage}.{block}.bn{conv}.{name}" for name in norm)
        if stage > 1:
            keys.append(f"resnet.layer{stage}.0.shortcut.0.weight")
            keys.extend(f"resnet.layer{stage}.0.shortcut.1.{name}" for name in norm)
    with torch.device("meta"):
        model = ENCODER_MODELS["merl"](ENCODER_CONFIGS["merl"](block="basic", depths=depths))
    assert convert_state_dict("merl", small(keys)).keys() == model.state_dict().keys()


def test_unknown_kind():
    with pytest.raises(ValueError, match="Unknown kind 'vit'; expected one of merl, mlae, mtae, st_mem, linear"):
        convert_state_dict("vit", {})


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("merl", "resnet.fc.weight"),
        ("merl", "resnet.layer1.0.conv4.weight"),
        ("mtae", "head.weight"),
        ("mlae", "encoder.lead_embeddings.0"),
        ("st_mem", "encoder.cls_embedding"),
        ("st_mem", "encoder.block0.attn.norm.scale"),
        ("linear", "fc.weight"),
        ("linear", "projection.scale"),
        ("conv", "conv3.weight"),
    ],
)
def test_unknown_key(kind, key, shapes):
    with pytest.raises(ValueError, match=rf"(Unknown key '{key}'|no such tensors in kind '{kind}')"):
        convert_state_dict(kind, small(shapes[kind]) | {key: torch.tensor(0.0)})


@pytest.mark.parametrize(
    ("kind", "key", "ours"),
    [
        ("merl", "resnet.layer3.7.bn2.running_var", "stages.2.7.convs.1.norm.running_var"),
        ("merl", "resnet.layer2.0.shortcut.0.weight", "stages.1.0.shortcut.conv.weight"),
        ("mlae", "encoder.cls_embedding", "embeddings.cls_token"),
        ("mtae", "decoder_blocks.1.ff.fn.net.3.bias", "decoder_layers.1.mlp.fc2.bias"),
        ("mtae", "to_patch_embedding.2.weight", "embeddings.patch_embedding.projection.weight"),
        ("st_mem", "encoder.block4.attn.fn.to_qkv.bias", "layers.4.attention.qkv_proj.bias"),
        ("st_mem", "encoder.lead_embeddings.3", "embeddings.lead_embeddings"),
        ("mlp", "projection.2.bias", "linear_2.bias"),
        ("flat", "projection.weight", "projection.weight"),
    ],
)
def test_missing_key(kind, key, ours, shapes):
    reference = small(shapes[kind])
    del reference[key]
    with pytest.raises(ValueError, match=f"has no entry for {ours}"):
        convert_state_dict(kind, reference)


def test_state_dict_of_another_kind(shapes):
    with pytest.raises(ValueError, match="missing"):
        convert_state_dict("merl", small(shapes["st_mem"]))
    with pytest.raises(ValueError, match="check the kind"):
        convert_state_dict("st_mem", small(shapes["merl"]))


@pytest.mark.parametrize("kind", [*ENCODERS, *CONNECTOR_KEYS])
def test_empty_state_dict(kind):
    with pytest.raises(ValueError, match="has no entry for"):
        convert_state_dict(kind, {})


def test_two_entries_for_one_tensor():
    entry = torch.zeros(1)
    with pytest.raises(ValueError, match=r"Two entries for 'projection\.weight'"):
        convert_state_dict("linear", {"projection.weight": entry, "module.projection.weight": entry})
