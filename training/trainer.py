"""TRL's trainer for ELMs: it augments in training only, keeps no half-written checkpoint, and stops where numbers end."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import SFTTrainer
from trl.kernels import ChunkedLogProbFunction

from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.features import EncoderFeatures
from elm_ecg.training.files import let_others_read_weights, naming
from elm_ecg.training.lengths import GroupedByLength, chat_lengths
from elm_ecg.training.muon import MUON, MuonAdamW, matrices_of, muon_options
from elm_ecg.training.packing import check_kept_apart, num_packed_tokens
from elm_ecg.training.resume import RunOptions

UNFINISHED = ".unfinished"  # folder of what is being saved
# without one of them a folder is no model: they go first when another takes its place, and come last
CONFIGS = ("config.json", "adapter_config.json")
# beside those, what a model of another kind would leave for the loading of a new one
OF_A_MODEL = (
    "*.safetensors",
    "*.safetensors.index.json",
    "generation_config.json",
    "chat_template.jinja",
    "ecg_byte.json",
)
WHAT_TO_DO = (
    "Try a lower --learning_rate, a longer --warmup_steps, a lower --max_grad_norm, or --bf16 in place of --fp16; "
    "--resume_from_checkpoint last goes on from the newest checkpoint, if there is one."
)


class CountEpochs(TrainerCallback):
    """Tells the collator the epoch, on which the random changes of the ECGs depend."""

    def __init__(self, collator: ELMCollator):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.collator.epoch.fill_(int(state.epoch or 0))  # None at first, a fraction after a resume


class ELMTrainer(SFTTrainer):
    """TRL's trainer, with checkpoints that are whole or not there.

    Args:
        options: of the run; each checkpoint has them.
        kwargs: for TRL's trainer.

    `features`, where they are kept, take the place of the ECGs of a batch.
    """

    def __init__(self, *, options: RunOptions, **kwargs: Any):
        super().__init__(**kwargs)
        self.options = options
        self.features: EncoderFeatures | None = None
        if self.args.torch_compile and self.args.device.type == "cpu":
            # TRL's head writes into parts of a tensor, at which tracing would end; where there is Triton it is a kernel
            torch.compiler.allow_in_graph(ChunkedLogProbFunction)
        self._saving_to: Path | None = None  # in place of `output_dir`, while a checkpoint is saved
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As the trainer's, of chats that are neither augmented nor packed."""
        collator = self.data_collator
        assert isinstance(collator, ELMCollator)
        self.data_collator = collator.for_evaluation()  # the base class reads it as it makes the loader
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As TRL's, but the head scores the labelled places alone: TRL does so where it has Triton, and elsewhere scores all.

        TRL reads the weight of the head without calling it. A head that is a part of its own under FSDP2 would get the gradients
        of this process' rows alone; gathered before, it gets those of all.

        Raises:
            ValueError: as `check_kept_apart`, at the first batch of packed chats; or their padding would count among experts.
        """
        positions = inputs.get("position_ids")  # [rows, tokens] of packed chats
        if positions is not None and not self._kept_apart:
            self._check_packing(model, positions.device)
            self._kept_apart = True
        of_trainer: Any = self.model
        head = of_trainer.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()
        num_tokens = self._total_train_tokens
        loss = super().compute_loss(model, inputs | labelled_places(inputs["labels"]), *args, **kwargs)
        if positions is not None:  # TRL counts those of one row, padding too
            num_tokens += int(self.accelerator.gather_for_metrics(num_packed_tokens(positions)).sum())
            self._total_train_tokens = num_tokens
            self._metrics["train"]["num_tokens"] = [num_tokens]
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As the trainer's, which does not know Muon."""
        if self.args.optim != MUON or self.optimizer is not None:
            return super().create_optimizer(model)
        model, args = model or self.model, self.args
        matrices = matrices_of(model.model.language_model)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        decay = self.get_decay_parameter_names(model)  # no norms, no biases
        rest: dict[bool, list[Any]] = {True: [], False: []}
        for name, value in trained.items():
            if value not in matrices:
                rest[name in decay].append(value)
        muon = {"lr": args.learning_rate, "weight_decay": args.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        adamw = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        self.optimizer = MuonAdamW(
            [{"params": [value for value in trained.values() if value in matrices]}],
            [{"params": rest[True], "weight_decay": args.weight_decay}, {"params": rest[False], "weight_decay": 0.0}],
            muon | muon_options(args.optim_args),
            {**adamw, "fused": True},
        )
        return self.optimizer

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As the trainer's; outside of the model, which may be compiled or wrapped, and in its precision."""
        inputs = super()._prepare_inputs(inputs)
        if self.features is None:
            return inputs
        with self.compute_loss_context_manager():
            return self.features.replace(inputs)

    def _check_packing(self, model: Any, device: torch.device) -> None:
        collator = self.data_collator
        assert isinstance(collator, ELMCollator)
        if self.aux_loss_enabled and (collator.packing or collator.pad_to_multiple_of):
            raise ValueError(
                f"--{'packing' if collator.packing else 'pad_to_multiple_of'}: this language model learns to use its experts evenly, and "
                "padding would count. Take --padding_free alone, or --router_aux_loss_coef 0."
            )
        check_kept_apart(model, self.accelerator.unwrap_model(model).config, device, one_row=collator.padding_free)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the trainer's.

        Raises:
            ValueError: the loss is no number, in all processes where it is so in one. The weights are those before this step.
        """
        loss = super().training_step(*args, **kwargs)
        losses = torch.as_tensor(self.accelerator.gather(loss))  # [processes]
        if not losses.isfinite().all():
            raise ValueError(
                f"Training stopped at step {self.state.global_step + 1}: the loss is {losses.sum().item()} at the learning rate "
                f"{self._get_learning_rate():g}. Nothing of this step is kept. {WHAT_TO_DO}"
            )
        return loss

    @contextmanager
    def staging(self, target: Path) -> Iterator[Path]:
        """An empty folder below `output_dir/.unfinished` for what becomes `target`, the same one for all processes and of its
        name; it is gone after the block, as is what a process that was killed has left there."""
        folder = Path(str(self.args.output_dir)) / UNFINISHED / target.name
        if self.args.should_save:
            shutil.rmtree(folder.parent, ignore_errors=True)
            with naming(target):
                folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with naming(target):
                yield folder
        finally:
            if self.args.should_save:
                shutil.rmtree(folder.parent, ignore_errors=True)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._saving_to is None else str(self._saving_to)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the trainer's, but written beside and renamed: a kill or a full disk leaves the checkpoints that were there."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run = Path(super()._get_output_dir(trial))
        with self.staging(run / name) as folder:
            self._saving_to = folder.parent
            try:
                states: Any = self.state.stateful_callbacks  # a dict, whatever its annotation says
                states[type(self).__name__] = {"num_tokens": self._total_train_tokens}
                super()._save_checkpoint(model, trial)
            finally:
                self._saving_to = None
            if self.state.best_model_checkpoint == str(folder):  # this one: where it will be
                self.state.best_model_checkpoint = str(run / name)
            if self.args.should_save:
                self.state.save_to_json(str(folder / "trainer_state.json"))
                self.options.save(folder)
            self.accelerator.wait_for_everyone()  # each writes the state of its random numbers
            if self.args.should_save:
                if (run / name).exists():  # of an earlier run
                    os.replace(run / name, folder.parent / "replaced")
                os.replace(folder, run / name)
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run), save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None of TRL's: it would replace the card of the model that is in the folder."""

    def _load_callback_state(self) -> None:
        """TRL's count of tokens goes on too, and the best checkpoint is found where the folder of this run is now."""
        states: Any = self.state.stateful_callbacks
        self._total_train_tokens = states.pop(type(self).__name__, {}).get("num_tokens", 0)
        best = Path(super()._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        options = RunOptions.read(best)  # None where there is no such folder
        if options is not None and options.started == self.options.started:
            self.state.best_model_checkpoint = str(best)  # as the rotation names its folders: relative, or moved
        super()._load_callback_state()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's.

        Raises:
            ValueError: a weight is no number; nothing is written.
        """
        assert self.model is not None
        buffers = (
            (f"{prefix}.{name}", buffer)
            for prefix, module in self.model.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set  # those are not saved
        )
        broken = (
            name
            for name, tensor in chain(self.model.named_parameters(), buffers)
            if tensor.is_floating_point() and not _local(tensor).isfinite().all()
        )
        # of a sharded model each process sees a part; all stop where one does
        names = gather_object([next(broken, None)])
        if name := next(filter(None, names), None):
            raise ValueError(
                f"The model is not saved: after step {self.state.global_step} {name} has values that are no numbers (NaN or "
                f"infinite). What was in {self.args.output_dir} before is there still. {WHAT_TO_DO}"
            )
        if self.is_fsdp_enabled and not _internal_call:  # whole, also where checkpoints are sharded
            self._save(output_dir, self.accelerator.get_state_dict(self.model))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the trainer's, without the pickle of its arguments, which holds tokens; `RunOptions` has them to be read."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(str(output_dir or self.args.output_dir))
            (folder / "training_args.bin").unlink(missing_ok=True)
            let_others_read_weights(folder)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """A checkpoint holds tied weights once: those that it lacks are not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]  # a namedtuple
        super()._issue_warnings_after_load(load_result)


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


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The values that this process holds, of a tensor that may be sharded by FSDP or ZeRO."""
    if isinstance(tensor, torch.distributed.tensor.DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)


def replace_model(new: Path, folder: Path) -> None:
    """Moves the files of a saved model to where another may be, which goes.

    No file is copied, so this takes a moment; a process that is killed in it leaves no folder that loads.
    """
    names = sorted(path.name for path in new.iterdir())
    for pattern in (*CONFIGS, *OF_A_MODEL):  # the configs first
        for path in folder.glob(pattern):
            if path.name in CONFIGS or path.name not in names:
                path.unlink()
    for name in sorted(names, key=lambda name: name in CONFIGS):
        os.replace(new / name, folder / name)
    shutil.rmtree(folder / "base_model", ignore_errors=True)  # of an older adapter that was here
