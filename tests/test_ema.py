import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from elm_ecg.training.ema import FILE_NAME, MovingAverage


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)


class Model(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.trained, self.frozen = Part(), Part()
        self.frozen.requires_grad_(False)


@torch.no_grad()
def stepped(model, average, seed):
    """A step: other weights and statistics of what is trained."""
    torch.manual_seed(seed)
    for weight in model.trained.parameters():
        weight += torch.randn_like(weight)
    model.trained.norm.running_mean += torch.randn(2)
    model.trained.norm.num_batches_tracked += 1
    average.update()


def test_the_average_is_that_of_all_steps(tmp_path):
    """With the first decays (1 + n) / (10 + n), then the one that was asked for; counts are the last ones."""
    model = Model()
    average, expected = MovingAverage(model, 0.5), None
    for step in range(30):
        stepped(model, average, step)
        now = {name: value.clone() for name, value in model.trained.state_dict().items()}
        decay = min(0.5, (1 + step) / (10 + step))
        if expected is None:
            expected = now
        else:
            expected = {
                name: decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
                for name, value in now.items()
            }
    frozen = copy.deepcopy(model.frozen.state_dict())
    average.replace()
    for name, value in model.trained.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    for name, value in model.frozen.state_dict().items():
        assert torch.equal(value, frozen[name])
    assert model.trained.norm.num_batches_tracked == 30


def test_it_is_in_the_model_for_a_while(tmp_path):
    """As in an evaluation; before the first step there is none."""
    model = Model()
    average = MovingAverage(model, 0.9)
    with average.in_model():
        stepped(model, average, 0)
    stepped(model, average, 1)
    average.save(tmp_path)
    now, saved = copy.deepcopy(model.state_dict()), load_file(tmp_path / FILE_NAME)
    with average.in_model():
        for name, value in model.trained.named_parameters():
            assert torch.equal(value, saved[f"trained.{name}"]), name
            assert not torch.equal(value, now[f"trained.{name}"]), name
    for name, value in model.state_dict().items():
        assert torch.equal(value, now[name]), name


def test_it_goes_on_from_a_checkpoint(tmp_path):
    model = Model()
    start = copy.deepcopy(model.state_dict())
    average = MovingAverage(model, 0.9)
    for step in range(4):
        stepped(model, average, step)
    other = Model()
    other.load_state_dict(start)
    resumed = MovingAverage(other, 0.9)
    for step in range(2):
        stepped(other, resumed, step)
    resumed.save(tmp_path)
    stopped = Model()
    stopped.load_state_dict(other.state_dict())
    resumed = MovingAverage(stopped, 0.9)
    resumed.load(tmp_path)
    for step in range(2, 4):
        stepped(stopped, resumed, step)
    average.replace()
    resumed.replace()
    for name, value in stopped.state_dict().items():
        if not name.startswith("frozen"):
            assert torch.equal(value, model.state_dict()[name]), name


def test_checkpoints_without_it_or_of_another_model(tmp_path):
    average = MovingAverage(Model(), 0.9)
    with pytest.raises(
        ValueError, match=f"--ema_decay 0.9, but the checkpoint .* has no {FILE_NAME}; leave the option out"
    ):
        average.load(tmp_path)
    other = Model()
    other.trained.more = nn.Linear(1, 1)
    other_average = MovingAverage(other, 0.9)
    stepped(other, other_average, 0)
    other_average.save(tmp_path)
    with pytest.raises(ValueError, match="is of another model"):
        average.load(tmp_path)
