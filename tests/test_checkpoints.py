import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from elm_ecg.training import checkpoints, cli, run, sft, trainer
from elm_ecg.training.ema import FILE_NAME
from elm_ecg.training.load import load_elm
from elm_ecg.training.resume import OPTIONS_FILE, fault_of
from helpers import losses, save_tiny_data, tiny_sft

SAVING = ["--save_strategy", "steps", "--save_steps", "1"]

# the highest loss is the best, so that the first step is
WORST = ["--eval_strategy", "steps", "--eval_steps", "1", "--greater_is_better", "true"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "all", train=12, validation=4)


@pytest.fixture(scope="module")
def old(tmp_path_factory, llm, data) -> Path:
    """A model, with its card and its options, and a checkpoint."""
    folder = tmp_path_factory.mktemp("old") / "run"
    sft.main(tiny_sft(llm, data, folder, "--max_steps", "1", *SAVING))
    return folder


@pytest.fixture
def folder(old, tmp_path) -> Path:
    return Path(shutil.copytree(old, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# numbers that are none


@pytest.mark.parametrize("accumulation", ["1", "3"])
def test_training_stops_at_a_loss_that_is_no_number(llm, data, folder, accumulation, monkeypatch, capsys):
    """In whichever part of a step; what was there is there still, and checkpoints before are whole."""
    before, step, calls = contents(folder), trainer.SFTTrainer.training_step, []

    def nan(self, model, inputs, *args, **kwargs):
        calls.append(inputs)
        loss = step(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if len(calls) == int(accumulation) + 1 else loss

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", nan)
    options = ["--max_steps", "4", "--gradient_accumulation_steps", accumulation, "--batch_size", "1", *SAVING]
    assert cli.main(["sft", *tiny_sft(llm, data, folder, *options)]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("elm sft: ")]
    assert "Training stopped at step 2: the loss is nan at the learning rate 0.0075" in error
    assert "lower --learning_rate" in error
    assert len(calls) == int(accumulation) + 1
    after = contents(folder)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if not name.startswith("checkpoint-"))
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "checkpoint-1" / "model.safetensors").values())


def test_weights_that_are_no_numbers_are_not_saved(llm, data, folder, monkeypatch):
    """A finite loss may have a gradient that is none, with which the step spoils the weights."""
    before, step = contents(folder), trainer.SFTTrainer.training_step

    def spoil(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        model.lm_head.weight.grad[0] = float("inf")
        return loss

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", spoil)
    for options in ([], [*SAVING, "--save_total_limit", "1"]):
        with pytest.raises(
            ValueError, match=r"is not saved: after step 1 .* has values that are no numbers .* is there still"
        ):
            sft.main(tiny_sft(llm, data, folder, "--max_steps", "1", *options))
        assert contents(folder) == before


def test_statistics_of_batch_norm_are_looked_at_too(llm, data, tmp_path, monkeypatch):
    step = trainer.SFTTrainer.training_step

    def spoil(self, model, *args, **kwargs):
        loss = step(self, model, *args, **kwargs)
        next(buffer for name, buffer in model.named_buffers() if name.endswith("running_var"))[0] = float("nan")
        return loss

    monkeypatch.setattr(trainer.SFTTrainer, "training_step", spoil)
    with pytest.raises(ValueError, match="running_var has values that are no numbers"):
        sft.main(tiny_sft(llm, data, tmp_path, "--max_steps", "1"))


# checkpoints


def test_a_checkpoint_that_fails_leaves_those_before(llm, data, folder, monkeypatch):
    """As a kill would: what is written lies in a folder of another name."""
    before = contents(folder)
    save = trainer.ELMTrainer._save_rng_state
    lying: list[str] = []

    def fail(self, output_dir):
        save(self, output_dir)
        if self.state.global_step == 2:
            lying.extend(sorted(path.name for path in folder.iterdir() if path.is_dir()))
            raise RuntimeError("the power is gone")

    monkeypatch.setattr(trainer.ELMTrainer, "_save_rng_state", fail)
    with pytest.raises(RuntimeError, match="the power is gone"):
        sft.main(tiny_sft(llm, data, folder, "--max_steps", "3", *SAVING))
    assert lying == [".unfinished", "checkpoint-1"]
    assert contents(folder).keys() == before.keys()
    assert fault_of(folder / "checkpoint-1") is None
    monkeypatch.undo()
    (folder / ".unfinished" / "checkpoint-2").mkdir(parents=True)  # what a kill leaves goes too
    sft.main(tiny_sft(llm, data, folder, "--max_steps", "3", *SAVING, "--resume_from_checkpoint", "last"))
    assert len(losses(folder)) == 3
    assert not (folder / ".unfinished").exists()


def test_rotation_and_the_best_model(llm, data, tmp_path):
    folder = tmp_path / "run"
    options = ["--max_steps", "4", *SAVING, "--save_total_limit", "1", "--load_best_model_at_end", "--lr", "1e-1"]
    sft.main(tiny_sft(llm, data, folder, *options, "--eval_strategy", "steps", "--eval_steps", "1"))
    state = json.loads((folder / "trainer_state.json").read_text())
    evaluated = {row["step"]: row["eval_loss"] for row in state["log_history"] if "eval_loss" in row}
    best = folder / f"checkpoint-{min(evaluated, key=evaluated.get)}"
    assert state["best_model_checkpoint"] == str(best)
    checkpoints = set(folder.glob("checkpoint-*"))
    assert checkpoints == {best}
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    saved, kept = load_file(folder / "model.safetensors"), load_file(best / "model.safetensors")
    assert all(torch.equal(saved[name], kept[name]) for name in kept)
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 2
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in weights)  # others read them too


@pytest.mark.parametrize(
    "options",
    [[], pytest.param(["--peft", "--update", "encoder", "connector", "llm"], marks=pytest.mark.slow)],
    ids=["full", "lora"],
)
def test_a_moving_average(llm, data, tmp_path, options):
    """The best average is what is saved, and a run that goes on goes on with it."""
    options = [*options, *SAVING, "--metric_for_best_model", "loss", "--load_best_model_at_end"]
    options += ["--max_steps", "3", "--ema_decay", "0.9", *WORST[:4]]  # the last step is the best
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    sft.main(tiny_sft(llm, data, straight, *options))
    for step in (1, 2):
        shutil.copytree(straight / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
    sft.main(tiny_sft(llm, data, resumed, *options, "--resume_from_checkpoint", "last"))
    whole, parts = (load_file(folder / "checkpoint-3" / FILE_NAME) for folder in (straight, resumed))
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole.items())
    best = Path(json.loads((straight / "trainer_state.json").read_text())["best_model_checkpoint"])
    saved = load_file(straight / ("adapter_model.safetensors" if "--peft" in options else "model.safetensors"))
    averages = {
        name.replace(".default", "").replace(".modules_to_save", ""): tensor
        for name, tensor in load_file(best / FILE_NAME).items()
    }
    assert len(averages.keys() & saved.keys()) > len(saved) / 2
    for name in averages.keys() & saved.keys():
        assert torch.equal(saved[name], averages[name]), name
    step = load_file(best / ("adapter_model.safetensors" if "--peft" in options else "model.safetensors"))
    assert not all(torch.equal(saved[name], step[name]) for name in averages.keys() & saved.keys())
    assert "| moving average of the weights | 0.9 |" in (straight / "README.md").read_text()


def test_a_moving_average_needs_whole_weights(llm, data, tmp_path, monkeypatch):
    def pretend(trainer: Trainer) -> None:
        create(trainer)
        trainer.is_fsdp_enabled = True

    create = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", pretend)
    with pytest.raises(ValueError, match=r"--ema_decay 0\.9 with FSDP or DeepSpeed"):
        sft.main(tiny_sft(llm, data, tmp_path / "run", "--ema_decay", "0.9"))


def test_the_best_model_of_a_run_whose_folder_was_moved(llm, data, tmp_path, monkeypatch):
    """Its checkpoints name it by the old path: it would be taken for gone, or, by a relative path, rotated away."""
    options = [*WORST, "--save_total_limit", "1"]
    options += [*SAVING, "--load_best_model_at_end", "--metric_for_best_model", "loss"]  # the first step is the best
    sft.main(tiny_sft(llm, data, tmp_path / "run", *options, "--max_steps", "2"))
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    sft.main(tiny_sft(llm, data, Path("moved"), *options, "--max_steps", "3", "--resume_from_checkpoint", "last"))
    state = json.loads(Path("moved/trainer_state.json").read_text())
    assert (state["global_step"], state["best_global_step"], state["best_model_checkpoint"]) == (
        3,
        1,
        "moved/checkpoint-1",
    )
    saved, best = (load_file(f"moved/{folder}model.safetensors") for folder in ("", "checkpoint-1/"))
    assert all(torch.equal(saved[name], best[name]) for name in best)


def test_a_best_step_that_was_not_saved_is_told(llm, data, tmp_path, caplog):
    options = [*WORST, "--save_strategy", "steps"]
    options += ["--save_steps", "2", "--load_best_model_at_end", "--metric_for_best_model", "loss", "--max_steps", "2"]
    sft.main(tiny_sft(llm, data, tmp_path / "run", *options))
    assert "The best step, 1, was not saved: the weights are those of the last step." in caplog.text


# the model at the end


def test_the_card_of_an_old_model_stays_until_the_new_one_is_saved(llm, data, folder, monkeypatch):
    before = contents(folder)

    def fail(*args, **kwargs):
        raise RuntimeError("the power is gone")

    monkeypatch.setattr(run, "write_model_card", fail)
    with pytest.raises(RuntimeError, match="the power is gone"):
        sft.main(tiny_sft(llm, data, folder, "--max_steps", "2", "--seed", "1"))
    assert contents(folder) == before


def test_a_kill_between_two_files_leaves_no_mixture(old, folder, tmp_path, monkeypatch):
    new = tmp_path / "new"
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("checkpoint-*"))
    names = sorted(path.name for path in new.iterdir())
    moved: list[str] = []

    def kill(source, target):
        if len(moved) == len(names) // 2:
            raise KeyboardInterrupt
        moved.append(Path(source).name)
        shutil.move(source, target)

    monkeypatch.setattr(checkpoints.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.replace_model(new, folder)
    monkeypatch.undo()
    assert moved
    with pytest.raises(ValueError, match=r"config\.json"):
        load_elm(str(folder))


def test_an_adapter_and_a_whole_model_follow_each_other(llm, data, folder):
    """Nothing of the one stays that would be loaded with the other."""
    sft.main(tiny_sft(llm, data, folder, "--max_steps", "1", "--peft"))
    names = {path.name for path in folder.iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", OPTIONS_FILE}
    assert not names & {"model.safetensors", "config.json"}
    assert load_elm(str(folder))[0].config.encoder_config.model_type == "merl"
    (folder / "base_model").mkdir()  # as older versions left it
    sft.main(tiny_sft(llm, data, folder, "--max_steps", "1", encoder="mtae"))
    names = {path.name for path in folder.iterdir()}
    assert names >= {"model.safetensors", "config.json"}
    assert not names & {"adapter_model.safetensors", "adapter_config.json", "base_model"}
    assert load_elm(str(folder))[0].config.encoder_config.model_type == "mtae"


# a full disk


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may have more bytes than these, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("options", "size", "named"),
    [
        (SAVING, 100_000, "checkpoint-1"),  # the weights, by safetensors
        (SAVING, 250_000, "checkpoint-1"),  # the optimizer's state, by PyTorch
        (SAVING, 15_000, "checkpoint-1"),  # the tokenizer
        ([], 100_000, ""),
        (["--peft"], 100_000, "base of the adapter"),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_folder(
    llm, data, folder, capsys, monkeypatch, tmp_path, options, size, named
):
    before = contents(folder)
    monkeypatch.setenv("ELM_BASE_MODELS", str(tmp_path / "bases"))
    with room_for(size):
        assert cli.main(["sft", *tiny_sft(llm, data, folder, "--max_steps", "1", "--seed", "1", *options)]) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("elm sft: ")]
    said, path = error.removeprefix("elm sft: ").split(": ")
    assert said in {os.strerror(number) for number in (errno.EFBIG, errno.ENOSPC)}
    of_base = "--peft" in options
    assert (Path(path).parent if of_base else Path(path)) == (tmp_path / "bases" if of_base else folder / named)
    assert contents(folder) == before
    assert {file.suffix for file in tmp_path.glob("bases/*")} <= {".lock"}
