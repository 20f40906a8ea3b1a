"""Fine-tunes an ELM with TRL: `elm sft ...`, `accelerate launch training/sft.py ...` or `torchrun training/sft.py ...`."""

import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer

from elm_ecg.modeling_elm import ELMForConditionalGeneration
from elm_ecg.processing_elm import ELMProcessor
from elm_ecg.training.arguments import ELMArguments, ELMParser, new_elm_options
from elm_ecg.training.build import build_model, build_processor, freeze, load_elm, lora_config
from elm_ecg.training.collator import ELMCollator
from elm_ecg.training.data.loading import load_data, load_stream
from elm_ecg.training.sharing.cards import write_model_card

logger = logging.getLogger(__name__)


class CountEpochs(TrainerCallback):
    """Tells the collator the epoch, on which the random changes of the ECGs depend."""

    def __init__(self, collator: ELMCollator):
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.collator.epoch = int(state.epoch or 0)


class ELMTrainer(SFTTrainer):
    """TRL's trainer, which augments the ECGs in training only."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        collator = self.data_collator
        assert isinstance(collator, ELMCollator)
        self.data_collator = collator.without_augmentation()
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


def parse(argv: list[str] | None = None) -> tuple[ELMArguments, SFTConfig, ModelConfig]:
    """Arguments of `elm sft`: ours, every one of TRL's SFTConfig and ModelConfig, and `--config FILE.yaml`."""
    parser = ELMParser((ELMArguments, SFTConfig, ModelConfig), prog="elm sft")
    parser.set_defaults(
        max_length=None,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # one process may have a batch without ECG
        bf16=None if torch.cuda.is_available() else False,  # bf16 on a CPU is slow
    )
    args, training_args, model_args = parser.parse_args_and_config(argv)
    if args.distributed and training_args.world_size == 1:
        raise ValueError(
            "--distributed, but there is one process: start with `accelerate launch --multi_gpu training/sft.py ...` "
            "or `torchrun --nproc_per_node N training/sft.py ...`."
        )
    if not args.update:
        pretrained = args.encoder_name_or_path is not None or model_args.model_name_or_path is not None
        args.update = (
            ["connector", "llm"] if pretrained or args.architecture != "llava" else ["encoder", "connector", "llm"]
        )
    if args.wandb and find_spec("wandb") is None:
        raise ValueError("--wandb, but the package wandb is not installed: `pip install wandb`.")
    if args.wandb:
        training_args.report_to = [*training_args.report_to, "wandb"]
    return args, training_args, model_args


def build_base(
    args: ELMArguments, training_args: SFTConfig, model_args: ModelConfig
) -> tuple[ELMForConditionalGeneration, ELMProcessor]:
    """The ELM to train: a saved one (`--model_name_or_path`) or a new one.

    LoRA leaves its base as it is, and the adapter needs it again: a new one is saved under `output_dir/base_model`.
    """
    if model_args.model_name_or_path is not None:
        if unused := new_elm_options(args):
            logger.warning(
                "--model_name_or_path %s is a finished ELM: %s, of a new one, change nothing.",
                model_args.model_name_or_path,
                ", ".join(f"--{name}" for name in unused),
            )
        name = model_args.model_name_or_path
        if model_args.use_peft and os.path.isdir(name):
            name = os.path.abspath(name)  # the adapter names it, for any working directory
        return load_elm(
            name,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
        )
    processor = build_processor(args)
    llm_kwargs = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    llm_kwargs["revision"] = model_args.model_revision
    assert training_args.output_dir is not None  # TRL has a default
    base = Path(training_args.output_dir).absolute() / "base_model"
    if not model_args.use_peft:
        return build_model(args, processor, **llm_kwargs), processor
    with training_args.main_process_first(desc="building the base model"):
        resumed = training_args.resume_from_checkpoint is not None and (base / "config.json").is_file()
        if training_args.process_index == 0 and not resumed:
            build_model(args, processor, **llm_kwargs).save_pretrained(base)
            processor.save_pretrained(base)
            logger.info("Base model of the adapter: %s", base)
    return load_elm(str(base), dtype=model_args.dtype, attn_implementation=model_args.attn_implementation)


def main(argv: list[str] | None = None) -> None:
    args, training_args, model_args = parse(argv)
    torch.manual_seed(training_args.seed)
    validate = training_args.eval_strategy != "no"
    train_data: Any
    eval_data: Any = None
    if args.streaming:
        if training_args.max_steps < 1:
            raise ValueError("--streaming does not know when the data has been read once; say --max_steps.")
        train_data = load_stream(args, "train", training_args.seed, args.shuffle_buffer)
        eval_data = load_stream(args, "validation", training_args.seed) if validate else None
    else:
        num_proc = training_args.dataset_num_proc
        with training_args.main_process_first(desc="preparing the data"):
            train_data = load_data(args, "train", training_args.seed, num_proc)
            eval_data = load_data(args, "validation", training_args.seed, num_proc) if validate else None
    if train_data is None:
        raise ValueError(f"--data {' '.join(args.data)} has no split 'train'.")
    if validate and eval_data is None:
        raise ValueError(f"--data {' '.join(args.data)} has no split 'validation'; leave --eval_strategy out.")

    model, processor = build_base(args, training_args, model_args)
    peft_config = lora_config(args, model_args, model, processor) if model_args.use_peft else None
    if peft_config is None:
        freeze(model, args.update)

    collator = ELMCollator(
        processor,
        system_prompt=args.system_prompt,
        perturb=args.perturb,
        augment_ecg=args.augment_ecg,
        augment_rgb=args.augment_rgb,
        time_shift=args.time_shift,
        gain_jitter=args.gain_jitter,
        lead_dropout=args.lead_dropout,
        max_length=training_args.max_length,
        seed=training_args.seed,
    )
    training_args.max_length = None  # the collator's business
    training_args.dataset_kwargs = {"skip_prepare_dataset": True}
    trainer = ELMTrainer(
        model=model,
        args=training_args,
        train_dataset=train_data.sources[0] if args.streaming else train_data,
        eval_dataset=eval_data,
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config,
        callbacks=[CountEpochs(collator)],
    )
    trainer.train_dataset = train_data  # of a stream TRL checks that it is of `datasets`
    if peft_config is not None:
        model.lm_head.register_parameter("bias", None)  # TRL reads it, and PEFT's wrapper of the head has none
    if trainer.is_world_process_zero():
        assert trainer.model is not None
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in trainer.model.parameters()]
        total, trainable = sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
        chats = "streamed" if args.streaming else len(train_data)
        print(f"{chats} chats; {trainable:,} of {total:,} parameters trained", flush=True)

    resume = training_args.resume_from_checkpoint
    if str(resume).lower() in ("true", "last"):  # YAML's true is a bool
        resume = get_last_checkpoint(training_args.output_dir)
        if resume is None:
            raise ValueError(f"--resume_from_checkpoint: no checkpoint in {training_args.output_dir}.")
    result = trainer.train(resume_from_checkpoint=resume)
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model()
    if trainer.is_world_process_zero():
        assert training_args.output_dir is not None
        splits = {"train": train_data, "validation": eval_data}
        folder = Path(training_args.output_dir)
        write_model_card(folder, args, training_args, model_args, model.config, processor, splits)
        print(f"Saved model, processor and card to {os.path.abspath(training_args.output_dir)}", flush=True)


if __name__ == "__main__":
    main()
