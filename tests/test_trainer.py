import copy
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback
from trl.trainer import utils as trl_utils

from elm_ecg.training import run, sft, trainer
from elm_ecg.training.resume import RunOptions
from helpers import save_tiny_data, tiny_sft


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_tiny_data(tmp_path_factory.mktemp("data") / "all", train=12, validation=4)


def make_trainer(*argv: str) -> trainer.ELMTrainer:
    """The trainer of a command line, as `elm sft` makes it."""
    args, training_args, model_args = sft.parse(list(argv))
    torch.manual_seed(training_args.seed)
    model, processor = run.build_base(args, training_args, model_args)
    splits = run.load_splits(args, training_args)
    options = RunOptions.of(args, training_args, model_args)
    return sft.make_trainer(args, training_args, model_args, model, processor, splits, options)


def gradients(compute_loss, run: trainer.ELMTrainer, batch: dict) -> dict[str, torch.Tensor]:
    """Those of `compute_loss` on a batch, and its loss."""
    assert run.model is not None
    run.model.zero_grad()
    torch.manual_seed(0)  # of dropout
    loss = compute_loss(run, run.model, dict(batch), num_items_in_batch=torch.tensor(50))
    loss.backward()
    named = {name: parameter.grad for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **{name: gradient for name, gradient in named.items() if gradient is not None}}


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--use_peft", "--gradient_checkpointing", "true"],
        ["--loss_type", "dft"],
        ["--label_smoothing_factor", "0.1"],
    ],
    ids=["full", "lora", "dft", "label_smoothing"],
)
def test_the_head_on_labels_alone_is_that_on_all_tokens(llm, data, tmp_path, options, monkeypatch):
    """The same loss, gradients and metrics as TRL's; the head is given one place a label."""
    run = make_trainer(*tiny_sft(llm, data, tmp_path, *options))
    assert run.model is not None
    run.model.train()
    batch = next(iter(run.get_train_dataloader()))
    ours = gradients(trainer.ELMTrainer.compute_loss, run, batch)
    theirs = gradients(trainer.SFTTrainer.compute_loss, run, batch)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-6, msg=name)
    for name in ("entropy", "mean_token_accuracy"):
        one, other = run._metrics["train"][name]
        assert one == pytest.approx(other, rel=1e-5)
    num_labels = int((batch["labels"] != -100).sum())
    seen = []
    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", lambda hidden, *args: seen.append(hidden.shape[0]))
    with pytest.raises(TypeError):
        run.compute_loss(run.model, batch)
    assert seen == [num_labels]


class Remember(TrainerCallback):
    """The weights after each step, before they are evaluated."""

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights = copy.deepcopy(model.state_dict())


def test_a_moving_average_is_evaluated(llm, data, tmp_path):
    """The last evaluation is that of the weights in the end, which are not those of the last step."""
    options = [
        "--ema_decay",
        "0.9",
        "--max_steps",
        "2",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--lr",
        "1e-1",
    ]
    run, last = make_trainer(*tiny_sft(llm, data, tmp_path, *options)), Remember()
    run.add_callback(last)
    run.train()
    evaluated = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert run.evaluate()["eval_loss"] == evaluated[-1]
    run.model.load_state_dict(last.weights)
    assert run.evaluate()["eval_loss"] != evaluated[-1]
