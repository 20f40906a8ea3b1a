"""What the trainers of all commands share: whole checkpoints, a stop where numbers end, and a moving average of the weights."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from elm_ecg.training.ema import MovingAverage, saved_buffers
from elm_ecg.training.files import let_others_read_weights, naming, read_json
from elm_ecg.training.resume import RunOptions

logger = logging.getLogger(__name__)

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

    def __init__(self, collator: Any):
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self.collator.epoch.fill_(int(state.epoch or 0))  # None at first, a fraction after a resume


class WholeCheckpoints(Trainer):
    """A trainer of transformers, or with it one of TRL, with checkpoints that are whole or not there.

    Args:
        options: of the run; each checkpoint has them.
        ema_decay: of a moving average of the weights, which is evaluated and takes their place in the end; checkpoints have both. None:
            none is kept.
        kwargs: for the trainer.

    Raises:
        ValueError: a moving average of weights that are cut into parts.
    """

    def __init__(self, *, options: RunOptions, ema_decay: float | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.options = options
        self.average: MovingAverage | None = None
        if ema_decay is not None:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"--ema_decay {ema_decay} with FSDP or DeepSpeed, where no process has all weights; train with DDP, or leave the option "
                    "out."
                )
            assert self.model is not None
            self.average = MovingAverage(self.model, ema_decay)
            self.add_callback(self.average)
        self._saving_to: Path | None = None  # in place of `output_dir`, while a checkpoint is saved

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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; then the weights are the moving average."""
        result = super().train(*args, **kwargs)
        if self.average is not None:
            self.average.replace()
            logger.info("The weights are now the moving average (--ema_decay %g)", self.average.decay)
        return result

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the trainer's, of the moving average."""
        with nullcontext() if self.average is None else self.average.in_model():
            return super().evaluate(*args, **kwargs)

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
        """The best checkpoint is found where the folder of this run is now."""
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
        broken = (
            name
            for name, tensor in chain(self.model.named_parameters(), saved_buffers(self.model))
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
        if _internal_call and self.average is not None and self.args.should_save:
            self.average.save(Path(str(output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.average is not None:
            self.average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average is not None:
            self.average.load(Path(str(self.state.best_model_checkpoint)))

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
        old = folder / name
        if (old / "config.json").is_file():  # of a model within, whose scores stay beside it
            replace_model(new / name, old)
            continue
        if old.is_dir():  # no folder takes the place of one that is not empty
            shutil.rmtree(old)
        os.replace(new / name, old)
    base, config = folder / "base_model", folder / "adapter_config.json"
    if not config.is_file() or read_json(config).get("base_model_name_or_path") != str(base):
        shutil.rmtree(base, ignore_errors=True)  # of an older adapter that was here
