import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file

from elm_ecg.training import run, sft
from elm_ecg.training.resume import OPTIONS_FILE, RunOptions, checkpoint_to_resume, fault_of, fingerprint
from helpers import ROOT, losses, save_record, save_tiny_data, tiny_sft

SAVING = ["--save_strategy", "steps", "--save_steps", "2"]
LAST = ["--resume_from_checkpoint", "last"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "all", train=24)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, llm, data) -> Path:
    """A run of six steps with a checkpoint after each second."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    sft.main(tiny_sft(llm, data, folder, "--max_steps", "6", *SAVING))
    return folder


@pytest.fixture
def stopped(straight, tmp_path) -> Path:
    """The folder of such a run that was stopped after its fourth step."""
    folder = tmp_path / "run"
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(straight / name, folder / name)
    return folder


def resumed(folder: Path, *options: str) -> Path | None:
    """The checkpoint that a command line would go on from."""
    argv = ["--data", "x", "--llm", "y", "--use_cpu", "--output_dir", str(folder), *(options or LAST)]
    return checkpoint_to_resume(sft.parse(argv)[1])


# what a run was begun with


def test_options_are_saved_beside_the_weights(straight, data):
    for folder in (straight, straight / "checkpoint-2"):
        saved = json.loads((folder / OPTIONS_FILE).read_text())
        options = saved["options"]
        assert (options["learning_rate"], options["update"]) == (1e-2, ["encoder", "connector", "llm"])
        assert options["data"] == [str(data)]
        assert saved["data"]["rows"] == 24
        assert {"torch", "trl"} <= saved["packages"].keys()
        assert not list(folder.glob("training_args.bin"))  # a pickle, with tokens


def test_secrets_are_not_saved(tmp_path):
    args, training_args, model_args = sft.parse(["--data", "x", "--use_cpu", "--output_dir", str(tmp_path)])
    training_args.hub_token = "hf_secret"
    RunOptions.of(args, training_args, model_args).save(tmp_path)
    assert "hf_secret" not in (tmp_path / OPTIONS_FILE).read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--update", "connector"], "--update encoder connector llm (now connector)"),
        (["--lr", "1e-3"], "--learning_rate 0.01 (now 0.001)"),
        (["--seed", "7"], "--seed 42 (now 7)"),
        (["--batch_size", "2"], "--per_device_train_batch_size 4 (now 2)"),
        (["--peft"], "--use_peft False (now True)"),
        (["--peft", "--lora_r", "4"], "--lora_r 16 (now 4)"),
        (["--connector", "mlp"], "--connector linear (now mlp)"),
        (["--llm", "elsewhere/llm"], "now elsewhere/llm"),
        (["--encoder", "mtae"], "--encoder merl (now mtae)"),
        (["--elm", "patch_elf"], "--architecture llava (now fuyu)"),
        (["--system_prompt", "Be brief."], "--system_prompt (nothing) (now Be brief.)"),
        (["--augment_ecg"], "--augment_ecg False (now True)"),
    ],
)
def test_what_cannot_go_on_is_named_with_both_values(stopped, llm, data, monkeypatch, options, said):
    """Before the data are read and the model is built."""
    monkeypatch.setattr(run, "load_splits", None)
    argv = tiny_sft(llm, data, stopped, "--max_steps", "6", *SAVING, *LAST, *options)
    with pytest.raises(ValueError, match=re.escape(said)) as raised:
        sft.main(argv)
    assert f"--resume_from_checkpoint {stopped / 'checkpoint-4'}: the run was begun with --" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_may_differ_is_said_and_the_run_is_the_same(straight, stopped, llm, data, caplog):
    """Logging and saving; the count of tokens goes on."""
    options = ["--max_steps", "6", *SAVING, *LAST, "--save_steps", "3", "--logging_first_step", "--llm", f"{llm}/"]
    sft.main(tiny_sft(llm, data, stopped, *options))
    said = next(text for text in caplog.messages if "Going on from" in text)
    assert "--save_steps 2 (now 3)" in said
    assert "--logging_first_step False (now True)" in said
    assert "learning_rate" not in said
    assert losses(stopped) == losses(straight)
    counts = [
        [
            row["num_tokens"]
            for row in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "loss" in row
        ]
        for folder in (straight, stopped)
    ]
    assert counts[0] == counts[1]
    assert sorted(counts[0]) == counts[0]
    assert RunOptions.read(stopped).started == RunOptions.read(straight).started  # it is the same run


@pytest.mark.parametrize(
    "option",
    ["packing", *(pytest.param(name, marks=pytest.mark.slow) for name in ("group_by_length", "chat_template_path"))],
)
def test_what_makes_the_batches_goes_on(option, llm, tmp_path):
    """In the middle of the second epoch, of chats with an ECG and without."""
    data = save_tiny_data(tmp_path / "data", without_ecg=3, train=14)
    template = shutil.copy(ROOT / "training" / "templates" / "default.jinja", tmp_path)
    options = {
        "packing": ["--packing", "--max_length", "500"],
        "group_by_length": ["--train_sampling_strategy", "group_by_length"],
        "chat_template_path": ["--chat_template_path", str(template)],
    }[option]
    options += ["--max_steps", "7", "--save_strategy", "steps", "--save_steps", "6"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    sft.main(tiny_sft(llm, data, whole, *options))
    shutil.copytree(whole / "checkpoint-6", parts / "checkpoint-6")
    sft.main(tiny_sft(llm, data, parts, *options, *LAST))
    assert len(losses(whole)) == 7
    assert losses(parts) == losses(whole)
    weights = [load_file(folder / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    if option == "packing":  # which may differ
        return
    without = options[2:]
    with pytest.raises(
        ValueError, match=rf"the run was begun with --{options[0][2:]} .*{re.escape(options[1])} \(now "
    ):
        sft.main(tiny_sft(llm, data, parts, *without, *LAST))


def test_other_data(stopped, llm, tmp_path):
    other = save_tiny_data(tmp_path / "other", train=23)
    with pytest.raises(ValueError, match=r"other training data \(24 rows of --data .*now 23 rows of --data .*other"):
        sft.main(tiny_sft(llm, other, stopped, "--max_steps", "6", *SAVING, *LAST))


def test_the_same_data_elsewhere(straight, stopped, llm, data, tmp_path):
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    sft.main(tiny_sft(llm, moved, stopped, "--max_steps", "6", *SAVING, *LAST))
    assert losses(stopped) == losses(straight)


def test_a_run_goes_on_from_another_working_directory(llm, tmp_path, monkeypatch, caplog):
    """Its relative paths are compared by what they mean; a project that was moved goes on with the same ones."""
    save_tiny_data(tmp_path / "data", train=8)
    options = ["--streaming", *SAVING]  # of streams no fingerprint tells
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llm, "llm")
    sft.main(tiny_sft(Path("llm"), Path("data"), Path("run"), *options, "--max_steps", "2"))
    more = [*options, "--max_steps", "4", *LAST]
    (tmp_path / "other").mkdir()
    monkeypatch.chdir("other")
    sft.main(tiny_sft(Path("../llm"), Path("../data"), Path("../run"), *more))
    assert "--llm" not in caplog.text
    assert "--data" not in caplog.text
    with pytest.raises(ValueError, match=r"begun with --data \.\./data \(now elsewhere\)"):
        sft.main(tiny_sft(Path("../llm"), Path("elsewhere"), Path("../run"), *more))
    moved = tmp_path / "moved"
    moved.mkdir()
    monkeypatch.chdir(moved)
    for name in ("llm", "data", "run"):
        (tmp_path / name).rename(name)
    (moved / "sub").mkdir()
    monkeypatch.chdir("sub")
    sft.main(tiny_sft(Path("../llm"), Path("../data"), Path("../run"), *more, "--max_steps", "5"))


def test_fingerprint(data, tmp_path):
    rows = load_from_disk(data)["train"]
    same = fingerprint(rows)
    assert fingerprint(load_from_disk(data)["train"].flatten_indices()) == same
    assert fingerprint(rows.select(range(23, -1, -1))) != same  # another order is another run
    ecg = rows[0]["ecg"]
    ecg["array"][0][0] += 1
    changed = [{**rows[0], "ecg": ecg}, *(rows[index] for index in range(1, 24))]
    assert fingerprint(type(rows).from_list(changed, features=rows.features)) != same
    chats = [{**rows[0], "messages": rows[1]["messages"]}, *(rows[index] for index in range(1, 24))]
    assert fingerprint(type(rows).from_list(chats, features=rows.features)) != same


def test_fingerprint_of_files(data, tmp_path):
    """Their content, wherever they are."""
    rows = load_from_disk(data)["train"].select(range(1)).remove_columns("ecg")
    one, two = save_record(tmp_path / "one.npz"), Path(shutil.copy(tmp_path / "one.npz", tmp_path / "two.npz"))
    prints = [fingerprint(rows.add_column("ecg", [str(path)])) for path in (one, two)]
    assert prints[0] == prints[1]
    save_record(two, seed=1)
    assert fingerprint(rows.add_column("ecg", [str(two)])) != prints[1]


def test_a_later_run_in_the_folder_is_the_newest(stopped):
    """Its checkpoints are before those of an earlier run, which went further."""
    path = stopped / "checkpoint-2" / OPTIONS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": "2999"}))
    assert resumed(stopped) == stopped / "checkpoint-2"


# damaged checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    *((Path.unlink, name, f"it lacks {name}") for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
    *((Path.unlink, name, f"it lacks {name}") for name in ("trainer_state.json", "model.safetensors")),
    *((cut, name, f"{name} is damaged") for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
    *((cut, name, f"{name} is damaged") for name in ("trainer_state.json", "model.safetensors", "config.json")),
    (lambda path: path.write_bytes(b""), "model.safetensors", "model.safetensors is damaged"),
    (flip, "optimizer.pt", "optimizer.pt is damaged"),
]


@pytest.mark.parametrize(("damage", "name", "said"), DAMAGES)
def test_the_newest_whole_checkpoint(stopped, damage, name, said, caplog):
    newest = stopped / "checkpoint-4"
    assert fault_of(newest) is None
    assert resumed(stopped) == newest
    damage(newest / name)
    assert said in fault_of(newest)
    assert resumed(stopped) == stopped / "checkpoint-2"
    (told,) = caplog.messages
    assert f"{newest} cannot be resumed from: {said}" in told
    assert told.endswith(f"Going on from {stopped / 'checkpoint-2'}.")
    with pytest.raises(ValueError, match=f"{re.escape(str(newest))} cannot be resumed from: {re.escape(said)}"):
        resumed(stopped, "--resume_from_checkpoint", str(newest))


def test_no_whole_checkpoint(stopped, llm, data, monkeypatch):
    monkeypatch.setattr(run, "load_splits", None)  # found out before
    for name in ("checkpoint-2", "checkpoint-4"):
        (stopped / name / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole\. .*checkpoint-4: it lacks optimizer\.pt"):
        sft.main(tiny_sft(llm, data, stopped, *LAST))
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        resumed(stopped, "--resume_from_checkpoint", "nowhere")


def test_weights_alone(stopped):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (stopped / "checkpoint-4" / name).unlink()
    assert "it holds weights alone (--save_only_model)" in fault_of(stopped / "checkpoint-4")


def test_a_checkpoint_of_several_processes(stopped):
    folder = stopped / "checkpoint-4"
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert fault_of(folder) == "several processes made it, and now there is one"
    assert fault_of(folder, 2) == "it lacks rng_state_1.pth"
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert fault_of(folder, 2) is None


def test_shards(stopped):
    folder = stopped / "checkpoint-4"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert fault_of(folder) == "it lacks model-00002-of-00002.safetensors"


def test_the_documentation_goes_on_with_the_command_that_began():
    lines = (ROOT / "docs" / "how_to" / "fine_tune.md").read_text().splitlines()
    going_on = [line for line in lines if line.startswith("elm sft") and " --resume_from_checkpoint last" in line]
    assert going_on
    assert all(line.replace(" --resume_from_checkpoint last", "") in lines for line in going_on)
