import collections
import io
import itertools
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from helpers import golden_state_dict

from configuration_elm import ENCODER_CONFIGS
from modeling_ecg_encoders import ENCODER_MODELS
from training.convert import MAX_PICKLE_BYTES, convert_state_dict, read_ecg_byte_pickle

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


@pytest.fixture(scope="module")
def shapes(shared):
    """Reference key -> shape of each encoder and connector."""
    folder = shared / "golden"
    files = ("encoder_state_dicts.json", "connector_state_dicts.json")
    return {kind: keys for name in files for kind, keys in json.loads((folder / name).read_text()).items()}


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


BYTES = {byte: chr(byte) if byte < 128 else f"<{byte}>" for byte in range(256)}
VOCAB = BYTES | {256: "aa", 257: "aab", 258: "zz"}
MERGES = [([97, 97], 256), ([97, 97, 98], 257), ([122, 122], 258)]


def read(folder: Path, content: bytes):
    (folder / "tokenizer.pkl").write_bytes(content)
    return read_ecg_byte_pickle(folder / "tokenizer.pkl")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_tokenizer_of_every_binary_protocol(protocol, tmp_path):
    tokenizer = read(tmp_path, pickle.dumps((VOCAB, MERGES), protocol))
    assert tokenizer.merges == ["aa", "aab", "zz"]
    assert (tokenizer.millivolt_range, tokenizer.across_leads, tokenizer.sampling_rate) == (None, True, None)


def test_tokenizer_of_many_merges(tmp_path):
    # more items than the pickler writes at once, and ids of more than two bytes
    strings = ["".join(letters) for letters in itertools.product("abcdefghijklmnopq", repeat=4)]
    vocab = BYTES | dict(enumerate(strings, 256))
    merges = [(list(map(ord, string)), token_id) for token_id, string in enumerate(strings, 256)]
    assert merges[-1][1] > 65535
    assert read(tmp_path, pickle.dumps((vocab, merges))).merges == strings


def test_tokenizer_of_one_merge(tmp_path):
    # one item has an opcode of its own in a list, and in a dict
    merges = [([97, 98], 256)]
    assert read(tmp_path, pickle.dumps((BYTES | {256: "ab"}, merges))).merges == ["ab"]
    content = pickle.dumps(BYTES, 3)[:-1] + b"M\x00\x01X\x02\x00\x00\x00abs" + pickle.dumps(merges, 3)[2:-1] + b"\x86."
    assert pickle.loads(content) == (BYTES | {256: "ab"}, merges)
    assert read(tmp_path, content).merges == ["ab"]


class Evil:
    """Its pickle makes the file `owned` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def evil_pickles() -> dict[str, bytes]:
    """Each is executed by `pickle.loads`, or crashes it."""
    memo_bomb = (
        b"\x80\x04" + b"K\x01\x85\x94" + b"".join(b"h" + bytes([n, ord("h"), n]) + b"\x86\x94" for n in range(200))
    )
    return {
        "reduce": pickle.dumps((VOCAB, [Evil()])),
        "reduce_protocol_0": pickle.dumps((VOCAB, [Evil()]), 0),
        "reduce_protocol_2": pickle.dumps((VOCAB, [Evil()]), 2),
        "as_a_key": pickle.dumps({Evil(): 1}),
        "after_the_tokenizer": pickle.dumps((VOCAB, MERGES))[:-1] + pickle.dumps(Evil())[2:],
        "global": b"cos\nsystem\n(S'touch owned'\ntR.",
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R.",
        "inst": b"(S'touch owned'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch owned'\no.",
        "newobj": b"\x80\x02cos\nsystem\n(U\x0btouch ownedt\x81.",
        "newobj_ex": b"\x80\x04cos\nsystem\n\x8c\x0btouch owned\x85}\x92.",
        "build": b"\x80\x02cos\nsystem\n}b.",
        "ext1": b"\x80\x02\x82\x01.",
        "ext2": b"\x80\x02\x83\x01\x00.",
        "ext4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "persid": b"Pid\n.",
        "binpersid": b"\x80\x02U\x02idQ.",
        "harmless_class": pickle.dumps(collections.OrderedDict(a=1)),
        "memo": pickle.dumps([[VOCAB] * 2]),
        "memo_bomb_as_a_key": memo_bomb + b"}h\x63K\x01s.",
        "dup": b"\x80\x02]2\x86.",
        "set": pickle.dumps({1, 2}),
        "bytes": pickle.dumps(b"bytes"),
        "float": pickle.dumps(1.5),
        "none": pickle.dumps(None),
        "long": pickle.dumps(2**80),
        "protocol_0": pickle.dumps((VOCAB, MERGES), 0),
    }


@pytest.mark.parametrize("name", evil_pickles())
def test_what_could_run_code_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"it holds \w+ at byte \d+; expected dicts, lists, pairs, whole numbers and strings"
    ):
        read(tmp_path, evil_pickles()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.pkl"]


@pytest.mark.parametrize("name", ["reduce", "global", "stack_global", "inst", "obj"])
def test_those_pickles_are_evil(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(evil_pickles()[name])
    assert (tmp_path / "owned").exists()


def test_deep_pairs_do_not_crash(tmp_path):
    # as a key they would be hashed, which exhausts the stack of the process
    deep = b"K\x01" + b"K\x01\x86" * 200_000
    with pytest.raises(ValueError, match="keys are no whole numbers"):
        read(tmp_path, b"\x80\x04}" + deep + b"K\x01s.")
    with pytest.raises(ValueError, match="expected a pair of a dict and a list"):
        read(tmp_path, b"\x80\x04" + deep + b".")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "pickle exhausted before seeing STOP"),
        (b"no pickle", "opcode b'n' unknown"),
        (b"\x80\x04.", "its opcodes do not fit together"),
        (b"\x80\x04a.", "its opcodes do not fit together"),
        (b"\x80\x04u.", "its opcodes do not fit together"),
        (b"\x80\x04}s.", "its opcodes do not fit together"),
        (b"\x80\x04\x86.", "its opcodes do not fit together"),
        (b"\x80\x04]K\x01K\x01s.", "sets items of what is no dict"),
        (b"\x80\x04}(K\x01u.", "sets items of what is no dict, or whose keys"),
        (b"\x80\x04}(]K\x01u.", "keys are no whole numbers"),
        (b"\x80\x04}K\x01a.", "appends to what is no list"),
        (b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"aa", "4294967295"),
    ],
)
def test_damaged_pickles(content, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, content)
    assert "tokenizer.pkl is no ECG-Byte tokenizer of the reference: " in str(error.value)


def test_truncated_anywhere(tmp_path):
    content = pickle.dumps((VOCAB, MERGES))
    for length in range(0, len(content), 37):
        with pytest.raises(ValueError, match="is no ECG-Byte tokenizer of the reference"):
            read(tmp_path, content[:length])


def test_huge_file(tmp_path):
    with (tmp_path / "huge.pkl").open("wb") as file:
        file.truncate(100 * MAX_PICKLE_BYTES)
    with pytest.raises(ValueError, match="it is larger than 16 MiB"):
        read_ecg_byte_pickle(tmp_path / "huge.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([VOCAB, MERGES], "expected a pair of a dict and a list"),
        ((MERGES, VOCAB), "expected a pair of a dict and a list"),
        (VOCAB, "expected a pair of a dict and a list"),
        ((VOCAB, ["aa"]), "merge 0 is no pair of a list of bytes and an id"),
        ((VOCAB, [("aa", 256)]), "merge 0 is no pair of a list of bytes and an id"),
        ((VOCAB, [([97, "a"], 256)]), "merge 0 is no pair of a list of bytes and an id"),
        ((VOCAB, [([97, 97], "256")]), "merge 0 does not have the id 256"),
        ((VOCAB, MERGES[::-1]), "merge 0 does not have the id 256"),
        ((VOCAB, [([97, 353], 256)]), "merge 0 holds what is no byte"),
        ((VOCAB, [([97, -1], 256)]), "merge 0 holds what is no byte"),
        ((VOCAB | {257: "aac"}, MERGES), "merge 1 is 'aab', but vocab has another string as id 257"),
        ((VOCAB | {257: [VOCAB]}, MERGES), "merge 1 is 'aab', but vocab has another string as id 257"),
        ((VOCAB, MERGES[:2]), "vocab has 259 entries; expected 256 bytes and 2 merges"),
        ((VOCAB | {-1: "aa"}, MERGES), "vocab has 260 entries; expected 256 bytes and 3 merges"),
        (({97: "a"}, MERGES), r"vocab has no single byte '\\x00' as id 0"),
        ((VOCAB | {97: "b"}, MERGES), "vocab has no single byte 'a' as id 97"),
        ((BYTES | {256: "AB"}, [([65, 66], 256)]), r"merge 0 \('AB'\) holds 'A'; symbols are a to z"),
        ((BYTES | {256: "a"}, [([97], 256)]), r"merge 0 \('a'\) has 1 symbol; expected at least 2"),
        ((BYTES | {256: "aa", 257: "aa"}, [([97, 97], 256), ([97, 97], 257)]), r"merge 1 \('aa'\) is also merge 0"),
    ],
)
def test_what_is_no_tokenizer(content, message, tmp_path):
    with io.BytesIO() as file:
        pickler = pickle.Pickler(file)
        pickler.fast = True  # strings that stand twice here are written out twice
        pickler.dump(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path, file.getvalue())
