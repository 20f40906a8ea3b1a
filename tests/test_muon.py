import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config
from trl import SFTConfig

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.training import sft, trainer
from elm_ecg.training.muon import InFloat32, MuonAdamW, matrices_of, muon_options
from helpers import losses, save_tiny_data, tiny_elm_config, tiny_sft

MUON = ["--optim", "muon"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "all", without_ecg=4, train=12)


def test_matrices_of_the_layers_alone():
    """Not embeddings, which have two dimensions too, vectors, or what is frozen."""
    model = ELMForConditionalGeneration(tiny_elm_config())
    model.model.language_model.layers[1].self_attn.q_proj.requires_grad_(False)
    matrices = matrices_of(model.model.language_model)
    names = {name for name, parameter in model.named_parameters() if parameter in matrices}
    layers = [f"model.language_model.layers.{layer}." for layer in range(2)]
    expected = {f"{layer}self_attn.{name}_proj.weight" for layer in layers for name in "qkvo"}
    expected |= {f"{layer}mlp.{name}_proj.weight" for layer in layers for name in ("gate", "up", "down")}
    assert names == expected - {"model.language_model.layers.1.self_attn.q_proj.weight"}


def test_of_gpt2_too():
    """Whose layers are no nn.Linear."""
    llm = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    matrices = matrices_of(llm.base_model)
    names = {name for name, parameter in llm.named_parameters() if parameter in matrices}
    assert names == {
        f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


def test_each_trains_as_by_itself():
    """The same steps as of Muon and of AdamW apart, after a checkpoint too; a scheduler sets both."""
    torch.manual_seed(0)
    start = [torch.randn(4, 6), torch.randn(6)]
    together, apart = ([torch.nn.Parameter(value.clone()) for value in start] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9}, {"lr": 0.1, "betas": (0.8, 0.9)}
    groups = [{"params": [value]} for value in together]

    def new() -> MuonAdamW:
        return MuonAdamW(groups[:1], groups[1:], *settings)

    optimizer, others = new(), [torch.optim.Muon(apart[:1], **settings[0]), torch.optim.AdamW(apart[1:], **settings[1])]
    for step in range(4):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = new()
            optimizer.load_state_dict(state)
        for one in (optimizer, *others):
            for group in one.param_groups:
                group["lr"] = 0.1 / (step + 1)
        for values in (together, apart):
            for value in values:
                value.grad = torch.full_like(value, 0.1) * value.detach().sign()
        with InFloat32():  # as the one does by itself
            for one in (optimizer, *others):
                one.step()
    assert all(map(torch.equal, together, apart))
    assert not any(map(torch.equal, together, start))
    optimizer.zero_grad()
    assert all(value.grad is None for value in together)


def test_a_matrix_on_a_cpu_is_in_float32():
    """The update is PyTorch's, but for the rounding to bfloat16, and its singular values are nearer to 1."""
    torch.manual_seed(0)
    start = torch.randn(24, 40)
    exact, rounded = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    exact.grad = rounded.grad = torch.randn(24, 40)
    settings = {"lr": 1.0, "weight_decay": 0.0, "momentum": 0.0}
    MuonAdamW([{"params": [exact]}], [{"params": [torch.nn.Parameter(torch.zeros(1))]}], settings, {"lr": 1.0}).step()
    torch.optim.Muon([rounded], **settings).step()
    updates = [(start - value).detach() for value in (exact, rounded)]
    difference = (updates[0] - updates[1]).norm() / updates[1].norm()
    assert 1e-5 < difference < 0.02
    singular = torch.linalg.svdvals(updates[0].double())
    assert singular.min() > 0.6
    assert singular.max() < 1.3


def test_a_run(llm, data, tmp_path, monkeypatch):
    """Its loss falls, a resumed one goes on bit by bit, and its options tell what it was made with."""
    made = []
    create = trainer.ELMTrainer.create_optimizer
    monkeypatch.setattr(trainer.ELMTrainer, "create_optimizer", lambda self: made.append(create(self)) or made[-1])
    options = [*MUON, "--optim_args", "momentum=0.9", "--max_steps", "6", "--weight_decay", "0.1"]
    options += ["--save_strategy", "steps", "--save_steps", "4"]
    sft.main(tiny_sft(llm, data, tmp_path / "run", *options))
    found = losses(tmp_path / "run")
    assert found[-1] < found[0] - 0.5
    muon, decayed, others = made[0].param_groups
    assert (muon["momentum"], muon["weight_decay"], muon["adjust_lr_fn"]) == (0.9, 0.1, "match_rms_adamw")
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert len(muon["params"]) == 14
    assert {value.ndim for value in others["params"]} == {1}
    shutil.copytree(tmp_path / "run" / "checkpoint-4", tmp_path / "more" / "checkpoint-4")
    sft.main(tiny_sft(llm, data, tmp_path / "more", *options, "--resume_from_checkpoint", "last"))
    assert losses(tmp_path / "more") == found
    again = tiny_sft(llm, data, tmp_path / "more", "--max_steps", "6", "--resume_from_checkpoint", "last")
    with pytest.raises(ValueError, match="the run was begun with --optim muon"):
        sft.main(again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--update", "connector"],
            "--optim muon with --update connector: Muon is for the language model's own matrices",
        ),
        (
            ["--peft"],
            "--optim muon with --use_peft: Muon is for the language model's own matrices, which are not trained then",
        ),
        (["--optim_args", "lr"], "'lr' is none of its options"),
        (
            ["--optim_args", "beta=1"],
            "'beta=1' is none of its options. Expected lr=..., weight_decay=..., momentum=...",
        ),
        (["--optim_args", "lr=fast"], "could not convert"),
        (["--optim_args", "lr=0.1,momentum=-1"], "'momentum=-1' is none .* momentum should be >= 0"),
        (["--optim_args", "adjust_lr_fn=none"], "adjust_lr_fn=none"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sft.parse(["--data", "unread", "--output_dir", "unused", "--use_cpu", *MUON, *options])


def test_its_options():
    assert muon_options("lr=0.02, adjust_lr_fn=original") == {"lr": 0.02, "adjust_lr_fn": "original"}
    assert muon_options(None) == {}
    _, training_args, _ = sft.parse(["--data", "unread", "--output_dir", "unused", "--use_cpu", "--optimizer", "muon"])
    assert training_args.optim == "muon"
    assert isinstance(training_args, SFTConfig)
