"""What is trained by LoRA and in which precision, the base that its runs share, and quantized language models."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from peft import AutoPeftModelForCausalLM, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedConfig, Zamba2Config

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import base_models, run, run_options, sft
from elm_ecg.training.digest import OPTIONS_FILE, base_of_adapter, digest_of_folder
from elm_ecg.training.load import load_elm
from elm_ecg.training.lora import linear_layers, lora_config, set_precision
from elm_ecg.training.resume import RunOptions, fingerprint
from helpers import (
    TINY_VISION,
    fork_project,
    losses,
    save_tiny_data,
    save_tiny_llm,
    tiny_ecg_byte,
    tiny_elm_config,
    tiny_sft,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data"), without_ecg=5, train=12)


@pytest.fixture(scope="module")
def half_llm(tmp_path_factory) -> Path:
    """Tied, and saved in 16 bits as those of the Hub are."""
    folder = save_tiny_llm(tmp_path_factory.mktemp("half"), "qwen2_5")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def of_representation(tmp_path_factory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("ecg_byte")
    tiny_ecg_byte().save_pretrained(folder)
    pictures = ["--encoder", "resnet", "--encoder_config", json.dumps(TINY_VISION["resnet"]), "--num_ecg_tokens", "4"]
    return {
        "signal": ["--encoder", "merl", "--encoder_config", '{"block": "basic", "depths": [1, 1], "widths": [8, 16]}'],
        "symbolic": ["--representation", "symbolic", "--ecg_tokenizer", str(folder), "--lead_names", "I", "V1"],
        "rgb": ["--representation", "rgb", *pictures],
        "stacked_signal": ["--representation", "stacked_signal", *pictures],
    }


def train_and_save(llm: Path, data: Path, folder: Path, *options: str) -> sft.ELMTrainer:
    """A trainer after its training, and what it trained saved with its logits of a batch."""
    parts = sft.parse(tiny_sft(llm, data, folder, "--max_steps", "2", *options, encoder=None))
    torch.manual_seed(parts[1].seed)
    splits = {"train": load_from_disk(str(data))["train"], "validation": None}
    model, processor = run.build_base(*parts)
    options_of_run = RunOptions.of(*parts)
    options_of_run.data = fingerprint(splits["train"])
    options_of_run.base = base_models.read_recipe(str(model.name_or_path))
    trainer = sft.make_trainer(*parts, model, processor, splits, options_of_run)
    trainer.train()
    trainer.save_model(str(folder))
    options_of_run.save(folder)
    batch = trainer.data_collator([splits["train"][row] for row in (1, 5, 2)])
    with torch.no_grad():
        torch.save((batch, trainer.model.eval()(**batch).logits.float()), folder / "expected.pt")
    return trainer


LOAD = """
import sys
import torch
from elm_ecg.training.load import load_elm
batch, expected = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    model = load_elm(sys.argv[1], dtype="float32")[0]
    print(float((model.eval()(**batch).logits - expected).abs().max()))
"""


@pytest.mark.parametrize(
    ("representation", "update"),
    [
        ("signal", "llm"),
        ("rgb", "encoder connector llm"),
        ("stacked_signal", "connector llm"),
        ("symbolic", "llm"),
        *(
            pytest.param(*case, marks=pytest.mark.minutes)
            for case in [
                ("signal", "connector llm"),
                ("signal", "encoder connector llm"),
                ("rgb", "llm"),
                ("rgb", "connector llm"),
                ("stacked_signal", "encoder connector llm"),
            ]
        ),
    ],
)
@pytest.mark.slow
def test_a_saved_adapter_is_what_was_trained(representation, update, llm, data, of_representation, tmp_path):
    """New parts too, whether they are trained or not; the base knows no seed."""
    options = [*of_representation[representation], "--peft", "--update", *update.split(), "--seed", "3"]
    trainer = train_and_save(llm, data, tmp_path, *options)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    for part in ("encoder", "connector"):
        assert any(f".model.{part}." in name for name in trained) == (part in update and representation != "symbolic")
    assert not any("embed_tokens" in name or "lm_head" in name for name in trained)
    assert any("signal_embeddings" in name for name in trained) == (representation == "symbolic")
    process = fork_project(LOAD, str(tmp_path)).finish()
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) < 1e-5


@pytest.mark.parametrize("representation", ["signal", "symbolic", pytest.param("rgb", marks=pytest.mark.slow)])
def test_what_is_trained_in_full_is_in_float32(representation, half_llm, data, of_representation, tmp_path):
    options = [*of_representation[representation], "--dtype", "bfloat16"]
    lora = train_and_save(half_llm, data, tmp_path / "lora", *options, "--peft")
    dtypes = {name: parameter.dtype for name, parameter in lora.model.named_parameters()}
    trained = {name for name, parameter in lora.model.named_parameters() if parameter.requires_grad}
    assert {dtypes[name] for name in trained} == {torch.float32}
    frozen = {dtypes[name] for name in dtypes if "language_model" in name and name not in trained}
    assert frozen == {torch.bfloat16}
    assert len(losses_of(lora)) == 2

    full = train_and_save(half_llm, data, tmp_path / "full", *options, "--update", "connector", "llm")
    model = full.model
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or name.startswith("model.encoder.")
        of_norm = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.modules.batchnorm._NormBase)
        expected = torch.float32 if parameter.requires_grad or of_norm else torch.bfloat16
        assert parameter.dtype == expected, name
    for name, value in model.named_buffers():
        assert "running" not in name or value.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float32):  # to answer, all is in one
        loaded, _ = load_elm(str(tmp_path / "lora"), dtype=dtype)
        assert {tensor.dtype for tensor in loaded.parameters()} == {dtype}


def losses_of(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_line_that_tells_of_float32(half_llm, data, of_representation, tmp_path, caplog):
    argv = tiny_sft(half_llm, data, tmp_path, *of_representation["signal"], "--dtype", "bfloat16", encoder=None)
    model, _ = run.build_base(*sft.parse(argv))
    assert "--dtype bfloat16: all weights of the language model are trained, so they stay in float32" in caplog.text
    assert "--bf16 computes in 16 bits" in caplog.text
    assert {parameter.dtype for parameter in model.model.language_model.parameters()} == {torch.float32}
    caplog.clear()
    model, _ = run.build_base(*sft.parse([*argv, "--update", "connector"]))
    assert caplog.text == ""
    assert {parameter.dtype for parameter in model.model.language_model.parameters()} == {torch.bfloat16}


def test_new_parts_pass_through_float32_alone(half_llm, data, of_representation, tmp_path):
    """Of a saved ELM the trained weights too."""
    argv = tiny_sft(half_llm, data, tmp_path / "run", *of_representation["signal"], "--peft", encoder=None)
    models = []
    for dtype in ("bfloat16", "float32"):
        torch.manual_seed(0)
        models.append(run.build_base(*sft.parse([*argv, "--dtype", dtype]))[0])
    for name in ("encoder", "connector"):
        states = [model.model.get_submodule(name).state_dict() for model in models]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    processor = run.build_base(*sft.parse(argv))[1]
    models[1].save_pretrained(tmp_path / "elm")
    processor.save_pretrained(tmp_path / "elm")
    saved = tiny_sft(half_llm, data, tmp_path / "run", "--model_name_or_path", str(tmp_path / "elm"), encoder=None)
    model, _ = run.build_base(*sft.parse([*saved, "--peft", "--dtype", "bfloat16", "--update", "connector", "llm"]))
    weight = model.model.connector.projection.weight
    assert torch.equal(weight, models[1].model.connector.projection.weight)
    assert (model.dtype, model.model.encoder.dtype) == (torch.bfloat16, torch.bfloat16)


def test_an_adapter_is_merged_with_one_rounding(half_llm, data, of_representation, tmp_path, capsys):
    """Into a base in 16 bits: as the sum in float32, rounded. What it holds whole was counted once."""
    trainer = train_and_save(half_llm, data, tmp_path, *of_representation["signal"], "--peft", "--lr", "0.1")
    capsys.readouterr()
    run.tell_size(trainer, "5 chats")
    saved = load_file(tmp_path / "adapter_model.safetensors")  # with the statistics of MERL's batch norms
    adapter = sum(value.numel() for name, value in saved.items() if not re.search(r"running_|num_batches", name))
    lora = sum(value.numel() for name, value in trainer.model.named_parameters() if ".lora_" in name)
    whole = load_elm(str(tmp_path))[0].num_parameters()
    assert capsys.readouterr().out == f"5 chats; {adapter:,} of {whole + lora:,} parameters trained\n"
    exact, _ = load_elm(str(tmp_path), dtype=torch.float32)
    rounded, _ = load_elm(str(tmp_path), dtype=torch.bfloat16)
    for (name, one), other in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other), name


def save_llm(folder: Path, config: PreTrainedConfig) -> Path:
    """A random language model of another family with the tokenizer of `save_tiny_llm`."""
    save_tiny_llm(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_the_transposed_layers_of_gpt2(data, of_representation, tmp_path):
    """PEFT has to be told of them, else it warns."""
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2, n_positions=512)
    llm, options = save_llm(tmp_path / "llm", config), [*of_representation["signal"], "--peft", "--lr", "0.1"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fan_in_fan_out")
        train_and_save(llm, data, tmp_path / "run", *options)
        loaded, _ = load_elm(str(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    batch, expected = torch.load(tmp_path / "run" / "expected.pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def zamba2(**changes) -> PreTrainedConfig:
    """Layers with Mamba alone, and with attention that shares its weights with the others."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 2, "n_mamba_heads": 4, "mamba_d_state": 16}
    sizes |= {"chunk_size": 16, "use_shared_attention_adapter": True, "adapter_rank": 4, "intermediate_size": 64}
    return Zamba2Config(**sizes | changes)


def test_layers_that_share_a_weight(llm, data, tmp_path):
    """Merged, it would have the changes of both."""
    layers = ["linear_attention", "hybrid", "hybrid"]
    elm = ELMForConditionalGeneration(
        tiny_elm_config("patch", llm=zamba2(num_hidden_layers=3, layers_block_type=layers))
    )
    for options, fits in (([], False), (["q_proj"], False), (["in_proj", "linear", "out_proj"], True)):
        argv = tiny_sft(
            llm, data, tmp_path, "--peft", *(["--lora_target_modules", *options] if options else []), encoder=None
        )
        args, _, model_args = sft.parse([*argv, "--elm", "patch_elf"])
        if fits:
            adapted = get_peft_model(copy.deepcopy(elm), lora_config(args, model_args, elm)).eval()
            with torch.no_grad():
                for name, parameter in adapted.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.3)
                before = adapted(input_ids=torch.arange(9)[None]).logits
                torch.testing.assert_close(adapted.merge_and_unload()(input_ids=torch.arange(9)[None]).logits, before)
        else:
            with pytest.raises(ValueError, match=r"share their weight.* --lora_target_modules in_proj linear out_proj"):
                lora_config(args, model_args, elm)


def test_linear_layers_with_a_number_for_a_name():
    """Those of a list, whose other members are none."""
    config = zamba2(num_hidden_layers=2, layers_block_type=["linear_attention", "hybrid"])
    elm = ELMForConditionalGeneration(tiny_elm_config("patch", llm=config))
    found = {name for name, _ in elm.named_modules() if re.fullmatch(linear_layers(elm.model.language_model), name)}
    linear = {name for name, module in elm.named_modules() if isinstance(module, nn.Linear)}
    assert found == {name for name in linear if name.startswith("model.language_model.")}
    assert any(name.endswith(".0") for name in found)


class TestBase:
    """The base of an adapter, which its runs share."""

    @pytest.fixture(autouse=True)
    def bases(self, tmp_path, monkeypatch) -> Path:
        monkeypatch.setenv("ELM_BASE_MODELS", str(tmp_path / "bases"))
        return tmp_path / "bases"

    def adapter(self, llm, data, folder, *options) -> Path:
        sft.main(tiny_sft(llm, data, folder, "--max_steps", "1", "--peft", *options))
        return folder

    def test_is_written_once_in_the_dtype_of_the_llm(self, half_llm, data, bases, tmp_path):
        one = self.adapter(half_llm, data, tmp_path / "one")
        (base,) = bases.glob("*/")
        before = {path: path.stat().st_mtime_ns for path in base.iterdir()}
        copied = shutil.copytree(half_llm, tmp_path / "llm")  # the same weights elsewhere
        other = self.adapter(copied, data, tmp_path / "other", "--seed", "1", "--dtype", "bfloat16", "--lora_r", "4")
        assert {path: path.stat().st_mtime_ns for path in base.iterdir()} == before
        assert base_of_adapter(one) == base_of_adapter(other) == str(base)
        assert not (one / "base_model").exists()
        weights = load_file(base / "model.safetensors")
        assert {value.dtype for name, value in weights.items() if "language_model" in name} == {torch.bfloat16}
        logits = [load_elm(str(folder))[0](input_ids=torch.arange(9)[None]).logits for folder in (one, other)]
        assert not torch.equal(*logits)
        self.adapter(half_llm, data, tmp_path / "third", "--connector", "mlp")
        assert len(list(bases.glob("*/"))) == 2

    def test_is_made_again(self, llm, data, bases, tmp_path, monkeypatch, caplog):
        """Where the cache was cleaned, or the adapter came from another machine."""
        adapter = self.adapter(llm, data, tmp_path / "adapter")
        digest = digest_of_folder(adapter)
        expected = load_elm(str(adapter))[0].state_dict()
        shutil.rmtree(bases)
        with pytest.raises(ValueError, match=r"The adapter's base .* is not here"):
            digest_of_folder(adapter)
        monkeypatch.setenv("ELM_BASE_MODELS", str(tmp_path / "here"))
        found = load_elm(str(adapter))[0].state_dict()
        assert "it is made again of" in caplog.text
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert digest_of_folder(adapter) == digest
        assert Path(base_of_adapter(adapter)).parent == tmp_path / "here"

    def test_comes_back_for_peft_and_transformers(self, llm, data, bases, tmp_path):
        """They cannot make it again themselves; the card says what does."""
        adapter = self.adapter(llm, data, tmp_path / "adapter")
        place = base_of_adapter(adapter)
        auto = (AutoModelForCausalLM, AutoPeftModelForCausalLM)
        expected = [one.from_pretrained(adapter, trust_remote_code=True).state_dict() for one in auto]
        shutil.rmtree(bases)
        for one in auto:
            with pytest.raises(OSError, match=re.escape(place)):
                one.from_pretrained(adapter, trust_remote_code=True)
        assert (
            "makes the folder again from the recipe in `training_options.json`" in (adapter / "README.md").read_text()
        )
        load_elm(str(adapter))
        for one, state in zip(auto, expected, strict=True):
            found = one.from_pretrained(adapter, trust_remote_code=True).state_dict()
            assert all(torch.equal(value, state[name]) for name, value in found.items())

    def test_of_another_llm_is_not_taken(self, llm, data, bases, tmp_path):
        llm = shutil.copytree(llm, tmp_path / "llm")
        adapter = self.adapter(llm, data, tmp_path / "adapter")
        shutil.rmtree(bases)
        model = AutoModelForCausalLM.from_pretrained(llm)
        model.get_output_embeddings().weight.data += 1
        model.save_pretrained(llm)
        with pytest.raises(
            ValueError, match=r"--llm .* holds other weights than those that the adapter was trained with"
        ):
            load_elm(str(adapter))
        shutil.rmtree(llm)
        with pytest.raises(ValueError, match=r"--llm .*llm is no"):
            load_elm(str(adapter))
        (adapter / OPTIONS_FILE).unlink()
        with pytest.raises(ValueError, match=r"The adapter's base .* is no folder here"):
            load_elm(str(adapter))

    def test_an_older_adapter_has_it_beside(self, llm, data, bases, tmp_path):
        adapter = self.adapter(llm, data, tmp_path / "adapter")
        expected = load_elm(str(adapter))[0].state_dict()
        shutil.move(base_of_adapter(adapter), adapter / "base_model")
        (adapter / OPTIONS_FILE).unlink()
        found = load_elm(str(adapter))[0].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert not list(bases.glob("*/"))

    def test_frozen_new_parts_stay_frozen_after_a_resume(self, llm, data, tmp_path):
        options = ["--update", "llm", "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
        whole, parts = tmp_path / "whole", tmp_path / "parts"
        self.adapter(llm, data, whole, *options)
        shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
        self.adapter(llm, data, parts, *options, "--resume_from_checkpoint", "last")
        assert losses(parts) == losses(whole)
        first, last = (load_file(parts / name / "adapter_model.safetensors") for name in ("checkpoint-2", "."))
        moved = {name for name, value in last.items() if not torch.equal(value, first[name])}
        assert moved
        assert all("lora_" in name for name in moved)


class TestFolder:
    """What is in `--output_dir` already."""

    SAVING = ("--peft", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1")

    @pytest.fixture(scope="class")
    def finished(self, llm, data, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("finished") / "adapter"
        sft.main(tiny_sft(llm, data, folder, *self.SAVING))
        return folder

    def test_a_finished_adapter_is_not_replaced(self, finished, llm, data, monkeypatch):
        before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
        monkeypatch.setattr(run, "load_splits", None)  # found out before
        for options in ([], ["--seed", "1"], ["--lora_r", "4"], ["--resume_from_checkpoint", "false"]):
            with pytest.raises(
                ValueError, match="holds a finished adapter, which would be replaced; name another, remove"
            ):
                sft.main(tiny_sft(llm, data, finished, *self.SAVING, *options))
        assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before

    def test_its_run_may_go_on(self, finished, llm, data, tmp_path):
        folder = shutil.copytree(finished, tmp_path / "adapter")
        options = ["--max_steps", "3", "--resume_from_checkpoint", "last"]
        sft.main(tiny_sft(llm, data, folder, *self.SAVING, *options))
        assert losses(folder)[:2] == losses(finished)
        assert len(losses(folder)) == 3
        load_elm(str(folder))

    @pytest.mark.parametrize("name", ["adapter", "adapter/../adapter/."])
    def test_the_base_is_not_replaced(self, finished, llm, data, tmp_path, name):
        folder = shutil.copytree(finished, tmp_path / "adapter")
        options = ["--peft", "--max_steps", "1", "--model_name_or_path", str(tmp_path / name)]
        with pytest.raises(ValueError, match="is that of --model_name_or_path, the base of the new adapter"):
            sft.main(tiny_sft(llm, data, folder, *options))
        sft.main(tiny_sft(llm, data, tmp_path / "other", *options))
        load_elm(str(tmp_path / "other"))


class TestQuantized:
    """bitsandbytes computes on the CPU too."""

    @pytest.fixture(scope="class")
    def wide_llm(self, tmp_path_factory) -> Path:
        return save_tiny_llm(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("representation", ["signal", "symbolic"])
    def test_trains_saves_and_resumes(self, bits, representation, wide_llm, data, of_representation, tmp_path):
        bnb = pytest.importorskip("bitsandbytes", reason="the extra quantized is not installed")
        options = [*of_representation[representation], "--peft", f"--load_in_{bits}bit", "--max_steps", "8"]
        trainer = train_and_save(wide_llm, data, tmp_path, *options, "--save_strategy", "steps", "--save_steps", "4")
        model = trainer.model.base_model.model
        kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
        quantized = {name for name, module in model.named_modules() if isinstance(module, kind)}
        assert len(quantized) == 14  # 7 linear layers in each of 2 blocks
        assert all(".language_model.layers." in name for name in quantized)
        layer = model.get_submodule(min(quantized)).train()
        inputs = torch.ones(1, layer.in_features, requires_grad=True)
        layer(inputs).sum().backward()  # through the layer, as what stands before it is taught
        assert inputs.grad is not None
        assert inputs.grad.abs().sum() > 0
        values = losses_of(trainer)
        assert sum(values[-3:]) < sum(values[:3])
        trained = {name: value.dtype for name, value in trainer.model.named_parameters() if value.requires_grad}
        assert set(trained.values()) == {torch.float32}
        base = load_file(Path(base_of_adapter(tmp_path)) / "model.safetensors")
        assert {value.dtype for value in base.values() if value.is_floating_point()} == {torch.float32}
        assert base["model.language_model.layers.0.mlp.up_proj.weight"].shape == (128, 64)
        batch, expected = torch.load(tmp_path / "expected.pt")
        with torch.no_grad():  # the base is not rounded, so they differ a little
            error = (load_elm(str(tmp_path))[0](**batch).logits - expected).std() / expected.std()
        assert error < 0.3
        (tmp_path / "parts").mkdir()
        shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "parts" / "checkpoint-4")
        argv = tiny_sft(wide_llm, data, tmp_path / "parts", *options, "--save_strategy", "steps", "--save_steps", "4", encoder=None)  # fmt: skip
        sft.main([*argv, "--resume_from_checkpoint", "last"])
        assert losses(tmp_path / "parts") == pytest.approx(values, abs=1e-4)

    def test_of_a_saved_elm(self, wide_llm, data, of_representation, tmp_path):
        pytest.importorskip("bitsandbytes", reason="the extra quantized is not installed")
        sft.main(tiny_sft(wide_llm, data, tmp_path / "elm", "--max_steps", "1", encoder="mtae"))
        options = ["--model_name_or_path", str(tmp_path / "elm"), "--peft", "--load_in_8bit"]
        model = train_and_save(wide_llm, data, tmp_path / "lora", *options).model.base_model.model
        dtypes = {name.split(".")[1]: value.dtype for name, value in model.named_parameters() if "weight" in name}
        assert dtypes["encoder"] == dtypes["connector"] == torch.float32
        assert {value.dtype for value in model.model.language_model.parameters()} == {torch.int8, torch.float32}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--load_in_4bit"], "--load_in_4bit changes nothing without --use_peft"),
            (["--peft", "--bnb_4bit_quant_type", "fp4"], "changes nothing without --load_in_4bit"),
            (["--peft", "--load_in_4bit", "--load_in_8bit"], "8 bit and 4 bit precision at the same time"),
            (["--peft", "--load_in_4bit", "--dtype", "auto"], "--load_in_4bit with --dtype auto: say in which"),
        ],
    )
    def test_what_does_not_go_together(self, options, message, llm, data, tmp_path, monkeypatch):
        monkeypatch.setattr(run_options, "find_spec", lambda name: name)
        with pytest.raises(ValueError, match=message):
            sft.parse(tiny_sft(llm, data, tmp_path, *options))

    def test_without_the_package(self, llm, data, tmp_path, monkeypatch):
        monkeypatch.setattr(run_options, "find_spec", lambda name: None)
        with pytest.raises(
            ValueError, match="--load_in_8bit needs the package bitsandbytes, which is not installed: `uv sync"
        ):
            sft.parse(tiny_sft(llm, data, tmp_path, "--peft", "--load_in_8bit"))


def test_set_precision_keeps_ties_and_rotary_frequencies(half_llm):
    model = ELMForConditionalGeneration.from_encoder_llm_pretrained(
        half_llm, architecture="fuyu", connector="flat", ecg_token_id=300, llm_kwargs={"dtype": torch.float32}
    )
    for use_peft, expected in ((True, torch.bfloat16), (False, torch.float32)):
        set_precision(model, ["connector", "llm"], use_peft, torch.bfloat16)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert model.dtype == model.lm_head.weight.dtype == expected
        assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
