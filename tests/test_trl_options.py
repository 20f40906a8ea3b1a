"""One table over every option of `elm sft`: each changes something, or is refused by its name."""

import copy
import json
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
import yaml
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import ModelConfig, SFTConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import build, chat_templates, model_files, run, run_options, sft
from elm_ecg.training.arguments import AugmentationArguments, DataArguments, ELMArguments, ModelArguments
from elm_ecg.training.build import build_model, build_processor, new_elm
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.load import load_elm
from elm_ecg.training.lora import freeze, lora_config
from elm_ecg.training.resume import RunOptions
from elm_ecg.training.trl_options import NEEDED, REFUSED, REFUSED_VALUES, RENAMED
from helpers import ROOT, TINY_ENCODERS, save_tiny_data, tiny_ecg_byte, tiny_sft

# fields of SFTConfig that the trainer alone reads, and a value other than the default
TRAINER: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "num_train_epochs": 2.5,
    "max_steps": 7,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 2,
    "optim": "adamw_torch",
    "optim_args": "a=1",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "optim_target_modules": ["q_proj"],
    "gradient_accumulation_steps": 2,
    "average_tokens_across_devices": False,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "tf32": False,
    "activation_checkpointing": False,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 3,
    "auto_find_batch_size": True,
    "logging_strategy": "epoch",
    "logging_steps": 3,
    "logging_first_step": True,
    "log_on_each_node": False,
    "logging_nan_inf_filter": True,
    "include_num_input_tokens_seen": True,
    "disable_tqdm": True,
    "report_to": ["tensorboard"],
    "run_name": "run",
    "project": "ecgs",
    "trackio_space_id": "a/b",
    "trackio_bucket_id": "a/c",
    "trackio_static_space_id": "a/d",
    "eval_strategy": "epoch",
    "eval_steps": 4,
    "eval_delay": 1.0,
    "per_device_eval_batch_size": 5,
    "eval_on_start": True,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "save_only_model": True,
    "save_strategy": "epoch",
    "save_steps": 8,
    "save_on_each_node": True,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_mean_token_accuracy",
    "greater_is_better": True,
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "data_seed": 5,
    "use_cpu": True,
    "accelerator_config": {"even_batches": False},
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 3,
    "dataloader_multiprocessing_context": "fork",
    "dataloader_in_order": False,
    "train_sampling_strategy": "sequential",
    "ddp_find_unused_parameters": False,
    "ddp_bucket_cap_mb": 5,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "ddp_timeout": 100,
    "debug": "underflow_overflow",
    "loss_type": "dft",
    "router_aux_loss_coef": 0.0,
}
# of these the trainer is not made here: it would change the whole process, or there is no such device or package here
PARSED: dict[str, Any] = {
    "bf16": True,
    "fp16_full_eval": True,
    "torch_compile": True,
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "full_determinism": True,
    "skip_memory_metrics": False,
    "log_level": "error",
    "log_level_replica": "error",
    "enable_jit_checkpoint": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "gradient_checkpointing": False,
}
# what shows them is a test below, or where it says
SHOWN = {
    "output_dir": "test_sft.py::test_saved_folder_is_complete",
    "seed": "test_data_arguments",
    "fp16": "test_other_values_are_parsed",
    "ddp_backend": "test_the_libraries_read_what_is_honoured",
    "fsdp": "test_other_values_are_parsed",
    "fsdp_config": "test_other_values_are_parsed",
    "deepspeed": "test_deepspeed_is_asked_for",
    "resume_from_checkpoint": "test_sft.py::test_lora_resumes",
    "chat_template_path": "test_a_chat_template_of_ones_own",
    "dataset_num_proc": "test_number_of_processes",
    "eos_token": "test_eos_token",
    "max_length": "test_sft.py::test_too_long_a_chat",
    "pad_to_multiple_of": "test_pad_to_multiple_of",
    "padding_free": "test_packing.py::test_training_is_that_of_padded_chats",
    "packing": "test_packing.py::test_training_is_that_of_padded_chats",
    "packing_strategy": "test_refused_values_and_what_is_needed",
    "activation_offloading": "test_values_that_would_fail_later",
    # of ModelConfig
    "model_name_or_path": "test_sft.py::test_continues_from_a_trained_model",
    "model_revision": "test_revision",
    "trust_remote_code": "test_own_encoder.py::test_in_full_and_resumed",
    "dtype": "test_how_the_model_is_loaded",
    "attn_implementation": "test_how_the_model_is_loaded",
    "use_peft": "test_lora_options",
}
# option -> the field of LoraConfig that it sets, and a value other than its default
LORA: dict[str, tuple[str, Any]] = {
    "lora_r": ("r", 3),
    "lora_alpha": ("lora_alpha", 5),
    "lora_dropout": ("lora_dropout", 0.25),
    "lora_target_modules": ("target_modules", ["q_proj", "v_proj"]),
    "lora_target_parameters": ("target_parameters", ["mlp.gate_proj.weight"]),
    "lora_modules_to_save": ("modules_to_save", ["norm"]),
    "use_rslora": ("use_rslora", True),
    "use_dora": ("use_dora", True),
}
# option -> the field of BitsAndBytesConfig that it sets, and a value other than its default
QUANTIZATION: dict[str, tuple[str, Any]] = {
    "load_in_4bit": ("load_in_4bit", True),
    "load_in_8bit": ("load_in_8bit", True),
    "bnb_4bit_quant_type": ("bnb_4bit_quant_type", "fp4"),
    "use_bnb_nested_quant": ("bnb_4bit_use_double_quant", True),
    "bnb_4bit_quant_storage": ("bnb_4bit_quant_storage", "uint8"),
}
BASE = ["--data", "d", "--output_dir", "out"]
CPU = [*BASE, "--use_cpu"]


def names_of(*classes: Any) -> set[str]:
    return {option.name for part in classes for option in fields(part) if option.init}


def test_every_option_of_trl_is_classified():
    """One that a new version brings has to be looked at: does it do what it says, where chats have ECGs?"""
    honoured = [*TRAINER, *PARSED, *SHOWN, *LORA, *QUANTIZATION]
    assert len(honoured) == len(set(honoured))
    assert set(honoured) & REFUSED.keys() == set()
    assert set(honoured) | REFUSED.keys() == names_of(SFTConfig, ModelConfig)
    assert {*REFUSED_VALUES, *NEEDED, *NEEDED.values()} <= set(honoured) | names_of(ELMArguments)
    assert {name for name, _ in LORA.values()} <= names_of(LoraConfig)


def test_what_shows_an_option_is_there():
    tests = Path(__file__).parent
    for place in SHOWN.values():
        file, _, test = place.rpartition("::")
        assert f"def {test}(" in (tests / (file or Path(__file__).name)).read_text()


def other_than_default(name: str) -> str:
    """A value of a refused option, as words of the command line give it."""
    values = {"hub_strategy": "end", "local_rank": "3", "hub_token": "hf_secret", "remove_unused_columns": "true"}
    values |= {"completion_only_loss": "false", "assistant_only_loss": "false", "eval_packing": "true"}
    options = [option for part in (SFTConfig, ModelConfig) for option in fields(part) if option.name == name]
    choices = [choice for choice in options[0].metadata.get("choices", ()) if choice != options[0].default]
    return values.get(name) or (choices[0] if choices else {False: "true", True: "false"}.get(options[0].default, "x"))


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    value = other_than_default(name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({name: yaml.safe_load(value)}))
    for said in ([f"--{name}", value], ["--config", str(tmp_path / "config.yaml")]):
        with pytest.raises(ValueError, match=rf"^--{name} cannot be used: {re.escape(REFUSED[name])}\.$") as raised:
            sft.parse([*CPU, *said])
        assert "secret" not in str(raised.value)


def test_refused_values_and_what_is_needed():
    for name, reasons in REFUSED_VALUES.items():
        for value in reasons:
            with pytest.raises(ValueError, match=rf"^--{name} {value} cannot be used: "):
                sft.parse([*CPU, f"--{name}", value])
    values = (
        {name: value for name, (_, value) in (LORA | QUANTIZATION).items()} | TRAINER | PARSED | {"shuffle_buffer": 5}
    )
    for name, other in NEEDED.items():
        value = values[name]
        words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        with pytest.raises(ValueError, match=rf"^--{name} changes nothing without --{other}; add that, or leave"):
            sft.parse([*CPU, f"--{name}", *words])


def test_what_is_refused_may_be_said_as_it_is():
    """So that a file that lists all defaults works."""
    args = sft.parse([*CPU, "--push_to_hub", "false", "--use_liger_kernel", "false", "--packing_strategy", "bfd"])[1]
    assert not args.push_to_hub


def test_help_shows_what_is_honoured(capsys):
    with pytest.raises(SystemExit, match="0"):
        sft.parse(["--help-all"])
    heads = re.findall(r"^  (-.*)", capsys.readouterr().out, re.MULTILINE)
    shown = set(re.findall(r"--(\w+)", " ".join(heads)))
    assert names_of(SFTConfig, ModelConfig) - REFUSED.keys() <= shown
    assert shown & REFUSED.keys() == set()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "data", train=6, validation=2)


@pytest.fixture(scope="module")
def elm(llm):
    return new_elm(str(llm), encoder="merl", encoder_config=TINY_ENCODERS["merl"], sampling_rate=100, num_samples=500)


def write_yaml(folder: Path, values: dict[str, Any]) -> list[str]:
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(folder / "config.yaml")]


def plain(value: Any) -> Any:
    """As YAML has it: a trainer's enums, lists of one and dataclasses."""
    return value.to_dict() if hasattr(value, "to_dict") else getattr(value, "value", value)


def assert_values(args: SFTConfig, expected: dict[str, Any]) -> None:
    special = {"include_num_input_tokens_seen": "all", "debug": ["underflow_overflow"]}
    for name, value in expected.items():
        found = plain(getattr(args, name))
        if isinstance(value, dict) and name == "accelerator_config":
            assert found.items() >= value.items()
        else:
            assert ([plain(item) for item in found] if isinstance(found, list) else found) == special.get(name, value)


def test_the_trainer_holds_what_was_said(elm, data, tmp_path):
    pytest.importorskip("tensorboard")
    said = write_yaml(tmp_path, TRAINER)
    parts = sft.parse(["--data", str(data), "--output_dir", str(tmp_path / "out"), *said])
    defaults = sft.parse(BASE)[1]
    same = {name for name in TRAINER if plain(getattr(parts[1], name)) == plain(getattr(defaults, name))}
    assert same - {"tf32"} == set(), "a value that is the default shows nothing"
    splits = load_from_disk(str(data))
    # the model has no experts: a coefficient of them is for those that have
    trainer = sft.make_trainer(
        *parts, *elm, {"train": splits["train"], "validation": splits["validation"]}, RunOptions.of(*parts)
    )
    assert_values(trainer.args, TRAINER)


def test_other_values_are_parsed(tmp_path):
    assert_values(sft.parse([*CPU, *write_yaml(tmp_path, PARSED | {"eval_strategy": "epoch"})])[1], PARSED)
    assert sft.make_parser().parse_args_and_config([*CPU, "--fp16"])[1].mixed_precision == "fp16"  # of a GPU
    sharded = sft.parse([*CPU, *write_yaml(tmp_path, {"fsdp": True, "fsdp_config": {"reshard_after_forward": False}})])[
        1
    ]
    assert sharded.fsdp_plugin_args["reshard_after_forward"] is False


def test_deepspeed_is_asked_for(tmp_path):
    if find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed")
    with pytest.raises(ImportError, match=r"(?i)deepspeed"):
        sft.parse([*CPU, "--deepspeed", "zero.json"])


def test_the_libraries_read_what_is_honoured():
    """No field stands there that nobody reads: the trainer or a callback does, or the configuration itself after parsing."""
    folder, trl_folder = Path(transformers.__file__).parent, Path(trl.__file__).parent
    files = [*folder.glob("trainer*.py"), *folder.glob("integrations/*.py"), folder / "training_args.py"]
    files += [trl_folder / "trainer" / "sft_trainer.py", trl_folder / "trainer" / "sft_config.py"]
    text = "\n".join(file.read_text() for file in files)
    read = set(re.findall(r"\bself\.(\w+)", text)) | set(re.findall(r"\bargs\.(\w+)", text))
    # of the configuration the old names, which it turns into the new ones
    assert {*TRAINER, *PARSED, "ddp_backend", "fsdp", "deepspeed"} - read - RENAMED.keys() == set()


# what is read by this project


def lora(llm: Path, elm: Any, *options: str) -> LoraConfig:
    args, _, model_args = sft.parse([*tiny_sft(llm, Path("d"), Path("o")), "--peft", *options])
    return lora_config(args, model_args, elm[0])


@pytest.mark.parametrize("name", QUANTIZATION)
def test_quantization_options(llm, name, monkeypatch):
    """They reach the language model; with others `tests/test_lora.py` trains."""
    loaded: list[Any] = []
    monkeypatch.setattr(run_options, "find_spec", lambda name: name)  # of bitsandbytes
    monkeypatch.setattr(run, "build_model", lambda *args, **kwargs: loaded.append(kwargs["quantization_config"]))
    monkeypatch.setattr(run, "set_precision", lambda *args: None)
    monkeypatch.setattr(run, "find_base", lambda *args: pytest.fail("not asked for by a second process"))
    monkeypatch.setattr(SFTConfig, "process_index", property(lambda args: 1))
    field, value = QUANTIZATION[name]
    options = [
        "--peft",
        f"--{name}",
        str(value),
        *([] if "load_in" in name else ["--load_in_4bit"]),
        "--dtype",
        "bfloat16",
    ]
    run.build_base(*sft.parse([*tiny_sft(llm, Path("d"), Path("o")), *options]))
    (config,) = loaded
    assert str(getattr(config, field)).removeprefix("torch.") == str(value)
    assert config.load_in_8bit or config.bnb_4bit_compute_dtype == torch.bfloat16


def test_lora_options(llm, elm):
    before = lora(llm, elm)
    assert before.task_type == "CAUSAL_LM"
    for option, (name, value) in LORA.items():
        words = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        found = getattr(lora(llm, elm, f"--{option}", *words), name)
        assert found != getattr(before, name)
        if name == "target_modules":
            assert found == r".*language_model\..*\.(q_proj|v_proj)"
        elif name == "modules_to_save":
            assert found == ["model.encoder", "model.connector", "norm"]
        else:
            assert (set(found) if isinstance(found, set | list) else found) == (
                set(value) if isinstance(value, list) else value
            )
    every = lora(llm, elm, "--lora_target_modules", "all-linear").target_modules
    assert every == before.target_modules  # not of encoder and connector, which --update says
    assert lora(llm, elm, "--lora_target_modules", "q_proj").target_modules.endswith(r"\.(q_proj)")
    assert lora(llm, elm, "--lora_target_modules", r".*\.q_proj").target_modules == r".*\.q_proj"


@pytest.mark.parametrize(
    ("option", "names", "near"),
    [
        ("lora_target_modules", ["q_proj", "v_prj"], "v_prj: nothing in the model is called so. Did you mean v_proj?"),
        ("lora_target_modules", ["v_prj"], "v_prj: nothing in the model is called so. Did you mean v_proj?"),
        ("lora_target_parameters", ["x.weight"], "x.weight: nothing in the model is called so."),
        ("lora_modules_to_save", ["nrm"], "nrm: nothing in the model is called so. Did you mean norm?"),
    ],
)
def test_names_of_lora_that_nothing_has(llm, elm, option, names, near):
    with pytest.raises(ValueError, match=re.escape(f"--{option} {near}")):
        lora(llm, elm, f"--{option}", *names)


def test_revision(llm, elm, monkeypatch):
    """Of the language model, its tokenizer too; of a finished ELM in `load_elm`."""
    asked = []
    monkeypatch.setattr(build, "find_model_file", lambda name, *args, **kwargs: (name, "config.json"))
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        build.AutoTokenizer, "from_pretrained", lambda name, **kwargs: asked.append(kwargs["revision"]) or load(name)
    )
    monkeypatch.setattr(run, "build_model", lambda *args, revision, **kwargs: asked.append(revision))
    monkeypatch.setattr(run, "set_precision", lambda *args: None)
    parts = sft.parse([*tiny_sft(llm, Path("d"), Path("o")), "--model_revision", "v2"])
    run.build_base(*parts)
    monkeypatch.setattr(run, "load_elm", lambda name, revision, *args, **kwargs: asked.append(revision) or elm)
    run.build_base(*sft.parse([*CPU, "--model_name_or_path", "a/b", "--model_revision", "v2"]))
    assert asked == ["v2"] * 3


def test_how_the_model_is_loaded(llm):
    options = ["--elm", "fuyu", "--num_ecg_tokens", "5", "--dtype", "bfloat16", "--attn_implementation", "eager"]
    options += ["--update", "connector"]
    model, _ = run.build_base(*sft.parse(tiny_sft(llm, Path("d"), Path("o"), *options, encoder=None)))
    assert model.dtype == torch.bfloat16
    assert model.model.language_model.config._attn_implementation == "eager"


def test_eos_token(llm, data, tmp_path):
    options = ["--eos_token", "<|start_header_id|>", "--elm", "fuyu"]
    parts = sft.parse(tiny_sft(llm, data, tmp_path, *options, "--num_ecg_tokens", "5", encoder=None))
    model, processor = run.build_base(*parts)
    sft.make_trainer(
        *parts,
        model,
        processor,
        {"train": load_from_disk(str(data))["train"], "validation": None},
        RunOptions.of(*parts),
    )
    assert processor.tokenizer.eos_token == "<|start_header_id|>"
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id


TEMPLATE = (ROOT / "training" / "templates" / "llama3.jinja").read_text()
NEW_TEMPLATE = TEMPLATE.replace("{{- '<|begin_of_text|>' -}}", "{{- '<|begin_of_text|>NEW ' -}}")
UNMARKED = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|start_header_id|>' }}{% endfor %}"
)
UNMARKED += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"


@pytest.mark.parametrize("of_folder", [False, True])
def test_a_chat_template_of_ones_own(llm, data, elm, tmp_path, of_folder):
    """What is trained on is what is saved."""
    path = tmp_path / "mine.jinja"
    path.write_text(NEW_TEMPLATE)
    if of_folder:
        tokenizer = AutoTokenizer.from_pretrained(llm)
        tokenizer.chat_template, path = NEW_TEMPLATE, tmp_path / "folder"
        tokenizer.save_pretrained(path)
    options = ["--chat_template_path", str(path), "--max_length", "512", "--elm", "fuyu", "--num_ecg_tokens", "5"]
    parts = sft.parse(tiny_sft(llm, data, tmp_path / "out", *options, encoder=None))
    splits = {"train": load_from_disk(str(data))["train"], "validation": None}
    trainer = sft.make_trainer(*parts, *run.build_base(*parts), splits, RunOptions.of(*parts))
    batch = next(iter(trainer.get_train_dataloader()))
    assert "<|begin_of_text|>NEW " in trainer.processing_class.tokenizer.decode(batch["input_ids"][0])
    trainer.processing_class.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == NEW_TEMPLATE
    other = copy.copy(elm[1])  # of a saved ELM
    chat_templates.set_chat_template(other, str(path))
    assert other.chat_template == NEW_TEMPLATE != elm[1].chat_template


def test_an_adapter_keeps_its_chat_template(llm, data, tmp_path, capsys):
    """One without marks, too. What ends its answers ends generation once the adapter is loaded, though its base does not know it."""
    base, out, path = tmp_path / "base", tmp_path / "out", tmp_path / "mine.jinja"
    path.write_text(UNMARKED)
    options = ["--elm", "fuyu", "--num_ecg_tokens", "5", "--max_steps", "1"]
    sft.main(tiny_sft(llm, data, base, *options, encoder=None))
    assert (
        "Chat template: llama3.jinja of elm-ecg, for the control tokens <|end_header_id|> and <|eot_id|>, as llm has no chat template"
        in (capsys.readouterr().out.replace(llm.name, "llm"))
    )
    options = ["--model_name_or_path", str(base), "--use_peft", "--chat_template_path", str(path), "--max_steps", "1"]
    options += ["--eos_token", "<|end_header_id|>", "--lora_target_modules", "q_proj"]
    sft.main(tiny_sft(llm, data, out, *options, encoder=None))
    origin = "that of mine.jinja, named with --chat_template_path"
    assert f"Chat template: {origin}\n" in capsys.readouterr().out
    assert f"| chat template | {origin} |" in (out / "README.md").read_text()
    model, processor = load_elm(str(out))
    assert processor.chat_template == UNMARKED
    assert processor.chat_template_origin == origin
    ends = processor.tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"])
    assert model.generation_config.eos_token_id == ends
    assert load_elm(str(base))[0].generation_config.eos_token_id == ends[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            TEMPLATE.replace("<signal>", "").replace("render(message['content'])", "''"),
            "does not write the question and <signal>",
        ),
        (TEMPLATE + "{% endif %}", "cannot be rendered: "),
        ("{{ messages[0]['content'] + '' }}{% generation %}{% endgeneration %}", "does not end an answer with a token"),
        (
            UNMARKED.replace("<|start_header_id|>", "<|im_end|>"),
            "does not end an answer with a token of the language model",
        ),
        (
            TEMPLATE.replace("+ '<|eot_id|>' -}}\n        {%- endgeneration", "-}}\n        {%- endgeneration"),
            "does not end an answer",
        ),
        ("", "has no chat template"),
        (None, "is no folder here"),
    ],
)
def test_a_chat_template_that_cannot_be_used(elm, tmp_path, template, message, monkeypatch):
    monkeypatch.setattr(model_files, "file_exists", lambda *args, **kwargs: False)
    if template is not None:
        (tmp_path / "a.jinja").write_text(template)
    path = tmp_path / "a.jinja" if template is not None else "nobody/nothing"
    with pytest.raises(ValueError, match=f"^--chat_template_path .*{message}"):
        chat_templates.set_chat_template(elm[1], str(path))


def test_pad_to_multiple_of(llm, elm, data):
    rows = [load_from_disk(str(data))["train"][index] for index in range(3)]
    args = sft.parse([*CPU, "--pad_to_multiple_of", "64"])[1]
    collated = [ELMCollator(elm[1], pad_to_multiple_of=number)(rows) for number in (None, args.pad_to_multiple_of)]
    length = collated[0]["input_ids"].shape[1]
    assert length % 64
    for name in ("input_ids", "attention_mask", "labels"):
        assert collated[1][name].shape[1] == length + -length % 64
        assert torch.equal(collated[1][name][:, :length], collated[0][name])
    assert set(collated[1]["labels"][:, length:].flatten().tolist()) == {-100}


def test_number_of_processes(data, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "load_data", lambda args, split, seed, num_proc: asked.append(num_proc) or "rows")
    args, training_args, _ = sft.parse([*CPU, "--dataset_num_proc", "3"])
    assert run.load_splits(args, training_args)["train"] == "rows"
    assert asked == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report_to", "nobody"], "--report_to nobody: the package nobody is not installed"),
        (["--seed", "-1"], "--seed is -1; expected a number from 0 to 4294967295"),
        (["--data_seed", "-1"], "--data_seed is -1"),
        (["--fp16"], "--fp16 needs a GPU, and there is none; --bf16 computes in 16 bits"),
        (["--activation_offloading"], "--activation_offloading takes memory from a GPU, and there is none"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps is 0; expected a number at least 1"),
        (["--batch_size", "-2"], "--per_device_train_batch_size is -2; expected a number at least 1"),
        (["--epochs", "0"], "--num_train_epochs is 0.0; expected a number above 0"),
        (["--max_steps", "0"], "--max_steps is 0; expected a number at least 1, or -1 for none"),
        (["--pad_to_multiple_of", "0"], "--pad_to_multiple_of is 0; expected a number at least 1"),
        (["--lr", "nan"], "--learning_rate is nan; expected a number at least 0"),
        (["--weight_decay", "-1"], "--weight_decay is -1.0; expected a number at least 0"),
        (["--max_grad_norm", "nan"], "--max_grad_norm is nan; expected a number at least 0"),
        (["--peft", "--lora_alpha", "0"], "--lora_alpha is 0; expected a number above 0"),
        (["--peft", "--lora_dropout", "1"], "--lora_dropout is 1.0; expected a number at least 0 and below 1"),
    ],
)
def test_values_that_would_fail_later(options, message):
    with pytest.raises(ValueError, match=message):
        sft.parse([*CPU, *options])


# ours

MODEL: dict[str, list[str]] = {
    "llm": [],  # each run of tests/test_sft.py names one
    "elm": ["fuyu"],
    "architecture": ["text"],
    "connector": ["mlp"],
    "connector_config": ['{"hidden_size": 64}', "--connector", "perceiver"],
    "thinking_tokens": ["true"],
    "representation": ["symbolic"],
    "encoder": ["mtae"],
    "encoder_config": ['{"depths": [1, 1, 1, 1]}'],
    "encoder_name_or_path": ["elsewhere"],
    "num_ecg_tokens": ["3"],
    "sampling_rate": ["125"],
    "num_samples": ["600"],
    "truncation": ["end"],
    "lead_names": ["I", "V2"],
    "missing_leads": ["zeros"],
    "bandpass": ["0.5", "40"],
    "notch": ["50"],
    "normalization": ["zscore"],
}
OF_PICTURES: dict[str, list[str]] = {
    "image_features": ["embedding"],
    "paper": ['{"gain": 20}'],
    "image_processor": ['{"do_normalize": false}'],
}
OF_SYMBOLS = {"ecg_tokenizer": ["FOLDER"], "ecg_overflow": ["drop_leads"]}


class Asked(Exception):
    """What `build_model` asks for."""


def parts_of(monkeypatch, llm: Path, *options: str) -> str:
    """All that a new ELM would be made of."""

    def ask(llm: str, encoder: str | None, llm_kwargs: dict[str, Any], **kwargs: Any) -> None:
        kwargs |= {"encoder": encoder}
        kwargs["encoder_config"] = kwargs["encoder_config"].to_dict() if "encoder_config" in kwargs else None
        raise Asked(json.dumps(kwargs, default=str, sort_keys=True))

    monkeypatch.setattr(ELMForConditionalGeneration, "from_encoder_llm_pretrained", ask)
    monkeypatch.setattr(build, "find_model_file", lambda name, *args, **kwargs: (name, "config.json"))
    for name in ("_compare_records", "_check_kind"):  # no Hub is asked for encoders that are none
        monkeypatch.setattr(build, name, lambda *args: None)
    args = sft.parse([*CPU, "--llm", str(llm), *options])[0]
    processor = build_processor(args)
    with pytest.raises(Asked) as asked:
        build_model(args, processor)
    return (
        json.dumps(processor.to_dict(), default=str, sort_keys=True) + str(asked.value) + str(len(processor.tokenizer))
    )


def test_model_arguments(llm, monkeypatch, tmp_path):
    assert MODEL.keys() | OF_PICTURES.keys() | OF_SYMBOLS.keys() == names_of(ModelArguments)
    tiny_ecg_byte().save_pretrained(tmp_path)
    groups = (
        (MODEL, ["--encoder", "merl"]),
        (OF_PICTURES, ["--representation", "rgb", "--encoder", "vit"]),
        (OF_SYMBOLS, ["--representation", "symbolic"]),
    )
    for table, common in groups:
        before = parts_of(monkeypatch, llm, *common)
        for name, words in table.items():
            words = [str(tmp_path) if word == "FOLDER" else word for word in words]
            assert not words or parts_of(monkeypatch, llm, *common, f"--{name}", *words) != before, name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ecg_overflow", "drop_leads"], "--ecg_overflow with --representation signal; it is for symbolic ECGs"),
        (["--image_features", "embedding"], "--image_features with --representation signal"),
    ],
)
def test_options_of_another_representation(options, message):
    with pytest.raises(ValueError, match=message):
        sft.parse([*CPU, *options])


def test_an_encoder_that_nothing_reads_is_told(caplog):
    sft.parse([*CPU, "--elm", "fuyu", "--encoder", "merl"])
    assert "--encoder changes nothing: a fuyu ELM has no encoder" in caplog.text


def test_data_arguments(data, tmp_path):
    """Each of them changes the rows, or what the collator makes of them."""
    folds = tmp_path / "folds"
    splits = load_from_disk(str(data))
    type(splits)({"fold1_train": splits["train"], "fold2_train": splits["validation"]}).save_to_disk(folds)
    paths = splits["train"].select(range(2)).remove_columns("ecg").add_column("ecg", ["a.csv", "b.csv"])
    type(splits)(train=paths).save_to_disk(tmp_path / "paths")

    def rows(*options: str, of: Path = data) -> str:
        args, training_args, _ = sft.parse(["--data", str(of), "--output_dir", "out", "--use_cpu", *options])
        loaded = run.load_splits(args, training_args)["train"]
        return str([(row["record_id"], row["ecg"] if isinstance(row["ecg"], str) else "") for row in loaded])

    changes = {
        "data": (rows(of=tmp_path / "paths"), rows()),
        "data_weights": (
            rows("--data", str(data), str(data), "--data_weights", "9", "1"),
            rows("--data", str(data), str(data)),
        ),
        "fold": (rows("--fold", "1", of=folds), rows("--fold", "2", of=folds)),
        "ecg_root": (rows("--ecg_root", "/ecgs", of=tmp_path / "paths"), rows(of=tmp_path / "paths")),
        "data_subset": (rows("--data_subset", "0.5"), rows()),
    }
    by_collator = {"perturb": "test_sft.py", "system_prompt": "test_collator.py"}
    assert changes.keys() | by_collator.keys() == names_of(DataArguments)
    for name, (one, other) in changes.items():
        assert one != other, name
    assert rows("--data_subset", "0.5", "--seed", "1") != rows("--data_subset", "0.5", "--seed", "3")


def test_augmentation_arguments(elm, data):
    rows = list(load_from_disk(str(data))["train"])  # several: half of them stay without noise
    values = {"augment_ecg": True, "time_shift": 2.0, "gain_jitter": 0.5, "lead_dropout": 0.5}
    assert values.keys() | {"augment_rgb"} == names_of(AugmentationArguments)  # that one: tests/test_collator.py
    before = ELMCollator(elm[1])(rows)["ecg_values"]
    for name, value in values.items():
        assert not torch.equal(ELMCollator(elm[1], seed=1, **{name: value})(rows)["ecg_values"], before), name


def test_options_of_training(elm, data):
    # those of features are in test_features.py, those of the phases in test_phases.py, ema_decay in test_checkpoints.py
    shown = {"update", "streaming", "shuffle_buffer", "wandb", "distributed", "cache_features", "ema_decay"}
    shown |= {"train_phase", "report_column", "explicit_thinking"}
    assert shown == names_of(ELMArguments) - names_of(DataArguments, ModelArguments, AugmentationArguments)
    freeze(elm[0], ["connector"])
    assert {name for name, parameter in elm[0].named_parameters() if parameter.requires_grad} == {
        "model.connector.projection.weight",
        "model.connector.projection.bias",
    }
    freeze(elm[0], ["encoder", "connector", "llm"])
    options = ["--data", str(data), "--output_dir", "o", "--use_cpu", "--streaming", "--max_steps", "1"]
    for number in ("2", "7"):
        args, training_args, _ = sft.parse([*options, "--shuffle_buffer", number])
        assert run.load_splits(args, training_args)["train"].shuffle_buffer == int(number)
    args, training_args, _ = sft.parse([*options, "--data_seed", "5"])
    assert run.load_splits(args, training_args)["train"].seed == 5
    # wandb and distributed: tests/test_arguments.py
