"""TRL's trainer for ELMs: it augments in training only, scores labelled places alone, and packs without mixing chats."""

from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import SFTTrainer
from trl.kernels import ChunkedLogProbFunction

from elm_ecg.training.checkpoints import WholeCheckpoints
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.lengths import GroupedByLength, chat_lengths
from elm_ecg.training.muon import OptimizesByMuon
from elm_ecg.training.packing import check_kept_apart, mask_of, num_packed_tokens


class CollatesECGs(Trainer):
    """A trainer whose batches a collator makes of rows with ECGs, augmented in training only; before it among the bases.

    `features`, where they are kept, take the place of the ECGs of a batch.
    """

    features: EncoderFeatures | None = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the trainer's, of chats that are neither augmented nor packed."""
        collator: Any = self.data_collator
        self.data_collator = collator.for_evaluation()  # the base class reads it as it makes the loader
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the trainer's; outside of the model, which may be compiled or wrapped, and in its precision."""
        inputs = super()._prepare_inputs(inputs)
        if self.features is None:
            return inputs
        with self.compute_loss_context_manager():
            return self.features.replace(inputs)


class ELMTrainer(CollatesECGs, OptimizesByMuon, WholeCheckpoints, SFTTrainer):
    """TRL's trainer for ELMs.

    Args:
        kwargs: for `WholeCheckpoints` and TRL's trainer.
    """

    model: Any  # of transformers, where one may be missing

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        if self.args.torch_compile and self.args.device.type == "cpu":
            # TRL's head writes into parts of a tensor, at which tracing would end; where there is Triton it is a kernel
            torch.compiler.allow_in_graph(ChunkedLogProbFunction)
        self._kept_apart = False  # whether the chats of packed rows are known to be

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        collator = self.data_collator
        assert isinstance(collator, ELMCollator)
        lengths = chat_lengths(self.train_dataset if train_dataset is None else train_dataset, collator)
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        return GroupedByLength(
            lengths, args.train_batch_size * args.gradient_accumulation_steps * args.world_size, seed
        )

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL's, but the head scores the labelled places alone: TRL does so where it has Triton, and elsewhere scores all.

        Raises:
            ValueError: as `check_kept_apart`, at the first batch of packed chats; or their padding would count among experts.
        """
        positions = inputs.get("position_ids")  # [rows, tokens] of packed chats
        if positions is not None and not self._kept_apart:
            self._check_packing(model, positions.device)
            self._kept_apart = True
        gather_head(self.model)
        num_tokens = self._total_train_tokens
        inputs = inputs | labelled_places(inputs["labels"])
        if positions is not None and self._shares(positions.shape[1]):
            inputs["attention_mask"] = mask_of(positions, self.model)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if positions is not None:  # TRL counts those of one row, padding too
            num_tokens += int(self.accelerator.gather_for_metrics(num_packed_tokens(positions)).sum())
            self._total_train_tokens = num_tokens
            self._metrics["train"]["num_tokens"] = [num_tokens]
        return loss

    def _check_packing(self, model: Any, device: torch.device) -> None:
        collator = self.data_collator
        assert isinstance(collator, ELMCollator)
        if self.aux_loss_enabled and (collator.packing or collator.pad_to_multiple_of):
            raise ValueError(
                f"--{'packing' if collator.packing else 'pad_to_multiple_of'}: this language model learns to use its experts evenly, and "
                "padding would count. Take --padding_free alone, or --router_aux_loss_coef 0."
            )
        check_kept_apart(
            model, self.model, device, collator.padding_free, share=self._shares(0), longest_row=collator.longest_row
        )

    def _shares(self, num_tokens: int) -> bool:
        """Whether chats may share what they begin with in rows of so many tokens."""
        collator: Any = self.data_collator
        return collator.packing and num_tokens < collator.max_tokens_to_share

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As of `WholeCheckpoints`, with TRL's count of tokens."""
        states: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
        states[type(self).__name__] = {"num_tokens": self._total_train_tokens}
        super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        """TRL's count of tokens goes on too."""
        states: Any = self.state.stateful_callbacks
        self._total_train_tokens = states.pop(type(self).__name__, {}).get("num_tokens", 0)
        super()._load_callback_state()


def gather_head(model: Any) -> None:
    """Makes the head of a model whole in this process, where it is a part of its own under FSDP2.

    TRL reads its weight without calling it. It would get the gradients of this process' rows alone; gathered before, it gets those of
    all.
    """
    head = model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


def labelled_places(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where the head is needed: the place before each label, as it predicts the next token.

    Args:
        labels: [batch, tokens], -100 where no loss is taken.

    Returns:
        `places_to_keep` [n + 1] of [`ELMModel.forward`], and `labels` [1, n + 1] of its one row. They are shifted against each
        other as those of the batch are, so the first label and the last place count for nothing.
    """
    places = labels[:, 1:] != -100  # [batch, tokens - 1]: the token after is learnt
    rows, columns = places.nonzero(as_tuple=True)
    kept = rows * labels.shape[1] + columns
    return {
        "places_to_keep": torch.cat([kept, kept.new_zeros(1)]),
        "labels": torch.cat([labels.new_full((1,), -100), labels[:, 1:][places]]).unsqueeze(0),
    }
