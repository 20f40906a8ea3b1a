"""A moving average of the weights that are trained, which often does better than the last of them (arXiv 1803.05407, 2010.11929)."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from elm_ecg.training.files import atomic_path

FILE_NAME = "ema.safetensors"
STEPS = "num_steps"  # in that file, beside the tensors by their names


class MovingAverage(TrainerCallback):
    """The exponential moving average of a model's trained weights and its buffers, updated at each optimizer step.

    Early on the average follows faster, with a decay of (1 + n) / (10 + n) at step n, so that the random weights of the start are
    soon forgotten, as in TensorFlow's `ExponentialMovingAverage`.

    Args:
        model: which weights are trained is settled; of LoRA those of the adapter.
        decay: what stays of the average at a step.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.decay = decay
        self.num_steps = 0
        self.averaged: dict[str, torch.Tensor] = {}  # empty before the first step, at which the model is on its device

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer, behind each step of the optimizer."""
        self.update()

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of a step into the average."""
        current = self._tensors()
        if not self.averaged:
            whole = torch.contiguous_format  # as they are saved
            self.averaged = {name: tensor.detach().clone(memory_format=whole) for name, tensor in current.items()}
        floats = [name for name, tensor in current.items() if tensor.is_floating_point()]
        weight = 1 - min(self.decay, (1 + self.num_steps) / (10 + self.num_steps))
        torch._foreach_lerp_([self.averaged[name] for name in floats], [current[name] for name in floats], weight)
        for name in current.keys() - set(floats):  # counts, such as those of batches
            self.averaged[name].copy_(current[name])
        self.num_steps += 1

    def _tensors(self) -> dict[str, torch.Tensor]:
        """What is averaged, as it is in the model now; a tensor that has several names once."""
        trained = ((name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad)
        return dict(chain(trained, saved_buffers(self.model)))

    @torch.no_grad()
    def _swap(self) -> None:
        """Exchanges the model's weights and the average; does nothing where there is none, before the first step and after `replace`."""
        if self.averaged:
            for name, tensor in self._tensors().items():
                weights = tensor.clone()
                tensor.copy_(self.averaged[name])
                self.averaged[name].copy_(weights)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Puts the average into the model, and afterwards its weights again."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def replace(self) -> None:
        """Puts the average into the model for good."""
        self._swap()
        self.averaged = {}

    def save(self, folder: Path) -> None:
        """Writes the average and the number of its steps into a checkpoint."""
        with atomic_path(folder / FILE_NAME) as path:
            save_file({**self.averaged, STEPS: torch.tensor(self.num_steps)}, path)

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
        if saved.keys() != {*ours, STEPS}:
            raise ValueError(f"{path} is of another model.")
        self.num_steps = int(saved.pop(STEPS))
        self.averaged = {name: tensor.to(ours[name].device) for name, tensor in saved.items()}


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and values of the buffers that are saved with a model; one that has several names once."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield f"{prefix}.{name}", buffer
