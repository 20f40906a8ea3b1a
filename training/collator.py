"""Rows of chats with ECGs to a batch that the ELM trains on."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from processing_elm import ELMProcessor
from training.data import to_chat


@dataclass
class ELMCollator:
    """Pads to the longest chat of the batch; labels are the assistant's turns, their end-of-turn included.

    Args:
        system_prompt: system message of the chats that have none.
        perturb: `zeros` in place of every ECG, `only_text` to leave it out; `noise` is the trainer's.
        max_length: a chat of more tokens is an error; nothing is cut.
    """

    processor: ELMProcessor
    system_prompt: str | None = None
    perturb: str | None = None
    max_length: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        with_ecg = self.perturb != "only_text" and self.processor.num_ecg_tokens > 0
        chats = [to_chat(row, self.system_prompt, with_ecg) for row in rows]
        batch: Any = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors=None,  # the mask is found token by token, which takes 50 times as long in tensors
            processor_kwargs={"padding": True, "padding_side": "right"},
        )
        batch.convert_to_tensors("pt")
        answers = batch.pop("assistant_masks").bool()
        if not answers.any(-1).all():
            row = rows[int(answers.any(-1).logical_not().nonzero()[0])]
            raise ValueError(
                f"The chat {row['messages']} has no assistant turn to learn from, or the chat template does not mark it "
                "with {% generation %}."
            )
        length = batch["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"A chat has {length} tokens and max_length is {self.max_length}; nothing is cut: raise --max_length, "
                "take fewer --num_ecg_tokens, or leave such rows out of the data."
            )
        batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)
        if self.perturb == "zeros" and "ecg_values" in batch:
            batch["ecg_values"].zero_()
        return dict(batch)


def augment(ecg_values: torch.Tensor) -> torch.Tensor:
    """Of each ECG, with probability 0.5 each: Gaussian noise of 0.05 standard deviations, and a sinusoidal baseline
    wander of 0.07 times the largest amplitude with 1 to 5 half periods, as in the reference.

    Args:
        ecg_values: [number of ECGs, leads, samples]
    """
    num_ecgs, _, num_samples = ecg_values.shape
    device = ecg_values.device
    noisy, wandering = torch.rand(2, num_ecgs, 1, 1, device=device) < 0.5
    half_periods = torch.randint(1, 6, (num_ecgs, 1, 1), device=device)
    wander = torch.sin(math.pi * half_periods * torch.linspace(0, 1, num_samples, device=device))
    noise = torch.randn_like(ecg_values) * 0.05 * ecg_values.std((1, 2), keepdim=True)
    return ecg_values + noisy * noise + wandering * 0.07 * ecg_values.abs().amax((1, 2), keepdim=True) * wander
