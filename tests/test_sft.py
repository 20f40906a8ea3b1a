import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import streamed_run
import torch
from datasets import Dataset, load_from_disk
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.utils.logging import warning_once

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import sft
from elm_ecg.training.build import build_model
from elm_ecg.training.data.parts import part_name
from elm_ecg.training.data.schema import RECORDS, stored_name
from elm_ecg.training.digest import base_of_adapter
from elm_ecg.training.load import load_elm
from forks import Fork
from helpers import (
    ROOT,
    TINY_ENCODERS,
    TINY_VISION,
    fork_project,
    fork_two,
    free_port,
    losses,
    run_isolated,
    save_tiny_data,
    save_tiny_llm,
    tiny_ecg_byte,
    tiny_sft,
)


@pytest.fixture(scope="module")
def tied_llm(tmp_path_factory) -> Path:
    return save_tiny_llm(tmp_path_factory.mktemp("llm") / "tied", "qwen2_5")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "all", train=24, validation=6, test=4)


@pytest.fixture(scope="module")
def mixed_data(tmp_path_factory) -> Path:
    """Every third row has no ECG, so some batches have none."""
    return save_tiny_data(tmp_path_factory.mktemp("data") / "mixed", without_ecg=3, train=24)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, llm, data) -> Path:
    """A llava ELM with a MERL encoder after twelve steps, evaluated twice on the way."""
    folder = tmp_path_factory.mktemp("trained") / "model"
    sft.main(tiny_sft(llm, data, folder, "--max_steps", "12", "--eval_strategy", "steps", "--eval_steps", "6"))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def prompt(processor, folder: Path, text: str = "Is this atrial fibrillation?") -> dict[str, torch.Tensor]:
    """One question about a record of noise, without a batch's padding."""
    array = np.random.default_rng(0).normal(size=(12, 500)).astype("float32")
    content = [{"type": "ecg", "ecg": array, "sampling_rate": 100, "unit": "mV"}, {"type": "text", "text": text}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def test_loss_falls(trained):
    values = losses(trained)
    assert len(values) == 12
    assert np.mean(values[-3:]) < np.mean(values[:3]) - 0.3


def test_plain_trainer_of_trl(llm, data, tmp_path):
    """Python's way, without `elm sft`: the README's twenty lines."""
    from trl import SFTConfig, SFTTrainer

    from elm_ecg import ELMCollator, load_elm, new_elm

    model, processor = new_elm(
        str(llm),
        encoder="merl",
        encoder_config=TINY_ENCODERS["merl"],
        num_ecg_tokens=4,
        sampling_rate=100,
        num_samples=500,
    )
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            max_length=None,
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=load_from_disk(str(data))["train"],
        data_collator=ELMCollator(processor),
        processing_class=processor,
    )
    trainer.train()
    trainer.save_model()
    values = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert np.mean(values[-3:]) < np.mean(values[:3]) - 0.3
    assert_same(load_elm(str(tmp_path))[0].state_dict(), trainer.model.state_dict())


def test_nothing_is_said_that_the_user_can_do_nothing_about(tied_llm, data, tmp_path, caplog):
    """With the defaults of TRL, that are gradient checkpointing and pinned memory, and tied embeddings."""
    options = ["--use_cpu", "false", "--gradient_checkpointing", "true", "--max_steps", "2", "--load_best_model_at_end"]
    options += ["--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1"]
    log = logging.getLogger("transformers")  # it does not propagate
    warning_once.cache_clear()
    log.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FutureWarning)
            warnings.simplefilter("always", UserWarning)
            sft.main(tiny_sft(tied_llm, data, tmp_path, *options))
    finally:
        log.removeHandler(caplog.handler)
    logged = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert logged + [str(warning.message) for warning in caught] == []


def test_evaluates_while_training(trained):
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    eval_losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert len(eval_losses) == 2
    assert eval_losses[1] < eval_losses[0]


def test_saved_folder_is_complete(trained):
    names = {path.name for path in trained.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "configuration_elm.py",
        "modeling_elm.py",
        "configuration_ecg_encoders.py",
        "modeling_ecg_base.py",
        "modeling_ecg_encoders.py",
        "modeling_ecg_resnets.py",
        "modeling_ecg_transformers.py",
        "processing_elm.py",
        "feature_extraction_elm.py",
        "ecg_utils.py",
        "plain_pickle.py",
        *(path.name for path in ROOT.glob("ecg_formats*.py")),
        "README.md",
    }
    config = json.loads((trained / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_elm.ELMForConditionalGeneration"
    assert not (trained / "base_model").exists()


@pytest.mark.slow
def test_loads_and_answers_in_a_fresh_process(trained, adapters, tmp_path):
    adapter = adapters["untied"]
    printed = run_isolated(
        f"""
import numpy as np
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoProcessor
processor = AutoProcessor.from_pretrained({str(trained)!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(trained)!r}, trust_remote_code=True)
array = np.random.default_rng(0).normal(size=(12, 500)).astype("float32")
content = [{{"type": "ecg", "ecg": array, "sampling_rate": 100, "unit": "mV"}}, {{"type": "text", "text": "Is this atrial fibrillation?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(output[0, inputs["input_ids"].shape[1]:].tolist())

model = AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r}, trust_remote_code=True).eval()
print(model(input_ids=torch.arange(20)[None]).logits[0, -1, :5].tolist())
""",
        tmp_path,
    )
    model, processor = load_elm(str(trained))
    inputs = prompt(processor, trained)
    here = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer, last_logits = printed.strip().splitlines()[-2:]
    assert json.loads(answer) == here.tolist()
    peft_model = PeftModel.from_pretrained(base_of(adapter), adapter).eval()
    here = peft_model(input_ids=torch.arange(20)[None]).logits[0, -1, :5]
    assert json.loads(last_logits) == pytest.approx(here.tolist(), abs=1e-6)


@pytest.mark.parametrize("update", [["encoder"], ["connector"], ["llm"], ["connector", "llm"]])
def test_only_updated_parts_change(trained, data, tmp_path, update):
    before = weights(trained)
    options = ["--model_name_or_path", str(trained), "--update", *update, "--max_steps", "2"]
    sft.main(tiny_sft(trained, data, tmp_path / "model", *options))
    after = weights(tmp_path / "model")
    assert before.keys() == after.keys()

    def part(name: str) -> str:
        return next((part for part in ("encoder", "connector") if name.startswith(f"model.{part}.")), "llm")

    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {part(name) for name in changed} == set(update)


def test_continues_from_a_trained_model(trained, data, tmp_path):
    sft.main(tiny_sft(trained, data, tmp_path / "model", "--elm_ckpt", str(trained), "--max_steps", "2"))
    assert losses(tmp_path / "model")[0] < losses(trained)[0] - 0.3
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"| built on | `{trained.name}` |" in card  # not the default of --llm


@pytest.mark.parametrize("elm", ["base_elf", "patch_elf", "conv_elf", "text"])
def test_trains_without_encoder(llm, data, tmp_path, elm):
    sft.main(tiny_sft(llm, data, tmp_path, "--elm", elm, "--max_steps", "6", encoder=None))
    values = losses(tmp_path)
    assert values[-1] < values[0] - 0.1
    assert (json.loads((tmp_path / "config.json").read_text())["encoder_config"]) is None


@pytest.mark.parametrize("encoder", ["mlae", "mtae", "st_mem"])
def test_trains_every_encoder(llm, mixed_data, tmp_path, encoder):
    options = ["--update", "encoder", "connector", "llm", "--max_steps", "6", "--connector", "mlp"]
    sft.main(tiny_sft(llm, mixed_data, tmp_path, *options, encoder=encoder))
    values = losses(tmp_path)
    assert values[-1] < values[0] - 0.1


def test_gradient_checkpointing_changes_nothing(llm, data, tmp_path):
    for name, checkpointing in (("with", "true"), ("without", "false")):
        options = ["--max_steps", "3", "--gradient_checkpointing", checkpointing]
        sft.main(tiny_sft(llm, data, tmp_path / name, *options, encoder="st_mem"))
    assert losses(tmp_path / "with") == pytest.approx(losses(tmp_path / "without"), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "attribute", "message"),
    [
        (["--optim", "muon"], "is_fsdp_enabled", "--optim muon with FSDP or DeepSpeed"),
        (["--optim", "muon"], "is_deepspeed_enabled", "--optim muon with FSDP or DeepSpeed"),
        (
            ["--cache_features", "disk", "--update", "llm"],
            "is_fsdp_enabled",
            "--cache_features disk with FSDP or ZeRO-3",
        ),
    ],
)
def test_what_needs_whole_weights_in_each_process(llm, data, tmp_path, monkeypatch, options, attribute, message):
    def pretend(trainer: sft.ELMTrainer, **kwargs: Any) -> None:
        init(trainer, **kwargs)
        setattr(trainer, attribute, True)

    init = sft.ELMTrainer.__init__
    monkeypatch.setattr(sft.ELMTrainer, "__init__", pretend)
    with pytest.raises(ValueError, match=message):
        sft.main(tiny_sft(llm, data, tmp_path / "run", *options))


def test_the_eager_backend_is_refused_where_it_fails(llm, data, tmp_path):
    """At the counter of batch norm, which a checkpointed block sets twice."""
    options = ["--torch_compile", "--torch_compile_backend", "eager", "--gradient_checkpointing", "true"]
    with pytest.raises(ValueError, match="eager with --gradient_checkpointing and a trained encoder with batch norm"):
        sft.main(tiny_sft(llm, data, tmp_path / "run", *options))


@pytest.mark.slow
def test_torch_compile(data, tmp_path):
    """A step is one graph: at each break a GPU waits for Python. test_torch_compile.py has the other architectures."""
    llm = save_tiny_llm(tmp_path / "llm", num_hidden_layers=1)  # it takes seconds to trace another
    torch._dynamo.reset()
    counters.clear()
    options = ["--elm", "patch_elf", "--max_steps", "1"]
    compile_options = ["--torch_compile", "--torch_compile_backend", "aot_eager"]
    sft.main(tiny_sft(llm, data, tmp_path / "compiled", *options, *compile_options, encoder=None))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    sft.main(tiny_sft(llm, data, tmp_path / "eager", *options, encoder=None))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), abs=1e-4)
    names = weights(tmp_path / "compiled").keys()
    assert names == weights(tmp_path / "eager").keys()  # without _orig_mod


def test_tensorboard(llm, data, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    sft.main(tiny_sft(llm, data, tmp_path / "model", "--max_steps", "1", "--report_to", "tensorboard", encoder="mtae"))
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))


def test_perturb(llm, data, tmp_path):
    runs = {"ecg": [], **{name: ["--perturb", name] for name in ("noise", "zeros", "only_text")}}
    for name, options in runs.items():
        sft.main(tiny_sft(llm, data, tmp_path / name, *options, "--max_steps", "1", encoder="mtae"))
    assert len({losses(tmp_path / name)[0] for name in runs}) == 4


def test_augments_anew_in_each_epoch_and_never_in_evaluation(llm, data, tmp_path, monkeypatch):
    seen = []
    collate = sft.ELMCollator.__call__

    def watch(collator, rows):
        seen.append((len(rows), collator.augment_ecg, collator.augment_rgb, int(collator.epoch)))
        return collate(collator, rows)

    monkeypatch.setattr(sft.ELMCollator, "__call__", watch)
    options = ["--batch_size", "24", "--epochs", "2", "--eval_strategy", "epoch", "--augment_ecg", "--augment_rgb"]
    sft.main(tiny_sft(llm, data, tmp_path, *options, *of_pictures("vit"), encoder=None))
    assert [call for call in seen if call[0] == 24] == [(24, True, True, 0), (24, True, True, 1)]
    evaluated = [call for call in seen if call[0] < 24]  # there are 6 rows
    assert len(evaluated) >= 2
    assert not any(augment_ecg or augment_rgb for _, augment_ecg, augment_rgb, _ in evaluated)


def test_connector_alone_with_batches_without_ecg(llm, mixed_data, tmp_path):
    options = ["--update", "connector", "--batch_size", "1", "--max_steps", "6"]
    sft.main(tiny_sft(llm, mixed_data, tmp_path, *options, encoder="mtae"))
    assert len(losses(tmp_path)) == 6


def test_missing_train_split(llm, tmp_path):
    data = save_tiny_data(tmp_path / "data", test=2)
    with pytest.raises(ValueError, match="has no split 'train'"):
        sft.main(tiny_sft(llm, data, tmp_path / "model"))


@pytest.mark.parametrize("option", ["llm", "data"])
def test_what_is_read_is_not_written_over(llm, data, option):
    folder = {"llm": llm, "data": data}[option]
    with pytest.raises(ValueError, match=f"is the folder of --{option}, which would be written over"):
        sft.main(tiny_sft(llm, data, folder))


def test_too_long_a_chat(llm, data, tmp_path):
    with pytest.raises(
        ValueError, match=r"\(max_length=10\)\. Nothing is cut in silence: shorten the text, show fewer"
    ):
        sft.main(tiny_sft(llm, data, tmp_path, "--llm_input_len", "10", "--max_steps", "1"))


def test_resume_without_checkpoint(llm, data, tmp_path):
    with pytest.raises(ValueError, match="no checkpoint in"):
        sft.main(tiny_sft(llm, data, tmp_path, "--resume_from_checkpoint", "last"))


# symbolic ECGs


SYMBOLIC = ["--lead_names", "I", "V1"]  # of two leads, to be short


@pytest.fixture(scope="module")
def ecg_byte(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ecg_byte")
    tiny_ecg_byte(across_leads=False, millivolt_range=(-2.0, 2.0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def symbolic_elms(tmp_path_factory, llm, tied_llm, ecg_byte, mixed_data) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("symbolic")
    options = ["--data_representation", "symbolic", "--ecg_tokenizer", str(ecg_byte), *SYMBOLIC, "--max_steps", "6"]
    for name, source in (("untied", llm), ("tied", tied_llm)):
        sft.main(tiny_sft(source, mixed_data, folder / name, *options, encoder=None))
        sft.main(tiny_sft(source, mixed_data, folder / f"{name}_lora", *options, "--peft", encoder=None))
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["untied", "tied", "untied_lora", "tied_lora"])
def symbolic(request, symbolic_elms) -> Path:
    return symbolic_elms[request.param]


def test_symbolic_trains(symbolic):
    values = losses(symbolic)
    assert values[-1] < values[0] - 0.1
    assert "ECG-Byte tokens in the text, 86 of them" in (symbolic / "README.md").read_text()


def test_a_saved_model_loads_without_warnings(symbolic):
    """Adapters too, in whose loading PEFT uses what transformers is about to rename."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_elm(str(symbolic))
    assert [str(warning.message) for warning in caught] == []


def test_symbolic_table_is_trained(symbolic, llm, tied_llm, ecg_byte, mixed_data, tmp_path):
    """The rows of ECG tokens that the data hold; with LoRA the vocabulary stays as it is, in full it is trained too."""
    model, processor = load_elm(str(symbolic))
    source = tied_llm if symbolic.name.startswith("tied") else llm
    options = ["--representation", "symbolic", "--ecg_tokenizer", str(ecg_byte), *SYMBOLIC]
    args = sft.parse(tiny_sft(source, mixed_data, tmp_path, *options, encoder=None))[0]
    torch.manual_seed(42)  # as `elm sft` does by default
    start = build_model(args, processor)
    moved = (start.model.signal_embeddings.weight != model.model.signal_embeddings.weight).any(-1)
    used = set()
    for row in load_from_disk(mixed_data)["train"]:
        if row["ecg"] is not None:
            ecg = {**row["ecg"], "array": np.array(row["ecg"]["array"])}
            used |= set(processor(text="<signal>", ecgs=ecg)["input_ids"][0])
    used &= set(model.config.signal_token_ids)
    assert len(used) > 40
    # six batches need not hold every token
    assert moved[[token_id - model.config.signal_token_ids.start for token_id in sorted(used)]].float().mean() > 0.95
    words, trained = start.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert torch.equal(words, trained) == symbolic.name.endswith("lora")
    assert (
        words.shape == trained.shape == AutoModelForCausalLM.from_pretrained(source).get_input_embeddings().weight.shape
    )


def chats_about_ecgs(data: Path) -> list[list[dict]]:
    """Questions about three ECGs, and one about none."""
    rows = [row for row in load_from_disk(data)["train"] if row["ecg"] is not None][:3]
    questions = [
        [{"type": "ecg", "ecg": row["ecg"]}, {"type": "text", "text": "Is this sinus rhythm?"}] for row in rows
    ]
    questions.append([{"type": "text", "text": "Hello"}])
    return [[{"role": "user", "content": content}] for content in questions]


def symbolic_answers(folder: Path, chats: list) -> list[list[int]]:
    model, processor = load_elm(str(folder))
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.eval().generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_symbolic_answers_alike_in_a_batch(symbolic, mixed_data):
    chats = chats_about_ecgs(mixed_data)
    assert symbolic_answers(symbolic, chats) == [symbolic_answers(symbolic, [chat])[0] for chat in chats]


@pytest.mark.slow
def test_symbolic_in_a_fresh_process_without_the_project(symbolic_elms, mixed_data, tmp_path):
    """A whole model, and an adapter that is not merged."""
    chats = chats_about_ecgs(mixed_data)
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    printed = run_isolated(
        f"""
import json
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoProcessor
for auto, folder in ((AutoModelForCausalLM, {str(symbolic_elms["untied"])!r}), (AutoPeftModelForCausalLM, {str(symbolic_elms["tied_lora"])!r})):
    model = auto.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor.apply_chat_template(json.load(open("chats.json")), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    print(output[:, inputs["input_ids"].shape[1]:].tolist())
""",
        tmp_path,
    )
    there = [json.loads(line) for line in printed.strip().splitlines()[-2:]]
    assert there == [symbolic_answers(symbolic_elms[name], chats) for name in ("untied", "tied_lora")]


def test_chats_about_ecgs_that_exceed_the_context(llm, data, ecg_byte, tmp_path, caplog):
    options = ["--representation", "symbolic", "--ecg_tokenizer", str(ecg_byte), "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"tokens of 1 ECGs and room for \d+ beside its words \(max_length=1024\)"):
        sft.main(tiny_sft(llm, data, tmp_path / "error", *options, encoder=None))
    sft.main(tiny_sft(llm, data, tmp_path / "dropped", *options, "--ecg_overflow", "drop_leads", encoder=None))
    assert "their leads aVR, aVL, aVF, III" in caplog.text
    assert len(losses(tmp_path / "dropped")) == 1


# ECGs as pictures


def of_pictures(encoder: str, representation: str = "rgb") -> list[str]:
    """Options of a tiny vision backbone with random weights."""
    fields = TINY_VISION.get(f"{encoder}_vision_model", TINY_VISION.get(encoder))
    options = ["--representation", representation, "--encoder", encoder, "--encoder_config", json.dumps(fields)]
    return [*options, "--num_ecg_tokens", "4"]


@pytest.fixture(scope="module")
def image_elms(tmp_path_factory, llm, mixed_data) -> dict[str, Path]:
    """After two steps, with batches of some ECGs and of none."""
    folder = tmp_path_factory.mktemp("pictures")
    for encoder in ("clip", "siglip2", "vit"):
        for representation in ("rgb", "stacked_signal"):
            options = [*of_pictures(encoder, representation), "--max_steps", "2"]
            sft.main(tiny_sft(llm, mixed_data, folder / f"{encoder}_{representation}", *options, encoder=None))
    return {path.name: path for path in sorted(folder.iterdir())}


def test_pictures_train(image_elms):
    assert len(image_elms) == 6
    for name, folder in image_elms.items():
        first, last = losses(folder)
        assert last < first, name
        assert {path.name for path in folder.iterdir()} >= {
            "image_processing_elm.py",
            "ecg_drawing.py",
            "modeling_language_models.py",
            "modeling_vision_encoders.py",
            "processor_config.json",
        }
        encoder, representation = name.split("_", 1)
        card = (folder / "README.md").read_text()
        assert f"| representation | `{representation}`: a " in card
        assert f"| ECG path | `{encoder}" in card


@pytest.mark.slow
def test_pictures_in_a_fresh_process_without_the_project(image_elms, mixed_data, tmp_path):
    """Each of the six sees there what it sees here, and answers alike in a batch, alone and here."""
    chats = chats_about_ecgs(mixed_data)
    chats.append([{"role": "user", "content": [*chats[0][0]["content"], *chats[1][0]["content"]]}])
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    code = """
def inputs_of(processor, chats):
    return processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")

def answers(model, inputs):
    output = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return output[:, inputs["input_ids"].shape[1]:].tolist()

def features(model, inputs):
    pictures = {name: values for name, values in inputs.items() if name not in ("input_ids", "attention_mask")}
    return model.get_ecg_features(**pictures)[..., 0].tolist()
"""
    printed = run_isolated(
        f"""{code}
import json
from transformers import AutoModelForCausalLM, AutoProcessor
chats = json.load(open("chats.json"))
for folder in {list(map(str, image_elms.values()))}:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = inputs_of(processor, chats)
    alone = [answers(model, inputs_of(processor, [chat]))[0] for chat in chats]
    print(json.dumps([answers(model, inputs), alone, features(model, inputs)]))
""",
        tmp_path,
    )
    here: dict[str, Any] = {}
    exec(code, here)
    for line, (name, folder) in zip(printed.strip().splitlines()[-6:], image_elms.items(), strict=True):
        together, alone, seen = json.loads(line)
        model, processor = load_elm(str(folder))
        inputs = here["inputs_of"](processor, chats)
        assert together == alone == here["answers"](model.eval(), inputs), name
        np.testing.assert_allclose(seen, here["features"](model, inputs), atol=1e-5, err_msg=name)
        # the last chat's are those of two others
        np.testing.assert_allclose(seen[3:], seen[:2], atol=1e-5, err_msg=name)
        assert np.abs(np.subtract(seen[0], seen[1])).max() > 1e-4, name


@pytest.mark.parametrize("update", [["encoder"], ["connector", "llm"]])
def test_only_updated_parts_change_of_pictures(image_elms, llm, mixed_data, tmp_path, update):
    start = image_elms["clip_rgb"]
    options = ["--model_name_or_path", str(start), "--update", *update, "--max_steps", "2"]
    sft.main(tiny_sft(llm, mixed_data, tmp_path, *options, encoder=None))
    before, after = weights(start), weights(tmp_path)
    assert before.keys() == after.keys()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed - {"weight"} == {{"llm": "language_model"}.get(part, part) for part in update}
    assert ("weight" in changed) is ("llm" in update)  # of the head


def test_lora_of_pictures(llm, mixed_data, tmp_path):
    """The encoder, which starts at random, is trained in full and saved with the adapter."""
    folder = tmp_path / "adapter"
    options = [*of_pictures("vit"), "--max_steps", "2", "--peft"]
    sft.main(tiny_sft(llm, mixed_data, folder, *options, encoder=None))
    trained, base = load_file(folder / "adapter_model.safetensors"), base_of(folder).state_dict()
    encoder = {name.removeprefix("base_model.model."): value for name, value in trained.items() if ".encoder." in name}
    assert {name for name in base if ".encoder." in name} == encoder.keys()
    assert any(not torch.equal(base[name], value) for name, value in encoder.items())
    chats = chats_about_ecgs(mixed_data)
    model, processor = load_elm(str(folder))
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        merged = model.eval()(**inputs).logits
        adapted = PeftModel.from_pretrained(base_of(folder), folder).eval()(**inputs).logits
        untrained = base_of(folder).eval()(**inputs).logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert not torch.allclose(merged, untrained, atol=1e-3)


def test_augmented_drawings_resume_bit_for_bit(llm, mixed_data, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    options = [*of_pictures("vit"), "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    options += ["--augment_rgb", "--augment_ecg"]
    sft.main(tiny_sft(llm, mixed_data, straight, *options, encoder=None))
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    sft.main(tiny_sft(llm, mixed_data, resumed, *options, "--resume_from_checkpoint", "last", encoder=None))
    assert len(losses(straight)) == 4
    assert losses(resumed) == losses(straight)
    assert_same(weights(straight), weights(resumed))


def test_augmented_rgb_of_another_representation(trained, data, tmp_path):
    with pytest.raises(ValueError, match="--augment_rgb with a model of 'signal' ECGs"):
        sft.main(tiny_sft(trained, data, tmp_path, "--elm_ckpt", str(trained), "--augment_rgb"))


# other processes


SFT = "import runpy\nrunpy.run_path('training/sft.py', run_name='__main__')"


def finish(*processes: Fork) -> str:
    ended = [process.finish() for process in processes]
    for process in ended:
        assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    return "".join(process.stdout + process.stderr for process in ended)


@pytest.mark.slow
def test_resumes_bit_for_bit(llm, data, tmp_path):
    options = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--augment_ecg"]
    options += ["--update", "encoder", "connector", "llm"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    sft.main(tiny_sft(llm, data, straight, *options))
    resumed.mkdir()
    shutil.copytree(straight / "checkpoint-3", resumed / "checkpoint-3")
    finish(fork_project(SFT, *tiny_sft(llm, data, resumed, *options, "--resume_from_checkpoint", "last")))

    assert len(losses(straight)) == 6
    assert losses(resumed) == losses(straight)
    assert_same(weights(straight), weights(resumed))
    assert not torch.equal(
        weights(straight)["model.connector.projection.weight"],
        weights(straight / "checkpoint-3")["model.connector.projection.weight"],
    )


SIX_STEPS = ["--max_steps", "6", "--gradient_checkpointing", "true"]


def assert_one_run(one: Path, two: Path) -> None:
    """The losses and weights of `two` are those of `one`, which has learnt."""
    expected = losses(one)
    assert len(expected) == 6
    assert expected[-1] < expected[0] - 0.1
    assert losses(two) == pytest.approx(expected, abs=1e-4)
    trained = weights(two)
    for key, tensor in weights(one).items():  # Adam turns a tiny difference of a tiny gradient into a step
        assert torch.allclose(trained[key], tensor, atol=5e-3), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "encoder"),
    [((), "st_mem"), pytest.param(of_pictures("clip"), None, marks=pytest.mark.minutes)],
    ids=["signal", "rgb"],
)
def test_two_processes_equal_one(options, encoder, llm, mixed_data, tmp_path):
    options = [*SIX_STEPS, *options, "--batch_size"]
    sft.main(tiny_sft(llm, mixed_data, tmp_path / "one", *options, "4", encoder=encoder))
    argv = tiny_sft(llm, mixed_data, tmp_path / "two", *options, "2", "--distributed", encoder=encoder)
    output = finish(*fork_two(SFT, *argv))
    assert output.count("parameters trained") == 1  # the main process speaks, the other is silent
    assert_one_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.minutes
def test_accelerate_starts_two_processes(llm, mixed_data, tmp_path):
    """By its own command, as a user does."""
    two = ["--batch_size", "2", "--distributed"]
    sft.main(tiny_sft(llm, mixed_data, tmp_path / "one", *SIX_STEPS, "--batch_size", "4", encoder="st_mem"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", free_port(), "training/sft.py"]
    command += tiny_sft(llm, mixed_data, tmp_path / "two", *SIX_STEPS, *two, encoder="st_mem")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    launched = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stdout + launched.stderr[-4000:]
    assert_one_run(tmp_path / "one", tmp_path / "two")


def test_gradient_accumulation_equals_a_larger_batch(llm, mixed_data, tmp_path):
    """To the rounding of floats, though the parts of a batch have different numbers of labels; in two processes too."""
    options = ["--max_steps", "2", "--optim", "sgd", "--lr", "0.5", "--batch_size"]
    sft.main(tiny_sft(llm, mixed_data, tmp_path / "batch", *options, "4", encoder="st_mem"))
    options += ["1", "--gradient_accumulation_steps"]
    sft.main(tiny_sft(llm, mixed_data, tmp_path / "accumulated", *options, "4", encoder="st_mem"))
    finish(*fork_two(SFT, *tiny_sft(llm, mixed_data, tmp_path / "two", *options, "2", encoder="st_mem")))
    expected = weights(tmp_path / "batch")
    for name in ("accumulated", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "batch"), abs=2e-6)
        for key, tensor in weights(tmp_path / name).items():
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=1e-5, msg=f"{name} {key}")


# streaming


@pytest.fixture(scope="module")
def parquet(data, tmp_path_factory) -> Path:
    """Of the data's 24 training rows, in three row groups; each record is stored once, and rows name them."""
    folder = tmp_path_factory.mktemp("parquet")
    for split, rows in load_from_disk(data).items():
        name = part_name(split, 0, 1)
        records = [{"id": str(index), **ecg} for index, ecg in enumerate(rows.with_format(None)["ecg"])]
        Dataset.from_list(records).to_parquet(folder / RECORDS / f"{name}.parquet", batch_size=8)
        places = [stored_name(name, record["id"]) for record in records]
        rows = rows.remove_columns("ecg").add_column("ecg", places)
        rows.to_parquet(folder / "data" / f"{name}.parquet", batch_size=8)
    return folder


def streamed(llm: Path, parquet: Path, folder: Path, *options: str) -> list[str]:
    return tiny_sft(llm, parquet, folder, "--streaming", "--shuffle_buffer", "10", *options)


def test_a_stream_of_json_lines_without_some_ecgs(llm, mixed_data, tmp_path):
    """The first ones, which show no type; it is trained on as the same rows of Parquet are."""
    rows = load_from_disk(mixed_data)["train"].with_format(None)
    order = sorted(range(len(rows)), key=lambda row: rows[row]["ecg"] is not None)
    rows = rows.select(order)
    assert [row["ecg"] is None for row in rows][:: len(rows) - 1] == [True, False]
    folders = [tmp_path / "parquet", tmp_path / "lines"]
    for folder in folders:
        folder.mkdir()
    rows.to_parquet(folders[0] / "train.parquet")
    (folders[1] / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in folders:
        sft.main(streamed(llm, folder, folder / "run", "--max_steps", "4"))
    assert len(losses(folders[0] / "run")) == 4
    assert losses(folders[1] / "run") == losses(folders[0] / "run")


@pytest.mark.slow
def test_a_stream_resumes_in_mid_epoch(llm, parquet, tmp_path):
    """Of the second pass, where a pass is six steps; with what is random about its ECGs."""
    argv = streamed(llm, parquet, tmp_path, "--augment_ecg", "--eval_strategy", "steps", "--eval_steps", "6")
    whole, resumed = streamed_run.stop_and_resume(tmp_path, argv, stop=8, end=12)
    assert resumed == whole
    steps = json.loads((tmp_path / "whole.0.json").read_text())
    first, second = ([record for ids in half for record in ids] for half in (steps[:6], steps[6:]))
    assert len(set(first)) == len(set(second)) == 24
    assert first != second
    runs = tmp_path / "runs"
    assert len(losses(runs / "whole")) == 12
    assert losses(runs / "parts") == losses(runs / "whole")
    assert_same(weights(runs / "whole"), weights(runs / "parts"))


@pytest.mark.slow
def test_a_stream_of_two_processes_resumes_in_mid_epoch(llm, parquet, tmp_path):
    argv = streamed(llm, parquet, tmp_path, "--batch_size", "2", "--distributed")
    code = "import runpy\nrunpy.run_path('tests/streamed_run.py', run_name='__main__')"
    finish(*fork_two(code, str(tmp_path), "8", "12", *argv))

    def steps(run: str, rank: int) -> list[list[str]]:
        return json.loads((tmp_path / f"{run}.{rank}.json").read_text())

    for rank in (0, 1):
        assert len(steps("begun", rank)) == 8
        assert steps("resumed", rank) == steps("whole", rank)[8:]
        assert len(steps("resumed", rank)) == 4
    seen = [record for rank in (0, 1) for ids in steps("whole", rank)[:6] for record in ids]
    assert len(seen) == len(set(seen)) == 24
    assert_same(weights(tmp_path / "runs" / "whole"), weights(tmp_path / "runs" / "parts"))


def test_validation_without_such_a_split(llm, mixed_data, tmp_path):
    with pytest.raises(ValueError, match="has no split 'validation'; leave --eval_strategy out"):
        sft.main(tiny_sft(llm, mixed_data, tmp_path, "--max_steps", "1", "--eval_strategy", "epoch"))


def test_a_stream_needs_max_steps(llm, parquet, tmp_path):
    with pytest.raises(ValueError, match="--streaming does not know the number of rows; set --max_steps"):
        sft.main(streamed(llm, parquet, tmp_path))
    with pytest.raises(ValueError, match="--shuffle_buffer is 0"):
        sft.main(streamed(llm, parquet, tmp_path, "--shuffle_buffer", "0", "--max_steps", "1"))


# LoRA


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, data, llm, tied_llm) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    options = ["--peft", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
    for name, source in (("untied", llm), ("tied", tied_llm)):
        sft.main(tiny_sft(source, data, folder / name, *options))
    return {name: folder / name for name in ("untied", "tied")}


@pytest.fixture(params=["untied", "tied"])
def adapter(request, adapters) -> Path:
    return adapters[request.param]


def logits(model, adapter: Path) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**prompt(load_elm(str(adapter))[1], adapter)).logits


def base_of(adapter: Path):
    return AutoModelForCausalLM.from_pretrained(base_of_adapter(adapter), trust_remote_code=True)


def test_lora_folder(adapter):
    names = {path.name for path in adapter.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "processor_config.json", "README.md"}
    assert "model.safetensors" not in names
    trained = load_file(adapter / "adapter_model.safetensors")
    connector = [name for name in trained if "model.connector." in name]
    encoder = [name for name in trained if "model.encoder." in name]
    adapted = [name for name in trained if "language_model.layers" in name]
    assert len(connector) == 2
    assert {*connector, *encoder, *adapted} == set(trained)  # nothing of the vocabulary
    assert all("lora_" in name for name in adapted)
    base = ELMForConditionalGeneration.from_pretrained(base_of_adapter(adapter)).state_dict()
    moved = trained["base_model.model.model.connector.projection.weight"]
    assert not torch.equal(moved, base["model.connector.projection.weight"])
    card = (adapter / "README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card
    assert "LoRA on the language model" in card
    assert str(adapter.parent) not in card


def test_lora_leaves_the_base_alone(adapter, llm, tied_llm):
    source = AutoModelForCausalLM.from_pretrained(llm if adapter.name == "untied" else tied_llm).state_dict()
    base = ELMForConditionalGeneration.from_pretrained(base_of_adapter(adapter)).state_dict()
    for name, tensor in source.items():
        assert torch.equal(base[name.replace("model.", "model.language_model.", 1)], tensor), name


def test_lora_loads_three_ways(adapter):
    expected = logits(PeftModel.from_pretrained(base_of(adapter), adapter), adapter)
    base = base_of(adapter)
    untrained = logits(base, adapter)
    base.load_adapter(str(adapter))
    auto = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
    assert torch.equal(logits(base, adapter), expected)
    assert torch.equal(logits(auto, adapter), expected)
    assert (untrained - expected).abs().max() > 1e-2


def test_lora_merges(adapter, tmp_path):
    peft_model = PeftModel.from_pretrained(base_of(adapter), adapter)
    expected = logits(peft_model, adapter)
    merged = peft_model.merge_and_unload()
    assert torch.allclose(logits(merged, adapter), expected, atol=1e-5)
    assert torch.allclose(logits(load_elm(str(adapter))[0], adapter), expected, atol=1e-5)
    load_elm(str(adapter))[0].save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.allclose(logits(reloaded, adapter), expected, atol=1e-5)


def test_lora_resumes(adapter, data, llm, tied_llm, tmp_path):
    resumed = tmp_path / "resumed"
    shutil.copytree(adapter / "checkpoint-3", resumed / "checkpoint-3")
    options = ["--peft", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
    source = llm if adapter.name == "untied" else tied_llm
    sft.main(tiny_sft(source, data, resumed, *options, "--resume_from_checkpoint", "true"))
    assert losses(resumed) == losses(adapter)
    assert_same(load_file(adapter / "adapter_model.safetensors"), load_file(resumed / "adapter_model.safetensors"))


def test_system_prompt_is_the_models(llm, data, tmp_path):
    """It is saved, asked with by whoever loads the model, and kept where training goes on from it."""
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    sft.main(tiny_sft(llm, data, first, "--max_steps", "1", "--system_prompt", "Be brief."))
    sft.main(tiny_sft(llm, data, other, "--max_steps", "1"))
    sft.main(tiny_sft(llm, data, second, "--max_steps", "1", "--model_name_or_path", str(first)))
    assert losses(first) != losses(other)
    for folder, expected in ((first, True), (second, True), (other, False)):
        processor = load_elm(str(folder))[1]
        asked = processor.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True)
        assert ("Be brief." in asked) is expected


def test_lora_needs_the_llm(llm, data, tmp_path):
    with pytest.raises(ValueError, match="--peft adapts the language model"):
        sft.main(tiny_sft(llm, data, tmp_path, "--peft", "--update", "connector"))


def test_help_says_what_ours_does_with_options_of_trl():
    text = " ".join(sft.make_parser().format_help().split())
    assert "a longer one is an error" in text
    assert "truncated" not in text
    assert "or last: the newest whole one in --output_dir" in text
