"""A moving average of the weights that are trained, which often does better than the last of them (arXiv 1803.05407, 2010.11929)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedModel, TrainerCallback

from elm_ecg.training.files import atomic_path

FILE_NAME = "ema.safetensors"


class MovingAverage(TrainerCallback):
    """The exponential moving average of a model's weights and buffers, updated at each optimizer step.

    Early on the average follows faster, with a decay of (1 + n) / (10 + n) at step n, so that the random weights of the start are
    soon forgotten, as in TensorFlow's `ExponentialMovingAverage`.

    Args:
        decay: what stays of the average at a step.
    """

    def __init__(self, model: PreTrainedModel, decay: float) -> None:
        self.decay = decay
        # parts of which nothing is trained, such as a frozen text encoder, are their own average
        parts = {name: part for name, part in model.named_children() if any(w.requires_grad for w in part.parameters())}
        self.trained = nn.ModuleDict(parts)
        self.averaged = AveragedModel(self.trained, multi_avg_fn=self._average, use_buffers=True)

    def _average(self, averaged: Any, current: Any, num_averaged: Any) -> None:
        if not torch.is_floating_point(averaged[0]):  # counts, such as those of batches
            for one, other in zip(averaged, current, strict=True):
                one.copy_(other)
            return
        steps = int(num_averaged)
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + steps) / (10 + steps)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer, behind each step of the optimizer."""
        self.averaged.update_parameters(self.trained)

    def save(self, folder: Path) -> None:
        """Writes the average and the number of its steps into a checkpoint."""
        with atomic_path(folder / FILE_NAME) as path:
            save_file(self._tensors(), path)

    def load(self, folder: Path) -> None:
        """Goes on with the average of a checkpoint.

        Raises:
            ValueError: the checkpoint has none, or one of another model.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            raise ValueError(
                f"--ema_decay {self.decay}, but the checkpoint {folder} has no {FILE_NAME}; leave the option out."
            )
        saved, ours = load_file(path), self._tensors()
        if saved.keys() != ours.keys():
            raise ValueError(f"{path} is of another model.")
        with torch.no_grad():
            for name, tensor in ours.items():
                tensor.copy_(saved[name])

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The average, and how many steps are in it; a tensor that has several names once."""
        tensors = self.averaged.state_dict()
        first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}
        return {name: tensor for name, tensor in tensors.items() if first[tensor.data_ptr()] == name}

    def replace(self) -> None:
        """Puts the average into the model."""
        self.trained.load_state_dict(self.averaged.module.state_dict())
