"""Models sharded over two processes, as accelerate's configurations do on GPUs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from datasets import load_from_disk

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import sft
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.load import load_elm
from elm_ecg.training.resume import fault_of
from forks import Fork
from helpers import (
    ROOT,
    TINY_ENCODERS,
    TINY_VISION,
    fork_two,
    free_port,
    losses,
    run_isolated,
    save_tiny_data,
    save_tiny_llm,
    tiny_ecg_byte,
    tiny_elm_config,
    tiny_image_elm_config,
    tiny_sft,
)

SHARDED = "import runpy\nrunpy.run_path('tests/sharded_run.py', run_name='__main__')"
# without it Adam makes a step of a tiny difference of a tiny gradient
OPTIONS = ["--max_steps", "4", "--adam_epsilon", "1e-3", "--save_strategy", "steps", "--save_steps", "2"]
LORA = ["--peft", "--lora_r", "4", "--lora_dropout", "0"]
EVALUATED = ["--eval_strategy", "steps", "--eval_steps", "2", "--load_best_model_at_end"]

pytestmark = pytest.mark.slow


def environment_of(config: str, *options: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes that it starts with a configuration of ours."""
    path = ROOT / "training" / "accelerate_configs" / f"{config}.yaml"
    argv = [
        "--config_file",
        str(path),
        "--mixed_precision",
        "no",
        "--main_process_port",
        free_port(),
        *options,
        "sft.py",
    ]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    names = ("ACCELERATE_", "FSDP_")
    return {name: value for name, value in prepare_multi_gpu_env(args).items() if name.startswith(names)}


def finish(*processes: Fork) -> str:
    ended = [process.finish() for process in processes]
    for process in ended:
        assert process.returncode == 0, process.stdout + process.stderr[-4000:]
    return "".join(process.stdout + process.stderr for process in ended)


@pytest.mark.parametrize("encoder", [*TINY_ENCODERS, *TINY_VISION])
def test_every_class_that_stays_whole_is_there(encoder):
    """FSDP makes a part of each module of these classes, and ends where one is nowhere in the model."""
    config = tiny_image_elm_config(encoder) if encoder in TINY_VISION else tiny_elm_config(encoder)
    model = ELMForConditionalGeneration(config)
    classes = {type(module).__name__ for module in model.modules()}
    assert model._no_split_modules <= classes
    assert "LlamaDecoderLayer" in model._no_split_modules
    assert len(model._no_split_modules) > 1  # and those of the encoder


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two kinds of run, each in one process (`_one`) and in two (`_two`), where it goes on from its middle once more.

    An LLM with a head of its own is trained in full, with checkpoints in parts, and one with tied embeddings by LoRA, with whole
    ones, the best of which is kept. Some batches have no ECG.
    """
    folder = tmp_path_factory.mktemp("runs")
    data = save_tiny_data(folder / "data", without_ecg=3, train=24, validation=6)
    sharded = []
    for name, family, state_dict, options in (
        ("untied", "llama3", "SHARDED_STATE_DICT", ["--update", "encoder", "connector", "llm"]),
        ("tied", "qwen2_5", "FULL_STATE_DICT", [*LORA, *EVALUATED, "--gradient_checkpointing", "true"]),
    ):
        llm, two = save_tiny_llm(folder / name, family), folder / f"{name}_two"
        sft.main(tiny_sft(llm, data, folder / f"{name}_one", *OPTIONS, *options, encoder="st_mem"))
        options = [*OPTIONS, *options, "--batch_size", "2", "--distributed"]
        environment = environment_of("fsdp", "--fsdp_state_dict_type", state_dict)
        for resumed in ([], ["--resume_from_checkpoint", str(two / "checkpoint-2")]):
            arguments = tiny_sft(llm, data, two, *options, *resumed, encoder="st_mem")
            sharded.append({"environment": environment, "arguments": arguments})
    (folder / "runs.json").write_text(json.dumps(sharded))
    finish(*fork_two(SHARDED, str(folder / "runs.json")))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["untied", "tied"])
def test_fsdp_equals_one_process(runs, name):
    one, two = runs / f"{name}_one", runs / f"{name}_two"
    assert len(losses(one)) == 4
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)
    (expected, processor), (model, _) = (load_elm(str(folder)) for folder in (one, two))
    rows = load_from_disk(runs / "data")["train"].select(range(4))
    batch = ELMCollator(processor)(list(rows))
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, expected(**batch).logits, atol=1e-4)


@pytest.mark.slow
def test_what_fsdp_saves_loads_without_the_project(runs, tmp_path):
    one, two = ({path.name for path in (runs / f"untied_{name}").glob("*.py")} for name in ("one", "two"))
    assert one == two  # ours, none of PyTorch's
    code = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(runs / "untied_two")!r}, trust_remote_code=True)
print(type(model).__name__, model.config.architectures)"""
    assert run_isolated(code, tmp_path).split() == ["ELMForConditionalGeneration", "['ELMForConditionalGeneration']"]


@pytest.mark.slow
def test_checkpoints_of_fsdp(runs, tmp_path):
    for name, weights in (("untied", "pytorch_model_fsdp_0/.metadata"), ("tied", "pytorch_model_fsdp.bin")):
        whole = runs / f"{name}_two" / "checkpoint-4"
        assert fault_of(whole, num_processes=2) is None
        cut = Path(shutil.copytree(whole, tmp_path / name))
        optimizer = "optimizer_0/.metadata" if name == "untied" else "optimizer.bin"
        (cut / optimizer).unlink()
        assert fault_of(cut, num_processes=2) == f"it lacks {optimizer}"
        (cut / weights).unlink()
        assert fault_of(cut, num_processes=2)


FROZEN = ["--update", "connector", "llm"]
# what the fixture's runs lack: 16 bits, tokens and pictures of ECGs, LoRA beside a head of its own; frozen encoders, which run in
# one process of two where the other has ECGs
CASES: dict[str, tuple[str | None, list[str]]] = {
    "bf16": ("st_mem", ["--bf16", *FROZEN]),
    "symbolic": (None, ["--representation", "symbolic", "--num_samples", "50", "--truncation", "start"]),
    "rgb": (None, ["--representation", "rgb", "--encoder", "vit", "--num_ecg_tokens", "4", *FROZEN]),
    "untied LoRA": ("st_mem", [*LORA, *FROZEN]),
}


@pytest.mark.parametrize(
    "case", ["bf16", "untied LoRA", *(pytest.param(case, marks=pytest.mark.minutes) for case in ("symbolic", "rgb"))]
)
def test_fsdp_of_other_kinds_equals_one_process(case, llm, tmp_path):
    encoder, options = CASES[case]
    if case == "symbolic":
        tiny_ecg_byte().save_pretrained(tmp_path / "ecg_byte")
        options = [*options, "--ecg_tokenizer", str(tmp_path / "ecg_byte")]
    if case == "rgb":
        options = [*options, "--encoder_config", json.dumps(TINY_VISION["vit"])]
    data = save_tiny_data(tmp_path / "data", without_ecg=2, train=24)
    options = [*OPTIONS[:4], *options]
    sft.main(tiny_sft(llm, data, tmp_path / "one", *options, encoder=encoder))
    environment = environment_of("fsdp", *(["--mixed_precision", "bf16"] if case == "bf16" else []))
    two = tiny_sft(llm, data, tmp_path / "two", *options, "--batch_size", "2", "--distributed", encoder=encoder)
    (tmp_path / "runs.json").write_text(json.dumps([{"environment": environment, "arguments": two}]))
    finish(*fork_two(SHARDED, str(tmp_path / "runs.json")))
    error = 2e-2 if case == "bf16" else 1e-4
    assert len(losses(tmp_path / "one")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=error)
    (expected, _), (model, _) = (load_elm(str(tmp_path / name)) for name in ("one", "two"))
    for name, weight in model.state_dict().items():
        assert torch.allclose(weight, expected.state_dict()[name], atol=10 * error), name
