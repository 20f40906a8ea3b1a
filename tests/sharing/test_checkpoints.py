import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from elm_ecg.training.sharing.checkpoints import merge_lora, plain_key, read_checkpoint
from helpers import tiny_llm_config

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2, dtype=torch.bfloat16)}


class Evil:
    """Its pickle makes the file `owned` in the working directory."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def zipped(path: Path, content: bytes) -> None:
    """A file of torch's zip format whose pickle is `content`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def same(tensors, expected):
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[key], expected[key]) for key in expected)


def test_checkpoint_of_a_run(tmp_path):
    content = {"epoch": 3, "step": 7, "optimizer_state_dict": {"state": {}}, "model_state_dict": WEIGHTS}
    torch.save(content, tmp_path / "run.pt")
    checkpoint = read_checkpoint(tmp_path / "run.pt")
    same(checkpoint.tensors, WEIGHTS)
    assert checkpoint.others == ["epoch", "step", "optimizer_state_dict"]


def test_bare_state_dicts(tmp_path):
    torch.save(WEIGHTS, tmp_path / "new.pt")
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "module.pth")
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    for name in ("new.pt", "old.pt", "w.safetensors"):
        same(read_checkpoint(tmp_path / name).tensors, WEIGHTS)
    assert read_checkpoint(tmp_path / "module.pth").tensors.keys() == {"weight", "bias"}


AVERAGED = {"module.a.weight": torch.ones(2, 3)}


@pytest.mark.parametrize(
    ("average", "others"),
    [
        (AVERAGED, []),
        ({"shadow": AVERAGED, "decay": 0.999}, ["ema.decay"]),
        (AVERAGED | {"n_averaged": torch.tensor(12)}, ["ema.n_averaged"]),  # of torch's AveragedModel
    ],
)
def test_a_moving_average_beside_the_weights(average, others, tmp_path):
    torch.save({"model_state_dict": WEIGHTS, "ema": average, "epoch": 3}, tmp_path / "run.pt")
    for weights in (None, "ema"):
        checkpoint = read_checkpoint(tmp_path / "run.pt", weights)
        same(checkpoint.tensors, WEIGHTS | {"a.weight": torch.ones(2, 3)})  # the bias is the model's own
        assert checkpoint.names == {"a.weight": "module.a.weight", "a.bias": "a.bias"}
        assert (checkpoint.average, checkpoint.is_average) == ("ema", True)
        assert checkpoint.others == ["epoch", *others]
    checkpoint = read_checkpoint(tmp_path / "run.pt", "model")
    same(checkpoint.tensors, WEIGHTS)
    assert (checkpoint.average, checkpoint.is_average, checkpoint.others) == ("ema", False, ["ema", "epoch"])


def test_a_moving_average_that_cannot_be_read(tmp_path):
    torch.save({"model_state_dict": WEIGHTS, "ema": {"decay": 0.999}}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"The moving average 'ema': .*'decay' is a float.*Or take --weights model"):
        read_checkpoint(tmp_path / "run.pt")
    same(read_checkpoint(tmp_path / "run.pt", "model").tensors, WEIGHTS)
    torch.save({"model_state_dict": WEIGHTS}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"--weights ema, and .*run\.pt holds no moving average"):
        read_checkpoint(tmp_path / "run.pt", "ema")


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        ("module.a.b", "a.b"),
        ("_orig_mod.module.a.b", "a.b"),
        ("llm._orig_mod.llm.module.a", "llm.llm.a"),
        ("submodule.a", "submodule.a"),
        ("a.module", "a.module"),
    ],
)
def test_prefixes_go(key, plain, tmp_path):
    assert plain_key(key) == plain
    torch.save({key: torch.zeros(1)}, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt").names == {plain: key}


HOSTILE = {
    "reduce": pickle.dumps({"model_state_dict": Evil()}),
    "reduce_protocol_2": pickle.dumps({"model_state_dict": Evil()}, 2),
    "global": b"cos\nsystem\n(S'touch owned'\ntR.",
    "eval": b"\x80\x02c__builtin__\neval\nX\x1e\x00\x00\x00open('owned', 'w').write('yes!')\x85R.",
    "build": b"\x80\x02cos\nsystem\n}b.",
    "inst": b"(S'touch owned'\nios\nsystem\n.",
}


@pytest.mark.parametrize("form", ["zip", "bare"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_checkpoints_execute_nothing(name, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    zipped(path, HOSTILE[name]) if form == "zip" else path.write_bytes(HOSTILE[name])
    with pytest.raises(ValueError, match=r"hostile\.pt (is refused: expected tensors|is no checkpoint)") as error:
        read_checkpoint(path)
    assert "weights_only" not in str(error.value)  # torch's advice is to load it all the same
    assert not (tmp_path / "owned").exists()


def test_those_checkpoints_are_hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": Evil()}, tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"refused.*system.*Nothing of it was executed"):
        read_checkpoint(tmp_path / "hostile.pt")
    assert not (tmp_path / "owned").exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert (tmp_path / "owned").exists()


def test_pickled_module_and_tokenizer_are_refused(tmp_path):
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"refused.*torch\.nn\.modules\.linear\.Linear"):
        read_checkpoint(tmp_path / "module.pt")
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"is a \.pkl file.*`elm tokenizer import`"):
        read_checkpoint(tmp_path / "tokenizer.pkl")


def test_damaged_files(tmp_path):
    torch.save(WEIGHTS, tmp_path / "whole.pt")
    save_file(WEIGHTS, tmp_path / "whole.safetensors")
    for name in ("whole.pt", "whole.safetensors"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 1, 8, len(content) // 3, len(content) // 2, len(content) - 1):
            path = tmp_path / f"cut{Path(name).suffix}"
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=re.escape(path.name)):
                read_checkpoint(path)
    (tmp_path / "lies.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(ValueError, match="is no checkpoint of PyTorch or safetensors, or is damaged"):
        read_checkpoint(tmp_path / "lies.safetensors")
    with pytest.raises(OSError, match="nowhere"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_archive_of_several_disks(tmp_path):
    """Of which zipfile has an error of its own."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.zeros(2)}, path)
    content = bytearray(path.read_bytes())
    locator = content.rindex(b"PK\x06\x07")
    content[locator + 16] = 2
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: zipfiles that span multiple disks"):
        read_checkpoint(path)


def test_compressed_archive(tmp_path):
    """What torch would map as it is, and take for numbers."""
    torch.save({"a": torch.zeros(4000)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in stored.namelist():
            compressed.writestr(name, stored.read(name))
    with pytest.raises(
        ValueError, match=r"a\.pt is no checkpoint .*data\.pkl in it is compressed; expected an archive"
    ):
        read_checkpoint(tmp_path / "a.pt")


def test_a_flipped_bit_of_a_weight(tmp_path):
    torch.save({"a": torch.zeros(4000)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(bytes(16000)) + 8000] = 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"data/0 in it is not what its checksum says"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("new_format", [True, False])
def test_flipped_bytes(new_format, tmp_path):
    path, random = tmp_path / "flipped.pt", np.random.default_rng(0)
    torch.save({"model_state_dict": WEIGHTS, "epoch": 1}, path, _use_new_zipfile_serialization=new_format)
    whole = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    refused = 0
    for _ in range(300):
        content = whole[: random.integers(1, len(whole) + 1)].copy()
        content[random.integers(0, min(len(content), 1200), 2)] = random.integers(0, 256, 2)
        path.write_bytes(content.tobytes())
        try:
            read_checkpoint(path)
        except (ValueError, OSError):
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"model_state_dict": {}}, "holds no state dict"),
        ({"epoch": 1}, "the entry 'epoch' is a int"),
        ({"model_state_dict": {"a": "b"}}, "the entry 'a' is a str"),
        ({1: torch.zeros(1)}, "the entry 1 is a Tensor"),
        ({"a": torch.zeros(1), "module.a": torch.zeros(1)}, "two entries for a: a and module.a"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "a is sparse, quantized or without"),
        ({"a": torch.zeros(2, device="meta")}, "a is sparse, quantized or without values"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, r"a is of torch\.float8_e4m3fn; expected float16"),
        ({"a": torch.zeros(1).expand(1000, 1000)}, "a claims more values than the file holds"),
    ],
)
def test_what_is_no_state_dict(content, message, tmp_path):
    torch.save(content, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_is_merged_as_peft_merges_it(use_rslora):
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_llm_config(vocab_size=50))
    config = LoraConfig(
        r=4,
        lora_alpha=32,
        use_rslora=use_rslora,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
    )
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state_dict = {key.removeprefix("base_model.model."): tensor.clone() for key, tensor in model.state_dict().items()}
    merged, ranks = merge_lora(state_dict, 32, use_rslora)
    assert ranks == {4}
    assert merged.used.keys() | merged.ignored.keys() == state_dict.keys()
    assert list(merged.ignored) == ["lm_head.original_module.weight"]
    expected = model.merge_and_unload().state_dict()
    assert merged.tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(merged.tensors[key], tensor)


def test_without_lora_nothing_changes():
    merged, ranks = merge_lora(WEIGHTS, 32)
    same(merged.tensors, WEIGHTS)
    assert (ranks, merged.ignored) == (set(), {})


A, B, W = torch.ones(2, 3), torch.ones(4, 2), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({"q.base_layer.weight": W, "q.lora_A.default.weight": A}, "expected lora_A, lora_B and the weight"),
        ({"q.lora_B.default.weight": B, "q.lora_A.default.weight": A}, "expected lora_A, lora_B and the weight"),
        ({"q.base_layer.weight": W.T, "q.lora_A.x.weight": A, "q.lora_B.x.weight": B}, r"do not fit q.weight \[3, 4\]"),
        ({"q.base_layer.weight": W, "q.lora_A.x.weight": A, "q.lora_B.x.weight": B.T}, "do not fit q.weight"),
        ({"q.base_layer.weight": W, "q.lora_A.x.weight": A, "q.lora_A.y.weight": A}, "several adapters"),
        ({"q.base_layer.weight": W, "q.lora_magnitude_vector.x.weight": A}, "no adapter that can be merged"),
        ({"q.base_layer.weight": W, "q.weight": W}, "two entries for q.weight"),
    ],
)
def test_broken_lora(state_dict, message):
    with pytest.raises(ValueError, match=message):
        merge_lora(state_dict, 32)
